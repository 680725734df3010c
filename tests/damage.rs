//! Damaged checkpoints, PEFT folders and bases: an error each, no panic, nothing left behind, the old file intact.

mod support;

use candle_core::{DType, Tensor, safetensors};
use candle_doft::file::LoadOptions;
use candle_doft::merge::{CheckpointOptions, Merge, Strength};
use candle_doft::rng::SplitMix64;
use candle_doft::train::{AdamW, Checkpoint};
use candle_doft::{Adapter, DoftConfig};
use candle_nn::{Linear, ParamsAdamW};
use serde_json::json;
use std::collections::HashMap;
use std::path::Path;
use support::golden::golden;
use support::tensors::{CPU, bits, disturb_all, seeded};

/// Changes bytes as damage and bad tools do; most of them where a file says what it is.
fn mutated(good: &[u8], rng: &mut SplitMix64) -> Vec<u8> {
    let mut bytes = good.to_vec();
    let head = 3000.min(bytes.len());
    for _ in 0..1 + rng.below(3) {
        let reach = if rng.below(4) == 0 { bytes.len() } else { head };
        let at = rng.below(reach.min(bytes.len()).max(1));
        if at >= bytes.len() {
            break;
        }
        match rng.below(6) {
            0 => bytes[at] ^= 1 << rng.below(8),
            1 => bytes[at] = rng.below(256) as u8,
            2 => bytes.truncate(at),
            3 => drop(bytes.splice(at..at, [b'9'; 4])),
            4 => drop(bytes.splice(at..(at + 1 + rng.below(8)).min(bytes.len()), [])),
            _ => {
                let end = (at + 8).min(bytes.len());
                let value = [0, u64::MAX, 1 << 63, 1 << 31][rng.below(4)];
                bytes[at..end].copy_from_slice(&value.to_le_bytes()[..end - at]);
            }
        }
    }
    bytes
}

/// How many damaged versions of a file `read` refuses, each in one line.
fn refused(file: &Path, count: usize, mut read: impl FnMut() -> candle_doft::Result<()>) -> usize {
    let good = std::fs::read(file).unwrap();
    read().unwrap();
    let mut rng = SplitMix64::new(11);
    let mut refused = 0;
    for _ in 0..count {
        std::fs::write(file, mutated(&good, &mut rng)).unwrap();
        if let Err(error) = read() {
            assert!(!error.to_string().contains('\n'), "{error}");
            refused += 1;
        }
    }
    std::fs::write(file, good).unwrap();
    refused
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_damaged_checkpoint_changes_no_variable() -> candle_doft::Result<()> {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("checkpoint.safetensors");
    let builder = Adapter::builder(DoftConfig::default().with_block_size(8), &CPU)?;
    let weight = seeded((6, 32), 1).to_dtype(DType::F32)?;
    builder.wrap("layer", Linear::new(weight, None))?;
    let adapter = builder.finish()?;
    disturb_all(adapter.vars(), 0.2)?;
    let mut optimizer = AdamW::for_adapter(&adapter, ParamsAdamW::default())?;
    Checkpoint::save(&file, &optimizer, &json!({"lr": 0.1}), &json!({"epoch": 1}))?;
    let before: Vec<_> = adapter.vars().iter().map(|var| bits(var)).collect();
    let found = refused(&file, 2500, || {
        let changed = Checkpoint::load(&file).and_then(|loaded| loaded.restore(&mut optimizer));
        let after: Vec<_> = adapter.vars().iter().map(|var| bits(var)).collect();
        if changed.is_err() {
            assert!(after == before);
        } else {
            for (var, bits) in adapter.vars().iter().zip(&before) {
                let values: Vec<f32> = bits.iter().map(|b| f32::from_bits(*b as u32)).collect();
                var.set(&Tensor::from_vec(values, var.shape(), &CPU)?)?;
            }
        }
        changed
    });
    assert!(found > 1200, "only {found} of 2500 were noticed");
    assert_eq!(names(home.path()), ["checkpoint.safetensors"]);
    Ok(())
}

#[test]
fn a_damaged_peft_folder_is_an_error() -> candle_doft::Result<()> {
    for case in ["linear_default", "embedding"] {
        let from = golden("peft").join(case);
        let home = tempfile::tempdir().unwrap();
        for name in ["adapter_config.json", "adapter_model.safetensors"] {
            std::fs::copy(from.join(name), home.path().join(name)).unwrap();
        }
        for (name, least) in [
            ("adapter_config.json", 500),
            ("adapter_model.safetensors", 700),
        ] {
            let found = refused(&home.path().join(name), 1500, || {
                Adapter::load(home.path(), &CPU).map(drop)
            });
            assert!(found > least, "{name}: only {found} of 1500 were noticed");
        }
        assert_eq!(names(home.path()).len(), 2);
    }
    Ok(())
}

#[test]
fn a_damaged_base_leaves_the_merged_model_of_before() -> candle_doft::Result<()> {
    let home = tempfile::tempdir().unwrap();
    let (from, to) = (home.path().join("model"), home.path().join("merged"));
    std::fs::create_dir(&from).unwrap();
    let builder = Adapter::builder(DoftConfig::default().with_block_size(8), &CPU)?;
    let mut tensors = HashMap::new();
    for (seed, name) in ["a", "b"].into_iter().enumerate() {
        let weight = seeded((6, 32), seed as u64).to_dtype(DType::F32)?;
        builder.wrap(name, Linear::new(weight.clone(), None))?;
        tensors.insert(format!("{name}.weight"), weight);
    }
    let adapter = builder.finish()?;
    disturb_all(adapter.vars(), 0.2)?;
    adapter.save(home.path().join("adapter.safetensors"))?;
    let shard = from.join("model-00001-of-00001.safetensors");
    safetensors::save(&tensors, &shard)?;
    let index = from.join("model.safetensors.index.json");
    let map: HashMap<_, _> = tensors
        .keys()
        .map(|name| (name, "model-00001-of-00001.safetensors"))
        .collect();
    std::fs::write(
        &index,
        json!({"metadata": {"total_size": 1536}, "weight_map": map}).to_string(),
    )
    .unwrap();
    let options = LoadOptions::default();
    let mut merged = || {
        let merge = Merge::new().with_file(
            home.path().join("adapter.safetensors"),
            &options,
            Strength::default(),
        )?;
        let before = std::fs::read(to.join("model-00001-of-00001.safetensors")).ok();
        let merged = merge
            .checkpoint(&from, &to, CheckpointOptions::default())
            .map(drop);
        if merged.is_err() {
            let after = std::fs::read(to.join("model-00001-of-00001.safetensors")).ok();
            assert!(before == after);
            assert!(names(&to).iter().all(|name| name.starts_with("model")));
        }
        merged
    };
    let found = refused(&shard, 2000, &mut merged);
    assert!(found > 1000, "only {found} of 2000 were noticed");
    Ok(())
}
