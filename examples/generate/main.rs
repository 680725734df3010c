//! Lets a language model answer a prompt, with or without an adapter, or many prompts under several.
//!
//!     cargo run --release --example generate -- --model model.gguf --adapter adapter.safetensors \
//!         --prompt "Define Happiness."
//!     cargo run --release --example generate -- --model model.gguf --adapter devil=devil.safetensors \
//!         --adapter fr=fr.safetensors --prompts prompts.jsonl

mod named;
mod prompts;
#[path = "../support/mod.rs"]
mod support;

use anyhow::{Context, Result};
use candle_doft::merge::{Merge, Strength};
use candle_doft::{Adapter, Adapters, DoftConfig, Mode, Targets};
use clap::Parser;
use clap::builder::{OsStringValueParser, TypedValueParser};
use named::Named;
use prompts::Prompt;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;
use support::cli::{print, say};
use support::device::DeviceName;
use support::llm::model::Model;
use support::llm::open;
use support::llm::sample::{Pass, Sampling, answer, answers, check};
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
    /// An adapter file or folder of any dialect that this crate reads; it runs unmerged. NAME=FILE gives it a
    /// name, and may be given several times; a FILE alone is called `adapter`
    #[arg(long, value_name = "[NAME=]FILE", value_parser = OsStringValueParser::new().try_map(Named::parse))]
    adapter: Vec<Named>,
    /// Of several adapters, the one that answers --prompt
    #[arg(
        long,
        value_name = "NAME",
        conflicts_with = "prompts",
        requires = "adapter"
    )]
    r#use: Option<String>,
    /// Strength of the adapter; other than 1 it is merged first, which expands quantized weights
    #[arg(long, default_value_t = 1., value_parser = support::cli::finite, allow_hyphen_values = true, requires = "adapter")]
    strength: f64,
    /// What is asked; it goes through the model's chat template where it has one
    #[arg(long, required_unless_present = "prompts", conflicts_with = "prompts")]
    prompt: Option<String>,
    /// Many prompts: a file of JSON lines, {"prompt": TEXT, "adapter": NAME}; without a name, or with null, the
    /// model answers without an adapter. Answers are JSON lines of `prompt`, `adapter` and `answer` in the same
    /// order
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// Lines of --prompts that are answered together
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..))]
    batch: u16,
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
    /// Where to compute: cpu, cuda, cuda:N or metal
    #[arg(long, default_value_t, value_name = "DEVICE")]
    device: DeviceName,
    /// Merges the adapter before it runs
    #[arg(long, requires = "adapter")]
    merge: bool,
    #[command(flatten)]
    read_as: support::cli::ReadAs,
}

fn main() -> std::process::ExitCode {
    let flags = Flags::parse();
    if let Some(wrong) = wrong(&flags) {
        return support::cli::wrong_arguments(&wrong);
    }
    support::cli::run(|| run(&flags))
}

/// What the flags have wrong together.
fn wrong(flags: &Flags) -> Option<String> {
    let merged = flags.merge || flags.strength != 1.;
    if merged && (flags.adapter.len() > 1 || flags.prompts.is_some()) {
        let which = if flags.merge { "--merge" } else { "--strength" };
        return Some(format!(
            "{which} takes one --adapter and a --prompt: several adapters on one model run unmerged"
        ));
    }
    if let Some(wrong) = named::wrong(&flags.adapter) {
        return Some(wrong);
    }
    let names = named::listed(&flags.adapter);
    match &flags.r#use {
        Some(name) if flags.adapter.iter().all(|adapter| adapter.name != *name) => Some(format!(
            "--use: no adapter is called `{name}`; those of --adapter are {names}"
        )),
        None if flags.prompts.is_none() && flags.adapter.len() > 1 => Some(format!(
            "--prompt is answered by one adapter: choose it by --use, out of {names}"
        )),
        _ => None,
    }
}

fn run(flags: &Flags) -> Result<()> {
    match (&flags.prompts, &flags.prompt) {
        (None, Some(prompt)) if flags.adapter.len() < 2 => one(flags, prompt),
        (None, Some(prompt)) => {
            let served = Served::open(flags)?;
            let name = flags.r#use.as_deref().unwrap_or_default();
            let run = |f: &mut dyn FnMut() -> Result<()>| {
                served.adapters.get(name)?.with_mode(Mode::Eval, f)
            };
            told(flags, (&served.model, &served.text), prompt, run)
        }
        (Some(file), _) => many(flags, file),
        (None, None) => Ok(()),
    }
}

/// One prompt, under no adapter or one.
fn one(flags: &Flags, prompt: &str) -> Result<()> {
    let device = flags.device.open()?;
    let mut weights = Weights::open(&open::locate(&flags.model)?, flags.dequantize, &device)?;
    let text = Text::open(&weights)?;
    let builder = match flags.adapter.first().map(|adapter| &adapter.file) {
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
    told(flags, (&model, &text), prompt, |f| tuner.eval(f))
}

/// Answers one prompt as its tokens come; `run` sets what the model runs under.
fn told(
    flags: &Flags,
    (model, text): (&Model, &Text),
    prompt: &str,
    run: impl FnOnce(&mut dyn FnMut() -> Result<()>) -> Result<()>,
) -> Result<()> {
    let prompt = text.prompt(prompt)?;
    let mut printed = Printed::default();
    run(&mut || {
        let each = |ids: &[u32]| {
            printed.add(ids.len(), text.decode(ids)?);
            Ok(())
        };
        let answered = answer(model, text, &prompt, flags.sampling(), each)?;
        printed.finish(&answered);
        Ok(())
    })
}

/// A model that adapts nothing itself, and the adapters on it.
struct Served {
    model: Model,
    text: Text,
    adapters: Adapters,
}

impl Served {
    fn open(flags: &Flags) -> Result<Self> {
        let device = flags.device.open()?;
        let weights = Weights::open(&open::locate(&flags.model)?, flags.dequantize, &device)?;
        let text = Text::open(&weights)?;
        let nothing = DoftConfig::default().with_targets(Targets::None);
        let builder = Adapter::builder(nothing.clone(), &device)?;
        let builder = TunerBuilder::with_adapter(Method::Doft(Box::new(nothing)), builder);
        let model = Model::new(&weights, &builder, &device)?;
        let tuner = builder.finish()?;
        let base = tuner
            .adapter()
            .context("the model was built without an adapter")?;
        // No flag gives an empty name.
        let adapters = Adapters::new("", base.clone());
        for Named { name, file, .. } in &flags.adapter {
            let adapter = adapters.load_with(name, file, &flags.read_as.options())?;
            for warning in adapter.warnings() {
                eprintln!("note: {name}: {warning}");
            }
        }
        Ok(Self {
            model,
            text,
            adapters,
        })
    }
}

/// All prompts of a file, in batches of mixed adapters.
fn many(flags: &Flags, file: &Path) -> Result<()> {
    let names: Vec<&str> = flags
        .adapter
        .iter()
        .map(|adapter| adapter.name.as_str())
        .collect();
    let prompts = prompts::read(file, &names)?;
    let Served {
        model,
        text,
        adapters,
    } = Served::open(flags)?;
    let mut tokens = Vec::with_capacity(prompts.len());
    for Prompt { line, prompt, .. } in &prompts {
        let ids = text.prompt(prompt).and_then(|ids| {
            check(&model, &ids)?;
            Ok(ids)
        });
        tokens.push(ids.with_context(|| format!("{}: line {line}", file.display()))?);
    }
    // Made once, for all batches.
    let mut pins = BTreeMap::new();
    for name in names {
        pins.insert(name, adapters.get(name)?.pin()?);
    }
    let size = usize::from(flags.batch);
    for (prompts, tokens) in prompts.chunks(size).zip(tokens.chunks(size)) {
        let tokens: Vec<&[u32]> = tokens.iter().map(Vec::as_slice).collect();
        let under = |rows: &[usize], run: &mut Pass| {
            let of = |row: &usize| pins.get(prompts[*row].adapter.as_deref()?);
            let rows: Vec<_> = rows.iter().map(of).collect();
            adapters.rows_of(&rows).run(run)
        };
        let found = answers(&model, &text, &tokens, flags.sampling(), under, |_, _| {
            Ok(())
        })?;
        for (prompt, answer) in prompts.iter().zip(found) {
            say(format_args!("{}", prompt.answered(&answer)?));
        }
    }
    Ok(())
}

impl Flags {
    fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temperature,
            seed: self.seed,
            max_tokens: self.max_tokens,
        }
    }
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
