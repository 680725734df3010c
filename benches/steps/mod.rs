//! What the benches time: one training step of one linear layer under each method, and of other kinds
//! of layer.

#![allow(dead_code, reason = "each bench uses a part")]

pub mod calls;
pub mod conv;
pub mod interleave;
pub mod llm;
pub mod parts;
mod plain;
pub mod quantized;
pub mod serving;

use crate::support::methods::{Method, Tuned, TunerBuilder};
use candle_core::{Device, Module, Result, Tensor, Var};
use candle_doft::DoftConfig;
use candle_doft::rng::SplitMix64;
use candle_nn::Linear;
use std::hint::black_box;

/// One run of what is timed.
pub type Run = Box<dyn Fn() -> Result<()>>;

/// One run that says itself how many seconds of it count.
pub type Timed = Box<dyn Fn() -> Result<f64>>;

/// Rank of LoRA and DoRA: about the parameters of DOFT with blocks of 32.
const RANK: usize = 8;

/// Shape of a step: tokens, width of the input, width of the output.
pub type Shape = (usize, usize, usize);

/// `TxINxOUT`, as bench ids have it.
pub fn name((tokens, width, out): Shape) -> String {
    format!("{tokens}x{width}x{out}")
}

/// Normal values in f32 from a seed.
pub fn seeded(shape: impl Into<candle_core::Shape>, seed: u64) -> Result<Tensor> {
    let shape = shape.into();
    let mut rng = SplitMix64::new(seed);
    let values: Vec<f32> = (0..shape.elem_count())
        .map(|_| rng.normal() as f32)
        .collect();
    Tensor::from_vec(values, shape, &Device::Cpu)
}

/// A step of one method through a stack of layers, most often one.
pub struct Step {
    pub method: String,
    /// The variables that must get a gradient.
    vars: Vec<Var>,
    layers: Layers,
    x: Var,
    upstream: Tensor,
}

enum Layers {
    Modules(Vec<Layer>),
    /// The two products of each frozen layer and nothing else: `x W^T`, and `dy W`.
    Products(Vec<Tensor>),
}

enum Layer {
    Crate(Tuned),
    Candle(plain::Plain),
}

impl Step {
    /// Forward, then backward to the input and to the adapter.
    pub fn run(&self) -> Result<()> {
        let layers = match &self.layers {
            Layers::Modules(layers) => layers,
            Layers::Products(weights) => return self.products(weights),
        };
        // A loss that costs one pass over y and hands back the upstream gradient.
        let y = forward(layers, &self.x)?;
        let grads = (y * &self.upstream)?.sum_all()?.backward()?;
        black_box(grads);
        Ok(())
    }

    fn products(&self, weights: &[Tensor]) -> Result<()> {
        let mut y = self.x.detach();
        for weight in weights {
            y = y.matmul(&weight.t()?)?;
        }
        let mut dx = self.upstream.clone();
        for weight in weights.iter().rev() {
            dx = dx.matmul(weight)?;
        }
        black_box((y, dx));
        Ok(())
    }

    /// Checks that the step does what it is timed for.
    fn check(&self, expected: &Tensor) -> Result<()> {
        let Layers::Modules(layers) = &self.layers else {
            return Ok(());
        };
        let y = forward(layers, &self.x)?;
        let off = (&y - expected)?.abs()?.max_all()?.to_scalar::<f32>()?;
        // Every method starts at the base.
        assert!(off < 1e-3, "{} is off by {off}", self.method);
        let grads = y.sum_all()?.backward()?;
        assert!(
            grads.get(&self.x).is_some(),
            "{}: no gradient of x",
            self.method
        );
        let missing = self
            .vars
            .iter()
            .filter(|var| grads.get(var).is_none())
            .count();
        assert_eq!(missing, 0, "{}: variables without gradient", self.method);
        Ok(())
    }
}

fn forward(layers: &[Layer], x: &Tensor) -> Result<Tensor> {
    layers.iter().try_fold(x.clone(), |x, layer| match layer {
        Layer::Crate(layer) => layer.forward(&x),
        Layer::Candle(layer) => layer.forward(&x),
    })
}

/// The steps of the named methods at one shape, on the same weight and input, checked.
///
/// A `candle_` method is what one writes with plain candle operations; the others stand on the
/// crate's frozen product.
pub fn steps(names: &[&str], shape: Shape, block_size: usize) -> Result<Vec<Step>> {
    stacks(names, shape, block_size, 1)
}

/// The same through `depth` layers of that shape, one after the other.
pub fn stacks(names: &[&str], shape: Shape, block_size: usize, depth: usize) -> Result<Vec<Step>> {
    let setting = Setting::new(shape, block_size, depth)?;
    let mut expected = setting.x.clone();
    for weight in &setting.weights {
        expected = expected.matmul(&weight.t()?)?;
    }
    let mut steps = Vec::new();
    for method in names {
        let step = setting.step(method)?;
        step.check(&expected)?;
        steps.push(step);
    }
    Ok(steps)
}

/// A step on which nothing has run yet, not even a check.
pub fn untouched(method: &str, shape: Shape, block_size: usize) -> Result<Step> {
    Setting::new(shape, block_size, 1)?.step(method)
}

/// What the sides of a comparison share.
struct Setting {
    weights: Vec<Tensor>,
    x: Tensor,
    upstream: Tensor,
    block_size: usize,
}

impl Setting {
    fn new((tokens, width, out): Shape, block_size: usize, depth: usize) -> Result<Self> {
        let weight = |layer| seeded((out, width), 10 + layer as u64)? / (width as f64).sqrt();
        Ok(Self {
            weights: (0..depth).map(weight).collect::<Result<_>>()?,
            x: seeded((tokens, width), 2)?,
            upstream: seeded((tokens, out), 3)?,
            block_size,
        })
    }

    fn step(&self, method: &str) -> Result<Step> {
        let mut vars = Vec::new();
        let mut layers = Vec::new();
        if method != "gemm" {
            for weight in &self.weights {
                let (layer, own) = layer(method, weight, self.block_size)?;
                layers.push(layer);
                vars.extend(own);
            }
        }
        Ok(Step {
            method: method.to_string(),
            vars,
            layers: match method {
                "gemm" => Layers::Products(self.weights.clone()),
                _ => Layers::Modules(layers),
            },
            x: Var::from_tensor(&self.x)?,
            upstream: self.upstream.clone(),
        })
    }
}

fn layer(method: &str, weight: &Tensor, block_size: usize) -> Result<(Layer, Vec<Var>)> {
    if let Some(plain) = plain::Plain::new(method, weight, RANK, block_size)? {
        let vars = plain.vars();
        return Ok((Layer::Candle(plain), vars));
    }
    let alpha = RANK as f64;
    let config = |config: DoftConfig| Box::new(config.with_block_size(block_size));
    let method = match method {
        "frozen" => Method::Frozen,
        "doft" => Method::Doft(config(DoftConfig::default())),
        "oft" => Method::Doft(config(DoftConfig::oft())),
        "lora" => Method::Lora { rank: RANK, alpha },
        "dora" => Method::Dora { rank: RANK, alpha },
        other => candle_core::bail!("no method `{other}`"),
    };
    let builder = TunerBuilder::new(method, 0, &Device::Cpu)?;
    let layer = builder.wrap_linear("layer", Linear::new(weight.clone(), None))?;
    let vars = builder
        .finish()?
        .named_vars()
        .into_iter()
        .map(|(_, var)| var);
    Ok((Layer::Crate(layer), vars.collect()))
}
