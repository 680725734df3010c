//! Time and memory of a step, each method alone in a process of its own, in turns.

use crate::method::{Entry, Name};
use crate::record::Job;
use crate::run::Adapted;
use crate::support::cli::say;
use crate::support::memory;
use crate::support::network::{BATCH, Net};
use crate::support::progress;
use crate::support::stats::{Interval, interval, mean, median};
use crate::task::{DigitsTask, Task};
use anyhow::{Context, Result, ensure};
use candle_core::Tensor;
use candle_doft::rng::SplitMix64;
use serde::{Deserialize, Serialize};
use std::process::Command;
use std::time::Instant;

/// Steps that are thrown away before those that count.
const WARM: usize = 5;

/// What a process found; also its output.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Found {
    seconds: f64,
    peak_bytes: Option<u64>,
}

/// What a step of a method takes.
#[derive(Clone, Debug, Serialize)]
pub struct Cost {
    #[serde(flatten)]
    pub entry: Entry,
    /// Medians of the rounds.
    pub seconds_per_step: Option<Interval>,
    /// Over LoRA of about as many parameters, where it was measured: ratios of the rounds.
    pub over_lora: Option<Interval>,
    pub peak_bytes: Option<u64>,
}

/// The part of a child: some steps on a network that was never trained, which takes as long.
pub fn probe(task: &DigitsTask, entry: Entry, steps: usize) -> Result<()> {
    let widths = task.widths();
    let base = Net::new(widths, 0, &task.device)?.0.frozen();
    let mut rng = SplitMix64::new(1);
    let pixels: Vec<f32> = (0..BATCH * widths[0])
        .map(|_| rng.uniform() as f32)
        .collect();
    let labels: Vec<u32> = (0..BATCH).map(|_| rng.below(widths[3]) as u32).collect();
    let images = Tensor::from_vec(pixels, (BATCH, widths[0]), &task.device)?;
    let labels = Tensor::from_vec(labels, BATCH, &task.device)?;
    let mut adapted = Adapted::new(&base, &Job::new(entry, 1e-4, 0))?;
    let mut seconds = Vec::new();
    for _ in 0..WARM + steps {
        let start = Instant::now();
        let loss = adapted.step(&images, &labels, 1e-4)?;
        ensure!(loss.is_some(), "a step that is timed diverged");
        seconds.push(start.elapsed().as_secs_f64());
    }
    let found = Found {
        seconds: median(&seconds[WARM..]),
        peak_bytes: memory::peak_bytes(),
    };
    say(format_args!("{}", serde_json::to_string(&found)?));
    Ok(())
}

/// Measures every method, one process at a time, in `rounds` rounds.
pub fn measure(
    task: &DigitsTask,
    entries: &[Entry],
    rounds: usize,
    steps: usize,
) -> Result<Vec<Cost>> {
    let (task, place) = (task.name(), task.place.to_string());
    let program = std::env::current_exe().context("where this program lies")?;
    let mut found: Vec<Vec<Found>> = vec![Vec::new(); entries.len()];
    let bar = progress::bar(rounds * entries.len(), "time, memory");
    for _ in 0..rounds {
        for (entry, found) in entries.iter().zip(&mut found) {
            let probe = serde_json::to_string(&(task, entry, steps))?;
            let output = Command::new(&program)
                .args(["--probe", &probe, "--device", &place])
                .output();
            let output = output.context("cannot start a process to measure")?;
            ensure!(
                output.status.success(),
                "measuring {}: {}",
                entry.label(),
                String::from_utf8_lossy(&output.stderr).trim()
            );
            found.push(serde_json::from_slice(&output.stdout)?);
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    let seconds = |place: usize| found[place].iter().map(|f| f.seconds);
    let cost = |place: usize| {
        let lora = entries
            .iter()
            .position(|e| Some(*e) == peer(entries[place]));
        let ratios = lora.map(|lora| seconds(place).zip(seconds(lora)).map(|(a, b)| a / b));
        Cost {
            entry: entries[place],
            seconds_per_step: interval(&seconds(place).collect::<Vec<_>>()),
            over_lora: ratios.and_then(|ratios| interval(&ratios.collect::<Vec<_>>())),
            peak_bytes: peak(&found[place]),
        }
    };
    Ok((0..entries.len()).map(cost).collect())
}

fn peak(found: &[Found]) -> Option<u64> {
    let bytes: Option<Vec<f64>> = found.iter().map(|f| Some(f.peak_bytes? as f64)).collect();
    Some(mean(&bytes?) as u64)
}

/// LoRA at about as many parameters.
fn peer(entry: Entry) -> Option<Entry> {
    let size = match (entry.method, entry.size) {
        (Name::Dora, size) => size,
        (Name::Oft, 32) => 8,
        (Name::Oft, 8) => 2,
        (name, 32) if name.is_doft() => 8,
        (name, 8) if name.is_doft() => 2,
        (Name::Full, _) => 8,
        _ => return None,
    };
    Some(Entry {
        method: Name::Lora,
        size,
    })
}
