//! [`DoftLinear`]: a frozen linear layer with a rotated input side and scaled outputs.

use super::adapted::{Adaptable, Doft};
use super::low_rank::{self, LowRankPass};
use super::mixed::{self, Group};
use super::mode::{Factors, Pass};
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

    fn low_rank(&self, path: &str, x: &Tensor, pass: &LowRankPass) -> candle_core::Result<Tensor> {
        self.check(path, x)?;
        let Base { weight, bias, .. } = self.as_base();
        let y = ops::linear::frozen(x, weight, None)?;
        let y = low_rank::added(&y, x, pass)?;
        low_rank::finished(y, pass.ratio.as_ref(), bias)?.to_dtype(x.dtype())
    }

    // The product is the same for all rows: only what is before and behind it differs.
    fn mixed(&self, path: &str, x: &Tensor, groups: &[Group]) -> candle_core::Result<Tensor> {
        self.check(path, x)?;
        let Base { weight, bias, .. } = self.as_base();
        let rotation = |group: &Group| !matches!(group.factors, Some(Factors::LowRank(_)));
        if groups.iter().all(rotation) && ops::mixed::has_kernel(x, weight) {
            let parts = groups.iter().map(|Group { rows, factors }| {
                let factors = match factors {
                    Some(Factors::Rotation { r, ratio }) => Some((r, ratio.as_ref())),
                    _ => None,
                };
                (rows.as_slice(), factors)
            });
            return ops::mixed::linear(x, &parts.collect::<Vec<_>>(), weight, bias);
        }
        let turned = mixed::each(x, groups, |x, factors| match factors {
            Some(Factors::Rotation { r, .. }) => ops::linear::rotated(x, r),
            _ => ops::linear::in_computed(x),
        })?;
        let y = ops::linear::frozen(&turned, weight, None)?;
        let plain = |factors: &Factors| matches!(factors, Factors::Rotation { ratio: None, .. });
        let behind = groups.iter().any(|g| g.factors.is_some_and(|f| !plain(f)));
        let y = match behind {
            false => y,
            true => mixed::each_of(&y, &turned, groups, |y, x, factors| match factors {
                Some(Factors::Rotation { ratio, .. }) => {
                    low_rank::finished(y.clone(), ratio.as_ref(), None)
                }
                Some(Factors::LowRank(pass)) => {
                    low_rank::finished(low_rank::added(y, x, pass)?, pass.ratio.as_ref(), None)
                }
                None => Ok(y.clone()),
            })?,
        };
        low_rank::finished(y, None, bias)?.to_dtype(x.dtype())
    }

    fn with_weight(&self, weight: Tensor) -> candle_nn::Linear {
        candle_nn::Linear::new(weight, self.bias().cloned())
    }
}
