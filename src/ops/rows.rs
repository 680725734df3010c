//! Loops over rows and elements on rayon's threads, and the sums within a row.

use super::real::Real;
use rayon::prelude::*;

/// Elements of one task: enough to pay for it, few enough to share out.
const TASK: usize = 1 << 13;

/// Partial sums of a row that are kept side by side, so that the compiler can use wide registers.
const LANES: usize = 16;

/// Rows of one task.
fn rows_of_task(width: usize) -> usize {
    (TASK / width.max(1)).max(1)
}

/// `f(row index, row)` for all rows of `out`.
pub(crate) fn for_rows<T: Real>(out: &mut [T], width: usize, f: impl Fn(usize, &mut [T]) + Sync) {
    let step = rows_of_task(width);
    out.par_chunks_mut((step * width).max(1))
        .enumerate()
        .for_each(|(task, rows)| {
            for (i, row) in rows.chunks_exact_mut(width).enumerate() {
                f(task * step + i, row);
            }
        });
}

/// `out_i = f(a_i, b_i)` for all elements.
pub(crate) fn zip_map<T: Real>(a: &[T], b: &[T], f: impl Fn(T, T) -> T + Sync) -> Vec<T> {
    let mut out = vec![T::zero(); a.len()];
    out.par_chunks_mut(TASK)
        .zip(a.par_chunks(TASK))
        .zip(b.par_chunks(TASK))
        .for_each(|((out, a), b)| {
            let pairs = a.iter().zip(b);
            out.iter_mut()
                .zip(pairs)
                .for_each(|(out, (a, b))| *out = f(*a, *b));
        });
    out
}

/// `sum f(a_i, b_i)` in lanes, the same order each time.
pub(crate) fn sum_of<T: Real>(a: &[T], b: &[T], f: impl Fn(T, T) -> T) -> T {
    let mut lanes = [T::zero(); LANES];
    let (wide_a, wide_b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let (rest_a, rest_b) = (wide_a.remainder(), wide_b.remainder());
    for (a, b) in wide_a.zip(wide_b) {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += f(*a, *b);
        }
    }
    let mut sum = T::zero();
    for lane in lanes {
        sum += lane;
    }
    for (a, b) in rest_a.iter().zip(rest_b) {
        sum += f(*a, *b);
    }
    sum
}

/// The largest entry; a NaN among them is kept out, and shows in the sum that follows.
pub(crate) fn largest<T: Real>(row: &[T]) -> T {
    let least = T::from_f64(f64::NEG_INFINITY);
    let mut lanes = [least; LANES];
    let wide = row.chunks_exact(LANES);
    let rest = wide.remainder();
    let larger = |a: &mut T, v: &T| {
        if *v > *a {
            *a = *v;
        }
    };
    for chunk in wide {
        lanes.iter_mut().zip(chunk).for_each(|(a, v)| larger(a, v));
    }
    let mut all = least;
    lanes.iter().chain(rest).for_each(|v| larger(&mut all, v));
    all
}

/// Replaces a row by `exp(row - shift)` and answers the sum.
pub(crate) fn exponentials<T: Real>(row: &mut [T], shift: T) -> T {
    for v in row.iter_mut() {
        *v = (*v - shift).exp();
    }
    sum_of(row, row, |v, _| v)
}
