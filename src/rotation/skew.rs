//! [`skew`]: unpacks the trained parameter.

use super::check_dtype;
use crate::error::{Error, Result};
use crate::ops::maps;
use candle_core::Tensor;

/// Unpacks rows of a strict upper triangle into skew-symmetric blocks.
///
/// ```text
/// Q[i,j] = +v,    Q[j,i] = -v,    v = theta[k],  k counting (0,1), (0,2) .. (0,b-1), (1,2) ..
/// ```
///
/// # Derivative
///
/// `dL/dv = dL/dQ[i,j] - dL/dQ[j,i]`.
///
/// # Shapes
///
/// `theta` is `(D, n)` with `n = b (b - 1) / 2`, f32 or f64; the answer is `(D, b, b)`. `b = 1` has
/// no entries and gives zeros.
///
/// # Errors
///
/// [`Error::Argument`] when `theta` is not of shape `(D, n)`, `b` is 0, or the dtype is neither f32
/// nor f64.
///
/// # Examples
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_doft::rotation::skew;
///
/// let q = skew(&Tensor::new(&[[1f32, 2., 3.]], &Device::Cpu)?, 3)?.squeeze(0)?;
/// assert_eq!(q.to_vec2::<f32>()?, [[0., 1., 2.], [-1., 0., 3.], [-2., -3., 0.]]);
/// # Ok::<(), candle_doft::Error>(())
/// ```
pub fn skew(theta: &Tensor, b: usize) -> Result<Tensor> {
    let n = b.saturating_mul(b.saturating_sub(1)) / 2;
    match theta.dims() {
        [_, entries] if *entries == n && b > 0 => {}
        dims => {
            return Err(Error::argument(
                "skew",
                "the shape of `theta`",
                format!("{dims:?}"),
                format!("(D, {n}) for blocks of size {b}, which is from 1"),
            ));
        }
    }
    check_dtype("skew", theta)?;
    Ok(maps::apply(theta, b, maps::Skew)?)
}
