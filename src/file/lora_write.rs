//! Writing a PEFT folder of LoRA or DoRA.

use super::peft::{CONFIG, TENSORS};
use super::peft_write::extra_key;
use super::tensors::{check_finite, refused};
use super::write;
use crate::adapter::{PEFT_PREFIX, Stored, StoredLowRank};
use crate::config::{LayerKind, LowRank};
use crate::error::{Result, shown};
use crate::params::names;
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Whether all layers are of low-rank matrices; an error where only some are.
pub(super) fn is_meant(stored: &Stored) -> Result<bool> {
    let low_rank = |layer: &&crate::adapter::StoredLayer| layer.low_rank.is_some();
    let count = stored.layers.values().filter(low_rank).count();
    match count == stored.layers.len() {
        true => Ok(count > 0),
        false if count == 0 => Ok(false),
        false => refused(
            &stored.file,
            format!(
                "{count} of {} layers are LoRA or DoRA, the others rotations; a PEFT folder holds one kind",
                stored.layers.len()
            ),
        ),
    }
}

/// Writes the folder; its configuration comes last, so that a folder with one is complete.
pub(super) fn folder(stored: &Stored, folder: &Path) -> Result<()> {
    let mut layers: Vec<(&String, &StoredLowRank, LayerKind)> = Vec::new();
    for (path, layer) in &stored.layers {
        if let Some(low_rank) = &layer.low_rank {
            let rank = layer.shape.as_ref().map_or(low_rank.a.rank(), Vec::len);
            let kind = layer.kind.or(LayerKind::of_rank(rank));
            layers.push((path, low_rank, kind.unwrap_or(LayerKind::Linear)));
        }
    }
    let mut tensors = BTreeMap::new();
    for (path, low_rank, kind) in &layers {
        let (a, b) = names::low_rank(*kind);
        let mut put = |name: &str, tensor: &candle_core::Tensor| {
            tensors.insert(format!("{PEFT_PREFIX}{path}.{name}"), tensor.clone());
        };
        put(a, &low_rank.a);
        put(b, &low_rank.b);
        if let Some(magnitude) = &low_rank.magnitude {
            // PEFT's files leave the end of the name out.
            put(names::DORA.trim_end_matches(".weight"), magnitude);
        }
    }
    for (name, tensor) in &stored.extras {
        tensors.insert(extra_key(stored, name)?, tensor.clone());
    }
    check_finite(&tensors)?;
    let config = config(stored, &layers)?;
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    let bytes = write::safetensors(&tensors, &metadata)?;
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
    Ok(())
}

fn config(stored: &Stored, layers: &[(&String, &StoredLowRank, LayerKind)]) -> Result<Value> {
    let specs: Vec<LowRank> = layers
        .iter()
        .map(|(_, low_rank, _)| low_rank.spec)
        .collect();
    let first = specs[0];
    let first_turned = layers[0].1.transposed;
    for ((path, low_rank, _), spec) in layers.iter().zip(&specs) {
        let same = (spec.rslora, spec.dora) == (first.rslora, first.dora);
        if !same || low_rank.transposed != first_turned {
            let path = shown(path);
            let reason = format!(
                "layer `{path}`: a PEFT folder has one `use_rslora`, `use_dora` and `fan_in_fan_out` for all layers"
            );
            return refused(&stored.file, reason);
        }
    }
    let differs = |value: &dyn Fn(&LowRank) -> Value| -> Map<String, Value> {
        let common = value(&first);
        let pairs = layers
            .iter()
            .zip(&specs)
            .filter(|(_, spec)| value(spec) != common);
        pairs
            .map(|((path, ..), spec)| (regex::escape(path), value(spec)))
            .collect()
    };
    let extras = stored.extras.keys();
    let bias_of = |name: &String| {
        let layer = name.strip_suffix(".bias");
        layer.is_some_and(|layer| stored.layers.contains_key(layer))
    };
    let biases = stored.extras.keys().any(bias_of);
    let modules = extras.filter(|name| !bias_of(name));
    let modules = modules.filter_map(|name| Some(name.rsplit_once('.')?.0.to_string()));
    let modules: BTreeSet<String> = modules.collect();
    let paths: Vec<&String> = layers.iter().map(|(path, ..)| *path).collect();
    Ok(json!({
        "alpha_pattern": differs(&|spec| json!(spec.alpha)),
        "auto_mapping": null,
        "base_model_name_or_path": null,
        "bias": if biases { "lora_only" } else { "none" },
        "fan_in_fan_out": first_turned,
        "inference_mode": true,
        "init_lora_weights": true,
        "layers_pattern": null,
        "layers_to_transform": null,
        "lora_alpha": first.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": Some(&modules).filter(|modules| !modules.is_empty()),
        "peft_type": "LORA",
        "peft_version": "0.18.0",
        "r": first.rank,
        "rank_pattern": differs(&|spec| json!(spec.rank)),
        "revision": null,
        "target_modules": paths,
        "task_type": null,
        "use_dora": first.dora,
        "use_rslora": first.rslora,
    }))
}
