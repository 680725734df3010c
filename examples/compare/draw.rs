//! The pictures: learning curves, quality against rate, best rate against block size, norm drift.

use crate::method::{Entry, MAIN, Name, entry};
use crate::summary::TaskSummary;
use crate::support::plot::{self, Axis, BLUE, GREEN, GREY, Line, ORANGE, Panel, Point, RED};
use crate::support::stats::Interval;
use anyhow::Result;
use plotters::style::RGBColor;

/// Every picture by its name.
pub fn pictures(summaries: &[TaskSummary]) -> Result<Vec<(&'static str, String)>> {
    let with = |has: fn(&TaskSummary) -> bool| summaries.iter().filter(move |s| has(s));
    let groups: [(&str, Vec<Panel>); 4] = [
        ("curves.svg", summaries.iter().map(curves).collect()),
        ("rates.svg", summaries.iter().map(rates).collect()),
        (
            "blocks.svg",
            with(|s| !s.block_sizes.is_empty()).map(blocks).collect(),
        ),
        (
            "norms.svg",
            with(|s| !s.orthogonality.is_empty()).map(norms).collect(),
        ),
    ];
    let mut pictures = Vec::new();
    for (name, panels) in groups {
        if !panels.is_empty() {
            pictures.push((name, plot::grid(&panels, panels.len())?));
        }
    }
    Ok(pictures)
}

fn color(entry: Entry) -> RGBColor {
    match entry.method {
        Name::Lora => ORANGE,
        Name::Dora => RED,
        Name::Oft => BLUE,
        Name::Doft => GREEN,
        Name::DoftUnscaled => RGBColor(142, 68, 173),
        Name::DoftSeries => RGBColor(121, 85, 72),
        Name::DoftCapped => RGBColor(0, 151, 210),
        Name::Full => GREY,
    }
}

fn scale(summary: &TaskSummary) -> (f64, Axis) {
    match summary.measure {
        "accuracy" => (100., Axis::linear("test accuracy, %").with_range(0., 100.)),
        _ => (1., Axis::log("test perplexity", 10.)),
    }
}

fn point(x: f64, y: &Interval, scale: f64) -> Point {
    Point {
        x,
        y: scale * y.mean,
        low: scale * y.low,
        high: scale * y.high,
    }
}

fn curves(summary: &TaskSummary) -> Panel {
    let (scale, y) = scale(summary);
    let methods = summary.methods.iter().filter(|m| MAIN.contains(&m.entry));
    let line = |m: &crate::summary::MethodSummary| Line {
        name: format!("{}, rate {}", m.entry.label(), m.best_lr),
        color: color(m.entry),
        thin: false,
        points: m
            .curve
            .iter()
            .map(|(step, y)| point(*step as f64, y, scale))
            .collect(),
    };
    Panel {
        title: format!("{}: best rate of each method", summary.task),
        x: Axis::linear("steps"),
        y,
        lines: methods.map(line).collect(),
    }
}

fn rates(summary: &TaskSummary) -> Panel {
    let (scale, y) = scale(summary);
    let methods = summary.methods.iter().filter(|m| MAIN.contains(&m.entry));
    let line = |m: &crate::summary::MethodSummary| Line {
        name: m.entry.label(),
        color: color(m.entry),
        thin: false,
        points: m
            .rates
            .iter()
            .filter_map(|r| Some(point(r.lr, r.test.as_ref()?, scale)))
            .collect(),
    };
    Panel {
        title: format!("{}: every rate", summary.task),
        x: Axis::log("learning rate", 10.),
        y,
        lines: methods.map(line).collect(),
    }
}

fn blocks(summary: &TaskSummary) -> Panel {
    let line = |method: Name| {
        let mine = summary
            .block_sizes
            .iter()
            .filter(|b| b.entry.method == method);
        let points = mine.filter_map(|b| {
            let best = b.best_lr_of_seeds.as_ref()?;
            Some(point(b.entry.size as f64, best, 1.))
        });
        Line {
            name: method.label().to_string(),
            color: color(entry(method, 0)),
            thin: false,
            points: points.collect(),
        }
    };
    Panel {
        title: format!("{}: best rate of each block size", summary.task),
        x: Axis::log("block size", 2.),
        y: Axis::log("best learning rate", 2.),
        lines: vec![line(Name::Doft), line(Name::DoftUnscaled)],
    }
}

fn norms(summary: &TaskSummary) -> Panel {
    let lowest = summary.orthogonality.iter().map(|o| o.lr);
    let lowest = lowest.fold(f64::INFINITY, f64::min);
    let line = |o: &crate::studies::Orthogonality| Line {
        name: format!("{}, rate {}", o.entry.label(), o.lr),
        color: color(o.entry),
        thin: o.lr > lowest,
        points: o
            .trace
            .iter()
            .map(|look| {
                let y = look.norm_drift_mean.max(1e-9);
                (look.step as f64, y).into()
            })
            .collect(),
    };
    Panel {
        title: format!("{}: how far row norms are off", summary.task),
        x: Axis::linear("steps"),
        y: Axis::log("mean of | ||row|| / m - 1 |", 10.),
        lines: summary.orthogonality.iter().map(line).collect(),
    }
}
