//! Writing a PEFT OFT folder, for what such a folder can hold.

use super::tensors::{check_finite, refused, shown};
use super::write;
use crate::adapter::{PEFT_PREFIX, Stored, StoredLayer, Warning};
use crate::config::{LayerKind, Magnitude, Map, nearest_divisor};
use crate::error::{Error, Result};
use crate::params::names;
use crate::rotation;
use candle_core::{DType, Device, Tensor};
use std::collections::BTreeMap;
use std::path::Path;

/// Block sizes that are tried for the one number that PEFT derives every block size from.
const LARGEST_BLOCK: usize = 8192;

/// Writes the folder; its configuration comes last, so that a folder with one is complete.
pub(super) fn folder(stored: &Stored, folder: &Path, drop_magnitude: bool) -> Result<Vec<Warning>> {
    let mut warnings = Vec::new();
    let plan = Plan::new(stored, drop_magnitude, &mut warnings)?;
    let mut tensors = BTreeMap::new();
    for (path, layer) in &stored.layers {
        let embedding = layer.kind == Some(LayerKind::Embedding);
        let name = names::rotation(if embedding {
            LayerKind::Embedding
        } else {
            LayerKind::Linear
        });
        tensors.insert(
            format!("{PEFT_PREFIX}{path}.{name}"),
            plan.values(&stored.file, path, layer)?,
        );
    }
    for (name, tensor) in &stored.extras {
        tensors.insert(plan.extra_key(stored, name)?, tensor.clone());
    }
    check_finite(&tensors)?;
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    let bytes = write::safetensors(&tensors, &metadata)?;
    std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    write::replace(&folder.join("adapter_model.safetensors"), &bytes)?;
    let config = plan.config(stored);
    let text = serde_json::to_string_pretty(&config).or_else(|e| refused(folder, e.to_string()))?;
    write::replace(
        &folder.join("adapter_config.json"),
        (text + "\n").as_bytes(),
    )?;
    Ok(warnings)
}

/// What all layers have in common.
struct Plan {
    map: Map,
    block_size: usize,
    share: bool,
    modules_to_save: Vec<String>,
    biases: bool,
}

impl Plan {
    fn new(stored: &Stored, drop_magnitude: bool, warnings: &mut Vec<Warning>) -> Result<Self> {
        let refuse = |path: &str, reason: &str| {
            refused(
                &stored.file,
                format!("layer `{}`: a PEFT folder {reason}", shown(path)),
            )
        };
        let mut map = None;
        for (path, layer) in &stored.layers {
            match layer.map {
                Map::Exponential => return refuse(path, "has no exponential map"),
                Map::CayleyNeumann {
                    last_coefficient: 2,
                    ..
                } => return refuse(path, "of today has no series of last coefficient 2"),
                Map::Cayley | Map::CayleyNeumann { .. } => {}
            }
            if *map.get_or_insert(layer.map) != layer.map {
                return refuse(path, "has one map for all layers, and this one differs");
            }
            if layer.kind == Some(LayerKind::Conv1d) {
                return refuse(path, "has no one-dimensional convolutions");
            }
            let square = layer
                .shape
                .as_ref()
                .is_none_or(|s| s.len() < 4 || s[2] == s[3]);
            if !square {
                return refuse(path, "has no kernels that are not square");
            }
            if layer.kind.is_none() && layer.kernel_factor != 1. {
                return refuse(
                    path,
                    "turns kernels the other way; give the base, to tell them",
                );
            }
            if scales(layer)? {
                if !drop_magnitude {
                    return refuse(path, "has no magnitude; drop it to go on without");
                }
                warnings.push(Warning {
                    subject: path.clone(),
                    message: "its magnitude was dropped".into(),
                });
            }
        }
        let rows = |layer: &StoredLayer| layer.packed.dims()[0];
        let modules = stored
            .extras
            .keys()
            .filter(|name| bias_of(stored, name).is_none());
        let modules = modules.filter_map(|name| Some(name.rsplit_once('.')?.0.to_string()));
        let mut modules_to_save: Vec<String> = modules.collect();
        modules_to_save.dedup();
        Ok(Self {
            map: map.unwrap_or_default(),
            block_size: common_block_size(stored)?,
            share: stored.layers.values().all(|layer| rows(layer) == 1),
            modules_to_save,
            biases: stored
                .extras
                .keys()
                .any(|name| bias_of(stored, name).is_some()),
        })
    }

    /// `Q` packed, with divisor and cap in it; PEFT's exact map turns the other way.
    fn values(&self, file: &Path, path: &str, layer: &StoredLayer) -> Result<Tensor> {
        let b = layer.block_size;
        let theta = layer.theta(layer.kind.unwrap_or(LayerKind::Linear))?;
        let rows = theta.dim(0)?;
        // As many blocks as there are rows; a shared one is repeated below.
        let Some(layout) = layer.layout(&[1, rows * b])? else {
            return Ok(theta.to_dtype(DType::F32)?);
        };
        let mut q = rotation::generator(&theta.to_dtype(DType::F64)?, &layout)?;
        if self.map == Map::Cayley {
            q = q.neg()?;
        }
        let upper = (0..b).flat_map(|i| (i + 1..b).map(move |j| (i * b + j) as u32));
        let upper: Vec<u32> = upper.collect();
        let upper = Tensor::new(upper, &Device::Cpu)?;
        let packed = q
            .reshape((rows, b * b))?
            .index_select(&upper, 1)?
            .to_dtype(DType::F32)?;
        if self.share || rows > 1 {
            return Ok(packed);
        }
        let Some(shape) = &layer.shape else {
            let path = shown(path);
            return refused(
                file,
                format!("layer `{path}`: give the base, to repeat its shared block"),
            );
        };
        let width: usize = shape.iter().skip(1).product();
        Ok(packed.repeat((width / b, 1))?)
    }

    fn extra_key(&self, stored: &Stored, name: &str) -> Result<String> {
        match (bias_of(stored, name), name.contains('.')) {
            (Some(layer), _) => Ok(format!("{PEFT_PREFIX}{layer}.base_layer.bias")),
            (None, true) => Ok(format!("{PEFT_PREFIX}{name}")),
            (None, false) => {
                let name = shown(name);
                refused(
                    &stored.file,
                    format!("a PEFT folder cannot hold the extra tensor `{name}`"),
                )
            }
        }
    }

    fn config(&self, stored: &Stored) -> serde_json::Value {
        let embeddings = stored
            .layers
            .values()
            .any(|l| l.kind == Some(LayerKind::Embedding));
        let terms = match self.map {
            Map::CayleyNeumann { terms, .. } => terms,
            _ => 5,
        };
        let paths: Vec<&String> = stored.layers.keys().collect();
        let modules = Some(&self.modules_to_save).filter(|modules| !modules.is_empty());
        serde_json::json!({
            "auto_mapping": null,
            "base_model_name_or_path": null,
            "bias": if self.biases { "oft_only" } else { "none" },
            "block_share": self.share,
            "coft": false,
            "eps": 6e-5,
            "exclude_modules": null,
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_weights": true,
            "layers_pattern": null,
            "layers_to_transform": null,
            "module_dropout": 0.0,
            "modules_to_save": modules,
            "num_cayley_neumann_terms": terms,
            "oft_block_size": self.block_size,
            "peft_type": "OFT",
            "peft_version": if embeddings { "0.19.0" } else { "0.18.0" },
            "r": 0,
            "revision": null,
            "target_modules": paths,
            "task_type": null,
            "use_cayley_neumann": self.map != Map::Cayley,
        })
    }
}

/// The adapted layer whose bias an extra tensor is.
fn bias_of<'a>(stored: &Stored, name: &'a str) -> Option<&'a str> {
    let layer = name.strip_suffix(".bias")?;
    stored.layers.contains_key(layer).then_some(layer)
}

/// Whether a factor other than 1 would be lost.
fn scales(layer: &StoredLayer) -> Result<bool> {
    if layer.magnitude == Magnitude::None {
        return Ok(false);
    }
    let Some(ratio) = layer.ratio(None, DType::F64)? else {
        return Ok(true);
    };
    Ok(ratio
        .to_vec1::<f64>()?
        .iter()
        .any(|f| (f - 1.).abs() > 1e-6))
}

/// The one block size from which PEFT derives those of all layers.
fn common_block_size(stored: &Stored) -> Result<usize> {
    let width = |layer: &StoredLayer| match &layer.shape {
        Some(shape) => Some(shape.iter().skip(1).product()),
        None => {
            Some(layer.packed.dims()[0] * layer.block_size).filter(|_| layer.packed.dims()[0] > 1)
        }
    };
    let all = || stored.layers.values();
    let first = all().map(|layer| layer.block_size).max().unwrap_or(1);
    let fits = |asked: usize| {
        all().all(|layer| match width(layer) {
            Some(width) => nearest_divisor(width, asked) == layer.block_size,
            None => asked == layer.block_size,
        })
    };
    match std::iter::once(first)
        .chain(1..LARGEST_BLOCK)
        .find(|asked| fits(*asked))
    {
        Some(found) => Ok(found),
        None => refused(
            &stored.file,
            "a PEFT folder derives all block sizes from one, and none gives those of its layers",
        ),
    }
}
