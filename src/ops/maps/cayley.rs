//! The Cayley transform: `R = 2A - I`, `A = (I - Q)^-1`, and `dL/dQ = 2 A^T G A^T`.

use super::composed::{LARGEST, Steps, on_host, refused_above, squared_norm};
use super::dense::{add_diagonal, add_scaled, multiply, store, transposed};
use super::{Blockwise, Real};
use crate::ops::vectorized::vectorized;
use candle_core::{DType, Result, Tensor};

pub(crate) struct Cayley;

impl Blockwise for Cayley {
    const NAME: &'static str = "cayley";
    const KEEPS_RESULT: bool = true;

    // Eliminated in f64 also for f32, where `||Q|| = 100` would cost more than the 1e-5 promised.
    fn forward<T: Real>(&self, q: &[T], b: usize, out: &mut [T]) {
        let mut a: Vec<f64> = q.iter().map(|v| 0. - v.to_f64()).collect();
        add_diagonal(&mut a, b, 1.);
        invert(&mut a, b);
        a.iter_mut().for_each(|v| *v *= 2.);
        add_diagonal(&mut a, b, -1.);
        store(&a, out);
    }

    // With `A = (R + I)/2`, `2 A^T G A^T = (R^T + I) G (R^T + I) / 2`.
    fn backward<T: Real>(&self, r: &[T], grad: &[T], b: usize, out: &mut [T]) {
        let mut turned = transposed(r, b);
        add_diagonal(&mut turned, b, T::one());
        let mut left = vec![T::zero(); b * b];
        multiply(&turned, grad, b, &mut left);
        multiply(&left, &turned, b, out);
        let half = T::from_f64(0.5);
        out.iter_mut().for_each(|v| *v = half * *v);
    }

    fn composed(&self, q: &Tensor, b: usize) -> Result<Tensor> {
        composed_in(q, b, Steps::on(q.device()))
    }
}

/// Newton and Schulz' iteration `X <- X (2 I - M X)` for the inverse of `M = I - Q`.
///
/// From `X = 2 M^T / (2 + g)` with `g >= ||Q||^2` the rest `I - M X` has norm below `g / (2 + g)`,
/// and each step squares it. The steps run outside the graph; the last one, taken inside it, has
/// the derivative `A dQ A` of the inverse.
pub(super) fn composed_in(q: &Tensor, b: usize, steps: Steps) -> Result<Tensor> {
    let eye = Tensor::eye(b, q.dtype(), q.device())?.unsqueeze(0)?;
    let m = eye.broadcast_sub(q)?;
    let fixed = m.detach();
    let g = squared_norm(q)?;
    let mut start = (g.affine(0.5, 1.)?).recip()?;
    let largest = match steps {
        // A block that has gone wrong must not keep the others from their steps.
        Steps::Read => {
            let finite = on_host(&g)?.into_iter().filter(|g| g.is_finite());
            finite.fold(0., f64::max)
        }
        Steps::Fixed => {
            start = refused_above(&start, &g)?;
            LARGEST * LARGEST
        }
    };
    let mut x = fixed.transpose(1, 2)?.contiguous()?.broadcast_mul(&start)?;
    let two = (eye.clone() * 2.)?;
    let newton = |x: &Tensor, m: &Tensor| x.matmul(&two.broadcast_sub(&m.matmul(x)?)?);
    for _ in 0..newton_steps(largest, q.dtype()) {
        x = newton(&x, &fixed)?.detach();
    }
    (newton(&x, &m)? * 2.)?.broadcast_sub(&eye)
}

/// The skew `Q` of which an orthogonal `R` without half turns is the transform: `I - 2 (I + R)^-1`. Not
/// finite, or huge, where a plane turns by 180 degrees.
pub(crate) fn generator_of(r: &[f64], b: usize) -> Vec<f64> {
    let mut a = r.to_vec();
    add_diagonal(&mut a, b, 1.);
    invert(&mut a, b);
    let mut q = vec![0.; b * b];
    for i in 0..b {
        for j in i + 1..b {
            // Skew to the bit, whatever `r` lacks.
            q[i * b + j] = a[j * b + i] - a[i * b + j];
            q[j * b + i] = -q[i * b + j];
        }
    }
    q
}

/// Steps until `(g / (2 + g))^(2^k)` is below the rounding of the dtype.
fn newton_steps(g: f64, dtype: DType) -> usize {
    let digits = match dtype {
        DType::F64 => 37.,
        _ => 17.,
    };
    ((1. + g / 2.) * digits).log2().ceil() as usize
}

vectorized! {
    /// Gauss-Jordan elimination in place with partial pivoting. The inner loop adds a whole row.
    fn invert(a: &mut [f64], n: usize) {
        let mut swapped = vec![0; n];
        let mut row = vec![0.; n];
        for k in 0..n {
            let size = |i: &usize| a[i * n + k].abs();
            let pivot = (k + 1..n).fold(k, |best, i| if size(&i) > size(&best) { i } else { best });
            swapped[k] = pivot;
            if pivot != k {
                let (above, below) = a.split_at_mut(pivot * n);
                above[k * n..(k + 1) * n].swap_with_slice(&mut below[..n]);
            }
            let scale = 1. / a[k * n + k];
            a[k * n + k] = 1.;
            a[k * n..(k + 1) * n].iter_mut().for_each(|v| *v *= scale);
            row.copy_from_slice(&a[k * n..(k + 1) * n]);
            for (i, other) in a.chunks_exact_mut(n).enumerate() {
                let factor = other[k];
                if i != k && factor != 0. {
                    other[k] = 0.;
                    add_scaled(other, -factor, &row);
                }
            }
        }
        // The rows were swapped before, so the columns of the inverse are swapped after, last first.
        for k in (0..n).rev().filter(|k| swapped[*k] != *k) {
            for row in a.chunks_exact_mut(n) {
                row.swap(k, swapped[k]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_matrix_that_needs_pivots_is_inverted() {
        let a = vec![0., 2., 1., 1., 0., 0., 0., 3., 0.];
        let mut inverse = a.clone();
        invert(&mut inverse, 3);
        let mut product = vec![0.; 9];
        multiply(&a, &inverse, 3, &mut product);
        for (i, v) in product.iter().enumerate() {
            let expected = f64::from(u8::from(i % 4 == 0));
            assert!((v - expected).abs() < 1e-15, "entry {i} is {v}");
        }
    }

    #[test]
    fn the_generator_gives_its_rotation() {
        let q = [0., 0.3, -2., -0.3, 0., 0.7, 2., -0.7, 0.];
        let mut r = vec![0.; 9];
        Cayley.forward(&q, 3, &mut r);
        for (found, expected) in generator_of(&r, 3).iter().zip(q) {
            assert!((found - expected).abs() < 1e-14, "{found}, not {expected}");
        }
    }
}
