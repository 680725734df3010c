//! [`RowParallel`] and [`DoftRowParallel`]: linear layers whose inputs are split over the ranks.

use super::adapted::{Part, Split};
use super::check_parts;
use super::exchange::{Exchange, Link};
use super::sums::left;
use crate::config::DoftConfig;
use crate::error::Result;
use crate::frozen::{Frozen, Linear};
use crate::ops;
use crate::params::Params;
use candle_core::{DType, Tensor};
use candle_nn::{Module, VarBuilder};

/// A frozen linear layer whose inputs are split: each rank has some columns of the weight.
///
/// ```text
/// y = sum_k x_k . W_k^T + bias,    dx_k = dy . W_k
/// ```
///
/// The sum over the ranks is made in the forward pass: tokens times outputs travel; its gradient is whole on every
/// rank, and that of the input stays split. All ranks run the same layers in the same order; a rank that
/// returns an error leaves the others waiting until its group is dropped. For an example see
/// [`ColumnParallel`](super::ColumnParallel).
///
/// # Shapes
///
/// With `N` ranks: the part of the weight `(out, in / N)`, the bias `(out)`, the same on every rank; `x` is
/// `(.., in / N)`, the output `(.., out)`. Rank `k` has the `k`-th part.
#[derive(Clone, Debug)]
pub struct RowParallel {
    part: Linear,
    link: Link,
}

/// What errors call layers that have no path.
const UNNAMED: &str = "the row-parallel layer";

impl RowParallel {
    /// The layer of which this rank has `part`, with the whole bias. Called by all ranks.
    ///
    /// # Errors
    ///
    /// If the part has no weight that a layer can have, or ranks have parts of different shapes; on all ranks.
    pub fn new(part: impl Into<Linear>, group: &Exchange) -> Result<Self> {
        let part = part.into();
        check_parts(group, UNNAMED, &part)?;
        Ok(Self {
            part,
            link: group.link(),
        })
    }

    /// The part of this rank.
    pub fn part(&self) -> &Linear {
        &self.part
    }
}

impl Module for RowParallel {
    /// # Errors
    ///
    /// For an input that the layer cannot take, and in another thread than that of the group.
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.part.check(UNNAMED, x)?;
        let base = self.part.as_base();
        let sum = left(self.link, &ops::linear::frozen(x, base.weight, None)?)?;
        finished(&sum, None, base.bias)
    }
}

/// A [`DoftLinear`](crate::DoftLinear) whose inputs are split at the edges of its blocks: each rank has some columns
/// of the weight.
///
/// ```text
/// z = sum_k (x_k . blockdiag(R_k)) . W_k^T
/// y = (m / n0) * z + bias,    n0_o = sqrt(sum_k ||W_k,o||^2)
/// ```
///
/// Every rank has the rotations of its inputs, and all magnitudes. `z` is summed over the ranks in the forward
/// pass; magnitude and bias come after the sum, so the gradients of `m` are whole on every rank without more
/// exchange, and its copies stay equal. The norms `n0` are those of whole rows, summed once when the layer
/// is made. Gradients of `theta` are local, but of a block that all inputs share they are summed in the
/// backward pass.
///
/// The norm of all gradients is not that of the ones at hand: where they are clipped, count those of `m`
/// once and add the squares of all ranks.
///
/// # Shapes
///
/// As [`RowParallel`]; `in / N` is a multiple of the block size. `theta` has one row for each block of this rank,
/// `m` is that of the whole layer.
///
/// # Examples
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_doft::DoftConfig;
/// use candle_doft::frozen::Linear;
/// use candle_doft::train::parallel::{DoftRowParallel, Exchange, Processes, open};
/// use candle_nn::{Module, VarBuilder, VarMap};
///
/// let group = Exchange::new(open()?);
/// let (rank, part) = (group.rank(), 64 / group.size());
/// let weight = Tensor::ones((8, 64), DType::F32, &Device::Cpu)?;
/// let weight = weight.narrow(1, rank * part, part)?.contiguous()?;
/// let varmap = VarMap::new(); // what is trained
/// let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu).pp("down");
/// let down = DoftRowParallel::new(Linear::new(weight, None), &DoftConfig::default(), &group, vb)?;
/// let y = down.forward(&Tensor::ones((1, part), DType::F32, &Device::Cpu)?)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[64.; 8]]);
/// assert_eq!(down.params().norms().to_vec1::<f32>()?, [8.; 8]); // of rows of 64 ones
/// Box::new(group).finish()?;
/// # Ok::<(), candle_doft::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct DoftRowParallel(pub(super) Part);

impl DoftRowParallel {
    /// Adapts the layer of which this rank has `part`, with the whole bias. Called by all ranks. Parameters are taken
    /// from `vb`, whose prefix is the path of the layer, in the shapes of this rank.
    ///
    /// # Errors
    ///
    /// Those of [`DoftLinear::new`](crate::layer::Doft::new); for a width that cuts a block, parts or configurations
    /// that differ between ranks, low-rank matrices and dropout. If one rank has an error, all have.
    pub fn new(
        part: impl Into<Linear>,
        config: &DoftConfig,
        group: &Exchange,
        vb: VarBuilder,
    ) -> Result<Self> {
        let function = "DoftRowParallel::new";
        let part = Part::new(function, Split::Inputs, part.into(), config, group, vb)?;
        Ok(Self(part))
    }

    /// The parameters of this rank.
    pub fn params(&self) -> &Params {
        &self.0.params
    }

    /// The columns of this rank of the weight with the adapter in it.
    ///
    /// # Errors
    ///
    /// Those of candle's operations.
    pub fn effective_weight(&self) -> Result<Tensor> {
        self.0.effective_weight()
    }
}

impl Module for DoftRowParallel {
    /// # Errors
    ///
    /// For an input that the layer cannot take, and in another thread than that of the group.
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let part = &self.0;
        part.linear.check(&part.path, x)?;
        let base = part.linear.as_base();
        let z = ops::linear::doft(x, &part.rotation()?, None, base.weight, None)?;
        let z = left(part.link, &z)?;
        finished(&z, part.params.ratio()?.as_ref(), base.bias)
    }
}

/// `ratio * z + bias` in f32 or wider, in the dtype of `z`.
fn finished(
    z: &Tensor,
    ratio: Option<&Tensor>,
    bias: Option<&Tensor>,
) -> candle_core::Result<Tensor> {
    if ratio.is_none() && bias.is_none() {
        return Ok(z.clone());
    }
    let wide = match z.dtype() {
        DType::F64 => DType::F64,
        _ => DType::F32,
    };
    let mut y = z.to_dtype(wide)?;
    if let Some(ratio) = ratio {
        y = y.broadcast_mul(&ratio.to_dtype(wide)?)?;
    }
    if let Some(bias) = bias {
        y = y.broadcast_add(&bias.to_dtype(wide)?)?;
    }
    y.to_dtype(z.dtype())
}
