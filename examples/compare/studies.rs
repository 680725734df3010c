//! Step normalisation and orthogonality, looked at one by one.

use crate::method::{Entry, Name, entry};
use crate::record::{Job, Look, Run};
use crate::run::Adapted;
use crate::support::digits::Batches;
use crate::support::network::BATCH;
use crate::support::stats::{Interval, geometric, interval};
use crate::sweep::{Bench, Swept, first_largest};
use crate::task::DigitsTask;
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use serde::Serialize;

/// One block size, with or without step normalisation, over all rates.
#[derive(Clone, Debug, Serialize)]
pub struct BlockSize {
    #[serde(flatten)]
    pub entry: Entry,
    pub trainable_parameters: usize,
    /// The rate with the best mean on the validation split.
    pub best_lr: f64,
    /// The geometric mean of each seed's best rate.
    pub best_lr_of_seeds: Option<Interval>,
    /// Test accuracy at the best rate.
    pub test: Option<Interval>,
    /// What is lost at the rate that is best for `reference`: paired differences of test accuracy.
    pub lost_at_shared_lr: Option<Interval>,
    pub reference: usize,
}

/// The block sizes that are tried.
pub fn block_sizes(quick: bool) -> Vec<usize> {
    match quick {
        true => vec![8, 32],
        false => vec![4, 8, 16, 32, 64, 128],
    }
}

/// The block size whose best rate the others are tried at.
const REFERENCE: usize = 32;

pub fn by_block_size(bench: &Bench, quick: bool) -> Result<Vec<BlockSize>> {
    let mut entries = Vec::new();
    for method in [Name::Doft, Name::DoftUnscaled] {
        entries.extend(
            block_sizes(quick)
                .into_iter()
                .map(|size| entry(method, size)),
        );
    }
    let swept = bench.sweep_only("block sizes", &entries)?;
    let shared = |method: Name| {
        let reference = swept.iter().find(|s| s.entry == entry(method, REFERENCE));
        reference.map_or(0., Swept::best_rate)
    };
    let of = |s: &Swept| {
        let at_best = &s.tried[s.best].1;
        let shared = shared(s.entry.method);
        let at_shared = s.tried.iter().find(|(rate, _)| *rate == shared);
        let lost = at_shared.map(|(_, runs)| {
            let pairs = at_best.iter().zip(runs);
            pairs.map(|(best, shared)| best.quality.test - shared.quality.test)
        });
        BlockSize {
            entry: s.entry,
            trainable_parameters: at_best.first().map_or(0, |run| run.trainable_parameters),
            best_lr: s.best_rate(),
            best_lr_of_seeds: geometric(&best_of_seeds(bench, s)),
            test: interval(&tests(at_best)),
            lost_at_shared_lr: lost.and_then(|lost| interval(&lost.collect::<Vec<_>>())),
            reference: REFERENCE,
        }
    };
    Ok(swept.iter().map(of).collect())
}

fn tests(runs: &[Run]) -> Vec<f64> {
    runs.iter().map(|run| run.quality.test).collect()
}

fn best_of_seeds(bench: &Bench, swept: &Swept) -> Vec<f64> {
    let best = |seed: usize| {
        let scores = swept
            .tried
            .iter()
            .map(|(_, runs)| runs[seed].quality.validation);
        swept.tried[first_largest(&scores.collect::<Vec<_>>())].0
    };
    (0..bench.plan.seeds as usize).map(best).collect()
}

/// How far the first step of Adam goes, in units of the rate.
#[derive(Clone, Debug, Serialize)]
pub struct FirstStep {
    #[serde(flatten)]
    pub entry: Entry,
    /// The mean norm of a row of `R - I`, over the rate.
    pub rotation: Option<Interval>,
    /// The mean of `|m / n0 - 1|`, over the rate.
    pub magnitude: Option<Interval>,
}

/// A rate at which a step is small beside the identity.
const SMALL: f64 = 1e-3;

pub fn first_steps(bench: &Bench, task: &DigitsTask, quick: bool) -> Result<Vec<FirstStep>> {
    let mut all = Vec::new();
    for method in [Name::Doft, Name::DoftUnscaled] {
        for size in block_sizes(quick) {
            let entry = entry(method, size);
            let (mut rotations, mut magnitudes) = (Vec::new(), Vec::new());
            for seed in 0..bench.plan.seeds {
                let (rotation, magnitude) = first_step(task, &Job::new(entry, SMALL, seed))?;
                rotations.push(rotation / SMALL);
                magnitudes.push(magnitude / SMALL);
            }
            all.push(FirstStep {
                entry,
                rotation: interval(&rotations),
                magnitude: interval(&magnitudes),
            });
        }
    }
    Ok(all)
}

/// The mean turn of a unit row and the mean relative change of a magnitude after one step.
fn first_step(task: &DigitsTask, job: &Job) -> Result<(f64, f64)> {
    let prepared = task.prepared(job.seed)?;
    let mut adapted = Adapted::new(&prepared.base, job)?;
    let mut batches = Batches::new(&prepared.train, BATCH, job.seed.wrapping_add(1));
    let (images, labels) = batches.next_batch()?;
    adapted.step(&images, &labels, job.lr)?;
    let (mut turns, mut changes) = (Vec::new(), Vec::new());
    for ((_, base), (_, layer)) in prepared.base.layers().zip(adapted.net.layers()) {
        let crate::support::methods::Tuned::Adapted(layer) = layer else {
            continue;
        };
        let r = layer
            .rotation()?
            .to_device(&Device::Cpu)?
            .to_dtype(DType::F64)?;
        let identity = Tensor::eye(r.dim(1)?, DType::F64, &Device::Cpu)?;
        let turned = r.broadcast_sub(&identity)?.sqr()?.sum(2)?.sqrt()?;
        turns.extend(turned.flatten_all()?.to_vec1::<f64>()?);
        let n0 = candle_doft::params::row_norms(base.weight())?;
        let change = (layer.magnitude()?.div(&n0)? - 1.)?.abs()?;
        changes.extend(
            change
                .to_device(&Device::Cpu)?
                .to_dtype(DType::F64)?
                .to_vec1::<f64>()?,
        );
    }
    Ok((
        crate::support::stats::mean(&turns),
        crate::support::stats::mean(&changes),
    ))
}

/// Accuracy with another rate for the magnitudes than for the rotations.
#[derive(Clone, Debug, Serialize)]
pub struct MagnitudeRate {
    /// The rotations' rate.
    pub lr: f64,
    /// The magnitudes' rate over it.
    pub factor: f64,
    pub validation: f64,
    pub test: Option<Interval>,
    /// Beside one rate for both, DOFT's best: paired differences on the test split.
    pub beside_one_rate: Option<Interval>,
    /// Beside plain OFT at its best rate.
    pub beside_oft: Option<Interval>,
    pub steps_to_target: Option<Interval>,
}

/// Factors at the best rate of DOFT and at that of OFT.
pub fn magnitude_rates(
    bench: &Bench,
    doft: &Swept,
    oft: Option<&Swept>,
    quick: bool,
) -> Result<Vec<MagnitudeRate>> {
    let factors: &[f64] = match quick {
        true => &[0.1, 1.],
        false => &[0.03, 0.1, 0.3, 1., 3., 10.],
    };
    let mut rates = vec![doft.best_rate()];
    rates.extend(oft.map(Swept::best_rate));
    rates.dedup();
    let mut settings = Vec::new();
    for lr in rates {
        settings.extend(factors.iter().map(|factor| (lr, *factor)));
    }
    let jobs = |(lr, factor): (f64, f64)| {
        (0..bench.plan.final_seeds).map(move |seed| Job {
            magnitude_rate: factor,
            ..Job::new(entry(Name::Doft, REFERENCE), lr, seed)
        })
    };
    let all: Vec<Job> = settings.iter().copied().flat_map(jobs).collect();
    let runs = bench.runs("magnitude rates", &all)?;
    let of = |(lr, factor): (f64, f64), runs: &[Run]| {
        let beside = |other: &Swept| {
            let pairs = runs.iter().zip(&other.finals);
            let differences = pairs.map(|(a, b)| a.quality.test - b.quality.test);
            interval(&differences.collect::<Vec<_>>())
        };
        let steps: Option<Vec<f64>> = runs
            .iter()
            .map(|run| run.steps_to_target.map(|steps| steps as f64))
            .collect();
        MagnitudeRate {
            lr,
            factor,
            validation: bench.validation(runs),
            test: interval(&tests(runs)),
            beside_one_rate: beside(doft),
            beside_oft: oft.and_then(beside),
            steps_to_target: steps.and_then(|steps| interval(&steps)),
        }
    };
    let seeds = bench.plan.final_seeds as usize;
    let each = settings.into_iter().zip(runs.chunks(seeds));
    Ok(each.map(|(setting, runs)| of(setting, runs)).collect())
}

/// How far a map is from orthogonal along training.
#[derive(Clone, Debug, Serialize)]
pub struct Orthogonality {
    #[serde(flatten)]
    pub entry: Entry,
    pub lr: f64,
    pub diverged: usize,
    pub test: Option<Interval>,
    /// Beside the exact map at the same rate: paired differences of test accuracy.
    pub beside_exact: Option<Interval>,
    /// The largest over the seeds, along the steps.
    pub trace: Vec<Look>,
}

/// The exact map, the series and the capped series at DOFT's best rate and at four times it.
pub fn orthogonality(bench: &Bench, lr: f64) -> Result<Vec<Orthogonality>> {
    let maps = [Name::Doft, Name::DoftSeries, Name::DoftCapped].map(|name| entry(name, REFERENCE));
    let mut all = Vec::new();
    for lr in [lr, 4. * lr] {
        let jobs = maps.iter().flat_map(|map| {
            (0..bench.plan.seeds).map(|seed| Job {
                traced: true,
                ..Job::new(*map, lr, seed)
            })
        });
        let runs = bench.runs("orthogonality", &jobs.collect::<Vec<_>>())?;
        let of = |map: Entry| -> Vec<Run> {
            let mine = |run: &&Run| run.job.entry == map;
            runs.iter().filter(mine).cloned().collect()
        };
        let exact = tests(&of(maps[0]));
        for map in maps {
            let runs = of(map);
            let test = tests(&runs);
            let differences: Vec<f64> = test.iter().zip(&exact).map(|(a, b)| a - b).collect();
            all.push(Orthogonality {
                entry: map,
                lr,
                diverged: runs.iter().filter(|run| run.diverged).count(),
                test: interval(&test),
                beside_exact: interval(&differences),
                trace: largest(&runs),
            });
        }
    }
    Ok(all)
}

/// At each step the largest value over the runs that got there.
fn largest(runs: &[Run]) -> Vec<Look> {
    let mut all: Vec<Look> = Vec::new();
    for look in runs.iter().flat_map(|run| &run.trace) {
        match all.iter_mut().find(|known| known.step == look.step) {
            None => all.push(*look),
            Some(known) => {
                known.orthogonality_error = known.orthogonality_error.max(look.orthogonality_error);
                known.norm_drift_mean = known.norm_drift_mean.max(look.norm_drift_mean);
                known.norm_drift_max = known.norm_drift_max.max(look.norm_drift_max);
            }
        }
    }
    all.sort_by_key(|look| look.step);
    all
}
