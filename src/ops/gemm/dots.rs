//! Products whose result is small beside one of their sides: that side is read once, as it lies.

use super::{Mat, MatMut, check_product};
use crate::ops::real::Real;
use pulp::{Arch, Simd, WithSimd};

/// Terms that are summed before they are added to others: so much of the small side stays in cache.
const DEPTH: usize = 1024;

/// `dst = lhs rhs^T` on the calling thread, for sides whose rows are contiguous: each element is the dot product of
/// two rows. Best where `rhs` has few rows.
pub(crate) fn multiply_dots<T: Real>(dst: &mut MatMut<T>, lhs: Mat<T>, rhs: Mat<T>) {
    Arch::new().dispatch(Dots::new(dst, lhs, rhs));
}

struct Dots<'a, 'd, T> {
    dst: &'a mut MatMut<'d, T>,
    lhs: Mat<'a, T>,
    rhs: Mat<'a, T>,
}

impl<'a, 'd, T: Real> Dots<'a, 'd, T> {
    fn new(dst: &'a mut MatMut<'d, T>, lhs: Mat<'a, T>, rhs: Mat<'a, T>) -> Self {
        check_product(dst, lhs, rhs.t(), false);
        assert!(
            lhs.col_stride == 1 && rhs.col_stride == 1,
            "rows of both matrices are contiguous"
        );
        Self { dst, lhs, rhs }
    }

    /// The product in tiles of `M` rows of `lhs` and `N` of `rhs`.
    #[inline(always)]
    fn tiles<S: Simd, const M: usize, const N: usize>(&mut self, simd: S) {
        // Once for a product without terms, which is 0.
        for start in (0..self.lhs.cols.max(1)).step_by(DEPTH) {
            let terms = (start, DEPTH.min(self.lhs.cols - start));
            let mut row = 0;
            while row + M <= self.dst.rows {
                self.rows::<S, M, N>(simd, row, terms);
                row += M;
            }
            while row < self.dst.rows {
                self.rows::<S, 1, N>(simd, row, terms);
                row += 1;
            }
        }
    }

    /// Of `M` rows the sum over some terms.
    #[inline(always)]
    fn rows<S: Simd, const M: usize, const N: usize>(
        &mut self,
        simd: S,
        row: usize,
        terms: (usize, usize),
    ) {
        let lhs = rows_of::<T, M>(self.lhs, row, terms);
        let mut col = 0;
        while col + N <= self.dst.cols {
            let sums = dots::<T, S, M, N>(simd, lhs, rows_of(self.rhs, col, terms));
            self.put((row, col), sums, terms.0 > 0);
            col += N;
        }
        while col < self.dst.cols {
            let sums = dots::<T, S, M, 1>(simd, lhs, rows_of(self.rhs, col, terms));
            self.put((row, col), sums, terms.0 > 0);
            col += 1;
        }
    }

    /// Sums of the first terms, or of later ones, which are added.
    #[inline(always)]
    fn put<const M: usize, const N: usize>(
        &mut self,
        (row, col): (usize, usize),
        sums: [[T; N]; M],
        later: bool,
    ) {
        for (m, sums) in sums.into_iter().enumerate() {
            let to = &mut self.dst.data[(row + m) * self.dst.row_stride + col..][..N];
            super::store(to, sums, later);
        }
    }
}

impl<T: Real> WithSimd for Dots<'_, '_, T> {
    type Output = ();

    // The sums are in registers, 24 of 32 or 8 of 16; both operands need some as well.
    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        match S::REGISTER_COUNT {
            32.. => self.tiles::<S, 3, 8>(simd),
            _ => self.tiles::<S, 2, 4>(simd),
        }
    }
}

/// The columns of `terms` of some rows from `row` on.
#[inline(always)]
fn rows_of<T: Real, const M: usize>(
    from: Mat<'_, T>,
    row: usize,
    (start, depth): (usize, usize),
) -> [&[T]; M] {
    std::array::from_fn(|m| {
        let start = (row + m) * from.row_stride + start;
        &from.data[start.min(from.data.len())..][..depth]
    })
}

#[inline(always)]
fn dots<T: Real, S: Simd, const M: usize, const N: usize>(
    simd: S,
    lhs: [&[T]; M],
    rhs: [&[T]; N],
) -> [[T; N]; M] {
    let count = T::packs::<S>(lhs[0]).0.len();
    let a = lhs.map(|row| &T::packs::<S>(row).0[..count]);
    let b = rhs.map(|row| &T::packs::<S>(row).0[..count]);
    let mut sums = [[T::splat(simd, T::zero()); N]; M];
    for k in 0..count {
        unrolled!(n < N, {
            let b = b[n][k];
            unrolled!(m < M, {
                sums[m][n] = T::fused_packs(simd, a[m][k], b, sums[m][n]);
            });
        });
    }
    let mut dots = [[T::zero(); N]; M];
    unrolled!(m < M, {
        unrolled!(n < N, {
            dots[m][n] = T::sum(simd, sums[m][n]);
            let (a, b) = (T::packs::<S>(lhs[m]).1, T::packs::<S>(rhs[n]).1);
            a.iter().zip(b).for_each(|(a, b)| dots[m][n] += *a * *b);
        });
    });
    dots
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compare<T: Real>(unit: f64) {
        let value = |i: usize| T::from_f64((i as f64 * 0.37).sin());
        let values: Vec<T> = (0..40_000).map(value).collect();
        for (rows, inner, cols) in [
            (1, 1, 1),
            (3, 5, 7),
            (7, 64, 8),
            (8, 2 * DEPTH + 21, 13),
            (13, 65, 16),
            (2, 0, 3),
        ] {
            let lhs = Mat::new(&values, (rows, inner), (inner + 3, 1));
            let rhs = Mat::new(&values[11..], (cols, inner), (inner, 1));
            let stride = cols + 2;
            let product = |product: &dyn Fn(&mut MatMut<T>)| {
                let mut found = vec![T::from_f64(0.5); rows * stride];
                product(&mut MatMut::new(&mut found, (rows, cols), stride));
                found
            };
            // The tiles of every processor, as far as this one can compute them.
            let found = [
                product(&|dst| multiply_dots(dst, lhs, rhs)),
                product(&|dst| Dots::new(dst, lhs, rhs).with_simd(pulp::Scalar::new())),
                product(&|dst| Dots::new(dst, lhs, rhs).tiles::<_, 3, 8>(pulp::Scalar::new())),
            ];
            for (i, j) in (0..rows).flat_map(|i| (0..stride).map(move |j| (i, j))) {
                let term = |k| lhs.at(i, k).to_f64() * rhs.at(j % cols, k).to_f64();
                // Between the rows nothing changes.
                let expected = if j < cols {
                    (0..inner).map(term).sum()
                } else {
                    0.5
                };
                // What sums in one go can lose at most: one rounding of everything for each term.
                let size: f64 = (0..inner).map(|k| term(k).abs()).sum();
                let bound = unit * inner.min(DEPTH + 3) as f64 * size;
                for found in &found {
                    let off = (found[i * stride + j].to_f64() - expected).abs();
                    assert!(off <= bound, "{rows}x{inner}x{cols} {i},{j}: {off:e}");
                }
            }
        }
    }

    #[test]
    fn dots_are_those_of_the_definition() {
        compare::<f32>(f64::from(f32::EPSILON) / 2.0);
        // The reference rounds as well.
        compare::<f64>(f64::EPSILON);
    }

    #[test]
    #[should_panic(expected = "rows of both matrices are contiguous")]
    fn columns_that_lie_apart_are_refused() {
        let (a, mut c) = ([0f32; 16], [0f32; 4]);
        let (lhs, rhs) = (Mat::row_major(&a, 2, 3), Mat::new(&a, (2, 3), (1, 2)));
        multiply_dots(&mut MatMut::new(&mut c, (2, 2), 2), lhs, rhs);
    }
}
