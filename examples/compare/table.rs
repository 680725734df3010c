//! The numbers of `compare.json` as tables, in Markdown.

use crate::summary::TaskSummary;
use crate::support::markdown;
use crate::support::stats::Interval;

/// A mean and its interval with so many digits, scaled.
fn number(interval: &Option<Interval>, scale: f64, digits: usize) -> String {
    match interval {
        None => "-".into(),
        Some(i) => format!(
            "{:.digits$} [{:.digits$}, {:.digits$}]",
            scale * i.mean,
            scale * i.low,
            scale * i.high
        ),
    }
}

/// A table; nothing where nothing was found.
fn rows<T>(head: &[&str], found: &[T], row: impl Fn(&T) -> Vec<String>) -> String {
    match found {
        [] => String::new(),
        found => markdown::table(head, found.iter().map(row)),
    }
}

pub fn table(summary: &TaskSummary) -> String {
    let (scale, unit, digits) = match summary.measure {
        "accuracy" => (100., ", %", 1),
        _ => (1., "", 2),
    };
    let mut text = format!(
        "## {}: test {}, frozen {}\n\n",
        summary.task,
        summary.measure,
        number(&summary.frozen_test, scale, digits)
    );
    text += &methods(summary, scale, unit, digits);
    text += &pairs(summary, scale, unit, digits);
    text += &costs(summary);
    text += &studies(summary, scale, digits);
    text
}

fn methods(summary: &TaskSummary, scale: f64, unit: &str, digits: usize) -> String {
    let test = format!("test{unit}");
    let original = format!("original task{unit}");
    let head = [
        "method",
        "parameters",
        "best rate",
        &test,
        "steps to target",
        "reached",
        "fewest steps (rate)",
        "decades of rates",
        "diverged",
        &original,
        "weight change",
    ];
    rows(&head, &summary.methods, |m| {
        let edge = if m.best_lr_at_edge { " (edge)" } else { "" };
        let fastest = m.fastest_lr.map_or(String::new(), |lr| format!(" ({lr})"));
        vec![
            m.entry.label(),
            m.trainable_parameters.to_string(),
            format!("{}{edge}", m.best_lr),
            number(&m.test, scale, digits),
            number(&m.steps_to_target, 1., 0),
            format!("{:.0} %", 100. * m.reached_target),
            number(&m.fastest_steps_to_target, 1., 0) + &fastest,
            number(&m.lr_width_decades, 1., 2),
            format!("{:.0} % of {}", 100. * m.diverged, m.diverged_of),
            number(&m.original_task, scale, digits),
            number(&m.weight_change, 1., 2),
        ]
    })
}

fn pairs(summary: &TaskSummary, scale: f64, unit: &str, digits: usize) -> String {
    let difference = format!("test difference{unit}");
    let head = [
        "pair",
        &difference,
        "steps ratio",
        "steps ratio at the fastest rates",
        "decades of rates, difference",
    ];
    rows(&head, &summary.pairs, |p| {
        vec![
            p.what.clone(),
            number(&p.test_difference, scale, digits),
            number(&p.steps_ratio, 1., 2),
            number(&p.fastest_steps_ratio, 1., 2),
            number(&p.lr_width_difference, 1., 2),
        ]
    })
}

fn costs(summary: &TaskSummary) -> String {
    let head = ["method", "ms per step", "over LoRA", "peak MB"];
    rows(&head, &summary.costs, |c| {
        let peak = c
            .peak_bytes
            .map_or("-".into(), |b| format!("{:.1}", b as f64 / 1e6));
        vec![
            c.entry.label(),
            number(&c.seconds_per_step, 1e3, 2),
            number(&c.over_lora, 1., 2),
            peak,
        ]
    })
}

fn studies(summary: &TaskSummary, scale: f64, digits: usize) -> String {
    let score = |interval: &_| number(interval, scale, digits);
    let block_sizes = rows(
        &[
            "block size",
            "parameters",
            "best rate",
            "best rate of seeds",
            "test",
            "lost at the rate of 32",
        ],
        &summary.block_sizes,
        |b| {
            vec![
                b.entry.label(),
                b.trainable_parameters.to_string(),
                b.best_lr.to_string(),
                number(&b.best_lr_of_seeds, 1., 4),
                score(&b.test),
                score(&b.lost_at_shared_lr),
            ]
        },
    );
    let first_steps = rows(
        &["first step over the rate", "rotation of a row", "magnitude"],
        &summary.first_steps,
        |f| {
            vec![
                f.entry.label(),
                number(&f.rotation, 1., 3),
                number(&f.magnitude, 1., 3),
            ]
        },
    );
    let magnitude_rates = rows(
        &[
            "rate of rotations",
            "rate of magnitudes over it",
            "test",
            "beside one rate",
            "beside OFT",
            "steps to target",
        ],
        &summary.magnitude_rates,
        |m| {
            vec![
                m.lr.to_string(),
                m.factor.to_string(),
                score(&m.test),
                score(&m.beside_one_rate),
                score(&m.beside_oft),
                number(&m.steps_to_target, 1., 0),
            ]
        },
    );
    let maps = orthogonality(summary, scale, digits);
    block_sizes + &first_steps + &magnitude_rates + &maps
}

fn orthogonality(summary: &TaskSummary, scale: f64, digits: usize) -> String {
    let head = [
        "map",
        "rate",
        "test",
        "beside exact",
        "diverged",
        "max abs(R R^T - I)",
        "norm drift, mean",
        "largest",
    ];
    rows(&head, &summary.orthogonality, |o| {
        let most = |f: fn(&crate::record::Look) -> f64| {
            let most = o.trace.iter().map(f).fold(0., f64::max);
            format!("{most:.1e}")
        };
        vec![
            o.entry.label(),
            o.lr.to_string(),
            number(&o.test, scale, digits),
            number(&o.beside_exact, scale, digits),
            o.diverged.to_string(),
            most(|look| look.orthogonality_error),
            most(|look| look.norm_drift_mean),
            most(|look| look.norm_drift_max),
        ]
    })
}
