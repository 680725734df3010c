//! Ratios between methods, the two sides of each interleaved, so that a drift of the machine meets
//! both. Writes `target/ratios.json`.
//!
//!     cargo bench --bench ratios [-- --quick] [WHAT]

#[path = "../examples/support/llm/mod.rs"]
mod llm;
#[path = "../examples/support/methods.rs"]
#[allow(dead_code, reason = "the examples use the rest")]
mod methods;
#[allow(dead_code, reason = "each bench uses a part")]
mod support;

use candle_core::Result;
use std::time::Instant;
use support::{Run, conv, parts, quantized};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// What is compared with what: numerator, denominator.
const PAIRS: [(&str, &str); 10] = [
    ("frozen", "gemm"),
    ("doft", "frozen"),
    ("oft", "frozen"),
    ("doft", "oft"),
    ("lora", "frozen"),
    ("dora", "frozen"),
    ("candle_linear", "frozen"),
    ("doft", "candle_lora"),
    ("doft", "candle_dora"),
    ("doft", "candle_oft"),
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

/// What is timed against what, and how to make the two sides.
struct Comparison {
    what: &'static str,
    shape: String,
    numerator: &'static str,
    denominator: &'static str,
    make: Box<dyn Fn() -> Result<[Run; 2]>>,
}

fn linear(
    (numerator, denominator): (&'static str, &'static str),
    shape: support::Shape,
    block_size: usize,
) -> Comparison {
    Comparison {
        what: "linear_step",
        shape: match block_size {
            32 => support::name(shape),
            b => format!("{}, b = {b}", support::name(shape)),
        },
        numerator,
        denominator,
        make: Box::new(move || {
            let steps = support::steps(&[numerator, denominator], shape, block_size)?;
            let mut runs = steps
                .into_iter()
                .map(|step| Box::new(move || step.run()) as Run);
            match (runs.next(), runs.next()) {
                (Some(above), Some(below)) => Ok([above, below]),
                _ => candle_core::bail!("two steps were asked for"),
            }
        }),
    }
}

fn comparisons(quick: bool) -> Vec<Comparison> {
    let mut all = Vec::new();
    for shape in SHAPES {
        for pair in PAIRS {
            all.push(linear(pair, shape, 32));
        }
    }
    // Where the rotation weighs most, and other block sizes.
    all.push(linear(("doft", "frozen"), (512, 3072, 768), 32));
    for b in [8, 16, 64, 128] {
        all.push(linear(("doft", "frozen"), SHAPES[0], b));
    }
    for way in ["cached", "rebuilt"] {
        all.push(Comparison {
            what: "decode",
            shape: "1x1024x1024".into(),
            numerator: way,
            denominator: "merged",
            make: Box::new(move || {
                let shape = (1, 1024, 1024);
                Ok([parts::decode(way, shape)?, parts::decode("merged", shape)?])
            }),
        });
    }
    all.push(Comparison {
        what: "rotation",
        shape: parts::blocks(32),
        numerator: "cayley",
        denominator: "series",
        make: Box::new(|| Ok([parts::map("cayley", 32)?.0, parts::map("series", 32)?.0])),
    });
    all.push(Comparison {
        what: "rotation",
        shape: parts::blocks(32),
        numerator: "cayley",
        denominator: "doft_step",
        make: Box::new(|| {
            let mut steps = support::steps(&["doft"], SHAPES[0], 32)?;
            let step = steps.remove(0);
            Ok([parts::map("cayley", 32)?.0, Box::new(move || step.run())])
        }),
    });
    let types = quantized::TYPES.iter().map(|(name, _)| (*name, "dense"));
    let others = [("bf16", "dense"), ("qmatmul", "forward")];
    for (numerator, denominator) in types.chain(others) {
        all.push(Comparison {
            what: "quantized_step",
            shape: support::name(quantized::SHAPE),
            numerator,
            denominator,
            make: Box::new(move || Ok([quantized::run(numerator)?, quantized::run(denominator)?])),
        });
    }
    all.push(Comparison {
        what: "loss",
        shape: "512x576x49152".into(),
        numerator: "fused",
        denominator: "plain",
        make: Box::new(|| Ok([quantized::loss("fused")?, quantized::loss("plain")?])),
    });
    for setting in conv::SETTINGS {
        for (numerator, denominator) in [("doft", "frozen"), ("candle", "doft")] {
            all.push(Comparison {
                what: "conv_step",
                shape: setting.name.into(),
                numerator,
                denominator,
                make: Box::new(move || {
                    Ok([
                        conv::run(numerator, setting)?,
                        conv::run(denominator, setting)?,
                    ])
                }),
            });
        }
    }
    let layers = match quick {
        true => support::llm::QUICK_LAYERS,
        false => support::llm::LAYERS,
    };
    for (numerator, denominator) in [
        ("none", "gemm"),
        ("doft", "gemm"),
        ("doft", "none"),
        ("lora", "none"),
        ("dora", "none"),
    ] {
        all.push(Comparison {
            what: "llm_step",
            shape: format!("4x128, {layers} layers"),
            numerator,
            denominator,
            make: Box::new(move || {
                let weights = support::llm::weights(layers)?;
                let run = |method| {
                    let run = support::llm::run(method, &weights);
                    run.map_err(|error| candle_core::Error::Msg(format!("{error:#}")))
                };
                Ok([run(numerator)?, run(denominator)?])
            }),
        });
    }
    all
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    // Cargo hands `--bench` to every bench.
    let mut arguments = std::env::args().skip(1).filter(|arg| arg != "--bench");
    let (mut quick, mut only) = (false, None);
    for argument in &mut arguments {
        match argument.as_str() {
            "--quick" => quick = true,
            // What is measured alone, such as `conv_step`.
            what => only = Some(what.to_string()),
        }
    }
    let budget = if quick { QUICK } else { SECONDS };
    let mut found = Vec::new();
    let wanted = |c: &Comparison| only.as_deref().is_none_or(|only| c.what == only);
    for comparison in comparisons(quick).into_iter().filter(wanted) {
        let [above, below] = (comparison.make)()?;
        let mut ratios = Vec::new();
        let start = Instant::now();
        while ratios.len() < ROUNDS || start.elapsed().as_secs_f64() < budget {
            let time = |run: &Run| -> Result<f64> {
                let start = Instant::now();
                run()?;
                Ok(start.elapsed().as_secs_f64())
            };
            ratios.push(time(&above)? / time(&below)?);
        }
        // The first round fills caches and pools.
        ratios.remove(0);
        let (median, low, high) = interval(&mut ratios);
        let Comparison {
            what,
            shape,
            numerator,
            denominator,
            ..
        } = comparison;
        println!(
            "{what:>14} {shape:>21}  {numerator:>13} / {denominator:<7} {median:.3}  [{low:.3}, {high:.3}]"
        );
        found.push(serde_json::json!({
            "what": what,
            "shape": shape,
            "numerator": numerator,
            "denominator": denominator,
            "median": median,
            "low": low,
            "high": high,
        }));
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
