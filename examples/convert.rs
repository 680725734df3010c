//! Rewrites an adapter as one of this crate or as a PEFT folder.
//!
//!     cargo run --release --example convert -- --adapter peft_folder --output adapter.safetensors --to doft

#[path = "support/mod.rs"]
mod support;

use anyhow::Result;
use candle_doft::file::{Target, convert};
use candle_doft::merge::weight_shapes;
use clap::{Parser, ValueEnum};
use std::collections::BTreeMap;
use std::path::PathBuf;
use support::cli::say;

/// Rewrites an adapter; what the target cannot hold is an error.
#[derive(Parser, Debug)]
struct Flags {
    /// An adapter of this crate, of OneTrainer or of PEFT
    #[arg(long)]
    adapter: PathBuf,
    /// A file for doft, a folder for peft
    #[arg(long)]
    output: PathBuf,
    /// The format to write
    #[arg(long, value_enum)]
    to: Format,
    /// Go on without the magnitude, which PEFT cannot hold
    #[arg(long)]
    drop_magnitude: bool,
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
    let target = match flags.to {
        Format::Doft => Target::Doft,
        Format::Peft => Target::Peft {
            drop_magnitude: flags.drop_magnitude,
        },
    };
    for warning in convert(&flags.adapter, &flags.output, target, &options, &shapes)? {
        eprintln!("warning: {warning}");
    }
    say(format_args!("{}", flags.output.display()));
    Ok(())
}
