//! Extra trainable tensors that travel with an adapter, such as a new classifier head.

use super::build::Parts;
use super::locked;
use crate::error;
use crate::rng::SplitMix64;
use candle_core::{DType, Device, Error, Result, Shape, Tensor, Var};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, init::NormalOrUniform};
use std::sync::Arc;

/// Answers every tensor that is asked for with an extra of the adapter, made when new.
pub(super) struct ExtraBackend {
    pub(super) parts: Arc<Parts>,
}

impl SimpleBackend for ExtraBackend {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        init: Init,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        let fresh = || seeded(&init, &shape, dtype, device, self.parts.config.seed, name);
        let var = self.parts.extra(name, Some(&shape), dtype, fresh)?;
        Ok(var.as_tensor().clone())
    }

    fn get_unchecked(&self, name: &str, dtype: DType, _: &Device) -> Result<Tensor> {
        // Without a shape there is nothing to make.
        let none = || {
            Err(Error::CannotFindTensor {
                path: name.to_string(),
            })
        };
        let var = self.parts.extra(name, None, dtype, none)?;
        Ok(var.as_tensor().clone())
    }

    fn contains_tensor(&self, name: &str) -> bool {
        let source = self.parts.source.as_ref();
        locked(&self.parts.extras).contains_key(name) || source.is_some_and(|s| s.has_extra(name))
    }
}

impl Parts {
    /// The extra tensor of that name: the one that there is, that of the loaded file, or a fresh one.
    pub(super) fn extra(
        &self,
        name: &str,
        shape: Option<&Shape>,
        dtype: DType,
        fresh: impl FnOnce() -> Result<Tensor>,
    ) -> error::Result<Var> {
        const WHAT: &str = "the extra tensor";
        if self.control.is_complete() {
            return Err(error::Error::Finished {
                name: name.to_string(),
            });
        }
        let check_shape = |found: &Shape, from: &str| match shape {
            Some(shape) if shape != found => {
                let expected = format!("{:?}, as {from}", found.dims());
                Err(error::Error::shape(name, WHAT, shape.dims(), expected))
            }
            _ => Ok(()),
        };
        let mut extras = locked(&self.extras);
        if let Some(var) = extras.get(name) {
            check_shape(var.shape(), "it was first made")?;
            if var.dtype() != dtype {
                let expected = format!("{:?}, as it was first made", var.dtype());
                return Err(error::Error::dtype(name, WHAT, dtype, expected));
            }
            return Ok(var.clone());
        }
        let stored = match &self.source {
            Some(source) => source.extra(name, dtype)?,
            None => None,
        };
        let value = match stored {
            Some(stored) => {
                check_shape(stored.shape(), "the file has it")?;
                stored.to_device(&self.device)?
            }
            None => fresh()?,
        };
        let var = Var::from_tensor(&value)?;
        extras.insert(name.to_string(), var.clone());
        Ok(var)
    }
}

// candle's own initialisation draws from a generator that takes no seed on CPU.
fn seeded(
    init: &Init,
    shape: &Shape,
    dtype: DType,
    device: &Device,
    seed: u64,
    name: &str,
) -> Result<Tensor> {
    let mut rng = SplitMix64::stream(seed, name, [0, 0]);
    let mut draw = |sample: &mut dyn FnMut(&mut SplitMix64) -> f64| -> Result<Tensor> {
        let values: Vec<f64> = (0..shape.elem_count()).map(|_| sample(&mut rng)).collect();
        let tensor = Tensor::from_vec(values, shape, &Device::Cpu)?;
        tensor.to_dtype(dtype)?.to_device(device)
    };
    match *init {
        Init::Randn { mean, stdev } => draw(&mut |rng| mean + stdev * rng.normal()),
        Init::Uniform { lo, up } => draw(&mut |rng| lo + (up - lo) * rng.uniform()),
        Init::Kaiming {
            dist,
            fan,
            non_linearity,
        } => {
            let std = non_linearity.gain() / (fan.for_shape(shape) as f64).sqrt();
            match dist {
                NormalOrUniform::Normal => draw(&mut |rng| std * rng.normal()),
                NormalOrUniform::Uniform => {
                    let bound = 3f64.sqrt() * std;
                    draw(&mut |rng| bound * (2. * rng.uniform() - 1.))
                }
            }
        }
        Init::Const(value) => Tensor::full(value, shape, device)?.to_dtype(dtype),
    }
}
