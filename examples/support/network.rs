//! A small network of three linear layers, with whatever layers it is given.

use super::digits::{Batches, Examples};
use anyhow::Result;
use candle_core::{D, DType, Device, Tensor, Var};
use candle_doft::rng::SplitMix64;
use candle_nn::{AdamW, Linear, Module, Optimizer, ParamsAdamW, loss};

/// The names of its layers.
const NAMES: [&str; 3] = ["input", "hidden", "output"];

/// Examples of a step.
pub const BATCH: usize = 64;

/// The rate with which a network learns before it is frozen.
const BASE_RATE: f64 = 3e-3;

/// Linear layers with a rectifier between them.
pub struct Net<L> {
    layers: Vec<L>,
}

impl<L: Module> Net<L> {
    pub fn forward(&self, images: &Tensor) -> candle_core::Result<Tensor> {
        let mut x = images.clone();
        for (i, layer) in self.layers.iter().enumerate() {
            x = if i == 0 {
                layer.forward(&x)?
            } else {
                layer.forward(&x.relu()?)?
            };
        }
        Ok(x)
    }
}

impl<L> Net<L> {
    /// Each layer with its name.
    pub fn layers(&self) -> impl Iterator<Item = (&'static str, &L)> {
        NAMES.into_iter().zip(&self.layers)
    }

    /// A network of what `change` makes of each layer.
    pub fn each<M, E>(
        &self,
        change: impl Fn(&'static str, &L) -> std::result::Result<M, E>,
    ) -> std::result::Result<Net<M>, E> {
        let layers = self.layers().map(|(name, layer)| change(name, layer));
        Ok(Net {
            layers: layers.collect::<std::result::Result<_, _>>()?,
        })
    }
}

impl Net<Linear> {
    /// A network to train, and its variables; `widths` go from the pixels to the classes. Weights are
    /// normal with variance `2 / in`.
    pub fn new(widths: [usize; 4], seed: u64, device: &Device) -> Result<(Self, Vec<Var>)> {
        let mut rng = SplitMix64::new(seed);
        let (mut layers, mut vars) = (Vec::new(), Vec::new());
        for pair in widths.windows(2) {
            let (width, out) = (pair[0], pair[1]);
            let std = (2. / width as f64).sqrt();
            let values: Vec<f32> = (0..out * width)
                .map(|_| (std * rng.normal()) as f32)
                .collect();
            let weight = Var::from_vec(values, (out, width), device)?;
            let bias = Var::zeros(out, DType::F32, device)?;
            layers.push(Linear::new(
                weight.as_tensor().clone(),
                Some(bias.as_tensor().clone()),
            ));
            vars.extend([weight, bias]);
        }
        Ok((Self { layers }, vars))
    }

    /// A network that learned from examples for some steps, and is frozen. `each` is called after a step.
    pub fn trained(
        widths: [usize; 4],
        examples: &Examples,
        seed: u64,
        steps: usize,
        each: impl Fn(),
    ) -> Result<Self> {
        let (net, vars) = Self::new(widths, seed, examples.images.device())?;
        let params = ParamsAdamW {
            lr: BASE_RATE,
            ..Default::default()
        };
        let mut optimizer = AdamW::new(vars, params)?;
        let mut batches = Batches::new(examples, BATCH, seed);
        for _ in 0..steps {
            let (images, labels) = batches.next_batch()?;
            let loss = loss::cross_entropy(&net.forward(&images)?, &labels)?;
            optimizer.backward_step(&loss)?;
            each();
        }
        Ok(net.frozen())
    }

    /// The same network, without variables.
    pub fn frozen(self) -> Self {
        let freeze =
            |layer: Linear| Linear::new(layer.weight().detach(), layer.bias().map(Tensor::detach));
        Self {
            layers: self.layers.into_iter().map(freeze).collect(),
        }
    }
}

/// The most likely class of each row.
pub fn predictions(logits: &Tensor) -> Result<Vec<u32>> {
    Ok(logits.argmax(D::Minus1)?.to_vec1()?)
}

/// The share of rows whose most likely class is the right one.
pub fn accuracy(logits: &Tensor, labels: &Tensor) -> Result<f64> {
    let right = logits.argmax(D::Minus1)?.eq(labels)?.to_dtype(DType::F64)?;
    Ok(right.mean_all()?.to_scalar()?)
}

pub fn max_abs_diff(a: &Tensor, b: &Tensor) -> Result<f64> {
    let off = (a - b)?
        .abs()?
        .flatten_all()?
        .max(0)?
        .to_dtype(DType::F64)?;
    Ok(off.to_scalar()?)
}
