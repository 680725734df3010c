//! [`Stored`]: an adapter as data, between a file and the layers of a model.

use super::matching::{component, rule};
use super::{Adapter, Inner};
use crate::config::{BlockLayout, DoftConfig, LayerKind, Magnitude, Map};
use crate::error::{Error, Result, nearest};
use crate::layer::Adaptation;
use crate::params::names;
use candle_core::{DType, Device, Tensor, Var};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// Something that a file holds and a reader should know, though it loads.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub struct Warning {
    /// The layer, tensor or field that is meant.
    pub subject: String,
    /// What there is to know.
    pub message: String,
}

impl std::fmt::Display for Warning {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "`{}`: {}", self.subject, self.message)
    }
}

/// What to say where the norms of a file are not those of the weight at hand.
pub(crate) const NORMS_DIFFER: &str =
    "its `initial_norm` is more than 1 % off the row norms of the base; the file's own counts";

/// One adapted layer as a file holds it.
#[derive(Clone, Debug)]
pub(crate) struct StoredLayer {
    /// Not every file says.
    pub(crate) kind: Option<LayerKind>,
    /// Shape of the frozen weight, where known.
    pub(crate) shape: Option<Vec<usize>>,
    pub(crate) block_size: usize,
    pub(crate) map: Map,
    pub(crate) scaled: bool,
    pub(crate) max_norm: Option<f64>,
    pub(crate) magnitude: Magnitude,
    /// Packed rows, in the crate's convention for linear layers and embeddings.
    pub(crate) packed: Tensor,
    /// What to multiply them by for a kernel: files of most tools turn kernels the other way round,
    /// and `R(-Q) = R(Q)^T`.
    pub(crate) kernel_factor: f64,
    /// The magnitude parameter of that kind, `(out)`.
    pub(crate) value: Option<Tensor>,
    /// The norms `n0` that an absolute magnitude is relative to.
    pub(crate) norms: Option<Tensor>,
    /// Of the frozen weight; see [`fingerprint`].
    pub(crate) base: Option<[f64; 5]>,
}

impl StoredLayer {
    /// Packed rows in the crate's convention for that kind of layer.
    pub(crate) fn theta(&self, kind: LayerKind) -> Result<Tensor> {
        Ok(match kind.is_kernel() && self.kernel_factor != 1. {
            true => (&self.packed * self.kernel_factor)?,
            false => self.packed.clone(),
        })
    }

    /// Whether its blocks are of a size that rotates.
    fn rotates(&self) -> bool {
        self.block_size > 1
    }

    /// How it cuts a weight of that shape; none where its blocks rotate nothing.
    pub(crate) fn layout(&self, weight: &[usize]) -> Result<Option<BlockLayout>> {
        if !self.rotates() {
            return Ok(None);
        }
        let width = weight.iter().skip(1).product();
        let config = DoftConfig {
            block_size: self.block_size,
            block_share: self.packed.dims()[0] == 1 && width > self.block_size,
            map: self.map,
            scaled: self.scaled,
            max_norm: self.max_norm,
            ..DoftConfig::default()
        };
        config.layout("", width).map(Some)
    }

    /// `m / n0` in `dtype`; the ratio is applied, never the norms of the weight at hand, unless the
    /// file lacks its own.
    pub(crate) fn ratio(&self, norms: Option<&Tensor>, dtype: DType) -> Result<Option<Tensor>> {
        let Some(value) = &self.value else {
            return Ok(None);
        };
        let value = value.to_dtype(dtype)?;
        Ok(Some(match self.magnitude {
            Magnitude::Log => value.exp()?,
            Magnitude::Absolute => {
                let Some(norms) = self.norms.as_ref().or(norms) else {
                    return Ok(None);
                };
                let norms = norms.to_dtype(dtype)?.to_device(value.device())?;
                let alive = norms.gt(0.)?;
                let ones = norms.ones_like()?;
                alive
                    .where_cond(&value, &ones)?
                    .div(&alive.where_cond(&norms, &ones)?)?
            }
            _ => value,
        }))
    }

    /// Whether the norms that it stores are more than 1 % off those of a weight.
    pub(crate) fn norms_differ(&self, norms: &Tensor) -> Result<bool> {
        let Some(stored) = &self.norms else {
            return Ok(false);
        };
        let wide = |t: &Tensor| t.to_dtype(DType::F64)?.to_vec1::<f64>();
        let (stored, found) = (wide(stored)?, wide(norms)?);
        Ok(stored
            .iter()
            .zip(&found)
            .any(|(s, n)| (s - n).abs() > 0.01 * n))
    }

    /// Checks that its tensors fit a weight.
    pub(crate) fn check_shape(
        &self,
        file: &Path,
        module: &str,
        path: &str,
        weight: &[usize],
    ) -> Result<()> {
        let fail = |tensor: &str, found: String, expected: String| {
            Err(Error::FileTensor {
                file: file.to_path_buf(),
                tensor: format!("{module}.{tensor}"),
                found,
                expected,
                fix: "is this the model it was trained on?",
            })
        };
        let name = names::rotation(self.kind.unwrap_or(LayerKind::Linear));
        if let Some(shape) = &self.shape
            && shape != weight
        {
            let found = format!("a base weight {shape:?} on record");
            return fail(name, found, format!("{weight:?} of `{path}.weight`"));
        }
        let width: usize = weight.iter().skip(1).product();
        let (rows, b) = (self.packed.dims()[0], self.block_size);
        if b > width || !width.is_multiple_of(b) || (rows != 1 && rows != width / b) {
            let found = format!("{rows} rows of block size {b}");
            let blocks = width as f64 / b as f64;
            let expected = format!("{blocks} or 1 (in = {width} of `{path}.weight`)");
            return fail(name, found, expected);
        }
        let out = weight.first().copied().unwrap_or(0);
        match (&self.value, names::magnitude(self.magnitude)) {
            (Some(value), Some(name)) if value.elem_count() != out => {
                let found = format!("{} elements", value.elem_count());
                fail(
                    name,
                    found,
                    format!("{out}, one for each output of `{path}.weight`"),
                )
            }
            _ => Ok(()),
        }
    }
}

/// A whole adapter as a file holds it.
#[derive(Clone, Debug)]
pub(crate) struct Stored {
    /// Where it came from, for errors.
    pub(crate) file: PathBuf,
    pub(crate) config: DoftConfig,
    pub(crate) layers: BTreeMap<String, StoredLayer>,
    pub(crate) extras: BTreeMap<String, Tensor>,
    pub(crate) warnings: Vec<Warning>,
    /// Whether modules may match no layer.
    pub(crate) allow_partial: bool,
}

/// From module to path.
type Renamer = dyn Fn(&str) -> Option<String> + Send + Sync;

impl Stored {
    /// Keeps one component, and gives modules the paths that a caller says they mean.
    pub(crate) fn choose(&mut self, wanted: Option<&str>, rename: Option<&Renamer>) {
        if let Some(wanted) = wanted {
            self.layers
                .retain(|module, _| component(module) == Some(wanted));
        }
        if let Some(rename) = rename {
            let layers = std::mem::take(&mut self.layers).into_iter();
            let renamed = layers.map(|(module, layer)| (rename(&module).unwrap_or(module), layer));
            self.layers = renamed.collect();
        }
    }

    /// The module that means a path, by the first rule under which one does.
    pub(crate) fn find(&self, path: &str) -> Result<Option<(&String, &StoredLayer)>> {
        if let Some(found) = self.layers.get_key_value(path) {
            return Ok(Some(found));
        }
        let ranked = self
            .layers
            .iter()
            .filter_map(|found| Some((rule(found.0, path)?, found)));
        let mut ranked: Vec<_> = ranked.collect();
        ranked.sort_by_key(|(rule, _)| *rule);
        match ranked.as_slice() {
            [(first, (a, _)), (second, (b, _)), ..] if first == second => Err(Error::File {
                file: self.file.clone(),
                reason: format!(
                    "`{a}` and `{b}` both mean `{path}`; choose a component, or rename"
                ),
            }),
            [(_, found), ..] => Ok(Some(*found)),
            [] => Ok(None),
        }
    }
}

/// What is left of a [`Stored`] while a model is built from it.
#[derive(Debug)]
pub(super) struct Source {
    stored: Stored,
    asked: Mutex<BTreeSet<String>>,
    warnings: Mutex<Vec<Warning>>,
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl Source {
    pub(super) fn layer(&self, path: &str) -> Result<Option<&StoredLayer>> {
        Ok(self.stored.find(path)?.map(|(_, layer)| layer))
    }

    /// The configuration of a layer as it was trained.
    fn config(&self, layer: &StoredLayer) -> DoftConfig {
        let mut config = self.stored.config.clone();
        config.rules.clear();
        config.block_size = match layer.rotates() {
            true => layer.block_size,
            false => DoftConfig::default().block_size,
        };
        config.block_share = false;
        config.map = layer.map;
        config.scaled = layer.scaled;
        config.max_norm = layer.max_norm;
        config.magnitude = layer.magnitude;
        config.embedding_magnitude = layer.magnitude;
        config
    }

    /// Checks that the tensors of the file fit a weight, before any layer is made.
    pub(super) fn check(
        &self,
        path: &str,
        kind: LayerKind,
        weight: &[usize],
        norms: &Tensor,
    ) -> Result<DoftConfig> {
        let Some((module, layer)) = self.stored.find(path)? else {
            return Ok(self.stored.config.clone());
        };
        let mut config = self.config(layer);
        let other = layer.kind.is_some_and(|stored| stored != kind);
        if other {
            let reason = format!(
                "`{path}` is a {kind:?} layer, in the file it is a {:?}",
                layer.kind
            );
            return Err(Error::File {
                file: self.stored.file.clone(),
                reason,
            });
        }
        layer.check_shape(&self.stored.file, module, path, weight)?;
        let width: usize = weight.iter().skip(1).product();
        config.block_share = layer.packed.dims()[0] == 1 && width > layer.block_size;
        self.compare_base(path, layer, norms)?;
        Ok(config)
    }

    fn compare_base(&self, path: &str, layer: &StoredLayer, norms: &Tensor) -> Result<()> {
        let warn = |message: &str| {
            locked(&self.warnings).push(Warning {
                subject: path.to_string(),
                message: message.into(),
            });
        };
        if let (Some(stored), Some(found)) = (layer.base, fingerprint(norms)?)
            && differs(&stored, &found)
        {
            warn("the base weight is not the one it was trained on, by its row norms");
        }
        if layer.norms_differ(norms)? {
            warn(NORMS_DIFFER);
        }
        Ok(())
    }

    /// Gives a layer the parameters of the file.
    pub(super) fn fill(&self, layer: &Adaptation) -> Result<()> {
        let Some((module, stored)) = self.stored.find(layer.path())? else {
            return Ok(());
        };
        let set = |parameter: &Tensor, value: &Tensor| -> Result<()> {
            let value = value
                .to_device(parameter.device())?
                .to_dtype(parameter.dtype())?;
            let value = value.reshape(parameter.shape())?;
            Ok(Var::from_tensor(parameter)?.set(&value)?)
        };
        let params = layer.params();
        if stored.rotates() {
            set(params.rotation(), &stored.theta(layer.kind())?)?;
        }
        if let (Some(parameter), Some(value)) = (params.magnitude_parameter(), &stored.value) {
            set(parameter, value)?;
        }
        locked(&self.asked).insert(module.clone());
        Ok(())
    }

    /// The value of an extra tensor, once it is asked for.
    pub(super) fn extra(&self, name: &str) -> Option<&Tensor> {
        let value = self.stored.extras.get(name)?;
        locked(&self.asked).insert(name.to_string());
        Some(value)
    }

    pub(super) fn warnings(&self) -> Vec<Warning> {
        let mut warnings = self.stored.warnings.clone();
        warnings.extend(locked(&self.warnings).iter().cloned());
        let unused = self.unused();
        if let (true, Some(first)) = (self.stored.allow_partial, unused.first()) {
            warnings.push(Warning {
                subject: first.clone(),
                message: format!(
                    "{} modules match no layer so far, this one first",
                    unused.len()
                ),
            });
        }
        warnings
    }

    /// What no layer has asked for.
    fn unused(&self) -> Vec<String> {
        let asked = locked(&self.asked);
        let all = self.stored.layers.keys().chain(self.stored.extras.keys());
        all.filter(|name| !asked.contains(*name)).cloned().collect()
    }

    /// Refuses a model that left a part of the file unused.
    pub(super) fn check_used<'a>(
        &self,
        paths: impl Iterator<Item = &'a str> + Clone,
    ) -> Result<()> {
        let unused = self.unused();
        let Some(first) = unused.first() else {
            return Ok(());
        };
        if self.stored.allow_partial && !locked(&self.asked).is_empty() {
            return Ok(());
        }
        Err(Error::FileUnused {
            file: self.stored.file.clone(),
            count: unused.len(),
            total: self.stored.layers.len() + self.stored.extras.len(),
            first: first.to_string(),
            nearest: nearest(first, paths),
        })
    }
}

impl Adapter {
    /// An adapter whose layers take settings and parameters from a file, as they are built.
    pub(crate) fn from_stored(stored: Stored, device: &Device) -> Result<Self> {
        stored.config.validate()?;
        let config = stored.config.clone();
        let source = Source {
            stored,
            asked: Mutex::default(),
            warnings: Mutex::default(),
        };
        Ok(Self::with_source(config, device, Some(source)))
    }

    /// Everything that a file has to hold.
    pub(crate) fn to_stored(&self, file: PathBuf) -> Result<Stored> {
        self.check_complete()?;
        let mut layers = BTreeMap::new();
        for layer in self.inner.adapted() {
            layers.insert(layer.path().to_string(), stored_layer(&layer)?);
        }
        let cpu = |var: &Var| var.as_tensor().detach().to_device(&Device::Cpu);
        let mut extras = BTreeMap::new();
        for (name, var) in self.inner.extras().iter() {
            extras.insert(name.clone(), cpu(var)?);
        }
        Ok(Stored {
            file,
            config: self.inner.config.clone(),
            layers,
            extras,
            warnings: Vec::new(),
            allow_partial: false,
        })
    }

    /// The file that the adapter was loaded from, whole.
    pub(crate) fn source(&self) -> Option<&Stored> {
        self.inner.source.as_ref().map(|source| &source.stored)
    }

    /// What is worth knowing about the file that the adapter was loaded from, and about how it fits
    /// the model so far. Empty for an adapter that was not loaded.
    pub fn warnings(&self) -> Vec<Warning> {
        let source = self.inner.source.as_ref();
        source.map_or_else(Vec::new, Source::warnings)
    }
}

fn stored_layer(layer: &Adaptation) -> Result<StoredLayer> {
    let (params, layout) = (layer.params(), layer.layout());
    let cpu = |tensor: &Tensor| tensor.detach().to_device(&Device::Cpu);
    let theta = cpu(params.rotation())?;
    let packed = match layer.kind().is_kernel() {
        true => theta.neg()?,
        false => theta,
    };
    let norms = cpu(params.norms())?;
    Ok(StoredLayer {
        kind: Some(layer.kind()),
        shape: Some(layer.shape().to_vec()),
        block_size: layout.block_size,
        map: layout.map,
        scaled: layout.scaled,
        max_norm: layout.max_norm,
        magnitude: params.kind(),
        packed,
        kernel_factor: -1.,
        value: params.magnitude_parameter().map(cpu).transpose()?,
        base: fingerprint(&norms)?,
        norms: (params.kind() == Magnitude::Absolute).then_some(norms),
    })
}

/// The first number is `N = sqrt(sum n0²)`, the others four sums of `n0` under the signs of a hash.
/// None where all norms are zero.
pub(crate) fn fingerprint(norms: &Tensor) -> Result<Option<[f64; 5]>> {
    let norms: Vec<f64> = norms.to_dtype(DType::F64)?.to_vec1()?;
    let mut rng = crate::rng::SplitMix64::new(0);
    let mut sums = [0f64; 5];
    for n in &norms {
        let hash = rng.next_u64();
        sums[0] += n * n;
        for (k, sum) in sums[1..].iter_mut().enumerate() {
            *sum += if hash >> k & 1 == 1 { -n } else { *n };
        }
    }
    sums[0] = sums[0].sqrt();
    Ok((sums[0] > 0.).then_some(sums))
}

/// Whether two fingerprints are of different weights. Casts and 8-bit quantization move them by at
/// most 2e-4, 4-bit by 4e-3; another matrix or other rows by 2e-2 and more.
pub(crate) fn differs(a: &[f64; 5], b: &[f64; 5]) -> bool {
    let apart = (1..5).map(|k| (a[k] - b[k]).powi(2)).sum::<f64>();
    (b[0] / a[0] - 1.).abs() > 5e-3 || (apart / 4.).sqrt() / a[0] > 5e-3
}

impl Inner {
    pub(super) fn stored_extra(&self, name: &str) -> Option<&Tensor> {
        self.source.as_ref()?.extra(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fingerprint_is_that_of_the_format() -> Result<()> {
        let norms = Tensor::new(&[5f64, 13.], &Device::Cpu)?;
        let found = fingerprint(&norms)?.expect("norms above zero");
        assert_eq!(found, [13.92838827718412, 8., 8., -18., 8.]);
        assert!(fingerprint(&Tensor::zeros(3, DType::F32, &Device::Cpu)?)?.is_none());
        assert!(differs(&found, &[13.92838827718412, 8., 8., -18., 8.2]));
        assert!(!differs(&found, &[13.93, 8., 8., -18., 8.001]));
        Ok(())
    }
}
