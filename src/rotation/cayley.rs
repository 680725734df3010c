//! [`cayley`]: the exact Cayley transform, the default map.

use super::check_blocks;
use crate::error::Result;
use crate::ops::maps;
use candle_core::Tensor;

/// Turns skew-symmetric blocks into rotations with the Cayley transform.
///
/// ```text
/// R = (I + Q)(I - Q)^-1 = 2A - I,    A = (I - Q)^-1
/// ```
///
/// `Q` has no unit: a pair of entries `±v` turns its plane by `2 atan(v)` radians. Every finite `Q`
/// therefore gives a rotation short of a half turn, and `Q = 0` gives `I` exactly.
///
/// On CPU the inverse is eliminated in f64 with partial pivoting. Elsewhere Newton and Schulz'
/// iteration finds it in the dtype of `q`.
///
/// # Derivative
///
/// From `dA = A dQ A` and `G = dL/dR`: `dL/dQ = 2 Aᵀ G Aᵀ`. As `A = (R + I)/2`, only `R` is kept.
///
/// # Shapes
///
/// `q` and the result are `(D, b, b)`, f32 or f64: `D` blocks of size `b`, each with `Qᵀ = -Q`, which
/// [`skew`](super::skew()) guarantees and nobody checks here. `b = 1` gives `[[1]]`. A NaN stays in
/// its block. In f32, `max |R Rᵀ - I| <= 1e-5` for `||Q|| <= 100`.
///
/// # Errors
///
/// [`Error::Argument`](crate::Error::Argument) when `q` is not of rank 3, its blocks are not square,
/// or its dtype is neither f32 nor f64.
///
/// # Examples
///
/// `v = 1` is a quarter turn, for `2 atan(1) = π/2`:
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_doft::rotation::cayley;
///
/// let q = Tensor::new(&[[[0f64, 1.], [-1., 0.]]], &Device::Cpu)?;
/// let r = cayley(&q)?.squeeze(0)?.to_vec2::<f64>()?;
/// assert!(r[0][0].abs() < 1e-12 && (r[0][1] - 1.).abs() < 1e-12);
/// # Ok::<(), candle_doft::Error>(())
/// ```
///
/// # References
///
/// "Orthogonal Finetuning Made Scalable", arXiv:2506.19847: the transform that its Cayley-Neumann
/// series approximates. Some tools use the inverse; `file` translates.
pub fn cayley(q: &Tensor) -> Result<Tensor> {
    let b = check_blocks("cayley", "the shape of `q`", q)?;
    Ok(maps::apply(q, b, maps::Cayley)?)
}
