//! Folders written here, as the real PEFT reads them.
//!
//! `tests/golden/written` holds what PEFT 0.21.2 makes of them, by `tests/peft/merge.py`. Where Python
//! with PEFT is at hand (`CANDLE_DOFT_PYTHON`, else `python3`), it is asked again; set
//! `CANDLE_DOFT_WRITE_GOLDEN` to keep its answers.

mod support;

use candle_core::{DType, Result, Tensor, safetensors};
use candle_doft::file::{LoadOptions, Target, convert};
use candle_doft::merge::{CheckpointOptions, Merge, Strength, weight_shapes};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use support::programs::python;
use support::tensors::{CPU, relative, seeded};
use support::tolerance::GOLDEN_WEIGHTS;

fn here(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests")
        .join(path)
}

/// A base of matrices and a kernel, and an adapter of it in OneTrainer's keys.
fn pair(home: &Path, exact: bool) -> Result<(PathBuf, PathBuf)> {
    let (mut base, mut adapter) = (HashMap::new(), HashMap::new());
    for (seed, (name, shape)) in [
        ("blocks.0.q", vec![12, 32]),
        ("blocks.0.v", vec![8, 16]),
        ("conv", vec![6, 8, 3, 3]),
    ]
    .into_iter()
    .enumerate()
    {
        let width: usize = shape[1..].iter().product();
        let seed = seed as u64;
        base.insert(
            format!("{name}.weight"),
            seeded(shape, seed).to_dtype(DType::F32)?,
        );
        let theta = (seeded((width / 8, 28), 10 + seed) * 0.4)?.to_dtype(DType::F32)?;
        adapter.insert(format!("{name}.oft_R.weight"), theta);
        adapter.insert(format!("{name}.oft_R.scaled_oft"), Tensor::new(1f32, &CPU)?);
        if exact {
            adapter.insert(format!("{name}.oft_R.cans_oft"), Tensor::new(1f32, &CPU)?);
        }
    }
    let (base_file, file) = (
        home.join("base.safetensors"),
        home.join("adapter.safetensors"),
    );
    safetensors::save(&base, &base_file)?;
    safetensors::save(&adapter, &file)?;
    Ok((base_file, file))
}

fn check(case: &str, base: &Path, adapter: &Path) -> candle_doft::Result<()> {
    let home = tempfile::tempdir().unwrap();
    let (folder, merged) = (
        home.path().join("peft"),
        home.path().join("merged.safetensors"),
    );
    let options = LoadOptions::default();
    let target = Target::Peft {
        drop_magnitude: false,
    };
    convert(adapter, &folder, target, &options, &weight_shapes(base)?)?;
    let merge = Merge::new().with_file(adapter, &options, Strength::default())?;
    merge.checkpoint(base, &merged, CheckpointOptions::default())?;
    let ours = safetensors::load(&merged, &CPU)?;
    let same = |what: &str, theirs: &HashMap<String, Tensor>| {
        assert!(!theirs.is_empty());
        for (name, weight) in theirs {
            let off = relative(&ours[name], weight);
            assert!(
                off < GOLDEN_WEIGHTS,
                "{case}, {what}: {name} is off by {off:e}"
            );
        }
    };
    let golden = here("golden/written").join(format!("{case}.safetensors"));
    match python("torch, peft") {
        None => println!("SKIPPED: {case} was not read by PEFT itself, for there is none"),
        Some(mut python) => {
            let output = home.path().join("theirs.safetensors");
            let run = python
                .arg(here("peft/merge.py"))
                .args([base, &folder, &output])
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&run.stderr);
            assert!(run.status.success(), "{case}: {said}");
            same("live", &safetensors::load(&output, &CPU)?);
            if std::env::var_os("CANDLE_DOFT_WRITE_GOLDEN").is_some() {
                std::fs::copy(&output, &golden).unwrap();
            }
        }
    }
    // Kept answers hold for what is written today: it is the same adapter.
    same("kept", &safetensors::load(&golden, &CPU)?);
    Ok(())
}

#[test]
fn series_of_matrices_and_kernels() -> candle_doft::Result<()> {
    let home = tempfile::tempdir().unwrap();
    let (base, adapter) = pair(home.path(), false)?;
    check("series", &base, &adapter)
}

#[test]
fn exact_rotations_of_matrices_and_kernels() -> candle_doft::Result<()> {
    let home = tempfile::tempdir().unwrap();
    let (base, adapter) = pair(home.path(), true)?;
    check("exact", &base, &adapter)
}

#[test]
fn an_embedding() -> candle_doft::Result<()> {
    let home = tempfile::tempdir().unwrap();
    let folder = here("golden/peft/embedding");
    let base = folder.join("base.safetensors");
    let doft = home.path().join("doft.safetensors");
    let shapes = weight_shapes(&base)?;
    convert(
        &folder,
        &doft,
        Target::Doft,
        &LoadOptions::default(),
        &shapes,
    )?;
    check("embedding", &base, &doft)
}
