//! Products with the blocks of a block-diagonal matrix, and their gradient.

use super::gemm::{Mat, MatMut, filled, multiply, multiply_small};
use super::real::Real;
use candle_core::{Result, Shape};
use rayon::prelude::*;
use std::mem::MaybeUninit;

/// Rows that are rotated together at most. They stay in cache, and are as many streams of memory as the
/// processor can follow: with 64 a rotation of 512x1024 took 1.2 times as long.
pub(super) const ROWS: usize = 16;

/// Square blocks of size `b`, one after the other; one alone acts everywhere.
#[derive(Clone, Copy)]
pub(crate) struct Blocks<'a, T> {
    data: &'a [T],
    count: usize,
    b: usize,
}

impl<'a, T: Real> Blocks<'a, T> {
    /// The blocks `(D, b, b)` at the start of `data`.
    pub(crate) fn new(data: &'a [T], shape: &Shape) -> Result<Self> {
        let (count, b, _) = shape.dims3()?;
        Ok(Self { data, count, b })
    }

    /// The size `b` of a block.
    pub(crate) fn size(&self) -> usize {
        self.b
    }

    /// Which block acts at place `d`.
    fn place(&self, d: usize) -> usize {
        if self.count == 1 { 0 } else { d }
    }

    /// All blocks, each transposed.
    fn transposed(&self) -> Vec<T> {
        let mut out = vec![T::zero(); self.count * self.b * self.b];
        for (d, out) in out.chunks_exact_mut((self.b * self.b).max(1)).enumerate() {
            let block = self.get(d);
            for (i, row) in out.chunks_exact_mut(self.b).enumerate() {
                row.iter_mut()
                    .enumerate()
                    .for_each(|(j, to)| *to = block.at(j, i));
            }
        }
        out
    }

    /// As many blocks of the same size in other values.
    fn over<'b>(&self, data: &'b [T]) -> Blocks<'b, T> {
        Blocks { data, ..*self }
    }

    /// The block that acts at place `d`.
    pub(crate) fn get(&self, d: usize) -> Mat<'a, T> {
        let d = self.place(d);
        let size = self.b * self.b;
        Mat::row_major(&self.data[d * size..(d + 1) * size], self.b, self.b)
    }
}

/// Rows of one task: all threads have some, and none has more than stay in its cache.
fn rows_of_task(rows: usize) -> usize {
    rows.div_ceil(rayon::current_num_threads()).clamp(1, ROWS)
}

/// Multiplications below which waking other threads costs more than they save.
const ALONE: usize = 1 << 18;

/// `x . blockdiag(r)` into as many elements, row-major, on the calling thread.
pub(super) fn rotate_rows<T: Real>(out: &mut [MaybeUninit<T>], x: Mat<T>, r: Blocks<T>) {
    let (rows, width) = (x.rows(), x.cols());
    for d in 0..width / r.b {
        let from = x.part((0, rows), (d * r.b, r.b));
        let to = &mut MatMut::unset(&mut out[d * r.b..], (rows, r.b), width);
        multiply_small(to, from, r.get(d), false);
    }
}

/// `x . blockdiag(r)`, row-major.
#[allow(unsafe_code, reason = "zeros would cost a pass")]
pub(crate) fn rotate<T: Real>(x: Mat<T>, r: Blocks<T>) -> Vec<T> {
    let (rows, width) = (x.rows(), x.cols());
    let step = rows_of_task(rows);
    let turn = |(task, out): (usize, &mut [MaybeUninit<T>])| {
        let count = out.len() / width;
        rotate_rows(out, x.part((task * step, count), (0, width)), r);
    };
    assert!(width.is_multiple_of(r.b), "blocks that do not fill a row");
    let fill = |out: &mut [MaybeUninit<T>]| match rows * width * r.b <= ALONE {
        true => out.chunks_mut(step * width).enumerate().for_each(turn),
        false => out.par_chunks_mut(step * width).enumerate().for_each(turn),
    };
    // SAFETY: the tasks share out all rows, the blocks cover a row, as asserted, and a product writes
    // each element of its destination.
    unsafe { filled(rows * width, fill) }
}

/// `h . blockdiag(r)^T` in the place of the row-major `h`.
pub(crate) fn rotate_back<T: Real>(h: &mut [T], width: usize, r: Blocks<T>) {
    let transposed = r.transposed();
    let back = r.over(&transposed);
    let step = rows_of_task(h.len() / width.max(1));
    h.par_chunks_mut(step * width).for_each(|h| {
        let count = h.len() / width;
        let mut panel = vec![T::zero(); count * r.b];
        for d in 0..width / r.b {
            pack(Mat::row_major(h, count, width), d * r.b, &mut panel, r.b);
            let to = &mut MatMut::new(&mut h[d * r.b..], (count, r.b), width);
            multiply_small(to, Mat::row_major(&panel, count, r.b), back.get(d), false);
        }
    });
}

/// `dR_d = x_d^T h_d` for each block, and `h . blockdiag(r)^T` in the place of `h`, in one pass.
///
/// Each thread takes a stretch of rows and has sums of its own, which are added from the first thread
/// to the last. Going down the columns of one block instead would meet a new page with every row, and
/// the same few sets of the cache where the width is a power of two.
pub(crate) fn gradient_and_back<T: Real>(x: Mat<T>, h: &mut [T], r: Blocks<T>) -> Vec<T> {
    let (rows, width, b) = (x.rows(), x.cols(), r.b);
    let transposed = r.transposed();
    let back = r.over(&transposed);
    let stretch = rows.div_ceil(rayon::current_num_threads()).max(1);
    let one = |(task, h): (usize, &mut [T])| {
        let mut sums = vec![T::zero(); r.count * b * b];
        let mut panels = vec![T::zero(); 2 * ROWS.min(stretch) * b];
        let (px, ph) = panels.split_at_mut(ROWS.min(stretch) * b);
        for (i, h) in h.chunks_mut(ROWS * width).enumerate() {
            let count = h.len() / width;
            let x = x.part((task * stretch + i * ROWS, count), (0, width));
            for d in 0..width / b {
                pack(x, d * b, &mut px[..count * b], b);
                pack(
                    Mat::row_major(h, count, width),
                    d * b,
                    &mut ph[..count * b],
                    b,
                );
                let (px, ph) = (Mat::row_major(px, count, b), Mat::row_major(ph, count, b));
                let sum = &mut sums[r.place(d) * b * b..][..b * b];
                multiply_small(&mut MatMut::new(sum, (b, b), b), px.t(), ph, true);
                let to = &mut MatMut::new(&mut h[d * b..], (count, b), width);
                multiply_small(to, ph, back.get(d), false);
            }
        }
        sums
    };
    let tasks = h.par_chunks_mut(stretch * width).enumerate();
    let parts: Vec<Vec<T>> = tasks.map(one).collect();
    let mut parts = parts.into_iter();
    let first = parts.next();
    let mut grad = first.unwrap_or_else(|| vec![T::zero(); r.count * b * b]);
    for part in parts {
        grad.iter_mut().zip(part).for_each(|(a, v)| *a += v);
    }
    grad
}

/// Copies the columns of `x` from `start` on, `b` of them, into a panel.
fn pack<T: Real>(x: Mat<T>, start: usize, panel: &mut [T], b: usize) {
    for (row, to) in panel.chunks_exact_mut(b).enumerate() {
        x.copy_row(row, start, to);
    }
}

/// `dR_d = x_d^T h_d` for each block.
pub(crate) fn gradient<T: Real>(x: Mat<T>, h: Mat<T>, r: Blocks<T>) -> Vec<T> {
    let (b, size) = (r.b, r.b * r.b);
    let mut grad = vec![T::zero(); x.cols() / b * size];
    grad.par_chunks_mut(size).enumerate().for_each(|(d, grad)| {
        // An input without rows leaves the zeros.
        if x.rows() > 0 {
            let (all, columns) = ((0, x.rows()), (d * b, b));
            let (x, h) = (x.part(all, columns), h.part(all, columns));
            multiply(MatMut::new(grad, (b, b), b), x.t(), h, false);
        }
    });
    shared(grad, r)
}

/// The gradient of `r` from that at each place: summed, first to last, when one block is shared.
pub(crate) fn shared<T: Real>(mut grad: Vec<T>, r: Blocks<T>) -> Vec<T> {
    if r.count == 1 {
        let (first, rest) = grad.split_at_mut(r.b * r.b);
        for block in rest.chunks_exact(r.b * r.b) {
            first.iter_mut().zip(block).for_each(|(a, v)| *a += *v);
        }
        grad.truncate(r.b * r.b);
    }
    grad
}
