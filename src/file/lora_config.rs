//! [`Lora`]: what PEFT's configuration of LoRA or DoRA says.

use super::peft::field;
use super::tensors::refused;
use crate::config::LowRank;
use crate::error::{Result, shown};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// Fields of a configuration of LoRA that are read, or say nothing about what it computes once it is trained.
const LORA_FIELDS: [&str; 29] = [
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_config",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
    "peft_config_version",
];

/// What an `adapter_config.json` of type LORA decides.
pub(super) struct Lora {
    rank: usize,
    alpha: f64,
    rslora: bool,
    dora: bool,
    pub(super) transposed: bool,
    ranks: Vec<(regex::Regex, f64)>,
    alphas: Vec<(regex::Regex, f64)>,
}

impl Lora {
    pub(super) fn parse(file: &Path, json: &Value) -> Result<Self> {
        let flag = |name: &str| -> Result<bool> {
            Ok(field(file, json, name, "true or false")?.unwrap_or(false))
        };
        // A field that is not known may change the base, or the product.
        for (name, value) in json.as_object().into_iter().flatten() {
            let nothing = match value {
                Value::Null | Value::Bool(false) => true,
                Value::Array(values) => values.is_empty(),
                Value::Object(values) => values.is_empty(),
                _ => false,
            };
            if !nothing && !LORA_FIELDS.contains(&name.as_str()) {
                let (name, found) = (shown(name), shown(&value.to_string()));
                let reason =
                    format!("`{name}` is {found}, which this crate does not read for LoRA");
                return refused(file, reason);
            }
        }
        let plain = ["gaussian", "eva", "orthogonal", "true", "false"];
        let start = &json["init_lora_weights"];
        let known = match start {
            Value::Null | Value::Bool(_) => true,
            Value::String(name) => plain.contains(&name.as_str()),
            _ => false,
        };
        if !known {
            let found = shown(&start.to_string());
            let reason = format!(
                "`init_lora_weights` is {found}, which changes the base weights at the start; convert it to plain \
                 LoRA in PEFT (`path_initial_model_for_weight_conversion`)"
            );
            return refused(file, reason);
        }
        let patterns = |name: &str| -> Result<Vec<(regex::Regex, f64)>> {
            let found: Option<BTreeMap<String, f64>> =
                field(file, json, name, "names and numbers")?;
            let rules = found.unwrap_or_default().into_iter().map(|(key, value)| {
                // PEFT's rule: the whole path, or its end at a dot.
                let rule = regex::Regex::new(&format!(r"^(?:.*\.)?(?:{key})$"));
                let rule = rule.or_else(|e| refused(file, format!("`{name}`: {e}")))?;
                Ok((rule, value))
            });
            rules.collect()
        };
        Ok(Self {
            rank: field(file, json, "r", "a whole number")?.unwrap_or(8),
            alpha: field(file, json, "lora_alpha", "a number")?.unwrap_or(8.),
            rslora: flag("use_rslora")?,
            dora: flag("use_dora")?,
            transposed: flag("fan_in_fan_out")?,
            ranks: patterns("rank_pattern")?,
            alphas: patterns("alpha_pattern")?,
        })
    }

    /// What the layer at a path has.
    pub(super) fn spec(&self, path: &str) -> LowRank {
        let of = |rules: &[(regex::Regex, f64)]| {
            let found = rules.iter().find(|(rule, _)| rule.is_match(path));
            found.map(|(_, value)| *value)
        };
        let rank = of(&self.ranks).map_or(self.rank, |rank| rank as usize);
        LowRank::new(rank, of(&self.alphas).unwrap_or(self.alpha))
            .with_rslora(self.rslora)
            .with_dora(self.dora)
    }
}
