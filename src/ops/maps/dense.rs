//! Small row-major square matrices.

use super::Real;

/// `out = a b`. Rows are added to rows, four at a time, which vectorises without reordering any sum.
pub(super) fn multiply<T: Real>(a: &[T], b: &[T], n: usize, out: &mut [T]) {
    out.fill(T::zero());
    for (row, out) in a.chunks_exact(n).zip(out.chunks_exact_mut(n)) {
        let factors = row.chunks_exact(4);
        let panels = b.chunks_exact(4 * n);
        let last = factors
            .remainder()
            .iter()
            .zip(panels.remainder().chunks_exact(n));
        for (f, panel) in factors.zip(panels) {
            let (b0, rest) = panel.split_at(n);
            let (b1, rest) = rest.split_at(n);
            let (b2, b3) = rest.split_at(n);
            let rows = b0.iter().zip(b1).zip(b2).zip(b3);
            for (out, (((b0, b1), b2), b3)) in out.iter_mut().zip(rows) {
                *out += f[0] * *b0 + f[1] * *b1 + f[2] * *b2 + f[3] * *b3;
            }
        }
        for (f, row) in last {
            add_scaled(out, *f, row);
        }
    }
}

/// `to += factor * row`.
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
