//! The maps from packed parameters to rotations: values, gradients and invariants.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot go on fails"
)]

#[path = "../support/mod.rs"]
mod support;

mod errors;
mod invariants;
mod measures;
mod twins;

use candle_core::Tensor;
use candle_doft::Result;
use support::tensors::CPU;

type RotationMap = fn(&Tensor) -> Result<Tensor>;

fn tensor(values: &[f64], shape: impl Into<candle_core::Shape>) -> Tensor {
    Tensor::from_slice(values, shape, &CPU).unwrap()
}

fn entries(b: usize) -> usize {
    b * (b - 1) / 2
}
