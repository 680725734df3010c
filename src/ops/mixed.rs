//! One product of rows that differ in rotation and ratio. For inference: nothing here enters a graph.
//!
//! ```text
//! y_i = ratio_i * (x_i . blockdiag(R_i) . W^T) + bias,   i an index of axis 0
//! ```
//!
//! What is before the product and behind it is one pass each, whatever the rows belong to.

use super::Weight;
use super::adapted::bias_values;
use super::blocks::{Blocks, ROWS, rotate_rows};
use super::gemm::{Mat, MatMut, filled, multiply, multiply_dots};
use super::linear::{Product, decodes};
use super::real::{Real, by_dtype, elements, not_on_cpu, tensor_as, with_elements};
use candle_core::{Layout, Result, Storage, Tensor};
use rayon::prelude::*;
use std::borrow::Cow;
use std::mem::MaybeUninit;
use std::ops::Deref;

/// Some indices of axis 0, and the rotation and ratio that they have; none is the frozen product.
pub(crate) type Part<'a> = (&'a [u32], Option<(&'a Tensor, Option<&'a Tensor>)>);

/// Rows up to which a product that packs neither side is made. On 8 rows of 1024x1024 `gemm`, which packs the weight,
/// takes more than half the time of eight products of one row.
const FEW: usize = 16;

/// Outputs of a task of few rows.
const OUTPUTS: usize = 64;

/// Outputs below which waking other threads costs more than they save.
const ALONE: usize = 1 << 15;

/// Whether [`linear`] runs here.
pub(crate) fn has_kernel(x: &Tensor, weight: &Weight) -> bool {
    super::real::has_kernel(x) && !decodes(x, weight)
}

/// The linear layer; `parts` have every index of axis 0 of `x` once. `x` is `(.., in)` on CPU.
pub(crate) fn linear(
    x: &Tensor,
    parts: &[Part],
    weight: &Weight,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let mixed = Mixed {
        parts,
        weight,
        bias,
    };
    by_dtype!(x, run(x), mixed)
}

struct Mixed<'a> {
    parts: &'a [Part<'a>],
    weight: &'a Weight,
    bias: Option<&'a Tensor>,
}

/// The factors of a part in the dtype that is computed in.
#[derive(Clone, Copy)]
struct Factors<'a, T> {
    r: Blocks<'a, T>,
    ratio: Option<&'a [T]>,
}

impl Mixed<'_> {
    fn run<T: Real>(&self, x: &Tensor) -> Result<Tensor> {
        // Locks first, then what they hold, each living as long as the rest.
        let (mut of_r, mut of_ratio) = (Vec::new(), Vec::new());
        for (_, factors) in self.parts {
            let (r, ratio) = factors.unzip();
            of_r.push(r.map(Tensor::storage_and_layout));
            of_ratio.push(ratio.flatten().map(Tensor::storage_and_layout));
        }
        let of_r = of_r
            .iter()
            .map(values::<T, _>)
            .collect::<Result<Vec<_>>>()?;
        let of_ratio = of_ratio
            .iter()
            .map(values::<T, _>)
            .collect::<Result<Vec<_>>>()?;
        let mut factors = vec![None; x.dims().first().copied().unwrap_or(0)];
        for (place, (indices, part)) in self.parts.iter().enumerate() {
            if let (Some((r, _)), Some(values)) = (part, &of_r[place]) {
                let r = Blocks::new(values, r.shape())?;
                let ratio = of_ratio[place].as_deref();
                let own = Some(Factors { r, ratio });
                indices
                    .iter()
                    .for_each(|index| factors[*index as usize] = own);
            }
        }
        self.product(x, &factors)
    }

    /// `factors` are those of each index.
    fn product<T: Real>(&self, x: &Tensor, factors: &[Option<Factors<T>>]) -> Result<Tensor> {
        let (width, out) = (self.weight.in_dim(), self.weight.out_dim());
        let rows = x.elem_count() / width.max(1);
        let mut shape = x.dims().to_vec();
        if let Some(last) = shape.last_mut() {
            *last = out;
        }
        if rows == 0 {
            return tensor_as(Vec::<T>::new(), shape, x.dtype());
        }
        let each = rows / factors.len();
        let turned = with_elements(x, |x| {
            Ok(turned(Mat::row_major(x, rows, width), factors, each))
        })?;
        let mut y = match rows <= FEW {
            true => self.of_few(&turned, rows)?,
            false => {
                let turned = T::to_cpu_storage_owned(turned);
                let layout = Layout::contiguous((rows, width));
                let product = Product::new(self.weight, None);
                T::cpu_storage_data(product.times_weight::<T>(&turned, &layout, true)?)?
            }
        };
        let bias = bias_values::<T>(self.bias, out)?;
        if bias.is_some() || factors.iter().flatten().any(|own| own.ratio.is_some()) {
            finish(&mut y, out, factors, each, bias.as_deref());
        }
        tensor_as(y, shape, x.dtype())
    }

    /// `x . W^T` of a few rows: the weight is read once, as it lies, and no part of it is packed.
    fn of_few<T: Real>(&self, x: &[T], rows: usize) -> Result<Vec<T>> {
        let (width, out) = (self.weight.in_dim(), self.weight.out_dim());
        let x = Mat::row_major(x, rows, width);
        // Outputs first, so that a task has its own.
        let mut y = vec![T::zero(); out * rows];
        self.weight.panels::<T>(0..out, |start, panel| {
            let y = &mut y[start * rows..][..panel.rows() * rows];
            let tasks = y.par_chunks_mut(OUTPUTS * rows).enumerate();
            tasks.for_each(|(task, y)| {
                let count = y.len() / rows;
                let weight = panel.part((task * OUTPUTS, count), (0, width));
                let mut y = MatMut::new(y, (count, rows), rows);
                match weight.has_whole_rows() {
                    true => multiply_dots(&mut y, weight, x),
                    false => multiply(y, weight, x.t(), false),
                }
            });
        })?;
        let row = |row: usize| y.iter().skip(row).step_by(rows).copied();
        Ok((0..rows).flat_map(row).collect())
    }
}

/// The elements of a stored tensor.
fn values<'a, T: Real, S: Deref<Target = Storage>>(
    stored: &'a Option<(S, &Layout)>,
) -> Result<Option<Cow<'a, [T]>>> {
    match stored {
        None => Ok(None),
        Some((storage, layout)) => match &**storage {
            Storage::Cpu(storage) => elements(storage, layout).map(Some),
            _ => Err(not_on_cpu()),
        },
    }
}

/// Each row by the rotation of its index, of which there are `each` rows.
#[allow(unsafe_code, reason = "zeros would cost a pass")]
fn turned<T: Real>(x: Mat<T>, factors: &[Option<Factors<T>>], each: usize) -> Vec<T> {
    let (rows, width) = (x.rows(), x.cols());
    let step = each.min(ROWS);
    let fits = |own: &Factors<T>| width.is_multiple_of(own.r.size());
    assert!(
        factors.len() * each == rows && factors.iter().flatten().all(fits),
        "rows and blocks that do not fit"
    );
    let turn = |index: usize, task: usize, out: &mut [MaybeUninit<T>]| {
        let x = x.part((index * each + task * step, out.len() / width), (0, width));
        match &factors[index] {
            Some(own) => rotate_rows(out, x, own.r),
            None => copy(out, x),
        }
    };
    let fill = |out: &mut [MaybeUninit<T>]| {
        let indices = out.par_chunks_mut(each * width).enumerate();
        let tasks = indices.flat_map(|(index, out)| {
            let tasks = out.par_chunks_mut(step * width).enumerate();
            tasks.map(move |(task, out)| (index, task, out))
        });
        tasks.for_each(|(index, task, out)| turn(index, task, out));
    };
    // SAFETY: the tasks share out all rows, as asserted; a copy writes each element, and so does a
    // rotation, whose blocks fill a row, as asserted.
    unsafe { filled(rows * width, fill) }
}

fn copy<T: Real>(out: &mut [MaybeUninit<T>], x: Mat<T>) {
    for (row, out) in out.chunks_exact_mut(x.cols()).enumerate() {
        for (column, out) in out.iter_mut().enumerate() {
            out.write(x.at(row, column));
        }
    }
}

/// Ratio and bias, in place.
fn finish<T: Real>(
    y: &mut [T],
    out: usize,
    factors: &[Option<Factors<T>>],
    each: usize,
    bias: Option<&[T]>,
) {
    let alone = y.len() <= ALONE;
    let one = |(row, y): (usize, &mut [T])| {
        let own = factors[row / each].as_ref();
        if let Some(ratio) = own.and_then(|own| own.ratio) {
            y.iter_mut().zip(ratio).for_each(|(y, s)| *y *= *s);
        }
        if let Some(bias) = bias {
            y.iter_mut().zip(bias).for_each(|(y, b)| *y += *b);
        }
    };
    match alone {
        true => y.chunks_mut(out).enumerate().for_each(one),
        false => y.par_chunks_mut(out).enumerate().for_each(one),
    }
}

#[cfg(test)]
mod tests {
    use super::super::composed;
    use super::*;
    use crate::rng::SplitMix64;
    use candle_core::{DType, Device};

    fn seeded(shape: &[usize], seed: u64) -> Result<Tensor> {
        let mut rng = SplitMix64::new(seed);
        let values = (0..shape.iter().product()).map(|_: usize| rng.normal());
        Tensor::from_iter(values, &Device::Cpu)?.reshape(shape)
    }

    /// Every row alone, by candle's operations.
    fn one_by_one(
        x: &Tensor,
        parts: &[Part],
        weight: &Weight,
        bias: Option<&Tensor>,
    ) -> Result<Tensor> {
        let mut rows = Vec::new();
        for index in 0..x.dim(0)? {
            let own = parts.iter().find(|(of, _)| of.contains(&(index as u32)));
            let x = x.narrow(0, index, 1)?;
            rows.push(match own.and_then(|(_, factors)| *factors) {
                Some((r, ratio)) => composed::doft(&x, r, ratio, weight, bias)?,
                None => composed::frozen(&x, weight, bias)?,
            });
        }
        Tensor::cat(&rows, 0)
    }

    #[test]
    fn mixed_rows_are_what_each_is_alone() -> Result<()> {
        for (width, out) in [(24, 40), (600, 150)] {
            check(width, out)?;
        }
        Ok(())
    }

    fn check(width: usize, out: usize) -> Result<()> {
        let bias = seeded(&[out], 1)?;
        let (one, many) = (seeded(&[1, 6, 6], 2)?, seeded(&[width / 8, 8, 8], 3)?);
        let (small, ratio) = (seeded(&[width / 2, 2, 2], 4)?, seeded(&[out], 5)?);
        let all: [Part; 4] = [
            (&[4, 1], Some((&one, None))),
            (&[0], None),
            (&[2], Some((&many, Some(&ratio)))),
            (&[5, 3], Some((&small, Some(&ratio)))),
        ];
        let plain: [Part; 2] = [(&[0, 2, 4], None), (&[1, 3, 5], Some((&one, None)))];
        for dtype in [DType::F64, DType::F32, DType::BF16] {
            let weight = seeded(&[width, out], 6)?.to_dtype(dtype)?.t()?;
            let weight = Weight::dense(&if out < 100 {
                weight
            } else {
                weight.contiguous()?
            });
            let bias = bias.to_dtype(dtype)?;
            let flat = seeded(&[6, width], 7)?;
            // Two rows each; more rows than a task has, and more outputs than one thread takes.
            let few = seeded(&[6, 2, width], 7)?;
            let long = seeded(&[6, 150, width], 8)?;
            let strided = seeded(&[37, 6, width + 5], 9)?
                .transpose(0, 1)?
                .narrow(2, 3, width)?;
            for x in [flat, few, long, strided, seeded(&[6, 0, width], 0)?] {
                let x = x.to_dtype(dtype)?;
                for parts in [&all[..], &plain[..]] {
                    for bias in [None, Some(&bias)] {
                        let found = linear(&x, parts, &weight, bias)?;
                        assert_eq!((found.dims()[0], found.dtype()), (6, dtype));
                        let expected = one_by_one(&x, parts, &weight, bias)?;
                        assert_eq!(found.dims(), expected.dims());
                        if found.elem_count() == 0 {
                            continue;
                        }
                        let most = |x: &Tensor| x.abs()?.max_all()?.to_scalar::<f64>();
                        let expected = expected.to_dtype(DType::F64)?;
                        let off = most(&(found.to_dtype(DType::F64)? - &expected)?)?;
                        let off = off / most(&expected)?;
                        let bound = match dtype {
                            DType::F64 => 1e-14,
                            DType::F32 => 1e-6,
                            _ => 1. / 64.,
                        };
                        assert!(off < bound, "{dtype:?} {:?}: off by {off:e}", x.dims());
                    }
                }
            }
        }
        Ok(())
    }
}
