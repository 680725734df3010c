//! From flags to what is trained, and what a resumed run has to agree on.

use crate::support::device::DeviceName;
use crate::support::llm::config::Config;
use crate::support::llm::data::Data;
use crate::support::llm::model::Model;
use crate::support::llm::weights::Weights;
use crate::support::memory;
use crate::support::methods::Method;
use crate::{Flags, MethodName};
use anyhow::{Result, ensure};
use candle_doft::train::Checkpoint;
use candle_doft::train::parallel::{Processes, same};
use candle_doft::{DoftConfig, Pattern, Targets};
use serde_json::{Value, json};
use std::path::Path;

/// Refuses a step that takes more memory than there is: the system would end the program without a word.
pub(crate) fn check_memory(flags: &Flags, config: &Config, data: &Data) -> Result<()> {
    // Activations lie on the device, and candle does not tell how much memory another one has.
    if flags.device != DeviceName::Cpu {
        return Ok(());
    }
    let Some(available) = memory::available_bytes() else {
        return Ok(());
    };
    let longest = data.train.iter().map(|s| s.ids.len()).max().unwrap_or(0);
    let tokens = flags.batch as u64 * longest as u64;
    let needed =
        tokens.saturating_mul(config.activation_bytes(flags.checkpoint_activations) as u64);
    let gigabytes = |bytes: u64| bytes as f64 / 1e9;
    let or_less = match flags.checkpoint_activations {
        true => " or a smaller --seq",
        false => ", a smaller --seq, or --checkpoint-activations",
    };
    ensure!(
        needed <= available,
        "a step of --batch {} sequences of {longest} tokens takes at least {:.1} GB of memory, and {:.1} GB can be \
         had; give a smaller --batch (--accumulate makes up for it){or_less}",
        flags.batch,
        gigabytes(needed),
        gigabytes(available)
    );
    Ok(())
}

/// Tells of a run in --out that this one takes the place of.
pub(crate) fn warn_of_another_run(flags: &Flags, checkpoint: &Path) {
    if flags.resume || !checkpoint.exists() {
        return;
    }
    let steps = Checkpoint::load(checkpoint).map_or(0, |found| found.steps());
    eprintln!(
        "note: {} holds a run of {steps} steps, which this one replaces; --resume goes on with it",
        flags.out.display()
    );
}

/// What a resumed run has to have in common with the one that wrote the checkpoint.
pub(crate) fn identity(flags: &Flags, weights: &Weights, data: &Data) -> Result<Value> {
    Ok(json!({
        "base": weights.fingerprint()?,
        "method": flags.method,
        "block_size": flags.block_size,
        "rank": flags.rank,
        "targets": flags.targets,
        "steps": flags.steps,
        "batch": flags.batch,
        "seq": flags.seq,
        "lr": flags.lr,
        "magnitude_rate": flags.magnitude_rate,
        "accumulate": flags.accumulate,
        "decay": flags.decay,
        "warmup": flags.warmup,
        "clip": flags.clip,
        "seed": flags.seed,
        "dequantize": flags.dequantize,
        "hidden_size": weights.config.hidden,
        "layers": weights.config.layers,
        "sequences": data.train.len(),
        "data_checksum": data.checksum(),
    }))
}

/// Refuses processes that were started on other files or with other flags, and other threads: products then
/// round otherwise.
pub(crate) fn check_same(
    group: &dyn Processes,
    flags: &Flags,
    weights: &Weights,
    data: &Data,
) -> Result<()> {
    let run = json!({
        "identity": identity(flags, weights, data)?,
        "stop_after": flags.stop_after,
        "every": flags.every,
        "held_out": flags.held_out,
        "sample_tokens": flags.sample_tokens,
        "checkpoint_activations": flags.checkpoint_activations,
        "resume": flags.resume,
        "merge": flags.merge_to.is_some(),
    });
    same(group, "the run", &run.to_string())?;
    let threads = rayon::current_num_threads().to_string();
    Ok(same(group, "threads (RAYON_NUM_THREADS)", &threads)?)
}

/// Tells of processes that have nothing to do, or that end with other bits than one would.
pub(crate) fn note_shares(group: &dyn Processes, flags: &Flags) {
    let (size, all) = (group.size(), flags.accumulate);
    if group.rank() > 0 || size == 1 {
        return;
    }
    if all < size {
        let idle = size - all;
        eprintln!(
            "note: --accumulate {all} makes {all} micro-batches a step, so {idle} of {size} processes have \
             nothing to do; give {size} or a multiple of it"
        );
    } else if !size.is_power_of_two() || all % size != 0 {
        eprintln!(
            "note: --accumulate {all} over {size} processes ends near the bytes of one process and not at \
             them, as a power of two that divides it would"
        );
    }
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
