//! [`convert`]: from any readable adapter to one of this crate, a PEFT folder or a file for kohya's
//! readers; and changes on the way.

use super::changes::{Cause, Changes, Conversion, warning};
use super::{
    LoadOptions, canonical, lora_write, peft_write, project, read_stored, series, strength, write,
};
use crate::adapter::{Stored, Warning};
use crate::config::LayerKind;
use crate::error::Result;
use std::collections::BTreeMap;
use std::path::Path;

/// What to write.
///
/// | target | who reads it |
/// |---|---|
/// | [`Doft`](Self::Doft) | this crate; OneTrainer's DOFT branch and the ComfyUI-OFTv2 node where the map is Cayley's, the exponential or the series of five terms |
/// | [`Peft`](Self::Peft) | PEFT from 0.18 (embeddings from 0.19), and this crate |
/// | [`Series`](Self::Series) | kohya's sd-scripts (`networks/oft_v2.py`), all that read OneTrainer's OFT, and this crate |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Target {
    /// The file of this crate.
    Doft,
    /// A folder of PEFT: of OFT, or of LoRA or DoRA where all layers are. OFT has no magnitude there: one that is
    /// not 1 throughout is refused, or dropped on request.
    Peft {
        /// Whether magnitudes may be dropped.
        drop_magnitude: bool,
    },
    /// A file for readers of OneTrainer's `oft_R.weight` that know no other key, as those of kohya's
    /// sd-scripts: they take it for the unscaled [`Map::SERIES`](crate::Map::SERIES), whatever stands
    /// beside it. It holds `Q`, of an exponential the one that turns by the same angles in the series. A magnitude that is not 1 throughout is refused, or dropped on request; how far the
    /// series is from the map of the adapter is a warning.
    Series {
        /// Whether magnitudes may be dropped.
        drop_magnitude: bool,
    },
}

/// Rewrites an adapter. `shapes` are those of the base weights by path, where they are at hand: a
/// kernel's rotation is stored the other way round in PEFT's format, and an adapter file alone does
/// not always tell a kernel.
///
/// # Errors
///
/// Those of reading and writing; [`Error::File`](crate::Error::File) for what the target cannot hold,
/// with the layer.
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
/// use candle_doft::file::{LoadOptions, Target, convert};
///
/// let (options, target) = (LoadOptions::default(), Target::Peft { drop_magnitude: false });
/// convert(&path, folder.path().join("peft"), target, &options, &Default::default())?;
/// let again = Adapter::load(folder.path().join("peft"), &Device::Cpu)?;
/// # Ok::<(), candle_doft::Error>(())
/// ```
pub fn convert(
    input: impl AsRef<Path>,
    output: impl AsRef<Path>,
    target: Target,
    options: &LoadOptions,
    shapes: &BTreeMap<String, Vec<usize>>,
) -> Result<Vec<Warning>> {
    let changes = Changes::default();
    Ok(convert_with(input, output, target, options, shapes, &changes)?.warnings)
}

/// [`convert`] with changes on the way: a projection first, then a strength.
///
/// # Errors
///
/// Those of [`convert`]; [`Error::Strength`](crate::Error::Strength) for a strength that a layer cannot
/// have; [`Error::File`](crate::Error::File) for a layer that cannot be projected;
/// [`Error::NoMatch`](crate::Error::NoMatch) for a pattern of a strength that matches no layer. Nothing is
/// written then.
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
/// use candle_doft::config::Strengths;
/// use candle_doft::file::{Changes, LoadOptions, Target, convert_with};
///
/// let half = Changes::default().with_strength(Strengths::from(1.).with_rule("head", 0.5));
/// let (options, output) = (LoadOptions::default(), folder.path().join("half.safetensors"));
/// let done = convert_with(&path, &output, Target::Doft, &options, &Default::default(), &half)?;
/// assert!(output.exists() && done.warnings.is_empty());
/// # Ok::<(), candle_doft::Error>(())
/// ```
pub fn convert_with(
    input: impl AsRef<Path>,
    output: impl AsRef<Path>,
    target: Target,
    options: &LoadOptions,
    shapes: &BTreeMap<String, Vec<usize>>,
    changes: &Changes,
) -> Result<Conversion> {
    let (input, output) = (input.as_ref(), output.as_ref());
    let (_, mut stored) = read_stored(input, options)?;
    let mut warnings = std::mem::take(&mut stored.warnings);
    if !shapes.is_empty() {
        settle(&mut stored, shapes)?;
    }
    let mut changed = Vec::new();
    if changes.projection {
        changed = project::apply(&mut stored)?;
        match warning(&changed, Cause::Projection, "its series was projected:") {
            Some(warning) => warnings.push(warning),
            None => {
                let message = "every map is orthogonal already; nothing was projected";
                warnings.push(Warning::new("projection", message));
            }
        }
    }
    strength::apply(&mut stored, &changes.strength, &mut warnings)?;
    match target {
        Target::Doft => {
            let (bytes, more) = canonical::to_bytes(&stored)?;
            write::replace(output, &bytes)?;
            warnings.extend(more);
        }
        Target::Peft { .. } if lora_write::is_meant(&stored)? => {
            lora_write::folder(&stored, output)?;
        }
        Target::Peft { drop_magnitude } => {
            warnings.extend(peft_write::folder(&stored, output, drop_magnitude)?);
        }
        Target::Series { drop_magnitude } => {
            let (bytes, of_series, more) = series::to_bytes(&stored, drop_magnitude)?;
            write::replace(output, &bytes)?;
            changed.extend(of_series);
            warnings.extend(more);
        }
    }
    Ok(Conversion {
        warnings,
        changes: changed,
    })
}

/// Gives layers the paths, kinds and shapes of the base.
pub(super) fn settle(stored: &mut Stored, shapes: &BTreeMap<String, Vec<usize>>) -> Result<()> {
    let paths = || shapes.keys().map(String::as_str);
    let mut renamed = BTreeMap::new();
    for (module, path) in stored.matched(paths())? {
        let (mut layer, shape) = (stored.layers[module].clone(), &shapes[path]);
        layer.check_shape(&stored.file, module, path, shape)?;
        layer.kind = layer.kind.or(LayerKind::of_rank(shape.len()));
        layer.shape = Some(shape.clone());
        renamed.insert(module.to_string(), (path.to_string(), layer));
    }
    let modules = stored.layers.keys();
    let unused: Vec<&String> = modules.filter(|m| !renamed.contains_key(*m)).collect();
    if !unused.is_empty() {
        return Err(stored.unused(&unused, paths()));
    }
    stored.layers = renamed.into_values().collect();
    Ok(())
}
