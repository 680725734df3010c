//! [`DoftLinear`]: a frozen linear layer with a rotated input side and scaled outputs.

use super::Adaptation;
use super::adaptation::Pass;
use super::common::layer_methods;
use crate::error::Result;
use crate::frozen::{self, Base, Frozen};
use crate::ops;
use candle_core::Tensor;
use std::sync::Arc;

/// A frozen linear layer, its input side rotated and its outputs scaled.
///
/// ```text
/// y = (m / n0) * ((x . blockdiag(R)) . W^T) + bias
/// ```
///
/// that is, a linear layer of weight `diag(m / n0) W blockdiag(R)^T`. `W` and the bias are frozen;
/// `R` comes from the packed parameter (see [`rotation`](crate::rotation)), `m` from the magnitude
/// (see [`Magnitude`](crate::Magnitude)). Because a rotation keeps norms, `n0 = ||W_row||` is taken
/// once, when the layer is made. A new layer answers what its base answers, bit for bit on CPU.
///
/// Clones share parameters and switches. A layer outside the targets of an
/// [`Adapter`](crate::Adapter) is the plain frozen layer: [`DoftLinear::is_adapted`] is false.
///
/// # Dropout
///
/// candle gives every [`Module`](candle_nn::Module) a `ModuleT` that forgets whether it trains. So with dropout
/// configured, call [`DoftLinear::forward_t`]; `Module::forward` then answers an error, except on an
/// inference copy or in [`Adapter::inference`](crate::Adapter::inference).
///
/// # Shapes
///
/// `x` is `(.., in)` of rank 2 or more; the answer is `(.., out)` in the dtype of `x`.
/// [`frozen::Linear`] has the table of dtypes. Parameters are f32 (f64 over an f64 weight), and
/// rotation and magnitude are applied in f32 or wider.
///
/// # Examples
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_doft::{DoftConfig, DoftLinear};
/// use candle_nn::{Linear, Module, VarBuilder, VarMap};
///
/// let weight = Tensor::new(&[[1f32, 0.], [0., 1.], [3., 4.]], &Device::Cpu)?;
/// let varmap = VarMap::new();
/// let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
/// let config = DoftConfig::default().with_block_size(2).with_scaled(false);
/// let layer = DoftLinear::new(Linear::new(weight, None), &config, vb.pp("q_proj"))?;
///
/// // theta = 0.5 turns the plane by 2 atan(0.5).
/// varmap.clone().set_one("q_proj.oft_R.weight", Tensor::new(&[[0.5f32]], &Device::Cpu)?)?;
/// let y = layer.forward(&Tensor::new(&[[1f32, 0.]], &Device::Cpu)?)?.to_vec2::<f32>()?;
/// assert!((y[0][0] - 0.6).abs() < 1e-6 && (y[0][1] - 0.8).abs() < 1e-6);
/// assert_eq!(layer.magnitude()?.to_vec1::<f32>()?, [1., 1., 5.]);
/// # Ok::<(), candle_doft::Error>(())
/// ```
///
/// # References
///
/// Rotation: "Orthogonal Finetuning Made Scalable", arXiv:2506.19847. Magnitude: "DoRA:
/// Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353, equation 5, without its norm.
#[derive(Clone, Debug)]
pub struct DoftLinear {
    path: Arc<str>,
    base: frozen::Linear,
    adaptation: Option<Arc<Adaptation>>,
}

impl DoftLinear {
    /// The same layer as a candle layer, for inference without this crate.
    ///
    /// # Errors
    ///
    /// Those of [`DoftLinear::effective_weight`].
    pub fn merge(&self) -> Result<candle_nn::Linear> {
        let bias = self.base.bias().cloned();
        Ok(candle_nn::Linear::new(self.effective_weight()?, bias))
    }

    fn run(&self, x: &Tensor, pass: Pass) -> candle_core::Result<Tensor> {
        self.base.check(&self.path, x)?;
        let ratio = pass.ratio()?;
        let Base { weight, bias, .. } = self.base.as_base();
        ops::linear::doft(x, &pass.r, ratio.as_ref(), weight, bias)
    }
}

layer_methods!(DoftLinear, frozen::Linear, Linear);
