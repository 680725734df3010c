//! Products of the size of a block, kept in registers: packing would cost `gemm` more than they do.

use super::{Mat, MatMut, check_product, store};
use crate::ops::real::Real;
use crate::ops::vectorized::{Vectors, vectors};

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
    check_product(dst, lhs, rhs, accumulate);
    assert!(
        rhs.col_stride == 1,
        "rows of the right matrix are contiguous"
    );
    match vectors() {
        Vectors::Compiled => {
            Accumulators::<256>.product::<T, FUSES>(dst, lhs, rhs, accumulate);
        }
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code, reason = "wider instructions, where there are any")]
        // SAFETY: the processor has just answered that it knows them.
        Vectors::Avx2 => unsafe { avx2(dst, lhs, rhs, accumulate) },
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code, reason = "wider instructions, where there are any")]
        // SAFETY: as above.
        Vectors::Avx512 => unsafe { avx512(dst, lhs, rhs, accumulate) },
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn avx2<T: Real>(dst: &mut MatMut<T>, lhs: Mat<T>, rhs: Mat<T>, accumulate: bool) {
    Accumulators::<256>.product::<T, true>(dst, lhs, rhs, accumulate);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,avx512f")]
fn avx512<T: Real>(dst: &mut MatMut<T>, lhs: Mat<T>, rhs: Mat<T>, accumulate: bool) {
    Accumulators::<1024>.product::<T, true>(dst, lhs, rhs, accumulate);
}

/// Whether every processor of this kind has a fused product and sum.
const FUSES: bool = cfg!(target_arch = "aarch64");

/// Rows of a tile at most.
const ROWS: usize = 8;

/// How the product is cut into tiles: their sums fill registers of `BYTES` bytes. 8 of them, or more,
/// hide the 4 cycles that a product takes; both operands need some as well.
struct Accumulators<const BYTES: usize>;

impl<const BYTES: usize> Accumulators<BYTES> {
    // Rows outside: those of `lhs` stay in cache for all columns.
    #[inline(always)]
    fn product<T: Real, const FMA: bool>(
        &self,
        dst: &mut MatMut<T>,
        lhs: Mat<T>,
        rhs: Mat<T>,
        accumulate: bool,
    ) {
        let mut row = 0;
        while row < dst.rows {
            let place = (row, ROWS.min(dst.rows - row));
            let mut col = 0;
            while BYTES / size_of::<T>() >= 8 * 32 && col + 32 <= dst.cols {
                self.rows::<T, 32, FMA>(dst, lhs, rhs, (place, col), accumulate);
                col += 32;
            }
            while BYTES / size_of::<T>() >= 4 * 16 && col + 16 <= dst.cols {
                self.rows::<T, 16, FMA>(dst, lhs, rhs, (place, col), accumulate);
                col += 16;
            }
            while col + 8 <= dst.cols {
                self.rows::<T, 8, FMA>(dst, lhs, rhs, (place, col), accumulate);
                col += 8;
            }
            while col < dst.cols {
                self.rows::<T, 1, FMA>(dst, lhs, rhs, (place, col), accumulate);
                col += 1;
            }
            row += place.1;
        }
    }

    /// `N` columns of some rows of the product, in tiles as tall as the registers allow.
    #[inline(always)]
    fn rows<T: Real, const N: usize, const FMA: bool>(
        &self,
        dst: &mut MatMut<T>,
        lhs: Mat<T>,
        rhs: Mat<T>,
        ((start, count), col): ((usize, usize), usize),
        accumulate: bool,
    ) {
        let (mut row, end) = (start, start + count);
        if 8 * N * size_of::<T>() <= BYTES && row + 8 <= end {
            tile::<T, 8, N, FMA>(dst, lhs, rhs, (row, col), accumulate);
            row += 8;
        }
        while row + 4 <= end {
            tile::<T, 4, N, FMA>(dst, lhs, rhs, (row, col), accumulate);
            row += 4;
        }
        while row < end {
            tile::<T, 1, N, FMA>(dst, lhs, rhs, (row, col), accumulate);
            row += 1;
        }
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
        // slice. `row + M` and `col + N` are within the shapes, as asserted above, and `k` is: the inner
        // sizes are equal (`check_product`). Rows of `rhs` are contiguous, as `multiply_small` asserts.
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
        unrolled!(
            m < M,
            for (sum, b) in sums[m].iter_mut().zip(b) {
                *sum = if FMA {
                    a[m].fused(b, *sum)
                } else {
                    a[m] * b + *sum
                };
            }
        );
    }
    unrolled!(m < M, {
        let to = &mut dst.data[(row + m) * dst.row_stride + col..][..N];
        store(to, sums[m], accumulate);
    });
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
                    let product = |product: &dyn Fn(&mut MatMut<T>)| {
                        let mut found = start.clone();
                        product(&mut MatMut::new(&mut found, (rows, cols), stride));
                        found
                    };
                    // The tiles of every processor, as far as this one can compute them.
                    let found = [
                        product(&|dst| multiply_small(dst, lhs, rhs, accumulate)),
                        product(&|dst| {
                            Accumulators::<256>.product::<T, false>(dst, lhs, rhs, accumulate)
                        }),
                        product(&|dst| {
                            Accumulators::<1024>.product::<T, false>(dst, lhs, rhs, accumulate)
                        }),
                    ];
                    for i in 0..rows {
                        for j in 0..stride {
                            let terms =
                                (0..inner).map(|k| lhs.at(i, k).to_f64() * rhs.at(k, j).to_f64());
                            let expected = match j < cols {
                                true => terms.sum::<f64>() + if accumulate { 0.5 } else { 0. },
                                false => 0.5,
                            };
                            for found in &found {
                                let off = (found[i * stride + j].to_f64() - expected).abs();
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
