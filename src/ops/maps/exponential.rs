//! `exp(Q)` by scaling and squaring, in f64.
//!
//! ```text
//! exp(Q) = (T(Q / 2^s))^(2^s),    T the Taylor polynomial of degree 16,    ||Q / 2^s|| <= 1/2
//! ```
//!
//! The remainder of `T` is below `0.5^17 / 17! = 3e-20`. The adjoint of `dQ -> d exp(Q)` is the same
//! derivative taken at `Q^T`, and a derivative comes with the value when every product `X Y` also
//! makes `dX Y + X dY`.
//!
//! # References
//!
//! Higham, "Functions of Matrices", SIAM 2008, chapter 10: scaling and squaring, and section 10.6 for
//! its derivative.

use super::composed::{LARGEST, on_host, refused_above, squared_norm};
use super::dense::{add_diagonal, add_scaled, multiply, store, transposed, widened};
use super::{Blockwise, Real};
use candle_core::{DType, Device, Result, Tensor};

pub(crate) struct Exponential;

impl Blockwise for Exponential {
    const NAME: &'static str = "exponential";

    fn forward<T: Real>(&self, q: &[T], b: usize, out: &mut [T]) {
        let q = Jet {
            value: widened(q),
            slope: None,
        };
        store(&polished(exp(q, b).value, b), out);
    }

    fn backward<T: Real>(&self, q: &[T], grad: &[T], b: usize, out: &mut [T]) {
        let q = Jet {
            value: widened(&transposed(q, b)),
            slope: Some(widened(grad)),
        };
        if let Some(slope) = exp(q, b).slope {
            store(&slope, out);
        }
    }

    // In f64 where the device has it: squaring doubles the rounding each time.
    fn composed(&self, q: &Tensor, b: usize) -> Result<Tensor> {
        match q.device() {
            Device::Metal(_) => composed_in(q, b, q.dtype()),
            Device::Cuda(_) => without_a_look(q, b),
            Device::Cpu => composed_in(q, b, DType::F64),
        }
    }
}

/// The same as [`composed_in`] in f64, squared as often for every block as one of norm [`LARGEST`] needs.
/// What that rounds away is `2^-53 2^s`, below 1e-12.
pub(super) fn without_a_look(q: &Tensor, b: usize) -> Result<Tensor> {
    let dtype = q.dtype();
    let q = q.to_dtype(DType::F64)?;
    let squarings = (LARGEST * 8.).log2().ceil();
    let g = squared_norm(&q)?;
    let scale = refused_above(&(g.ones_like()? * (-squarings).exp2())?, &g)?;
    let q = q.broadcast_mul(&scale)?;
    let eye = Tensor::eye(b, DType::F64, q.device())?.unsqueeze(0)?;
    let mut r = composed_taylor(&q, &eye)?;
    for _ in 0..squarings as usize {
        r = r.matmul(&r)?;
    }
    straightened(&r, &eye)?.to_dtype(dtype)
}

/// Taylor's polynomial of degree 12; the remainder at a norm of 1/8 is 0.125^13 / 13! = 3e-22.
fn composed_taylor(q: &Tensor, eye: &Tensor) -> Result<Tensor> {
    let mut r = eye.broadcast_as(q.shape())?.contiguous()?;
    for k in (1..=12).rev() {
        r = (q.matmul(&r)? / f64::from(k))?.broadcast_add(eye)?;
    }
    Ok(r)
}

/// One step towards orthogonal.
fn straightened(r: &Tensor, eye: &Tensor) -> Result<Tensor> {
    let square = r.transpose(1, 2)?.contiguous()?.matmul(r)?;
    let rest = eye.broadcast_sub(&square)?;
    r + (r.matmul(&rest)? * 0.5)?
}

/// Taylor's polynomial of degree 12 of `Q / 2^s`, squared `s` times, then one step towards orthogonal.
/// Each block has its own `s`: more than it needs would round its entries away.
pub(super) fn composed_in(q: &Tensor, b: usize, wide: DType) -> Result<Tensor> {
    let dtype = q.dtype();
    let q = q.to_dtype(wide)?;
    let of_blocks = |values: Vec<f64>| {
        let values = Tensor::from_vec(values, (q.dim(0)?, 1, 1), &Device::Cpu)?;
        values.to_dtype(wide)?.to_device(q.device())
    };
    let squarings = |square: f64| match square.is_finite() {
        true => (square.sqrt() * 8.).log2().ceil().max(0.),
        false => 0.,
    };
    let squarings: Vec<f64> = on_host(&squared_norm(&q)?)?
        .into_iter()
        .map(squarings)
        .collect();
    let scales = squarings.iter().map(|s| (-s).exp2()).collect();
    let q = q.broadcast_mul(&of_blocks(scales)?)?;
    let eye = Tensor::eye(b, wide, q.device())?.unsqueeze(0)?;
    let mut r = composed_taylor(&q, &eye)?;
    let most = squarings.iter().copied().fold(0., f64::max);
    for step in 0..most as usize {
        let more = |s: &f64| f64::from(u8::from(*s > step as f64));
        let more = of_blocks(squarings.iter().map(more).collect())?;
        let more = more.gt(0.)?.broadcast_as(r.shape())?;
        r = more.where_cond(&r.matmul(&r)?, &r)?;
    }
    straightened(&r, &eye)?.to_dtype(dtype)
}

/// A matrix and, where asked for, its derivative in one direction.
struct Jet {
    value: Vec<f64>,
    slope: Option<Vec<f64>>,
}

impl Jet {
    fn zero(like: &Self) -> Self {
        let zero = vec![0.; like.value.len()];
        Self {
            slope: like.slope.is_some().then(|| zero.clone()),
            value: zero,
        }
    }

    fn times(&self, other: &Self, n: usize) -> Self {
        let mut out = Self::zero(self);
        multiply(&self.value, &other.value, n, &mut out.value);
        if let (Some(slope), Some(a), Some(b)) = (&mut out.slope, &self.slope, &other.slope) {
            let mut second = vec![0.; n * n];
            multiply(a, &other.value, n, slope);
            multiply(&self.value, b, n, &mut second);
            add_scaled(slope, 1., &second);
        }
        out
    }

    fn add_scaled(&mut self, factor: f64, other: &Self) {
        add_scaled(&mut self.value, factor, &other.value);
        if let (Some(to), Some(from)) = (&mut self.slope, &other.slope) {
            add_scaled(to, factor, from);
        }
    }

    fn scale(&mut self, factor: f64) {
        for part in [Some(&mut self.value), self.slope.as_mut()]
            .into_iter()
            .flatten()
        {
            part.iter_mut().for_each(|v| *v *= factor);
        }
    }
}

fn exp(mut q: Jet, n: usize) -> Jet {
    let norm = norm_bound(&q.value, n);
    if !norm.is_finite() {
        q.scale(f64::NAN);
        return q;
    }
    let mut squarings = 0;
    let mut scale = 1.;
    while norm * scale > 0.5 {
        scale *= 0.5;
        squarings += 1;
    }
    q.scale(scale);
    let mut r = taylor(&q, n);
    for _ in 0..squarings {
        r = r.times(&r, n);
    }
    r
}

/// At least the spectral norm of a skew matrix: its singular values come in pairs, hence the half.
fn norm_bound(q: &[f64], n: usize) -> f64 {
    let squares: f64 = q.iter().map(|v| v * v).sum();
    let rows = q
        .chunks_exact(n)
        .map(|row| row.iter().map(|v| v.abs()).sum());
    // `f64::max` would drop a NaN, so the sum of squares has to carry it.
    let largest = rows.fold(0f64, |a: f64, b: f64| a.max(b));
    if squares.is_nan() {
        squares
    } else {
        largest.min((squares / 2.).sqrt())
    }
}

// Paterson and Stockmeyer: four powers, then Horner's rule in `Q^4`, so 6 products for 16 terms.
fn taylor(q: &Jet, n: usize) -> Jet {
    let q2 = q.times(q, n);
    let q3 = q2.times(q, n);
    let q4 = q2.times(&q2, n);
    let mut inverse_factorials = [1.; 17];
    for k in 1..17 {
        inverse_factorials[k] = inverse_factorials[k - 1] / k as f64;
    }
    let c = &inverse_factorials;
    let mut sum = Jet::zero(q);
    for start in [12, 8, 4, 0] {
        if start == 12 {
            sum.add_scaled(c[16], &q4);
        } else {
            sum = q4.times(&sum, n);
        }
        for (k, power) in [q, &q2, &q3].into_iter().enumerate() {
            sum.add_scaled(c[start + k + 1], power);
        }
        add_diagonal(&mut sum.value, n, c[start]);
    }
    sum
}

/// One step towards the nearest orthogonal matrix, `R + R (I - R^T R) / 2`: each squaring doubled the
/// distance from orthogonal, this squares it.
fn polished(r: Vec<f64>, n: usize) -> Vec<f64> {
    let mut rest = vec![0.; n * n];
    multiply(&transposed(&r, n), &r, n, &mut rest);
    rest.iter_mut().for_each(|v| *v = 0. - *v);
    add_diagonal(&mut rest, n, 1.);
    let mut out = vec![0.; n * n];
    multiply(&r, &rest, n, &mut out);
    out.iter_mut().zip(&r).for_each(|(v, r)| *v = r + 0.5 * *v);
    out
}
