//! From flags to what is trained, and what a resumed run has to agree on.

use crate::support::llm::data::Data;
use crate::support::llm::model::Model;
use crate::support::llm::weights::Weights;
use crate::support::methods::Method;
use crate::{Flags, MethodName};
use anyhow::{Result, ensure};
use candle_doft::{DoftConfig, Pattern, Targets};
use serde_json::{Value, json};

/// What a resumed run has to have in common with the one that wrote the checkpoint.
pub(crate) fn identity(flags: &Flags, weights: &Weights, data: &Data) -> Value {
    json!({
        "method": flags.method,
        "block_size": flags.block_size,
        "rank": flags.rank,
        "targets": flags.targets,
        "steps": flags.steps,
        "batch": flags.batch,
        "seq": flags.seq,
        "lr": flags.lr,
        "accumulate": flags.accumulate,
        "decay": flags.decay,
        "warmup": flags.warmup,
        "clip": flags.clip,
        "seed": flags.seed,
        "dequantize": flags.dequantize,
        "hidden_size": weights.config.hidden,
        "layers": weights.config.layers,
        "sequences": data.train.len(),
    })
}

pub(crate) fn targets(flags: &Flags) -> Vec<Pattern> {
    flags
        .targets
        .iter()
        .map(|t| Pattern::from(t.as_str()))
        .collect()
}

/// Refuses a target that means no layer, whatever the method.
pub(crate) fn check_targets(flags: &Flags, model: &Model) -> Result<()> {
    let layers = model.linears();
    for target in targets(flags) {
        let mut found = false;
        for (path, _) in &layers {
            found |= target.matches(path)?;
        }
        let example = layers.first().map_or("", |(path, _)| path);
        ensure!(
            found,
            "--targets {} means none of the model's layers, whose paths look like {example}",
            target.text()
        );
    }
    Ok(())
}

pub(crate) fn method(flags: &Flags) -> Method {
    let config = match flags.method {
        MethodName::Oft => DoftConfig::oft(),
        _ => DoftConfig::default(),
    };
    let config = config
        .with_block_size(flags.block_size)
        .with_seed(flags.seed);
    let config = match flags.targets.is_empty() {
        true => config,
        false => config.with_targets(Targets::Patterns(targets(flags))),
    };
    let (rank, alpha) = (flags.rank, flags.rank as f64);
    match flags.method {
        MethodName::Doft | MethodName::Oft => Method::Doft(Box::new(config)),
        MethodName::Lora => Method::Lora { rank, alpha },
        MethodName::Dora => Method::Dora { rank, alpha },
        MethodName::None => Method::Frozen,
    }
}
