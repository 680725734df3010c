//! The cap on the spectral norm of a block, `Q min(1, a / s)`.
//!
//! The singular values of a skew matrix come in equal pairs, one for each plane, so `s` has the
//! derivative `(u v^T - v u^T) / 2`, where `v` is a unit vector of the plane and `u = Q v / s`. Above
//! the cap:
//!
//! ```text
//! dQ = (a / s) (G - <G, Q> / s * (u v^T - v u^T) / 2)
//! ```
//!
//! Where several planes share the largest `s`, the first one found stands for all: a subgradient.

use super::composed::on_host;
use super::dense::{multiply, store, transposed, widened};
use super::eigen::{eigenvalues, symmetric_eigen};
use super::{Blockwise, Real};
use candle_core::{D, Device, Result, Tensor};

/// The largest norm allowed.
pub(crate) struct Clip(pub(crate) f64);

impl Blockwise for Clip {
    const NAME: &'static str = "clip";

    fn forward<T: Real>(&self, q: &[T], b: usize, out: &mut [T]) {
        let wide = widened(q);
        let norm = spectral_norm(&wide, b);
        // A NaN compares false, and passes.
        if norm > self.0 {
            let factor = self.0 / norm;
            let scaled: Vec<f64> = wide.iter().map(|v| v * factor).collect();
            store(&scaled, out);
        } else {
            out.copy_from_slice(q);
        }
    }

    fn backward<T: Real>(&self, q: &[T], grad: &[T], b: usize, out: &mut [T]) {
        let wide = widened(q);
        // The same norm as in the forward pass, so that both take the same side of the cap.
        let norm = spectral_norm(&wide, b);
        if norm > self.0 {
            let g = widened(grad);
            let along: f64 = g.iter().zip(&wide).map(|(g, q)| g * q).sum();
            let slope = norm_slope(&wide, b);
            let values = g.iter().zip(&slope);
            let dq: Vec<f64> = values
                .map(|(g, slope)| self.0 / norm * (g - along / norm * slope))
                .collect();
            store(&dq, out);
        } else {
            out.copy_from_slice(grad);
        }
    }

    /// The planes of the largest singular value come from the CPU; with `M` their [`norm_slope`],
    /// `s = <Q, M>` has the right value and the right derivative.
    fn composed(&self, q: &Tensor, b: usize) -> Result<Tensor> {
        let slopes: Vec<f64> = on_host(q)?
            .chunks_exact(b * b)
            .flat_map(|q| norm_slope(q, b))
            .collect();
        let slopes = Tensor::from_vec(slopes, q.shape(), &Device::Cpu)?;
        let slopes = slopes.to_dtype(q.dtype())?.to_device(q.device())?;
        let norm = (q * slopes)?
            .flatten_from(1)?
            .sum_keepdim(D::Minus1)?
            .unsqueeze(2)?;
        let above = norm.gt(self.0)?;
        let ones = norm.ones_like()?;
        // Of both branches, so that no division by 0 reaches the gradient.
        let safe = above.where_cond(&norm, &ones)?;
        let factor = above.where_cond(&(safe.recip()? * self.0)?, &ones)?;
        q.broadcast_mul(&factor)
    }
}

/// The largest singular value of a square matrix; NaN where an entry is not finite.
pub(super) fn spectral_norm(q: &[f64], b: usize) -> f64 {
    let Some((scale, square)) = scaled_square(q, b) else {
        return f64::NAN;
    };
    let largest = eigenvalues(square, b).into_iter().fold(0., f64::max);
    scale * largest.sqrt()
}

/// The derivative of the spectral norm of a skew matrix; 0 at `Q = 0`.
fn norm_slope(q: &[f64], b: usize) -> Vec<f64> {
    let mut slope = vec![0.; b * b];
    let Some((scale, square)) = scaled_square(q, b) else {
        return vec![f64::NAN; b * b];
    };
    if scale == 0. {
        return slope;
    }
    let (values, vectors) = symmetric_eigen(square, b);
    let top = (1..b).fold(0, |best, i| if values[i] > values[best] { i } else { best });
    let v = &vectors[top * b..(top + 1) * b];
    let turned = q
        .chunks_exact(b)
        .map(|row| row.iter().zip(v).map(|(q, v)| q / scale * v).sum());
    let mut u: Vec<f64> = turned.collect();
    let length = u.iter().map(|u| u * u).sum::<f64>().sqrt();
    u.iter_mut().for_each(|u| *u /= length);
    for i in 0..b {
        for j in 0..b {
            slope[i * b + j] = (u[i] * v[j] - v[i] * u[j]) / 2.;
        }
    }
    slope
}

/// The largest entry `m` and `(Q/m)^T (Q/m)`, which neither overflows nor vanishes; `None` where an
/// entry is not finite.
fn scaled_square(q: &[f64], b: usize) -> Option<(f64, Vec<f64>)> {
    if !q.iter().all(|v| v.is_finite()) {
        return None;
    }
    let scale = q.iter().fold(0f64, |m, v| m.max(v.abs()));
    let divisor = if scale > 0. { scale } else { 1. };
    let q: Vec<f64> = q.iter().map(|v| v / divisor).collect();
    let mut square = vec![0.; b * b];
    multiply(&transposed(&q, b), &q, b, &mut square);
    Some((scale, square))
}
