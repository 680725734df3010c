//! What is compared with what.

use crate::steps::interleave::timed;
use crate::steps::{self, Run, Shape, Timed, calls, conv, llm, parts, quantized, serving};
use candle_core::Result;

/// Methods on one linear layer: numerator, denominator.
const PAIRS: [(&str, &str); 11] = [
    ("frozen", "gemm"),
    ("doft", "frozen"),
    ("oft", "frozen"),
    ("doft", "oft"),
    ("lora", "frozen"),
    ("dora", "frozen"),
    ("doft", "dora"),
    ("candle_linear", "frozen"),
    ("doft", "candle_lora"),
    ("doft", "candle_dora"),
    ("doft", "candle_oft"),
];

const SHAPES: [Shape; 4] = [
    (512, 1024, 1024),
    (512, 576, 1536),
    (2048, 1024, 1024),
    (128, 4096, 4096),
];

/// What is timed against what, and how to make the two sides.
pub struct Comparison {
    pub what: &'static str,
    pub shape: String,
    pub numerator: &'static str,
    pub denominator: &'static str,
    pub make: Box<dyn Fn() -> Result<Sides>>,
}

/// The two sides, and what is taken off the numerator because no method has to do with it.
pub struct Sides {
    pub numerator: Timed,
    pub denominator: Timed,
    pub surplus: Vec<Timed>,
}

impl Sides {
    fn new(numerator: Run, denominator: Run) -> Self {
        Self {
            numerator: timed(numerator),
            denominator: timed(denominator),
            surplus: Vec::new(),
        }
    }
}

impl Comparison {
    fn new(
        what: &'static str,
        shape: impl Into<String>,
        (numerator, denominator): (&'static str, &'static str),
        make: impl Fn() -> Result<Sides> + 'static,
    ) -> Self {
        Self {
            what,
            shape: shape.into(),
            numerator,
            denominator,
            make: Box::new(make),
        }
    }

    /// Both sides made by the same function from their names.
    fn alike(
        what: &'static str,
        shape: impl Into<String>,
        pair: (&'static str, &'static str),
        make: impl Fn(&'static str) -> Result<Run> + 'static,
    ) -> Self {
        Self::new(what, shape, pair, move || {
            Ok(Sides::new(make(pair.0)?, make(pair.1)?))
        })
    }
}

/// Every comparison; a quick one takes a smaller model.
pub fn all(quick: bool) -> Vec<Comparison> {
    let mut all = linear_steps();
    all.extend(linear_calls());
    all.extend(small_parts());
    all.extend(quantized_steps());
    all.extend(conv_steps());
    all.extend(served());
    all.extend(llm_steps(quick));
    all
}

fn step(method: &str, shape: Shape, block_size: usize) -> Result<steps::Step> {
    Ok(steps::steps(&[method], shape, block_size)?.remove(0))
}

fn linear_steps() -> Vec<Comparison> {
    let linear = |pair, shape, block_size| {
        let name = match block_size {
            32 => steps::name(shape),
            b => format!("{}, b = {b}", steps::name(shape)),
        };
        Comparison::new("linear_step", name, pair, move || {
            // Both at once: they share the weight.
            let mut steps = steps::steps(&[pair.0, pair.1], shape, block_size)?.into_iter();
            let mut next = || steps.next().map(|step| Box::new(move || step.run()) as Run);
            match (next(), next()) {
                (Some(above), Some(below)) => Ok(Sides::new(above, below)),
                _ => candle_core::bail!("two steps were asked for"),
            }
        })
    };
    let mut all = Vec::new();
    for shape in SHAPES {
        all.extend(PAIRS.map(|pair| linear(pair, shape, 32)));
    }
    // Where the rotation weighs most, and other block sizes.
    let pair = ("doft", "frozen");
    all.push(linear(pair, (512, 3072, 768), 32));
    all.extend([8, 16, 64, 128].map(|b| linear(pair, SHAPES[0], b)));
    all
}

/// The op's two calls alone, and those of DOFT with the map that makes its R. They are no step, and say
/// what a step adds to them.
fn linear_calls() -> [Comparison; 3] {
    let shape = SHAPES[0];
    ["frozen", "doft", "doft_and_map"].map(|name| {
        let pair = (name, "gemm");
        Comparison::new("linear_calls", steps::name(shape), pair, move || {
            let method = if name == "frozen" { name } else { "doft" };
            let products = step("gemm", shape, 32)?;
            let mut surplus = vec![calls::bookkeeping(step("gemm", shape, 32)?)?];
            if name == "doft" {
                surplus.push(calls::map(step(name, shape, 32)?)?);
            }
            Ok(Sides {
                numerator: calls::calls(step(method, shape, 32)?)?,
                denominator: timed(Box::new(move || products.run())),
                surplus,
            })
        })
    })
}

/// A decoded token, and maps to rotations.
fn small_parts() -> Vec<Comparison> {
    let token = (1, 1024, 1024);
    let decode = |pair| {
        Comparison::alike("decode", steps::name(token), pair, move |way| {
            parts::decode(way, token)
        })
    };
    let blocks = parts::blocks(32);
    let map = |name| Ok(parts::map(name, 32)?.0);
    vec![
        decode(("cached", "merged")),
        decode(("rebuilt", "merged")),
        Comparison::alike("rotation", &blocks, ("cayley", "series"), map),
        Comparison::new("rotation", &blocks, ("cayley", "doft_step"), move || {
            let step = step("doft", SHAPES[0], 32)?;
            Ok(Sides::new(map("cayley")?, Box::new(move || step.run())))
        }),
    ]
}

fn quantized_steps() -> Vec<Comparison> {
    let types = quantized::TYPES.iter().map(|(name, _)| (*name, "dense"));
    let others = [("bf16", "dense"), ("qmatmul", "forward")];
    let pairs = types.chain(others);
    let shape = steps::name(quantized::SHAPE);
    let mut all: Vec<_> = pairs
        .map(|pair| Comparison::alike("quantized_step", &shape, pair, quantized::run))
        .collect();
    let pair = ("fused", "plain");
    let loss = Comparison::alike("loss", "512x576x49152", pair, quantized::loss);
    all.push(loss);
    all
}

fn conv_steps() -> Vec<Comparison> {
    let mut all = Vec::new();
    for setting in conv::SETTINGS {
        for pair in [("doft", "frozen"), ("candle", "doft")] {
            let make = move |method| conv::run(method, setting);
            all.push(Comparison::alike("conv_step", setting.name, pair, make));
        }
    }
    all
}

/// Eight rows under eight adapters: a decoded token each, and 64 of a prompt.
fn served() -> Vec<Comparison> {
    let mut all = Vec::new();
    for tokens in [1, 64] {
        for pair in [("mixed", "one"), ("mixed", "merged")] {
            let make = move |way| serving::run(way, tokens);
            let shape = serving::name(tokens);
            all.push(Comparison::alike("serving", shape, pair, make));
        }
    }
    all
}

fn llm_steps(quick: bool) -> Vec<Comparison> {
    let layers = match quick {
        true => llm::QUICK_LAYERS,
        false => llm::LAYERS,
    };
    let pairs = [
        ("none", "gemm"),
        ("doft", "gemm"),
        ("doft", "none"),
        ("lora", "none"),
        ("dora", "none"),
    ];
    let comparison = |pair: (&'static str, &'static str)| {
        let shape = format!("4x128, {layers} layers");
        Comparison::new("llm_step", shape, pair, move || {
            let weights = llm::weights(layers)?;
            let run = |method| {
                let run = llm::run(method, &weights);
                run.map_err(|error| candle_core::Error::Msg(format!("{error:#}")))
            };
            Ok(Sides::new(run(pair.0)?, run(pair.1)?))
        })
    };
    pairs.map(comparison).into()
}
