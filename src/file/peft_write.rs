//! Writing a PEFT OFT folder, for what such a folder can hold.

use super::peft::{CONFIG, TENSORS};
use super::tensors::{check_finite, refused};
use super::write;
use crate::adapter::{PEFT_PREFIX, Stored, StoredLayer, Warning};
use crate::config::{LayerKind, Magnitude, Map, nearest_divisor};
use crate::error::{Result, shown};
use crate::params::names;
use crate::rotation;
use candle_core::{DType, Tensor};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Writes the folder; its configuration comes last, so that a folder with one is complete.
pub(super) fn folder(stored: &Stored, folder: &Path, drop_magnitude: bool) -> Result<Vec<Warning>> {
    let mut warnings = Vec::new();
    let plan = Plan::new(stored, drop_magnitude, &mut warnings)?;
    let mut tensors = BTreeMap::new();
    for (path, layer) in &stored.layers {
        let name = names::rotation(layer.kind.unwrap_or(LayerKind::Linear));
        let values = plan.values(&stored.file, path, layer)?;
        tensors.insert(format!("{PEFT_PREFIX}{path}.{name}"), values);
    }
    for (name, tensor) in &stored.extras {
        tensors.insert(extra_key(stored, name)?, tensor.clone());
    }
    check_finite(&tensors)?;
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    let bytes = write::safetensors(&tensors, &metadata)?;
    let config = plan.config(stored);
    let text = serde_json::to_string_pretty(&config).or_else(|e| refused(folder, e.to_string()))?;
    let _made = write::Folder::create(folder)?;
    let (tensors, config) = (folder.join(TENSORS), folder.join(CONFIG));
    let files = [
        (write::filled(&tensors, &bytes)?, tensors),
        (write::filled(&config, (text + "\n").as_bytes())?, config),
    ];
    for (file, path) in files {
        write::persist(file, &path)?;
    }
    Ok(warnings)
}

/// What all layers have in common.
struct Plan {
    map: Map,
    block_size: usize,
    share: bool,
    modules_to_save: BTreeSet<String>,
    biases: bool,
}

impl Plan {
    fn new(stored: &Stored, drop_magnitude: bool, warnings: &mut Vec<Warning>) -> Result<Self> {
        if stored.layers.is_empty() {
            let reason = "it has no adapted layer, without which there is no PEFT folder";
            return refused(&stored.file, reason);
        }
        let mut map = None;
        for (path, layer) in &stored.layers {
            debug_assert!(layer.low_rank.is_none(), "told apart before");
            let refuse = |reason: &str| {
                let path = shown(path);
                let reason = format!("layer `{path}`: a PEFT folder {reason}");
                refused(&stored.file, reason)
            };
            if let Some(reason) = beyond(layer) {
                return refuse(reason);
            }
            if *map.get_or_insert(layer.map) != layer.map {
                return refuse("has one map for all layers, and this one differs");
            }
            if scales(layer)? {
                if !drop_magnitude {
                    return refuse("has no magnitude; drop it to go on without");
                }
                warnings.push(Warning::new(path, "its magnitude was dropped"));
            }
        }
        let extras = || stored.extras.keys();
        let modules = extras().filter(|name| bias_of(stored, name).is_none());
        let modules = modules.filter_map(|name| Some(name.rsplit_once('.')?.0.to_string()));
        Ok(Self {
            map: map.unwrap_or_default(),
            block_size: common_block_size(stored)?,
            share: stored.layers.values().all(|layer| layer.rows() == 1),
            modules_to_save: modules.collect(),
            biases: extras().any(|name| bias_of(stored, name).is_some()),
        })
    }

    /// `Q` packed, with divisor and cap in it; PEFT's exact map turns the other way.
    fn values(&self, file: &Path, path: &str, layer: &StoredLayer) -> Result<Tensor> {
        let b = layer.block_size;
        let theta = layer.theta(layer.kind.unwrap_or(LayerKind::Linear))?;
        let rows = theta.dim(0)?;
        // As many blocks as there are rows; a shared one is repeated below.
        let Some(layout) = layer.layout(&[1, rows * b])? else {
            // Blocks of size 1 turn nothing.
            return self.repeated(file, path, layer, theta.to_dtype(DType::F32)?);
        };
        let mut q = rotation::generator(&theta.to_dtype(DType::F64)?, &layout)?;
        if self.map == Map::Cayley {
            q = q.neg()?;
        }
        let packed = rotation::packed(&q)?.to_dtype(DType::F32)?;
        self.repeated(file, path, layer, packed)
    }

    /// The row of a shared block as often as there are blocks, where other layers share none.
    fn repeated(
        &self,
        file: &Path,
        path: &str,
        layer: &StoredLayer,
        packed: Tensor,
    ) -> Result<Tensor> {
        if self.share || layer.rows() > 1 {
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
        let shape = (width / layer.block_size, packed.dim(1)?);
        Ok(packed.broadcast_as(shape)?.contiguous()?)
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

/// What a PEFT folder has no place for in a layer, whatever the others are.
fn beyond(layer: &StoredLayer) -> Option<&'static str> {
    match layer.map {
        Map::Cayley => {}
        Map::CayleyNeumann {
            last_coefficient: 1,
            ..
        } => {}
        Map::CayleyNeumann { .. } => return Some("of today has no series of last coefficient 2"),
        Map::Exponential => return Some("has no exponential map"),
    }
    match layer.kind {
        Some(LayerKind::Conv1d) => return Some("has no one-dimensional convolutions"),
        Some(LayerKind::Linear | LayerKind::Conv2d | LayerKind::Embedding) | None => {}
    }
    if matches!(layer.shape.as_deref(), Some([_, _, height, width]) if height != width) {
        return Some("has no kernels that are not square");
    }
    let unknown = layer.kind.is_none() && layer.kernel_factor != 1.;
    unknown.then_some("turns kernels the other way; give the base, to tell them")
}

/// The adapted layer whose bias an extra tensor is.
fn bias_of<'a>(stored: &Stored, name: &'a str) -> Option<&'a str> {
    let layer = name.strip_suffix(".bias")?;
    stored.layers.contains_key(layer).then_some(layer)
}

/// Where an extra tensor goes: it is the bias of an adapted layer, or of a module that is saved whole.
pub(super) fn extra_key(stored: &Stored, name: &str) -> Result<String> {
    if let Some(layer) = bias_of(stored, name) {
        return Ok(format!("{PEFT_PREFIX}{layer}.base_layer.bias"));
    }
    match name.rsplit_once('.') {
        Some((module, _)) if !stored.layers.contains_key(module) => {
            Ok(format!("{PEFT_PREFIX}{name}"))
        }
        _ => {
            let name = shown(name);
            let reason = format!("a PEFT folder cannot hold the extra tensor `{name}`");
            refused(&stored.file, reason)
        }
    }
}

/// Whether a factor other than 1 would be lost.
pub(super) fn scales(layer: &StoredLayer) -> Result<bool> {
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
    // A layer of one row and unknown width is taken to be given the size that is asked for.
    let given = |layer: &StoredLayer, asked: usize| match (&layer.shape, layer.rows()) {
        (Some(shape), _) => nearest_divisor(shape.iter().skip(1).product(), asked),
        (None, 1) => asked,
        (None, rows) => nearest_divisor(rows * layer.block_size, asked),
    };
    let all = || stored.layers.values();
    let fits = |asked: usize| all().all(|layer| given(layer, asked) == layer.block_size);
    let largest = all().map(|layer| layer.block_size).max().unwrap_or(1);
    if fits(largest) {
        return Ok(largest);
    }
    // The divisor that is nearest never falls as more is asked for, and at twice the largest it is
    // at least that.
    let (mut low, mut high) = (1, 2 * largest);
    while low < high {
        let asked = (low + high) / 2;
        match all().any(|layer| given(layer, asked) < layer.block_size) {
            true => low = asked + 1,
            false => high = asked,
        }
    }
    match fits(low) {
        true => Ok(low),
        false => refused(
            &stored.file,
            "a PEFT folder derives all block sizes from one, and none gives those of its layers",
        ),
    }
}
