//! From rotations back to packed parameters.

use super::check_blocks;
use crate::error::{Error, Result};
use crate::ops::maps::{eigen::symmetric_eigen, generator_of, on_host};
use candle_core::{Device, Tensor};
use rayon::prelude::*;

/// The angle in degrees that a plane may turn by at most: from `tan` of half of it on, here 1146, the
/// parameters of the Cayley map lose digits.
pub(crate) const WIDEST_TURN: f64 = 179.9;

/// The skew blocks of which rotations are the [Cayley transform](super::cayley()).
///
/// ```text
/// Q = (R - I)(R + I)^-1
/// ```
///
/// Computed in f64; outside any graph.
///
/// # Shapes
///
/// `r` is `(D, b, b)`, f32 or f64, of orthogonal blocks. The answer has the same shape, is always f64,
/// and is skew to the bit; it is on the device of `r`.
///
/// # Errors
///
/// [`Error::Argument`] when `r` is not of rank 3, its blocks are not square, its dtype is neither f32
/// nor f64, or a block is no rotation: it mirrors, turns a plane by 180 degrees (to within 1e-5), which
/// no `Q` gives, or is not finite.
///
/// # Examples
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_doft::rotation::{cayley, inverse_cayley};
///
/// let q = Tensor::new(&[[[0f64, 2.], [-2., 0.]]], &Device::Cpu)?;
/// let again = inverse_cayley(&cayley(&q)?)?.to_vec3::<f64>()?;
/// assert!((again[0][0][1] - 2.).abs() < 1e-15 && again[0][1][0] == -again[0][0][1]);
/// # Ok::<(), candle_doft::Error>(())
/// ```
pub fn inverse_cayley(r: &Tensor) -> Result<Tensor> {
    let b = check_blocks("inverse_cayley", "the shape of `r`", r)?;
    let host = on_host(r)?;
    let q: Vec<f64> = host
        .par_chunks_exact(b * b)
        .flat_map_iter(|r| generator_of(r, b))
        .collect();
    // A turn of 180 degrees has an infinite tangent of its half.
    if let Some(found) = q.iter().find(|v| v.is_nan() || v.abs() > 1e7) {
        return Err(Error::argument(
            "inverse_cayley",
            "an entry of the skew block",
            format!("{found:e}"),
            "a rotation whose planes turn by less than 180 degrees",
        ));
    }
    Ok(Tensor::from_vec(q, r.shape(), r.device())?)
}

/// Rotations with every plane that turns by more than [`WIDEST_TURN`] turned by that much, and how many
/// blocks had one. Other planes stay as they are, to rounding.
pub(crate) fn short_of_half_turns(r: &Tensor) -> Result<(Tensor, usize)> {
    let b = r.dim(1)?;
    let mut blocks = on_host(r)?;
    let turned = blocks
        .par_chunks_exact_mut(b * b)
        .map(|r| usize::from(pull_back(r, b)))
        .sum();
    Ok((Tensor::from_vec(blocks, r.shape(), &Device::Cpu)?, turned))
}

/// The planes are the eigenvectors of `(R + R^T) / 2` whose eigenvalue, the cosine, is near -1. Between
/// them `R` is all but `-I`, so any pairs of them do.
fn pull_back(r: &mut [f64], b: usize) -> bool {
    let symmetric = (0..b * b).map(|at| (r[at] + r[at % b * b + at / b]) / 2.);
    let (values, vectors) = symmetric_eigen(symmetric.collect(), b);
    let (sine, cosine) = WIDEST_TURN.to_radians().sin_cos();
    let mut planes: Vec<(f64, &[f64])> = values.into_iter().zip(vectors.chunks_exact(b)).collect();
    planes.sort_by(|a, b| a.0.total_cmp(&b.0));
    // They come in pairs of one cosine, of which rounding may have put one on the other side.
    let count = planes.iter().filter(|(value, _)| *value < cosine).count();
    let count = count.next_multiple_of(2).min(b - b % 2);
    let wide: Vec<&[f64]> = planes[..count].iter().map(|(_, vector)| *vector).collect();
    for pair in wide.chunks_exact(2) {
        let (x, y) = (pair[0], pair[1]);
        let image = |v: &[f64]| -> Vec<f64> {
            let rows = r.chunks_exact(b);
            rows.map(|row| row.iter().zip(v).map(|(r, v)| r * v).sum())
                .collect()
        };
        let (rx, ry) = (image(x), image(y));
        let along: f64 = x.iter().zip(&ry).map(|(x, y)| x * y).sum();
        let sine = sine.copysign(along);
        // R x becomes cos x - sin y, R y becomes sin x + cos y.
        let change = |i: usize, j: usize| {
            (cosine * x[i] - sine * y[i] - rx[i]) * x[j]
                + (sine * x[i] + cosine * y[i] - ry[i]) * y[j]
        };
        let changes: Vec<f64> = (0..b * b).map(|at| change(at / b, at % b)).collect();
        r.iter_mut()
            .zip(changes)
            .for_each(|(r, change)| *r += change);
    }
    !wide.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rotation::{angles, orthogonality_error};

    #[test]
    fn half_turns_are_pulled_back_and_other_planes_stay() -> Result<()> {
        let (c, s) = (0.6f64, 0.8f64);
        // A half turn, a turn of 53 degrees, and an axis; then a block without half turns.
        let mut r = vec![0.; 50];
        for at in [0, 6] {
            r[at] = -1.;
        }
        (r[12], r[13], r[17], r[18], r[24]) = (c, s, -s, c, 1.);
        for at in (0..25).step_by(6) {
            r[25 + at] = 1.;
        }
        let r = Tensor::from_vec(r, (2, 5, 5), &Device::Cpu)?;
        assert!(inverse_cayley(&r).is_err());
        let (back, turned) = short_of_half_turns(&r)?;
        assert_eq!(turned, 1);
        assert!(orthogonality_error(&back)? < 1e-14);
        let found = angles(&back)?;
        let expected = [WIDEST_TURN.to_radians(), s.atan2(c)];
        assert!(
            found[0]
                .iter()
                .zip(expected)
                .all(|(f, e)| (f - e).abs() < 1e-9)
        );
        assert_eq!(found[1], [0., 0.]);
        assert!(inverse_cayley(&back).is_ok());
        Ok(())
    }
}
