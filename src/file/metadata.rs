//! The metadata of a canonical file: configuration and layers as sorted, compact JSON.

use super::tensors::refused;
use crate::adapter::{Stored, StoredLayer, Warning};
use crate::config::{DoftConfig, LayerKind, LowRank, Magnitude, Map};
use crate::error::{Result, shown};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// The format that this crate writes.
pub(super) const FORMAT: &str = "doft";
const VERSION: &str = "1";

/// The format of a checkpoint of a training run, which is no adapter.
pub(crate) const CHECKPOINT: &str = "doft-checkpoint";

/// Whether the metadata is that of a file of this format.
pub(super) fn has_format(metadata: &HashMap<String, String>, format: &str) -> bool {
    metadata.get("format").is_some_and(|found| found == format)
}

/// What `doft_layers` says of one layer. Settings are there where they differ from the configuration.
#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LayerEntry {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) kind: Option<LayerKind>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) shape: Option<Vec<usize>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) base: Option<[f64; 5]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) scaled: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) map: Option<Map>,
    /// 0 where the configuration has a cap and the layer has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) max_norm: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) magnitude: Option<Magnitude>,
    /// Of a layer of low-rank matrices; there whatever the configuration has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) low_rank: Option<LowRank>,
}

impl LayerEntry {
    /// The settings of its layer, its own before those of the configuration.
    pub(super) fn settings(&self, config: &DoftConfig) -> Result<DoftConfig> {
        let settings = DoftConfig {
            scaled: self.scaled.unwrap_or(config.scaled),
            map: self.map.unwrap_or(config.map),
            max_norm: match self.max_norm {
                Some(cap) => Some(cap).filter(|cap| *cap != 0.),
                None => config.max_norm,
            },
            magnitude: self.magnitude.unwrap_or(config.magnitude),
            ..DoftConfig::default()
        };
        settings.validate()?;
        Ok(settings)
    }

    fn new(layer: &StoredLayer, config: &DoftConfig) -> Self {
        let cap = layer.max_norm.unwrap_or(0.);
        Self {
            kind: layer.kind,
            shape: layer.shape.clone(),
            base: layer.base,
            scaled: (layer.scaled != config.scaled).then_some(layer.scaled),
            map: (layer.map != config.map).then_some(layer.map),
            max_norm: (layer.max_norm != config.max_norm).then_some(cap),
            magnitude: (layer.magnitude != config.magnitude).then_some(layer.magnitude),
            low_rank: None,
        }
    }

    fn of_low_rank(layer: &StoredLayer, spec: LowRank) -> Self {
        Self {
            kind: layer.kind,
            shape: layer.shape.clone(),
            base: layer.base,
            low_rank: Some(spec),
            ..Self::default()
        }
    }
}

pub(super) fn write(stored: &Stored) -> Result<BTreeMap<String, String>> {
    let layers = stored.layers.iter().map(|(path, layer)| {
        let entry = match &layer.low_rank {
            Some(low_rank) => LayerEntry::of_low_rank(layer, low_rank.spec),
            None => LayerEntry::new(layer, &stored.config),
        };
        Ok((path.clone(), json(&stored.file, &entry)?))
    });
    let layers: BTreeMap<String, Value> = layers.collect::<Result<_>>()?;
    let config = json(&stored.file, &stored.config)?;
    let pairs = [
        ("format", FORMAT.to_string()),
        ("format_version", VERSION.to_string()),
        ("crate_version", env!("CARGO_PKG_VERSION").to_string()),
        ("doft_config", sorted(config).to_string()),
        ("doft_layers", sorted(Value::from_iter(layers)).to_string()),
    ];
    Ok(pairs
        .into_iter()
        .map(|(key, value)| (key.to_string(), value))
        .collect())
}

fn json(file: &Path, value: &impl Serialize) -> Result<Value> {
    serde_json::to_value(value).or_else(|e| refused(file, format!("cannot be written: {e}")))
}

// A map of this type keeps the order of insertion under one of serde_json's features.
fn sorted(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let map: BTreeMap<String, Value> = map.into_iter().collect();
            map.into_iter()
                .map(|(key, value)| (key, sorted(value)))
                .collect()
        }
        Value::Array(list) => list.into_iter().map(sorted).collect(),
        other => other,
    }
}

/// Configuration and layers, and warnings for fields that this version does not know.
pub(super) struct Read {
    pub(super) config: DoftConfig,
    pub(super) layers: BTreeMap<String, LayerEntry>,
    pub(super) warnings: Vec<Warning>,
}

pub(super) fn read(file: &Path, metadata: &HashMap<String, String>) -> Result<Read> {
    let get = |key: &str| match metadata.get(key) {
        Some(value) => Ok(value.as_str()),
        None => refused(file, format!("its metadata lacks `{key}`")),
    };
    let version = get("format_version")?;
    if version != VERSION {
        let writer = metadata
            .get("crate_version")
            .map_or("unknown", String::as_str);
        let reason = format!(
            "format version {}, this crate reads {VERSION}; it was written by candle-doft {}",
            shown(version),
            shown(writer)
        );
        return refused(file, reason);
    }
    let config: Value = parse(file, "doft_config", get("doft_config")?)?;
    for field in [
        "block_size",
        "block_share",
        "scaled",
        "map",
        "max_norm",
        "magnitude",
        "dropout",
    ] {
        if config.get(field).is_none() {
            return refused(file, format!("`doft_config` lacks `{field}`"));
        }
    }
    let known: DoftConfig = parse(file, "doft_config", get("doft_config")?)?;
    known
        .validate()
        .or_else(|e| refused(file, format!("`doft_config`: {e}")))?;
    let mut warnings = Vec::new();
    if let (Some(found), Value::Object(of_this_version)) = (config.as_object(), json(file, &known)?)
    {
        for field in found
            .keys()
            .filter(|field| !of_this_version.contains_key(*field))
        {
            let message = "this field of `doft_config` is not known here and was ignored";
            warnings.push(Warning::new(field, message));
        }
    }
    Ok(Read {
        config: known,
        layers: parse(file, "doft_layers", get("doft_layers")?)?,
        warnings,
    })
}

fn parse<T: for<'a> Deserialize<'a>>(file: &Path, key: &str, text: &str) -> Result<T> {
    serde_json::from_str(text)
        .or_else(|e| refused(file, format!("its metadata `{key}` cannot be read: {e}")))
}
