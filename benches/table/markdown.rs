//! Tables of results.

use crate::bounds::Bound;
use crate::results::{Entry, Estimate, Growth, Point};
use crate::support::context::Context;
use crate::support::markdown::table;
use crate::support::stats::MedianInterval;

/// Values in the order in which they come, each once.
fn once<T: PartialEq>(values: impl IntoIterator<Item = T>) -> Vec<T> {
    let mut found = Vec::new();
    for value in values {
        if !found.contains(&value) {
            found.push(value);
        }
    }
    found
}

fn ratio(median: f64, low: f64, high: f64) -> String {
    // What is a few hundredths at most would lose all its digits.
    match median < 0.1 {
        true => format!("{median:.4} [{low:.4}, {high:.4}]"),
        false => format!("{median:.2} [{low:.2}, {high:.2}]"),
    }
}

fn of(entry: &Entry) -> String {
    match entry.numerator_bytes.zip(entry.denominator_bytes) {
        Some((above, below)) => {
            let mega = |bytes| bytes as f64 / 1e6;
            format!(
                "{:.2} ({:.1} over {:.1} MB)",
                entry.median,
                mega(above),
                mega(below)
            )
        }
        None => ratio(entry.median, entry.low, entry.high),
    }
}

/// With a digit more than the bounds have, so that a median just above one does not look kept.
fn exact(entry: &Entry) -> String {
    let Entry {
        median, low, high, ..
    } = entry;
    match *median < 0.1 {
        true => of(entry),
        false => format!("{median:.3} [{low:.3}, {high:.3}]"),
    }
}

fn milliseconds(seconds: f64) -> String {
    match 1e3 * seconds {
        ms @ 100.0.. => format!("{ms:.0}"),
        ms @ 1.0..100. => format!("{ms:.1}"),
        ms => format!("{ms:.3}"),
    }
}

fn place(context: &Context) -> String {
    let Context {
        cpu,
        cores,
        rustc,
        candle,
        allocator,
        date,
        quick,
    } = context;
    let quick = match quick {
        true => " A quick run: rough, not to be published.",
        false => "",
    };
    format!("{cores} cores of {cpu}, Rust {rustc}, candle {candle}, {allocator}, {date}.{quick}")
}

/// Where the entries come from; which of them, where they do not all come from one place.
fn places(entries: &[Entry]) -> String {
    let contexts = once(entries.iter().map(|entry| &entry.context));
    let line = |context: &&Context| match contexts.len() {
        1 => place(context),
        _ => {
            let here = entries.iter().filter(|entry| entry.context == **context);
            let whats = once(here.map(|entry| entry.what.as_str()));
            format!("{}: {}", whats.join(", "), place(context))
        }
    };
    let lines: Vec<_> = contexts.iter().map(line).collect();
    format!(
        "Medians of interleaved pairs with 95 % intervals. {}\n\n",
        lines.join("\n")
    )
}

/// What is asked for beside what was found.
pub fn bounds(bounds: &[Bound], entries: &[Entry]) -> String {
    let row = |bound: &Bound| {
        let found = bound.checks.iter().flat_map(|check| check.of(entries));
        let found: Vec<_> = found.collect();
        let shapes = once(found.iter().map(|entry| &entry.shape)).len();
        let cell = |entry: &&Entry| match shapes {
            1 => exact(entry),
            _ => format!("{}: {}", entry.shape, exact(entry)),
        };
        let measured = found.iter().map(cell).collect::<Vec<_>>().join("; ");
        let verdict = bound.verdict(entries);
        vec![bound.what.into(), bound.at_most.into(), measured, verdict]
    };
    let head = ["what", "at most", "measured", "met"];
    places(entries) + &table(head, bounds.iter().map(row))
}

/// Every ratio: pairs against shapes where several shapes have several pairs, the rest in a list.
pub fn ratios(entries: &[Entry]) -> String {
    let mut text = String::new();
    for what in once(entries.iter().map(|entry| entry.what.as_str())) {
        let mine: Vec<_> = entries.iter().filter(|entry| entry.what == what).collect();
        let pairs_of = |shape: &str| mine.iter().filter(|entry| entry.shape == shape).count();
        let mut shapes = once(mine.iter().map(|entry| entry.shape.as_str()));
        shapes.retain(|shape| pairs_of(shape) > 1);
        if shapes.len() < 2 {
            shapes.clear();
        }
        text.push_str(&format!("`{what}`\n\n"));
        if !shapes.is_empty() {
            text.push_str(&grid(&mine, &shapes));
        }
        let rest = mine.into_iter();
        let rest: Vec<_> = rest
            .filter(|entry| !shapes.contains(&entry.shape.as_str()))
            .collect();
        if !rest.is_empty() {
            text.push_str(&list(&rest));
        }
    }
    text
}

fn grid(entries: &[&Entry], shapes: &[&str]) -> String {
    let pair = |entry: &&Entry| (entry.numerator.clone(), entry.denominator.clone());
    let row = |(above, below): &(String, String)| {
        let mut cells = vec![format!("{above} over {below}")];
        cells.extend(shapes.iter().map(|shape| {
            let mut here = entries.iter().filter(|entry| entry.shape == *shape);
            let here = here.find(|e| e.numerator == *above && e.denominator == *below);
            here.map_or(String::new(), |entry| of(entry))
        }));
        cells
    };
    let pairs = once(entries.iter().map(pair));
    let head = std::iter::once("").chain(shapes.iter().copied());
    table(head, pairs.iter().map(row))
}

fn list(entries: &[&Entry]) -> String {
    let side = |entry: &Entry| {
        let seconds = entry.numerator_seconds.zip(entry.denominator_seconds);
        seconds.map_or(String::new(), |(above, below)| {
            format!("{} and {} ms", milliseconds(above), milliseconds(below))
        })
    };
    let row = |entry: &&Entry| {
        let pair = format!("{} over {}", entry.numerator, entry.denominator);
        vec![pair, entry.shape.clone(), of(entry), side(entry)]
    };
    table(["", "shape", "ratio", "medians"], entries.iter().map(row))
}

/// Times of a step as each size grows.
pub fn growth(growth: &Growth) -> String {
    let methods = ["gemm", "frozen", "doft"];
    let pairs = ["frozen/gemm", "doft/gemm", "doft/frozen"];
    let mut text = format!("Growth of a step. {}\n\n", place(&growth.context));
    for sweep in &growth.sweeps {
        let times = methods.map(|method| format!("{method}, ms"));
        let ratios = pairs.map(|pair| pair.replace('/', " over "));
        let head = std::iter::once(sweep.name.clone())
            .chain(times)
            .chain(ratios);
        let row = |point: &Point| {
            let seconds = |method| point.seconds.get(method);
            let times = methods.map(|m| seconds(m).map_or(String::new(), |s| milliseconds(*s)));
            let interval = |pair| point.ratios.get(pair);
            let cell = |r: &MedianInterval| ratio(r.median, r.low, r.high);
            let ratios = pairs.map(|pair| interval(pair).map_or(String::new(), cell));
            let value = std::iter::once(point.value.to_string());
            value.chain(times).chain(ratios).collect::<Vec<_>>()
        };
        text.push_str(&format!("By {} ({}):\n\n", sweep.name, sweep.fixed));
        text.push_str(&table(head, sweep.points.iter().map(row)));
    }
    text
}

/// Criterion's medians: methods against sizes.
pub fn criterion(estimates: &[Estimate], here: &Context) -> String {
    if estimates.is_empty() {
        return String::new();
    }
    let mut text = format!("Medians of criterion. {}\n\n", place(here));
    for group in once(estimates.iter().map(|e| e.group.as_str())) {
        let mine: Vec<_> = estimates.iter().filter(|e| e.group == group).collect();
        let values = once(mine.iter().map(|e| e.value.as_str()));
        let row = |method: &&str| {
            let mut cells = vec![method.to_string()];
            cells.extend(values.iter().map(|value| {
                let mut here = mine.iter().filter(|e| e.method == *method);
                let here = here.find(|e| e.value == *value);
                here.map_or(String::new(), |e| milliseconds(e.seconds))
            }));
            cells
        };
        let methods = once(mine.iter().map(|e| e.method.as_str()));
        let head = std::iter::once("").chain(values.iter().copied());
        text.push_str(&format!("`{group}`, ms:\n\n"));
        text.push_str(&table(head, methods.iter().map(row)));
    }
    text
}
