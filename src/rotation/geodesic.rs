//! [`geodesic`]: part of a rotation, along the shortest way.

use super::planes::Planes;
use super::{check_theta, generator};
use crate::config::{BlockLayout, Map};
use crate::error::{Error, Result};
use candle_core::{DType, Device, Tensor};

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
    let r = Planes::of(&q)?.turned(|l| strength * angle(l))?;
    Ok(r.to_device(theta.device())?)
}
