//! The maps from packed parameters to rotation blocks: CPU kernels in f32 and f64, one block after
//! the other on rayon's threads, and the same out of candle's operations for every other device.
//!
//! A block is computed by one thread in a fixed order, so the answer does not depend on their number,
//! and a NaN stays in its block.

mod cayley;
mod clip;
mod composed;
mod dense;
pub(crate) mod eigen;
mod exponential;
mod packed;
mod series;

pub(crate) use cayley::{Cayley, generator_of};
pub(crate) use clip::Clip;
pub(crate) use composed::on_host;
pub(crate) use exponential::Exponential;
pub(crate) use packed::{Skew, rotation};
pub(crate) use series::Series;

use super::real::{Real, by_dtype, slice, tensor, with_slice};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

/// A function whose answer is a square block, with its derivative and its composed twin.
pub(crate) trait Blockwise: Send + Sync + 'static {
    const NAME: &'static str;

    /// Whether the argument is a packed row of `b (b - 1) / 2` entries; else it is a block.
    const PACKED: bool = false;

    /// Whether the derivative is taken from the result; else from the argument.
    const KEEPS_RESULT: bool = false;

    /// Writes the row-major block `out` of size `b`.
    fn forward<T: Real>(&self, arg: &[T], b: usize, out: &mut [T]);

    /// Writes the gradient of the argument for `grad`, that of the block; `kept` is the argument or
    /// the result.
    fn backward<T: Real>(&self, kept: &[T], grad: &[T], b: usize, out: &mut [T]);

    /// All blocks `(D, b, b)` of the arguments `x` out of candle's operations, on any device.
    fn composed(&self, x: &Tensor, b: usize) -> Result<Tensor>;
}

/// The blocks `(D, b, b)` of `x`, blocks or packed rows: by the kernel on CPU, elsewhere composed.
pub(crate) fn apply<F: Blockwise>(x: &Tensor, b: usize, function: F) -> Result<Tensor> {
    match x.device().is_cpu() {
        true => x.contiguous()?.apply_op1(Op { function, b }),
        // Other devices launch nothing over nothing.
        false if x.dim(0)? == 0 => Tensor::zeros((0, b, b), x.dtype(), x.device()),
        false => function.composed(x, b),
    }
}

struct Op<F> {
    function: F,
    b: usize,
}

impl<F: Blockwise> Op<F> {
    /// Elements of one argument.
    fn argument(&self) -> usize {
        match F::PACKED {
            true => self.b * (self.b - 1) / 2,
            false => self.b * self.b,
        }
    }

    fn forward<T: Real>(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (blocks, b, size) = (layout.dims()[0], self.b, self.argument());
        let x = &slice::<T>(x, layout)?[..blocks * size];
        let mut out = vec![T::zero(); blocks * b * b];
        out.par_chunks_exact_mut(b * b)
            .enumerate()
            .for_each(|(d, out)| self.function.forward(&x[d * size..][..size], b, out));
        Ok((T::to_cpu_storage_owned(out), (blocks, b, b).into()))
    }

    fn backward<T: Real>(&self, x: &Tensor, r: &Tensor, dr: &Tensor) -> Result<Tensor> {
        let (b, size) = (self.b, self.argument());
        let dr = dr.contiguous()?;
        let (kept, step) = match F::KEEPS_RESULT {
            true => (r, b * b),
            false => (x, size),
        };
        let mut out = vec![T::zero(); x.elem_count()];
        with_slice::<T, _>(kept, |kept, _| {
            with_slice::<T, _>(&dr, |dr, _| {
                // Blocks of size 1 have no parameters.
                let blocks = out.par_chunks_exact_mut(size.max(1)).enumerate();
                blocks.for_each(|(d, out)| {
                    let kept = &kept[d * step..][..step];
                    let dr = &dr[d * b * b..][..b * b];
                    self.function.backward(kept, dr, b, out);
                });
                Ok(())
            })
        })?;
        tensor(out, x.shape())
    }
}

impl<F: Blockwise> CustomOp1 for Op<F> {
    fn name(&self) -> &'static str {
        F::NAME
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        by_dtype!(x, forward(x, layout), self)
    }

    fn bwd(&self, x: &Tensor, r: &Tensor, dr: &Tensor) -> Result<Option<Tensor>> {
        by_dtype!(x, backward(x, r, dr), self).map(Some)
    }
}

#[cfg(test)]
mod tests;
