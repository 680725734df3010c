//! Merging: every golden file gives the merged weight of its tool, on disk and through a
//! `VarBuilder`; the rest of a checkpoint stays as it is.

#[path = "../support/mod.rs"]
mod support;

mod checkpoint;
mod golden;
mod places;
mod strength;

use candle_core::{DType, Result, Tensor};
use candle_doft::file::LoadOptions;
use candle_doft::merge::{Merge, Strength};
use candle_doft::{Adapter, DoftConfig};
use candle_nn::Linear;
use std::collections::HashMap;
use std::path::Path;
use support::tensors::{CPU, disturb_all, seeded};

fn one(file: &Path, options: &LoadOptions, strength: Strength) -> candle_doft::Result<Merge> {
    Merge::new().with_file(file, options, strength)
}

/// A base of two matrices, a kernel, a table and something else, in one dtype.
fn base(dtype: DType) -> Result<HashMap<String, Tensor>> {
    let mut tensors = HashMap::new();
    for (seed, (name, shape)) in [
        ("a.weight", vec![12, 32]),
        ("b.weight", vec![8, 16]),
        ("conv.weight", vec![6, 4, 3, 3]),
        ("table.weight", vec![10, 16]),
        ("norm.weight", vec![12]),
    ]
    .into_iter()
    .enumerate()
    {
        tensors.insert(
            name.to_string(),
            seeded(shape, seed as u64).to_dtype(dtype)?,
        );
    }
    Ok(tensors)
}

fn adapter(config: DoftConfig, scale: f64) -> candle_doft::Result<Adapter> {
    adapter_with(config, scale, &[])
}

/// The same with extra tensors, which stay as they are.
fn adapter_with(
    config: DoftConfig,
    scale: f64,
    extras: &[(&str, &Tensor)],
) -> candle_doft::Result<Adapter> {
    let builder = Adapter::builder(config.with_block_size(8), &CPU)?;
    for name in ["a", "b"] {
        let weight = base(DType::F32)?[&format!("{name}.weight")].clone();
        builder.wrap(name, Linear::new(weight, None))?;
    }
    for (name, value) in extras {
        builder.extra(name, value)?;
    }
    let adapter = builder.finish()?;
    let of_layers = [adapter.rotation_vars(), adapter.magnitude_vars()].concat();
    disturb_all(of_layers, scale)?;
    Ok(adapter)
}
