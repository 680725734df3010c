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
//! of the rotated weight, `out/groups * K * L` and a buffer of that size. [`WEIGHT_WAY`] says which is
//! taken; candle's own backward is not used: it fails on some rectangles and runs groups one by one.

use super::blocks::{Blocks, rotate_back};
use super::gemm::{Mat, MatMut, multiply, multiply_wide};
use super::linear::swamped;
use super::real::{
    Real, by_dtype, elements, has_kernel, narrowed, tensor, tensor_as, with_elements,
};
use super::{Weight, composed};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;
use std::sync::{Arc, Mutex};

/// Elements of a panel of patches: 1 MiB of f32.
const PANEL: usize = 1 << 18;

/// Images and groups whose gradients are summed before the next: bounds the partial sums, and keeps
/// their order whatever the number of threads.
const WAVE: usize = 16;

/// The weight's way is taken for up to this many outputs of a group for each row of a block. In
/// arithmetic the two are equal at 2. Steps in units of the frozen one's (2 cores, f32, b = 32, and 9 in
/// the last line; `cargo bench --bench ratios -- conv_step` with this constant at 0 and 1000):
///
/// | outputs of a group / b | layer | patches | weight |
/// |---|---|---|---|
/// | 20 | 640 -> 640, 1x1, 32x32 | 1.18 | 1.48 |
/// | 10 | 320 -> 320, 3x3, 32x32 | 1.22 | 1.55 |
/// | 4 | 128 -> 128, 3x3, 4 of 16x16 | 1.30 | 1.43 |
/// | 1 | the same in 4 groups | 1.62 | 1.48 |
/// | 1/8 | 320 -> 4, 3x3, 32x32 | 1.63 | 1.32 |
/// | 1/9 | 128 -> 128, depthwise, 4 of 16x16 | 1.46 | 1.30 |
const WEIGHT_WAY: usize = 3;

/// What a convolution is beside its weight. One dimension is a kernel of height 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub(crate) kernel: (usize, usize),
    pub(crate) stride: (usize, usize),
    pub(crate) padding: (usize, usize),
    pub(crate) dilation: (usize, usize),
    pub(crate) groups: usize,
    pub(crate) one_dimensional: bool,
}

impl Geometry {
    /// Height and width of the answer, if the kernel fits.
    pub(crate) fn output(&self, height: usize, width: usize) -> Option<(usize, usize)> {
        let along = |size: usize, kernel: usize, stride: usize, padding: usize, dilation: usize| {
            let span = dilation * (kernel - 1) + 1;
            Some((size + 2 * padding).checked_sub(span)? / stride + 1)
        };
        let (k, s, p, d) = (self.kernel, self.stride, self.padding, self.dilation);
        Some((
            along(height, k.0, s.0, p.0, d.0)?,
            along(width, k.1, s.1, p.1, d.1)?,
        ))
    }
}

/// All sizes of one convolution of one input.
#[derive(Clone, Copy)]
struct Sizes {
    geometry: Geometry,
    images: usize,
    channels: usize,
    input: (usize, usize),
    outputs: usize,
    output: (usize, usize),
}

impl Sizes {
    fn new(geometry: Geometry, x: &[usize], outputs: usize) -> Result<Self> {
        let &[images, channels, height, width] = x else {
            return Err(message(format!("expected an input of rank 4, got {x:?}")));
        };
        let Some(output) = geometry.output(height, width) else {
            let kernel = geometry.kernel;
            return Err(message(format!(
                "a kernel of {kernel:?} is larger than {x:?}"
            )));
        };
        Ok(Self {
            geometry,
            images,
            channels: channels / geometry.groups,
            input: (height, width),
            outputs: outputs / geometry.groups,
            output,
        })
    }

    /// Elements of a patch.
    fn patch(&self) -> usize {
        self.channels * self.geometry.kernel.0 * self.geometry.kernel.1
    }

    /// Positions of the answer.
    fn positions(&self) -> usize {
        self.output.0 * self.output.1
    }

    fn plane(&self) -> usize {
        self.input.0 * self.input.1
    }

    fn units(&self) -> usize {
        self.images * self.geometry.groups
    }

    /// Positions whose patches are in one panel.
    fn panel(&self) -> usize {
        (PANEL / self.patch()).max(64).min(self.positions().max(1))
    }

    fn answer(&self) -> Shape {
        let (height, width) = self.output;
        let channels = self.outputs * self.geometry.groups;
        Shape::from((self.images, channels, height, width))
    }

    fn panels(&self) -> impl Iterator<Item = (usize, usize)> {
        let (all, step) = (self.positions(), self.panel());
        (0..all)
            .step_by(step)
            .map(move |start| (start, step.min(all - start)))
    }

    /// Where tap `(i, j)` of output row `oy` reads, and which output columns of that row it serves.
    fn row(&self, (i, j): (usize, usize), oy: usize) -> Option<(usize, std::ops::Range<usize>)> {
        let g = &self.geometry;
        let y = (oy * g.stride.0 + i * g.dilation.0).checked_sub(g.padding.0)?;
        if y >= self.input.0 {
            return None;
        }
        let shift = j * g.dilation.1;
        let first = g.padding.1.saturating_sub(shift).div_ceil(g.stride.1);
        let end = (self.input.1 + g.padding.1).saturating_sub(shift);
        let end = end.div_ceil(g.stride.1).min(self.output.1);
        Some((y, first..end.max(first)))
    }

    /// The input column of output column `ox` under tap column `j`, which [`Sizes::row`] allowed.
    fn column(&self, j: usize, ox: usize) -> usize {
        let g = &self.geometry;
        ox * g.stride.1 + j * g.dilation.1 - g.padding.1
    }

    fn tap(&self, k: usize) -> (usize, (usize, usize)) {
        let (height, width) = self.geometry.kernel;
        (k / (height * width), (k / width % height, k % width))
    }

    /// For each stretch of one output row in a panel: where it lies in the panel, and its row and
    /// columns of the answer.
    fn stretches(
        &self,
        start: usize,
        count: usize,
    ) -> impl Iterator<Item = (usize, usize, usize, usize)> {
        let width = self.output.1;
        let rows = start / width..(start + count).div_ceil(width);
        rows.map(move |oy| {
            let from = start.max(oy * width);
            let to = (start + count).min((oy + 1) * width);
            (from - start, oy, from - oy * width, to - oy * width)
        })
    }
}

fn message(text: String) -> candle_core::Error {
    candle_core::Error::Msg(text)
}

/// The patches at `count` positions from `start` on as columns: `(K, count)`.
fn patches<T: Real>(x: &[T], s: &Sizes, (start, count): (usize, usize), to: &mut [T]) {
    to.par_chunks_mut(count).enumerate().for_each(|(k, to)| {
        let (channel, tap) = s.tap(k);
        let plane = &x[channel * s.plane()..][..s.plane()];
        for (at, oy, from, end) in s.stretches(start, count) {
            let to = &mut to[at..at + end - from];
            let Some((y, columns)) = s.row(tap, oy) else {
                to.fill(T::zero());
                continue;
            };
            let (first, last) = (columns.start.clamp(from, end), columns.end.clamp(from, end));
            to[..first - from].fill(T::zero());
            to[last - from..].fill(T::zero());
            if first < last {
                let row = &plane[y * s.input.1..][..s.input.1];
                let row = &row[s.column(tap.1, first)..];
                let to = &mut to[first - from..last - from];
                match s.geometry.stride.1 {
                    1 => to.copy_from_slice(&row[..last - first]),
                    stride => to
                        .iter_mut()
                        .zip(row.iter().step_by(stride))
                        .for_each(|(to, from)| *to = *from),
                }
            }
        }
    });
}

/// Adds columns of patches back to where they came from: the transpose of [`patches`].
fn scatter<T: Real>(columns: &[T], s: &Sizes, (start, count): (usize, usize), dx: &mut [T]) {
    let taps = s.geometry.kernel.0 * s.geometry.kernel.1;
    let planes = dx.par_chunks_mut(s.plane()).enumerate();
    planes.for_each(|(channel, plane)| {
        for k in channel * taps..(channel + 1) * taps {
            let (_, tap) = s.tap(k);
            let columns = &columns[k * count..][..count];
            for (at, oy, from, end) in s.stretches(start, count) {
                let Some((y, range)) = s.row(tap, oy) else {
                    continue;
                };
                let (first, last) = (range.start.clamp(from, end), range.end.clamp(from, end));
                if first < last {
                    let values = &columns[at + first - from..at + last - from];
                    let row = &mut plane[y * s.input.1 + s.column(tap.1, first)..];
                    let row = row.iter_mut().step_by(s.geometry.stride.1);
                    row.zip(values).for_each(|(to, from)| *to += *from);
                }
            }
        }
    });
}

/// `blockdiag(r)^T x` or `blockdiag(r) x` for columns `x` `(K, count)`.
fn rotate_columns<T: Real>(x: &[T], r: Blocks<T>, count: usize, transposed: bool, to: &mut [T]) {
    let size = r.size() * count;
    to.par_chunks_mut(size).enumerate().for_each(|(d, to)| {
        let block = if transposed { r.get(d).t() } else { r.get(d) };
        let x = Mat::row_major(&x[d * size..][..size], r.size(), count);
        multiply(MatMut::new(to, (r.size(), count), count), block, x, false);
    });
}

/// The rotation, its values at hand.
#[derive(Clone, Copy)]
struct Rotation<'a, T> {
    values: &'a [T],
    count: usize,
    b: usize,
}

impl<'a, T: Real> Rotation<'a, T> {
    fn blocks(&self) -> Blocks<'a, T> {
        Blocks::new(self.values, self.count, self.b)
    }
}

/// `W . blockdiag(R)^T` for a dense weight of dtype `T`.
fn rotated_weight<T: Real>(weight: &Tensor, r: Rotation<T>) -> Result<Tensor> {
    let (_, width) = weight.dims2()?;
    let mut values = with_elements::<T, _>(weight, |values| Ok(values.to_vec()))?;
    rotate_back(&mut values, width, r.blocks());
    tensor(values, weight.shape())
}

/// The convolution without magnitude and bias, in panels: `W . (R^T) . X` for all images and groups.
fn product<T: Real>(
    x: &[T],
    s: &Sizes,
    weight: &Weight,
    rotation: Option<Rotation<T>>,
) -> Result<Vec<T>> {
    let (positions, patch, groups) = (s.positions(), s.patch(), s.geometry.groups);
    let mut y = vec![T::zero(); s.answer().elem_count()];
    let many = s.units() >= rayon::current_num_threads();
    let unit = |(index, y): (usize, &mut [T])| {
        let rows = index % groups * s.outputs..(index % groups + 1) * s.outputs;
        let x = &x[index * s.channels * s.plane()..][..s.channels * s.plane()];
        let mut columns = vec![T::zero(); patch * s.panel()];
        let mut turned = vec![T::zero(); rotation.map_or(0, |_| columns.len())];
        for (start, count) in s.panels() {
            let columns = &mut columns[..patch * count];
            patches(x, s, (start, count), columns);
            let columns = match rotation {
                None => &*columns,
                Some(r) => {
                    let turned = &mut turned[..patch * count];
                    rotate_columns(columns, r.blocks(), count, true, turned);
                    &*turned
                }
            };
            let columns = Mat::row_major(columns, patch, count);
            weight.panels::<T>(rows.clone(), |first, w| {
                let y = &mut y[(first - rows.start) * positions + start..];
                let y = MatMut::new(y, (w.rows(), count), positions);
                match many {
                    true => multiply(y, w, columns, false),
                    false => multiply_wide(y, w, columns, false),
                }
            })?;
        }
        Ok::<(), candle_core::Error>(())
    };
    let size = (s.outputs * positions).max(1);
    match many {
        true => y.par_chunks_mut(size).enumerate().try_for_each(unit)?,
        false => y.chunks_mut(size).enumerate().try_for_each(unit)?,
    }
    Ok(y)
}

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
    let op = Convolution {
        weight: weight.clone(),
        bias: bias.map(Tensor::detach),
        geometry,
        product: Arc::new(Mutex::new(product)),
    };
    match factors {
        None => x.apply_op1(op),
        Some((r, None)) => x.apply_op2(&r.contiguous()?, op),
        Some((r, Some(ratio))) => x.apply_op3(&r.contiguous()?, &ratio.contiguous()?, op),
    }
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
        Some((r, _)) => {
            let (count, b, _) = r.dims3()?;
            with_elements::<T, _>(r, |values| {
                rotated_weight(weight, Rotation { values, count, b })
            })?
        }
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

/// The op. Its arguments are x, then R, then the ratio.
#[derive(Clone)]
struct Convolution {
    weight: Weight,
    bias: Option<Tensor>,
    geometry: Geometry,
    /// candle's product, until the forward pass has taken it.
    product: Arc<Mutex<Option<Tensor>>>,
}

type Gradients = (Option<Tensor>, Option<Tensor>, Option<Tensor>);

impl Convolution {
    fn bias<T: Real>(&self) -> Result<Option<Vec<T>>> {
        let wide = |bias: &Tensor| with_elements(bias, |bias| Ok(bias.to_vec()));
        self.bias.as_ref().map(wide).transpose()
    }

    fn forward<T: Real>(
        &self,
        (x, layout): (&CpuStorage, &Layout),
        r: Option<(&CpuStorage, &Layout)>,
        ratio: Option<(&CpuStorage, &Layout)>,
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
                        let (count, b, _) = layout.shape().dims3()?;
                        let values = &elements::<T>(r, layout)?;
                        self.unscaled(&x, &s, Rotation { values, count, b })?
                    }
                }
            }
        };
        let ratio = ratio
            .map(|(ratio, layout)| elements::<T>(ratio, layout))
            .transpose()?;
        let bias = self.bias::<T>()?;
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

    /// The product with the rotated weight; a weight that is widened in panels is not rotated, its
    /// patches are.
    fn unscaled<T: Real>(&self, x: &[T], s: &Sizes, r: Rotation<T>) -> Result<Vec<T>> {
        match self.weight.native(T::DTYPE) {
            Some(weight) => {
                let rotated = Weight::dense(&rotated_weight(weight, r)?);
                product(x, s, &rotated, None)
            }
            None => product(x, s, &self.weight, Some(r)),
        }
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
            let run = |rotation: Option<Rotation<T>>| -> Result<Gradients> {
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
                Some(r) => {
                    let (count, b, _) = r.dims3()?;
                    with_elements(r, |values| run(Some(Rotation { values, count, b })))
                }
            }
        })
    }

    /// `dratio`, from y where that is exact, else from the product itself.
    fn ratio_gradient<T: Real>(
        &self,
        x: &Tensor,
        s: &Sizes,
        r: Rotation<T>,
        ratio: &[T],
        y: &Tensor,
        dy: &[T],
    ) -> Result<Vec<T>> {
        let bias = self.bias::<T>()?;
        let sums = with_elements::<T, _>(y, |y| {
            Ok(channel_sums((y, dy), s, |o| Channel {
                bias: bias.as_ref().map_or(0., |bias| bias[o].to_f64()),
                ratio: ratio[o].to_f64(),
                limit: swamped(x.dtype()),
            }))
        })?;
        if sums.iter().all(|(_, lost)| !lost) {
            return Ok(sums.into_iter().map(|(sum, _)| sum).collect());
        }
        let product = with_elements::<T, _>(x, |x| self.unscaled(x, s, r))?;
        let again = channel_sums((&product, dy), s, |_| Channel {
            bias: 0.,
            ratio: 1.,
            limit: f64::INFINITY,
        });
        let sums = sums.into_iter().zip(again);
        Ok(sums
            .map(|((sum, lost), (again, _))| if lost { again } else { sum })
            .collect())
    }
}

/// What [`channel_sums`] has to know of a channel.
struct Channel {
    bias: f64,
    ratio: f64,
    limit: f64,
}

/// For each channel `sum dy (y - bias) / ratio` over images and positions, and whether it is not to be
/// trusted; see the linear product.
fn channel_sums<T: Real>(
    (y, dy): (&[T], &[T]),
    s: &Sizes,
    channel: impl Fn(usize) -> Channel + Sync,
) -> Vec<(T, bool)> {
    let (channels, positions) = (s.outputs * s.geometry.groups, s.positions());
    let sum = |o: usize| {
        let Channel { bias, ratio, limit } = channel(o);
        let (mut slope, mut square) = (0f64, 0f64);
        for image in 0..s.images {
            let at = (image * channels + o) * positions;
            for (y, dy) in y[at..at + positions].iter().zip(&dy[at..]) {
                let product = y.to_f64() - bias;
                slope += dy.to_f64() * product;
                square += product * product;
            }
        }
        let count = (s.images * positions) as f64;
        let swamped = limit.is_finite() && bias * bias * count > limit * limit * square;
        let lost = swamped || ratio.abs() < super::linear::TINY;
        (T::from_f64(if lost { 0. } else { slope / ratio }), lost)
    };
    (0..channels).into_par_iter().map(sum).collect()
}

/// The way back to the input and to R.
struct Back<'a, T> {
    s: Sizes,
    rotation: Option<Rotation<'a, T>>,
    need: (bool, bool),
    scale: Option<&'a [T]>,
}

/// How a pass comes to dR.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    /// The weight at hand is rotated already; for dR its whole gradient is taken.
    Weight,
    /// The weight at hand is frozen; patches are rotated.
    Patches,
}

impl<T: Real> Back<'_, T> {
    /// `dx`, `(N, in, H, W)`, and `dR`; each empty when not needed.
    fn run(&self, weight: &Weight, x: Option<&[T]>, dy: &[T]) -> Result<(Vec<T>, Vec<T>)> {
        let s = &self.s;
        let (patch, groups) = (s.patch(), s.geometry.groups);
        let rotated = match (self.rotation, weight.native(T::DTYPE)) {
            (Some(r), Some(dense)) if !self.need.1 || s.outputs <= WEIGHT_WAY * r.b => {
                Some(Weight::dense(&rotated_weight(dense, r)?))
            }
            _ => None,
        };
        let way = match (&rotated, self.rotation) {
            (None, Some(_)) => Way::Patches,
            _ => Way::Weight,
        };
        let acting = rotated.as_ref().unwrap_or(weight);
        // One row block of partial sums for each unit of a wave, and their total.
        let partial = match (self.need.1, way, self.rotation) {
            (false, ..) | (_, _, None) => 0,
            (true, Way::Weight, _) => s.outputs * patch,
            (true, Way::Patches, Some(r)) => patch * r.b,
        };
        let kinds = if way == Way::Weight { groups } else { 1 };
        let mut total = vec![T::zero(); partial * kinds];
        let input = s.channels * s.plane();
        let mut dx = vec![T::zero(); if self.need.0 { s.units() * input } else { 0 }];
        let mut sums = vec![T::zero(); partial * WAVE.min(s.units())];
        for start in (0..s.units()).step_by(WAVE) {
            let count = WAVE.min(s.units() - start);
            let many = count >= rayon::current_num_threads();
            let mut dx: Vec<&mut [T]> = match self.need.0 {
                true => dx[start * input..(start + count) * input]
                    .chunks_mut(input)
                    .collect(),
                false => (0..count).map(|_| Default::default()).collect(),
            };
            let mut sums: Vec<&mut [T]> = match partial {
                0 => (0..count).map(|_| Default::default()).collect(),
                _ => sums.chunks_mut(partial).take(count).collect(),
            };
            let unit = |(i, (dx, sums)): (usize, (&mut &mut [T], &mut &mut [T]))| {
                let x = x.map(|x| &x[(start + i) * input..][..input]);
                self.unit(start + i, acting, way, (x, dy), (dx, sums), many)
            };
            match many {
                true => dx
                    .par_iter_mut()
                    .zip(sums.par_iter_mut())
                    .enumerate()
                    .try_for_each(unit)?,
                false => dx
                    .iter_mut()
                    .zip(sums.iter_mut())
                    .enumerate()
                    .try_for_each(unit)?,
            }
            for (i, sums) in sums.into_iter().enumerate().filter(|_| partial > 0) {
                let to = (start + i) % kinds * partial;
                let to = total[to..to + partial].iter_mut();
                to.zip(sums).for_each(|(to, sum)| *to += *sum);
            }
        }
        let dr = match (self.need.1, self.rotation) {
            (true, Some(r)) => self.rotation_gradient(weight, way, r, total)?,
            _ => Vec::new(),
        };
        Ok((dx, dr))
    }

    /// One image and group: adds to `dx`, and writes the sum that its way takes.
    fn unit(
        &self,
        index: usize,
        weight: &Weight,
        way: Way,
        (x, dy): (Option<&[T]>, &[T]),
        (dx, sums): (&mut [T], &mut [T]),
        many: bool,
    ) -> Result<()> {
        let s = &self.s;
        let (patch, positions, group) = (s.patch(), s.positions(), index % s.geometry.groups);
        let rows = group * s.outputs..(group + 1) * s.outputs;
        let dy = &dy[index * s.outputs * positions..][..s.outputs * positions];
        let product = if many { multiply } else { multiply_wide };
        let panel = s.panel();
        let mut scaled = vec![T::zero(); s.outputs * panel];
        let mut h = vec![T::zero(); patch * panel];
        let mut columns = vec![T::zero(); x.map_or(0, |_| patch * panel)];
        sums.fill(T::zero());
        for (start, count) in s.panels() {
            let scaled = &mut scaled[..s.outputs * count];
            scaled
                .par_chunks_mut(count)
                .enumerate()
                .for_each(|(o, to)| {
                    let from = &dy[o * positions + start..][..count];
                    match self.scale {
                        None => to.copy_from_slice(from),
                        Some(scale) => {
                            let scale = scale[rows.start + o];
                            to.iter_mut()
                                .zip(from)
                                .for_each(|(to, dy)| *to = *dy * scale);
                        }
                    }
                });
            let scaled = Mat::row_major(scaled, s.outputs, count);
            let columns = &mut columns[..x.map_or(0, |_| patch * count)];
            if let Some(x) = x {
                patches(x, s, (start, count), columns);
            }
            if way == Way::Weight && !columns.is_empty() {
                let columns = Mat::row_major(columns, patch, count);
                let to = MatMut::new(sums, (s.outputs, patch), patch);
                product(to, scaled, columns.t(), true);
            }
            if way == Way::Weight && dx.is_empty() {
                continue;
            }
            let h = &mut h[..patch * count];
            weight.panels::<T>(rows.clone(), |first, w| {
                let scaled = scaled.part((first - rows.start, w.rows()), (0, count));
                let h = MatMut::new(h, (patch, count), count);
                product(h, w.t(), scaled, first > rows.start);
            })?;
            if let (Way::Patches, Some(r)) = (way, self.rotation) {
                self.turn(r, (columns, h), sums, count);
            }
            if !dx.is_empty() {
                scatter(h, s, (start, count), dx);
            }
        }
        Ok(())
    }

    /// `dR_d += X_d H_d^T`, then `H = R H`, block by block while it is in cache.
    fn turn(&self, r: Rotation<T>, (columns, h): (&[T], &mut [T]), sums: &mut [T], count: usize) {
        let (b, size) = (r.b, r.b * count);
        let turn = |(d, h): (usize, &mut [T])| {
            let copy = h.to_vec();
            let to = MatMut::new(h, (b, count), count);
            multiply(
                to,
                r.blocks().get(d),
                Mat::row_major(&copy, b, count),
                false,
            );
            copy
        };
        if !self.need.1 {
            h.par_chunks_mut(size)
                .enumerate()
                .for_each(|block| drop(turn(block)));
            return;
        }
        let blocks = h.par_chunks_mut(size).zip(sums.par_chunks_mut(b * b));
        blocks.enumerate().for_each(|(d, (h, sum))| {
            let x = Mat::row_major(&columns[d * size..][..size], b, count);
            let copy = match self.need.0 {
                true => turn((d, h)),
                false => h.to_vec(),
            };
            let h = Mat::row_major(&copy, b, count);
            multiply(MatMut::new(sum, (b, b), b), x, h.t(), true);
        });
    }

    /// From the sums to `dR`: `G_d^T W_d` for the weight's way; over all blocks when one is shared.
    fn rotation_gradient(
        &self,
        weight: &Weight,
        way: Way,
        r: Rotation<T>,
        total: Vec<T>,
    ) -> Result<Vec<T>> {
        let (b, patch) = (r.b, self.s.patch());
        let mut blocks = match way {
            Way::Patches => total,
            Way::Weight => {
                let rows = weight.out_dim();
                let mut blocks = vec![T::zero(); patch * b];
                weight.panels::<T>(0..rows, |first, w| {
                    let grad = Mat::row_major(&total, rows, patch);
                    let each = blocks.par_chunks_mut(b * b).enumerate();
                    each.for_each(|(d, block)| {
                        let columns = (d * b, b);
                        let grad = grad.part((first, w.rows()), columns).t();
                        let w = w.part((0, w.rows()), columns);
                        multiply(MatMut::new(block, (b, b), b), grad, w, true);
                    });
                })?;
                blocks
            }
        };
        if r.count == 1 {
            let (first, rest) = blocks.split_at_mut(b * b);
            for block in rest.chunks_exact(b * b) {
                first.iter_mut().zip(block).for_each(|(a, v)| *a += *v);
            }
            blocks.truncate(b * b);
        }
        Ok(blocks)
    }
}

impl CustomOp1 for Convolution {
    fn name(&self) -> &'static str {
        "frozen-conv"
    }

    fn cpu_fwd(&self, x: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        by_dtype!(x, forward((x, l), None, None), self)
    }

    fn bwd(&self, x: &Tensor, y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let (dx, _, _) = by_dtype!(x, backward((x, None, None), y, dy), self)?;
        Ok(dx)
    }
}

impl CustomOp2 for Convolution {
    fn name(&self) -> &'static str {
        "oft-conv"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        r: &CpuStorage,
        rl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        by_dtype!(x, forward((x, xl), Some((r, rl)), None), self)
    }

    fn bwd(
        &self,
        x: &Tensor,
        r: &Tensor,
        y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (dx, dr, _) = by_dtype!(x, backward((x, Some(r), None), y, dy), self)?;
        Ok((dx, dr))
    }
}

impl CustomOp3 for Convolution {
    fn name(&self) -> &'static str {
        "doft-conv"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        r: &CpuStorage,
        rl: &Layout,
        ratio: &CpuStorage,
        sl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        by_dtype!(x, forward((x, xl), Some((r, rl)), Some((ratio, sl))), self)
    }

    fn bwd(
        &self,
        x: &Tensor,
        r: &Tensor,
        ratio: &Tensor,
        y: &Tensor,
        dy: &Tensor,
    ) -> Result<Gradients> {
        by_dtype!(x, backward((x, Some(r), Some(ratio)), y, dy), self)
    }
}
