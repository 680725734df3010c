//! Cross entropy over logits, and over the logits of a frozen head that never exist together.
//!
//! ```text
//! loss = mean_t (ln sum_j exp(z_tj) - z_t,target),   dz = (softmax(z) - onehot) / T
//! dh = dz W   for z = h W^T + bias
//! ```

use super::adapted::bias_values;
use super::composed::composed_in;
use super::gemm::{Mat, MatMut, multiply_wide};
use super::real::{
    Real, by_dtype, elements, has_kernel, narrowed, tensor, tensor_as, with_elements,
};
use super::rows::{exponentials, for_rows, largest};
use super::{Weight, composed};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, D, DType, Layout, Result, Shape, Tensor};
use std::sync::{Arc, Mutex, OnceLock};

/// Rows of hidden states whose logits exist at once: enough that the head is read seldom, few enough
/// that 151,936 classes take 78 MB.
const ROWS: usize = 128;

/// The mean cross entropy of `logits` `(T, V)` and `targets` `(T)`.
pub(crate) fn cross_entropy(logits: &Tensor, targets: Vec<u32>) -> Result<Tensor> {
    if !has_kernel(logits) {
        return composed_cross_entropy(logits, &targets);
    }
    logits.apply_op1(CrossEntropy {
        targets,
        sums: Arc::default(),
    })
}

pub(crate) fn composed_cross_entropy(logits: &Tensor, targets: &[u32]) -> Result<Tensor> {
    let z = logits.to_dtype(composed_in(logits.dtype()))?;
    let shift = z.max_keepdim(D::Minus1)?.detach();
    let z = z.broadcast_sub(&shift)?;
    let sums = z.exp()?.sum_keepdim(D::Minus1)?.log()?;
    let targets = Tensor::new(targets, logits.device())?.unsqueeze(1)?;
    let hit = z.gather(&targets, 1)?;
    (sums - hit)?.mean_all()?.to_dtype(logits.dtype())
}

struct CrossEntropy {
    targets: Vec<u32>,
    /// The largest logit of each row, and `sum exp(z - largest)`. Apart, for in f32 the one may swamp
    /// the logarithm of the other.
    sums: Arc<OnceLock<Vec<[f64; 2]>>>,
}

impl CrossEntropy {
    fn forward<T: Real>(&self, z: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, classes) = layout.shape().dims2()?;
        let values = elements::<T>(z, layout)?;
        let mut sums = vec![[0f64; 2]; rows];
        for_rows(sums.as_flattened_mut(), 2, |t, sum| {
            let mut row = values[t * classes..][..classes].to_vec();
            let shift = largest(&row);
            sum[0] = shift.to_f64();
            sum[1] = exponentials(&mut row, shift).to_f64();
        });
        let losses = sums.iter().zip(&self.targets).enumerate();
        let total: f64 = losses
            .map(|(t, ([shift, sum], target))| {
                shift - values[t * classes + *target as usize].to_f64() + sum.ln()
            })
            .sum();
        let _ = self.sums.set(sums);
        let loss = vec![T::from_f64(total / rows as f64)];
        Ok((narrowed(loss, z.dtype())?, Shape::from(())))
    }

    fn backward<T: Real>(&self, z: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let (rows, classes) = z.dims2()?;
        let Some(sums) = self.sums.get() else {
            return Err(candle_core::Error::Msg("the loss has not run".into()));
        };
        let scale = dy.to_dtype(DType::F64)?.to_scalar::<f64>()? / rows as f64;
        let mut dz = with_elements::<T, _>(z, |z| Ok(z.to_vec()))?;
        for_rows(&mut dz, classes, |t, row| {
            let [shift, sum] = sums[t];
            let (shift, each) = (T::from_f64(shift), T::from_f64(scale / sum));
            row.iter_mut().for_each(|v| *v = (*v - shift).exp() * each);
            row[self.targets[t] as usize] -= T::from_f64(scale);
        });
        tensor_as(dz, z.shape(), z.dtype()).map(Some)
    }
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross-entropy"
    }

    fn cpu_fwd(&self, z: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        by_dtype!(z, forward(z, l), self)
    }

    fn bwd(&self, z: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        by_dtype!(z, backward(z, dy), self)
    }
}

/// The mean cross entropy of `hidden . W^T + bias` `(T, V)`, with a gradient to `hidden` `(T, H)`
/// alone. Each logit is computed once: where a gradient is wanted, it is made on the way forward.
pub(crate) fn linear_cross_entropy(
    hidden: &Tensor,
    head: &Weight,
    bias: Option<&Tensor>,
    targets: Vec<u32>,
) -> Result<Tensor> {
    if !has_kernel(hidden) {
        return composed_linear_cross_entropy(hidden, head, bias, &targets);
    }
    hidden.apply_op1(Head {
        head: head.clone(),
        bias: bias.map(Tensor::detach),
        targets,
        trains: hidden.track_op(),
        gradient: Arc::default(),
    })
}

struct Head {
    head: Weight,
    bias: Option<Tensor>,
    targets: Vec<u32>,
    trains: bool,
    /// `dh` for an upstream gradient of 1, from the forward pass on, in the dtype it is computed in: a
    /// half one would be rounded before the upstream gradient brings it into range.
    gradient: Arc<Mutex<Option<Tensor>>>,
}

impl Head {
    fn forward<T: Real>(&self, h: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, width) = layout.shape().dims2()?;
        let classes = self.head.out_dim();
        let hidden = elements::<T>(h, layout)?;
        let bias = bias_values::<T>(self.bias.as_ref(), classes)?;
        let scale = T::from_f64(1. / rows as f64);
        let mut gradient = vec![T::zero(); if self.trains { rows * width } else { 0 }];
        let mut logits = vec![T::zero(); ROWS.min(rows) * classes];
        let mut losses = vec![0f64; ROWS.min(rows)];
        let mut total = 0.;
        for start in (0..rows).step_by(ROWS) {
            let count = ROWS.min(rows - start);
            let logits = &mut logits[..count * classes];
            let h = Mat::row_major(&hidden[start * width..][..count * width], count, width);
            self.head.panels::<T>(0..classes, |first, w| {
                let z = MatMut::new(&mut logits[first..], (count, w.rows()), classes);
                multiply_wide(z, h, w.t(), false);
            })?;
            let losses = &mut losses[..count];
            self.losses(start, logits, losses, bias.as_deref(), scale);
            total += losses.iter().sum::<f64>();
            if self.trains {
                let to = &mut gradient[start * width..][..count * width];
                self.head.panels::<T>(0..classes, |first, w| {
                    let dz = Mat::row_major(logits, count, classes);
                    let dz = dz.part((0, count), (first, w.rows()));
                    multiply_wide(MatMut::new(to, (count, width), width), dz, w, first > 0);
                })?;
            }
        }
        if self.trains {
            let gradient = tensor(gradient, (rows, width))?;
            *self.gradient.lock().unwrap_or_else(|e| e.into_inner()) = Some(gradient);
        }
        let loss = vec![T::from_f64(total / rows as f64)];
        Ok((narrowed(loss, h.dtype())?, Shape::from(())))
    }

    /// The loss of each row; its logits become their gradient where one is wanted.
    fn losses<T: Real>(
        &self,
        start: usize,
        logits: &mut [T],
        losses: &mut [f64],
        bias: Option<&[T]>,
        scale: T,
    ) {
        use rayon::prelude::*;
        let classes = self.head.out_dim();
        let rows = logits.par_chunks_mut(classes).zip(losses.par_iter_mut());
        rows.enumerate().for_each(|(t, (row, loss))| {
            if let Some(bias) = bias {
                row.iter_mut().zip(bias).for_each(|(z, c)| *z += *c);
            }
            let target = self.targets[start + t] as usize;
            let hit = row[target].to_f64();
            let shift = largest(row);
            let sum = exponentials(row, shift);
            *loss = shift.to_f64() - hit + sum.to_f64().ln();
            if self.trains {
                let scaled = scale / sum;
                row.iter_mut().for_each(|p| *p *= scaled);
                row[target] -= scale;
            }
        });
    }
}

impl CustomOp1 for Head {
    fn name(&self) -> &'static str {
        "linear-cross-entropy"
    }

    fn cpu_fwd(&self, h: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        by_dtype!(h, forward(h, l), self)
    }

    fn bwd(&self, h: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let gradient = self.gradient.lock().unwrap_or_else(|e| e.into_inner());
        match &*gradient {
            Some(gradient) => {
                let dh = gradient.broadcast_mul(&dy.to_dtype(gradient.dtype())?)?;
                dh.to_dtype(h.dtype()).map(Some)
            }
            None => Err(candle_core::Error::Msg("the loss has not run".into())),
        }
    }
}

/// The same out of candle's operations, on detached chunks; the sum of products with the finished
/// gradient brings it into the graph.
pub(crate) fn composed_linear_cross_entropy(
    hidden: &Tensor,
    head: &Weight,
    bias: Option<&Tensor>,
    targets: &[u32],
) -> Result<Tensor> {
    let (rows, _) = hidden.dims2()?;
    let dtype = composed_in(hidden.dtype());
    let (mut losses, mut gradients) = (Vec::new(), Vec::new());
    for start in (0..rows).step_by(ROWS) {
        let count = ROWS.min(rows - start);
        let h = hidden.detach().narrow(0, start, count)?.contiguous()?;
        let z = composed::frozen(&h, head, bias)?.to_dtype(dtype)?;
        let z = z.broadcast_sub(&z.max_keepdim(D::Minus1)?)?;
        let exp = z.exp()?;
        let sums = exp.sum_keepdim(D::Minus1)?;
        let targets = Tensor::new(&targets[start..start + count], hidden.device())?;
        let targets = targets.unsqueeze(1)?;
        losses.push((sums.log()? - z.gather(&targets, 1)?)?.sum_all()?);
        let ones = targets.ones_like()?.to_dtype(dtype)?;
        let p = exp.broadcast_div(&sums)?;
        let dz = (p.scatter_add(&targets, &ones.neg()?, 1)? / rows as f64)?;
        let weight = head.tensor()?.to_dtype(dtype)?;
        gradients.push(dz.matmul(&weight)?);
    }
    let loss = (Tensor::stack(&losses, 0)?.sum_all()? / rows as f64)?;
    let along = (hidden.to_dtype(dtype)? * Tensor::cat(&gradients, 0)?)?.sum_all()?;
    let value = (loss - along.detach())?;
    (along + value)?.to_dtype(hidden.dtype())
}
