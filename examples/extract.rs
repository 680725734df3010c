//! Finds the adapter that is closest to a finished fine-tune.
//!
//!     cargo run --release --example extract -- --base model --tuned finetuned --output adapter.safetensors

#[path = "support/mod.rs"]
mod support;

use anyhow::Result;
use candle_doft::DoftConfig;
use candle_doft::config::Magnitude;
use candle_doft::merge::{ExtractOptions, Extraction, LayerExtraction, extract};
use clap::Parser;
use serde_json::{Value, json};
use std::path::PathBuf;
use support::cli::say;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Extracts an adapter from a fine-tune, and says how much of the change it explains.
#[derive(Parser, Debug)]
struct Flags {
    /// The checkpoint before: a safetensors file, or a folder of them
    #[arg(long)]
    base: PathBuf,
    /// The checkpoint after
    #[arg(long)]
    tuned: PathBuf,
    /// The adapter file to write
    #[arg(long)]
    output: PathBuf,
    /// Width of a rotation block; where it does not divide, the nearest divisor
    #[arg(long, default_value_t = 32)]
    block_size: usize,
    /// Layers to adapt: names, ends of names or globs; all matrices and kernels if not given
    #[arg(long, num_args = 1..)]
    targets: Vec<String>,
    /// Layers to leave alone
    #[arg(long, num_args = 1..)]
    exclude: Vec<String>,
    /// Rotations alone
    #[arg(long)]
    no_magnitude: bool,
    /// Keep what is not adapted (norms, embeddings, biases) as extra tensors
    #[arg(long)]
    extras: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn main() -> std::process::ExitCode {
    let flags = Flags::parse();
    support::cli::run(|| run(&flags))
}

fn run(flags: &Flags) -> Result<()> {
    let mut config = DoftConfig::default()
        .with_block_size(flags.block_size)
        .with_exclude(flags.exclude.iter().map(String::as_str));
    if !flags.targets.is_empty() {
        config = config.with_targets(flags.targets.clone());
    }
    if flags.no_magnitude {
        config = config.with_magnitude(Magnitude::None);
    }
    let bar = support::progress::bar(0, "extract");
    let mut progress = |done: u64, total: u64| {
        bar.set_length(total >> 20);
        bar.set_position(done >> 20);
    };
    let mut options = ExtractOptions::default();
    options.config = config;
    options.extras = flags.extras;
    options.progress = Some(&mut progress);
    let found = extract(&flags.base, &flags.tuned, &flags.output, options)?;
    bar.finish_and_clear();
    if flags.json {
        say(format_args!(
            "{}",
            serde_json::to_string_pretty(&as_json(&found))?
        ));
        return Ok(());
    }
    table(&found);
    say(format_args!("{}", flags.output.display()));
    Ok(())
}

fn as_json(found: &Extraction) -> Value {
    let layer = |layer: &LayerExtraction| {
        json!({
            "path": layer.path,
            "kind": layer.kind,
            "block_size": layer.block_size,
            "change": layer.change,
            "explained": layer.explained,
            "explained_by_rotation": layer.explained_by_rotation,
            "max_angle_degrees": layer.max_angle_degrees,
            "ratio_min": layer.ratio_min,
            "ratio_max": layer.ratio_max,
            "half_turns": layer.half_turns,
        })
    };
    let left = found
        .left
        .iter()
        .map(|left| json!({"name": left.name, "reason": left.reason, "kept": left.kept}));
    let warnings = found.warnings.iter().map(ToString::to_string);
    json!({
        "explained": found.explained,
        "explained_by_rotation": found.explained_by_rotation,
        "adapted": found.adapted,
        "unchanged": found.unchanged,
        "layers": found.layers.iter().map(layer).collect::<Vec<_>>(),
        "left": left.collect::<Vec<_>>(),
        "warnings": warnings.collect::<Vec<_>>(),
    })
}

fn table(found: &Extraction) {
    let paths = found.layers.iter().map(|layer| layer.path.len());
    let width = paths.max().unwrap_or(0).max(5);
    say(format_args!(
        "{:width$}  {:>5} {:>9} {:>10} {:>10} {:>9}  {:>17}",
        "layer", "block", "change", "explained", "rotation", "angle", "ratio"
    ));
    for layer in &found.layers {
        say(format_args!(
            "{:width$}  {:>5} {:>9.2e} {:>8.2} % {:>8.2} % {:>8.2}°  {:>17}",
            layer.path,
            layer.block_size,
            layer.change,
            100. * layer.explained,
            100. * layer.explained_by_rotation,
            layer.max_angle_degrees,
            format!("{:.4} to {:.4}", layer.ratio_min, layer.ratio_max),
        ));
    }
    for left in &found.left {
        let kept = if left.kept {
            "kept as an extra tensor"
        } else {
            "not in the adapter"
        };
        say(format_args!("{}: {}; {kept}", left.name, left.reason));
    }
    for warning in &found.warnings {
        eprintln!("warning: {warning}");
    }
    say(format_args!(
        "{} layers, {} unchanged; {:.2} % of their change explained, {:.2} % without magnitudes; they hold \
         {:.2} % of the whole change",
        found.layers.len(),
        found.unchanged,
        100. * found.explained,
        100. * found.explained_by_rotation,
        100. * found.adapted
    ));
}
