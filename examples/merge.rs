//! Writes a checkpoint with adapters in it, for programs that know no adapter.
//!
//!     cargo run --release --example merge -- --base model.safetensors --adapter adapter.safetensors \
//!         --output merged.safetensors

#[path = "support/mod.rs"]
mod support;

use anyhow::Result;
use candle_doft::config::Strengths;
use candle_doft::merge::{CheckpointOptions, Merge, StrengthMode};
use clap::{Parser, ValueEnum};
use std::path::PathBuf;
use support::cli::say;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Merges adapters into a checkpoint; all else is copied byte for byte.
#[derive(Parser, Debug)]
struct Flags {
    /// A safetensors file, or a folder of them
    #[arg(long)]
    base: PathBuf,
    /// An adapter of this crate, of OneTrainer or of PEFT; several run in this order, and the order matters
    #[arg(long, required = true)]
    adapter: Vec<PathBuf>,
    /// Where to write: a file for a file, a folder for a folder; may be the base
    #[arg(long)]
    output: PathBuf,
    /// How much of the adapters to merge
    #[arg(long, default_value_t = 1., allow_negative_numbers = true, value_parser = support::cli::finite)]
    strength: f64,
    /// The strength of the layers that a pattern matches, PATTERN=S; may be given several times
    #[arg(long, value_name = "PATTERN=S", value_parser = support::cli::strength_for)]
    strength_for: Vec<(String, f64)>,
    /// How a strength other than 1 is meant
    #[arg(long, value_enum, default_value_t = Mode::Linear)]
    strength_mode: Mode,
    /// Merge into a base whose row norms are not those of the training
    #[arg(long)]
    allow_changed_base: bool,
    /// Let modules of an adapter match no weight
    #[arg(long)]
    allow_partial: bool,
    #[command(flatten)]
    names: support::cli::Names,
    #[command(flatten)]
    read_as: support::cli::ReadAs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    Linear,
    Geodesic,
}

fn main() -> std::process::ExitCode {
    let flags = Flags::parse();
    support::cli::run(|| run(&flags))
}

fn run(flags: &Flags) -> Result<()> {
    let mode = match flags.strength_mode {
        Mode::Linear => StrengthMode::Linear,
        Mode::Geodesic => StrengthMode::Geodesic,
    };
    let mut strengths = Strengths::from(flags.strength);
    for (pattern, value) in &flags.strength_for {
        strengths = strengths.with_rule(pattern.as_str(), *value);
    }
    let mut merge = Merge::new();
    for adapter in &flags.adapter {
        let options = flags.read_as.options_for(adapter, &flags.base)?;
        let options = options.with_allow_partial(flags.allow_partial);
        merge = merge.with_file_by_layer(adapter, &options, mode, &strengths)?;
    }
    if let Some(table) = flags.names.table()? {
        merge = merge.with_names(table);
    }
    let bar = support::progress::bar(0, "merge");
    let mut progress = |done: u64, total: u64| {
        bar.set_length(total >> 20);
        bar.set_position(done >> 20);
    };
    let mut how = CheckpointOptions::default();
    how.allow_changed_base = flags.allow_changed_base;
    how.progress = Some(&mut progress);
    let stop = support::cli::stop()?;
    how.stop = Some(&stop);
    let report = merge.checkpoint(&flags.base, &flags.output, how)?;
    bar.finish_and_clear();
    for warning in merge.warnings() {
        eprintln!("warning: {warning}");
    }
    say(format_args!(
        "{}: {} tensors merged, {} copied, {} added",
        flags.output.display(),
        report.merged.len(),
        report.copied,
        report.added.len()
    ));
    if report.untied {
        say(format_args!(
            "the head shared its weight with the embedding and has one of its own now"
        ));
    }
    Ok(())
}
