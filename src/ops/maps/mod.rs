//! The maps from packed parameters to rotation blocks: CPU kernels in f32 and f64, one block after
//! the other on rayon's threads, and [`composed`] for every other device.
//!
//! A block is computed by one thread in a fixed order, so the answer does not depend on their number,
//! and a NaN stays in its block.

mod cayley;
mod clip;
pub(crate) mod composed;
mod dense;
pub(crate) mod eigen;
mod exponential;
mod series;
mod skew;
mod turn;

pub(crate) use cayley::Cayley;
pub(crate) use clip::Clip;
#[cfg(test)]
pub(crate) use clip::spectral_norm;
pub(crate) use exponential::Exponential;
pub(crate) use series::{Series, coefficients};
pub(crate) use skew::Skew;
pub(crate) use turn::turn;

use super::real::Real;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

/// A function from one square block to another, with its derivative.
pub(crate) trait Map: Clone + Send + Sync + 'static {
    const NAME: &'static str;

    /// Whether the derivative is taken from the result; else from the argument.
    const KEEPS_RESULT: bool = false;

    /// Writes the answer for the row-major block `q` of size `b`.
    fn forward<T: Real>(&self, q: &[T], b: usize, out: &mut [T]);

    /// Writes `dL/dQ` for `grad = dL/dR`; `kept` is the argument or the result.
    fn backward<T: Real>(&self, kept: &[T], grad: &[T], b: usize, out: &mut [T]);
}

/// Runs a map on contiguous `(D, b, b)` blocks.
pub(crate) fn apply<M: Map>(q: &Tensor, map: M) -> Result<Tensor> {
    q.contiguous()?.apply_op1(Forward(map))
}

struct Forward<M>(M);

struct Backward<M>(M);

impl<M: Map> CustomOp1 for Forward<M> {
    fn name(&self) -> &'static str {
        M::NAME
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let out = match storage {
            CpuStorage::F32(q) => CpuStorage::F32(forward(&self.0, elements(q, layout)?, layout)?),
            CpuStorage::F64(q) => CpuStorage::F64(forward(&self.0, elements(q, layout)?, layout)?),
            _ => return Err(no_kernel(M::NAME)),
        };
        Ok((out, layout.shape().clone()))
    }

    fn bwd(&self, arg: &Tensor, res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let kept = if M::KEEPS_RESULT { res } else { arg };
        let op = Backward(self.0.clone());
        let (kept, grad) = (kept.contiguous()?, grad.contiguous()?);
        Ok(Some(kept.apply_op2_no_bwd(&grad, &op)?))
    }
}

impl<M: Map> CustomOp2 for Backward<M> {
    fn name(&self) -> &'static str {
        M::NAME
    }

    fn cpu_fwd(
        &self,
        kept: &CpuStorage,
        kept_layout: &Layout,
        grad: &CpuStorage,
        grad_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (map, l, m) = (&self.0, kept_layout, grad_layout);
        let out = match (kept, grad) {
            (CpuStorage::F32(kept), CpuStorage::F32(grad)) => {
                CpuStorage::F32(backward(map, elements(kept, l)?, elements(grad, m)?, l)?)
            }
            (CpuStorage::F64(kept), CpuStorage::F64(grad)) => {
                CpuStorage::F64(backward(map, elements(kept, l)?, elements(grad, m)?, l)?)
            }
            _ => return Err(no_kernel(M::NAME)),
        };
        Ok((out, l.shape().clone()))
    }
}

fn forward<M: Map, T: Real>(map: &M, q: &[T], layout: &Layout) -> Result<Vec<T>> {
    let (_, b, _) = layout.shape().dims3()?;
    let mut out = vec![T::zero(); q.len()];
    out.par_chunks_exact_mut(b * b)
        .zip(q.par_chunks_exact(b * b))
        .for_each(|(out, q)| map.forward(q, b, out));
    Ok(out)
}

fn backward<M: Map, T: Real>(map: &M, kept: &[T], grad: &[T], layout: &Layout) -> Result<Vec<T>> {
    let (_, b, _) = layout.shape().dims3()?;
    let mut out = vec![T::zero(); kept.len()];
    out.par_chunks_exact_mut(b * b)
        .zip(kept.par_chunks_exact(b * b))
        .zip(grad.par_chunks_exact(b * b))
        .for_each(|((out, kept), grad)| map.backward(kept, grad, b, out));
    Ok(out)
}

/// The elements of a contiguous tensor.
fn elements<'a, T>(all: &'a [T], layout: &Layout) -> Result<&'a [T]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&all[start..end]),
        None => Err(candle_core::Error::Msg(
            "expected a contiguous tensor".into(),
        )),
    }
}

fn no_kernel(name: &str) -> candle_core::Error {
    candle_core::Error::Msg(format!("{name} has kernels for f32 and f64"))
}
