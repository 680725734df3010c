//! Ratios between methods, the two sides of each interleaved, so that a drift of the machine meets
//! both. Writes `target/ratios.json`.
//!
//!     cargo bench --bench ratios [-- --quick]

mod support;

use std::time::Instant;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// What is compared with what: numerator, denominator.
const PAIRS: [(&str, &str); 9] = [
    ("frozen", "gemm"),
    ("doft", "frozen"),
    ("oft", "frozen"),
    ("doft", "oft"),
    ("lora", "frozen"),
    ("dora", "frozen"),
    ("candle_linear", "frozen"),
    ("candle_dora", "doft"),
    ("candle_oft", "doft"),
];

const SHAPES: [support::Shape; 4] = [
    (512, 1024, 1024),
    (512, 576, 1536),
    (2048, 1024, 1024),
    (128, 4096, 4096),
];

/// Seconds for one pair at one shape.
const SECONDS: f64 = 6.;
const QUICK: f64 = 1.;

/// Fewer rounds than this give no interval.
const ROUNDS: usize = 7;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // Cargo hands `--bench` to every bench.
    let quick = std::env::args().any(|arg| arg == "--quick");
    let budget = if quick { QUICK } else { SECONDS };
    let mut found = Vec::new();
    for shape in SHAPES {
        for (numerator, denominator) in PAIRS {
            let steps = support::steps(&[numerator, denominator], shape, 32)?;
            let mut ratios = Vec::new();
            let start = Instant::now();
            while ratios.len() < ROUNDS || start.elapsed().as_secs_f64() < budget {
                let time = |step: &support::Step| -> candle_core::Result<f64> {
                    let start = Instant::now();
                    step.run()?;
                    Ok(start.elapsed().as_secs_f64())
                };
                let (above, below) = (time(&steps[0])?, time(&steps[1])?);
                ratios.push(above / below);
            }
            // The first round fills caches and pools.
            ratios.remove(0);
            let (median, low, high) = interval(&mut ratios);
            let shape = support::name(shape);
            println!(
                "{shape:>15}  {numerator:>13} / {denominator:<7} {median:.3}  [{low:.3}, {high:.3}]"
            );
            found.push(serde_json::json!({
                "what": "linear_step",
                "shape": shape,
                "numerator": numerator,
                "denominator": denominator,
                "median": median,
                "low": low,
                "high": high,
            }));
        }
    }
    std::fs::create_dir_all("target")?;
    std::fs::write("target/ratios.json", serde_json::to_string_pretty(&found)?)?;
    Ok(())
}

/// The median and the order statistics that hold it with 95 % (a sign test turned round).
fn interval(values: &mut [f64]) -> (f64, f64, f64) {
    values.sort_by(f64::total_cmp);
    let n = values.len();
    let half = 0.98 * (n as f64).sqrt();
    let low = (n as f64 / 2. - half).floor().max(0.) as usize;
    let high = ((n as f64 / 2. + half).ceil() as usize).min(n - 1);
    let median = (values[(n - 1) / 2] + values[n / 2]) / 2.;
    (median, values[low], values[high])
}
