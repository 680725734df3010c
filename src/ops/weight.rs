//! [`Weight`]: a frozen matrix that never enters a graph, dense or quantized, and its panels.

use super::gemm::Mat;
use super::real::{Real, with_slice};
use candle_core::quantized::k_quants::{self, GgmlType};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{CpuStorage, DType, Device, Error, Result, Storage, Tensor};
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;
use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

/// Elements of a weight that are widened at once: 2 MiB of f32, which stays in a cache.
const PANEL: usize = 1 << 19;

/// Elements that one task widens.
const PIECE: usize = 1 << 14;

/// The frozen weight `(out, in)` of a product, captured inside an op. It shares its storage with what
/// it was made from.
#[derive(Clone, Debug)]
pub(crate) struct Weight {
    values: Values,
    variable: bool,
}

#[derive(Clone, Debug)]
enum Values {
    Dense(Tensor),
    Quantized {
        tensor: Arc<QTensor>,
        fast_decode: bool,
    },
}

impl Weight {
    /// Freezes a matrix. One of another rank is refused when it is used.
    pub(crate) fn dense(weight: &Tensor) -> Self {
        Self {
            values: Values::Dense(weight.detach()),
            variable: weight.track_op(),
        }
    }

    /// A matrix of quantized rows.
    pub(crate) fn quantized(tensor: Arc<QTensor>) -> Self {
        let values = Values::Quantized {
            tensor,
            fast_decode: false,
        };
        Self {
            values,
            variable: false,
        }
    }

    /// Whether it shares its values with a variable, which can be set.
    pub(crate) fn is_variable(&self) -> bool {
        self.variable
    }

    /// Lets candle's quantized product answer a few rows in inference.
    pub(crate) fn set_fast_decode(&mut self, on: bool) {
        if let Values::Quantized { fast_decode, .. } = &mut self.values {
            *fast_decode = on;
        }
    }

    pub(crate) fn qtensor(&self) -> Option<&Arc<QTensor>> {
        match &self.values {
            Values::Dense(_) => None,
            Values::Quantized { tensor, .. } => Some(tensor),
        }
    }

    /// The quantized tensor where candle's product may be used on it.
    pub(crate) fn decoder(&self) -> Option<&Arc<QTensor>> {
        match &self.values {
            Values::Quantized {
                tensor,
                fast_decode: true,
            } => Some(tensor),
            _ => None,
        }
    }

    /// The dense tensor; a quantized weight is expanded.
    pub(crate) fn tensor(&self) -> Result<Tensor> {
        match &self.values {
            Values::Dense(weight) => Ok(weight.clone()),
            Values::Quantized { tensor, .. } => tensor.dequantize(&tensor.device()),
        }
    }

    /// The dense tensor of exactly this dtype, if that is what the weight is.
    pub(crate) fn native(&self, dtype: DType) -> Option<&Tensor> {
        match &self.values {
            Values::Dense(weight) if weight.dtype() == dtype => Some(weight),
            _ => None,
        }
    }

    pub(crate) fn dims(&self) -> &[usize] {
        match &self.values {
            Values::Dense(weight) => weight.dims(),
            Values::Quantized { tensor, .. } => tensor.shape().dims(),
        }
    }

    pub(crate) fn out_dim(&self) -> usize {
        self.dims().first().copied().unwrap_or(0)
    }

    /// Elements of a row.
    pub(crate) fn in_dim(&self) -> usize {
        self.dims().iter().skip(1).product()
    }

    /// The dtype of the values; f32 for a quantized weight.
    pub(crate) fn dtype(&self) -> DType {
        match &self.values {
            Values::Dense(weight) => weight.dtype(),
            Values::Quantized { .. } => DType::F32,
        }
    }

    pub(crate) fn device(&self) -> Device {
        match &self.values {
            Values::Dense(weight) => weight.device().clone(),
            Values::Quantized { tensor, .. } => tensor.device(),
        }
    }

    /// Calls `f(first, panel)` with the rows of a matrix on CPU, first to last, in panels. A dense
    /// weight of the dtype `T` is one panel and is not copied; any other is widened to f32, some rows
    /// at a time.
    pub(crate) fn panels<T: Real>(
        &self,
        rows: Range<usize>,
        mut f: impl FnMut(usize, Mat<T>),
    ) -> Result<()> {
        if rows.is_empty() {
            return Ok(());
        }
        let width = self.in_dim();
        if let Some(weight) = self.native(T::DTYPE) {
            return with_slice::<T, _>(weight, |data, layout| {
                let (shape, stride) = (layout.shape().dims2()?, layout.stride());
                let all = Mat::new(data, shape, (stride[0], stride[1]));
                f(rows.start, all.part((rows.start, rows.len()), (0, width)));
                Ok(())
            });
        }
        let source = Source::new(self)?;
        let step = (PANEL / width.max(1)).clamp(1, rows.len());
        let mut panel = vec![0f32; step * width];
        for start in rows.clone().step_by(step) {
            let count = step.min(rows.end - start);
            let panel = &mut panel[..count * width];
            source.widen(start, width, panel)?;
            match T::of_f32(panel) {
                Some(panel) => f(start, Mat::row_major(panel, count, width)),
                None => return Err(no_product(self.dtype(), T::DTYPE)),
            }
        }
        Ok(())
    }
}

fn no_product(weight: DType, x: DType) -> Error {
    Error::Msg(format!(
        "no product of an input of {x:?} with a weight of {weight:?} or less"
    ))
}

/// Where the elements of a weight that is narrower than f32 lie.
enum Source<'a> {
    /// A contiguous half tensor, a copy where the original has other strides.
    Half(Tensor),
    Blocks(Cow<'a, [u8]>, GgmlDType),
}

impl<'a> Source<'a> {
    fn new(weight: &'a Weight) -> Result<Self> {
        match &weight.values {
            Values::Dense(weight) => Ok(Self::Half(weight.contiguous()?)),
            Values::Quantized { tensor, .. } => Ok(Self::Blocks(tensor.data()?, tensor.dtype())),
        }
    }

    /// Writes the rows from `start` on, of `width` elements each, as many as `to` holds.
    fn widen(&self, start: usize, width: usize, to: &mut [f32]) -> Result<()> {
        match self {
            Self::Half(weight) => {
                let (storage, layout) = weight.storage_and_layout();
                let Storage::Cpu(storage) = &*storage else {
                    return Err(Error::Msg("expected a weight on CPU".into()));
                };
                let from = layout.start_offset() + start * width;
                widen_half(storage, from, to)
            }
            Self::Blocks(data, dtype) => {
                // Whole rows, so that a piece never cuts a block.
                let rows = (PIECE / width.max(1)).max(1);
                to.par_chunks_mut(rows * width)
                    .enumerate()
                    .try_for_each(|(i, to)| {
                        dequantize(data, *dtype, (start + i * rows) * width, to)
                    })
            }
        }
    }
}

fn widen_half(storage: &CpuStorage, from: usize, to: &mut [f32]) -> Result<()> {
    let pieces = to.par_chunks_mut(PIECE).enumerate();
    match storage {
        CpuStorage::F16(data) => {
            let data = &data[from..];
            pieces.for_each(|(i, to)| data[i * PIECE..][..to.len()].convert_to_f32_slice(to));
        }
        CpuStorage::BF16(data) => {
            let data = &data[from..];
            pieces.for_each(|(i, to)| data[i * PIECE..][..to.len()].convert_to_f32_slice(to));
        }
        _ => return Err(Error::Msg("expected a weight of f16 or bf16".into())),
    }
    Ok(())
}

/// Expands the elements from `from` on; `from` and the length of `to` are whole blocks.
fn dequantize(data: &[u8], dtype: GgmlDType, from: usize, to: &mut [f32]) -> Result<()> {
    use half::{bf16, f16};
    match dtype {
        GgmlDType::F32 => expand::<f32>(data, from, to),
        GgmlDType::F16 => expand::<f16>(data, from, to),
        GgmlDType::BF16 => expand::<bf16>(data, from, to),
        GgmlDType::Q4_0 => expand::<k_quants::BlockQ4_0>(data, from, to),
        GgmlDType::Q4_1 => expand::<k_quants::BlockQ4_1>(data, from, to),
        GgmlDType::Q5_0 => expand::<k_quants::BlockQ5_0>(data, from, to),
        GgmlDType::Q5_1 => expand::<k_quants::BlockQ5_1>(data, from, to),
        GgmlDType::Q8_0 => expand::<k_quants::BlockQ8_0>(data, from, to),
        GgmlDType::Q8_1 => expand::<k_quants::BlockQ8_1>(data, from, to),
        GgmlDType::Q2K => expand::<k_quants::BlockQ2K>(data, from, to),
        GgmlDType::Q3K => expand::<k_quants::BlockQ3K>(data, from, to),
        GgmlDType::Q4K => expand::<k_quants::BlockQ4K>(data, from, to),
        GgmlDType::Q5K => expand::<k_quants::BlockQ5K>(data, from, to),
        GgmlDType::Q6K => expand::<k_quants::BlockQ6K>(data, from, to),
        GgmlDType::Q8K => expand::<k_quants::BlockQ8K>(data, from, to),
    }
}

fn expand<B: GgmlType>(data: &[u8], from: usize, to: &mut [f32]) -> Result<()> {
    #[allow(unsafe_code, reason = "candle hands out the blocks as bytes")]
    // SAFETY: the caller pairs `B` with the dtype candle states for these bytes, so they were
    // written as values of `B`; every block type is plain numbers, of which any bits are valid.
    let (before, blocks, after) = unsafe { data.align_to::<B>() };
    let (start, count) = (from / B::BLCK_SIZE, to.len() / B::BLCK_SIZE);
    let whole = from.is_multiple_of(B::BLCK_SIZE) && to.len().is_multiple_of(B::BLCK_SIZE);
    if !(before.is_empty() && after.is_empty() && whole && start + count <= blocks.len()) {
        return Err(Error::Msg(
            "quantized rows that are not whole blocks".into(),
        ));
    }
    B::to_float(&blocks[start..start + count], to);
    Ok(())
}

/// Rows of a table, `ids` of them, in f32 or wider: only those are expanded.
pub(crate) fn gather<T: Real>(table: &Weight, ids: &[u32]) -> Result<Vec<T>> {
    let width = table.in_dim();
    let mut rows = vec![T::zero(); ids.len() * width];
    if let Some(table) = table.native(T::DTYPE) {
        with_slice::<T, _>(table, |data, layout| {
            let stride = layout.stride();
            rows.par_chunks_mut(width.max(1))
                .zip(ids)
                .for_each(|(to, id)| {
                    let from = &data[*id as usize * stride[0]..];
                    match stride[1] {
                        // A table that was expanded along its width.
                        0 => to.fill(from[0]),
                        step => {
                            let from = from.iter().step_by(step);
                            to.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
                        }
                    }
                });
            Ok(())
        })?;
        return Ok(rows);
    }
    let source = Source::new(table)?;
    let mut wide = vec![0f32; width];
    for (to, id) in rows.chunks_exact_mut(width.max(1)).zip(ids) {
        source.widen(*id as usize, width, &mut wide)?;
        match T::of_f32(&wide) {
            Some(wide) => to.copy_from_slice(wide),
            None => return Err(no_product(table.dtype(), T::DTYPE)),
        }
    }
    Ok(rows)
}
