//! A polynomial `R = sum_k c_k Q^k`, of which the Cayley-Neumann series is one.

use super::dense::{add_diagonal, multiply, transposed};
use super::{Blockwise, Real};
use candle_core::{Result, Tensor};

/// The coefficients, constant first.
pub(crate) struct Series(Vec<f64>);

impl Series {
    /// The Cayley-Neumann series.
    pub(crate) fn cayley_neumann(terms: usize, last_coefficient: u8) -> Self {
        Self(coefficients(terms, last_coefficient))
    }

    /// Real and imaginary part at the eigenvalue `il` of `Q`.
    pub(crate) fn at(&self, l: f64) -> (f64, f64) {
        let higher = self.0.iter().rev();
        higher.fold((0., 0.), |(re, im), c| (c - l * im, l * re))
    }
}

/// | terms | last coefficient 1 | last coefficient 2 |
/// |---|---|---|
/// | 0, 1 | 1 | 1 |
/// | 2 | 1, 2 | 1, 2 |
/// | 3 | 1, 2, 2, 1 | 1, 2, 2 |
/// | t from 4 | 1, 2 .. 2, 1 (`t` numbers) | 1, 2 .. 2 (`t` numbers) |
fn coefficients(terms: usize, last_coefficient: u8) -> Vec<f64> {
    // The tools that train it answer the same for three terms as for four.
    let terms = match (terms, last_coefficient) {
        (3, 1) => 4,
        _ => terms.max(1),
    };
    let mut c = vec![2.; terms];
    c[0] = 1.;
    if terms > 2 && last_coefficient == 1 {
        c[terms - 1] = 1.;
    }
    c
}

impl Blockwise for Series {
    const NAME: &'static str = "cayley-neumann";

    // Horner's rule from the highest power: `H <- Q H + c_k I`.
    fn forward<T: Real>(&self, q: &[T], b: usize, out: &mut [T]) {
        let mut higher = vec![T::zero(); b * b];
        out.fill(T::zero());
        for (step, c) in self.0.iter().rev().enumerate() {
            if step > 0 {
                higher.copy_from_slice(out);
                multiply(q, &higher, b, out);
            }
            add_diagonal(out, b, T::from_f64(*c));
        }
    }

    // With `N = Q^T`, `dQ = sum_k N^k G P_k`, where `P_k = c_{k+1} I + c_{k+2} N + ..`. From the
    // highest power down: `P <- c I + N P`, then `S <- G P + N S`.
    fn backward<T: Real>(&self, q: &[T], grad: &[T], b: usize, out: &mut [T]) {
        let n = transposed(q, b);
        let zero = || vec![T::zero(); b * b];
        let (mut p, mut product) = (zero(), zero());
        out.fill(T::zero());
        for c in self.0[1..].iter().rev() {
            multiply(&n, &p, b, &mut product);
            std::mem::swap(&mut p, &mut product);
            add_diagonal(&mut p, b, T::from_f64(*c));
            multiply(&n, out, b, &mut product);
            multiply(grad, &p, b, out);
            out.iter_mut().zip(&product).for_each(|(s, v)| *s += *v);
        }
    }

    fn composed(&self, q: &Tensor, b: usize) -> Result<Tensor> {
        let eye = Tensor::eye(b, q.dtype(), q.device())?.unsqueeze(0)?;
        let mut sum = q.zeros_like()?;
        for (step, c) in self.0.iter().rev().enumerate() {
            if step > 0 {
                sum = q.matmul(&sum)?;
            }
            sum = sum.broadcast_add(&(&eye * *c)?)?;
        }
        Ok(sum)
    }
}

#[cfg(test)]
mod tests {
    use super::{Series, coefficients};

    #[test]
    fn an_eigenvalue_is_mapped_as_the_formula_says() {
        // I + 2Q + 2Q^2 + 2Q^3 + Q^4 at 0.5i.
        let (re, im) = Series::cayley_neumann(5, 1).at(0.5);
        assert_eq!((re, im), (0.5625, 0.75));
    }

    #[test]
    fn every_number_of_terms_has_its_coefficients() {
        for (terms, last, expected) in [
            (0, 1, vec![1.]),
            (1, 1, vec![1.]),
            (2, 1, vec![1., 2.]),
            (3, 1, vec![1., 2., 2., 1.]),
            (4, 1, vec![1., 2., 2., 1.]),
            (5, 1, vec![1., 2., 2., 2., 1.]),
            (0, 2, vec![1.]),
            (2, 2, vec![1., 2.]),
            (3, 2, vec![1., 2., 2.]),
            (5, 2, vec![1., 2., 2., 2., 2.]),
        ] {
            assert_eq!(
                coefficients(terms, last),
                expected,
                "{terms} terms, last {last}"
            );
        }
    }
}
