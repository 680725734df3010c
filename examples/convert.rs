//! Rewrites an adapter as one of this crate, as a PEFT folder or for readers of the plain series; with a
//! strength done in the file, or its maps made orthogonal.
//!
//!     cargo run --release --example convert -- --adapter peft_folder --output adapter.safetensors --to doft

#[path = "support/mod.rs"]
mod support;

use anyhow::Result;
use candle_doft::config::Strengths;
use candle_doft::file::{Cause, Changes, Conversion, Target, convert_with};
use candle_doft::merge::weight_shapes;
use clap::{Parser, ValueEnum};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::PathBuf;
use support::cli::say;

/// Rewrites an adapter; what the target cannot hold is an error.
#[derive(Parser, Debug)]
struct Flags {
    /// An adapter of this crate, of OneTrainer or of PEFT
    #[arg(long)]
    adapter: PathBuf,
    /// A file for doft and series, a folder for peft
    #[arg(long)]
    output: PathBuf,
    /// The format to write
    #[arg(long, value_enum)]
    to: Format,
    /// Go on without the magnitude, which PEFT and the series cannot hold
    #[arg(long)]
    drop_magnitude: bool,
    /// Do a strength in the file: planes turn by that share of their angle; -1 undoes the adapter
    #[arg(long, default_value_t = 1., allow_negative_numbers = true, value_parser = support::cli::finite)]
    strength: f64,
    /// The strength of the layers that a pattern matches, PATTERN=S; may be given several times
    #[arg(long, value_name = "PATTERN=S", value_parser = support::cli::strength_for)]
    strength_for: Vec<(String, f64)>,
    /// Replace maps that are not orthogonal by the rotations nearest to them, before the strength
    #[arg(long, value_enum)]
    project: Option<Projection>,
    /// Print JSON: warnings, and what changed in each layer
    #[arg(long)]
    json: bool,
    /// The base checkpoint, to tell kernels from matrices and to find its names
    #[arg(long)]
    base: Option<PathBuf>,
    #[command(flatten)]
    read_as: support::cli::ReadAs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    Doft,
    Peft,
    Series,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Projection {
    Cayley,
}

fn main() -> std::process::ExitCode {
    let flags = Flags::parse();
    support::cli::run(|| run(&flags))
}

fn run(flags: &Flags) -> Result<()> {
    let options = flags.read_as.options();
    let shapes = match &flags.base {
        Some(base) => weight_shapes(base)?,
        None => BTreeMap::new(),
    };
    let drop_magnitude = flags.drop_magnitude;
    let target = match flags.to {
        Format::Doft => Target::Doft,
        Format::Peft => Target::Peft { drop_magnitude },
        Format::Series => Target::Series { drop_magnitude },
    };
    let mut strengths = Strengths::from(flags.strength);
    for (pattern, value) in &flags.strength_for {
        strengths = strengths.with_rule(pattern.as_str(), *value);
    }
    let changes = Changes::default()
        .with_strength(strengths)
        .with_projection(flags.project == Some(Projection::Cayley));
    let (input, output) = (&flags.adapter, &flags.output);
    let done = convert_with(input, output, target, &options, &shapes, &changes)?;
    if flags.json {
        say(format_args!(
            "{}",
            serde_json::to_string_pretty(&as_json(&done))?
        ));
        return Ok(());
    }
    for warning in &done.warnings {
        eprintln!("warning: {warning}");
    }
    say(format_args!("{}", output.display()));
    Ok(())
}

fn as_json(done: &Conversion) -> serde_json::Value {
    let warnings: Vec<String> = done.warnings.iter().map(ToString::to_string).collect();
    let changes = done.changes.iter().map(|change| {
        json!({
            "path": change.path,
            "cause": match change.cause {
                Cause::Projection => "projection",
                _ => "series",
            },
            "largest_entry": change.largest_entry,
            "weight_share": change.weight_share,
        })
    });
    json!({"warnings": warnings, "changes": changes.collect::<Vec<_>>()})
}
