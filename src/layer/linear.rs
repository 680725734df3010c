//! [`DoftLinear`]: a frozen linear layer with a rotated input side and scaled outputs.

use super::adapted::{Adaptable, Doft};
use super::mixed::{self, Group};
use super::mode::Pass;
use crate::config::LayerKind;
use crate::frozen::{self, Base, Frozen};
use crate::ops;
use candle_core::Tensor;

/// A frozen linear layer, its input side rotated and its outputs scaled.
///
/// ```text
/// y = (m / n0) * ((x . blockdiag(R)) . W^T) + bias
/// ```
///
/// that is, a linear layer of weight `diag(m / n0) W blockdiag(R)^T`. `W` and the bias are frozen;
/// `R` comes from the packed parameter (see [`rotation`](crate::rotation)), `m` from the magnitude
/// (see [`Magnitude`](crate::Magnitude)). Because a rotation keeps norms, `n0 = ||W_row||` is taken
/// once, when the layer is made. A new layer answers what its base answers, bit for bit on CPU, also to
/// views of any strides. In f32 and f64 that is what candle's layer answers; to a view, what it answers to
/// a contiguous copy of it, for over other strides candle adds in another order.
///
/// Clones share parameters. A layer outside the targets of an [`Adapter`](crate::Adapter) is the plain
/// frozen layer: [`DoftLinear::is_adapted`] is false. It runs as the [`Mode`](crate::Mode) of its adapter
/// says; a layer that stands alone is always in training.
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
pub type DoftLinear = Doft<frozen::Linear>;

impl Adaptable for frozen::Linear {
    const KIND: LayerKind = LayerKind::Linear;

    type Candle = candle_nn::Linear;

    fn adapted(&self, path: &str, x: &Tensor, pass: Pass) -> candle_core::Result<Tensor> {
        self.check(path, x)?;
        let ratio = pass.ratio()?;
        let Base { weight, bias, .. } = self.as_base();
        ops::linear::doft(x, &pass.r, ratio.as_ref(), weight, bias)
    }

    // The product is the same for all rows: only what is before and behind it differs.
    fn mixed(&self, path: &str, x: &Tensor, groups: &[Group]) -> candle_core::Result<Tensor> {
        self.check(path, x)?;
        let Base { weight, bias, .. } = self.as_base();
        if ops::mixed::has_kernel(x, weight) {
            let mut parts = Vec::with_capacity(groups.len());
            for Group { rows, factors } in groups {
                parts.push((rows.as_slice(), factors.map(|f| (&f.r, f.ratio.as_ref()))));
            }
            return ops::mixed::linear(x, &parts, weight, bias);
        }
        let turned = mixed::each(x, groups, |x, factors| match factors {
            Some(factors) => ops::linear::rotated(x, &factors.r),
            None => ops::linear::in_computed(x),
        })?;
        let y = ops::linear::frozen(&turned, weight, None)?;
        let ratios = groups
            .iter()
            .any(|g| g.factors.is_some_and(|f| f.ratio.is_some()));
        let y = match ratios {
            false => y,
            true => mixed::each(&y, groups, |y, factors| {
                match factors.and_then(|f| f.ratio.as_ref()) {
                    Some(ratio) => y.broadcast_mul(&ratio.to_dtype(y.dtype())?),
                    None => Ok(y.clone()),
                }
            })?,
        };
        let y = match bias {
            Some(bias) => y.broadcast_add(&bias.to_dtype(y.dtype())?)?,
            None => y,
        };
        y.to_dtype(x.dtype())
    }

    fn with_weight(&self, weight: Tensor) -> candle_nn::Linear {
        candle_nn::Linear::new(weight, self.bias().cloned())
    }
}
