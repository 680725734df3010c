//! Products of the size of a block, kept in registers: packing would cost `gemm` more than they do.

use super::{Mat, MatMut};
use crate::ops::real::Real;
use crate::ops::vectorized::vectorized;

/// `dst = lhs rhs`, or `dst += lhs rhs`, on the calling thread, for a `rhs` whose rows are contiguous.
///
/// With `FMA` in the processor each term is rounded once, else twice; the order of terms is that of
/// the inner index.
pub(crate) fn multiply_small<T: Real>(
    dst: &mut MatMut<T>,
    lhs: Mat<T>,
    rhs: Mat<T>,
    accumulate: bool,
) {
    assert!(
        lhs.cols == rhs.rows && dst.rows == lhs.rows && dst.cols == rhs.cols,
        "matrices that do not fit"
    );
    assert!(
        rhs.col_stride == 1,
        "rows of the right matrix are contiguous"
    );
    assert!(
        !(accumulate && dst.unset),
        "nothing is there to be added to"
    );
    match FUSES || fuses() {
        true => vectorized(|| product::<T, true>(dst, lhs, rhs, accumulate)),
        false => product::<T, false>(dst, lhs, rhs, accumulate),
    }
}

/// Whether every processor of this kind has a fused product and sum.
const FUSES: bool = cfg!(target_arch = "aarch64");

/// Whether [`vectorized`] compiles for one that has it.
fn fuses() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    #[cfg(not(target_arch = "x86_64"))]
    return false;
}

// Tiles have 8 accumulators of 32 bytes where they can: two products for each of the 4 cycles that one
// takes, with registers left for both operands.
#[inline(always)]
fn product<T: Real, const FMA: bool>(
    dst: &mut MatMut<T>,
    lhs: Mat<T>,
    rhs: Mat<T>,
    accumulate: bool,
) {
    let (cols, mut col) = (dst.cols, 0);
    let narrow = size_of::<T>() == 4;
    while narrow && col + 16 <= cols {
        strip::<T, 4, 16, FMA>(dst, lhs, rhs, col, accumulate);
        col += 16;
    }
    while col + 8 <= cols {
        match narrow {
            true => strip::<T, 8, 8, FMA>(dst, lhs, rhs, col, accumulate),
            false => strip::<T, 4, 8, FMA>(dst, lhs, rhs, col, accumulate),
        }
        col += 8;
    }
    while col < cols {
        strip::<T, 4, 1, FMA>(dst, lhs, rhs, col, accumulate);
        col += 1;
    }
}

/// `N` columns of the product, `M` rows at a time.
#[inline(always)]
fn strip<T: Real, const M: usize, const N: usize, const FMA: bool>(
    dst: &mut MatMut<T>,
    lhs: Mat<T>,
    rhs: Mat<T>,
    col: usize,
    accumulate: bool,
) {
    let mut row = 0;
    while row + M <= dst.rows {
        tile::<T, M, N, FMA>(dst, lhs, rhs, (row, col), accumulate);
        row += M;
    }
    while row < dst.rows {
        tile::<T, 1, N, FMA>(dst, lhs, rhs, (row, col), accumulate);
        row += 1;
    }
}

#[inline(always)]
fn tile<T: Real, const M: usize, const N: usize, const FMA: bool>(
    dst: &mut MatMut<T>,
    lhs: Mat<T>,
    rhs: Mat<T>,
    (row, col): (usize, usize),
    accumulate: bool,
) {
    assert!(row + M <= lhs.rows && col + N <= rhs.cols);
    let mut sums = [[T::zero(); N]; M];
    for k in 0..lhs.cols {
        #[allow(unsafe_code, reason = "bounds are checked once for the whole tile")]
        // SAFETY: `check` has seen that every element that shape and strides reach lies inside the
        // slice; row + M, col + N and k are within the shapes, and rows of `rhs` are contiguous.
        let (b, a): ([T; N], [T; M]) = unsafe {
            let b = rhs.data.as_ptr().add(k * rhs.row_stride + col);
            let a = lhs
                .data
                .as_ptr()
                .add(row * lhs.row_stride + k * lhs.col_stride);
            (
                b.cast::<[T; N]>().read(),
                std::array::from_fn(|m| *a.add(m * lhs.row_stride)),
            )
        };
        for (sums, a) in sums.iter_mut().zip(a) {
            for (sum, b) in sums.iter_mut().zip(b) {
                *sum = if FMA { a.fused(b, *sum) } else { a * b + *sum };
            }
        }
    }
    for (m, sums) in sums.iter().enumerate() {
        let to = &mut dst.data[(row + m) * dst.row_stride + col..][..N];
        match accumulate {
            #[allow(unsafe_code, reason = "a matrix that is added to has values")]
            // SAFETY: a matrix that may be unset is not added to, as asserted by the only caller.
            true => to.iter_mut().zip(sums).for_each(|(to, sum)| unsafe {
                *to.assume_init_mut() += *sum;
            }),
            false => to.iter_mut().zip(sums).for_each(|(to, sum)| {
                to.write(*sum);
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compare<T: Real>(tolerance: f64) {
        let value = |i: usize| T::from_f64((i as f64 * 0.37).sin());
        let values: Vec<T> = (0..40_000).map(value).collect();
        for (rows, inner, cols) in [
            (1, 1, 1),
            (3, 5, 7),
            (9, 8, 8),
            (64, 32, 32),
            (13, 65, 65),
            (2, 0, 3),
        ] {
            // Row-major, columns apart, transposed.
            for (row, col) in [(inner, 1), (2 * inner + 1, 2), (1, rows)] {
                let lhs = Mat::new(&values, (rows, inner), (row.max(1), col));
                let rhs = Mat::new(&values[11..], (inner, cols), (cols + 3, 1));
                for accumulate in [false, true] {
                    let stride = cols + 2;
                    let start = vec![T::from_f64(0.5); rows * stride];
                    let (mut wide, mut plain) = (start.clone(), start);
                    let shape = (rows, cols);
                    let dst = &mut MatMut::new(&mut wide, shape, stride);
                    multiply_small(dst, lhs, rhs, accumulate);
                    let dst = &mut MatMut::new(&mut plain, shape, stride);
                    product::<T, false>(dst, lhs, rhs, accumulate);
                    for i in 0..rows {
                        for j in 0..stride {
                            let terms =
                                (0..inner).map(|k| lhs.at(i, k).to_f64() * rhs.at(k, j).to_f64());
                            let expected = match j < cols {
                                true => terms.sum::<f64>() + if accumulate { 0.5 } else { 0. },
                                false => 0.5,
                            };
                            for found in [wide[i * stride + j], plain[i * stride + j]] {
                                let off = (found.to_f64() - expected).abs();
                                assert!(off < tolerance, "{rows}x{inner}x{cols} {i},{j}: {off:e}");
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn small_products_are_those_of_the_definition() {
        compare::<f32>(1e-4);
        compare::<f64>(1e-12);
    }

    #[test]
    #[should_panic(expected = "matrices that do not fit")]
    fn matrices_that_do_not_fit_are_refused() {
        let (a, mut c) = ([0f32; 6], [0f32; 4]);
        let (lhs, rhs) = (Mat::row_major(&a, 2, 3), Mat::row_major(&a, 2, 2));
        multiply_small(&mut MatMut::new(&mut c, (2, 2), 2), lhs, rhs, false);
    }
}
