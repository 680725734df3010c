//! [`Real`]: the two dtypes that have kernels of their own, f32 and f64.

use candle_core::{CpuStorage, DType, Device, Layout, Result, Tensor, WithDType};

/// f32 or f64.
pub(crate) trait Real: WithDType + Send + Sync {}

impl Real for f32 {}
impl Real for f64 {}

/// Whether the kernels take `x`: f32 or f64 on CPU.
pub(crate) fn has_kernel(x: &Tensor) -> bool {
    matches!(x.dtype(), DType::F32 | DType::F64) && matches!(x.device(), Device::Cpu)
}

/// Runs `f` on the elements of a CPU tensor, which start at its offset and follow `layout.stride()`.
pub(crate) fn with_slice<T: Real, A>(
    tensor: &Tensor,
    f: impl FnOnce(&[T], &Layout) -> Result<A>,
) -> Result<A> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        candle_core::Storage::Cpu(storage) => f(slice(storage, layout)?, layout),
        _ => Err(candle_core::Error::Msg("expected a tensor on CPU".into())),
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
