//! The frozen convolution and the DOFT convolution, one and two dimensions, any groups.
//!
//! With the patches of an image as columns, `X` `(K, L)` for `K = in/groups * kh * kw` and `L` output
//! positions, a group of the layer is
//!
//! ```text
//! Y   = ratio * (W . blockdiag(R)^T . X) + bias
//! H   = W^T . (ratio * dY)
//! dX  = blockdiag(R) . H          dR_d = X_d . H_d^T
//! dratio_o = sum_t dY (Y - bias) / ratio
//! ```
//!
//! **Forward** rotates the weight, once, and convolves with it: `K * b` products for each output
//! channel, little beside the `K * L` of the convolution. Over a dense f32 or f64 weight without groups
//! the convolution is candle's own, so that a rotation by the identity changes no bit. Groups and half
//! weights go through panels of patches here; a half weight is never rotated or widened as a whole,
//! the patches are rotated instead.
//!
//! **Backward** works in panels of patches that stay in cache, and for dR takes one of two ways.
//! *Patches*: as above, `2 b K L` for `X_d H_d^T` and as much for `R H`. *Weight*: the whole gradient
//! of the rotated weight, `out/groups * K * L` and a buffer of that size. `backward` measures which is
//! taken; candle's own backward is not used: it fails on some rectangles and runs groups one by one.

mod backward;
mod geometry;
mod product;

pub(crate) use geometry::Geometry;

use super::adapted::{FromOutput, Gradients, Kernel, Limits, Stored, apply, bias_values};
use super::blocks::Blocks;
use super::real::{Real, elements, has_kernel, narrowed, tensor, tensor_as, with_elements};
use super::{Weight, composed};
use backward::Back;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, Result, Shape, Tensor};
use geometry::Sizes;
use product::{product, rotated_weight};
use rayon::prelude::*;
use std::sync::Mutex;

/// `ratio * (x * (W . blockdiag(R)^T)) + bias`; without `factors` the frozen convolution.
///
/// `x` is `(N, in, H, W)`, `(N, in, L)` for one dimension; the weight is `(out, in/groups * kh * kw)`,
/// `r` and `ratio` as for the [linear product](super::linear::doft).
pub(crate) fn conv(
    x: &Tensor,
    factors: Option<(&Tensor, Option<&Tensor>)>,
    weight: &Weight,
    bias: Option<&Tensor>,
    geometry: Geometry,
) -> Result<Tensor> {
    if geometry.one_dimensional && x.rank() == 3 {
        let y = conv(&x.unsqueeze(2)?, factors, weight, bias, geometry)?;
        return y.squeeze(2);
    }
    if !has_kernel(x) {
        return composed::conv(x, factors, weight, bias, geometry);
    }
    let product = match x.dtype() {
        candle_core::DType::F64 => by_candle::<f64>(x, factors, weight, geometry)?,
        _ => by_candle::<f32>(x, factors, weight, geometry)?,
    };
    let kernel = Convolution {
        weight: weight.clone(),
        bias: bias.map(Tensor::detach),
        geometry,
        product: Mutex::new(product),
    };
    apply(x, factors, kernel)
}

/// candle's product of the input and the rotated weight, where it serves.
fn by_candle<T: Real>(
    x: &Tensor,
    factors: Option<(&Tensor, Option<&Tensor>)>,
    weight: &Weight,
    geometry: Geometry,
) -> Result<Option<Tensor>> {
    let native = weight.native(T::DTYPE).filter(|_| x.dtype() == T::DTYPE);
    let Some(weight) = native.filter(|_| geometry.groups == 1 && x.elem_count() > 0) else {
        return Ok(None);
    };
    let weight = match factors {
        None => weight.clone(),
        Some((r, _)) => with_elements::<T, _>(r, |values| {
            rotated_weight(weight, Blocks::new(values, r.shape())?)
        })?,
    };
    let (x, out, channels) = (x.detach(), weight.dim(0)?, x.dim(1)?);
    let (g, kernel) = (geometry, geometry.kernel);
    let y = match geometry.one_dimensional {
        true => {
            let weight = weight.reshape((out, channels, kernel.1))?;
            x.squeeze(2)?
                .conv1d(&weight, g.padding.1, g.stride.1, g.dilation.1, 1)?
        }
        false => {
            let weight = weight.reshape((out, channels, kernel.0, kernel.1))?;
            x.conv2d(&weight, g.padding.1, g.stride.1, g.dilation.1, 1)?
        }
    };
    Ok(Some(y))
}

/// The kernel.
struct Convolution {
    weight: Weight,
    bias: Option<Tensor>,
    geometry: Geometry,
    /// candle's product, until the forward pass has taken it.
    product: Mutex<Option<Tensor>>,
}

impl Convolution {
    /// The product with the rotated weight; a weight that is widened in panels is not rotated, its
    /// patches are.
    fn unscaled<T: Real>(&self, x: &[T], s: &Sizes, r: Blocks<T>) -> Result<Vec<T>> {
        match self.weight.native(T::DTYPE) {
            Some(weight) => {
                let rotated = Weight::dense(&rotated_weight(weight, r)?);
                product(x, s, &rotated, None)
            }
            None => product(x, s, &self.weight, Some(r)),
        }
    }

    /// `dratio`, from y where that is exact, else from the product itself.
    fn ratio_gradient<T: Real>(
        &self,
        x: &Tensor,
        s: &Sizes,
        r: Blocks<T>,
        ratio: &[T],
        y: &Tensor,
        dy: &[T],
    ) -> Result<Vec<T>> {
        let bias = bias_values::<T>(self.bias.as_ref(), self.weight.out_dim())?;
        let limits = Limits::of(y.dtype());
        let sums = with_elements::<T, _>(y, |y| {
            let outputs = (bias.as_deref(), Some(ratio));
            Ok(channel_sums((y, dy), s, outputs, limits))
        })?;
        if sums.iter().all(|(_, lost)| !lost) {
            return Ok(sums.into_iter().map(|(sum, _)| sum).collect());
        }
        let product = with_elements::<T, _>(x, |x| self.unscaled(x, s, r))?;
        let again = channel_sums((&product, dy), s, (None, None), Limits::of(T::DTYPE));
        let sums = sums.into_iter().zip(again);
        Ok(sums
            .map(|((sum, lost), (again, _))| if lost { again } else { sum })
            .collect())
    }
}

impl Kernel for Convolution {
    const NAMES: [&'static str; 3] = ["frozen-conv", "oft-conv", "doft-conv"];

    fn forward<T: Real>(
        &self,
        (x, layout): Stored,
        r: Option<Stored>,
        ratio: Option<Stored>,
    ) -> Result<(CpuStorage, Shape)> {
        let s = Sizes::new(self.geometry, layout.dims(), self.weight.out_dim())?;
        let ready = self
            .product
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .take();
        let mut y = match ready {
            Some(y) => with_elements::<T, _>(&y, |y| Ok(y.to_vec()))?,
            None => {
                let x = elements::<T>(x, layout)?;
                match r {
                    None => product(&x, &s, &self.weight, None)?,
                    Some((r, layout)) => {
                        let values = elements::<T>(r, layout)?;
                        self.unscaled(&x, &s, Blocks::new(&values, layout.shape())?)?
                    }
                }
            }
        };
        let ratio = ratio
            .map(|(ratio, layout)| elements::<T>(ratio, layout))
            .transpose()?;
        let bias = bias_values::<T>(self.bias.as_ref(), self.weight.out_dim())?;
        if ratio.is_some() || bias.is_some() {
            let channels = s.outputs * s.geometry.groups;
            let planes = y.par_chunks_mut(s.positions().max(1)).enumerate();
            planes.for_each(|(index, y)| {
                let o = index % channels;
                let scale = ratio.as_ref().map(|ratio| ratio[o]);
                let shift = bias.as_ref().map(|bias| bias[o]);
                for y in y {
                    *y = scale.map_or(*y, |scale| *y * scale);
                    *y = shift.map_or(*y, |shift| *y + shift);
                }
            });
        }
        Ok((narrowed(y, x.dtype())?, s.answer()))
    }

    fn backward<T: Real>(
        &self,
        (x, r, ratio): (&Tensor, Option<&Tensor>, Option<&Tensor>),
        y: &Tensor,
        dy: &Tensor,
    ) -> Result<Gradients> {
        let s = Sizes::new(self.geometry, x.dims(), self.weight.out_dim())?;
        let need = (x.track_op(), r.is_some_and(Tensor::track_op));
        let scale = ratio.map(Tensor::to_vec1::<T>).transpose()?;
        with_elements::<T, _>(dy, |dy| {
            let run = |rotation: Option<Blocks<T>>| -> Result<Gradients> {
                let dratio = match (ratio, &scale, rotation) {
                    (Some(ratio), Some(scale), Some(rotation)) if ratio.track_op() => {
                        let sums = self.ratio_gradient(x, &s, rotation, scale, y, dy)?;
                        Some(tensor(sums, ratio.shape())?)
                    }
                    _ => None,
                };
                if !(need.0 || need.1) {
                    return Ok((None, None, dratio));
                }
                let back = Back {
                    s,
                    rotation,
                    need,
                    scale: scale.as_deref(),
                };
                let (dx, dr) = match need.1 {
                    true => with_elements(x, |x| back.run(&self.weight, Some(x), dy))?,
                    false => back.run(&self.weight, None, dy)?,
                };
                let dx = match need.0 {
                    true => Some(tensor_as(dx, x.shape(), x.dtype())?),
                    false => None,
                };
                let dr = match (need.1, r) {
                    (true, Some(r)) => Some(tensor(dr, r.shape())?),
                    _ => None,
                };
                Ok((dx, dr, dratio))
            };
            match r {
                None => run(None),
                Some(r) => with_elements(r, |values| run(Some(Blocks::new(values, r.shape())?))),
            }
        })
    }
}

/// For each channel `sum dy (y - bias) / ratio` over images and positions, and whether it is not to be
/// trusted; see the linear product. Without a bias it is 0, without a ratio 1.
fn channel_sums<T: Real>(
    (y, dy): (&[T], &[T]),
    s: &Sizes,
    (bias, ratio): (Option<&[T]>, Option<&[T]>),
    limits: Limits,
) -> Vec<(T, bool)> {
    let (channels, positions) = (s.outputs * s.geometry.groups, s.positions());
    let sum = |o: usize| {
        let bias = bias.map_or(0., |bias| bias[o].to_f64());
        let ratio = ratio.map_or(1., |ratio| ratio[o].to_f64());
        let (mut slope, mut square) = (0f64, 0f64);
        for image in 0..s.images {
            let at = (image * channels + o) * positions;
            for (y, dy) in y[at..at + positions].iter().zip(&dy[at..]) {
                let product = y.to_f64() - bias;
                slope += dy.to_f64() * product;
                square += product * product;
            }
        }
        let output = FromOutput {
            slope,
            square,
            bias,
            ratio,
            count: s.images * positions,
            limits,
        };
        output.gradient()
    };
    (0..channels).into_par_iter().map(sum).collect()
}

#[cfg(test)]
mod tests;
