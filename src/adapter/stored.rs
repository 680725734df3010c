//! [`Stored`]: an adapter as data, between a file and the layers of a model.

use super::fingerprint::{differs, fingerprint};
use super::matching::{component, component_named, rule};
use crate::config::{BlockLayout, DoftConfig, LayerKind, LowRank, Magnitude, Map};
use crate::error::{Error, Result, nearest, shown};
use crate::params::{self, names};
use candle_core::{DType, Device, Tensor};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Something that a file holds and a reader should know, though it loads.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub struct Warning {
    /// The layer, tensor or field that is meant.
    pub subject: String,
    /// What there is to know.
    pub message: String,
}

impl Warning {
    pub(crate) fn new(subject: &str, message: impl Into<String>) -> Self {
        Self {
            subject: shown(subject),
            message: message.into(),
        }
    }
}

impl std::fmt::Display for Warning {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "`{}`: {}", self.subject, self.message)
    }
}

/// What to say where a base is used that is not the one of the training.
pub(crate) const OTHER_BASE: &str = "the base weight is not the one that it was trained on, by its row norms; it is used all the same";

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
    /// Whether the file says that one row stands for all blocks.
    pub(crate) shared: Option<bool>,
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
    /// Of the frozen weight; see [`fingerprint`](super::fingerprint::fingerprint).
    pub(crate) base: Option<[f64; 5]>,
    /// Low-rank matrices in place of the rotation and magnitude, which change nothing then.
    pub(crate) low_rank: Option<StoredLowRank>,
}

/// The matrices of LoRA or DoRA, in the shapes that PEFT gives them.
#[derive(Clone, Debug)]
pub(crate) struct StoredLowRank {
    pub(crate) spec: LowRank,
    pub(crate) a: Tensor,
    pub(crate) b: Tensor,
    pub(crate) magnitude: Option<Tensor>,
    /// The weight in a checkpoint is stored `(in, out)`.
    pub(crate) transposed: bool,
}

impl StoredLowRank {
    /// A layer of these matrices alone.
    pub(crate) fn layer(self, kind: Option<LayerKind>) -> Result<StoredLayer> {
        Ok(StoredLayer {
            kind,
            shape: None,
            block_size: 1,
            shared: None,
            map: Map::default(),
            scaled: true,
            max_norm: None,
            magnitude: Magnitude::None,
            packed: Tensor::zeros((1, 0), DType::F32, &Device::Cpu)?,
            kernel_factor: -1.,
            value: None,
            norms: None,
            base: None,
            low_rank: Some(self),
        })
    }

    /// The shape of a weight that is stored `(in, out)`, the other way round; none where it is not.
    pub(crate) fn turned(&self, weight: &[usize]) -> Option<Vec<usize>> {
        let [rows, columns] = weight else {
            return None;
        };
        let fits = self.a.dims().get(1) == Some(rows);
        (self.transposed && fits).then(|| vec![*columns, *rows])
    }

    /// The shapes of `A` and `B` for a weight of that kind and shape.
    pub(crate) fn shapes(&self, kind: LayerKind, weight: &[usize]) -> [Vec<usize>; 2] {
        let (rank, out, inner) = (self.spec.rank, weight[0], &weight[1..]);
        match kind {
            LayerKind::Embedding => [vec![rank, out], vec![inner[0], rank]],
            _ => {
                let ones = std::iter::repeat_n(1, inner.len() - 1);
                let b = [out, rank].into_iter().chain(ones).collect();
                [[&[rank], inner].concat(), b]
            }
        }
    }
}

impl StoredLayer {
    /// Packed rows in the crate's convention for that kind of layer.
    pub(crate) fn theta(&self, kind: LayerKind) -> Result<Tensor> {
        Ok(match kind.is_kernel() && self.kernel_factor != 1. {
            true => (&self.packed * self.kernel_factor)?,
            false => self.packed.clone(),
        })
    }

    /// Stored blocks; 1 may be one that is shared.
    pub(crate) fn rows(&self) -> usize {
        self.packed.dims()[0]
    }

    /// Whether its blocks are of a size that rotates.
    pub(super) fn rotates(&self) -> bool {
        self.block_size > 1
    }

    /// The settings that it was trained with on a weight of input width `width`; all others are
    /// those of `config`.
    pub(super) fn settings(&self, config: &DoftConfig, width: usize) -> DoftConfig {
        DoftConfig {
            block_size: match self.rotates() {
                true => self.block_size,
                false => DoftConfig::default().block_size,
            },
            block_share: self.rows() == 1 && width > self.block_size,
            map: self.map,
            scaled: self.scaled,
            max_norm: self.max_norm,
            magnitude: self.magnitude,
            embedding_magnitude: self.magnitude,
            low_rank: self.low_rank.as_ref().map(|low_rank| low_rank.spec),
            rules: Vec::new(),
            ..config.clone()
        }
    }

    /// How it cuts a weight of that shape; none where its blocks rotate nothing.
    pub(crate) fn layout(&self, weight: &[usize]) -> Result<Option<BlockLayout>> {
        if !self.rotates() {
            return Ok(None);
        }
        let width = weight.iter().skip(1).product();
        let settings = self.settings(&DoftConfig::default(), width);
        settings.layout("", width).map(Some)
    }

    /// `m / n0` in `dtype`; the ratio is applied, never the norms of the weight at hand, unless the
    /// file lacks its own.
    pub(crate) fn ratio(&self, norms: Option<&Tensor>, dtype: DType) -> Result<Option<Tensor>> {
        let Some(value) = &self.value else {
            return Ok(None);
        };
        let value = value.to_dtype(dtype)?;
        let norms = match (self.magnitude, self.norms.as_ref().or(norms)) {
            (Magnitude::Absolute, Some(norms)) => {
                norms.to_dtype(dtype)?.to_device(value.device())?
            }
            (Magnitude::Absolute, None) => return Ok(None),
            // The other kinds are relative to the norms already.
            _ => value.ones_like()?,
        };
        let keep = norms.gt(0.)?.to_dtype(dtype)?;
        let ratio = params::ratio(self.magnitude, value, Some(&keep), || Ok(norms))?;
        Ok(Some(ratio))
    }

    /// Whether the norms that it stores are more than 1 % off those of a weight.
    pub(crate) fn norms_differ(&self, norms: &Tensor) -> Result<bool> {
        let Some(stored) = &self.norms else {
            return Ok(false);
        };
        // On the host, for Metal has no f64.
        let wide = |t: &Tensor| {
            let host = t.to_device(&Device::Cpu)?;
            host.to_dtype(DType::F64)?.to_vec1::<f64>()
        };
        let (stored, found) = (wide(stored)?, wide(norms)?);
        Ok(stored
            .iter()
            .zip(&found)
            .any(|(s, n)| (s - n).abs() > 0.01 * n))
    }

    /// Whether the layer was trained on another base weight, by its row norms: one of zeros is another too.
    pub(crate) fn is_other_base(&self, norms: &Tensor) -> Result<bool> {
        Ok(match (self.base, fingerprint(norms)?) {
            (None, _) => false,
            (Some(_), None) => true,
            (Some(trained), Some(found)) => differs(&trained, &found),
        })
    }

    /// Returns an error for another base weight than the layer was trained on, by its row norms.
    pub(crate) fn check_base(
        &self,
        stored: &Stored,
        path: &str,
        norms: &Tensor,
        allow_changed: bool,
    ) -> Result<()> {
        if allow_changed || !self.is_other_base(norms)? {
            return Ok(());
        }
        let reason = format!(
            "`{path}` is not the base weight it was trained on, by its row norms; \
             `allow_changed_base` uses it all the same"
        );
        Err(Error::file(&stored.file, reason))
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
                tensor: shown(&format!("{module}.{tensor}")),
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
        if let Some(kind) = self.kind
            && kind.rank() != weight.len()
        {
            let found = format!("the kind {kind:?} on record");
            return fail(name, found, format!("{weight:?} of `{path}.weight`"));
        }
        if let Some(low_rank) = &self.low_rank {
            let kind = self.kind.or(LayerKind::of_rank(weight.len()));
            let kind = kind.unwrap_or(LayerKind::Linear);
            // A layer holds its weight as `(out, in)`, whatever a checkpoint does.
            let turned = low_rank.turned(weight);
            let weight = turned.as_deref().unwrap_or(weight);
            let [a, b] = low_rank.shapes(kind, weight);
            let (name_a, name_b) = names::low_rank(kind);
            // Kernels of 1 are stored with their axes and without.
            let flat = |dims: &[usize]| [dims[0], dims[1..].iter().product()];
            for (name, tensor, expected) in [(name_a, &low_rank.a, a), (name_b, &low_rank.b, b)] {
                if tensor.rank() < 2 || flat(tensor.dims()) != flat(&expected) {
                    let found = format!("{:?}", tensor.dims());
                    return fail(name, found, format!("{expected:?} of `{path}.weight`"));
                }
            }
            return match &low_rank.magnitude {
                Some(m) if m.elem_count() != weight[0] => {
                    let found = format!("{} elements", m.elem_count());
                    fail(
                        names::DORA,
                        found,
                        format!("{} of `{path}.weight`", weight[0]),
                    )
                }
                _ => Ok(()),
            };
        }
        let width: usize = weight.iter().skip(1).product();
        let (rows, b) = (self.rows(), self.block_size);
        if b > width || !width.is_multiple_of(b) || (rows != 1 && rows != width / b) {
            let found = format!("{rows} rows of block size {b}");
            let blocks = width as f64 / b as f64;
            let expected = format!("{blocks} or 1 (in = {width} of `{path}.weight`)");
            return fail(name, found, expected);
        }
        if rows == 1 && b < width && self.shared == Some(false) {
            let found = format!("1 row of block size {b}, though the file shares no block");
            let expected = format!("{} (in = {width} of `{path}.weight`)", width / b);
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
    /// Those of them that belong to the adapter only if the base has a tensor of that name.
    pub(crate) unannounced: BTreeSet<String>,
    pub(crate) warnings: Vec<Warning>,
    /// Whether modules may match no layer.
    pub(crate) allow_partial: bool,
    /// Layers may be built over another base than it was trained on.
    pub(crate) allow_changed_base: bool,
}

/// From module to path.
type Renamer = dyn Fn(&str) -> Option<String> + Send + Sync;

impl Stored {
    /// Returns an error for a layer of low-rank matrices, where only rotations can be worked on.
    pub(crate) fn check_rotations(&self, work: &str) -> Result<()> {
        let found = self
            .layers
            .iter()
            .find(|(_, layer)| layer.low_rank.is_some());
        match found {
            None => Ok(()),
            Some((path, _)) => Err(Error::file(
                &self.file,
                format!(
                    "layer `{}` is LoRA or DoRA; {work} is for rotations",
                    shown(path)
                ),
            )),
        }
    }

    /// The components that its layers are of, sorted.
    pub(crate) fn components(&self) -> Vec<String> {
        let found = self.layers.keys().filter_map(|m| component(m).map(shown));
        found.collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// Keeps one component, and gives modules the paths that a caller says they mean.
    pub(crate) fn choose(&mut self, wanted: Option<&str>, rename: Option<&Renamer>) -> Result<()> {
        if let Some(wanted) = wanted {
            let there = self.components();
            let meant = component_named(wanted);
            self.layers
                .retain(|module, _| component(module) == Some(meant));
            if self.layers.is_empty() {
                let there = match there.is_empty() {
                    true => "none is of any".to_string(),
                    false => format!("some are of `{}`", there.join("`, `")),
                };
                let wanted = shown(wanted);
                let reason = format!("no layer is of component `{wanted}`, {there}");
                return Err(Error::file(&self.file, reason));
            }
        }
        if let Some(rename) = rename {
            let mut renamed: BTreeMap<String, (String, StoredLayer)> = BTreeMap::new();
            for (module, layer) in std::mem::take(&mut self.layers) {
                let path = rename(&module).unwrap_or_else(|| module.clone());
                if let Some((other, _)) = renamed.get(&path) {
                    return self.ambiguous([other, &module], &path, "rename each to its own");
                }
                renamed.insert(path, (module, layer));
            }
            let renamed = renamed.into_iter();
            self.layers = renamed.map(|(path, (_, layer))| (path, layer)).collect();
        }
        Ok(())
    }

    /// The module that means a path, by the first rule under which one does, and the number of that
    /// rule.
    pub(super) fn rank(&self, path: &str) -> Result<Option<(u8, &str, &StoredLayer)>> {
        if let Some((module, layer)) = self.layers.get_key_value(path) {
            return Ok(Some((0, module, layer)));
        }
        let ranked = self
            .layers
            .iter()
            .filter_map(|(module, layer)| Some((rule(module, path)?, module.as_str(), layer)));
        let mut ranked: Vec<_> = ranked.collect();
        ranked.sort_by_key(|(rule, ..)| *rule);
        match ranked.as_slice() {
            [(first, a, _), (second, b, _), ..] if first == second => {
                self.ambiguous([a, b], path, "choose a component (--component), or rename")
            }
            [found, ..] => Ok(Some(*found)),
            [] => Ok(None),
        }
    }

    /// The module that means a path, by the first rule under which one does.
    pub(crate) fn find(&self, path: &str) -> Result<Option<(&str, &StoredLayer)>> {
        let found = self.rank(path)?;
        Ok(found.map(|(_, module, layer)| (module, layer)))
    }

    /// The one path of each module, of all the paths that a model has.
    pub(crate) fn matched<'a>(
        &self,
        paths: impl IntoIterator<Item = &'a str>,
    ) -> Result<BTreeMap<&str, &'a str>> {
        let mut found = BTreeSet::new();
        for path in paths {
            if let Some((rule, module, _)) = self.rank(path)? {
                found.insert((module, rule, path));
            }
        }
        let mut matched: BTreeMap<&str, (u8, &str)> = BTreeMap::new();
        for (module, rule, path) in found {
            match matched.get(module) {
                None => {
                    matched.insert(module, (rule, path));
                }
                Some((first, other)) if *first == rule => {
                    return self.ambiguous([other, path], module, "rename");
                }
                // A path that it means less well.
                Some(_) => {}
            }
        }
        let pairs = matched.into_iter();
        Ok(pairs.map(|(module, (_, path))| (module, path)).collect())
    }

    pub(crate) fn ambiguous<T>(&self, [a, b]: [&str; 2], name: &str, fix: &str) -> Result<T> {
        let (a, b, name) = (shown(a), shown(b), shown(name));
        let reason = format!("`{a}` and `{b}` both mean `{name}`; {fix}");
        Err(Error::file(&self.file, reason))
    }

    /// That a part of it was asked for by no layer, beside the names that it may mean.
    pub(crate) fn unused<'a>(
        &self,
        unused: &[&String],
        names: impl IntoIterator<Item = &'a str>,
    ) -> Error {
        let first = unused.first().map_or("", |name| name.as_str());
        Error::FileUnused {
            file: self.file.clone(),
            count: unused.len(),
            total: self.layers.len() + self.extras.len(),
            first: shown(first),
            nearest: nearest(first, names).iter().map(|n| shown(n)).collect(),
        }
    }
}
