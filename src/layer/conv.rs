//! [`DoftConv2d`] and [`DoftConv1d`]: frozen convolutions with rotated patches and scaled outputs.

use super::adapted::{Adaptable, Doft};
use super::mode::Pass;
use crate::config::LayerKind;
use crate::frozen::{self, Base, Frozen};
use crate::ops;
use candle_core::Tensor;

/// A frozen two-dimensional convolution, its patches rotated and its outputs scaled.
///
/// ```text
/// W_eff = diag(m / n0) W_flat blockdiag(R)^T
/// ```
///
/// with `W_flat` `(out, in/groups * kh * kw)`, the kernel as a matrix of patches: a block of `R` turns
/// neighbouring entries of a patch. Stride, padding, dilation and groups stay those of the base; the
/// groups share `R`. A new layer answers what its base answers; on CPU in f32 and f64 without groups
/// also what candle answers, bit for bit, for inputs of any strides.
///
/// Modes and the meaning of "not adapted" are those of [`DoftLinear`](crate::DoftLinear).
///
/// # Shapes
///
/// `x` is `(N, in, H, W)` in the dtype of the kernel (a half kernel takes f32, too), the answer
/// `(N, out, H', W')`.
///
/// # Examples
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_doft::{DoftConv2d, DoftConfig};
/// use candle_nn::{Conv2d, Module, VarBuilder, VarMap};
///
/// let kernel = Tensor::randn(0f32, 1., (8, 4, 3, 3), &Device::Cpu)?;
/// let base = Conv2d::new(kernel, None, Default::default());
/// let varmap = VarMap::new();
/// let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
/// let config = DoftConfig::default().with_block_size(6);
/// let layer = DoftConv2d::new(base.clone(), &config, vb.pp("conv"))?;
/// let x = Tensor::randn(0f32, 1., (1, 4, 9, 9), &Device::Cpu)?;
/// assert_eq!(layer.forward(&x)?.flatten_all()?.to_vec1::<f32>()?,
///     base.forward(&x)?.flatten_all()?.to_vec1::<f32>()?);
/// # Ok::<(), candle_doft::Error>(())
/// ```
///
/// # References
///
/// Rotation of a flattened kernel: "Controlling Text-to-Image Diffusion by Orthogonal Finetuning",
/// arXiv:2306.07280, section 3.3; here `R^T` on the right for every kind of layer.
pub type DoftConv2d = Doft<frozen::Conv2d>;

/// A frozen one-dimensional convolution, its patches rotated and its outputs scaled.
///
/// ```text
/// W_eff = diag(m / n0) W_flat blockdiag(R)^T
/// ```
///
/// with `W_flat` `(out, in/groups * k)`, the kernel as a matrix of patches; all else is as in
/// [`DoftConv2d`].
///
/// # Shapes
///
/// `x` is `(N, in, L)` in the dtype of the kernel (a half kernel takes f32, too), the answer
/// `(N, out, L')`.
///
/// # Examples
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_doft::{DoftConv1d, DoftConfig};
/// use candle_nn::{Conv1d, Module, VarBuilder, VarMap};
///
/// let kernel = Tensor::randn(0f32, 1., (8, 4, 3), &Device::Cpu)?;
/// let base = Conv1d::new(kernel, None, Default::default());
/// let varmap = VarMap::new();
/// let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
/// let config = DoftConfig::default().with_block_size(6);
/// let layer = DoftConv1d::new(base.clone(), &config, vb.pp("conv"))?;
/// let x = Tensor::randn(0f32, 1., (1, 4, 9), &Device::Cpu)?;
/// assert_eq!(layer.forward(&x)?.flatten_all()?.to_vec1::<f32>()?,
///     base.forward(&x)?.flatten_all()?.to_vec1::<f32>()?);
/// # Ok::<(), candle_doft::Error>(())
/// ```
///
/// # References
///
/// Rotation of a flattened kernel: "Controlling Text-to-Image Diffusion by Orthogonal Finetuning",
/// arXiv:2306.07280, section 3.3; here `R^T` on the right for every kind of layer.
pub type DoftConv1d = Doft<frozen::Conv1d>;

/// The same for both: how a convolution runs, and how it becomes candle's.
macro_rules! adaptable {
    ($conv:ident) => {
        impl Adaptable for frozen::$conv {
            const KIND: LayerKind = LayerKind::$conv;

            type Candle = candle_nn::$conv;

            fn adapted(&self, path: &str, x: &Tensor, pass: Pass) -> candle_core::Result<Tensor> {
                self.check(path, x)?;
                let ratio = pass.ratio()?;
                let factors = Some((&pass.r, ratio.as_ref()));
                let Base { weight, bias, .. } = self.as_base();
                ops::conv::conv(x, factors, weight, bias, self.geometry())
            }

            fn with_weight(&self, weight: Tensor) -> candle_nn::$conv {
                candle_nn::$conv::new(weight, self.bias().cloned(), *self.config())
            }
        }
    };
}

adaptable!(Conv2d);
adaptable!(Conv1d);
