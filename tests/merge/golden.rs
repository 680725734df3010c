//! Files of OneTrainer and PEFT against the weights that those tools merge.

use super::one;
use super::support::golden::{cases, golden, load};
use super::support::tensors::{CPU, bits, relative};
use super::support::tolerance::GOLDEN_WEIGHTS;
use candle_core::{DType, Tensor};
use candle_doft::file::{Divisor, LoadOptions};
use candle_doft::merge::{CheckpointOptions, Merge, Strength};
use candle_nn::VarBuilder;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// The weights of a merged base, from disk, after they were found equal through a `VarBuilder`.
fn merged(merge: &Merge, base: &Path) -> candle_doft::Result<BTreeMap<String, Tensor>> {
    let home = tempfile::tempdir().unwrap();
    let output = home.path().join("merged.safetensors");
    merge.checkpoint(base, &output, CheckpointOptions::default())?;
    let found = load(&output)?;
    let tensors: HashMap<String, Tensor> = load(base)?.into_iter().collect();
    let vb = VarBuilder::from_tensors(tensors, DType::F32, &CPU);
    merge.build(vb, |vb| {
        for (name, tensor) in &found {
            let through = vb.get(tensor.shape(), name)?;
            assert_eq!(bits(&through), bits(tensor), "{name}");
        }
        candle_doft::Result::<()>::Ok(())
    })?;
    Ok(found)
}

#[test]
fn every_onetrainer_file_merges_to_its_weights() -> candle_doft::Result<()> {
    let mut seen = 0;
    for folder in cases("onetrainer") {
        let case = folder.file_name().unwrap().to_str().unwrap().to_string();
        let base = folder.join("base.safetensors");
        let io = load(&folder.join("io.safetensors"))?;
        for flavour in ["adapter.safetensors", "adapter.internal.safetensors"] {
            let file = folder.join(flavour);
            if !file.exists() {
                continue;
            }
            let options = match (case.as_str(), flavour) {
                ("doft_g1_early_linear", "adapter.safetensors") => {
                    LoadOptions::default().with_divisor(Divisor::SqrtEntries)
                }
                // Native names, which nobody but the caller can translate.
                ("mangled_legacy", "adapter.internal.safetensors") => LoadOptions::default()
                    .with_rename(|module| {
                        let attention = "transformer.transformer_blocks.0.attn.";
                        let native =
                            module.strip_prefix("transformer.double_blocks.0.img_attn.")?;
                        let ours = if native == "proj" { "to_out.0" } else { "to_q" };
                        Some(format!("{attention}{ours}"))
                    }),
                _ => LoadOptions::default(),
            };
            let found = merged(&one(&file, &options, Strength::default())?, &base)?;
            let weights: Vec<&Tensor> = io
                .iter()
                .filter(|(name, _)| name.ends_with("w_eff") && !name.starts_with("as_loaded"))
                .map(|(_, tensor)| tensor)
                .collect();
            for expected in weights {
                let fits = found.values().any(|w| {
                    w.elem_count() == expected.elem_count()
                        && relative(&w.flatten_all().unwrap(), &expected.flatten_all().unwrap())
                            <= GOLDEN_WEIGHTS
                });
                assert!(fits, "{case}, {flavour}");
                seen += 1;
            }
        }
    }
    assert!(seen >= 50, "only {seen} weights");
    Ok(())
}

#[test]
fn every_peft_folder_merges_to_its_weights() -> candle_doft::Result<()> {
    for folder in cases("peft") {
        let case = folder.file_name().unwrap().to_str().unwrap().to_string();
        let expected = load(&folder.join("expected.safetensors"))?;
        let merge = one(&folder, &LoadOptions::default(), Strength::default())?;
        let found = merged(&merge, &folder.join("base.safetensors"))?;
        assert!(!found.is_empty());
        for (name, weight) in found {
            let off = relative(&weight, &expected[&name]);
            assert!(off <= GOLDEN_WEIGHTS, "{case}: {name} is off by {off:e}");
        }
    }
    Ok(())
}

#[test]
fn what_a_file_and_its_weight_disagree_on_is_told() -> candle_doft::Result<()> {
    let folder = golden("onetrainer").join("doft_g1_linear");
    let file = folder.join("adapter.safetensors");
    let merge = one(&file, &LoadOptions::default(), Strength::default())?;
    let tensors = load(&folder.join("base.safetensors"))?;
    let (name, weight) = tensors
        .iter()
        .find(|(name, _)| name.ends_with(".weight"))
        .unwrap();
    let path = name.trim_end_matches(".weight");
    let told = |merge: &Merge| {
        merge
            .warnings()
            .iter()
            .any(|w| w.message.contains("initial_norm"))
    };
    merge.weight(path, weight, false)?;
    assert!(!told(&merge));
    merge.weight(path, &(weight * 1.5)?, false)?;
    assert!(told(&merge));
    // Its magnitude has the axes of a matrix.
    let kernel = weight.reshape((12, 48, 1, 1))?;
    let error = merge.weight(path, &kernel, false).unwrap_err().to_string();
    assert!(
        error.contains("is a Conv2d layer, trained was a Linear layer"),
        "{error}"
    );
    let peft = golden("peft").join("conv3x3");
    let merge = one(&peft, &LoadOptions::default(), Strength::default())?;
    merged(&merge, &peft.join("base.safetensors"))?;
    assert!(
        merge
            .warnings()
            .iter()
            .any(|w| w.message.starts_with("PEFT's own forward"))
    );
    Ok(())
}
