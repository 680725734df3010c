//! Products of strided views, their bounds checked: large ones by the `gemm` crate, small ones here.

/// A loop over the rows or columns of a tile, written out: the compiler unrolls none over so many sums, and would
/// keep sums that are indexed in memory.
macro_rules! unrolled {
    ($m:ident < $count:ident, $body:expr) => {
        unrolled!(@ $m, $count, $body, 0 1 2 3 4 5 6 7)
    };
    (@ $m:ident, $count:ident, $body:expr, $($at:literal)*) => {$(
        if $at < $count {
            // Never another value; the remainder is for tiles that this row is not in.
            let $m = $at % $count;
            $body
        }
    )*};
}

mod dots;
mod small;

pub(crate) use dots::multiply_dots;
pub(crate) use small::multiply_small;

use super::real::Real;
use gemm::Parallelism;
use std::mem::MaybeUninit;

/// A read-only matrix inside a slice.
#[derive(Clone, Copy)]
pub(crate) struct Mat<'a, T> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

/// A row-major matrix inside a slice, to be written; rows may lie apart.
pub(crate) struct MatMut<'a, T> {
    data: &'a mut [MaybeUninit<T>],
    /// Whether the elements may have no value yet, so that none can be added to.
    unset: bool,
    rows: usize,
    cols: usize,
    row_stride: usize,
}

// Panics rather than read outside `len`: the products below rest on it.
fn check(len: usize, (rows, cols): (usize, usize), (rs, cs): (usize, usize)) {
    if rows > 0 && cols > 0 {
        // Too small to overflow: sizes are those of a tensor that exists, or part of one.
        let last = (rows - 1) * rs + (cols - 1) * cs;
        assert!(last < len, "a matrix outside its slice");
    }
}

impl<'a, T: Real> Mat<'a, T> {
    /// The matrix of the given shape and strides that starts at the slice's first element.
    pub(crate) fn new(data: &'a [T], shape: (usize, usize), strides: (usize, usize)) -> Self {
        check(data.len(), shape, strides);
        Self {
            data,
            rows: shape.0,
            cols: shape.1,
            row_stride: strides.0,
            col_stride: strides.1,
        }
    }

    /// A contiguous row-major matrix.
    pub(crate) fn row_major(data: &'a [T], rows: usize, cols: usize) -> Self {
        Self::new(data, (rows, cols), (cols, 1))
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    /// The transposed view.
    pub(crate) fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    /// The rows from `start` on, `rows` of them, and of those the columns from `col` on, `cols`.
    pub(crate) fn part(self, (start, rows): (usize, usize), (col, cols): (usize, usize)) -> Self {
        let offset = start * self.row_stride + col * self.col_stride;
        let data = &self.data[offset.min(self.data.len())..];
        Self::new(data, (rows, cols), (self.row_stride, self.col_stride))
    }

    /// Copies the columns of a row from `start` on, as many as `to` holds.
    pub(crate) fn copy_row(&self, row: usize, start: usize, to: &mut [T]) {
        let from = &self.data[row * self.row_stride + start * self.col_stride..];
        match self.col_stride {
            1 => to.copy_from_slice(&from[..to.len()]),
            // 0 where a column stands for all.
            step => to
                .iter_mut()
                .enumerate()
                .for_each(|(i, to)| *to = from[i * step]),
        }
    }

    /// Whether the elements of a row follow each other.
    pub(crate) fn has_whole_rows(&self) -> bool {
        self.col_stride == 1
    }

    /// One element.
    pub(crate) fn at(&self, row: usize, col: usize) -> T {
        self.data[row * self.row_stride + col * self.col_stride]
    }
}

impl<'a, T: Real> MatMut<'a, T> {
    /// The matrix whose rows start `row_stride` apart, at least `cols`.
    pub(crate) fn new(data: &'a mut [T], shape: (usize, usize), row_stride: usize) -> Self {
        #[allow(unsafe_code, reason = "no safe cast of a slice exists")]
        // SAFETY: the layouts are equal, and what is written to is private to this module and `small`,
        // which write values alone: the slice has its values again when the borrow ends.
        let data = unsafe { &mut *(std::ptr::from_mut(data) as *mut [MaybeUninit<T>]) };
        Self {
            unset: false,
            ..Self::unset(data, shape, row_stride)
        }
    }

    /// The same over memory without values: a product writes each element of its destination.
    pub(crate) fn unset(
        data: &'a mut [MaybeUninit<T>],
        shape: (usize, usize),
        row_stride: usize,
    ) -> Self {
        assert!(row_stride >= shape.1, "rows that overlap");
        check(data.len(), shape, (row_stride, 1));
        Self {
            data,
            unset: true,
            rows: shape.0,
            cols: shape.1,
            row_stride,
        }
    }
}

/// A vector of `n` elements that `fill` writes.
///
/// # Safety
///
/// `fill` writes every element.
#[allow(
    unsafe_code,
    reason = "zeros that are overwritten cost a pass on one thread"
)]
pub(crate) unsafe fn filled<T: Real>(n: usize, fill: impl FnOnce(&mut [MaybeUninit<T>])) -> Vec<T> {
    let mut out = Vec::with_capacity(n);
    fill(&mut out.spare_capacity_mut()[..n]);
    // SAFETY: the capacity is there, and the caller has seen to the values.
    unsafe { out.set_len(n) };
    out
}

/// `dst = lhs rhs`, or `dst += lhs rhs`, on the calling thread.
pub(crate) fn multiply<T: Real>(dst: MatMut<T>, lhs: Mat<T>, rhs: Mat<T>, accumulate: bool) {
    run(dst, lhs, rhs, accumulate, Parallelism::None);
}

/// The same on rayon's threads, for large products.
pub(crate) fn multiply_wide<T: Real>(dst: MatMut<T>, lhs: Mat<T>, rhs: Mat<T>, accumulate: bool) {
    let threads = Parallelism::Rayon(rayon::current_num_threads());
    run(dst, lhs, rhs, accumulate, threads);
}

/// Panics where a product does not fit its destination, or would add to memory without values.
fn check_product<T: Real>(dst: &MatMut<T>, lhs: Mat<T>, rhs: Mat<T>, accumulate: bool) {
    assert!(
        lhs.cols == rhs.rows && dst.rows == lhs.rows && dst.cols == rhs.cols,
        "matrices that do not fit"
    );
    assert!(
        !(accumulate && dst.unset),
        "nothing is there to be added to"
    );
}

/// Writes some sums, or adds them to what is there; [`check_product`] has seen that something is.
#[inline(always)]
fn store<T: Real, const N: usize>(to: &mut [MaybeUninit<T>], sums: [T; N], add: bool) {
    for (to, sum) in to.iter_mut().zip(sums) {
        #[allow(unsafe_code, reason = "a matrix that is added to has values")]
        // SAFETY: as above.
        match add {
            true => unsafe { *to.assume_init_mut() += sum },
            false => {
                to.write(sum);
            }
        }
    }
}

fn run<T: Real>(
    dst: MatMut<T>,
    lhs: Mat<T>,
    rhs: Mat<T>,
    accumulate: bool,
    parallelism: Parallelism,
) {
    check_product(&dst, lhs, rhs, accumulate);
    let alpha = if accumulate { T::one() } else { T::zero() };
    #[allow(unsafe_code, reason = "gemm takes pointers")]
    // SAFETY: `check` has seen that every element the shapes and strides reach lies inside its
    // slice, and `check_product` that the shapes fit; `dst` is borrowed mutably, so nothing else
    // aliases it, and its rows do not overlap. Where it may be unset it is not read: `accumulate`.
    unsafe {
        gemm::gemm(
            dst.rows,
            dst.cols,
            lhs.cols,
            dst.data.as_mut_ptr().cast::<T>(),
            1,
            dst.row_stride as isize,
            accumulate,
            lhs.data.as_ptr(),
            lhs.col_stride as isize,
            lhs.row_stride as isize,
            rhs.data.as_ptr(),
            rhs.col_stride as isize,
            rhs.row_stride as isize,
            alpha,
            T::one(),
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strided_products_are_those_of_the_definition() {
        let a: Vec<f64> = (0..40).map(|v| f64::from(v) * 0.7 - 3.).collect();
        let lhs = Mat::new(&a, (3, 4), (9, 2));
        let rhs = Mat::new(&a[1..], (4, 2), (1, 7));
        let mut dst = vec![1.; 12];
        multiply(MatMut::new(&mut dst, (3, 2), 5), lhs, rhs, true);
        for i in 0..3 {
            for j in 0..2 {
                let sum: f64 = (0..4).map(|k| lhs.at(i, k) * rhs.at(k, j)).sum();
                assert!((dst[i * 5 + j] - 1. - sum).abs() < 1e-12);
            }
        }
        assert_eq!(dst[2..5], [1.; 3], "between the rows nothing changes");
    }

    #[test]
    #[should_panic(expected = "a matrix outside its slice")]
    fn a_matrix_outside_its_slice_is_refused() {
        Mat::new(&[0f32; 5], (2, 3), (3, 1));
    }
}
