//! Softmax over rows, the silu-gated product, and rotary position embedding.

use super::composed::composed_in;
use super::real::{Real, by_dtype, elements, narrowed, tensor_as, with_elements};
use super::rows::{exponentials, for_rows, largest, sum_of, zip_map};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, D, Layout, Result, Shape, Tensor};

/// `y = exp(x - max) / sum`, `dx = y * (dy - sum(dy * y))`, over the last axis.
pub(crate) struct Softmax;

impl Softmax {
    pub(crate) fn composed(x: &Tensor) -> Result<Tensor> {
        let dtype = x.dtype();
        let x = x.to_dtype(composed_in(dtype))?;
        let largest = x.max_keepdim(D::Minus1)?.detach();
        let shifted = x.broadcast_sub(&largest)?.exp()?;
        let y = shifted.broadcast_div(&shifted.sum_keepdim(D::Minus1)?)?;
        y.to_dtype(dtype)
    }

    fn forward<T: Real>(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let mut y = elements::<T>(x, layout)?.into_owned();
        for_rows(&mut y, width(layout.dims()), |_, row| {
            let sum = exponentials(row, largest(row));
            let scale = T::one() / sum;
            row.iter_mut().for_each(|v| *v *= scale);
        });
        Ok((narrowed(y, x.dtype())?, layout.shape().clone()))
    }

    fn backward<T: Real>(&self, y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let width = width(y.dims());
        let dx = with_elements::<T, _>(y, |y| {
            with_elements::<T, _>(dy, |dy| {
                let mut dx = vec![T::zero(); y.len()];
                for_rows(&mut dx, width, |i, dx| {
                    let (y, dy) = (&y[i * width..][..width], &dy[i * width..][..width]);
                    let along = sum_of(y, dy, |y, dy| y * dy);
                    let pairs = y.iter().zip(dy);
                    dx.iter_mut()
                        .zip(pairs)
                        .for_each(|(dx, (y, dy))| *dx = *y * (*dy - along));
                });
                Ok(dx)
            })
        })?;
        tensor_as(dx, y.shape(), y.dtype()).map(Some)
    }
}

fn width(dims: &[usize]) -> usize {
    dims.last().copied().unwrap_or(1).max(1)
}

impl CustomOp1 for Softmax {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn cpu_fwd(&self, x: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        by_dtype!(x, forward(x, l), self)
    }

    fn bwd(&self, _: &Tensor, y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        by_dtype!(y, backward(y, dy), self)
    }
}

/// `silu(gate) * up`, `silu(g) = g / (1 + exp(-g))`.
pub(crate) struct SiluMul;

fn sigmoid<T: Real>(v: T) -> T {
    T::one() / (T::one() + (T::zero() - v).exp())
}

impl SiluMul {
    pub(crate) fn composed(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        let dtype = gate.dtype();
        let (gate, up) = (
            gate.to_dtype(composed_in(dtype))?,
            up.to_dtype(composed_in(dtype))?,
        );
        (gate.silu()? * up)?.to_dtype(dtype)
    }

    fn forward<T: Real>(
        &self,
        (gate, gl): (&CpuStorage, &Layout),
        (up, ul): (&CpuStorage, &Layout),
    ) -> Result<(CpuStorage, Shape)> {
        let (g, u) = (elements::<T>(gate, gl)?, elements::<T>(up, ul)?);
        let y = zip_map(&g, &u, |g, u| g * sigmoid(g) * u);
        Ok((narrowed(y, gate.dtype())?, gl.shape().clone()))
    }

    fn backward<T: Real>(
        &self,
        gate: &Tensor,
        up: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (dgate, dup) = with_elements::<T, _>(gate, |g| {
            with_elements::<T, _>(up, |u| {
                with_elements::<T, _>(dy, |dy| {
                    let dup = up.track_op();
                    let dup = dup.then(|| zip_map(g, dy, |g, dy| dy * g * sigmoid(g)));
                    let dgate = gate.track_op().then(|| {
                        let mut slopes = zip_map(g, u, |g, u| {
                            let s = sigmoid(g);
                            u * s * (T::one() + g * (T::one() - s))
                        });
                        for_rows(&mut slopes, 1, |i, slope| slope[0] *= dy[i]);
                        slopes
                    });
                    Ok((dgate, dup))
                })
            })
        })?;
        let give = |d: Option<Vec<T>>| d.map(|d| tensor_as(d, gate.shape(), gate.dtype()));
        Ok((give(dgate).transpose()?, give(dup).transpose()?))
    }
}

impl CustomOp2 for SiluMul {
    fn name(&self) -> &'static str {
        "silu-mul"
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gl: &Layout,
        up: &CpuStorage,
        ul: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        by_dtype!(gate, forward((gate, gl), (up, ul)), self)
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        by_dtype!(gate, backward(gate, up, dy), self)
    }
}

/// Which pairs of a head turn: `(i, i + d/2)`, or `(2i, 2i + 1)` when interleaved. Pair `i` at position
/// `t` turns by the angle of `cos[t, i]` and `sin[t, i]`; backward turns back.
#[derive(Clone)]
pub(crate) struct Rope {
    pub(crate) cos: Tensor,
    pub(crate) sin: Tensor,
    pub(crate) interleaved: bool,
}

impl Rope {
    pub(crate) fn composed(&self, x: &Tensor) -> Result<Tensor> {
        let dtype = composed_in(x.dtype());
        if x.dtype() != dtype {
            return self.composed(&x.to_dtype(dtype)?)?.to_dtype(x.dtype());
        }
        let (batch, heads, steps, width) = x.dims4()?;
        let table = |t: &Tensor| -> Result<Tensor> {
            let t = t.detach().to_dtype(x.dtype())?;
            match t.rank() {
                3 => t.narrow(1, 0, steps)?.unsqueeze(1),
                _ => t.narrow(0, 0, steps),
            }
        };
        let (cos, sin) = (table(&self.cos)?, table(&self.sin)?);
        let (a, b) = match self.interleaved {
            true => {
                let pairs = x.reshape((batch, heads, steps, width / 2, 2))?;
                let half = |i| pairs.narrow(D::Minus1, i, 1)?.squeeze(D::Minus1);
                (half(0)?, half(1)?)
            }
            false => (
                x.narrow(D::Minus1, 0, width / 2)?,
                x.narrow(D::Minus1, width / 2, width / 2)?,
            ),
        };
        let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
        let second = (a.broadcast_mul(&sin)? + b.broadcast_mul(&cos)?)?;
        match self.interleaved {
            true => Tensor::stack(&[first, second], D::Minus1)?.reshape(x.shape()),
            false => Tensor::cat(&[first, second], D::Minus1),
        }
    }

    /// `values` turned in place, or back.
    fn turn<T: Real>(&self, values: &mut [T], dims: &[usize], back: bool) -> Result<()> {
        let &[_, heads, steps, width] = dims else {
            return Err(candle_core::Error::Msg("expected (b, h, t, d)".into()));
        };
        let half = width / 2;
        let (_, stored, _) = match self.cos.rank() {
            3 => self.cos.dims3()?,
            _ => (1, self.cos.dim(0)?, half),
        };
        let batched = self.cos.rank() == 3;
        with_elements::<T, _>(&self.cos, |cos| {
            with_elements::<T, _>(&self.sin, |sin| {
                for_rows(values, width, |i, row| {
                    let image = if batched { i / (heads * steps) } else { 0 };
                    let at = (image * stored + i % steps) * half;
                    let angles = cos[at..at + half].iter().zip(&sin[at..at + half]);
                    let pair = |a: &mut T, b: &mut T, c: T, s: T| {
                        let s = if back { T::zero() - s } else { s };
                        let (x, y) = (*a, *b);
                        *a = x * c - y * s;
                        *b = x * s + y * c;
                    };
                    if self.interleaved {
                        for (xy, (c, s)) in row.chunks_exact_mut(2).zip(angles) {
                            let (x, y) = xy.split_at_mut(1);
                            pair(&mut x[0], &mut y[0], *c, *s);
                        }
                    } else {
                        let (x, y) = row.split_at_mut(half);
                        for ((x, y), (c, s)) in x.iter_mut().zip(y).zip(angles) {
                            pair(x, y, *c, *s);
                        }
                    }
                });
                Ok(())
            })
        })
    }

    fn forward<T: Real>(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let mut y = elements::<T>(x, layout)?.into_owned();
        self.turn(&mut y, layout.dims(), false)?;
        Ok((narrowed(y, x.dtype())?, layout.shape().clone()))
    }

    fn backward<T: Real>(&self, dy: &Tensor) -> Result<Option<Tensor>> {
        let mut dx = with_elements::<T, _>(dy, |dy| Ok(dy.to_vec()))?;
        self.turn(&mut dx, dy.dims(), true)?;
        tensor_as(dx, dy.shape(), dy.dtype()).map(Some)
    }
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, x: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        by_dtype!(x, forward(x, l), self)
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        by_dtype!(dy, backward(dy), self)
    }
}
