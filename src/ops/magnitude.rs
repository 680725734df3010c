//! What the magnitude asks of the outputs: `dy * ratio`, and its own gradient from y.

use super::adapted::{FromOutput, Limits};
use super::gemm::filled;
use super::real::Real;
use super::vectorized::vectorized;
use rayon::prelude::*;
use std::mem::MaybeUninit;

/// Rows whose terms are summed in `T` before they go into sums of f64.
const TERMS: usize = 16;

/// `dy * ratio` for rows of outputs.
#[allow(unsafe_code, reason = "zeros would cost a pass")]
pub(super) fn scaled<T: Real>(dy: &[T], ratio: &[T]) -> Vec<T> {
    let out = ratio.len();
    assert!(dy.len().is_multiple_of(out), "rows that do not fit");
    let fill = |scaled: &mut [MaybeUninit<T>]| {
        let rows = scaled.par_chunks_mut(out).zip(dy.par_chunks(out));
        rows.for_each(|(to, dy)| scale(to, dy, ratio));
    };
    // SAFETY: there are as many rows of `dy`, whole ones, as asserted, and as many ratios as a row has
    // elements, so that `scale` writes all of it.
    unsafe { filled(dy.len(), fill) }
}

vectorized! {
    fn scale<T: Real>(to: &mut [MaybeUninit<T>], dy: &[T], ratio: &[T]) {
        for (to, (dy, ratio)) in to.iter_mut().zip(dy.iter().zip(ratio)) {
            to.write(*dy * *ratio);
        }
    }
}

/// `dy * ratio`; and for each column `sum_t dy (y - bias) / ratio`, and whether that is not to be
/// trusted. Each thread takes a stretch of rows; their sums are added from the first to the last.
#[allow(unsafe_code, reason = "zeros would cost a pass")]
pub(super) fn scaled_and_gradient<T: Real>(
    (y, dy): (&[T], &[T]),
    bias: Option<&[T]>,
    ratio: &[T],
    limits: Limits,
) -> (Vec<T>, Vec<(T, bool)>) {
    let out = ratio.len();
    let rows = dy.len() / out.max(1);
    assert!(
        y.len() == dy.len() && dy.len() == rows * out && bias.is_none_or(|b| b.len() == out),
        "rows that do not fit"
    );
    // A bias of 0 asks for the squares, which tell an f16 that is out of range.
    let zeros = vec![T::zero(); out];
    let bias = bias.or((limits.least > 0.).then_some(&zeros));
    let stretch = rows.div_ceil(rayon::current_num_threads()).max(1) * out.max(1);
    let mut parts = Vec::new();
    let fill = |scaled: &mut [MaybeUninit<T>]| {
        let stretches = y.par_chunks(stretch).zip(dy.par_chunks(stretch));
        let tasks = scaled.par_chunks_mut(stretch).zip(stretches);
        let one = |scaled: &mut [MaybeUninit<T>], y: &[T], dy: &[T]| {
            let mut sums = Sums::new(out);
            let pieces = y.chunks(TERMS * out).zip(dy.chunks(TERMS * out));
            for (scaled, (y, dy)) in scaled.chunks_mut(TERMS * out).zip(pieces) {
                add(&mut sums, scaled, (y, dy), bias, ratio);
            }
            sums
        };
        tasks
            .map(|(scaled, (y, dy))| one(scaled, y, dy))
            .collect_into_vec(&mut parts);
    };
    // SAFETY: there are as many rows of `y` and `dy`, whole ones, and `add` writes an element for each
    // ratio, of which a row has as many, as has the bias: all as asserted.
    let scaled = unsafe { filled(dy.len(), fill) };
    let mut all = Sums::<T>::new(out);
    for part in &parts {
        let add = |to: &mut [f64], from: &[f64]| to.iter_mut().zip(from).for_each(|(a, v)| *a += v);
        add(&mut all.slopes, &part.slopes);
        add(&mut all.squares, &part.squares);
    }
    let gradient = |o: usize| {
        let output = FromOutput {
            slope: all.slopes[o],
            square: all.squares[o],
            bias: bias.map_or(0., |bias| bias[o].to_f64()),
            ratio: ratio[o].to_f64(),
            count: rows,
            limits,
        };
        output.gradient()
    };
    (scaled, (0..out).map(gradient).collect())
}

/// `sum dy (y - bias)` and, where there is a bias, `sum (y - bias)^2` of each column.
struct Sums<T> {
    slopes: Vec<f64>,
    squares: Vec<f64>,
    /// The slopes of a few rows.
    few: Vec<T>,
}

impl<T: Real> Sums<T> {
    fn new(out: usize) -> Self {
        Self {
            slopes: vec![0.; out],
            squares: vec![0.; out],
            few: vec![T::zero(); out],
        }
    }
}

vectorized! {
    /// Adds a few rows, and writes their `dy * ratio`.
    fn add<T: Real>(
        sums: &mut Sums<T>,
        scaled: &mut [MaybeUninit<T>],
        outputs: (&[T], &[T]),
        bias: Option<&[T]>,
        ratio: &[T],
    ) {
        let (out, (y, dy)) = (ratio.len(), outputs);
        let Sums { slopes, squares, few } = sums;
        few.fill(T::zero());
        let rows = y.chunks_exact(out).zip(dy.chunks_exact(out));
        for (scaled, (y, dy)) in scaled.chunks_exact_mut(out).zip(rows) {
            let terms = scaled.iter_mut().zip(ratio).zip(y.iter().zip(dy));
            match bias {
                None => {
                    for (slope, ((to, ratio), (y, dy))) in few.iter_mut().zip(terms) {
                        to.write(*dy * *ratio);
                        *slope += *y * *dy;
                    }
                }
                Some(bias) => {
                    let sums = few.iter_mut().zip(squares.iter_mut());
                    let terms = terms.zip(bias);
                    for ((slope, square), (((to, ratio), (y, dy)), bias)) in sums.zip(terms) {
                        let p = *y - *bias;
                        to.write(*dy * *ratio);
                        *slope += p * *dy;
                        *square += p.to_f64() * p.to_f64();
                    }
                }
            }
        }
        let sums = slopes.iter_mut().zip(few.iter());
        sums.for_each(|(to, v)| *to += v.to_f64());
    }
}
