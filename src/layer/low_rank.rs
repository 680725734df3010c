//! [`LowRankParams`]: the trainable matrices of LoRA and DoRA, and what they are in one pass.

use crate::config::{LayerKind, LowRank};
use crate::error::{Error, Result};
use crate::frozen::Base;
use crate::ops;
use crate::params::{low_rank_rows, names};
use crate::rng::SplitMix64;
use candle_core::{D, DType, Device, Tensor};
use candle_nn::{Init, VarBuilder};

/// `A`, `B` and, for DoRA, the magnitude of one layer, in the shapes that PEFT gives them.
///
/// | layer | `A` | `B` |
/// |---|---|---|
/// | linear | `(r, in)` | `(out, r)` |
/// | convolution | `(r, in, k ..)` | `(out, r, 1 ..)` |
/// | embedding | `(r, vocabulary)` | `(hidden, r)` |
#[derive(Clone, Debug)]
pub(crate) struct LowRankParams {
    spec: LowRank,
    kind: LayerKind,
    a: Tensor,
    b: Tensor,
    magnitude: Option<Tensor>,
    /// Row norms of the base.
    norms: Tensor,
}

/// The matrices of one pass, a part of the graph or held.
#[derive(Clone, Debug)]
pub struct LowRankPass {
    pub(crate) a: Tensor,
    pub(crate) b: Tensor,
    pub(crate) scale: f64,
    /// `m / ||V||` of DoRA.
    pub(crate) ratio: Option<Tensor>,
}

impl LowRankParams {
    /// Gets or makes the tensors under `vb`, whose prefix is the path of the layer.
    pub(super) fn new(
        spec: LowRank,
        kind: LayerKind,
        base: &Base,
        norms: Tensor,
        seed: u64,
        vb: VarBuilder,
    ) -> Result<Self> {
        let path = vb.prefix();
        let vb = vb.to_dtype(norms.dtype());
        if spec.dora && kind != LayerKind::Linear {
            let found = format!("DoRA for the {kind:?} layer `{path}`");
            return Err(Error::config("low_rank", found, "LoRA, or a linear layer"));
        }
        let rank = spec.rank;
        let shape = base.shape;
        let (a, b) = match kind {
            LayerKind::Embedding => (vec![rank, shape[0]], vec![shape[1], rank]),
            _ => {
                let ones = std::iter::repeat_n(1, shape.len() - 2);
                let a = [&[rank], &shape[1..]].concat();
                (a, [shape[0], rank].into_iter().chain(ones).collect())
            }
        };
        let (name_a, name_b) = names::low_rank(kind);
        // One of the two is 0, so that a fresh layer is its base.
        let (a, b) = match kind {
            LayerKind::Embedding => {
                let a = vb.get_with_hints(a, name_a, Init::Const(0.))?;
                (a, drawn(b, name_b, seed, &vb, SplitMix64::normal)?)
            }
            _ => {
                let width: usize = shape[1..].iter().product();
                let bound = 1. / (width as f64).sqrt();
                let uniform = |rng: &mut SplitMix64| bound * (2. * rng.uniform() - 1.);
                let a = drawn(a, name_a, seed, &vb, uniform)?;
                (a, vb.get_with_hints(b, name_b, Init::Const(0.))?)
            }
        };
        let magnitude = match spec.dora {
            true => Some(started(&norms, names::DORA, &vb)?),
            false => None,
        };
        Ok(Self {
            spec,
            kind,
            a,
            b,
            magnitude,
            norms,
        })
    }

    pub(crate) fn spec(&self) -> LowRank {
        self.spec
    }

    pub(crate) fn a(&self) -> &Tensor {
        &self.a
    }

    pub(crate) fn b(&self) -> &Tensor {
        &self.b
    }

    pub(crate) fn magnitude(&self) -> Option<&Tensor> {
        self.magnitude.as_ref()
    }

    pub(crate) fn norms(&self) -> &Tensor {
        &self.norms
    }

    /// The matrices as a part of the graph.
    pub(super) fn pass(&self, base: &Base) -> Result<LowRankPass> {
        Ok(LowRankPass {
            a: self.a.clone(),
            b: self.b.clone(),
            scale: self.spec.scale(),
            ratio: self.ratio(base)?,
        })
    }

    /// The same outside any graph, as they are now.
    pub(super) fn held(&self, base: &Base) -> Result<LowRankPass> {
        let copy = |t: &Tensor| t.detach().copy();
        Ok(LowRankPass {
            a: copy(&self.a)?,
            b: copy(&self.b)?,
            scale: self.spec.scale(),
            ratio: self.ratio(base)?.map(|ratio| ratio.detach()),
        })
    }

    /// `m / ||V||`, the norm a constant. It is taken without forming `V`:
    /// `||V||^2 = ||W||^2 + 2 s <A W^T, B^T> + s^2 <B (A A^T), B>`.
    fn ratio(&self, base: &Base) -> Result<Option<Tensor>> {
        let Some(magnitude) = &self.magnitude else {
            return Ok(None);
        };
        let (a, b, s) = (self.a.detach(), self.b.detach(), self.spec.scale());
        let cross = ops::linear::frozen(&a, base.weight, None)?;
        let cross = cross.t()?.mul(&b)?.sum(1)?;
        let square = b.matmul(&a.matmul(&a.t()?)?)?.mul(&b)?.sum(1)?;
        let sum = ((self.norms.sqr()? + (cross * (2. * s))?)? + (square * (s * s))?)?;
        // Rounding may leave less than nothing where V is nearly zero; a row of zeros stays one.
        let norm = sum.relu()?.sqrt()?;
        let norm = (&norm + norm.eq(0.)?.to_dtype(norm.dtype())?)?;
        Ok(Some(magnitude.div(&norm)?))
    }

    /// The weight with the matrices in it, computed in the dtype of the parameters, rounded once.
    pub(super) fn effective_weight(&self, base: &Base, weight: &Tensor) -> Result<Tensor> {
        let LowRankPass { a, b, scale, ratio } = self.held(base)?;
        let delta = low_rank_rows(self.kind, &a, &b, scale)?;
        let mut sum = weight
            .to_dtype(delta.dtype())?
            .add(&delta.reshape(weight.shape())?)?;
        if let Some(ratio) = ratio {
            sum = sum.broadcast_mul(&ratio.unsqueeze(1)?)?;
        }
        Ok(sum.to_dtype(weight.dtype())?)
    }
}

/// `y + s (x A^T) B^T`, in the dtype of `y`.
pub(super) fn added(y: &Tensor, x: &Tensor, pass: &LowRankPass) -> candle_core::Result<Tensor> {
    let dtype = match y.dtype() {
        DType::F16 | DType::BF16 => DType::F32,
        dtype => dtype,
    };
    // candle's product wants one matrix; the scale goes where the tensor is small.
    let rows = x.elem_count() / x.dim(D::Minus1)?.max(1);
    let flat = x.reshape((rows, ()))?.to_dtype(dtype)?;
    let down = flat.matmul(&pass.a.to_dtype(dtype)?.t()?)?;
    let up = (down * pass.scale)?.matmul(&pass.b.to_dtype(dtype)?.t()?)?;
    y.to_dtype(dtype)?.add(&up.reshape(y.shape())?)
}

/// `ratio * y + bias`, with what there is.
pub(super) fn finished(
    y: Tensor,
    ratio: Option<&Tensor>,
    bias: Option<&Tensor>,
) -> candle_core::Result<Tensor> {
    let y = match ratio {
        Some(ratio) => y.broadcast_mul(&ratio.to_dtype(y.dtype())?)?,
        None => y,
    };
    match bias {
        Some(bias) => y.broadcast_add(&bias.to_dtype(y.dtype())?),
        None => Ok(y),
    }
}

/// A tensor whose values are drawn from the seed and its name: candle's own draws take no seed on CPU.
fn drawn(
    shape: Vec<usize>,
    name: &str,
    seed: u64,
    vb: &VarBuilder,
    mut draw: impl FnMut(&mut SplitMix64) -> f64,
) -> Result<Tensor> {
    let path = format!("{}.{name}", vb.prefix());
    let mut rng = SplitMix64::stream(seed, &path, [0, 0]);
    let count = shape.iter().product();
    let values: Vec<f64> = std::iter::repeat_with(|| draw(&mut rng))
        .take(count)
        .collect();
    let values = Tensor::from_vec(values, shape, &Device::Cpu)?;
    started(
        &values.to_dtype(vb.dtype())?.to_device(vb.device())?,
        name,
        vb,
    )
}

/// A tensor that starts as `value`, where `vb` makes tensors; else what `vb` has.
fn started(value: &Tensor, name: &str, vb: &VarBuilder) -> Result<Tensor> {
    let known = vb.contains_tensor(name);
    let tensor = vb.get_with_hints(value.shape(), name, Init::Const(0.))?;
    if known {
        return Ok(tensor);
    }
    if !tensor.is_variable() {
        return Err(Error::Candle(candle_core::Error::CannotFindTensor {
            path: format!("{}.{name}", vb.prefix()),
        }));
    }
    candle_core::Var::from_tensor(&tensor)?.set(value)?;
    Ok(tensor)
}
