//! What a rotation does: its angles, and how far it is from orthogonal.

use super::check_blocks;
use crate::error::Result;
use crate::ops::maps::{eigen::symmetric_eigen, on_host};
use candle_core::Tensor;
use rayon::prelude::*;

/// Mixes cosine and sine of the angles. Two planes would be confused only if their angles added up to
/// twice this number of radians, which no round number does.
const MIX: f64 = 1.234_567;

/// The rotation angles of each block in radians, `0 <= angle <= π`, largest first.
///
/// A block of size `b` has `b / 2` planes (rounded down), each with its angle; an odd `b` leaves an
/// axis in place. Good to rounding near 0 and near `π` as well, for the angle comes from cosine and
/// sine. For the [series](super::cayley_neumann()), whose planes also stretch, it is the angle of the
/// turn alone. A block with an entry that is not finite has NaN angles.
///
/// # Shapes
///
/// `r` is `(D, b, b)`, f32 or f64, of blocks that a map of this module made. The answer has `D` lists
/// of `b / 2` numbers.
///
/// # Errors
///
/// [`Error::Argument`](crate::Error::Argument) when `r` is not of rank 3, its blocks are not square,
/// or its dtype is neither f32 nor f64.
///
/// # Examples
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_doft::rotation::angles;
///
/// let r = Tensor::new(&[[[0.6f64, 0.8], [-0.8, 0.6]]], &Device::Cpu)?;
/// assert!((angles(&r)?[0][0] - 0.8f64.atan2(0.6)).abs() < 1e-15);
/// # Ok::<(), candle_doft::Error>(())
/// ```
pub fn angles(r: &Tensor) -> Result<Vec<Vec<f64>>> {
    let b = check_blocks("angles", "the shape of `r`", r)?;
    let r = on_host(r)?;
    Ok(r.par_chunks_exact(b * b)
        .map(|r| block_angles(r, b))
        .collect())
}

/// With `R = C + K`, `C` symmetric and `K` skew, a plane turned by `φ` has the eigenvectors `z` with
/// `C z = cos φ z` and `-iK z = sin φ z`. They are those of the Hermitian `c C - i s K`, written as
/// the real symmetric
///
/// ```text
/// [  c C   s K ]
/// [ -s K   c C ]        z = x + iy,  acting on (x, y)
/// ```
///
/// and the quotients `z* C z` and `-i z* K z = 2 x^T K y` are exact to the square of the error of `z`.
fn block_angles(r: &[f64], b: usize) -> Vec<f64> {
    if !r.iter().all(|v| v.is_finite()) {
        return vec![f64::NAN; b / 2];
    }
    let (mut c, mut k) = (vec![0.; b * b], vec![0.; b * b]);
    for i in 0..b {
        for j in 0..b {
            let (v, w) = (r[i * b + j], r[j * b + i]);
            c[i * b + j] = (v + w) / 2.;
            k[i * b + j] = (v - w) / 2.;
        }
    }
    let (sine, cosine) = MIX.sin_cos();
    let mut mixed = vec![0.; 4 * b * b];
    for i in 0..b {
        for j in 0..b {
            let (c, k) = (cosine * c[i * b + j], sine * k[i * b + j]);
            mixed[i * 2 * b + j] = c;
            mixed[i * 2 * b + b + j] = k;
            mixed[(b + i) * 2 * b + j] = -k;
            mixed[(b + i) * 2 * b + b + j] = c;
        }
    }
    let (_, vectors) = symmetric_eigen(mixed, 2 * b);
    let mut found: Vec<f64> = vectors
        .chunks_exact(2 * b)
        .map(|z| {
            let (x, y) = z.split_at(b);
            let p = quadratic(x, &c, x) + quadratic(y, &c, y);
            (2. * quadratic(x, &k, y)).abs().atan2(p)
        })
        .collect();
    found.sort_by(|a, b| b.total_cmp(a));
    // Each plane shows four times: as z and its conjugate, and each of them also times i.
    found.into_iter().step_by(4).take(b / 2).collect()
}

fn quadratic(x: &[f64], a: &[f64], y: &[f64]) -> f64 {
    let rows = x.iter().zip(a.chunks_exact(y.len()));
    rows.map(|(x, row)| x * row.iter().zip(y).map(|(a, y)| a * y).sum::<f64>())
        .sum()
}

/// `max |R Rᵀ - I|` over all blocks, in f64: 0 without blocks, NaN where an entry is NaN.
///
/// # Shapes
///
/// `r` is `(D, b, b)`, f32 or f64.
///
/// # Errors
///
/// [`Error::Argument`](crate::Error::Argument) when `r` is not of rank 3, its blocks are not square,
/// or its dtype is neither f32 nor f64.
///
/// # Examples
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_doft::rotation::orthogonality_error;
///
/// let r = Tensor::new(&[[[0f64, 2.], [-1., 0.]]], &Device::Cpu)?;
/// assert_eq!(orthogonality_error(&r)?, 3.);
/// # Ok::<(), candle_doft::Error>(())
/// ```
pub fn orthogonality_error(r: &Tensor) -> Result<f64> {
    let b = check_blocks("orthogonality_error", "the shape of `r`", r)?;
    let r = on_host(r)?;
    let of_block = |r: &[f64]| {
        let mut worst = 0.;
        for (i, x) in r.chunks_exact(b).enumerate() {
            for (j, y) in r.chunks_exact(b).enumerate().skip(i) {
                let product: f64 = x.iter().zip(y).map(|(x, y)| x * y).sum();
                worst = larger(worst, (product - f64::from(u8::from(i == j))).abs());
            }
        }
        worst
    };
    let errors: Vec<f64> = r.par_chunks_exact(b * b).map(of_block).collect();
    Ok(errors.into_iter().fold(0., larger))
}

// `f64::max` would drop a NaN.
fn larger(a: f64, b: f64) -> f64 {
    if b > a || b.is_nan() { b } else { a }
}
