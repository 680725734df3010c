//! Makes one adapter out of several: one after the other, or their mean.
//!
//!     cargo run --release --example combine -- --mode mean --adapter a.safetensors=0.5 \
//!         --adapter b.safetensors=0.5 --output mean.safetensors

#[path = "support/mod.rs"]
mod support;

use anyhow::Result;
use candle_doft::file::{Combination, combine};
use candle_doft::merge::weight_shapes;
use clap::{Parser, ValueEnum};
use std::collections::BTreeMap;
use std::path::PathBuf;
use support::cli::say;

/// One adapter out of several. A layer that an adapter lacks is the identity in it.
#[derive(Parser, Debug)]
struct Flags {
    /// An adapter; with `--mode mean` FILE=WEIGHT, or all without a weight for equal ones. In a product
    /// the first acts first, and the order matters
    #[arg(long, required = true, value_name = "FILE[=WEIGHT]", value_parser = weighted)]
    adapter: Vec<(PathBuf, Option<f64>)>,
    /// The file to write
    #[arg(long)]
    output: PathBuf,
    /// What to make of them
    #[arg(long, value_enum)]
    mode: Mode,
    /// The base checkpoint, to tell kernels from matrices and to find its names
    #[arg(long)]
    base: Option<PathBuf>,
    /// Combine adapters of bases whose row norms differ
    #[arg(long)]
    allow_changed_base: bool,
    #[command(flatten)]
    read_as: support::cli::ReadAs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    Product,
    Mean,
}

/// What stands behind the last `=` is a weight if it is a number; a path may have such a sign, too.
fn weighted(text: &str) -> Result<(PathBuf, Option<f64>), String> {
    let weight = text.rsplit_once('=');
    let weight = weight.and_then(|(path, weight)| Some((path, weight.parse::<f64>().ok()?)));
    Ok(match weight {
        Some((path, weight)) => (path.into(), Some(weight)),
        None => (text.into(), None),
    })
}

fn main() -> std::process::ExitCode {
    let flags = Flags::parse();
    let given = flags.adapter.iter().filter_map(|(_, weight)| *weight);
    let given: Vec<f64> = given.collect();
    let count = flags.adapter.len();
    let combination = match (flags.mode, given.len()) {
        (Mode::Product, 0) => Combination::Product,
        (Mode::Product, _) => {
            return support::cli::wrong_arguments("a product has no weights; give the files alone");
        }
        (Mode::Mean, 0) => Combination::Mean(vec![1. / count as f64; count]),
        (Mode::Mean, all) if all == count => Combination::Mean(given),
        (Mode::Mean, some) => {
            let what = format!(
                "{some} of {count} adapters have a weight; give one to each, --adapter FILE=WEIGHT"
            );
            return support::cli::wrong_arguments(&what);
        }
    };
    support::cli::run(|| run(&flags, &combination))
}

fn run(flags: &Flags, combination: &Combination) -> Result<()> {
    let options = flags
        .read_as
        .options()
        .with_allow_changed_base(flags.allow_changed_base);
    let shapes = match &flags.base {
        Some(base) => weight_shapes(base)?,
        None => BTreeMap::new(),
    };
    let paths: Vec<&PathBuf> = flags.adapter.iter().map(|(path, _)| path).collect();
    for warning in combine(&paths, combination, &flags.output, &options, &shapes)? {
        eprintln!("warning: {warning}");
    }
    say(format_args!("{}", flags.output.display()));
    Ok(())
}
