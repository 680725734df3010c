//! The maps in candle's own ops, for devices without a kernel. candle differentiates them.

use super::clip::norm_slope;
use candle_core::{D, DType, Device, Result, Tensor};

/// Packed rows to blocks: each entry is looked up among `theta`, `-theta` and a 0.
pub(crate) fn skew(theta: &Tensor, b: usize) -> Result<Tensor> {
    let (blocks, n) = theta.dims2()?;
    let device = theta.device();
    let zero = Tensor::zeros((blocks, 1), theta.dtype(), device)?;
    let mut index = vec![2 * n as u32; b * b];
    let mut entry = 0;
    for i in 0..b {
        for j in i + 1..b {
            index[i * b + j] = entry;
            index[j * b + i] = n as u32 + entry;
            entry += 1;
        }
    }
    if n == 0 || blocks == 0 {
        return Tensor::zeros((blocks, b, b), theta.dtype(), device);
    }
    let index = Tensor::from_vec(index, b * b, device)?;
    // `0 - v` keeps the sign of a zero.
    let values = Tensor::cat(&[theta, &theta.zeros_like()?.sub(theta)?, &zero], 1)?;
    values.index_select(&index, 1)?.reshape((blocks, b, b))
}

/// Newton and Schulz' iteration `X <- X (2 I - M X)` for the inverse of `M = I - Q`.
///
/// From `X = 2 M^T / (2 + g)` with `g >= ||Q||^2` the rest `I - M X` has norm below `g / (2 + g)`,
/// and each step squares it. The steps run outside the graph; the last one, taken inside it, has the
/// derivative `A dQ A` of the inverse.
pub(crate) fn cayley(q: &Tensor) -> Result<Tensor> {
    let (blocks, b, _) = q.dims3()?;
    if blocks == 0 {
        return Ok(q.clone());
    }
    let eye = Tensor::eye(b, q.dtype(), q.device())?.unsqueeze(0)?;
    let m = eye.broadcast_sub(q)?;
    let fixed = m.detach();
    let g = squared_norm(q)?;
    let start = (g.affine(0.5, 1.)?).recip()?;
    let mut x = fixed.transpose(1, 2)?.contiguous()?.broadcast_mul(&start)?;
    let two = (eye.clone() * 2.)?;
    let newton = |x: &Tensor, m: &Tensor| x.matmul(&two.broadcast_sub(&m.matmul(x)?)?);
    for _ in 0..newton_steps(largest(&g)?, q.dtype()) {
        x = newton(&x, &fixed)?.detach();
    }
    (newton(&x, &m)? * 2.)?.broadcast_sub(&eye)
}

/// Steps until `(g / (2 + g))^(2^k)` is below the rounding of the dtype.
fn newton_steps(g: f64, dtype: DType) -> usize {
    let digits = match dtype {
        DType::F64 => 37.,
        _ => 17.,
    };
    let steps = ((1. + g / 2.) * digits).log2().ceil();
    // A NaN or an infinity has no inverse to find.
    if steps.is_finite() { steps as usize } else { 0 }
}

/// `sum_k c_k Q^k` by Horner's rule.
pub(crate) fn series(q: &Tensor, coefficients: &[f64]) -> Result<Tensor> {
    let eye = Tensor::eye(q.dim(1)?, q.dtype(), q.device())?.unsqueeze(0)?;
    let mut sum = q.zeros_like()?;
    for (step, c) in coefficients.iter().rev().enumerate() {
        if step > 0 {
            sum = q.matmul(&sum)?;
        }
        sum = sum.broadcast_add(&(&eye * *c)?)?;
    }
    Ok(sum)
}

/// Taylor's polynomial of degree 12 of `Q / 2^s`, squared `s` times, then one step towards orthogonal.
///
/// In f64 where the device has it: squaring doubles the rounding each time.
pub(crate) fn exponential(q: &Tensor) -> Result<Tensor> {
    match q.device() {
        Device::Metal(_) => exponential_in(q, q.dtype()),
        _ => exponential_in(q, DType::F64),
    }
}

fn exponential_in(q: &Tensor, wide: DType) -> Result<Tensor> {
    let (blocks, b, _) = q.dims3()?;
    if blocks == 0 {
        return Ok(q.clone());
    }
    let dtype = q.dtype();
    let q = q.to_dtype(wide)?;
    let norm = largest(&squared_norm(&q)?)?.sqrt();
    // The remainder at 1/8 is 0.125^13 / 13! = 3e-22.
    let squarings = if norm.is_finite() {
        (norm * 8.).log2().ceil().max(0.)
    } else {
        0.
    };
    let q = (q * (-squarings).exp2())?;
    let eye = Tensor::eye(b, wide, q.device())?.unsqueeze(0)?;
    let mut r = eye.broadcast_as(q.shape())?.contiguous()?;
    for k in (1..=12).rev() {
        r = (q.matmul(&r)? / f64::from(k))?.broadcast_add(&eye)?;
    }
    for _ in 0..squarings as usize {
        r = r.matmul(&r)?;
    }
    let square = r.transpose(1, 2)?.contiguous()?.matmul(&r)?;
    let rest = eye.broadcast_sub(&square)?;
    (&r + (r.matmul(&rest)? * 0.5)?)?.to_dtype(dtype)
}

/// `Q min(1, a / s)`. The planes of the largest singular value come from the CPU; with `M` their
/// [`norm_slope`], `s = <Q, M>` has the right value and the right derivative.
pub(crate) fn clip(q: &Tensor, max_norm: f64) -> Result<Tensor> {
    let (blocks, b, _) = q.dims3()?;
    if blocks == 0 {
        return Ok(q.clone());
    }
    let host = q.detach().to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
    let host = host.flatten_all()?.to_vec1::<f64>()?;
    let slopes: Vec<f64> = host
        .chunks_exact(b * b)
        .flat_map(|q| norm_slope(q, b))
        .collect();
    let slopes = Tensor::from_vec(slopes, (blocks, b, b), &Device::Cpu)?;
    let slopes = slopes.to_dtype(q.dtype())?.to_device(q.device())?;
    let norm = (q * slopes)?
        .flatten_from(1)?
        .sum_keepdim(D::Minus1)?
        .unsqueeze(2)?;
    let above = norm.gt(max_norm)?;
    let ones = norm.ones_like()?;
    // Of both branches, so that no division by 0 reaches the gradient.
    let safe = above.where_cond(&norm, &ones)?;
    let factor = above.where_cond(&(safe.recip()? * max_norm)?, &ones)?;
    q.broadcast_mul(&factor)
}

/// At least `||Q||^2` of each skew block, `(D, 1, 1)`: its singular values come in pairs.
fn squared_norm(q: &Tensor) -> Result<Tensor> {
    let sum = q.detach().sqr()?.flatten_from(1)?.sum_keepdim(D::Minus1)?;
    sum.unsqueeze(2)? * 0.5
}

fn largest(x: &Tensor) -> Result<f64> {
    x.flatten_all()?.max(0)?.to_dtype(DType::F64)?.to_scalar()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::maps::{self, apply};
    use crate::rng::SplitMix64;
    use candle_core::Var;

    fn normal(shape: (usize, usize, usize), scale: f64, seed: u64) -> Vec<f64> {
        let mut rng = SplitMix64::new(seed);
        (0..shape.0 * shape.1 * shape.2)
            .map(|_| rng.normal() * scale)
            .collect()
    }

    /// Values and gradients of both, from one packed parameter and one uneven upstream.
    fn compare(
        name: &str,
        dtype: DType,
        tolerance: f64,
        kernel: impl Fn(&Tensor) -> Result<Tensor>,
        composed: impl Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<()> {
        for (blocks, b, scale) in [
            (1, 1, 1.),
            (3, 2, 0.5),
            (2, 5, 3.),
            (2, 32, 0.3),
            (2, 8, 0.),
        ] {
            let n = b * (b - 1) / 2;
            let theta = normal((blocks, n, 1), scale, 7);
            let theta = Tensor::from_vec(theta, (blocks, n), &Device::Cpu)?;
            let theta = Var::from_tensor(&theta.to_dtype(dtype)?)?;
            let upstream = normal((blocks, b, b), 1., 8);
            let upstream = Tensor::from_vec(upstream, (blocks, b, b), &Device::Cpu)?;
            let upstream = upstream.to_dtype(dtype)?;
            let ours = kernel(&theta.apply_op1(maps::Skew(b))?)?;
            let theirs = composed(&skew(&theta, b)?)?;
            near(name, &ours, &theirs, tolerance)?;
            if n > 0 {
                let ours = (ours * &upstream)?.sum_all()?.backward()?;
                let theirs = (theirs * &upstream)?.sum_all()?.backward()?;
                let (ours, theirs) = (ours.get(&theta).unwrap(), theirs.get(&theta).unwrap());
                near(name, ours, theirs, 10. * tolerance)?;
            }
        }
        Ok(())
    }

    fn near(name: &str, a: &Tensor, b: &Tensor, tolerance: f64) -> Result<()> {
        let flat = |x: &Tensor| x.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>();
        let (x, y) = (flat(a)?, flat(b)?);
        let size = y.iter().fold(1f64, |m, v| m.max(v.abs()));
        assert_eq!(a.dims(), b.dims());
        for (i, (x, y)) in x.iter().zip(&y).enumerate() {
            assert!(
                (x - y).abs() <= tolerance * size,
                "{name}, entry {i}: {x} and {y}"
            );
        }
        Ok(())
    }

    #[test]
    fn the_composed_maps_agree_with_their_kernels() -> Result<()> {
        for (dtype, tolerance) in [(DType::F64, 1e-11), (DType::F32, 2e-5)] {
            compare(
                "skew",
                dtype,
                tolerance,
                |q| Ok(q.clone()),
                |q| Ok(q.clone()),
            )?;
            compare(
                "cayley",
                dtype,
                tolerance,
                |q| apply(q, maps::Cayley),
                cayley,
            )?;
            compare(
                "exp",
                dtype,
                tolerance,
                |q| apply(q, maps::Exponential),
                exponential,
            )?;
            let c = maps::coefficients(5, 1);
            let kernel = |q: &Tensor| apply(q, maps::Series(c.clone()));
            compare("series", dtype, tolerance, kernel, |q| series(q, &c))?;
            let kernel = |q: &Tensor| apply(q, maps::Clip(0.9));
            compare("clip", dtype, tolerance, kernel, |q| clip(q, 0.9))?;
        }
        Ok(())
    }

    #[test]
    fn every_composed_map_is_orthogonal_in_f32_up_to_norm_100() -> Result<()> {
        let q = normal((1, 496, 1), 1., 3);
        let q = Tensor::from_vec(q, (1, 496), &Device::Cpu)?;
        let q = skew(&q, 32)?;
        let norm = maps::spectral_norm(&q.flatten_all()?.to_vec1::<f64>()?, 32);
        let q = (q * (100. / norm))?.to_dtype(DType::F32)?;
        let eye = Tensor::eye(32, DType::F64, &Device::Cpu)?.unsqueeze(0)?;
        let narrow = exponential_in(&q, DType::F32)?;
        for (name, r) in [("cayley", cayley(&q)?), ("exp in f32", narrow.clone())] {
            let r = r.to_dtype(DType::F64)?;
            let square = r.matmul(&r.transpose(1, 2)?.contiguous()?)?;
            near(name, &square, &eye, 1e-5)?;
        }
        // An angle of 100 radians is off by 100 roundings, and by some more from the squarings.
        near("exp in f32", &narrow, &exponential(&q)?, 5e-4)
    }
}
