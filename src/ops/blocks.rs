//! Products with the blocks of a block-diagonal matrix, and their gradient.

use super::gemm::{Mat, MatMut, multiply};
use super::real::Real;
use rayon::prelude::*;

/// Rows that are rotated together: they stay in cache, and the cut does not depend on threads.
const ROWS: usize = 64;

/// Square blocks of size `b`, one after the other; one alone acts everywhere.
#[derive(Clone, Copy)]
pub(crate) struct Blocks<'a, T> {
    data: &'a [T],
    count: usize,
    b: usize,
}

impl<'a, T: Real> Blocks<'a, T> {
    /// The `count` blocks of size `b` at the start of `data`.
    pub(crate) fn new(data: &'a [T], count: usize, b: usize) -> Self {
        Self { data, count, b }
    }

    /// The size `b` of a block.
    pub(crate) fn size(&self) -> usize {
        self.b
    }

    /// The block that acts at place `d`.
    pub(crate) fn get(&self, d: usize) -> Mat<'a, T> {
        let d = if self.count == 1 { 0 } else { d };
        let size = self.b * self.b;
        Mat::row_major(&self.data[d * size..(d + 1) * size], self.b, self.b)
    }
}

/// `x . blockdiag(r)`, row-major.
pub(crate) fn rotate<T: Real>(x: Mat<T>, r: Blocks<T>) -> Vec<T> {
    let (rows, width) = (x.rows(), x.cols());
    let mut out = vec![T::zero(); rows * width];
    out.par_chunks_mut(ROWS * width)
        .enumerate()
        .for_each(|(chunk, out)| {
            let count = out.len() / width;
            for d in 0..width / r.b {
                let from = x.part((chunk * ROWS, count), (d * r.b, r.b));
                let to = MatMut::new(&mut out[d * r.b..], (count, r.b), width);
                multiply(to, from, r.get(d), false);
            }
        });
    out
}

/// `h . blockdiag(r)^T` in the place of the row-major `h`.
pub(crate) fn rotate_back<T: Real>(h: &mut [T], width: usize, r: Blocks<T>) {
    h.par_chunks_mut(ROWS * width).for_each(|h| {
        let count = h.len() / width;
        let mut panel = vec![T::zero(); count * r.b];
        for d in 0..width / r.b {
            let rows = h.chunks_exact(width);
            for (from, to) in rows.zip(panel.chunks_exact_mut(r.b)) {
                to.copy_from_slice(&from[d * r.b..(d + 1) * r.b]);
            }
            let to = MatMut::new(&mut h[d * r.b..], (count, r.b), width);
            multiply(to, Mat::row_major(&panel, count, r.b), r.get(d).t(), false);
        }
    });
}

/// `dR_d = x_d^T h_d` for each block; summed over the blocks, first to last, when one is shared.
pub(crate) fn gradient<T: Real>(x: Mat<T>, h: Mat<T>, b: usize, shared: bool) -> Vec<T> {
    let size = b * b;
    let mut grad = vec![T::zero(); x.cols() / b * size];
    grad.par_chunks_mut(size).enumerate().for_each(|(d, grad)| {
        // An input without rows leaves the zeros.
        if x.rows() > 0 {
            let (all, columns) = ((0, x.rows()), (d * b, b));
            let (x, h) = (x.part(all, columns), h.part(all, columns));
            multiply(MatMut::new(grad, (b, b), b), x.t(), h, false);
        }
    });
    if shared {
        let (first, rest) = grad.split_at_mut(size);
        for block in rest.chunks_exact(size) {
            first.iter_mut().zip(block).for_each(|(a, v)| *a += *v);
        }
        grad.truncate(size);
    }
    grad
}
