//! Lets a language model answer a prompt, with or without an adapter.
//!
//!     cargo run --release --example generate -- --model model.gguf --adapter adapter.safetensors \
//!         --prompt "Define Happiness."

#[path = "support/mod.rs"]
mod support;

use anyhow::Result;
use candle_core::Device;
use candle_doft::Adapter;
use candle_doft::merge::{Merge, Strength};
use clap::Parser;
use std::path::PathBuf;
use std::time::Instant;
use support::cli::{print, say};
use support::llm::model::Model;
use support::llm::open;
use support::llm::sample::{Sampling, answer};
use support::llm::tokenizer::Text;
use support::llm::weights::Weights;
use support::memory;
use support::methods::{Method, TunerBuilder};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Runs a language model, with or without an adapter; the answer alone on standard output.
#[derive(Parser, Clone, Debug)]
struct Flags {
    /// A GGUF file, a folder in Hugging Face layout, or a name on the hub (owner/model)
    #[arg(long)]
    model: String,
    /// An adapter file or folder of any dialect that this crate reads; it runs unmerged
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// Strength of the adapter; other than 1 it is merged first, which expands quantized weights
    #[arg(long, default_value_t = 1., value_parser = support::cli::finite, allow_hyphen_values = true, requires = "adapter")]
    strength: f64,
    /// What is asked; it goes through the model's chat template where it has one
    #[arg(long)]
    prompt: String,
    /// Tokens at most
    #[arg(long, default_value_t = 128)]
    max_tokens: usize,
    /// 0 takes the likeliest token each time
    #[arg(long, default_value_t = 0., value_parser = support::cli::not_negative)]
    temperature: f64,
    /// Of the choice among tokens, where the temperature is above 0
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Expands quantized and half weights to f32
    #[arg(long)]
    dequantize: bool,
    /// Merges the adapter before it runs
    #[arg(long, requires = "adapter")]
    merge: bool,
    #[command(flatten)]
    read_as: support::cli::ReadAs,
}

fn main() -> std::process::ExitCode {
    let flags = Flags::parse();
    support::cli::run(|| run(&flags))
}

fn run(flags: &Flags) -> Result<()> {
    let device = Device::Cpu;
    let mut weights = Weights::open(&open::locate(&flags.model)?, flags.dequantize, &device)?;
    let text = Text::open(&weights)?;
    let builder = match &flags.adapter {
        None => TunerBuilder::new(Method::Frozen, 0, &device)?,
        Some(file) if flags.merge || flags.strength != 1. => {
            let strength = Strength::linear(flags.strength);
            let merge = Merge::new().with_file(file, &flags.read_as.options(), strength)?;
            weights = weights.merged(&merge)?;
            TunerBuilder::new(Method::Frozen, 0, &device)?
        }
        Some(file) => {
            let method = Method::Doft(Box::default());
            let builder = Adapter::load_with(file, &device, &flags.read_as.options())?;
            weights = weights.with_extras(&builder)?;
            TunerBuilder::with_adapter(method, builder)
        }
    };
    let model = Model::new(&weights, &builder, &device)?;
    let tuner = builder.finish()?;
    if let Some(adapter) = tuner.adapter() {
        for warning in adapter.warnings() {
            eprintln!("note: {warning}");
        }
    }
    let sampling = Sampling {
        temperature: flags.temperature,
        seed: flags.seed,
        max_tokens: flags.max_tokens,
    };
    let prompt = text.prompt(&flags.prompt)?;
    let mut printed = Printed::default();
    let each = |ids: &[u32]| {
        printed.add(ids.len(), text.decode(ids)?);
        Ok(())
    };
    let answered = tuner.eval(|| answer(&model, &text, &prompt, sampling, each))?;
    printed.finish(&answered);
    Ok(())
}

/// What stands on standard output so far.
#[derive(Default)]
struct Printed {
    text: String,
    tokens: usize,
    /// When the first token came.
    first: Option<Instant>,
}

impl Printed {
    fn add(&mut self, tokens: usize, text: String) {
        self.first.get_or_insert_with(Instant::now);
        self.tokens = tokens;
        // A character may take several tokens; until it is whole it shows as a replacement.
        if let Some(new) = text.strip_prefix(self.text.as_str())
            && !new.ends_with('\u{fffd}')
        {
            print(format_args!("{new}"));
            self.text = text;
        }
    }

    /// The rest of the answer, and on standard error how fast it came.
    fn finish(&self, answer: &str) {
        say(format_args!(
            "{}",
            answer.strip_prefix(self.text.as_str()).unwrap_or_default()
        ));
        if let (Some(first), 2..) = (self.first, self.tokens) {
            let speed = (self.tokens - 1) as f64 / first.elapsed().as_secs_f64();
            let peak = memory::peak_bytes();
            let megabytes = |bytes: u64| format!(", {:.1} MB at most", bytes as f64 / 1e6);
            let peak = peak.map_or(String::new(), megabytes);
            eprintln!("{speed:.1} tokens/s{peak}");
        }
    }
}
