//! Ratios between methods, the two sides of each interleaved, so that a drift of the machine meets
//! both. Writes `target/ratios.json`.
//!
//!     cargo bench --bench ratios [-- --quick] [WHAT]
//!
//! With `WHAT`, such as `linear_step` or `memory`, only that is measured anew, and the rest of the file
//! stays.

mod comparisons;
mod memory;
#[path = "../steps/mod.rs"]
mod steps;
#[path = "../../examples/support/mod.rs"]
mod support;

use comparisons::{Comparison, Sides};
use serde_json::{Value, json};
use steps::interleave::{Budget, rounds};
use support::context::context;
use support::pages;
use support::stats::{VALUES, median, median_interval};

#[global_allocator]
static ALLOCATOR: memory::Counting = memory::ALLOCATOR;

const FILE: &str = "target/ratios.json";

/// Of one pair at one shape.
const FULL: Budget = Budget {
    seconds: 6.,
    rounds: VALUES,
};
const QUICK: Budget = Budget {
    seconds: 1.,
    rounds: 2,
};

fn main() -> anyhow::Result<()> {
    // Cargo hands `--bench` to every bench.
    let mut arguments = std::env::args().skip(1).filter(|arg| arg != "--bench");
    let (mut quick, mut only) = (false, None);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--quick" => quick = true,
            memory::FLAG => {
                let found = memory::probe(&arguments.collect::<Vec<_>>())?;
                println!("{}", serde_json::to_string(&found)?);
                return Ok(());
            }
            what => only = Some(what.to_string()),
        }
    }
    pages::keep(pages::FOR_GOOD);
    let wanted = |what: &str| only.as_deref().is_none_or(|only| what == only);
    let context = context(quick);
    let mut entries = Vec::new();
    let mut tell = |mut entry: Value| {
        print(&entry);
        entry["context"] = json!(context);
        entries.push(entry);
    };
    if wanted(memory::WHAT) {
        memory::compare(quick)?.into_iter().for_each(&mut tell);
    }
    let budget = if quick { QUICK } else { FULL };
    for comparison in comparisons::all(quick) {
        if wanted(comparison.what) {
            tell(time(&comparison, budget)?);
        }
    }
    if let Some(only) = only {
        anyhow::ensure!(!entries.is_empty(), "nothing is called `{only}`");
        entries.extend(others(&only)?);
    }
    std::fs::create_dir_all("target")?;
    std::fs::write(FILE, serde_json::to_string_pretty(&entries)?)?;
    Ok(())
}

fn time(comparison: &Comparison, budget: Budget) -> anyhow::Result<Value> {
    let Sides {
        numerator,
        denominator,
        surplus,
    } = (comparison.make)()?;
    let sides: Vec<_> = [numerator, denominator]
        .into_iter()
        .chain(surplus)
        .collect();
    let rounds = rounds(&sides, budget)?;
    let surplus = |round: &Vec<f64>| round[2..].iter().sum::<f64>();
    let above = |round: &Vec<f64>| round[0] - surplus(round);
    let each = |of: &dyn Fn(&Vec<f64>) -> f64| rounds.iter().map(of).collect::<Vec<_>>();
    let ratio = median_interval(&each(&|round| above(round) / round[1]));
    let mut entry = json!({
        "what": comparison.what,
        "shape": comparison.shape,
        "numerator": comparison.numerator,
        "denominator": comparison.denominator,
        "median": ratio.median,
        "low": ratio.low,
        "high": ratio.high,
        "rounds": rounds.len(),
        "numerator_seconds": median(&each(&above)),
        "denominator_seconds": median(&each(&|round| round[1])),
    });
    if sides.len() > 2 {
        entry["surplus_seconds"] = median(&each(&surplus)).into();
    }
    Ok(entry)
}

fn print(entry: &Value) {
    let text = |key: &str| entry[key].as_str().unwrap_or_default().to_string();
    let number = |key: &str| entry[key].as_f64().unwrap_or(f64::NAN);
    println!(
        "{:>14} {:>21}  {:>13} / {:<11} {:.3}  [{:.3}, {:.3}]",
        text("what"),
        text("shape"),
        text("numerator"),
        text("denominator"),
        number("median"),
        number("low"),
        number("high"),
    );
}

/// The entries of an earlier run that are of something else.
fn others(only: &str) -> anyhow::Result<Vec<Value>> {
    let Ok(text) = std::fs::read_to_string(FILE) else {
        return Ok(Vec::new());
    };
    let mut entries: Vec<Value> = serde_json::from_str(&text)?;
    entries.retain(|entry| entry["what"] != only);
    Ok(entries)
}
