//! [`Real`]: the two dtypes that kernels compute in, and the way of the half types in and out.

use super::packs::Packs;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Device, Error, Layout, Result, Storage, Tensor, WithDType};
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;
use std::borrow::Cow;

/// Elements that one task converts.
const PIECE: usize = 1 << 14;

/// f32 or f64.
pub(crate) trait Real: WithDType + Packs + Send + Sync {
    /// Sums of squares between these two have lost nothing to the ends of the range.
    const SQUARES: (f64, f64);

    /// Two to this power and to its negative are in the range, to full precision.
    const EXPONENT: i32;

    /// The slice itself where f32 is meant.
    fn of_f32(values: &[f32]) -> Option<&[Self]>;

    /// The slice itself where f32 is meant.
    fn as_f32(values: &[Self]) -> Option<&[f32]>;

    /// `e^self`; of minus infinity 0, of NaN NaN.
    fn exp(self) -> Self;

    /// `self * a + b`, rounded once. A call of the C library where the processor cannot.
    fn fused(self, a: Self, b: Self) -> Self;
}

impl Real for f32 {
    const SQUARES: (f64, f64) = ((f32::MIN_POSITIVE / f32::EPSILON) as f64, f32::MAX as f64);
    const EXPONENT: i32 = f32::MAX_EXP - 2;

    fn of_f32(values: &[f32]) -> Option<&[Self]> {
        Some(values)
    }

    fn as_f32(values: &[Self]) -> Option<&[f32]> {
        Some(values)
    }

    // The standard library's is a call for each element; this one is straight code, which the
    // compiler turns into wide instructions. Within 2 ulp of the true value.
    #[inline(always)]
    fn exp(self) -> Self {
        // Adding and taking away 1.5 * 2^23 rounds to a whole number.
        const ROUND: f32 = 12_582_912.;
        let x = if self > 89. { 89. } else { self };
        let x = if x < -87.3 { -87.3 } else { x };
        let n = (x * std::f32::consts::LOG2_E + ROUND) - ROUND;
        // ln 2 in two parts, the first with few bits, so that the products are exact.
        let r = x - n * 0.693_359_4 - n * -2.121_944_4e-4;
        // Taylor's series of exp(r), |r| <= ln 2 / 2, to 7 terms: what is left is below 6e-8.
        let p = 1. / 5040.;
        let p = p * r + 1. / 720.;
        let p = p * r + 1. / 120.;
        let p = p * r + 1. / 24.;
        let p = p * r + 1. / 6.;
        let p = p * r + 0.5;
        let p = p * r + 1.;
        let p = p * r + 1.;
        // 2^n in two factors: 2^128 is no f32, though p * 2^128 may be one.
        let (n, half) = (n as i32, n as i32 >> 1);
        let power = |n: i32| f32::from_bits(((n + 127) << 23) as u32);
        let y = p * power(half) * power(n - half);
        let y = if self > 88.8 { f32::INFINITY } else { y };
        if self < -87.3 { 0. } else { y }
    }

    #[inline(always)]
    fn fused(self, a: Self, b: Self) -> Self {
        self.mul_add(a, b)
    }
}

impl Real for f64 {
    const SQUARES: (f64, f64) = (f64::MIN_POSITIVE / f64::EPSILON, f64::MAX);
    const EXPONENT: i32 = f64::MAX_EXP - 2;

    fn of_f32(_: &[f32]) -> Option<&[Self]> {
        None
    }

    fn as_f32(_: &[Self]) -> Option<&[f32]> {
        None
    }

    fn exp(self) -> Self {
        self.exp()
    }

    #[inline(always)]
    fn fused(self, a: Self, b: Self) -> Self {
        self.mul_add(a, b)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_is_within_two_ulp_and_keeps_its_ends() {
        let exp = |x: f32| <f32 as Real>::exp(x);
        for i in -8_700..8_872 {
            let x = i as f32 / 100. + 1e-4;
            let (found, expected) = (f64::from(exp(x)), f64::from(x).exp());
            let off = (found - expected).abs() / expected;
            assert!(off < 2.4e-7, "exp({x}) is {found:e}, off by {off:e}");
        }
        assert_eq!(exp(0.), 1.);
        assert_eq!(exp(f32::NEG_INFINITY), 0.);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
    }
}
