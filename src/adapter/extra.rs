//! Extra trainable tensors that travel with an adapter, such as a new classifier head.

use super::build::Parts;
use super::locked;
use crate::rng::SplitMix64;
use candle_core::{DType, Device, Error, Result, Shape, Tensor};
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
        let var = self.parts.extra(name, dtype, fresh)?;
        if var.shape() != &shape {
            return Err(Error::UnexpectedShape {
                msg: format!("extra tensor `{name}`"),
                expected: shape,
                got: var.shape().clone(),
            });
        }
        Ok(var.as_tensor().clone())
    }

    fn get_unchecked(&self, name: &str, dtype: DType, _: &Device) -> Result<Tensor> {
        // Without a shape there is nothing to make.
        let none = || {
            Err(Error::CannotFindTensor {
                path: name.to_string(),
            })
        };
        Ok(self.parts.extra(name, dtype, none)?.as_tensor().clone())
    }

    fn contains_tensor(&self, name: &str) -> bool {
        let source = self.parts.source.as_ref();
        locked(&self.parts.extras).contains_key(name) || source.is_some_and(|s| s.has_extra(name))
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
