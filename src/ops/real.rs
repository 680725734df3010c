//! [`Real`]: the two dtypes that kernels compute in, and the way of the half types in and out.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Device, Error, Layout, Result, Storage, Tensor, WithDType};
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;
use std::borrow::Cow;

/// Elements that one task converts.
const PIECE: usize = 1 << 14;

/// f32 or f64.
pub(crate) trait Real: WithDType + Send + Sync {
    /// The slice itself where f32 is meant.
    fn of_f32(values: &[f32]) -> Option<&[Self]>;

    /// The slice itself where f32 is meant.
    fn as_f32(values: &[Self]) -> Option<&[f32]>;
}

impl Real for f32 {
    fn of_f32(values: &[f32]) -> Option<&[Self]> {
        Some(values)
    }

    fn as_f32(values: &[Self]) -> Option<&[f32]> {
        Some(values)
    }
}

impl Real for f64 {
    fn of_f32(_: &[f32]) -> Option<&[Self]> {
        None
    }

    fn as_f32(_: &[Self]) -> Option<&[f32]> {
        None
    }
}

/// Whether the kernels take `x`: a float tensor on CPU. Half types are computed in f32.
pub(crate) fn has_kernel(x: &Tensor) -> bool {
    let float = matches!(
        x.dtype(),
        DType::F16 | DType::BF16 | DType::F32 | DType::F64
    );
    float && matches!(x.device(), Device::Cpu)
}

/// Calls a method with the dtype that the kernels compute in: f64 for f64, else f32.
macro_rules! by_dtype {
    ($tensor:expr, $call:ident($($arg:expr),*), $op:expr) => {
        match $tensor.dtype() {
            candle_core::DType::F64 => $op.$call::<f64>($($arg),*),
            _ => $op.$call::<f32>($($arg),*),
        }
    };
}
pub(crate) use by_dtype;

/// Runs `f` on the elements of a CPU tensor of dtype `T`, which start at its offset and follow
/// `layout.stride()`.
pub(crate) fn with_slice<T: Real, A>(
    tensor: &Tensor,
    f: impl FnOnce(&[T], &Layout) -> Result<A>,
) -> Result<A> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => f(slice(storage, layout)?, layout),
        _ => Err(not_on_cpu()),
    }
}

/// The elements from the offset of `layout` on.
pub(crate) fn slice<'a, T: Real>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    let all = T::cpu_storage_as_slice(storage)?;
    Ok(&all[layout.start_offset().min(all.len())..])
}

/// A contiguous CPU tensor outside any graph.
pub(crate) fn tensor<T: Real>(
    data: Vec<T>,
    shape: impl Into<candle_core::Shape>,
) -> Result<Tensor> {
    Tensor::from_vec(data, shape.into(), &Device::Cpu)
}

/// The elements in row-major order as `T`: borrowed where they lie so, else copied or widened.
pub(crate) fn elements<'a, T: Real>(
    storage: &'a CpuStorage,
    layout: &Layout,
) -> Result<Cow<'a, [T]>> {
    let count = layout.shape().elem_count();
    let start = layout.start_offset();
    if layout.is_contiguous() {
        match storage {
            CpuStorage::F16(data) if count > 0 => return widened(&data[start..start + count]),
            CpuStorage::BF16(data) if count > 0 => return widened(&data[start..start + count]),
            _ if storage.dtype() == T::DTYPE => {
                let all = T::cpu_storage_as_slice(storage)?;
                return Ok(Cow::Borrowed(&all[start.min(all.len())..][..count]));
            }
            _ => {}
        }
    }
    let copy = storage.to_dtype(layout, T::DTYPE)?;
    Ok(Cow::Owned(T::cpu_storage_data(copy)?))
}

fn widened<H: Send + Sync, T: Real>(half: &[H]) -> Result<Cow<'static, [T]>>
where
    [H]: HalfFloatSliceExt,
{
    if T::DTYPE != DType::F32 {
        return Err(Error::Msg("half types are computed in f32".into()));
    }
    let mut wide = vec![0f32; half.len()];
    wide.par_chunks_mut(PIECE)
        .zip(half.par_chunks(PIECE))
        .for_each(|(to, from)| from.convert_to_f32_slice(to));
    T::cpu_storage_data(CpuStorage::F32(wide)).map(Cow::Owned)
}

/// The values as a storage of `dtype`: `T` itself, or a half type that is rounded to.
pub(crate) fn narrowed<T: Real>(values: Vec<T>, dtype: DType) -> Result<CpuStorage> {
    fn rounded<H: Copy + Send + Sync + Default>(wide: &[f32]) -> Vec<H>
    where
        [H]: HalfFloatSliceExt,
    {
        let mut half = vec![H::default(); wide.len()];
        half.par_chunks_mut(PIECE)
            .zip(wide.par_chunks(PIECE))
            .for_each(|(to, from)| to.convert_from_f32_slice(from));
        half
    }
    match (dtype, T::as_f32(&values)) {
        (DType::F16, Some(wide)) => Ok(CpuStorage::F16(rounded(wide))),
        (DType::BF16, Some(wide)) => Ok(CpuStorage::BF16(rounded(wide))),
        (dtype, _) if dtype == T::DTYPE => Ok(T::to_cpu_storage_owned(values)),
        (dtype, _) => Err(Error::Msg(format!(
            "no way from {:?} to {dtype:?}",
            T::DTYPE
        ))),
    }
}

/// A contiguous CPU tensor of `dtype` outside any graph.
pub(crate) fn tensor_as<T: Real>(
    values: Vec<T>,
    shape: impl Into<candle_core::Shape>,
    dtype: DType,
) -> Result<Tensor> {
    let shape = shape.into();
    match narrowed(values, dtype)? {
        CpuStorage::F16(values) => Tensor::from_vec(values, shape, &Device::Cpu),
        CpuStorage::BF16(values) => Tensor::from_vec(values, shape, &Device::Cpu),
        storage => Tensor::from_vec(T::cpu_storage_data(storage)?, shape, &Device::Cpu),
    }
}

pub(crate) fn not_on_cpu() -> Error {
    Error::Msg("expected a tensor on CPU".into())
}

/// Runs `f` on the elements of a CPU tensor in row-major order, widened where they are half.
pub(crate) fn with_elements<T: Real, A>(
    tensor: &Tensor,
    f: impl FnOnce(&[T]) -> Result<A>,
) -> Result<A> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => f(&elements::<T>(storage, layout)?),
        _ => Err(not_on_cpu()),
    }
}
