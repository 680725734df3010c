//! [`Linear`]: a linear layer whose weight, dense or quantized, never enters the graph.

use super::QuantizedVarBuilder;
use super::base::{Base, Frozen};
use crate::error::Error;
use crate::ops::{self, Weight};
use candle_core::quantized::{QMatMul, QTensor};
use candle_core::{DType, Result, Tensor};
use candle_nn::{Module, VarBuilder};
use std::sync::Arc;

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
/// `(.., out)` in the dtype of `x`.
///
/// # Dtypes
///
/// | weight | `x` | computed in |
/// |---|---|---|
/// | f32, f64 | the same | the same, by candle's product |
/// | f16, bf16 | the same, or f32 | f32 |
/// | quantized, any GGML type | f32, f16, bf16 | f32 |
///
/// On CPU a half or quantized weight is expanded in panels of 2 MiB that stay in cache, on the way
/// forward and again on the way back; the whole of it never exists in f32. On other devices it is
/// expanded for as long as its product runs.
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

/// A frozen linear layer with bias over quantized rows, its tensors from `vb`.
///
/// # Errors
///
/// When `vb` lacks `weight` `(out_dim, in_dim)` or `bias` `(out_dim)`.
pub fn quantized_linear(in_dim: usize, out_dim: usize, vb: QuantizedVarBuilder) -> Result<Linear> {
    let bias = vb.get(out_dim, "bias")?.dequantize(vb.device())?;
    let weight = vb.get((out_dim, in_dim), "weight")?;
    Ok(Linear::quantized(weight, Some(bias))?)
}

/// A frozen linear layer without bias over quantized rows, its weight from `vb`.
///
/// # Errors
///
/// When `vb` lacks `weight` `(out_dim, in_dim)`.
pub fn quantized_linear_no_bias(
    in_dim: usize,
    out_dim: usize,
    vb: QuantizedVarBuilder,
) -> Result<Linear> {
    Ok(Linear::quantized(
        vb.get((out_dim, in_dim), "weight")?,
        None,
    )?)
}

impl Linear {
    /// Freezes a weight `(out, in)` and a bias `(out)`.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self {
            weight: Weight::dense(&weight),
            bias: bias.map(|bias| bias.detach()),
        }
    }

    /// A layer over quantized rows `(out, in)`, which are shared and stay quantized.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] when the weight is not a matrix, or the bias not of shape `(out)`.
    pub fn quantized(weight: Arc<QTensor>, bias: Option<Tensor>) -> crate::Result<Self> {
        let layer = Self {
            weight: Weight::quantized(weight),
            bias: bias.map(|bias| bias.detach()),
        };
        layer.check_base(UNNAMED)?;
        Ok(layer)
    }

    /// A layer over the weight of a `QMatMul`, quantized or dense. On CPU a quantized `QMatMul` rounds the
    /// activations to 8 bits and this layer does not, so their answers differ by that.
    ///
    /// # Errors
    ///
    /// Those of [`Linear::quantized`].
    pub fn from_qmatmul(weight: QMatMul, bias: Option<Tensor>) -> crate::Result<Self> {
        match weight {
            QMatMul::QTensor(weight) => Self::quantized(weight, bias),
            QMatMul::Tensor(weight) | QMatMul::TensorF16(weight) => Ok(Self::new(weight, bias)),
        }
    }

    pub(crate) fn over(weight: Weight) -> Self {
        Self { weight, bias: None }
    }

    /// The same weight without the bias.
    pub fn without_bias(self) -> Self {
        Self { bias: None, ..self }
    }

    /// Lets candle's quantized product answer inputs of up to 8 rows that need no gradient: several
    /// times faster when one token is decoded. It rounds the activations to 8 bits, so it is not the
    /// product that was trained; off by default. Without effect on a dense weight.
    pub fn with_fast_decode(mut self, on: bool) -> Self {
        self.weight.set_fast_decode(on);
        self
    }

    /// The frozen weight, `(out, in)`: shared when dense, expanded to f32 when quantized.
    ///
    /// # Errors
    ///
    /// Those of expanding a quantized weight.
    pub fn weight(&self) -> Result<Tensor> {
        self.weight.tensor()
    }

    /// The quantized weight, if it is one.
    pub fn qtensor(&self) -> Option<&Arc<QTensor>> {
        self.weight.qtensor()
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

    /// Dtype of the weight; f32 for a quantized one, which is what it expands to.
    pub fn dtype(&self) -> DType {
        self.weight.dtype()
    }

    /// Refuses an input that the layer cannot take, and a weight or bias that it cannot run with.
    pub(crate) fn check(&self, layer: &str, x: &Tensor) -> crate::Result<()> {
        self.check_base(layer)?;
        let width = self.in_dim();
        if x.rank() < 2 || x.dims().last() != Some(&width) {
            let expected = format!("(.., {width}) of rank 2 or more");
            return Err(Error::shape(layer, "the input", x.dims(), expected));
        }
        self.as_base().check_dtype(layer, x)
    }
}

/// What errors call a layer that stands alone.
const UNNAMED: &str = "the linear layer";

impl Frozen for Linear {
    fn as_base(&self) -> Base<'_> {
        Base {
            weight: &self.weight,
            shape: self.weight.dims(),
            rank: 2,
            bias: self.bias.as_ref(),
        }
    }

    fn run(&self, layer: &str, x: &Tensor) -> Result<Tensor> {
        self.check(layer, x)?;
        ops::linear::frozen(x, &self.weight, self.bias.as_ref())
    }
}

impl From<candle_nn::Linear> for Linear {
    fn from(layer: candle_nn::Linear) -> Self {
        Self::new(layer.weight().clone(), layer.bias().cloned())
    }
}

impl Module for Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.run(UNNAMED, x)
    }
}
