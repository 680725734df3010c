//! What the benches time: one training step of one linear layer under each method, and of other kinds
//! of layer.

pub mod conv;
pub mod llm;
pub mod parts;
mod plain;
pub mod quantized;

use crate::methods::{Method, Tuned, Tuner};
use candle_core::{Device, Module, Result, Tensor, Var};
use candle_doft::DoftConfig;
use candle_doft::rng::SplitMix64;
use candle_nn::Linear;

/// One run of what is timed.
pub type Run = Box<dyn Fn() -> Result<()>>;

/// Rank of LoRA and DoRA: about the parameters of DOFT with blocks of 32.
const RANK: usize = 8;

/// Shape of a step: tokens, width of the input, width of the output.
pub type Shape = (usize, usize, usize);

/// `TxINxOUT`, as bench ids have it.
pub fn name((tokens, width, out): Shape) -> String {
    format!("{tokens}x{width}x{out}")
}

/// Normal values in f32 from a seed.
pub fn seeded(shape: (usize, usize), seed: u64) -> Result<Tensor> {
    let mut rng = SplitMix64::new(seed);
    let values: Vec<f32> = (0..shape.0 * shape.1)
        .map(|_| rng.normal() as f32)
        .collect();
    Tensor::from_vec(values, shape, &Device::Cpu)
}

/// A step of one method.
pub struct Step {
    pub method: String,
    /// The variables that must get a gradient.
    vars: Vec<Var>,
    layer: Layer,
    x: Var,
    upstream: Tensor,
}

enum Layer {
    Crate(Tuned),
    Candle(plain::Plain),
    /// The two products of a frozen layer and nothing else: `x W^T`, and `dy W`.
    Products(Tensor),
}

impl Step {
    /// Forward, then backward to the input and to the adapter.
    pub fn run(&self) -> Result<()> {
        let y = match &self.layer {
            Layer::Products(weight) => {
                let y = self.x.detach().matmul(&weight.t()?)?;
                let dx = self.upstream.matmul(weight)?;
                std::hint::black_box((y, dx));
                return Ok(());
            }
            layer => layer.forward(&self.x)?,
        };
        // A loss that costs one pass over y and hands back the upstream gradient.
        let grads = (y * &self.upstream)?.sum_all()?.backward()?;
        std::hint::black_box(grads);
        Ok(())
    }

    /// Checks that the step does what it is timed for.
    fn check(&self, expected: &Tensor) -> Result<()> {
        if matches!(self.layer, Layer::Products(_)) {
            return Ok(());
        }
        let y = self.layer.forward(&self.x)?;
        let off = (&y - expected)?
            .abs()?
            .flatten_all()?
            .max(0)?
            .to_scalar::<f32>()?;
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

impl Layer {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Crate(layer) => layer.forward(x),
            Self::Candle(layer) => layer.forward(x),
            Self::Products(weight) => x.matmul(&weight.t()?),
        }
    }
}

/// The steps of the named methods at one shape, on the same weight and input, checked.
///
/// A `candle_` method is what one writes with plain candle operations; the others stand on the
/// crate's frozen product.
pub fn steps(names: &[&str], shape: Shape, block_size: usize) -> Result<Vec<Step>> {
    let (tokens, width, out) = shape;
    let weight = (seeded((out, width), 1)? / (width as f64).sqrt())?;
    let x = seeded((tokens, width), 2)?;
    let upstream = seeded((tokens, out), 3)?;
    let expected = x.matmul(&weight.t()?)?;
    let mut steps = Vec::new();
    for method in names {
        let (layer, vars) = layer(method, &weight, block_size)?;
        let step = Step {
            method: method.to_string(),
            vars,
            layer,
            x: Var::from_tensor(&x)?,
            upstream: upstream.clone(),
        };
        step.check(&expected)?;
        steps.push(step);
    }
    Ok(steps)
}

fn layer(method: &str, weight: &Tensor, block_size: usize) -> Result<(Layer, Vec<Var>)> {
    if method == "gemm" {
        return Ok((Layer::Products(weight.clone()), Vec::new()));
    }
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
    let tuner = Tuner::new(method, 0, &Device::Cpu)?;
    let layer = tuner.wrap_linear("layer", Linear::new(weight.clone(), None))?;
    // Asking a frozen model for its variables is an error of the adapter alone.
    let vars = match &layer {
        Tuned::Frozen(_) => Vec::new(),
        _ => tuner
            .named_vars()?
            .into_iter()
            .map(|(_, var)| var)
            .collect(),
    };
    Ok((Layer::Crate(layer), vars))
}
