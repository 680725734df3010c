//! Chooses the strength of an adapter on held-out text, against a second text that must not suffer.
//!
//!     cargo run --release --example tune-strength -- --model model.gguf --adapter adapter.safetensors \
//!         --data target.jsonl --keep general.txt --output tuned.safetensors

mod draw;
mod measure;
mod search;
mod show;
#[path = "../support/mod.rs"]
mod support;

use anyhow::{Result, ensure};
use clap::Parser;
use measure::{Bench, Limit};
use search::{Groups, Search, uniform};
use std::path::{Path, PathBuf};
use support::cli::say;
use support::files;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Chooses how much of an adapter acts, from 0 to 1.2: planes turn by that share of their angle, ratios take it as
/// power. Nine tenths of each text choose, and the rest, which is not looked at for that, is reported.
#[derive(Parser, Clone, Debug)]
struct Flags {
    /// A GGUF file, a folder in Hugging Face layout, or a name on the hub (owner/model)
    #[arg(long)]
    model: String,
    /// An adapter of rotations, in any dialect that this crate reads
    #[arg(long)]
    adapter: PathBuf,
    /// Text or JSON that the adapter is for, and was not trained on; as of finetune
    #[arg(long)]
    data: PathBuf,
    /// Text or JSON that must not suffer; without it the target alone decides
    #[arg(long)]
    keep: Option<PathBuf>,
    /// By what share the perplexity of --keep may rise over that of the base [default: 0.02]
    #[arg(long, value_parser = support::cli::not_negative, requires = "keep")]
    allow: Option<f64>,
    /// Then a strength for each adapted layer
    #[arg(long, conflicts_with = "per_block")]
    per_layer: bool,
    /// Then a strength for each block of the model
    #[arg(long)]
    per_block: bool,
    /// Times that each layer or block is tried, in halved steps
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=4))]
    passes: u8,
    /// Sequences of each part of each text at most
    #[arg(long, default_value_t = 48, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=1_000_000))]
    sequences: usize,
    /// Tokens of a sequence at most
    #[arg(long, default_value_t = 128, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(2..=1_000_000))]
    seq: usize,
    /// Sequences that are read together
    #[arg(long, default_value_t = 4, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=1_000_000))]
    batch: usize,
    /// Of the split of JSON into parts
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Expands quantized and half weights to f32
    #[arg(long)]
    dequantize: bool,
    /// The adapter with the strength done in the file
    #[arg(long)]
    output: Option<PathBuf>,
    /// The curve, as SVG
    #[arg(long, value_name = "FILE")]
    picture: Option<PathBuf>,
    #[command(flatten)]
    read_as: support::cli::ReadAs,
}

fn main() -> std::process::ExitCode {
    let flags = Flags::parse();
    support::cli::run(|| run(&flags))
}

fn run(flags: &Flags) -> Result<()> {
    for path in [&flags.output, &flags.picture].into_iter().flatten() {
        check_place(path)?;
    }
    let bench = Bench::open(flags)?;
    let tried = uniform(&bench)?;
    let best = search::best(&tried, bench.limit)?;
    say(format_args!("{}", show::curve(&tried)));
    let mut chosen = Search::of_all(best);
    if flags.per_layer || flags.per_block {
        let groups = Groups::new(&bench.paths, flags.per_block);
        chosen = Search::by_group(&bench, groups, best, flags.passes)?;
        say(format_args!("{}", show::groups(&chosen)));
    }
    say(format_args!("{}", show::chosen(&chosen, bench.limit)));
    for note in show::notes(&chosen, bench.limit, &bench.base) {
        eprintln!("note: {note}");
    }
    if let Some(picture) = &flags.picture {
        let picture_of = draw::picture(&tried, bench.limit)?;
        files::replace(picture, picture_of.as_bytes())?;
        say(format_args!("{}", picture.display()));
    }
    if let Some(output) = &flags.output {
        for warning in bench.write(&chosen.strengths(), output)? {
            eprintln!("warning: {warning}");
        }
        say(format_args!("{}", output.display()));
    }
    Ok(())
}

/// Refuses a file that could not be written at the end.
fn check_place(path: &Path) -> Result<()> {
    ensure!(
        !path.is_dir(),
        "{} is a folder, expected a file",
        path.display()
    );
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    ensure!(
        folder.is_dir(),
        "{}: there is no folder {}; make it first",
        path.display(),
        folder.display()
    );
    Ok(())
}

impl Flags {
    /// What the second text is held to.
    fn limit(&self) -> Option<Limit> {
        let allow = self.allow.unwrap_or(0.02);
        self.keep.as_ref().map(|_| Limit { allow, base: 0. })
    }
}
