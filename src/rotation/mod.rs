//! From packed parameters `theta` to rotation blocks `R`.
//!
//! # The one convention
//!
//! A layer of input width `in` is cut into `D = in / b` blocks of size `b`. Block `d` acts on the
//! columns `d*b .. (d+1)*b`.
//!
//! * **Packing.** A row of `theta` is the strict upper triangle of `Q`, row by row:
//!   `(0,1), (0,2) .. (0,b-1), (1,2) ..`, so `n = b(b-1)/2` entries. `Q[i,j] = +v`, `Q[j,i] = -v`
//!   for `i < j`.
//! * **Divisor.** `Q = skew(theta / c)`, with `c` of [`Map::divisor`](crate::Map::divisor) in scaled
//!   OFT, else 1.
//! * **Side.** A linear layer computes `x . blockdiag(R) . W^T`, so its effective weight is
//!   `W . blockdiag(R)^T`: a row of the weight turns by `R^T` on its right.
//! * **Inverse.** `R(-Q) = R(Q)^T` for every map.
//!
//! By hand, for `b = 2`, `theta = 0.5`, `c = 1` and Cayley: `Q = [[0, .5], [-.5, 0]]`,
//! `R = [[.6, .8], [-.8, .6]]`; `x = [1, 0]` becomes `[.6, .8]`, and the row `W = [1, 0]` becomes
//! `W R^T = [.6, -.8]`.
//!
//! Adapter files of other tools are translated to this convention in `file`, nowhere else.

mod angles;
mod cayley;
mod clip;
mod effective;
mod exponential;
mod geodesic;
mod inverse;
mod nearest;
mod neumann;
mod planes;
mod skew;
mod svd;

pub use angles::{angles, orthogonality_error};
pub use cayley::cayley;
pub use clip::clip;
pub(crate) use effective::effective_weight;
pub use exponential::exponential;
pub use geodesic::geodesic;
pub use inverse::inverse_cayley;
pub(crate) use inverse::{WIDEST_TURN, short_of_half_turns};
pub(crate) use nearest::nearest_rotation;
pub use neumann::cayley_neumann;
pub(crate) use planes::Planes;
pub use skew::skew;

use crate::config::{BlockLayout, Map};
use crate::error::{Error, Result};
use crate::ops::maps;
use candle_core::{DType, Tensor};

/// From packed parameters to rotation blocks: `R = map(clip(skew(theta / c)))`.
///
/// The divisor `c`, the cap and the map are those of `layout`.
///
/// # Shapes
///
/// `theta` is `(D, n)`, or `(1, n)` when shared, f32 or f64; the answer is `(D, b, b)`, or
/// `(1, b, b)`. `theta = 0` gives the identity to the last bit.
///
/// # Errors
///
/// [`Error::Argument`] when `theta` does not fit the layout or is neither f32 nor f64.
///
/// # Examples
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_doft::{DoftConfig, rotation::rotation};
///
/// let layout = DoftConfig::default().with_block_size(2).with_scaled(false).layout("head", 2)?;
/// let theta = Tensor::new(&[[0.5f64]], &Device::Cpu)?;
/// let r = rotation(&theta, &layout)?.squeeze(0)?.to_vec2::<f64>()?;
/// assert!((r[0][0] - 0.6).abs() < 1e-12 && (r[0][1] - 0.8).abs() < 1e-12);
/// # Ok::<(), candle_doft::Error>(())
/// ```
pub fn rotation(theta: &Tensor, layout: &BlockLayout) -> Result<Tensor> {
    check_theta("rotation", theta, layout)?;
    let (b, c, cap) = (layout.block_size, layout.divisor(), layout.max_norm);
    Ok(match layout.map {
        Map::Cayley => maps::rotation(theta, b, c, cap, maps::Cayley)?,
        Map::CayleyNeumann {
            terms,
            last_coefficient,
        } => {
            let series = maps::Series::cayley_neumann(terms, last_coefficient);
            maps::rotation(theta, b, c, cap, series)?
        }
        Map::Exponential => maps::rotation(theta, b, c, cap, maps::Exponential)?,
    })
}

/// The blocks of a map for skew blocks that have divisor and cap in them already.
pub(crate) fn of_generator(map: Map, q: &Tensor) -> Result<Tensor> {
    match map {
        Map::Cayley => cayley(q),
        Map::CayleyNeumann {
            terms,
            last_coefficient,
        } => cayley_neumann(q, terms, last_coefficient),
        Map::Exponential => exponential(q),
    }
}

/// `||A||` of each block of `(D, b, b)`, the largest of all: how far it may move a vector of length 1.
pub(crate) fn spectral_norm(a: &Tensor) -> Result<f64> {
    let b = a.dim(1)?;
    let squares = maps::on_host(&a.transpose(1, 2)?.matmul(a)?)?;
    let values = squares
        .chunks_exact(b * b)
        .flat_map(|square| maps::eigen::eigenvalues(square.to_vec(), b));
    Ok(values.fold(0f64, f64::max).max(0.).sqrt())
}

fn check_theta(function: &'static str, theta: &Tensor, layout: &BlockLayout) -> Result<()> {
    if theta.dims() != [layout.rows(), layout.entries()] {
        return Err(Error::argument(
            function,
            "the shape of `theta`",
            format!("{:?}", theta.dims()),
            format!("[{}, {}]", layout.rows(), layout.entries()),
        ));
    }
    check_dtype(function, theta)
}

/// `Q = clip(skew(theta / c))`, `(D, b, b)`.
pub(crate) fn generator(theta: &Tensor, layout: &BlockLayout) -> Result<Tensor> {
    let q = skew(&(theta / layout.divisor())?, layout.block_size)?;
    match layout.max_norm {
        Some(max_norm) => clip(&q, max_norm),
        None => Ok(q),
    }
}

/// The strict upper triangles of blocks `(D, b, b)`, row by row: `(D, n)`.
pub(crate) fn packed(q: &Tensor) -> Result<Tensor> {
    let (blocks, b, _) = q.dims3()?;
    if b == 1 {
        return Ok(Tensor::zeros((blocks, 0), q.dtype(), q.device())?);
    }
    let upper = (0..b).flat_map(|i| (i + 1..b).map(move |j| (i * b + j) as u32));
    let upper = Tensor::new(upper.collect::<Vec<u32>>(), q.device())?;
    Ok(q.reshape((blocks, b * b))?.index_select(&upper, 1)?)
}

/// What the series of a map makes of the eigenvalue `il` of `Q`: real and imaginary part.
pub(crate) fn series_at(map: Map, l: f64) -> Option<(f64, f64)> {
    match map {
        Map::CayleyNeumann {
            terms,
            last_coefficient,
        } => Some(maps::Series::cayley_neumann(terms, last_coefficient).at(l)),
        Map::Cayley | Map::Exponential => None,
    }
}

/// The size `b` of `blocks`, which have to be `(D, b, b)` with `b` from 1, in f32 or f64.
fn check_blocks(function: &'static str, what: &'static str, blocks: &Tensor) -> Result<usize> {
    match *blocks.dims() {
        [_, b, columns] if b == columns && b > 0 => check_dtype(function, blocks).map(|()| b),
        ref dims => Err(Error::argument(
            function,
            what,
            format!("{dims:?}"),
            "square blocks (D, b, b) with b from 1",
        )),
    }
}

fn check_dtype(function: &'static str, x: &Tensor) -> Result<()> {
    match x.dtype() {
        DType::F32 | DType::F64 => Ok(()),
        found => Err(Error::argument(
            function,
            "the dtype",
            format!("{found:?}"),
            "F32 or F64; convert it with `to_dtype`",
        )),
    }
}
