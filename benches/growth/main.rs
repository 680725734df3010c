//! How the time of a step grows with tokens, width, block size and layers, beside the two bare products
//! that are its floor. Writes `target/growth.json` and draws `target/growth.svg`.
//!
//!     cargo bench --bench growth [-- --quick]

mod draw;
#[path = "../steps/mod.rs"]
mod steps;
#[path = "../../examples/support/mod.rs"]
mod support;

use candle_core::Result;
use serde::Serialize;
use std::collections::BTreeMap;
use steps::interleave::{Budget, rounds, timed};
use steps::{Shape, Timed};
use support::context::context;
use support::pages;
use support::stats::{MedianInterval, VALUES, median, median_interval};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The sides, the floor first.
const METHODS: [&str; 3] = ["gemm", "frozen", "doft"];

/// Of one point.
const FULL: Budget = Budget {
    seconds: 7.,
    rounds: VALUES,
};
const QUICK: Budget = Budget {
    seconds: 0.4,
    rounds: 2,
};

/// Multiplications of one product up to which a quick run takes a point.
const QUICK_WORK: usize = 512 * 2048 * 1024;

/// One line of the table: a size, and the step that it stands for.
struct Place {
    value: usize,
    shape: Shape,
    block_size: usize,
    layers: usize,
}

struct Sweep {
    name: &'static str,
    fixed: &'static str,
    places: Vec<Place>,
}

/// What was found at one place.
#[derive(Serialize)]
struct Point {
    value: usize,
    shape: String,
    block_size: usize,
    layers: usize,
    /// Median of each method.
    seconds: BTreeMap<&'static str, f64>,
    /// Of the rounds, `numerator/denominator`.
    ratios: BTreeMap<String, MedianInterval>,
}

#[derive(Serialize)]
struct Grown {
    name: &'static str,
    fixed: &'static str,
    points: Vec<Point>,
}

fn sweeps() -> [Sweep; 4] {
    let sweep = |name, fixed, values: &[usize], place: fn(usize) -> (Shape, usize, usize)| Sweep {
        name,
        fixed,
        places: values
            .iter()
            .map(|value| {
                let (shape, block_size, layers) = place(*value);
                Place {
                    value: *value,
                    shape,
                    block_size,
                    layers,
                }
            })
            .collect(),
    };
    [
        sweep(
            "tokens",
            "in = out = 1024, b = 32",
            &[1, 8, 32, 128, 512, 2048, 8192],
            |tokens| ((tokens, 1024, 1024), 32, 1),
        ),
        sweep(
            "in",
            "512 tokens, out = 1024, b = 32",
            &[256, 512, 1024, 2048, 4096, 8192],
            |width| ((512, width, 1024), 32, 1),
        ),
        sweep(
            "b",
            "512 tokens, in = out = 1024",
            &[8, 16, 32, 64, 128, 256],
            |b| ((512, 1024, 1024), b, 1),
        ),
        sweep(
            "layers",
            "512 tokens, in = out = 1024, b = 32",
            &[1, 2, 4, 8, 16],
            |layers| ((512, 1024, 1024), 32, layers),
        ),
    ]
}

fn main() -> anyhow::Result<()> {
    let quick = std::env::args().any(|argument| argument == "--quick");
    let budget = if quick { QUICK } else { FULL };
    pages::keep(pages::FOR_GOOD);
    let mut grown = Vec::new();
    for sweep in sweeps() {
        println!("{} ({})", sweep.name, sweep.fixed);
        let mut points = Vec::new();
        for place in &sweep.places {
            let (tokens, width, out) = place.shape;
            if quick && tokens * width * out * place.layers > QUICK_WORK {
                continue;
            }
            let point = time(place, budget)?;
            print(&point);
            points.push(point);
        }
        grown.push(Grown {
            name: sweep.name,
            fixed: sweep.fixed,
            points,
        });
    }
    std::fs::create_dir_all("target")?;
    std::fs::write("target/growth.svg", draw::picture(&grown)?)?;
    let all = serde_json::json!({ "context": context(quick), "sweeps": grown });
    std::fs::write("target/growth.json", serde_json::to_string_pretty(&all)?)?;
    Ok(())
}

fn time(place: &Place, budget: Budget) -> Result<Point> {
    let steps = steps::stacks(&METHODS, place.shape, place.block_size, place.layers)?;
    let sides: Vec<Timed> = steps
        .into_iter()
        .map(|step| timed(Box::new(move || step.run())))
        .collect();
    let rounds = rounds(&sides, budget)?;
    let column = |of: &dyn Fn(&Vec<f64>) -> f64| rounds.iter().map(of).collect::<Vec<_>>();
    let seconds = METHODS.iter().enumerate();
    let pairs = [(1, 0), (2, 0), (2, 1)];
    Ok(Point {
        value: place.value,
        shape: steps::name(place.shape),
        block_size: place.block_size,
        layers: place.layers,
        seconds: seconds
            .map(|(at, method)| (*method, median(&column(&|round| round[at]))))
            .collect(),
        ratios: pairs
            .map(|(above, below)| {
                let name = format!("{}/{}", METHODS[above], METHODS[below]);
                (
                    name,
                    median_interval(&column(&|round| round[above] / round[below])),
                )
            })
            .into(),
    })
}

fn print(point: &Point) {
    let seconds = METHODS.map(|method| format!("{method} {:9.3} ms", 1e3 * point.seconds[method]));
    let ratios = point.ratios.iter();
    let ratios: Vec<_> = ratios
        .map(|(name, r)| format!("{name} {:.3} [{:.3}, {:.3}]", r.median, r.low, r.high))
        .collect();
    println!(
        "{:>6}  {}  {}",
        point.value,
        seconds.join("  "),
        ratios.join("  ")
    );
}
