//! Packed rows to skew-symmetric blocks, and to rotations in one operation.

use super::{Blockwise, Clip, apply};
use crate::ops::constants::Constant;
use crate::ops::graft::grafted;
use crate::ops::real::Real;
use candle_core::{Result, Tensor};

/// `R = map(clip(skew(theta / c)))`, `(D, b, b)`, of `theta` `(D, n)`; without a cap where there is
/// none. On CPU one operation: what lies between theta and R is made block by block and thrown away.
pub(crate) fn rotation<M: Blockwise>(
    theta: &Tensor,
    b: usize,
    divisor: f64,
    max_norm: Option<f64>,
    map: M,
) -> Result<Tensor> {
    let factor = 1. / divisor;
    match max_norm {
        None => apply(theta, b, Rotation { factor, map }),
        Some(cap) => {
            let map = Capped(Clip(cap), map);
            apply(theta, b, Rotation { factor, map })
        }
    }
}

/// `Q[i,j] = v`, `Q[j,i] = -v`. Backward `dv = dQ[i,j] - dQ[j,i]`.
pub(crate) struct Skew;

impl Blockwise for Skew {
    const NAME: &'static str = "skew";
    const PACKED: bool = true;

    fn forward<T: Real>(&self, theta: &[T], b: usize, out: &mut [T]) {
        unpack(theta.iter().copied(), b, out);
    }

    fn backward<T: Real>(&self, _: &[T], grad: &[T], b: usize, out: &mut [T]) {
        fold(grad, b, T::one(), out);
    }

    /// Each entry is looked up among `theta`, `-theta` and a 0; backward each packed entry looks up its two
    /// places. The sum over places that candle's own backward makes of a look-up is serial on a GPU.
    fn composed(&self, theta: &Tensor, b: usize) -> Result<Tensor> {
        let (blocks, n) = theta.dims2()?;
        if n == 0 || blocks == 0 {
            return Tensor::zeros((blocks, b, b), theta.dtype(), theta.device());
        }
        let fixed = theta.detach();
        let zero = Tensor::zeros((blocks, 1), theta.dtype(), theta.device())?;
        // `0 - v` keeps the sign of a zero.
        let values = Tensor::cat(&[&fixed, &fixed.zeros_like()?.sub(&fixed)?, &zero], 1)?;
        let places = Constant::SkewEntries(b).on(theta.device())?;
        let q = values.index_select(&places, 1)?.reshape((blocks, b, b))?;
        let back = move |_: &Tensor, _: &Tensor, dq: &Tensor| {
            let dq = dq.contiguous()?.reshape((blocks, b * b))?;
            let above = dq.index_select(&Constant::Above(b).on(dq.device())?, 1)?;
            let below = dq.index_select(&Constant::Below(b).on(dq.device())?, 1)?;
            Ok((Some((above - below)?), None))
        };
        grafted(theta, &fixed, q, Box::new(back))
    }
}

/// A map of `Q` behind the cap on its norm.
pub(super) struct Capped<M>(pub(super) Clip, pub(super) M);

impl<M: Blockwise> Blockwise for Capped<M> {
    const NAME: &'static str = M::NAME;

    fn forward<T: Real>(&self, q: &[T], b: usize, out: &mut [T]) {
        let mut capped = vec![T::zero(); b * b];
        self.0.forward(q, b, &mut capped);
        self.1.forward(&capped, b, out);
    }

    fn backward<T: Real>(&self, q: &[T], grad: &[T], b: usize, out: &mut [T]) {
        let mut kept = vec![T::zero(); b * b];
        self.0.forward(q, b, &mut kept);
        if M::KEEPS_RESULT {
            self.1.forward(&kept, b, out);
            kept.copy_from_slice(out);
        }
        let mut inner = vec![T::zero(); b * b];
        self.1.backward(&kept, grad, b, &mut inner);
        self.0.backward(q, &inner, b, out);
    }

    fn composed(&self, q: &Tensor, b: usize) -> Result<Tensor> {
        self.1.composed(&self.0.composed(q, b)?, b)
    }
}

/// A map of `Q = skew(factor theta)`.
pub(super) struct Rotation<M> {
    pub(super) factor: f64,
    pub(super) map: M,
}

impl<M: Blockwise> Rotation<M> {
    fn generator<T: Real>(&self, theta: &[T], b: usize) -> Vec<T> {
        let factor = T::from_f64(self.factor);
        let mut q = vec![T::zero(); b * b];
        unpack(theta.iter().map(|v| *v * factor), b, &mut q);
        q
    }
}

impl<M: Blockwise> Blockwise for Rotation<M> {
    const NAME: &'static str = M::NAME;
    const PACKED: bool = true;
    const KEEPS_RESULT: bool = M::KEEPS_RESULT;

    fn forward<T: Real>(&self, theta: &[T], b: usize, out: &mut [T]) {
        self.map.forward(&self.generator(theta, b), b, out);
    }

    fn backward<T: Real>(&self, kept: &[T], grad: &[T], b: usize, out: &mut [T]) {
        let mut dq = vec![T::zero(); b * b];
        match M::KEEPS_RESULT {
            true => self.map.backward(kept, grad, b, &mut dq),
            false => {
                let q = self.generator(kept, b);
                self.map.backward(&q, grad, b, &mut dq);
            }
        }
        fold(&dq, b, T::from_f64(self.factor), out);
    }

    fn composed(&self, theta: &Tensor, b: usize) -> Result<Tensor> {
        self.map
            .composed(&Skew.composed(&(theta * self.factor)?, b)?, b)
    }
}

/// The block of a packed row.
fn unpack<T: Real>(mut row: impl Iterator<Item = T>, b: usize, q: &mut [T]) {
    for i in 0..b {
        q[i * b + i] = T::zero();
        for (j, v) in (i + 1..b).zip(&mut row) {
            q[i * b + j] = v;
            // Not `-v`: a zero stays +0, so that the start is the identity to the bit.
            q[j * b + i] = T::zero() - v;
        }
    }
}

/// The gradient of a packed row from that of its block, times `factor`.
fn fold<T: Real>(g: &[T], b: usize, factor: T, out: &mut [T]) {
    let mut out = out.iter_mut();
    for i in 0..b {
        for (j, out) in (i + 1..b).zip(&mut out) {
            *out = (g[i * b + j] - g[j * b + i]) * factor;
        }
    }
}
