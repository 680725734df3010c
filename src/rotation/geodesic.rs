//! [`geodesic`]: part of a rotation, along the shortest way.

use super::{check_theta, generator};
use crate::config::{BlockLayout, Map};
use crate::error::{Error, Result};
use crate::ops::maps::{eigen::symmetric_eigen, on_host};
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

/// Every angle of [`rotation`](super::rotation()) times `strength`, in the same planes.
///
/// ```text
/// R_s = exp(2s atan Q)  (Cayley),    R_s = exp(sQ)  (exponential)
/// ```
///
/// Orthogonal for every strength: 1 gives `R`, 0 the identity, -1 the inverse `Rᵀ`, 0.5 the half turn
/// that gives `R` when taken twice. Computed in f64 from the planes of `Q`; outside any graph.
///
/// # Shapes
///
/// `theta` is `(D, n)`, or `(1, n)` when shared, f32 or f64. The answer is `(D, b, b)`, or
/// `(1, b, b)`, always f64, on the device of `theta`. A block with an entry that is not finite is NaN.
///
/// # Errors
///
/// [`Error::Strength`] for the Cayley-Neumann series, which is not orthogonal and has no geodesic, and
/// for a strength that is not finite; [`Error::Argument`] when `theta` does not fit the layout or is
/// neither f32 nor f64.
///
/// # Examples
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_doft::{DoftConfig, rotation::geodesic};
///
/// // A quarter turn, and half of it.
/// let layout = DoftConfig::default().with_block_size(2).with_scaled(false).layout("head", 2)?;
/// let theta = Tensor::new(&[[1f32]], &Device::Cpu)?;
/// let r = geodesic(&theta, &layout, 0.5)?.squeeze(0)?.to_vec2::<f64>()?;
/// assert!((r[0][0] - 0.5f64.sqrt()).abs() < 1e-15 && (r[0][1] - 0.5f64.sqrt()).abs() < 1e-15);
/// # Ok::<(), candle_doft::Error>(())
/// ```
pub fn geodesic(theta: &Tensor, layout: &BlockLayout, strength: f64) -> Result<Tensor> {
    let refuse = |reason: &str| {
        Err(Error::Strength {
            strength,
            reason: reason.to_string(),
        })
    };
    if !strength.is_finite() {
        return refuse("it is not a finite number");
    }
    let angle: fn(f64) -> f64 = match layout.map {
        Map::Cayley => |l| 2. * l.atan(),
        Map::Exponential => |l| l,
        Map::CayleyNeumann { .. } => {
            return refuse(
                "the Cayley-Neumann series is not orthogonal, so it has no geodesic; \
                 take the linear strength",
            );
        }
    };
    check_theta("geodesic", theta, layout)?;
    let host = theta.detach().to_device(&Device::Cpu)?;
    let q = generator(&host.to_dtype(DType::F64)?, layout)?;
    let b = layout.block_size;
    let r: Vec<f64> = on_host(&q)?
        .par_chunks_exact(b * b)
        .flat_map_iter(|q| turned(q, b, |l| strength * angle(l)))
        .collect();
    Ok(Tensor::from_vec(r, q.shape(), theta.device())?)
}

/// `exp(i φ(H))` for the Hermitian `H = -iQ`, which is real when `φ` is odd.
///
/// `H` is the real symmetric `[[0, Q], [-Q, 0]]` on `(x, y)`, `z = x + iy`. From its eigenvectors,
/// `R = cos φ(H) + i sin φ(H)` is the upper left part of the cosine and the upper right of the sine:
/// `R = sum_k x_k (cos φ(l_k) x_k + sin φ(l_k) y_k)^T`.
fn turned(q: &[f64], b: usize, phi: impl Fn(f64) -> f64) -> Vec<f64> {
    if !q.iter().all(|v| v.is_finite()) {
        return vec![f64::NAN; b * b];
    }
    let mut h = vec![0.; 4 * b * b];
    for i in 0..b {
        for j in 0..b {
            h[i * 2 * b + b + j] = q[i * b + j];
            h[(b + i) * 2 * b + j] = 0. - q[i * b + j];
        }
    }
    let (values, vectors) = symmetric_eigen(h, 2 * b);
    let mut r = vec![0.; b * b];
    for (l, z) in values.iter().zip(vectors.chunks_exact(2 * b)) {
        let (sine, cosine) = phi(*l).sin_cos();
        let (x, y) = z.split_at(b);
        let row: Vec<f64> = x
            .iter()
            .zip(y)
            .map(|(x, y)| cosine * x + sine * y)
            .collect();
        for (x, r) in x.iter().zip(r.chunks_exact_mut(b)) {
            r.iter_mut().zip(&row).for_each(|(r, v)| *r += x * v);
        }
    }
    r
}
