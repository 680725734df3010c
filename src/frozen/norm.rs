//! [`RmsNorm`] and [`LayerNorm`]: normalisations of frozen scale that pass gradients on.

use super::{FLOATS, check_float};
use crate::error::Error;
use crate::ops::norm::Norm;
use candle_core::{Result, Tensor};
use candle_nn::layer_norm::LayerNormConfig;
use candle_nn::{Module, VarBuilder};

/// Root-mean-square normalisation over the last axis.
///
/// ```text
/// y = x * s * w,   s = 1 / sqrt(mean(x^2) + eps)
/// dx = s * (dz - z * mean(dz * z)),   dz = dy * w,   z = x * s
/// ```
///
/// candle's own has no backward on contiguous input: it cuts the graph without a word. This one keeps
/// x alone, and makes no gradient for `w`. Half types are computed in f32; rows whose squares leave the
/// range of that, such as rows of 1e19, are scaled first.
///
/// # Shapes
///
/// `x` is `(.., size)`, `w` is `(size)`.
///
/// # Examples
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use candle_doft::frozen::RmsNorm;
/// use candle_nn::Module;
///
/// let norm = RmsNorm::new(Tensor::new(&[1f32, 2.], &Device::Cpu)?, 0.);
/// let x = Var::new(&[[3f32, 4.]], &Device::Cpu)?;
/// let y = norm.forward(&x)?;
/// assert!((y.to_vec2::<f32>()?[0][1] - 2. * 4. / 12.5f32.sqrt()).abs() < 1e-6);
/// assert!(y.sum_all()?.backward()?.get(&x).is_some());
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # References
///
/// "Root Mean Square Layer Normalization", arXiv:1910.07467, equation 4.
#[derive(Clone, Debug)]
pub struct RmsNorm(Norm);

/// A frozen [`RmsNorm`], its scale from `vb`, as [`candle_nn::rms_norm`] names it.
///
/// # Errors
///
/// When `vb` lacks `weight` `(size)`.
pub fn rms_norm(size: usize, eps: f64, vb: VarBuilder) -> Result<RmsNorm> {
    candle_nn::rms_norm(size, eps, vb).map(RmsNorm::from)
}

impl RmsNorm {
    /// Freezes a scale `(size)`.
    pub fn new(weight: Tensor, eps: f64) -> Self {
        Self(Norm {
            weight: weight.detach(),
            bias: None,
            eps,
            remove_mean: false,
        })
    }

    /// The frozen scale, `(size)`.
    pub fn weight(&self) -> &Tensor {
        &self.0.weight
    }

    /// What is added to the mean square.
    pub fn eps(&self) -> f64 {
        self.0.eps
    }

    /// `(x + residual, norm(x + residual))`: on CPU the sum and the squares of its rows are one pass.
    ///
    /// # Errors
    ///
    /// When the two differ in shape or dtype, or `x` is not `(.., size)`.
    ///
    /// # Examples
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use candle_doft::frozen::RmsNorm;
    ///
    /// let norm = RmsNorm::new(Tensor::new(&[1f32, 1.], &Device::Cpu)?, 0.);
    /// let x = Tensor::new(&[[1f32, 2.]], &Device::Cpu)?;
    /// let residual = Tensor::new(&[[2f32, 1.]], &Device::Cpu)?;
    /// let (sum, normed) = norm.forward_residual(&x, &residual)?;
    /// assert_eq!(sum.to_vec2::<f32>()?, [[3., 3.]]);
    /// assert_eq!(normed.to_vec2::<f32>()?, [[1., 1.]]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn forward_residual(&self, x: &Tensor, residual: &Tensor) -> Result<(Tensor, Tensor)> {
        check("RmsNorm::forward_residual", &self.0, x)?;
        if x.dims() != residual.dims() || x.dtype() != residual.dtype() {
            Err(Error::argument(
                "RmsNorm::forward_residual",
                "the residual",
                format!("{:?} of {:?}", residual.dims(), residual.dtype()),
                format!("{:?} of {:?}", x.dims(), x.dtype()),
            ))?;
        }
        self.0.forward_residual(x, residual)
    }
}

impl From<candle_nn::RmsNorm> for RmsNorm {
    fn from(norm: candle_nn::RmsNorm) -> Self {
        Self::new(norm.weight().clone(), norm.eps())
    }
}

impl Module for RmsNorm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        check("RmsNorm::forward", &self.0, x)?;
        self.0.forward(x)
    }
}

/// Layer normalisation over the last axis.
///
/// ```text
/// y = z * w + c,   z = (x - mean(x)) * s,   s = 1 / sqrt(mean((x - mean(x))^2) + eps)
/// dx = s * (dz - mean(dz) - z * mean(dz * z)),   dz = dy * w
/// ```
///
/// candle's own has no backward on contiguous input; see [`RmsNorm`].
///
/// # Shapes
///
/// `x` is `(.., size)`, `w` and `c` are `(size)`.
///
/// # Examples
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_doft::frozen::LayerNorm;
/// use candle_nn::Module;
///
/// let ones = Tensor::new(&[1f32, 1.], &Device::Cpu)?;
/// let norm = LayerNorm::new(ones.clone(), ones, 1e-5);
/// let y = norm.forward(&Tensor::new(&[[1f32, 3.]], &Device::Cpu)?)?.to_vec2::<f32>()?;
/// assert!(y[0][0].abs() < 1e-4 && (y[0][1] - 2.).abs() < 1e-4);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # References
///
/// "Layer Normalization", arXiv:1607.06450, equation 4.
#[derive(Clone, Debug)]
pub struct LayerNorm(Norm);

/// A frozen [`LayerNorm`], its tensors from `vb`, as [`candle_nn::layer_norm()`] names them.
///
/// # Errors
///
/// When `vb` lacks `weight` or `bias` `(size)`.
pub fn layer_norm(
    size: usize,
    config: impl Into<LayerNormConfig>,
    vb: VarBuilder,
) -> Result<LayerNorm> {
    candle_nn::layer_norm(size, config, vb).map(LayerNorm::from)
}

impl LayerNorm {
    /// Freezes a scale and a shift, each `(size)`.
    pub fn new(weight: Tensor, bias: Tensor, eps: f64) -> Self {
        candle_nn::LayerNorm::new(weight, bias, eps).into()
    }

    /// Freezes a scale `(size)`, without a shift.
    pub fn new_no_bias(weight: Tensor, eps: f64) -> Self {
        candle_nn::LayerNorm::new_no_bias(weight, eps).into()
    }

    /// The frozen scale, `(size)`.
    pub fn weight(&self) -> &Tensor {
        &self.0.weight
    }

    /// The frozen shift, `(size)`.
    pub fn bias(&self) -> Option<&Tensor> {
        self.0.bias.as_ref()
    }

    /// What is added to the variance.
    pub fn eps(&self) -> f64 {
        self.0.eps
    }
}

impl From<candle_nn::LayerNorm> for LayerNorm {
    fn from(norm: candle_nn::LayerNorm) -> Self {
        Self(Norm {
            weight: norm.weight().detach(),
            bias: norm.bias().map(Tensor::detach),
            eps: norm.eps(),
            remove_mean: norm.remove_mean(),
        })
    }
}

impl Module for LayerNorm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        check("LayerNorm::forward", &self.0, x)?;
        self.0.forward(x)
    }
}

/// Refuses an input that a norm cannot take, and parameters that it cannot run with.
fn check(function: &'static str, norm: &Norm, x: &Tensor) -> crate::Result<()> {
    let refuse = |what, found: &Tensor, expected| {
        let found = format!("{:?}", found.dims());
        Err(Error::argument(function, what, found, expected))
    };
    let size = match norm.weight.dims() {
        &[size] if size > 0 => size,
        _ => return refuse("the shape of the scale", &norm.weight, "(size)".into()),
    };
    if let Some(bias) = &norm.bias
        && bias.dims() != [size]
    {
        return refuse("the shape of the shift", bias, format!("[{size}]"));
    }
    if x.dims().last() != Some(&size) {
        let expected = format!("(.., {size}), the size of the norm");
        return refuse("the shape of `x`", x, expected);
    }
    check_float(function, x, FLOATS)
}
