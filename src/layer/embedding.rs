//! [`DoftEmbedding`]: a frozen table whose looked-up rows are rotated, and scaled on request.

use super::adapted::{Adaptable, Doft};
use super::low_rank::LowRankPass;
use super::mode::Pass;
use crate::config::LayerKind;
use crate::frozen::{self, Frozen};
use crate::ops;
use candle_core::Tensor;

/// A frozen embedding, its rows rotated.
///
/// ```text
/// y = (m_id / n0_id) * (E[id] . blockdiag(R))
/// ```
///
/// that is, an embedding of table `diag(m / n0) E blockdiag(R)`. The magnitude, one for each token, is
/// off unless [`DoftConfig::embedding_magnitude`](crate::DoftConfig::embedding_magnitude) or a rule asks for it. A pass reads and turns the
/// rows in use, no others.
///
/// Modes and the meaning of "not adapted" are those of [`DoftLinear`](crate::DoftLinear).
///
/// # Shapes
///
/// Ids of any shape `(..)`, u8, u32 or i64; the answer is `(.., hidden)` in the dtype of a dense
/// table, f32 from a quantized one.
///
/// # Examples
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_doft::{DoftConfig, DoftEmbedding};
/// use candle_nn::{Embedding, Module, VarBuilder};
///
/// let table = Tensor::randn(0f32, 1., (10, 32), &Device::Cpu)?;
/// let vb = VarBuilder::zeros(DType::F32, &Device::Cpu).pp("embed_tokens");
/// let layer = DoftEmbedding::new(Embedding::new(table, 32), &DoftConfig::default(), vb)?;
/// assert_eq!(layer.forward(&Tensor::new(&[3u32, 1], &Device::Cpu)?)?.dims(), [2, 32]);
/// # Ok::<(), candle_doft::Error>(())
/// ```
pub type DoftEmbedding = Doft<frozen::Embedding>;

impl Adaptable for frozen::Embedding {
    const KIND: LayerKind = LayerKind::Embedding;

    type Candle = candle_nn::Embedding;

    fn adapted(&self, path: &str, ids: &Tensor, pass: Pass) -> candle_core::Result<Tensor> {
        let flat = self.check(path, ids)?;
        // Of the ratios, too, only those in use are read.
        let ratio = pass.ratio_at(&flat)?;
        let table = self.as_base().weight;
        let rows = ops::embedding::doft(table, &flat, &pass.r, ratio.as_ref())?;
        rows.reshape(self.answer(ids))
    }

    fn low_rank(
        &self,
        path: &str,
        ids: &Tensor,
        pass: &LowRankPass,
    ) -> candle_core::Result<Tensor> {
        let flat = self.check(path, ids)?;
        let rows = ops::embedding::rows(self.as_base().weight, &flat)?;
        // Column `id` of A, through B.
        let down = pass.a.t()?.contiguous()?.index_select(&flat, 0)?;
        let up = (down * pass.scale)?.matmul(&pass.b.t()?)?;
        let sum = rows
            .to_dtype(up.dtype())?
            .add(&up)?
            .to_dtype(rows.dtype())?;
        sum.reshape(self.answer(ids))
    }

    fn with_weight(&self, weight: Tensor) -> candle_nn::Embedding {
        candle_nn::Embedding::new(weight, self.hidden_size())
    }
}
