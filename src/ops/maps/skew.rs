//! Packed rows to skew-symmetric blocks, and the gradient back.

use super::{Real, elements, no_kernel};
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

/// `(D, n)` to `(D, b, b)`: `Q[i,j] = v`, `Q[j,i] = -v`. Backward `dv = dQ[i,j] - dQ[j,i]`.
pub(crate) struct Skew(pub(crate) usize);

struct Fold;

impl CustomOp1 for Skew {
    fn name(&self) -> &'static str {
        "skew"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (blocks, _) = layout.shape().dims2()?;
        let b = self.0;
        let out = match storage {
            CpuStorage::F32(v) => CpuStorage::F32(unpack_all(elements(v, layout)?, blocks, b)),
            CpuStorage::F64(v) => CpuStorage::F64(unpack_all(elements(v, layout)?, blocks, b)),
            _ => return Err(no_kernel("skew")),
        };
        Ok((out, (blocks, b, b).into()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(grad.contiguous()?.apply_op1_no_bwd(&Fold)?))
    }
}

impl CustomOp1 for Fold {
    fn name(&self) -> &'static str {
        "skew backward"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (blocks, b, _) = layout.shape().dims3()?;
        let n = b * (b - 1) / 2;
        let out = match storage {
            CpuStorage::F32(g) => CpuStorage::F32(fold_all(elements(g, layout)?, blocks, b)),
            CpuStorage::F64(g) => CpuStorage::F64(fold_all(elements(g, layout)?, blocks, b)),
            _ => return Err(no_kernel("skew")),
        };
        Ok((out, (blocks, n).into()))
    }
}

fn unpack_all<T: Real>(theta: &[T], blocks: usize, b: usize) -> Vec<T> {
    let n = b * (b - 1) / 2;
    let mut out = vec![T::zero(); blocks * b * b];
    out.par_chunks_exact_mut(b * b)
        .enumerate()
        .for_each(|(d, q)| unpack(theta[d * n..(d + 1) * n].iter().copied(), b, q));
    out
}

fn fold_all<T: Real>(grad: &[T], blocks: usize, b: usize) -> Vec<T> {
    let n = b * (b - 1) / 2;
    let mut out = vec![T::zero(); blocks * n];
    if n > 0 {
        out.par_chunks_exact_mut(n)
            .zip(grad.par_chunks_exact(b * b))
            .for_each(|(out, g)| fold(g, b, T::one(), out));
    }
    out
}

/// The block of a packed row.
pub(super) fn unpack<T: Real>(mut row: impl Iterator<Item = T>, b: usize, q: &mut [T]) {
    for i in 0..b {
        for (j, v) in (i + 1..b).zip(&mut row) {
            q[i * b + j] = v;
            // Not `-v`: a zero stays +0, so that the start is the identity to the bit.
            q[j * b + i] = T::zero() - v;
        }
    }
}

/// The gradient of a packed row from that of its block, times `factor`.
pub(super) fn fold<T: Real>(g: &[T], b: usize, factor: T, out: &mut [T]) {
    let mut out = out.iter_mut();
    for i in 0..b {
        for (j, out) in (i + 1..b).zip(&mut out) {
            *out = (g[i * b + j] - g[j * b + i]) * factor;
        }
    }
}
