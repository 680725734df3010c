//! The frozen product and the DOFT product.
//!
//! ```text
//! y   = ratio * (x . blockdiag(R) . W^T) + bias
//! h   = (dy * ratio) . W
//! dx  = h . blockdiag(R)^T         dR_d = x_d^T h_d
//! dratio_o = sum_t dy (y - bias) / ratio
//! ```
//!
//! `W` and the bias live inside the op: they get no gradient, and no buffer of their size is made.
//! The op keeps x and y and nothing else; the rotated input is made again where a gradient needs it.
//!
//! On CPU all of it is one op. With a dense weight in f32 or f64 the large products are candle's own,
//! with its parameters, so that a rotation by the identity changes no bit, also where candle uses a
//! vendor BLAS; the small ones are `gemm`'s. A half or quantized weight is widened in
//! [panels](super::Weight::panels) that stay in cache, on the way forward and again on the way back;
//! half activations are computed in f32 and rounded once. On other devices the
//! [composed] twin runs.

use super::Weight;
use super::adapted::{Gradients, Kernel, Limits, Stored, apply, bias_values};
use super::blocks::{Blocks, gradient, gradient_and_back, rotate, rotate_back};
use super::composed;
use super::gemm::{Mat, MatMut, multiply, multiply_wide};
use super::magnitude::{self, scaled_and_gradient};
use super::real::{
    Real, elements, has_kernel, narrowed, not_on_cpu, slice, tensor, tensor_as, with_elements,
    with_slice,
};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, Layout, Result, Shape, Storage, Tensor};
use rayon::prelude::*;

/// Rows up to which candle's quantized product beats dequantizing, where it is allowed.
const DECODE_ROWS: usize = 8;

/// `x . W^T + bias`, with a gradient to `x` alone. `x` is `(.., in)` of rank 2 or more.
pub(crate) fn frozen(x: &Tensor, weight: &Weight, bias: Option<&Tensor>) -> Result<Tensor> {
    if decodes(x, weight) {
        return composed::decode(x, None, None, weight, bias);
    }
    if !has_kernel(x) {
        return composed::frozen(x, weight, bias);
    }
    flattened(x, weight, |x| apply(x, None, Product::new(weight, bias)))
}

/// `ratio * (x . blockdiag(r) . W^T) + bias`, with gradients to `x`, `r` and `ratio`.
///
/// `r` is `(D, b, b)`, or `(1, b, b)` when shared; `ratio` is `(out)`.
pub(crate) fn doft(
    x: &Tensor,
    r: &Tensor,
    ratio: Option<&Tensor>,
    weight: &Weight,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let constant = !r.track_op() && ratio.is_none_or(|ratio| !ratio.track_op());
    if constant && decodes(x, weight) {
        return composed::decode(x, Some(r), ratio, weight, bias);
    }
    if !has_kernel(x) {
        return composed::doft(x, r, ratio, weight, bias);
    }
    flattened(x, weight, |x| {
        apply(x, Some((r, ratio)), Product::new(weight, bias))
    })
}

/// `x . blockdiag(r)`, without a graph, in the dtype that products are computed in.
pub(crate) fn rotated(x: &Tensor, r: &Tensor) -> Result<Tensor> {
    composed::rotate(&in_computed(x)?, r)
}

/// `x` in the dtype that products are computed in: f32 for half types.
pub(crate) fn in_computed(x: &Tensor) -> Result<Tensor> {
    x.to_dtype(composed::composed_in(x.dtype()))
}

/// Whether candle's quantized product may answer: asked for, few rows, nothing to train.
pub(super) fn decodes(x: &Tensor, weight: &Weight) -> bool {
    let rows = x.elem_count() / weight.in_dim().max(1);
    weight.decoder().is_some() && !x.track_op() && (1..=DECODE_ROWS).contains(&rows)
}

/// Runs `f` on `x` as a matrix and gives the answer the leading axes of `x`.
fn flattened(
    x: &Tensor,
    weight: &Weight,
    f: impl FnOnce(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    if x.rank() == 2 {
        return f(x);
    }
    let rows = x.dims()[..x.rank() - 1].iter().product::<usize>();
    let mut shape = x.dims().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = weight.out_dim();
    }
    f(&x.reshape((rows, weight.in_dim()))?)?.reshape(shape)
}

/// The kernel.
pub(super) struct Product {
    weight: Weight,
    bias: Option<Tensor>,
}

impl Product {
    pub(super) fn new(weight: &Weight, bias: Option<&Tensor>) -> Self {
        Self {
            weight: weight.clone(),
            bias: bias.map(Tensor::detach),
        }
    }

    /// `a W^T`, or `a W`: as candle computes it, or in panels of the weight.
    pub(super) fn times_weight<T: Real>(
        &self,
        a: &CpuStorage,
        layout: &Layout,
        transposed: bool,
    ) -> Result<CpuStorage> {
        let (rows, inner) = layout.shape().dims2()?;
        let Some(weight) = self.weight.native(T::DTYPE) else {
            let a = matrix::<T>(slice(a, layout)?, layout)?;
            let y = match transposed {
                true => self.forward_panels(a)?,
                false => self.backward_panels(a)?,
            };
            return Ok(T::to_cpu_storage_owned(y));
        };
        let (storage, weight) = weight.storage_and_layout();
        let Storage::Cpu(storage) = &*storage else {
            let message = "the input is on CPU, the frozen weight is not".to_string();
            return Err(candle_core::Error::Msg(message));
        };
        let weight = match transposed {
            true => weight.transpose(0, 1)?,
            false => weight.clone(),
        };
        let (_, cols) = weight.shape().dims2()?;
        a.matmul(storage, (1, rows, cols, inner), layout, &weight)
    }

    fn forward_panels<T: Real>(&self, x: Mat<T>) -> Result<Vec<T>> {
        let out = self.weight.out_dim();
        let mut y = vec![T::zero(); x.rows() * out];
        self.weight.panels::<T>(0..out, |start, panel| {
            let columns = MatMut::new(&mut y[start..], (x.rows(), panel.rows()), out);
            multiply_wide(columns, x, panel.t(), false);
        })?;
        Ok(y)
    }

    fn backward_panels<T: Real>(&self, dy: Mat<T>) -> Result<Vec<T>> {
        let (out, width) = (self.weight.out_dim(), self.weight.in_dim());
        let mut h = vec![T::zero(); dy.rows() * width];
        self.weight.panels::<T>(0..out, |start, panel| {
            let dy = dy.part((0, dy.rows()), (start, panel.rows()));
            let h = MatMut::new(&mut h, (dy.rows(), width), width);
            multiply_wide(h, dy, panel, start > 0);
        })?;
        Ok(h)
    }

    /// `h = (dy * ratio) W`, for a `dy` that was multiplied already, or for one that has to be.
    fn back_through_weight<T: Real>(
        &self,
        dy: &Tensor,
        ratio: Option<&Tensor>,
        scaled: Option<Vec<T>>,
    ) -> Result<Vec<T>> {
        let layout = Layout::contiguous(dy.shape());
        let scaled = match (scaled, ratio) {
            (Some(scaled), _) => scaled,
            (None, Some(ratio)) => self.scaled(dy, ratio)?,
            (None, None) => {
                let (storage, layout) = dy.storage_and_layout();
                let Storage::Cpu(storage) = &*storage else {
                    return Err(not_on_cpu());
                };
                return T::cpu_storage_data(self.times_weight::<T>(storage, layout, false)?);
            }
        };
        let h = self.times_weight::<T>(&T::to_cpu_storage_owned(scaled), &layout, false)?;
        T::cpu_storage_data(h)
    }

    fn scaled<T: Real>(&self, dy: &Tensor, ratio: &Tensor) -> Result<Vec<T>> {
        with_elements::<T, _>(dy, |dy| {
            with_elements::<T, _>(ratio, |ratio| Ok(magnitude::scaled(dy, ratio)))
        })
    }

    /// `dy * ratio` and `dratio`, the latter from y where that is exact, else from the product itself.
    fn scaled_and_ratio_gradient<T: Real>(
        &self,
        x: &Tensor,
        r: &Tensor,
        ratio: &Tensor,
        y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Vec<T>, Tensor)> {
        let bias = bias_values::<T>(self.bias.as_ref(), self.weight.out_dim())?;
        let values = ratio.to_vec1::<T>()?;
        let limits = Limits::of(y.dtype());
        let (scaled, sums) = with_elements::<T, _>(y, |y| {
            with_elements::<T, _>(dy, |dy| {
                Ok(scaled_and_gradient(
                    (y, dy),
                    bias.as_deref(),
                    &values,
                    limits,
                ))
            })
        })?;
        let (mut grad, lost): (Vec<T>, Vec<bool>) = sums.into_iter().unzip();
        if lost.contains(&true) {
            self.recompute(x, r, dy, &lost, &mut grad)?;
        }
        Ok((scaled, tensor(grad, ratio.shape())?))
    }

    /// `sum_t dy (x . blockdiag(r) . W^T)` for the rows of the weight that are marked.
    fn recompute<T: Real>(
        &self,
        x: &Tensor,
        r: &Tensor,
        dy: &Tensor,
        marked: &[bool],
        grad: &mut [T],
    ) -> Result<()> {
        let (rows, width) = x.dims2()?;
        let rotated = with_slice::<T, _>(x, |data, layout| {
            let x = matrix(data, layout)?;
            with_slice(r, |values, _| {
                Ok(rotate(x, Blocks::new(values, r.shape())?))
            })
        })?;
        let rotated = Mat::row_major(&rotated, rows, width);
        with_slice::<T, _>(dy, |dy, _| {
            let dy = Mat::row_major(dy, rows, marked.len());
            for (start, count) in runs(marked) {
                self.weight
                    .panels::<T>(start..start + count, |first, weight| {
                        // One row of the weight's gradient for each: thin, and gone after its run.
                        let count = weight.rows();
                        let mut thin = vec![T::zero(); count * width];
                        let dy = dy.part((0, rows), (first, count)).t();
                        let to = MatMut::new(&mut thin, (count, width), width);
                        multiply(to, dy, rotated, false);
                        for (o, thin) in thin.chunks_exact(width).enumerate() {
                            let terms = thin.iter().enumerate();
                            let sum: f64 = terms
                                .map(|(i, v)| v.to_f64() * weight.at(o, i).to_f64())
                                .sum();
                            grad[first + o] = T::from_f64(sum);
                        }
                    })?;
            }
            Ok(())
        })
    }
}

impl Kernel for Product {
    const NAMES: [&'static str; 3] = ["frozen-linear", "oft-linear", "doft-linear"];

    fn forward<T: Real>(
        &self,
        x: Stored,
        r: Option<Stored>,
        ratio: Option<Stored>,
    ) -> Result<(CpuStorage, Shape)> {
        if x.0.dtype() != T::DTYPE {
            let wide = elements::<T>(x.0, x.1)?.into_owned();
            let (wide, layout) = (
                T::to_cpu_storage_owned(wide),
                Layout::contiguous(x.1.shape()),
            );
            let (y, shape) = self.forward::<T>((&wide, &layout), r, ratio)?;
            return Ok((narrowed(T::cpu_storage_data(y)?, x.0.dtype())?, shape));
        }
        let (rows, width) = x.1.shape().dims2()?;
        let out = self.weight.out_dim();
        let shape = Shape::from((rows, out));
        if rows == 0 {
            return Ok((T::to_cpu_storage_owned(Vec::new()), shape));
        }
        let y = match r {
            None => match as_rows(x.1)? {
                Some(layout) => self.times_weight::<T>(x.0, &layout, true)?,
                None => {
                    let copy = elements::<T>(x.0, x.1)?.into_owned();
                    let layout = Layout::contiguous((rows, width));
                    self.times_weight::<T>(&T::to_cpu_storage_owned(copy), &layout, true)?
                }
            },
            Some((r, layout)) => {
                let x = matrix::<T>(slice(x.0, x.1)?, x.1)?;
                let rotated = rotate(x, Blocks::new(slice(r, layout)?, layout.shape())?);
                let rotated = T::to_cpu_storage_owned(rotated);
                self.times_weight::<T>(&rotated, &Layout::contiguous((rows, width)), true)?
            }
        };
        let mut y = T::cpu_storage_data(y)?;
        let ratio = match ratio {
            Some((ratio, layout)) => Some(slice::<T>(ratio, layout)?),
            None => None,
        };
        let bias = bias_values::<T>(self.bias.as_ref(), out)?;
        if ratio.is_some() || bias.is_some() {
            y.par_chunks_mut(out).for_each(|y| {
                if let Some(ratio) = ratio {
                    y.iter_mut().zip(ratio).for_each(|(y, s)| *y *= *s);
                }
                if let Some(bias) = &bias {
                    y.iter_mut().zip(bias).for_each(|(y, b)| *y += *b);
                }
            });
        }
        Ok((T::to_cpu_storage_owned(y), shape))
    }

    fn backward<T: Real>(
        &self,
        (x, r, ratio): (&Tensor, Option<&Tensor>, Option<&Tensor>),
        y: &Tensor,
        dy: &Tensor,
    ) -> Result<Gradients> {
        let (rows, width) = x.dims2()?;
        let (need_x, need_r) = (x.track_op(), r.is_some_and(Tensor::track_op));
        let dtype = x.dtype();
        let dy = wide::<T>(dy)?.contiguous()?;
        let x = &wide::<T>(x)?;
        let of_ratio = match (ratio, r) {
            (Some(ratio), Some(r)) if ratio.track_op() => {
                Some(self.scaled_and_ratio_gradient::<T>(x, r, ratio, y, &dy)?)
            }
            _ => None,
        };
        let (scaled, dratio) = of_ratio.unzip();
        if !(need_x || need_r) {
            return Ok((None, None, dratio));
        }
        let mut h = match rows {
            0 => Vec::new(),
            _ => self.back_through_weight::<T>(&dy, ratio, scaled)?,
        };
        let Some(r) = r else {
            let dx = tensor_as(h, (rows, width), dtype)?;
            return Ok((Some(dx), None, dratio));
        };
        let dr = with_slice(x, |data, layout| {
            let x = matrix(data, layout)?;
            with_slice(r, |values, _| {
                let blocks = Blocks::new(values, r.shape())?;
                let dr = match (need_x, need_r) {
                    (true, true) => Some(gradient_and_back::<T>(x, &mut h, blocks)),
                    (false, _) => Some(gradient(x, Mat::row_major(&h, rows, width), blocks)),
                    (true, false) => {
                        rotate_back::<T>(&mut h, width, blocks);
                        None
                    }
                };
                dr.map(|dr| tensor(dr, r.shape())).transpose()
            })
        })?;
        let dx = match need_x {
            true => Some(tensor_as(h, (rows, width), dtype)?),
            false => None,
        };
        Ok((dx, dr, dratio))
    }
}

/// The tensor outside any graph, in the dtype the kernels compute in.
fn wide<T: Real>(x: &Tensor) -> Result<Tensor> {
    if x.dtype() == T::DTYPE {
        return Ok(x.detach());
    }
    with_elements::<T, _>(x, |values| tensor(values.to_vec(), x.shape()))
}

/// How to read `x` as rows of neighbouring elements; none where it has to be copied for that. Candle's
/// product and `gemm`'s choose their way, and with it the order of their sums, by which strides are 1:
/// a view would give other bits than its copy, and than its rotation by the identity.
fn as_rows(x: &Layout) -> Result<Option<Layout>> {
    let (rows, width) = x.shape().dims2()?;
    // The stride of an axis of one element leads nowhere, but is looked at.
    let of_rows = if rows == 1 { width } else { x.stride()[0] };
    let of_columns = if width == 1 { 1 } else { x.stride()[1] };
    let rows = Layout::new(
        x.shape().clone(),
        vec![of_rows, of_columns],
        x.start_offset(),
    );
    Ok((of_columns == 1).then_some(rows))
}

/// A CPU tensor of rank 2 as a matrix.
fn matrix<'a, T: Real>(data: &'a [T], layout: &Layout) -> Result<Mat<'a, T>> {
    let shape = layout.shape().dims2()?;
    Ok(Mat::new(
        data,
        shape,
        (layout.stride()[0], layout.stride()[1]),
    ))
}

/// Rows of the weight whose gradients are made together.
const COLUMNS: usize = 64;

/// The stretches of marked rows, in pieces of at most [`COLUMNS`].
fn runs(marked: &[bool]) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (o, _) in marked.iter().enumerate().filter(|(_, marked)| **marked) {
        match runs.last_mut() {
            Some((start, count)) if *start + *count == o && *count < COLUMNS => *count += 1,
            _ => runs.push((o, 1)),
        }
    }
    runs
}
