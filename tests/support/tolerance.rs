//! Every tolerance in one table, with its reason.

use candle_core::DType;

/// Values of golden files in f32, relative to the largest: what their makers state for reading them.
pub const GOLDEN_VALUES: f64 = 1e-6;

/// Gradients of golden files in f32, relative to the largest; stated likewise.
pub const GOLDEN_GRADIENTS: f64 = 5e-6;

/// Losses of golden trajectories, relative, and their parameters, absolute: the run in f32 and the same
/// run in f64 are 4e-7 apart.
pub const TRAJECTORY: f64 = 3e-6;

/// Merged weights of golden files in f32, relative to the largest: one more rounding than values.
pub const GOLDEN_WEIGHTS: f64 = 2e-6;

/// Gradients in f64 against central differences of step 1e-5, relative to each entry.
pub const SLOPE: f64 = 5e-8;

/// The same for entries near zero, relative to the largest: what the differences lose.
pub const SLOPE_FLOOR: f64 = 5e-9;

/// How far a merged layer may be from the unmerged one, relative to the largest output.
///
/// f32 and f64 add up some hundred products in another order; half types round the weight to 11 and
/// 8 bits, and the rotated input once more on the unmerged side.
pub fn merged(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 2e-14,
        DType::F32 => 5e-6,
        DType::F16 => 2e-3,
        _ => 1.5e-2,
    }
}

/// A quantized layer against the dense one it expands to, relative to the largest: the same f32
/// products, added in another order.
pub const QUANTIZED: f64 = 5e-6;
