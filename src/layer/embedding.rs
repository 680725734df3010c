//! [`DoftEmbedding`]: a frozen table whose looked-up rows are rotated, and scaled on request.

use super::Adaptation;
use super::adaptation::Pass;
use super::common::layer_methods;
use crate::error::Result;
use crate::frozen::{self, Frozen};
use crate::ops;
use candle_core::Tensor;
use std::sync::Arc;

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
/// Dropout, switches and the meaning of "not adapted" are those of [`DoftLinear`](crate::DoftLinear).
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
#[derive(Clone, Debug)]
pub struct DoftEmbedding {
    path: Arc<str>,
    base: frozen::Embedding,
    adaptation: Option<Arc<Adaptation>>,
}

impl DoftEmbedding {
    /// The same layer as a candle layer, for inference without this crate.
    ///
    /// # Errors
    ///
    /// Those of [`DoftEmbedding::effective_weight`].
    pub fn merge(&self) -> Result<candle_nn::Embedding> {
        let hidden = self.base.hidden_size();
        Ok(candle_nn::Embedding::new(self.effective_weight()?, hidden))
    }

    fn run(&self, ids: &Tensor, pass: Pass) -> candle_core::Result<Tensor> {
        let flat = self.base.check(&self.path, ids)?;
        // Of the ratios, too, only those in use are read.
        let ratio = pass.ratio_at(&flat)?;
        let table = self.base.as_base().weight;
        let rows = ops::embedding::doft(table, &flat, &pass.r, ratio.as_ref())?;
        rows.reshape(self.base.answer(ids))
    }
}

layer_methods!(DoftEmbedding, frozen::Embedding, Embedding);
