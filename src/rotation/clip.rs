//! [`clip`]: the cap on the spectral norm of `Q`.

use super::check_blocks;
use crate::config::check_max_norm;
use crate::error::Result;
use crate::ops::maps;
use candle_core::Tensor;

/// Scales blocks down whose spectral norm is above `max_norm`.
///
/// ```text
/// Q min(1, max_norm / s),    s = ||Q||
/// ```
///
/// `s` is the true norm of each block, from an eigenvalue solver. It bounds the angles of a block: `2
/// atan(max_norm)` for Cayley, `max_norm` for the exponential.
///
/// # Derivative
///
/// Below the cap the gradient passes as it is. Above it also goes through `s`: the singular values of
/// a skew matrix come in equal pairs, one for each plane with `Q v = s u`, and
/// `ds/dQ = (u vᵀ - v uᵀ) / 2`.
///
/// # Shapes
///
/// `q` and the result are `(D, b, b)`, f32 or f64, each block with `Qᵀ = -Q`. `Q = 0` stays 0, and a
/// block with a NaN passes as it is.
///
/// # Errors
///
/// [`Error::Argument`](crate::Error::Argument) when `q` is not of rank 3, its blocks are not square,
/// or its dtype is neither f32 nor f64; [`Error::Config`](crate::Error::Config) when `max_norm` is not
/// a finite number above 0.
///
/// # Examples
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_doft::rotation::clip;
///
/// let q = Tensor::new(&[[[0f64, 2.], [-2., 0.]], [[0., 0.5], [-0.5, 0.]]], &Device::Cpu)?;
/// let capped = clip(&q, 1.)?.to_vec3::<f64>()?;
/// assert!((capped[0][0][1] - 1.).abs() < 1e-15);
/// assert_eq!(capped[1][0][1], 0.5);
/// # Ok::<(), candle_doft::Error>(())
/// ```
pub fn clip(q: &Tensor, max_norm: f64) -> Result<Tensor> {
    let b = check_blocks("clip", "the shape of `q`", q)?;
    check_max_norm(max_norm)?;
    Ok(maps::apply(q, b, maps::Clip(max_norm))?)
}
