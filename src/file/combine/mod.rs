//! [`combine`]: one adapter out of several.

mod layers;
mod mean;

use super::layer::stored;
use super::tensors::refused;
use super::{LoadOptions, canonical, convert::settle, read_stored, write};
use crate::adapter::{Stored, StoredLayer, Warning, differs};
use crate::error::{Error, Result, shown};
use candle_core::{DType, Tensor};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// How several adapters become one.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Combination {
    /// One after the other, in the order given: what merging them in that order gives. Of an extra tensor
    /// that several have, the last counts.
    Product,
    /// The Karcher mean of their rotations and the geometric mean of their ratios, by weights that are
    /// positive and sum to 1, one for each adapter. Of extra tensors, which all must have, the arithmetic
    /// mean.
    Mean(Vec<f64>),
}

/// Writes one adapter of this crate that stands for several. `shapes` are those of the base weights by
/// path, where they are at hand, as for [`convert`](super::convert).
///
/// ```text
/// product, A then B:  R = R_B R_A  (embeddings R_A R_B),   ratio = ratio_A ratio_B
/// mean:               sum_i w_i log(R^T R_i) = 0,          ratio = prod_i ratio_i^w_i
/// ```
///
/// Computed in f64; the result has the Cayley map. Blocks of two sizes meet on the larger, which the
/// smaller has to divide. A layer that an adapter lacks is the identity in it; in a product, one that a
/// single adapter has stays as it is. Layers of different adapters are the same where their names mean the
/// same path. Row norms on record tell whether they were trained on the same base.
///
/// # Errors
///
/// * Those of reading and writing.
/// * [`Error::Argument`] for fewer than two adapters, or weights that are not positive or do not sum to 1.
/// * [`Error::File`], with the layer, for a map that is not orthogonal; for shapes, kinds or block sizes that
///   do not fit; for another base (unless [`LoadOptions::allow_changed_base`] is set); for a plane that turns
///   by 180 degrees, or adapters whose rotations differ by as much; for an extra tensor without a mean.
///
/// # Examples
///
/// ```
/// # use candle_core::{DType, Device, Tensor};
/// # use candle_doft::{Adapter, DoftConfig};
/// # let folder = tempfile::tempdir().unwrap();
/// # let path = folder.path().join("adapter.safetensors");
/// # let builder = Adapter::builder(DoftConfig::default(), &Device::Cpu)?;
/// # let weight = Tensor::ones((8, 64), DType::F32, &Device::Cpu)?;
/// # builder.wrap("head", candle_nn::Linear::new(weight, None))?;
/// # builder.finish()?.save(&path)?;
/// use candle_doft::file::{Combination, LoadOptions, combine};
///
/// let (both, options) = (folder.path().join("both.safetensors"), LoadOptions::default());
/// let mean = Combination::Mean(vec![0.5, 0.5]);
/// combine(&[&path, &path], &mean, &both, &options, &Default::default())?;
/// assert!(both.exists());
/// # Ok::<(), candle_doft::Error>(())
/// ```
pub fn combine(
    adapters: &[impl AsRef<Path>],
    combination: &Combination,
    output: impl AsRef<Path>,
    options: &LoadOptions,
    shapes: &BTreeMap<String, Vec<usize>>,
) -> Result<Vec<Warning>> {
    check(adapters.len(), combination)?;
    let mut warnings = Vec::new();
    let mut all = Vec::new();
    for path in adapters {
        let (_, mut stored) = read_stored(path.as_ref(), options)?;
        stored.check_rotations("a combination of adapters")?;
        warnings.append(&mut stored.warnings);
        if !shapes.is_empty() {
            settle(&mut stored, shapes)?;
        }
        all.push(stored);
    }
    let mut layers = BTreeMap::new();
    let mut turns = mean::Turns::default();
    for (path, of_path) in aligned(&all)? {
        let of_path = Same::new(
            &all,
            &path,
            of_path,
            options.allow_changed_base,
            &mut warnings,
        )?;
        let layer = match combination {
            Combination::Product => of_path.product()?,
            Combination::Mean(weights) => of_path.mean(weights, &mut turns)?,
        };
        layers.insert(path, layer);
    }
    warnings.extend(turns.warning());
    let extras = extras(&all, combination, &mut warnings)?;
    let combined = stored(output.as_ref(), layers, extras, Vec::new())?;
    let (bytes, more) = canonical::to_bytes(&combined)?;
    write::replace(output.as_ref(), &bytes)?;
    warnings.extend(more);
    Ok(warnings)
}

fn check(adapters: usize, combination: &Combination) -> Result<()> {
    let refuse = |what, found: String, expected: &str| {
        Err(Error::argument("combine", what, found, expected))
    };
    if adapters < 2 {
        return refuse(
            "the number of adapters",
            adapters.to_string(),
            "two or more",
        );
    }
    let Combination::Mean(weights) = combination else {
        return Ok(());
    };
    let sum: f64 = weights.iter().sum();
    if weights.len() != adapters {
        let found = format!("{} for {adapters} adapters", weights.len());
        return refuse("the number of weights", found, "one for each adapter");
    }
    if let Some(weight) = weights
        .iter()
        .find(|weight| weight.is_nan() || **weight <= 0.)
    {
        return refuse("a weight", weight.to_string(), "a number above 0");
    }
    if (sum - 1.).abs() > 1e-6 {
        return refuse("the sum of the weights", sum.to_string(), "1");
    }
    Ok(())
}

/// The layers of all adapters by path, in the order of the adapters. The first that has a layer names it.
fn aligned(all: &[Stored]) -> Result<BTreeMap<String, Vec<Option<StoredLayer>>>> {
    let mut aligned: BTreeMap<String, Vec<Option<StoredLayer>>> = BTreeMap::new();
    for (at, stored) in all.iter().enumerate() {
        let paths: Vec<String> = aligned.keys().cloned().collect();
        let matched = stored.matched(paths.iter().map(String::as_str))?;
        for (module, layer) in &stored.layers {
            let path = matched
                .get(module.as_str())
                .map_or(module.as_str(), |path| path);
            let of_path = aligned.entry(path.to_string());
            of_path.or_insert_with(|| vec![None; all.len()])[at] = Some(layer.clone());
        }
    }
    Ok(aligned)
}

/// One layer of several adapters.
struct Same<'a> {
    all: &'a [Stored],
    path: &'a str,
    /// Of each adapter; kinds and shapes are those that one of them knows.
    layers: Vec<Option<StoredLayer>>,
}

impl<'a> Same<'a> {
    fn new(
        all: &'a [Stored],
        path: &'a str,
        mut layers: Vec<Option<StoredLayer>>,
        allow_changed_base: bool,
        warnings: &mut Vec<Warning>,
    ) -> Result<Self> {
        let there = || layers.iter().flatten();
        let kind = there().find_map(|layer| layer.kind);
        let shape = there().find_map(|layer| layer.shape.clone());
        let base = there().find_map(|layer| layer.base);
        for (stored, layer) in all.iter().zip(&layers) {
            let Some(layer) = layer else { continue };
            let refuse =
                |reason: String| refused(&stored.file, format!("layer `{}` {reason}", shown(path)));
            if let (Some(kind), Some(found)) = (kind, layer.kind)
                && kind != found
            {
                return refuse(format!(
                    "is a {found:?} layer, but a {kind:?} layer in an adapter before it"
                ));
            }
            if let (Some(shape), Some(found)) = (&shape, &layer.shape)
                && shape != found
            {
                return refuse(format!(
                    "is of shape {found:?}, but {shape:?} in an adapter before it"
                ));
            }
            if let (Some(base), Some(found)) = (&base, &layer.base)
                && differs(base, found)
            {
                let reason = "was trained on another base weight than in an adapter before it, by its row norms";
                if !allow_changed_base {
                    return refuse(format!(
                        "{reason}; `allow_changed_base` combines them all the same"
                    ));
                }
                warnings.push(Warning::new(path, reason));
            }
        }
        for layer in layers.iter_mut().flatten() {
            layer.kind = kind;
            layer.shape = shape.clone();
            layer.base = base;
        }
        Ok(Self { all, path, layers })
    }

    /// An error that names the layer and the adapter of that number.
    fn refuse<T>(&self, adapter: usize, reason: impl AsRef<str>) -> Result<T> {
        let reason = format!("layer `{}` {}", shown(self.path), reason.as_ref());
        refused(&self.file(adapter), reason)
    }

    fn file(&self, adapter: usize) -> PathBuf {
        self.all
            .get(adapter)
            .map_or_else(PathBuf::new, |stored| stored.file.clone())
    }
}

fn extras(
    all: &[Stored],
    combination: &Combination,
    warnings: &mut Vec<Warning>,
) -> Result<BTreeMap<String, Tensor>> {
    let mut combined: BTreeMap<String, Tensor> = BTreeMap::new();
    for stored in all {
        for (name, tensor) in &stored.extras {
            let before = combined.insert(name.clone(), tensor.clone());
            let Some(before) = before else { continue };
            if before.dims() != tensor.dims() {
                let (found, expected) = (tensor.dims(), before.dims());
                let name = shown(name);
                let reason = format!(
                    "its extra tensor `{name}` has shape {found:?}, but {expected:?} in an adapter before it"
                );
                return refused(&stored.file, reason);
            }
            if *combination == Combination::Product {
                let message = "several adapters have this extra tensor; the last one's counts";
                warnings.push(Warning::new(name, message));
            }
        }
    }
    let Combination::Mean(weights) = combination else {
        return Ok(combined);
    };
    for (name, combined) in &mut combined {
        let mut sum = combined.zeros_like()?.to_dtype(DType::F64)?;
        for (stored, weight) in all.iter().zip(weights) {
            let Some(tensor) = stored.extras.get(name) else {
                let name = shown(name);
                let reason = format!(
                    "it lacks the extra tensor `{name}` of another adapter, so that has no mean; train both \
                     with it, or take the product"
                );
                return refused(&stored.file, reason);
            };
            sum = (sum + (tensor.to_dtype(DType::F64)? * *weight)?)?;
        }
        *combined = sum.to_dtype(combined.dtype())?;
    }
    Ok(combined)
}
