//! What the runs say: one block of numbers for each task, as JSON and as a table.

use crate::cost::Cost;
use crate::method::{Entry, Name, entry};
use crate::record::Run;
use crate::studies::{BlockSize, FirstStep, MagnitudeRate, Orthogonality};
use crate::support::stats::{Interval, geometric, interval, mean, median};
use crate::sweep::{Bench, Swept};
use serde::Serialize;

/// Everything that is said about one task.
#[derive(Clone, Debug, Serialize)]
pub struct TaskSummary {
    pub task: String,
    /// Accuracy, or perplexity for text.
    pub measure: &'static str,
    pub target: f64,
    pub margin: f64,
    pub sweep_seeds: u64,
    pub final_seeds: u64,
    /// Before the first step.
    pub frozen_test: Option<Interval>,
    pub frozen_original_task: Option<Interval>,
    pub methods: Vec<MethodSummary>,
    pub pairs: Vec<Pair>,
    pub costs: Vec<Cost>,
    pub block_sizes: Vec<BlockSize>,
    pub first_steps: Vec<FirstStep>,
    pub magnitude_rates: Vec<MagnitudeRate>,
    pub orthogonality: Vec<Orthogonality>,
}

/// One method at its best rate.
#[derive(Clone, Debug, Serialize)]
pub struct MethodSummary {
    #[serde(flatten)]
    pub entry: Entry,
    pub trainable_parameters: usize,
    pub best_lr: f64,
    /// The best rate is the lowest or highest that was tried.
    pub best_lr_at_edge: bool,
    pub validation: Option<Interval>,
    pub test: Option<Interval>,
    pub test_standard_deviation: f64,
    pub original_task: Option<Interval>,
    pub weight_change: Option<Interval>,
    /// Over the seeds that reached the target.
    pub steps_to_target: Option<Interval>,
    pub examples_to_target: Option<Interval>,
    pub reached_target: f64,
    /// At the rate that reaches the target first on the validation split.
    pub fastest_lr: Option<f64>,
    pub fastest_steps_to_target: Option<Interval>,
    /// Decades of rates within the margin of the best on the validation split, over the sweep's seeds.
    pub lr_width_decades: Option<Interval>,
    /// Of the runs at the rates that all methods share.
    pub diverged: f64,
    pub diverged_of: usize,
    pub rates: Vec<RateSummary>,
    /// Quality on the test split after so many steps.
    pub curve: Vec<(usize, Interval)>,
}

#[derive(Clone, Debug, Serialize)]
pub struct RateSummary {
    pub lr: f64,
    pub validation: f64,
    pub test: Option<Interval>,
    pub diverged: usize,
    pub runs: usize,
}

/// Two methods, paired by seed.
#[derive(Clone, Debug, Serialize)]
pub struct Pair {
    pub what: String,
    pub first: Entry,
    pub second: Entry,
    /// First less second on the test split, each at its best rate.
    pub test_difference: Option<Interval>,
    /// First over second, over the seeds where both reached the target.
    pub steps_ratio: Option<Interval>,
    /// The same, each at its fastest rate.
    pub fastest_steps_ratio: Option<Interval>,
    /// First less second, over the sweep's seeds.
    pub lr_width_difference: Option<Interval>,
}

/// The pairs that are looked at, of about as many parameters each.
const PAIRS: [(Entry, Entry); 9] = [
    (entry(Name::Doft, 32), entry(Name::Lora, 8)),
    (entry(Name::Doft, 32), entry(Name::Dora, 8)),
    (entry(Name::Doft, 32), entry(Name::Oft, 32)),
    (entry(Name::Doft, 32), entry(Name::DoftUnscaled, 32)),
    (entry(Name::Doft, 32), entry(Name::DoftSeries, 32)),
    (entry(Name::Doft, 32), entry(Name::DoftCapped, 32)),
    (entry(Name::Doft, 8), entry(Name::Lora, 2)),
    (entry(Name::Doft, 8), entry(Name::Dora, 2)),
    (entry(Name::Doft, 8), entry(Name::Oft, 8)),
];

/// The methods and their pairs; the studies are added by the caller.
pub fn summarise(bench: &Bench, measure: &'static str, swept: &[Swept]) -> TaskSummary {
    let finals = swept
        .iter()
        .flat_map(|s| s.finals.first().map(|_| &s.finals));
    let frozen: Vec<_> = finals.take(1).flatten().map(|run| run.frozen).collect();
    let of =
        |f: fn(&crate::record::Quality) -> f64| interval(&frozen.iter().map(f).collect::<Vec<_>>());
    TaskSummary {
        task: bench.task.name().into(),
        measure,
        target: bench.task.target(),
        margin: bench.task.margin(),
        sweep_seeds: bench.plan.seeds,
        final_seeds: bench.plan.final_seeds,
        frozen_test: of(|frozen| frozen.test),
        frozen_original_task: of(|frozen| frozen.original_task),
        methods: swept.iter().map(|s| of_method(bench, s)).collect(),
        pairs: PAIRS
            .iter()
            .filter_map(|(a, b)| pair(bench, swept, *a, *b))
            .collect(),
        costs: Vec::new(),
        block_sizes: Vec::new(),
        first_steps: Vec::new(),
        magnitude_rates: Vec::new(),
        orthogonality: Vec::new(),
    }
}

fn over(runs: &[Run], f: impl Fn(&Run) -> f64) -> Option<Interval> {
    interval(&runs.iter().map(f).collect::<Vec<_>>())
}

fn of_method(bench: &Bench, swept: &Swept) -> MethodSummary {
    let finals = &swept.finals;
    let test = over(finals, |run| run.quality.test);
    let steps: Vec<f64> = finals.iter().filter_map(steps_of).collect();
    let examples: Vec<f64> = steps
        .iter()
        .map(|s| s * bench.task.batch() as f64)
        .collect();
    let fastest = fastest(swept);
    let shared = |rate: f64| bench.plan.rates.contains(&rate);
    let shared = swept.tried.iter().filter(|(rate, _)| shared(*rate));
    let shared: Vec<&Run> = shared.flat_map(|(_, runs)| runs).collect();
    let diverged = shared.iter().filter(|run| run.diverged).count();
    let changes: Option<Vec<f64>> = finals.iter().map(|run| run.weight_change).collect();
    MethodSummary {
        entry: swept.entry,
        trainable_parameters: finals.first().map_or(0, |run| run.trainable_parameters),
        best_lr: swept.best_rate(),
        best_lr_at_edge: swept.at_edge(),
        validation: over(finals, |run| run.quality.validation),
        test_standard_deviation: deviation(finals),
        test,
        original_task: over(finals, |run| run.quality.original_task),
        weight_change: changes.and_then(|changes| interval(&changes)),
        steps_to_target: interval(&steps),
        examples_to_target: interval(&examples),
        reached_target: steps.len() as f64 / finals.len().max(1) as f64,
        fastest_lr: fastest.map(|place| swept.tried[place].0),
        fastest_steps_to_target: fastest.and_then(|place| {
            let steps: Option<Vec<f64>> = swept.tried[place].1.iter().map(steps_of).collect();
            interval(&steps?)
        }),
        lr_width_decades: interval(&widths(bench, swept)),
        diverged: diverged as f64 / shared.len().max(1) as f64,
        diverged_of: shared.len(),
        rates: swept
            .tried
            .iter()
            .map(|tried| of_rate(bench, tried))
            .collect(),
        curve: curve(finals),
    }
}

fn of_rate(bench: &Bench, (lr, runs): &(f64, Vec<Run>)) -> RateSummary {
    RateSummary {
        lr: *lr,
        validation: bench.validation(runs),
        test: over(runs, |run| run.quality.test),
        diverged: runs.iter().filter(|run| run.diverged).count(),
        runs: runs.len(),
    }
}

/// The steps that every run got to.
fn curve(runs: &[Run]) -> Vec<(usize, Interval)> {
    let Some(first) = runs.first() else {
        return Vec::new();
    };
    let at = |place: usize| {
        let of = |run: &Run| run.curve.get(place).map(|point| point.2);
        interval(&runs.iter().map(of).collect::<Option<Vec<_>>>()?)
    };
    let points = first.curve.iter().enumerate();
    let points = points.filter_map(|(place, point)| Some((point.0, at(place)?)));
    points.collect()
}

fn deviation(runs: &[Run]) -> f64 {
    let tests: Vec<f64> = runs.iter().map(|run| run.quality.test).collect();
    let mean = mean(&tests);
    let square: f64 = tests.iter().map(|t| (t - mean).powi(2)).sum();
    (square / (tests.len().max(2) - 1) as f64).sqrt()
}

fn steps_of(run: &Run) -> Option<f64> {
    run.steps_to_target.map(|steps| steps as f64)
}

/// The place of the rate at which all seeds reach the target first, by the median on validation.
fn fastest(swept: &Swept) -> Option<usize> {
    let of = |runs: &[Run]| -> Option<f64> {
        let steps = runs.iter().map(|run| {
            run.steps_to_target?;
            Some(run.validation_steps_to_target? as f64)
        });
        Some(median(&steps.collect::<Option<Vec<_>>>()?))
    };
    let medians = swept.tried.iter().enumerate();
    let medians = medians.filter_map(|(place, (_, runs))| Some((place, of(runs)?)));
    let best = medians.min_by(|a, b| a.1.total_cmp(&b.1))?;
    Some(best.0)
}

/// For each seed the decades of neighbouring rates that are within the margin of its best.
fn widths(bench: &Bench, swept: &Swept) -> Vec<f64> {
    let of = |seed: usize| {
        let scores: Vec<f64> = swept
            .tried
            .iter()
            .map(|(_, runs)| bench.task.score(runs[seed].quality.validation))
            .collect();
        let best = crate::sweep::first_largest(&scores);
        let good = |place: &usize| scores[*place] >= scores[best] - bench.task.margin();
        let low = (0..=best).rev().take_while(good).last().unwrap_or(best);
        let high = (best..scores.len()).take_while(good).last().unwrap_or(best);
        (swept.tried[high].0 / swept.tried[low].0).log10()
    };
    (0..bench.plan.seeds as usize).map(of).collect()
}

fn pair(bench: &Bench, swept: &[Swept], first: Entry, second: Entry) -> Option<Pair> {
    let find = |entry: Entry| swept.iter().find(|s| s.entry == entry);
    let (a, b) = (find(first)?, find(second)?);
    let both = a.finals.iter().zip(&b.finals);
    let differences: Vec<f64> = both
        .clone()
        .map(|(a, b)| a.quality.test - b.quality.test)
        .collect();
    let ratio = |a: &[Run], b: &[Run]| {
        let both = a.iter().zip(b);
        let ratios = both.filter_map(|(a, b)| Some(steps_of(a)? / steps_of(b)?));
        geometric(&ratios.collect::<Vec<_>>())
    };
    let at_fastest = fastest(a).zip(fastest(b));
    let widths = widths(bench, a).into_iter().zip(widths(bench, b));
    Some(Pair {
        what: format!("{} - {}", first.label(), second.label()),
        first,
        second,
        test_difference: interval(&differences),
        steps_ratio: ratio(&a.finals, &b.finals),
        fastest_steps_ratio: at_fastest.and_then(|(i, j)| ratio(&a.tried[i].1, &b.tried[j].1)),
        lr_width_difference: interval(&widths.map(|(a, b)| a - b).collect::<Vec<_>>()),
    })
}
