//! [`Params`]: the trainable state of one layer, packed rotation and magnitude, at the identity when
//! new.

use crate::config::{BlockLayout, Magnitude};
use crate::error::{Error, Result};
use crate::ops::Weight;
use candle_core::{DType, Device, Tensor};
use candle_nn::{Init, VarBuilder};

/// Elements of the weight that are looked at together when its row norms are taken.
const NORM_CHUNK: usize = 1 << 18;

/// Names of the trainable tensors under a layer's path, as in adapter files.
pub mod names {
    use crate::config::{LayerKind, Magnitude};

    /// The packed rotation of linear layers and convolutions.
    pub const ROTATION: &str = "oft_R.weight";
    /// The packed rotation of embeddings.
    pub const EMBEDDING_ROTATION: &str = "oft_embedding_R.weight";
    /// The magnitude of kind [`Log`](crate::Magnitude::Log).
    pub const LOG: &str = "dora_log_multiplier";
    /// The magnitude of kind [`Factor`](crate::Magnitude::Factor).
    pub const FACTOR: &str = "dora_multiplier";
    /// The magnitude of kind [`Absolute`](crate::Magnitude::Absolute).
    pub const ABSOLUTE: &str = "dora_scale";

    /// The name of the packed rotation of a kind of layer.
    pub fn rotation(kind: LayerKind) -> &'static str {
        match kind {
            LayerKind::Embedding => EMBEDDING_ROTATION,
            LayerKind::Linear | LayerKind::Conv1d | LayerKind::Conv2d => ROTATION,
        }
    }

    /// The name of the trained magnitude, if there is one.
    pub fn magnitude(kind: Magnitude) -> Option<&'static str> {
        match kind {
            Magnitude::Log => Some(LOG),
            Magnitude::Factor => Some(FACTOR),
            Magnitude::Absolute => Some(ABSOLUTE),
            Magnitude::None => None,
        }
    }
}

/// The trainable state of one layer.
///
/// | tensor | shape | at the start |
/// |---|---|---|
/// | `rotation` | `(D, n)`, or `(1, n)` when shared | 0 |
/// | magnitude, `Log` | `(out)` | 0 |
/// | magnitude, `Factor` | `(out)` | 1 |
/// | magnitude, `Absolute` | `(out)` | `n0` |
///
/// `n0` are the norms of the frozen rows. Since a rotation keeps them, they are taken once. The
/// magnitude is `m = n0 exp(mu)`, `m = n0 f`, or `m` itself; a layer scales its outputs by `m / n0`.
///
/// # Examples
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_doft::params::{Params, names, row_norms};
/// use candle_doft::{DoftConfig, Magnitude};
/// use candle_nn::{VarBuilder, VarMap};
///
/// let varmap = VarMap::new();
/// let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu).pp("head");
/// let weight = Tensor::new(&[[3f32, 4.], [0., 2.]], &Device::Cpu)?;
/// let layout = DoftConfig::default().with_block_size(2).layout("head", 2)?;
/// let params = Params::new(&layout, Magnitude::Log, row_norms(&weight)?, names::ROTATION, vb)?;
/// assert_eq!(params.rotation().dims(), [1, 1]);
/// assert_eq!(params.magnitude()?.to_vec1::<f32>()?, [5., 2.]);
/// # Ok::<(), candle_doft::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Params {
    rotation: Tensor,
    kind: Magnitude,
    magnitude: Option<Tensor>,
    norms: Tensor,
    alive: Option<Tensor>,
}

impl Params {
    /// Gets or makes the tensors under `vb`. `norms` are the row norms `n0` of the frozen weight,
    /// shape `(out)`; their dtype (f32 or f64) is that of the parameters.
    ///
    /// `rotation_name` is [`names::ROTATION`] or [`names::EMBEDDING_ROTATION`].
    ///
    /// # Errors
    ///
    /// Those of candle: when `vb` holds a tensor of another shape, or lacks one.
    pub fn new(
        layout: &BlockLayout,
        kind: Magnitude,
        norms: Tensor,
        rotation_name: &str,
        vb: VarBuilder,
    ) -> Result<Self> {
        let vb = vb.to_dtype(norms.dtype());
        let shape = (layout.rows(), layout.entries());
        let rotation = vb.get_with_hints(shape, rotation_name, Init::Const(0.))?;
        let out = norms.elem_count();
        let magnitude = match kind {
            Magnitude::Log => Some(vb.get_with_hints(out, names::LOG, Init::Const(0.))?),
            Magnitude::Factor => Some(vb.get_with_hints(out, names::FACTOR, Init::Const(1.))?),
            Magnitude::Absolute => Some(absolute(&norms, &vb)?),
            Magnitude::None => None,
        };
        let alive = norms.gt(0.)?;
        let dead = alive.to_dtype(DType::U32)?.sum_all()?.to_scalar::<u32>()? < out as u32;
        let alive = dead.then(|| alive.to_dtype(norms.dtype())).transpose()?;
        Ok(Self {
            rotation,
            kind,
            magnitude,
            norms,
            alive,
        })
    }

    /// The packed rotation `theta`.
    pub fn rotation(&self) -> &Tensor {
        &self.rotation
    }

    /// The trained magnitude parameter, whose meaning depends on [`Params::kind`].
    pub fn magnitude_parameter(&self) -> Option<&Tensor> {
        self.magnitude.as_ref()
    }

    /// How the magnitude is parametrised.
    pub fn kind(&self) -> Magnitude {
        self.kind
    }

    /// The norms `n0` of the frozen rows, shape `(out)`.
    pub fn norms(&self) -> &Tensor {
        &self.norms
    }

    /// `m / n0` for each output channel, shape `(out)`; none for plain OFT.
    ///
    /// A dead row (`n0 = 0`) has ratio 1 and passes no gradient.
    ///
    /// # Errors
    ///
    /// Those of candle's elementwise operations.
    pub fn ratio(&self) -> Result<Option<Tensor>> {
        self.ratio_of(|of_all| Ok(of_all.clone()))
    }

    /// `m / n0` of the rows that `ids` `(n)` (u32) name, shape `(n)`.
    ///
    /// # Errors
    ///
    /// When an id is out of range.
    pub fn ratio_at(&self, ids: &Tensor) -> Result<Option<Tensor>> {
        self.ratio_of(|of_all| of_all.index_select(ids, 0))
    }

    fn ratio_of(
        &self,
        rows: impl Fn(&Tensor) -> candle_core::Result<Tensor>,
    ) -> Result<Option<Tensor>> {
        let Some(p) = &self.magnitude else {
            return Ok(None);
        };
        let keep = self.alive.as_ref().map(&rows).transpose()?;
        let ratio = ratio(self.kind, rows(p)?, keep.as_ref(), || rows(&self.norms))?;
        Ok(Some(ratio))
    }

    /// `m` in units of norm, shape `(out)`, for every kind; `n0` for plain OFT.
    ///
    /// # Errors
    ///
    /// Those of candle's elementwise operations.
    pub fn magnitude(&self) -> Result<Tensor> {
        match self.ratio()? {
            Some(ratio) => Ok(ratio.mul(&self.norms)?),
            None => Ok(self.norms.clone()),
        }
    }
}

/// `m / n0` of the magnitude parameter `p`. `keep` is 1 for live rows and 0 for dead ones, whose ratio
/// is 1; none where all rows live.
pub(crate) fn ratio(
    kind: Magnitude,
    p: Tensor,
    keep: Option<&Tensor>,
    norms: impl FnOnce() -> candle_core::Result<Tensor>,
) -> candle_core::Result<Tensor> {
    let dead = keep.map(|keep| keep.affine(-1., 1.)).transpose()?;
    let kept = |p: Tensor| match (keep, &dead) {
        (Some(keep), Some(dead)) => p.mul(keep)?.add(dead),
        _ => Ok(p),
    };
    match kind {
        Magnitude::Log => match keep {
            Some(keep) => p.mul(keep)?.exp(),
            None => p.exp(),
        },
        Magnitude::Absolute => kept(p)?.div(&match &dead {
            Some(dead) => norms()?.add(dead)?,
            None => norms()?,
        }),
        Magnitude::Factor | Magnitude::None => kept(p),
    }
}

// `n0` is known only here, so an initial value cannot come from a hint.
fn absolute(norms: &Tensor, vb: &VarBuilder) -> Result<Tensor> {
    let fresh = !vb.contains_tensor(names::ABSOLUTE);
    let value = vb.get_with_hints(norms.elem_count(), names::ABSOLUTE, Init::Const(0.))?;
    if fresh {
        if !value.is_variable() {
            return Err(Error::Candle(candle_core::Error::CannotFindTensor {
                path: format!("{}.{}", vb.prefix(), names::ABSOLUTE),
            }));
        }
        candle_core::Var::from_tensor(&value)?.set(norms)?;
    }
    Ok(value)
}

/// The norm of each row of `weight` (its first axis), summed in f64 on CPU and in f32 elsewhere.
/// The answer is f64 for an f64 weight and f32 for any other; infinite only where it is above the range of
/// that. Reads a few rows at a time, so that no copy of the weight is made.
///
/// ```text
/// n0_i = ||W_i|| = sqrt(sum_j W_ij^2)
/// ```
///
/// # Shapes
///
/// `weight` is `(out, ..)`, of rank 2 or more, f32, f64, f16 or bf16; the answer is `(out)`.
///
/// # Errors
///
/// [`Error::Argument`] when `weight` is of another rank, has an empty axis, or is not a float tensor.
///
/// # Examples
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_doft::params::row_norms;
///
/// let weight = Tensor::new(&[[3f32, 4.], [0., 2.]], &Device::Cpu)?;
/// assert_eq!(row_norms(&weight)?.to_vec1::<f32>()?, [5., 2.]);
/// # Ok::<(), candle_doft::Error>(())
/// ```
pub fn row_norms(weight: &Tensor) -> Result<Tensor> {
    let refuse = |what, found: String, expected: &str| {
        Err(Error::argument("row_norms", what, found, expected))
    };
    if weight.rank() < 2 || weight.elem_count() == 0 {
        let found = format!("{:?}", weight.dims());
        return refuse("the shape of the weight", found, "(out, ..), no empty axis");
    }
    let dtype = match weight.dtype() {
        DType::F64 => DType::F64,
        DType::F32 | DType::F16 | DType::BF16 => DType::F32,
        other => {
            let expected = "F32, F64, F16 or BF16";
            return refuse("the dtype of the weight", format!("{other:?}"), expected);
        }
    };
    let wide = match weight.device() {
        Device::Cpu => DType::F64,
        _ => dtype,
    };
    let rows = weight.dim(0)?;
    let step = (NORM_CHUNK / (weight.elem_count() / rows)).max(1);
    let mut norms = Vec::new();
    for start in (0..rows).step_by(step) {
        let chunk = weight.narrow(0, start, step.min(rows - start))?;
        let chunk = chunk.detach().flatten_from(1)?.to_dtype(wide)?;
        norms.push(norms_of_rows(&chunk)?.to_dtype(dtype)?);
    }
    Ok(Tensor::cat(&norms, 0)?)
}

/// The norms of the rows of a matrix, in its dtype, f32 or f64. Rows whose squares leave the range of that
/// are divided by their largest entry first.
fn norms_of_rows(rows: &Tensor) -> Result<Tensor> {
    let norms = rows.sqr()?.sum(1)?.sqrt()?;
    let (least, most) = match rows.dtype() {
        DType::F64 => ((f64::MIN_POSITIVE / f64::EPSILON).sqrt(), f64::MAX),
        _ => (
            f64::from(f32::MIN_POSITIVE / f32::EPSILON).sqrt(),
            f64::from(f32::MAX),
        ),
    };
    // On the host, for Metal has no f64.
    let host = norms.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
    let host: Vec<f64> = host.to_vec1()?;
    if host.iter().all(|norm| (least..=most).contains(norm)) {
        return Ok(norms);
    }
    let largest = rows.abs()?.max_keepdim(1)?;
    // A row of zeros is left as it is.
    let by = largest
        .eq(0.)?
        .where_cond(&largest.ones_like()?, &largest)?;
    let scaled = rows.broadcast_div(&by)?.sqr()?.sum(1)?.sqrt()?;
    Ok(scaled.mul(&by.squeeze(1)?)?)
}

/// [`row_norms`] of a weight that may be quantized. A panel of rows is expanded at a time on CPU, the
/// whole elsewhere.
pub(crate) fn row_norms_of(weight: &Weight) -> Result<Tensor> {
    if weight.qtensor().is_none() || !matches!(weight.device(), Device::Cpu) {
        return row_norms(&weight.tensor()?);
    }
    let mut norms = Vec::with_capacity(weight.out_dim());
    weight.panels::<f32>(0..weight.out_dim(), |_, panel| {
        for row in 0..panel.rows() {
            let squares = (0..panel.cols()).map(|col| f64::from(panel.at(row, col)).powi(2));
            norms.push(squares.sum::<f64>().sqrt() as f32);
        }
    })?;
    Ok(Tensor::new(norms, &Device::Cpu)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn norms_that_fit_are_right_though_their_squares_do_not() -> Result<()> {
        let unit = Tensor::new(&[[3f64, 4.], [0., 0.], [0., -2.]], &Device::Cpu)?;
        for (dtype, scales, rel) in [
            (DType::F32, [1., 1e19, 5e37, 1e-23, 1e-38], 1e-6),
            (DType::F64, [1., 1e160, 3e307, 1e-170, 1e-300], 1e-14),
        ] {
            for scale in scales {
                let norms = norms_of_rows(&(&unit * scale)?.to_dtype(dtype)?)?;
                assert_eq!(norms.dtype(), dtype);
                let norms = norms.to_dtype(DType::F64)?.to_vec1::<f64>()?;
                for (norm, expected) in norms.iter().zip([5., 0., 2.]) {
                    let expected = expected * scale;
                    assert!(
                        (norm - expected).abs() <= rel * expected,
                        "{norm:e}, {expected:e}"
                    );
                }
            }
        }
        let beyond = Tensor::new(&[[3e38f32, 3e38], [f32::NAN, 1.]], &Device::Cpu)?;
        let norms = norms_of_rows(&beyond)?.to_vec1::<f32>()?;
        assert!(norms[0] == f32::INFINITY && norms[1].is_nan(), "{norms:?}");
        Ok(())
    }
}
