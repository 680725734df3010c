//! The weight that acts, for merging and for looking at.

use crate::config::LayerKind;
use crate::error::Result;
use candle_core::Tensor;

/// Elements that are rotated together, so that a merge needs little beside its answer.
const CHUNK: usize = 1 << 20;

/// `diag(ratio) W_flat blockdiag(R)^T` in the shape of `weight`, whose first axis are the outputs; for
/// an embedding `diag(ratio) E blockdiag(R)`, because there the rows are what goes in.
///
/// Computed in the dtype of `r` (f32 or f64), some rows at a time, and rounded once to the dtype of
/// `weight`. `r` is `(D, b, b)`, or `(1, b, b)` when shared; `ratio` is `(out)`.
pub(crate) fn effective_weight(
    kind: LayerKind,
    weight: &Tensor,
    r: &Tensor,
    ratio: Option<&Tensor>,
) -> Result<Tensor> {
    let flat = weight.detach().flatten_from(1)?;
    let (out, width) = flat.dims2()?;
    let b = r.dim(1)?;
    let blocks = width / b;
    let r = match kind {
        LayerKind::Embedding => r.clone(),
        LayerKind::Linear | LayerKind::Conv1d | LayerKind::Conv2d => r.transpose(1, 2)?,
    };
    let turn = r.broadcast_as((blocks, b, b))?.contiguous()?;
    let step = (CHUNK / width.max(1)).max(1);
    let mut parts = Vec::new();
    for start in (0..out).step_by(step) {
        let rows = step.min(out - start);
        let part = flat.narrow(0, start, rows)?.to_dtype(r.dtype())?;
        let part = part
            .reshape((rows, blocks, b))?
            .transpose(0, 1)?
            .contiguous()?;
        let mut part = part
            .matmul(&turn)?
            .transpose(0, 1)?
            .reshape((rows, width))?;
        if let Some(ratio) = ratio {
            let ratio = ratio.narrow(0, start, rows)?.to_dtype(r.dtype())?;
            part = part.broadcast_mul(&ratio.unsqueeze(1)?)?;
        }
        parts.push(part.to_dtype(weight.dtype())?);
    }
    Ok(Tensor::cat(&parts, 0)?.reshape(weight.shape())?)
}
