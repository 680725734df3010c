//! A network that reads upright digits fails on turned ones. It is frozen; DOFT adapts it.
//!
//!     cargo run --release --example quickstart

mod draw;
#[path = "../support/network.rs"]
mod network;
#[path = "../support/mod.rs"]
mod support;

use anyhow::{Context, Result};
use candle_core::Device;
use candle_doft::adapter::Report;
use candle_doft::{Adapter, DoftConfig, DoftLinear, rotation};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, loss};
use clap::Parser;
use network::{Net, accuracy, max_abs_diff, predictions};
use std::path::PathBuf;
use std::time::Instant;
use support::cli::DeviceName;
use support::digits::{Batches, Digits, Split};
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
    /// Where to compute
    #[arg(long, value_enum, default_value_t = DeviceName::Cpu)]
    device: DeviceName,
}

/// Widths of the network, from the pixels to the classes.
const WIDTHS: [usize; 4] = [64, 256, 256, 10];

/// Examples in a step.
const BATCH: usize = 64;

/// Steps and rate with which the network learns upright digits.
const BASE_STEPS: usize = 600;
const BASE_RATE: f64 = 3e-3;

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

fn run(flags: &Flags) -> Result<()> {
    let device = flags.device.open()?;
    files::make_folder(&flags.out)?;
    let start = Instant::now();
    let upright = Digits::load()?.split(flags.seed);
    let turned = Split {
        train: upright.train.turned(),
        validation: upright.validation.turned(),
        test: upright.test.turned(),
    };
    let base = train_base(&upright.train, flags.seed, &device)?;
    let (test, labels) = turned.test.tensors(&device)?;
    let frozen = base.forward(&test)?;
    let (upright_test, upright_labels) = upright.test.tensors(&device)?;

    // The three lines that adapt a network: an adapter, its layers, its variables.
    let config = DoftConfig::default()
        .with_block_size(flags.block_size as usize)
        .with_seed(flags.seed);
    let adapter = Adapter::new(config, &device)?;
    let net = base.each(|name, layer| adapter.wrap_linear(name, layer.clone()))?;
    let curve = adapt(&adapter, &net, &turned, flags, &device)?;
    let adapted = adapter.inference(|| net.forward(&test))??;
    let seconds = start.elapsed().as_secs_f64();

    let file = flags.out.join("adapter.safetensors");
    adapter.save(&file)?;
    let loaded = Adapter::load(&file, &device)?;
    let reloaded = base.each(|name, layer| loaded.wrap_linear(name, layer.clone()))?;
    loaded.check_complete()?;
    let reloaded = reloaded.forward(&test)?;
    let merged = net.each(|_, layer| layer.merge())?.forward(&test)?;

    let summary = adapter.report()?;
    let (angles, orthogonality) = rotations(&net)?;
    let outcome = Outcome {
        curve,
        digits: turned.test,
        before: predictions(&frozen)?,
        after: predictions(&adapted)?,
        angles,
    };
    let report = serde_json::json!({
        "base_accuracy": accuracy(&frozen, &labels)?,
        "adapted_accuracy": accuracy(&adapted, &labels)?,
        "upright_accuracy": accuracy(&base.forward(&upright_test)?, &upright_labels)?,
        "validation_accuracy": outcome.curve.last().map(|point| point.1),
        "trainable_parameters": summary.trainable,
        "steps": flags.steps,
        "seed": flags.seed,
        "block_size": flags.block_size,
        "merged_max_abs_diff": max_abs_diff(&merged, &adapted)?,
        "reloaded_max_abs_diff": max_abs_diff(&reloaded, &adapted)?,
        "max_orthogonality_error": orthogonality,
        "seconds": seconds,
    });
    files::replace(
        &flags.out.join("quickstart.svg"),
        draw::picture(&outcome)?.as_bytes(),
    )?;
    let text = serde_json::to_string_pretty(&report)? + "\n";
    files::replace(&flags.out.join("report.json"), text.as_bytes())?;

    say(&summary, &report);
    println!("see {}", flags.out.join("quickstart.svg").display());
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
fn say(summary: &Report, report: &serde_json::Value) {
    println!("{summary}\n");
    let number = |key: &str| report[key].as_f64().unwrap_or(f64::NAN);
    println!("accuracy on test digits");
    println!(
        "  upright, frozen network              {:6.1} %",
        100. * number("upright_accuracy")
    );
    println!(
        "  turned by 90 degrees, before         {:6.1} %",
        100. * number("base_accuracy")
    );
    println!(
        "  turned by 90 degrees, after DOFT     {:6.1} %",
        100. * number("adapted_accuracy")
    );
    println!(
        "trained {:.2} % of the parameters in {:.1} s",
        summary.percent(),
        number("seconds")
    );
    println!(
        "merged and reloaded networks differ by at most {:.1e} and {:.1e}",
        number("merged_max_abs_diff"),
        number("reloaded_max_abs_diff"),
    );
}

fn train_base(digits: &Digits, seed: u64, device: &Device) -> Result<Net<candle_nn::Linear>> {
    let (net, vars) = Net::new(WIDTHS, seed, device)?;
    let params = ParamsAdamW {
        lr: BASE_RATE,
        ..Default::default()
    };
    let mut optimizer = AdamW::new(vars, params)?;
    let mut batches = Batches::new(digits, BATCH, seed);
    let bar = progress::bar(BASE_STEPS, "base");
    for _ in 0..BASE_STEPS {
        let (images, labels) = batches.next_batch().tensors(device)?;
        let loss = loss::cross_entropy(&net.forward(&images)?, &labels)?;
        optimizer.backward_step(&loss)?;
        bar.inc(1);
    }
    bar.finish();
    Ok(net.frozen())
}

/// Trains the adapter on turned digits; the validation accuracy along the way.
fn adapt(
    adapter: &Adapter,
    net: &Net<candle_doft::DoftLinear>,
    turned: &Split,
    flags: &Flags,
    device: &Device,
) -> Result<Vec<(usize, f64)>> {
    let steps = flags.steps as usize;
    let (images, labels) = turned.validation.tensors(device)?;
    let validate = || -> Result<f64> {
        let logits = adapter.inference(|| net.forward(&images))??;
        accuracy(&logits, &labels)
    };
    let params = ParamsAdamW {
        lr: flags.lr,
        weight_decay: 0.,
        ..Default::default()
    };
    let mut optimizer = AdamW::new(adapter.vars()?, params)?;
    let mut batches = Batches::new(&turned.train, BATCH, flags.seed.wrapping_add(1));
    let mut curve = vec![(0, validate()?)];
    let bar = progress::bar(steps, "DOFT");
    for step in 0..steps {
        // Half a cosine, from the highest rate to 0.
        let done = step as f64 / steps as f64;
        optimizer.set_learning_rate(flags.lr * 0.5 * (1. + (std::f64::consts::PI * done).cos()));
        let (images, labels) = batches.next_batch().tensors(device)?;
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
