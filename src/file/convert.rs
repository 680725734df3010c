//! [`convert`]: from any readable adapter to one of this crate or to a PEFT folder.

use super::{LoadOptions, canonical, lora_write, peft_write, read_stored, write};
use crate::adapter::{Stored, Warning};
use crate::config::LayerKind;
use crate::error::Result;
use std::collections::BTreeMap;
use std::path::Path;

/// What to write.
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
    let (input, output) = (input.as_ref(), output.as_ref());
    let (_, mut stored) = read_stored(input, options)?;
    let mut warnings = std::mem::take(&mut stored.warnings);
    if !shapes.is_empty() {
        settle(&mut stored, shapes)?;
    }
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
    }
    Ok(warnings)
}

/// Gives layers the paths, kinds and shapes of the base.
fn settle(stored: &mut Stored, shapes: &BTreeMap<String, Vec<usize>>) -> Result<()> {
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
