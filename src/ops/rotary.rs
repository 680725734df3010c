//! Causal attention of queries and keys that are turned by their position first.
//!
//! Their turned copies are made again on the way back: a turn costs a pass over them, keeping them
//! would cost q and k once more for every block of a model.

use super::attention::Attention;
use super::pointwise::Rope;
use candle_core::{CpuStorage, CustomOp1, CustomOp3, Layout, Result, Shape, Tensor};

/// The op. Its arguments and its answer are those of [`Attention`].
pub(crate) struct RotaryAttention {
    pub(crate) attention: Attention,
    pub(crate) rope: Rope,
}

impl CustomOp3 for RotaryAttention {
    fn name(&self) -> &'static str {
        "rotary-causal-attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        ql: &Layout,
        k: &CpuStorage,
        kl: &Layout,
        v: &CpuStorage,
        vl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (q, of_q) = self.rope.cpu_fwd(q, ql)?;
        let (k, of_k) = self.rope.cpu_fwd(k, kl)?;
        let (ql, kl) = (Layout::contiguous(of_q), Layout::contiguous(of_k));
        self.attention.cpu_fwd(&q, &ql, &k, &kl, v, vl)
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let turned = |x: &Tensor| x.detach().apply_op1_no_bwd(&self.rope);
        let (tq, tk) = (turned(q)?, turned(k)?);
        let (dq, dk, dv) = self.attention.bwd(&tq, &tk, v, y, dy)?;
        let back = |d: Option<Tensor>| match d {
            Some(d) => self.rope.bwd(&d, &d, &d),
            None => Ok(None),
        };
        Ok((back(dq)?, back(dk)?, dv))
    }
}
