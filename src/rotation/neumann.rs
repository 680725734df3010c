//! [`cayley_neumann`]: the truncated series that other tools train.

use super::check_blocks;
use crate::config::Map;
use crate::error::Result;
use crate::ops::maps;
use candle_core::Tensor;

/// Turns skew-symmetric blocks into near-rotations with the truncated series of the Cayley transform.
///
/// ```text
/// R = I + 2Q + 2Q^2 + .. + 2Q^(t-2) + last Q^(t-1)
/// ```
///
/// | `terms` | last coefficient 1 | last coefficient 2 |
/// |---|---|---|
/// | 0, 1 | `I` | `I` |
/// | 2 | `I + 2Q` | `I + 2Q` |
/// | 3 | as 4 | `I + 2Q + 2Q^2` |
/// | 4 | `I + 2Q + 2Q^2 + Q^3` | `I + 2Q + 2Q^2 + 2Q^3` |
/// | 5 | `I + 2Q + 2Q^2 + 2Q^3 + Q^4` | `I + 2Q + 2Q^2 + 2Q^3 + 2Q^4` |
///
/// Not orthogonal: an eigenvalue `±iλ` of `Q` gives the singular value `|1 - λ^4|` at five terms with
/// last coefficient 1. Meant for adapters that were trained with it; [`cayley`](super::cayley()) is
/// exact and as fast.
///
/// # Derivative
///
/// With `N = Qᵀ`, `G = dL/dR` and `R = Σ c_k Q^k`: `dL/dQ = Σ_k N^k G P_k`,
/// `P_k = c_{k+1} I + c_{k+2} N + ..`. Only `Q` is kept.
///
/// # Shapes
///
/// `q` and the result are `(D, b, b)`, f32 or f64. `b = 1` gives `[[1]]`, `Q = 0` gives `I` exactly.
///
/// # Errors
///
/// [`Error::Argument`](crate::Error::Argument) when `q` is not of rank 3, its blocks are not square,
/// or its dtype is neither f32 nor f64; [`Error::Config`](crate::Error::Config) for more than 64 terms
/// or a last coefficient other than 1 and 2.
///
/// # Examples
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_doft::rotation::cayley_neumann;
///
/// let q = Tensor::new(&[[[0f64, 0.5], [-0.5, 0.]]], &Device::Cpu)?;
/// let r = cayley_neumann(&q, 5, 1)?.squeeze(0)?.to_vec2::<f64>()?;
/// assert_eq!(r, [[0.5625, 0.75], [-0.75, 0.5625]]);
/// # Ok::<(), candle_doft::Error>(())
/// ```
///
/// # References
///
/// "Orthogonal Finetuning Made Scalable", arXiv:2506.19847.
pub fn cayley_neumann(q: &Tensor, terms: usize, last_coefficient: u8) -> Result<Tensor> {
    let b = check_blocks("cayley_neumann", "the shape of `q`", q)?;
    Map::CayleyNeumann {
        terms,
        last_coefficient,
    }
    .check()?;
    let series = maps::Series::cayley_neumann(terms, last_coefficient);
    Ok(maps::apply(q, b, series)?)
}
