//! [`exponential`]: the matrix exponential.

use super::check_blocks;
use crate::error::Result;
use crate::ops::maps;
use candle_core::Tensor;

/// Turns skew-symmetric blocks into rotations with the matrix exponential.
///
/// ```text
/// R = exp(Q) = I + Q + Q^2/2 + Q^3/6 + ..
/// ```
///
/// A pair of entries `±v` turns its plane by `v` radians. Computed in f64 by scaling and squaring
/// (in f32 on Metal, which has no f64) and made orthogonal to rounding; `Q = 0` gives `I` exactly.
///
/// # Derivative
///
/// The adjoint of the Fréchet derivative, which is the derivative of `exp` at `Qᵀ` in the direction
/// `G = dL/dR`: `dL/dQ = ∫ exp(τQᵀ) G exp((1-τ)Qᵀ) dτ`, τ from 0 to 1. Only `Q` is kept.
///
/// # Shapes
///
/// `q` and the result are `(D, b, b)`, f32 or f64, each block with `Qᵀ = -Q`, which
/// [`skew`](super::skew()) guarantees and nobody checks here. `b = 1` gives `[[1]]`. A NaN stays in
/// its block.
///
/// # Errors
///
/// [`Error::Argument`](crate::Error::Argument) when `q` is not of rank 3, its blocks are not square,
/// or its dtype is neither f32 nor f64.
///
/// # Examples
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_doft::rotation::exponential;
///
/// let q = Tensor::new(&[[[0f64, 0.5], [-0.5, 0.]]], &Device::Cpu)?;
/// let r = exponential(&q)?.squeeze(0)?.to_vec2::<f64>()?;
/// assert!((r[0][0] - 0.5f64.cos()).abs() < 1e-15 && (r[0][1] - 0.5f64.sin()).abs() < 1e-15);
/// # Ok::<(), candle_doft::Error>(())
/// ```
///
/// # References
///
/// Higham, "Functions of Matrices", SIAM 2008, chapter 10.
pub fn exponential(q: &Tensor) -> Result<Tensor> {
    let b = check_blocks("exponential", "the shape of `q`", q)?;
    Ok(maps::apply(q, b, maps::Exponential)?)
}
