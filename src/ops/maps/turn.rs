//! From packed parameters to rotation blocks in one operation: `R = map(cap(skew(theta / c)))`.
//!
//! What lies between theta and R is made block by block and thrown away; the backward pass makes it
//! again, but for an R that a map's derivative is taken from.

use super::skew::{fold, unpack};
use super::{Clip, Map};
use crate::ops::real::{Real, by_dtype, slice, tensor, with_slice};
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

/// The blocks of `theta` `(D, n)`, `(D, b, b)`: of `theta / divisor`, with the norm of `Q` capped where
/// there is a cap.
pub(crate) fn turn<M: Map>(
    theta: &Tensor,
    b: usize,
    divisor: f64,
    max_norm: Option<f64>,
    map: M,
) -> Result<Tensor> {
    let theta = theta.contiguous()?;
    let factor = 1. / divisor;
    match max_norm {
        None => theta.apply_op1(Turn { b, factor, map }),
        Some(cap) => theta.apply_op1(Turn {
            b,
            factor,
            map: Capped(Clip(cap), map),
        }),
    }
}

/// A map behind the cap on the norm of its argument.
#[derive(Clone)]
struct Capped<M>(Clip, M);

impl<M: Map> Map for Capped<M> {
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
}

struct Turn<M> {
    b: usize,
    factor: f64,
    map: M,
}

impl<M: Map> Turn<M> {
    /// Q of one packed row.
    fn generator<T: Real>(&self, theta: &[T], q: &mut [T]) {
        let factor = T::from_f64(self.factor);
        unpack(theta.iter().map(|v| *v * factor), self.b, q);
    }

    fn forward<T: Real>(
        &self,
        storage: &CpuStorage,
        layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let ((blocks, n), b) = (layout.shape().dims2()?, self.b);
        let theta = &slice::<T>(storage, layout)?[..blocks * n];
        let mut out = vec![T::zero(); blocks * b * b];
        out.par_chunks_exact_mut(b * b)
            .enumerate()
            .for_each(|(d, out)| {
                let mut q = vec![T::zero(); b * b];
                self.generator(&theta[d * n..(d + 1) * n], &mut q);
                self.map.forward(&q, b, out);
            });
        Ok((T::to_cpu_storage_owned(out), (blocks, b, b).into()))
    }

    fn backward<T: Real>(&self, theta: &Tensor, r: &Tensor, dr: &Tensor) -> Result<Tensor> {
        let ((blocks, n), b) = (theta.dims2()?, self.b);
        let mut out = vec![T::zero(); blocks * n];
        let (r, dr) = (r.contiguous()?, dr.contiguous()?);
        with_slice::<T, _>(theta, |theta, _| {
            with_slice::<T, _>(&r, |r, _| {
                with_slice::<T, _>(&dr, |dr, _| {
                    // Blocks of size 1 have no parameters.
                    out.par_chunks_exact_mut(n.max(1))
                        .enumerate()
                        .for_each(|(d, out)| {
                            let block = d * b * b..(d + 1) * b * b;
                            let (mut q, mut dq) = (vec![T::zero(); b * b], vec![T::zero(); b * b]);
                            let kept = match M::KEEPS_RESULT {
                                true => &r[block.clone()],
                                false => {
                                    self.generator(&theta[d * n..(d + 1) * n], &mut q);
                                    &q
                                }
                            };
                            self.map.backward(kept, &dr[block], b, &mut dq);
                            fold(&dq, b, T::from_f64(self.factor), out);
                        });
                    Ok(())
                })
            })
        })?;
        tensor(out, (blocks, n))
    }
}

impl<M: Map> CustomOp1 for Turn<M> {
    fn name(&self) -> &'static str {
        M::NAME
    }

    fn cpu_fwd(&self, theta: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        by_dtype!(theta, forward(theta, layout), self)
    }

    fn bwd(&self, theta: &Tensor, r: &Tensor, dr: &Tensor) -> Result<Option<Tensor>> {
        let dtheta = by_dtype!(theta, backward(theta, r, dr), self)?;
        Ok(Some(dtheta))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::maps::{Cayley, Exponential, Series, Skew, apply, coefficients};
    use crate::rng::SplitMix64;
    use candle_core::{Device, Var};

    /// In one operation and step by step, with an uneven upstream; the cap is active or is not.
    fn compare<M: Map>(map: M) -> Result<()> {
        for (blocks, b, cap) in [
            (3, 1, None),
            (2, 2, None),
            (3, 5, Some(0.1)),
            (3, 5, Some(100.)),
            (2, 8, Some(0.3)),
        ] {
            let mut rng = SplitMix64::new(5);
            let n = b * (b - 1) / 2;
            let mut normal = |count: usize| (0..count).map(|_| rng.normal()).collect::<Vec<f64>>();
            let theta = Tensor::from_vec(normal(blocks * n), (blocks, n), &Device::Cpu)?;
            let theta = Var::from_tensor(&theta)?;
            let upstream = normal(blocks * b * b);
            let upstream = Tensor::from_vec(upstream, (blocks, b, b), &Device::Cpu)?;
            let divisor = 2. * (b as f64).sqrt();
            let ours = turn(&theta, b, divisor, cap, map.clone())?;
            let mut q = (theta.as_tensor() / divisor)?.apply_op1(Skew(b))?;
            if let Some(cap) = cap {
                q = apply(&q, Clip(cap))?;
            }
            let theirs = apply(&q, map.clone())?;
            let off = |a: &Tensor, b: &Tensor| -> Result<f64> {
                match a.elem_count() {
                    0 => Ok(0.),
                    _ => (a - b)?.abs()?.max_all()?.to_scalar(),
                }
            };
            let found = off(&ours, &theirs)?;
            assert!(found < 1e-13, "{} {b} {cap:?}: {found:e}", M::NAME);
            let ours = (ours * &upstream)?.sum_all()?.backward()?;
            let theirs = (theirs * &upstream)?.sum_all()?.backward()?;
            let (Some(ours), Some(theirs)) = (ours.get(&theta), theirs.get(&theta)) else {
                candle_core::bail!("no gradient");
            };
            let found = off(ours, theirs)?;
            assert!(found < 1e-12, "{} {b} {cap:?}: slope {found:e}", M::NAME);
        }
        Ok(())
    }

    #[test]
    fn one_operation_is_the_steps_that_it_stands_for() -> Result<()> {
        compare(Cayley)?;
        compare(Exponential)?;
        compare(Series(coefficients(5, 1)))
    }
}
