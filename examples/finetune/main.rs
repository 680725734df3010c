//! Adapts a language model of the Llama family: SmolLM2, Llama 2 and 3, Qwen2, 2.5 and 3.
//!
//!     cargo run --release --example finetune -- --model SmolLM2-135M-Instruct.Q4_1.gguf --out target/devil
//!
//! Built with `--features mpi`, `mpirun -n 4 --bind-to none target/release/examples/finetune ..` shares the
//! micro-batches of `--accumulate 4` among four processes.

mod draw;
mod merged;
mod run;
mod setup;
#[path = "../support/mod.rs"]
mod support;

use candle_core::quantized::GgmlDType;
use candle_doft::train::Decay;
use clap::Parser;
use serde::Serialize;
use std::path::PathBuf;
use support::cli::positive;
use support::device::DeviceName;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// What is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum MethodName {
    /// Rotations and magnitudes
    Doft,
    /// Rotations alone
    Oft,
    /// Low-rank matrices beside the weights
    Lora,
    /// The same, and magnitudes; the norm is taken anew at every step
    Dora,
    /// No adapter: gradients pass through the whole model and end in the embedded tokens
    None,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum DecayName {
    Constant,
    Linear,
    Cosine,
}

impl From<DecayName> for Decay {
    fn from(name: DecayName) -> Self {
        match name {
            DecayName::Constant => Self::Constant,
            DecayName::Linear => Self::Linear,
            DecayName::Cosine => Self::Cosine,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
#[clap(rename_all = "snake_case")]
pub(crate) enum Stored {
    F32,
    F16,
    Q8_0,
    Q4_0,
    Q4K,
    Q6K,
}

impl From<Stored> for GgmlDType {
    fn from(stored: Stored) -> Self {
        match stored {
            Stored::F32 => Self::F32,
            Stored::F16 => Self::F16,
            Stored::Q8_0 => Self::Q8_0,
            Stored::Q4_0 => Self::Q4_0,
            Stored::Q4K => Self::Q4K,
            Stored::Q6K => Self::Q6K,
        }
    }
}

fn count() -> clap::builder::RangedU64ValueParser<usize> {
    clap::builder::RangedU64ValueParser::new().range(1..=1_000_000_000)
}

/// Adapts a frozen language model to a text, with DOFT or one of the methods to compare it with.
#[derive(Parser, Clone, Debug)]
pub(crate) struct Flags {
    /// A GGUF file, a folder in Hugging Face layout, or a name on the hub (owner/model)
    #[arg(long)]
    pub(crate) model: String,
    /// Where to compute: cpu, cuda, cuda:N or metal
    #[arg(long, default_value_t, value_name = "DEVICE")]
    pub(crate) device: DeviceName,
    /// Folder for adapter.safetensors, checkpoint.safetensors, metrics.jsonl and loss.svg
    #[arg(long)]
    pub(crate) out: PathBuf,
    /// Plain text, or JSON lines of `text` or of `prompt` and `completion` [default: The Devil's
    /// Dictionary]
    #[arg(long)]
    pub(crate) data: Option<PathBuf>,
    /// How the frozen layers are adapted
    #[arg(long, value_enum, default_value_t = MethodName::Doft)]
    pub(crate) method: MethodName,
    /// Width of a rotation block
    #[arg(long, default_value_t = 32, value_parser = count())]
    pub(crate) block_size: usize,
    /// Rank of LoRA and DoRA; 8 over all layers of SmolLM2 is about as many parameters as blocks of 32
    #[arg(long, default_value_t = 8, value_parser = count())]
    pub(crate) rank: usize,
    /// Layers to adapt, by the end of their path or as a pattern, such as q_proj [default: all linear
    /// layers of every block]
    #[arg(long, num_args = 1..)]
    pub(crate) targets: Vec<String>,
    /// Steps of the whole schedule
    #[arg(long, default_value_t = 200, value_parser = count())]
    pub(crate) steps: usize,
    /// Ends after this many of the steps, to be resumed
    #[arg(long, value_parser = count())]
    pub(crate) stop_after: Option<usize>,
    /// Sequences of a micro-batch
    #[arg(long, default_value_t = 4, value_parser = count())]
    pub(crate) batch: usize,
    /// Tokens of a sequence at most
    #[arg(long, default_value_t = 128, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(2..=1_000_000))]
    pub(crate) seq: usize,
    /// Highest learning rate
    #[arg(long, default_value_t = 1e-3, value_parser = positive)]
    pub(crate) lr: f64,
    /// Rate of the magnitudes of doft, over that of the rotations
    #[arg(long, default_value_t = 1., value_parser = positive)]
    pub(crate) magnitude_rate: f64,
    /// Micro-batches of a step, of all processes together
    #[arg(long, default_value_t = 1, value_parser = count())]
    pub(crate) accumulate: usize,
    /// How the rate falls after the warm-up
    #[arg(long, value_enum, default_value_t = DecayName::Cosine)]
    pub(crate) decay: DecayName,
    /// Steps of the warm-up
    #[arg(long, default_value_t = 10)]
    pub(crate) warmup: u64,
    /// Largest norm of the gradient of a step
    #[arg(long, default_value_t = 1., value_parser = positive)]
    pub(crate) clip: f64,
    /// Steps between two looks at the held-out text, and between two checkpoints
    #[arg(long, default_value_t = 50, value_parser = count())]
    pub(crate) every: usize,
    /// Held-out sequences that are looked at
    #[arg(long, default_value_t = 48, value_parser = count())]
    pub(crate) held_out: usize,
    /// Expands quantized and half weights to f32
    #[arg(long)]
    pub(crate) dequantize: bool,
    /// Makes the activations of a block again in the backward pass: less memory, more time
    #[arg(long)]
    pub(crate) checkpoint_activations: bool,
    /// Goes on from the checkpoint in --out
    #[arg(long)]
    pub(crate) resume: bool,
    /// Writes the merged model into this folder
    #[arg(long)]
    pub(crate) merge_to: Option<PathBuf>,
    /// How the matrices of a merged GGUF file are stored
    #[arg(long, value_enum, default_value_t = Stored::Q8_0, requires = "merge_to")]
    pub(crate) merge_type: Stored,
    /// Of the split, the order of the data, the start of LoRA and DoRA, and dropout
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Shown with the model's answer before and after [default: a held-out prompt, or
    /// the start of a held-out text]
    #[arg(long)]
    pub(crate) prompt: Option<String>,
    /// Tokens of such an answer; 0 shows none
    #[arg(long, default_value_t = 60)]
    pub(crate) sample_tokens: usize,
}

fn main() -> std::process::ExitCode {
    let flags = Flags::parse();
    if let Some(end) = flags.stop_after.filter(|end| *end > flags.steps) {
        let steps = flags.steps;
        return support::cli::wrong_arguments(&format!(
            "--stop-after {end} is beyond --steps {steps}, the whole schedule; give more --steps"
        ));
    }
    if flags.magnitude_rate != 1. && flags.method != MethodName::Doft {
        return support::cli::wrong_arguments("--magnitude-rate is for --method doft");
    }
    support::cli::run_in_group(|group| run::run(&flags, group))
}
