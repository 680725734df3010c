//! [`Linear`]: a linear layer whose weight never enters the graph.

use crate::ops::{self, Weight};
use candle_core::{DType, Result, Tensor};
use candle_nn::{Module, VarBuilder};

/// A linear layer of frozen weight and bias.
///
/// ```text
/// y = x . W^T + bias,    dx = dy . W
/// ```
///
/// candle's own `matmul` makes a gradient for both its factors and keeps it to the end of the
/// backward pass, so a frozen model costs its own size again and a third of the arithmetic. Here the
/// weight is captured inside the operation: only the input gets a gradient. Weight and bias share
/// their storage with the tensors they are made from.
///
/// # Shapes
///
/// `weight` is `(out, in)`, `bias` is `(out)`; `x` is `(.., in)` of rank 2 or more, the answer
/// `(.., out)`.
///
/// # Examples
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use candle_doft::frozen::Linear;
/// use candle_nn::Module;
///
/// let weight = Var::new(&[[1f32, 2.], [3., 4.]], &Device::Cpu)?;
/// let x = Var::new(&[[1f32, 1.]], &Device::Cpu)?;
/// let y = Linear::new(weight.as_tensor().clone(), None).forward(&x)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[3., 7.]]);
/// let grads = y.sum_all()?.backward()?;
/// assert_eq!(grads.get(&x).unwrap().to_vec2::<f32>()?, [[4., 6.]]);
/// assert!(grads.get(&weight).is_none());
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Weight,
    bias: Option<Tensor>,
}

/// A frozen linear layer with bias, its tensors from `vb`, as [`candle_nn::linear()`] names them.
///
/// # Errors
///
/// When `vb` lacks `weight` `(out_dim, in_dim)` or `bias` `(out_dim)`.
pub fn linear(in_dim: usize, out_dim: usize, vb: VarBuilder) -> Result<Linear> {
    let bias = vb.get(out_dim, "bias")?;
    Ok(Linear::new(
        vb.get((out_dim, in_dim), "weight")?,
        Some(bias),
    ))
}

/// A frozen linear layer without bias, its weight from `vb`.
///
/// # Errors
///
/// When `vb` lacks `weight` `(out_dim, in_dim)`.
pub fn linear_no_bias(in_dim: usize, out_dim: usize, vb: VarBuilder) -> Result<Linear> {
    Ok(Linear::new(vb.get((out_dim, in_dim), "weight")?, None))
}

impl Linear {
    /// Freezes a weight `(out, in)` and a bias `(out)`.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self {
            weight: Weight::dense(&weight),
            bias: bias.map(|bias| bias.detach()),
        }
    }

    /// The frozen weight, `(out, in)`.
    pub fn weight(&self) -> &Tensor {
        self.weight.tensor()
    }

    /// The frozen bias, `(out)`.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// Width of the input.
    pub fn in_dim(&self) -> usize {
        self.weight.in_dim()
    }

    /// Width of the output.
    pub fn out_dim(&self) -> usize {
        self.weight.out_dim()
    }

    /// Dtype of the weight.
    pub fn dtype(&self) -> DType {
        self.weight.dtype()
    }

    pub(crate) fn frozen_weight(&self) -> &Weight {
        &self.weight
    }
}

impl From<candle_nn::Linear> for Linear {
    fn from(layer: candle_nn::Linear) -> Self {
        Self::new(layer.weight().clone(), layer.bias().cloned())
    }
}

impl Module for Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::linear::frozen(x, &self.weight, self.bias.as_ref())
    }
}
