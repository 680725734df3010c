//! Normalisation of rows by a frozen scale.
//!
//! ```text
//! z = (x - mean) * s,   s = 1 / sqrt(mean((x - mean)^2) + eps),   y = z * w + c
//! dx = s * (dz - mean(dz) - z * mean(dz * z)),   dz = dy * w
//! ```
//!
//! RmsNorm is the same with the two means of x and dz left out. A row whose squares leave the range of
//! the dtype is multiplied by a power of two before.

use super::adapted::bias_values;
use super::composed::composed_in;
use super::real::{Real, by_dtype, elements, has_kernel, narrowed, tensor_as, with_elements};
use super::rows::{for_rows, sum_of, zip_map};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, D, Layout, Result, Shape, Tensor};
use std::borrow::Cow;
use std::sync::{Arc, OnceLock};

/// The frozen parameters of a normalisation.
#[derive(Clone, Debug)]
pub(crate) struct Norm {
    pub(crate) weight: Tensor,
    pub(crate) bias: Option<Tensor>,
    pub(crate) eps: f64,
    pub(crate) remove_mean: bool,
}

impl Norm {
    /// The normalised rows, with a gradient to `x` alone.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if !has_kernel(x) {
            return self.composed(x);
        }
        x.apply_op1(Rows::new(self, None))
    }

    /// `(x + residual, norm(x + residual))`: the sum takes the scales of its rows along.
    pub(crate) fn forward_residual(
        &self,
        x: &Tensor,
        residual: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        if !has_kernel(x) || self.remove_mean || x.dtype() != residual.dtype() {
            let sum = (x + residual)?;
            let normed = self.forward(&sum)?;
            return Ok((sum, normed));
        }
        let scales = Arc::new(OnceLock::new());
        let eps = self.eps;
        let add = Add {
            eps,
            scales: scales.clone(),
        };
        let sum = x.apply_op2(residual, add)?;
        let normed = sum.apply_op1(Rows::new(self, Some(scales)))?;
        Ok((sum, normed))
    }

    /// The same out of candle's operations.
    pub(crate) fn composed(&self, x: &Tensor) -> Result<Tensor> {
        let wide = composed_in(x.dtype());
        let mut z = x.to_dtype(wide)?;
        // Of rows far from 1 the squares leave the range of f32. The answer does not depend on what x and
        // the root of eps are divided by, so neither does the gradient.
        let root = self.eps.sqrt();
        let by = z.detach().abs()?.max_keepdim(D::Minus1)?.maximum(root)?;
        z = z.broadcast_div(&by)?;
        if self.remove_mean {
            z = z.broadcast_sub(&z.mean_keepdim(D::Minus1)?)?;
        }
        let eps = (by.ones_like()? * root)?.div(&by)?.sqr()?;
        let square = z.sqr()?.mean_keepdim(D::Minus1)?.add(&eps)?;
        let mut y = z
            .broadcast_div(&square.sqrt()?)?
            .broadcast_mul(&self.weight.to_dtype(wide)?)?;
        if let Some(bias) = &self.bias {
            y = y.broadcast_add(&bias.to_dtype(wide)?)?;
        }
        y.to_dtype(x.dtype())
    }
}

/// Scales of rows, once they are known; NaN where that takes more than one number.
type Scales = Arc<OnceLock<Vec<f64>>>;

/// The scale of a row; none where its squares leave the range of `T`.
fn row_scale<T: Real>(row: &[T], mean: T, eps: f64) -> Option<f64> {
    let square = sum_of(row, row, |v, _| (v - mean) * (v - mean)).to_f64();
    let square = square / row.len() as f64;
    let (least, most) = T::SQUARES;
    let out = square > most || square.max(eps) < least;
    (!out).then(|| 1. / (square + eps).sqrt())
}

fn mean<T: Real>(row: &[T]) -> T {
    let sum = sum_of(row, row, |v, _| v).to_f64();
    T::from_f64(sum / row.len() as f64)
}

/// What makes a row its normalised one: `z = (x * before - mean) * scale`.
struct Moments<T> {
    /// 1, but for rows whose squares leave the range of `T`.
    before: T,
    mean: T,
    scale: T,
}

impl<T: Real> Moments<T> {
    /// Of a row that is multiplied by the power of two that brings its largest entry to about 1.
    #[cold]
    fn far(row: &[T], norm: &Norm) -> Self {
        let most = row.iter().fold(0f64, |most, v| most.max(v.to_f64().abs()));
        let exponent = match most > 0. && most.is_finite() {
            true => -most.log2().floor(),
            false => 0.,
        };
        let limit = f64::from(T::EXPONENT);
        let before = exponent.clamp(-limit, limit).exp2();
        let values = || row.iter().map(|v| v.to_f64() * before);
        let count = row.len() as f64;
        let mean = match norm.remove_mean {
            true => values().sum::<f64>() / count,
            false => 0.,
        };
        let square = values().map(|v| (v - mean) * (v - mean)).sum::<f64>() / count;
        let root = square.sqrt().hypot(norm.eps.sqrt() * before);
        Self {
            before: T::from_f64(before),
            mean: T::from_f64(mean),
            scale: T::from_f64(1. / root),
        }
    }

    /// `row * before`.
    fn apply<'a>(&self, row: &'a [T]) -> Cow<'a, [T]> {
        match self.before == T::one() {
            true => Cow::Borrowed(row),
            false => Cow::Owned(row.iter().map(|v| *v * self.before).collect()),
        }
    }
}

struct Rows {
    norm: Norm,
    scales: Option<Scales>,
}

impl Rows {
    fn new(norm: &Norm, scales: Option<Scales>) -> Self {
        Self {
            norm: norm.clone(),
            scales,
        }
    }

    fn moments<T: Real>(&self, index: usize, row: &[T]) -> Moments<T> {
        let mean = match self.norm.remove_mean {
            true => mean(row),
            false => T::zero(),
        };
        let known = self.scales.as_ref().and_then(|scales| scales.get());
        let known = known.map(|scales| scales[index]);
        let scale = match known.filter(|scale| !scale.is_nan()) {
            Some(scale) => Some(scale),
            None => row_scale(row, mean, self.norm.eps),
        };
        match scale {
            None => Moments::far(row, &self.norm),
            Some(scale) => Moments {
                before: T::one(),
                mean,
                scale: T::from_f64(scale),
            },
        }
    }

    fn forward<T: Real>(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let values = elements::<T>(x, layout)?;
        let width = self.norm.weight.elem_count();
        let mut y = vec![T::zero(); values.len()];
        with_elements::<T, _>(&self.norm.weight, |weight| {
            let bias = bias_values::<T>(self.norm.bias.as_ref(), width)?;
            for_rows(&mut y, width, |i, y| {
                let row = &values[i * width..][..width];
                let moments = self.moments(i, row);
                let (row, mean, scale) = (moments.apply(row), moments.mean, moments.scale);
                let inputs = row.iter().zip(weight);
                for (y, (x, w)) in y.iter_mut().zip(inputs) {
                    *y = (*x - mean) * scale * *w;
                }
                if let Some(bias) = &bias {
                    y.iter_mut().zip(bias).for_each(|(y, c)| *y += *c);
                }
            });
            Ok(())
        })?;
        Ok((narrowed(y, x.dtype())?, layout.shape().clone()))
    }

    fn backward<T: Real>(&self, x: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let width = self.norm.weight.elem_count();
        let dx = with_elements::<T, _>(x, |x| {
            with_elements::<T, _>(dy, |dy| {
                with_elements::<T, _>(&self.norm.weight, |weight| {
                    let mut dx = vec![T::zero(); x.len()];
                    for_rows(&mut dx, width, |i, dx| {
                        let x = &x[i * width..][..width];
                        let dy = &dy[i * width..][..width];
                        let moments = self.moments(i, x);
                        let (x, mean, scale) = (moments.apply(x), moments.mean, moments.scale);
                        let x = &*x;
                        // dx holds dz = dy * w until the last line.
                        let products = dy.iter().zip(weight);
                        dx.iter_mut()
                            .zip(products)
                            .for_each(|(dz, (dy, w))| *dz = *dy * *w);
                        let count = width as f64;
                        let along = sum_of(dx, x, |dz, x| dz * (x - mean) * scale);
                        let along = T::from_f64(along.to_f64() / count);
                        let level = match self.norm.remove_mean {
                            true => T::from_f64(sum_of(dx, dx, |dz, _| dz).to_f64() / count),
                            false => T::zero(),
                        };
                        for (dx, x) in dx.iter_mut().zip(x) {
                            *dx = scale * (*dx - level - (*x - mean) * scale * along);
                        }
                        if moments.before != T::one() {
                            dx.iter_mut().for_each(|dx| *dx *= moments.before);
                        }
                    });
                    Ok(dx)
                })
            })
        })?;
        tensor_as(dx, x.shape(), x.dtype()).map(Some)
    }
}

impl CustomOp1 for Rows {
    fn name(&self) -> &'static str {
        "frozen-norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        by_dtype!(x, forward(x, l), self)
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        by_dtype!(x, backward(x, dy), self)
    }
}

/// The sum of two tensors, which notes the scales of its rows for the norm that follows.
struct Add {
    eps: f64,
    scales: Scales,
}

impl Add {
    fn forward<T: Real>(
        &self,
        (x, xl): (&CpuStorage, &Layout),
        (r, rl): (&CpuStorage, &Layout),
    ) -> Result<(CpuStorage, Shape)> {
        let (a, b) = (elements::<T>(x, xl)?, elements::<T>(r, rl)?);
        let sum = zip_map(&a, &b, |a, b| a + b);
        // A half sum is rounded, and the norm is of what it was rounded to.
        if x.dtype() == T::DTYPE {
            let width = xl.dims().last().copied().unwrap_or(1).max(1);
            let mut scales = vec![0f64; sum.len() / width];
            for_rows(&mut scales, 1, |i, scale| {
                let found = row_scale(&sum[i * width..][..width], T::zero(), self.eps);
                scale[0] = found.unwrap_or(f64::NAN);
            });
            let _ = self.scales.set(scales);
        }
        Ok((narrowed(sum, x.dtype())?, xl.shape().clone()))
    }
}

impl CustomOp2 for Add {
    fn name(&self) -> &'static str {
        "residual"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        r: &CpuStorage,
        rl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        by_dtype!(x, forward((x, xl), (r, rl)), self)
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((Some(dy.clone()), Some(dy.clone())))
    }
}
