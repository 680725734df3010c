//! Small row-major square matrices.

use super::Real;
use crate::ops::gemm::{Mat, MatMut, multiply_small};

/// `out = a b`.
pub(super) fn multiply<T: Real>(a: &[T], b: &[T], n: usize, out: &mut [T]) {
    let (a, b) = (Mat::row_major(a, n, n), Mat::row_major(b, n, n));
    multiply_small(&mut MatMut::new(out, (n, n), n), a, b, false);
}

/// `to += factor * row`.
#[inline(always)]
pub(super) fn add_scaled<T: Real>(to: &mut [T], factor: T, row: &[T]) {
    for (to, v) in to.iter_mut().zip(row) {
        *to += factor * *v;
    }
}

/// `a + value I` in the place of `a`.
pub(super) fn add_diagonal<T: Real>(a: &mut [T], n: usize, value: T) {
    for v in a.iter_mut().step_by(n + 1) {
        *v += value;
    }
}

pub(super) fn transposed<T: Real>(a: &[T], n: usize) -> Vec<T> {
    let mut out = vec![T::zero(); n * n];
    for (i, row) in a.chunks_exact(n).enumerate() {
        for (j, v) in row.iter().enumerate() {
            out[j * n + i] = *v;
        }
    }
    out
}

pub(super) fn widened<T: Real>(a: &[T]) -> Vec<f64> {
    a.iter().map(|v| v.to_f64()).collect()
}

/// Rounds `from` to `T`.
pub(super) fn store<T: Real>(from: &[f64], to: &mut [T]) {
    for (to, v) in to.iter_mut().zip(from) {
        *to = T::from_f64(*v);
    }
}
