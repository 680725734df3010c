//! A network that reads upright digits fails on turned ones. It is frozen; DOFT adapts it.
//!
//!     cargo run --release --example quickstart

mod draw;
#[path = "../support/mod.rs"]
mod support;

use anyhow::{Context, Result};
use candle_core::Device;
use candle_doft::train::Schedule;
use candle_doft::{Adapter, DoftConfig, DoftLinear, Mode, adapter, rotation};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, loss};
use clap::Parser;
use serde::Serialize;
use std::path::PathBuf;
use std::time::Instant;
use support::cli::say;
use support::device::DeviceName;
use support::digits::{Batches, Digits, Split};
use support::network::{BATCH, Net, accuracy, max_abs_diff, predictions};
use support::{files, progress};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Adapts a frozen network to digits turned by 90 degrees, with DOFT.
#[derive(Parser, Clone, Debug)]
struct Flags {
    /// Folder for adapter.safetensors, quickstart.svg and report.json
    #[arg(long, default_value = "target/quickstart")]
    out: PathBuf,
    /// Steps of the adaptation
    #[arg(long, default_value_t = 800, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    steps: u32,
    /// Seed of the split, the network and the batches
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Width of a rotation block
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=4096))]
    block_size: u32,
    /// Highest learning rate of the adaptation, for rotation and magnitude alike; the default was
    /// chosen on the validation split
    #[arg(long, default_value_t = 0.1, value_parser = support::cli::positive)]
    lr: f64,
    /// Where to compute: cpu, cuda, cuda:N or metal
    #[arg(long, default_value_t, value_name = "DEVICE")]
    device: DeviceName,
}

/// Widths of the network, from the pixels to the classes.
const WIDTHS: [usize; 4] = [64, 256, 256, 10];

/// Steps with which the network learns upright digits.
const BASE_STEPS: usize = 600;

fn main() -> std::process::ExitCode {
    let flags = Flags::parse();
    support::cli::run(|| run(&flags))
}

/// What the run found, for the picture.
struct Outcome {
    /// Validation accuracy on turned digits after so many steps.
    curve: Vec<(usize, f64)>,
    /// Turned test digits, and what was read before and after.
    digits: Digits,
    before: Vec<u32>,
    after: Vec<u32>,
    /// Rotation angles in radians of each layer.
    angles: Vec<(String, Vec<f64>)>,
}

/// `report.json`; accuracies are shares of the test split where nothing else is said.
#[derive(Serialize)]
struct Report {
    base_accuracy: f64,
    adapted_accuracy: f64,
    upright_accuracy: f64,
    validation_accuracy: Option<f64>,
    trainable_parameters: usize,
    steps: u32,
    seed: u64,
    block_size: u32,
    merged_max_abs_diff: f64,
    reloaded_max_abs_diff: f64,
    max_orthogonality_error: f64,
    seconds: f64,
}

fn run(flags: &Flags) -> Result<()> {
    let device = flags.device.open()?;
    files::make_folder(&flags.out)?;
    let start = Instant::now();
    let upright = Digits::load()?.split(flags.seed);
    let turned = upright.turned();
    let bar = progress::bar(BASE_STEPS, "base");
    let train = upright.train.examples(&device)?;
    let base = Net::trained(WIDTHS, &train, flags.seed, BASE_STEPS, || bar.inc(1))?;
    bar.finish();
    let upright = upright.test.examples(&device)?;
    let test = turned.test.examples(&device)?;
    let frozen = base.forward(&test.images)?;

    // The lines that adapt a network: a builder, the layers, the adapter with its variables.
    let config = DoftConfig::default()
        .with_block_size(flags.block_size as usize)
        .with_seed(flags.seed);
    let builder = Adapter::builder(config, &device)?;
    let net = base.each(|name, layer| builder.wrap(name, layer.clone()))?;
    let adapter = builder.finish()?;
    let curve = adapt(&adapter, &net, &turned, flags, &device)?;
    let adapted = adapter.with_mode(Mode::Eval, || net.forward(&test.images))?;
    let seconds = start.elapsed().as_secs_f64();

    let file = flags.out.join("adapter.safetensors");
    adapter.save(&file)?;
    let builder = Adapter::load(&file, &device)?;
    let reloaded = base.each(|name, layer| builder.wrap(name, layer.clone()))?;
    builder.finish()?;
    let reloaded = reloaded.forward(&test.images)?;
    let merged = net.each(|_, layer| layer.merge())?.forward(&test.images)?;

    let summary = adapter.report();
    let (angles, orthogonality) = rotations(&net)?;
    let outcome = Outcome {
        curve,
        digits: turned.test,
        before: predictions(&frozen)?,
        after: predictions(&adapted)?,
        angles,
    };
    let report = Report {
        base_accuracy: accuracy(&frozen, &test.labels)?,
        adapted_accuracy: accuracy(&adapted, &test.labels)?,
        upright_accuracy: accuracy(&base.forward(&upright.images)?, &upright.labels)?,
        validation_accuracy: outcome.curve.last().map(|point| point.1),
        trainable_parameters: summary.trainable,
        steps: flags.steps,
        seed: flags.seed,
        block_size: flags.block_size,
        merged_max_abs_diff: max_abs_diff(&merged, &adapted)?,
        reloaded_max_abs_diff: max_abs_diff(&reloaded, &adapted)?,
        max_orthogonality_error: orthogonality,
        seconds,
    };
    let picture = flags.out.join("quickstart.svg");
    files::replace(&picture, draw::picture(&outcome)?.as_bytes())?;
    let text = serde_json::to_string_pretty(&report)? + "\n";
    files::replace(&flags.out.join("report.json"), text.as_bytes())?;

    tell(&summary, &report);
    say(format_args!("see {}", picture.display()));
    Ok(())
}

type Angles = Vec<(String, Vec<f64>)>;

/// The angles of each layer, and how far the worst block is from orthogonal.
fn rotations(net: &Net<DoftLinear>) -> Result<(Angles, f64)> {
    let (mut angles, mut worst) = (Vec::new(), 0f64);
    for (name, layer) in net.layers() {
        worst = worst.max(rotation::orthogonality_error(&layer.rotation()?)?);
        let of_layer = layer.angles()?.into_iter().flatten().collect();
        angles.push((name.to_string(), of_layer));
    }
    Ok((angles, worst))
}

/// The report in words.
fn tell(summary: &adapter::Report, report: &Report) {
    say(format_args!("{summary}\n\naccuracy on test digits"));
    for (what, share) in [
        ("upright, frozen network", report.upright_accuracy),
        ("turned by 90 degrees, before", report.base_accuracy),
        ("turned by 90 degrees, after DOFT", report.adapted_accuracy),
    ] {
        say(format_args!("  {what:36} {:6.1} %", 100. * share));
    }
    say(format_args!(
        "trained {:.2} % of the parameters in {:.1} s",
        summary.percent(),
        report.seconds
    ));
    say(format_args!(
        "merged and reloaded networks differ by at most {:.1e} and {:.1e}",
        report.merged_max_abs_diff, report.reloaded_max_abs_diff,
    ));
}

/// Trains the adapter on turned digits; the validation accuracy along the way.
fn adapt(
    adapter: &Adapter,
    net: &Net<DoftLinear>,
    turned: &Split,
    flags: &Flags,
    device: &Device,
) -> Result<Vec<(usize, f64)>> {
    let steps = flags.steps as usize;
    let validation = turned.validation.examples(device)?;
    let validate = || -> Result<f64> {
        let logits = adapter.with_mode(Mode::Eval, || net.forward(&validation.images))?;
        accuracy(&logits, &validation.labels)
    };
    let params = ParamsAdamW {
        lr: flags.lr,
        weight_decay: 0.,
        ..Default::default()
    };
    let mut optimizer = AdamW::new(adapter.vars(), params)?;
    let train = turned.train.examples(device)?;
    let mut batches = Batches::new(&train, BATCH, flags.seed.wrapping_add(1));
    let mut curve = vec![(0, validate()?)];
    let bar = progress::bar(steps, "DOFT");
    // Half a cosine, from the highest rate to 0.
    let schedule = Schedule::cosine(0, steps as u64);
    for step in 0..steps {
        optimizer.set_learning_rate(schedule.rate(flags.lr, step as u64));
        let (images, labels) = batches.next_batch()?;
        let loss = loss::cross_entropy(&net.forward(&images)?, &labels)?;
        let grads = loss.backward()?;
        if step == 0 {
            adapter
                .check_gradients(&grads)
                .context("before the first step")?;
        }
        optimizer.step(&grads)?;
        if (step + 1) % (steps / 40).max(1) == 0 || step + 1 == steps {
            curve.push((step + 1, validate()?));
        }
        bar.inc(1);
    }
    bar.finish();
    Ok(curve)
}
