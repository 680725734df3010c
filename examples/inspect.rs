//! Shows what an adapter holds, and how it fits a base.
//!
//!     cargo run --release --example inspect -- --adapter adapter.safetensors

#[path = "support/mod.rs"]
mod support;

use anyhow::Result;
use candle_doft::merge::{Inspection, LayerInspection, inspect_with};
use clap::Parser;
use serde_json::{Value, json};
use std::path::PathBuf;
use support::cli::say;

/// Dialect, layers, block sizes, map, magnitude and angles of an adapter.
#[derive(Parser, Debug)]
struct Flags {
    /// An adapter of this crate, of OneTrainer or of PEFT
    #[arg(long)]
    adapter: PathBuf,
    /// A safetensors file or a folder of them, to compare with
    #[arg(long)]
    base: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    names: support::cli::Names,
    #[command(flatten)]
    read_as: support::cli::ReadAs,
}

fn main() -> std::process::ExitCode {
    let flags = Flags::parse();
    support::cli::run(|| run(&flags))
}

fn run(flags: &Flags) -> Result<()> {
    let options = match &flags.base {
        Some(base) => flags.read_as.options_for(&flags.adapter, base)?,
        None => flags.read_as.options(),
    };
    let names = flags.names.table()?;
    let found = inspect_with(
        &flags.adapter,
        &options,
        flags.base.as_deref(),
        names.as_ref(),
    )?;
    match flags.json {
        true => say(format_args!(
            "{}",
            serde_json::to_string_pretty(&as_json(&found)?)?
        )),
        false => table(&found),
    }
    Ok(())
}

fn as_json(found: &Inspection) -> Result<Value> {
    let mut layers = Vec::new();
    for layer in &found.layers {
        layers.push(json!({
            "path": layer.path,
            "kind": serde_json::to_value(layer.kind)?,
            "block_size": layer.block_size,
            "blocks": layer.blocks,
            "map": serde_json::to_value(layer.map)?,
            "magnitude": serde_json::to_value(layer.magnitude)?,
            "max_angle_degrees": layer.max_angle_degrees,
            "orthogonality_error": layer.orthogonality_error,
            "ratio_min": layer.ratio_min,
            "ratio_max": layer.ratio_max,
            "norm_drift": layer.norm_drift,
            "mismatch": layer.mismatch,
        }));
    }
    let warnings: Vec<String> = found.warnings.iter().map(ToString::to_string).collect();
    Ok(json!({
        "dialect": found.dialect.to_string(),
        "warnings": warnings,
        "trainable_parameters": found.trainable_parameters,
        "layers": layers,
    }))
}

fn table(found: &Inspection) {
    let width = found
        .layers
        .iter()
        .map(|l| l.path.len())
        .max()
        .unwrap_or(0)
        .max(5);
    say(format_args!(
        "{:width$}  {:>5} {:>6}  {:12} {:9} {:>9} {:>10}  {:>17}",
        "layer", "block", "blocks", "map", "magnitude", "angle", "|RR'-I|", "ratio"
    ));
    for layer in &found.layers {
        say(format_args!("{}", row(layer, width)));
    }
    for warning in &found.warnings {
        say(format_args!("warning: {warning}"));
    }
    say(format_args!(
        "{} adapter, {} layers, {} trainable parameters",
        found.dialect,
        found.layers.len(),
        found.trainable_parameters
    ));
}

fn row(layer: &LayerInspection, width: usize) -> String {
    let ratio = match (layer.ratio_min, layer.ratio_max) {
        (Some(least), Some(most)) => format!("{least:.4} to {most:.4}"),
        _ => "needs the base".to_string(),
    };
    let mut row = format!(
        "{:width$}  {:>5} {:>6}  {:12} {:9} {:>8.2}° {:>10.1e}  {ratio:>17}",
        layer.path,
        layer.block_size,
        layer.blocks,
        layer.map.to_string(),
        format!("{:?}", layer.magnitude),
        layer.max_angle_degrees,
        layer.orthogonality_error,
    );
    if let Some(drift) = layer.norm_drift {
        row += &format!("  norms off by {drift:.1e}");
    }
    if let Some(mismatch) = &layer.mismatch {
        row += &format!("  {mismatch}");
    }
    row
}
