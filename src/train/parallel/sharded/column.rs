//! [`ColumnParallel`] and [`DoftColumnParallel`]: linear layers whose outputs are split over the ranks.

use super::adapted::{Part, Split};
use super::check_parts;
use super::exchange::{Exchange, Link};
use super::sums::entered;
use crate::config::DoftConfig;
use crate::error::Result;
use crate::frozen::{Frozen, Linear};
use crate::ops;
use crate::params::Params;
use candle_core::Tensor;
use candle_nn::{Module, VarBuilder};

/// A frozen linear layer whose outputs are split: each rank has some rows of the weight.
///
/// ```text
/// y_k = x . W_k^T + bias_k,    dx = sum_k dy_k . W_k
/// ```
///
/// The outputs stay split; a [`RowParallel`](super::RowParallel) layer takes them as they are. The gradient of the
/// input is summed over the ranks in the backward pass: tokens times inputs travel. All ranks run the same layers on
/// the same input, in the same order; a rank that returns an error leaves the others waiting until its
/// group is dropped.
///
/// # Shapes
///
/// With `N` ranks: the part of the weight `(out / N, in)`, of the bias `(out / N)`; `x` is `(.., in)`, the output
/// `(.., out / N)`. Rank `k` has the `k`-th part.
///
/// # Examples
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_doft::frozen::Linear;
/// use candle_doft::train::parallel::{ColumnParallel, Exchange, Processes, RowParallel, open};
/// use candle_nn::Module;
///
/// let group = Exchange::new(open()?);
/// let (rank, part) = (group.rank(), 4 / group.size());
/// let up = Tensor::ones((4, 2), candle_core::DType::F32, &Device::Cpu)?;
/// let up = Linear::new(up.narrow(0, rank * part, part)?.contiguous()?, None);
/// let down = Tensor::ones((3, 4), candle_core::DType::F32, &Device::Cpu)?;
/// let down = Linear::new(down.narrow(1, rank * part, part)?.contiguous()?, None);
///
/// let up = ColumnParallel::new(up, &group)?;
/// let down = RowParallel::new(down, &group)?;
/// let x = Tensor::new(&[[1f32, 2.]], &Device::Cpu)?;
/// let y = down.forward(&up.forward(&x)?)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[12., 12., 12.]]);
/// Box::new(group).finish()?;
/// # Ok::<(), candle_doft::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct ColumnParallel {
    part: Linear,
    link: Link,
}

/// What errors call layers that have no path.
const UNNAMED: &str = "the column-parallel layer";

impl ColumnParallel {
    /// The layer of which this rank has `part`. Called by all ranks.
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

impl Module for ColumnParallel {
    /// # Errors
    ///
    /// For an input that the layer cannot take, and in another thread than that of the group.
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.part.check(UNNAMED, x)?;
        self.part.forward(&entered(self.link, x)?)
    }
}

/// A [`DoftLinear`](crate::DoftLinear) whose outputs are split: each rank has some rows of the weight.
///
/// ```text
/// y_k = (m_k / n0_k) * ((x . blockdiag(R)) . W_k^T) + bias_k
/// ```
///
/// Every rank has the whole rotation, and the magnitudes of its rows. The backward pass sums the gradients of `x`
/// and of `theta` over the ranks, so every rank has them whole and the copies of `theta` stay equal; that of `m`
/// is local.
///
/// The norm of all gradients is not that of the ones at hand: where they are clipped, count those of
/// `theta` once and add the squares of all ranks.
///
/// # Shapes
///
/// As [`ColumnParallel`]; `theta` is that of the whole layer, `m` has one value for each row of the part.
///
/// # Examples
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_doft::frozen::Linear;
/// use candle_doft::train::parallel::{self, DoftColumnParallel, Exchange, Processes, open};
/// use candle_doft::{Adapter, DoftConfig};
/// use candle_nn::{Module, VarBuilder, VarMap};
///
/// let group = Exchange::new(open()?);
/// let (rank, part) = (group.rank(), 8 / group.size());
/// let whole = Tensor::ones((8, 32), DType::F32, &Device::Cpu)?;
/// let weight = whole.narrow(0, rank * part, part)?.contiguous()?;
/// let varmap = VarMap::new(); // what is trained
/// let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu).pp("up");
/// let up = DoftColumnParallel::new(Linear::new(weight, None), &DoftConfig::default(), &group, vb)?;
/// let y = up.forward(&Tensor::ones((1, 32), DType::F32, &Device::Cpu)?)?;
/// assert_eq!(y.dims(), [1, part]);
///
/// # let folder = tempfile::tempdir().unwrap();
/// # let path = folder.path().join("adapter.safetensors");
/// parallel::save(&group, &path, &[&up])?; // the adapter of the whole layer
/// let builder = Adapter::load(&path, &Device::Cpu)?;
/// builder.wrap("up", candle_nn::Linear::new(whole, None))?;
/// builder.finish()?;
/// Box::new(group).finish()?;
/// # Ok::<(), candle_doft::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct DoftColumnParallel(pub(super) Part);

impl DoftColumnParallel {
    /// Adapts the layer of which this rank has `part`. Called by all ranks. Parameters are taken from `vb`, whose
    /// prefix is the path of the layer, in the shapes of this rank.
    ///
    /// # Errors
    ///
    /// Those of [`DoftLinear::new`](crate::layer::Doft::new); for parts or configurations that differ between
    /// ranks, low-rank matrices and dropout. If one rank has an error, all have.
    pub fn new(
        part: impl Into<Linear>,
        config: &DoftConfig,
        group: &Exchange,
        vb: VarBuilder,
    ) -> Result<Self> {
        let function = "DoftColumnParallel::new";
        let part = Part::new(function, Split::Outputs, part.into(), config, group, vb)?;
        Ok(Self(part))
    }

    /// The parameters of this rank.
    pub fn params(&self) -> &Params {
        &self.0.params
    }

    /// The rows of this rank of the weight with the adapter in it.
    ///
    /// # Errors
    ///
    /// Those of candle's operations.
    pub fn effective_weight(&self) -> Result<Tensor> {
        self.0.effective_weight()
    }
}

impl Module for DoftColumnParallel {
    /// # Errors
    ///
    /// For an input that the layer cannot take, and in another thread than that of the group.
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let part = &self.0;
        part.linear.check(&part.path, x)?;
        let (r, ratio) = (part.rotation()?, part.params.ratio()?);
        let base = part.linear.as_base();
        let x = entered(part.link, x)?;
        ops::linear::doft(&x, &r, ratio.as_ref(), base.weight, base.bias)
    }
}
