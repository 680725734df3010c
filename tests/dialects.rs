//! Files of OneTrainer and PEFT give the weights that those tools compute.

mod support;

use candle_core::{DType, Result, Tensor, safetensors};
use candle_doft::file::{Divisor, LoadOptions};
use candle_doft::{Adapter, AdapterBuilder, DoftLinear};
use candle_nn::Linear;
use std::collections::HashMap;
use std::path::Path;
use support::golden::{golden, load};
use support::tensors::{CPU, relative};
use support::tolerance::GOLDEN_WEIGHTS;

/// The linear layers of a base, by path.
fn linears(base: &Path) -> Result<Vec<(String, Linear)>> {
    let tensors = load(base)?;
    let weights = tensors
        .iter()
        .filter(|(name, t)| name.ends_with(".weight") && t.rank() == 2);
    let layers = weights.map(|(name, weight)| {
        let path = name.trim_end_matches(".weight").to_string();
        let bias = tensors.get(&format!("{path}.bias")).cloned();
        (path, Linear::new(weight.clone(), bias))
    });
    Ok(layers.collect())
}

type Built = (Vec<(String, DoftLinear)>, Adapter);

fn wrapped(builder: AdapterBuilder, base: &Path) -> candle_doft::Result<Built> {
    let mut layers = Vec::new();
    for (path, layer) in linears(base)? {
        layers.push((path.clone(), builder.wrap(&path, layer)?));
    }
    Ok((layers, builder.finish()?))
}

fn assert_weight(what: &str, found: &Tensor, expected: &Tensor) {
    let off = relative(found, expected);
    assert!(
        off <= GOLDEN_WEIGHTS,
        "{what}: the weight is off by {off:e}"
    );
}

const ONETRAINER: [&str; 17] = [
    "oft_plain",
    "oft_scaled_bool",
    "oft_scaled_int",
    "doft_g1_linear",
    "doft_g1_zero_row",
    "doft_g2_linear",
    "doft_g3_linear",
    "doft_g3_unscaled_linear",
    "share_linear",
    "odd_block_50_32",
    "odd_block_12_5",
    "clip_inactive",
    "clip_active",
    "cans_linear",
    "cans_linear_nobias",
    "cans_large",
    "cans_exp_linear",
];

#[test]
fn onetrainer_s_linear_files_read_to_its_weights_in_both_flavours() -> candle_doft::Result<()> {
    let mut internal = 0;
    for case in ONETRAINER {
        let folder = golden("onetrainer").join(case);
        let expected = &load(&folder.join("io.safetensors"))?["w_eff"];
        for flavour in ["adapter.safetensors", "adapter.internal.safetensors"] {
            let file = folder.join(flavour);
            if !file.exists() {
                continue;
            }
            internal += usize::from(flavour.contains("internal"));
            let builder = Adapter::load(&file, &CPU)?;
            let (layers, adapter) = wrapped(builder, &folder.join("base.safetensors"))?;
            assert_eq!(layers.len(), 1);
            let what = format!("{case}, {flavour}");
            assert_weight(&what, &layers[0].1.effective_weight()?, expected);
            let ambiguous = case == "doft_g1_linear" || case == "doft_g1_zero_row";
            if !ambiguous {
                assert_eq!(adapter.warnings(), [], "{what}");
            }
        }
    }
    assert!(internal > 5);
    Ok(())
}

#[test]
fn blocks_of_size_one_leave_the_magnitude() -> candle_doft::Result<()> {
    let folder = golden("onetrainer/odd_block_7_4");
    let builder = Adapter::load(folder.join("adapter.safetensors"), &CPU)?;
    let (layers, adapter) = wrapped(builder, &folder.join("base.safetensors"))?;
    let expected = &load(&folder.join("io.safetensors"))?["w_eff"];
    assert_weight("odd_block_7_4", &layers[0].1.effective_weight()?, expected);
    assert!(adapter.warnings()[0].to_string().contains("size 1"));
    Ok(())
}

#[test]
fn the_ambiguous_divisor_is_told_from_an_integer_or_given() -> candle_doft::Result<()> {
    let folder = golden("onetrainer/doft_g1_early_linear");
    let base = folder.join("base.safetensors");
    let expected = &load(&folder.join("io.safetensors"))?["w_eff"];
    let builder = Adapter::load(folder.join("adapter.internal.safetensors"), &CPU)?;
    let (layers, _) = wrapped(builder, &base)?;
    assert_weight("integer 1", &layers[0].1.effective_weight()?, expected);
    let file = folder.join("adapter.safetensors");
    let options = LoadOptions::default().with_divisor(Divisor::SqrtEntries);
    let builder = Adapter::load_with(&file, &CPU, &options)?;
    let (layers, _) = wrapped(builder, &base)?;
    assert_weight(
        "the divisor given",
        &layers[0].1.effective_weight()?,
        expected,
    );
    let builder = Adapter::load(&file, &CPU)?;
    let (layers, guessed) = wrapped(builder, &base)?;
    assert!(relative(&layers[0].1.effective_weight()?, expected) > 1e-3);
    assert!(
        guessed
            .warnings()
            .iter()
            .any(|w| w.message.contains("divisor"))
    );
    Ok(())
}

#[test]
fn mangled_names_find_their_layers() -> candle_doft::Result<()> {
    for case in ["mangled_legacy", "mangled_mixture"] {
        let folder = golden("onetrainer").join(case);
        let builder = Adapter::load(folder.join("adapter.safetensors"), &CPU)?;
        let (layers, _) = wrapped(builder, &folder.join("base.safetensors"))?;
        assert_eq!(layers.len(), 2, "{case}");
        let io = load(&folder.join("io.safetensors"))?;
        let expected: Vec<&Tensor> = io
            .iter()
            .filter(|(name, _)| name.ends_with("w_eff"))
            .map(|(_, t)| t)
            .collect();
        for (path, layer) in &layers {
            let weight = layer.effective_weight()?;
            let fits = expected
                .iter()
                .any(|e| e.dims() == weight.dims() && relative(&weight, e) <= GOLDEN_WEIGHTS);
            assert!(fits, "{case}: {path}");
        }
    }
    Ok(())
}

#[test]
fn half_precision_exports_are_their_rounding_away() -> candle_doft::Result<()> {
    let folder = golden("onetrainer/doft_g3_linear");
    let expected = &load(&folder.join("io.safetensors"))?["w_eff"];
    for (flavour, bound) in [
        ("adapter.bf16.safetensors", 2e-3),
        ("adapter.f16.safetensors", 2.5e-4),
    ] {
        let builder = Adapter::load(folder.join(flavour), &CPU)?;
        let (layers, _) = wrapped(builder, &folder.join("base.safetensors"))?;
        let weight = layers[0].1.effective_weight()?;
        assert!(
            weight.dtype() == DType::F32 && relative(&weight, expected) < bound,
            "{flavour}"
        );
    }
    Ok(())
}

#[test]
fn peft_s_linear_folders_read_to_its_weights() -> candle_doft::Result<()> {
    for case in [
        "linear_default",
        "linear_exact",
        "linear_block_share",
        "linear_terms7",
        "linear_bias_oft_only",
        "linear_r",
        "linear_block_adjusted",
        "linear_coft",
    ] {
        let folder = golden("peft").join(case);
        let builder = Adapter::load(&folder, &CPU)?;
        let mut layers = Vec::new();
        let base = load(&folder.join("base.safetensors"))?;
        let expected = load(&folder.join("expected.safetensors"))?;
        for (path, layer) in linears(&folder.join("base.safetensors"))? {
            let bias = format!("{path}.bias");
            if case == "linear_bias_oft_only" {
                let trained = builder.extra(&bias, &base[&bias])?;
                let off = relative(trained.as_tensor(), &expected[&bias]);
                assert!(off == 0., "{case}: {bias} is off by {off:e}");
            }
            layers.push((path.clone(), builder.wrap(&path, layer)?));
        }
        builder.finish()?;
        for (path, layer) in layers {
            let expected = &expected[&format!("{path}.weight")];
            assert_weight(
                &format!("{case}, {path}"),
                &layer.effective_weight()?,
                expected,
            );
        }
    }
    Ok(())
}

#[test]
fn a_loaded_adapter_of_another_tool_saves_as_one_of_this_crate() -> candle_doft::Result<()> {
    let home = tempfile::tempdir().unwrap();
    for (tool, case) in [("onetrainer", "doft_g1_linear"), ("peft", "linear_exact")] {
        let folder = golden(tool).join(case);
        let file = if tool == "peft" {
            folder.clone()
        } else {
            folder.join("adapter.safetensors")
        };
        let builder = Adapter::load(file, &CPU)?;
        let (layers, adapter) = wrapped(builder, &folder.join("base.safetensors"))?;
        let again = home.path().join("again.safetensors");
        adapter.save(&again)?;
        let builder = Adapter::load(&again, &CPU)?;
        let (reloaded, adapter) = wrapped(builder, &folder.join("base.safetensors"))?;
        for ((path, before), (_, after)) in layers.iter().zip(&reloaded) {
            let off = relative(&after.effective_weight()?, &before.effective_weight()?);
            assert!(off < 1e-7, "{case}, {path}: {off:e}");
        }
        assert_eq!(adapter.warnings(), [], "{case}");
    }
    Ok(())
}

#[test]
fn what_cannot_be_expressed_is_refused_with_the_reason() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("other.safetensors");
    let one = Tensor::ones((2, 2), DType::F32, &CPU).unwrap();
    for (key, reason) in [
        (
            "lora_unet_x.oft_blocks",
            "rotates the output side of a weight",
        ),
        ("a.lora_A.weight", "is LoRA or DoRA, not an OFT adapter"),
        ("a.boft_R", "is BOFT"),
        ("a.hada_t2", "is LoHa"),
        ("a.lokr_w1_b", "is LoKr"),
        ("a.oft_r", "`oft_r` without `oft_s`"),
        ("a.dora_log_multiplier_row", "fourth generation"),
        ("lora_unet_a_dora_log_multiplier_col", "fourth generation"),
        ("a.oft_R.capped_oft", "fourth generation"),
        (
            "a.weight",
            "it holds no adapter tensors; its first keys are `a.weight`",
        ),
    ] {
        let tensors = std::collections::HashMap::from([(key, one.clone())]);
        safetensors::save(&tensors, &file).unwrap();
        let error = Adapter::load(&file, &CPU).expect_err(key).to_string();
        assert!(error.contains(reason), "{key}: {error}");
    }
    let empty = tempfile::tempdir().unwrap();
    let error = Adapter::load(empty.path(), &CPU).unwrap_err().to_string();
    assert!(
        error.ends_with("a folder without `adapter.safetensors` or `adapter_model.safetensors`"),
        "{error}"
    );
    std::fs::write(empty.path().join("adapter_model.bin"), b"").unwrap();
    let error = Adapter::load(empty.path(), &CPU).unwrap_err().to_string();
    assert!(error.contains("pickles are not read"), "{error}");
    std::fs::write(
        empty.path().join("adapter_config.json"),
        r#"{"peft_type": "LORA"}"#,
    )
    .unwrap();
    std::fs::write(empty.path().join("adapter_model.safetensors"), b"").unwrap();
    let error = Adapter::load(empty.path(), &CPU).unwrap_err().to_string();
    assert!(error.contains("not a whole safetensors file"), "{error}");
}

#[test]
fn one_component_can_be_read_and_modules_renamed() -> candle_doft::Result<()> {
    let folder = golden("onetrainer/doft_g3_linear");
    let file = folder.join("adapter.safetensors");
    let (path, base) = linears(&folder.join("base.safetensors"))?.remove(0);
    let options = LoadOptions::default().with_rename(|_| Some("my.own.name".into()));
    let builder = Adapter::load_with(&file, &CPU, &options)?;
    assert!(builder.wrap("my.own.name", base.clone())?.is_adapted());
    builder.finish()?;
    let options = LoadOptions::default().with_component("denoiser");
    let builder = Adapter::load_with(&file, &CPU, &options)?;
    assert!(builder.wrap(&path, base.clone())?.is_adapted());
    builder.finish()?;
    let options = LoadOptions::default().with_component("text_encoder");
    let error = Adapter::load_with(&file, &CPU, &options).unwrap_err();
    let expected = "no layer is of component `text_encoder`, some are of `denoiser`";
    assert!(error.to_string().ends_with(expected), "{error}");
    let options = LoadOptions::default().with_allow_partial(true);
    let builder = Adapter::load_with(&file, &CPU, &options)?;
    assert!(!builder.wrap("another", base)?.is_adapted());
    assert!(builder.finish().is_err(), "nothing matched at all");
    let folder = golden("onetrainer/mangled_mixture");
    let file = folder.join("adapter.safetensors");
    let same = LoadOptions::default().with_rename(|_| Some("one.for.all".into()));
    let error = Adapter::load_with(&file, &CPU, &same).unwrap_err();
    assert!(
        error.to_string().contains("both mean `one.for.all`"),
        "{error}"
    );
    let builder = Adapter::load_with(&file, &CPU, &options)?;
    let (path, base) = linears(&folder.join("base.safetensors"))?.remove(0);
    builder.wrap(&path, base)?;
    let warnings = builder.finish()?.warnings();
    assert_eq!(warnings.len(), 1);
    assert_eq!(warnings[0].message, "it matches no layer");
    Ok(())
}

#[test]
fn keys_of_no_known_role_are_refused_or_skipped_by_choice() -> candle_doft::Result<()> {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("adapter.safetensors");
    let folder = golden("onetrainer/doft_g3_linear");
    let mut tensors = load(&folder.join("adapter.safetensors"))?;
    tensors.insert("stranger".into(), Tensor::zeros(1, DType::F32, &CPU)?);
    let tensors: HashMap<String, Tensor> = tensors.into_iter().collect();
    safetensors::save(&tensors, &file)?;
    let error = Adapter::load(&file, &CPU).unwrap_err().to_string();
    assert!(
        error.contains("1 unexpected keys, the first are `stranger`"),
        "{error}"
    );
    let options = LoadOptions::default().with_allow_unknown(true);
    let builder = Adapter::load_with(&file, &CPU, &options)?;
    let warnings: Vec<String> = builder.warnings().iter().map(ToString::to_string).collect();
    assert_eq!(warnings, ["`stranger`: this unknown key was skipped"]);
    let (path, base) = linears(&folder.join("base.safetensors"))?.remove(0);
    assert!(builder.wrap(&path, base)?.is_adapted());
    builder.finish()?;
    Ok(())
}
