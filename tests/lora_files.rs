//! Files of LoRA and DoRA as other tools write them, and what of them is refused.

mod support;

use candle_core::{DType, Tensor, safetensors};
use candle_doft::Adapter;
use candle_doft::file::LoadOptions;
use candle_doft::merge::{CheckpointOptions, Merge, Strength};
use std::collections::HashMap;
use support::golden::golden;
use support::tensors::{CPU, relative, seeded};

/// Keys of kohya's scripts and OneTrainer.
#[test]
fn files_of_kohya_s_kind_are_read_with_their_alpha() -> candle_doft::Result<()> {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("kohya.safetensors");
    let tensor = |shape: &[usize], seed| {
        (seeded(shape, seed) * 0.3)
            .unwrap()
            .to_dtype(DType::F32)
            .unwrap()
    };
    let base = HashMap::from([
        ("mid.to_q.weight".to_string(), tensor(&[6, 8], 1)),
        ("mid.conv.weight".to_string(), tensor(&[4, 3, 3, 3], 2)),
    ]);
    safetensors::save(&base, home.path().join("base.safetensors"))?;
    let mut adapter = HashMap::from([
        (
            "lora_unet_mid_to_q.lora_down.weight".to_string(),
            tensor(&[2, 8], 3),
        ),
        (
            "lora_unet_mid_to_q.lora_up.weight".to_string(),
            tensor(&[6, 2], 4),
        ),
        (
            "lora_unet_mid_to_q.alpha".to_string(),
            Tensor::new(1f32, &CPU)?,
        ),
        (
            "lora_unet_mid_conv.lora_down.weight".to_string(),
            tensor(&[2, 3, 3, 3], 5),
        ),
        (
            "lora_unet_mid_conv.lora_up.weight".to_string(),
            tensor(&[4, 2, 1, 1], 6),
        ),
    ]);
    let merged = |adapter: &HashMap<String, Tensor>| -> candle_doft::Result<(HashMap<String, Tensor>, Vec<String>)> {
        safetensors::save(adapter, &file)?;
        let merge = Merge::new().with_file(&file, &LoadOptions::default(), Strength::linear(0.5))?;
        let out = home.path().join("out.safetensors");
        merge.checkpoint(home.path().join("base.safetensors"), &out, CheckpointOptions::default())?;
        let warnings = merge.warnings().iter().map(ToString::to_string).collect();
        Ok((safetensors::load(out, &CPU)?, warnings))
    };
    let (found, warnings) = merged(&adapter)?;
    let delta = |name: &str, scale: f64| -> candle_core::Result<Tensor> {
        let up = adapter[&format!("lora_unet_{name}.lora_up.weight")].flatten_from(1)?;
        let down = adapter[&format!("lora_unet_{name}.lora_down.weight")].flatten_from(1)?;
        up.matmul(&down)? * (0.5 * scale)
    };
    let q = (&base["mid.to_q.weight"] + delta("mid_to_q", 0.5)?)?;
    let conv = (&base["mid.conv.weight"] + delta("mid_conv", 1.)?.reshape((4, 3, 3, 3))?)?;
    assert!(relative(&found["mid.to_q.weight"], &q) < 1e-6);
    assert!(relative(&found["mid.conv.weight"], &conv) < 1e-6);
    assert!(
        warnings.len() == 1 && warnings[0].contains("1 layers have no `alpha`"),
        "{warnings:?}"
    );
    for (key, tensor, part) in [
        (
            "lora_unet_mid_to_q.dora_scale",
            tensor(&[6, 1], 7),
            "`dora_scale`, whose norms",
        ),
        (
            "lora_unet_mid_to_q.lora_mid.weight",
            tensor(&[2, 2], 7),
            "lora_mid",
        ),
        (
            "lora_unet_mid_to_q.oft_R.weight",
            tensor(&[2, 6], 7),
            "of LoRA and of OFT together",
        ),
        (
            "lora_unet_mid_k.lora_down.weight",
            tensor(&[2, 8], 7),
            "it has no `lora_up.weight`",
        ),
        (
            "lora_unet_mid_to_q.alpha",
            Tensor::new(f32::NAN, &CPU)?,
            "alpha",
        ),
    ] {
        let kept = adapter.insert(key.to_string(), tensor);
        let error = merged(&adapter).unwrap_err().to_string();
        assert!(error.contains(part), "{key}: {error}");
        match kept {
            Some(kept) => adapter.insert(key.to_string(), kept),
            None => adapter.remove(key),
        };
    }
    Ok(())
}

#[test]
fn what_a_configuration_of_peft_changes_beyond_what_is_read_is_refused_by_name() {
    let home = tempfile::tempdir().unwrap();
    let from = golden("lora/lora");
    let config = std::fs::read_to_string(from.join("adapter_config.json")).unwrap();
    std::fs::copy(
        from.join("adapter_model.safetensors"),
        home.path().join("adapter_model.safetensors"),
    )
    .unwrap();
    for (field, value, part) in [
        (
            "init_lora_weights",
            serde_json::json!("pissa"),
            "changes the base weights",
        ),
        ("use_qalora", serde_json::json!(true), "`use_qalora`"),
        ("lora_bias", serde_json::json!(true), "`lora_bias`"),
        (
            "target_parameters",
            serde_json::json!(["w"]),
            "`target_parameters`",
        ),
        ("some_new_thing", serde_json::json!(3), "`some_new_thing`"),
        (
            "r",
            serde_json::json!(5),
            "its rank is 5 by the configuration, its tensors have 4",
        ),
        (
            "use_dora",
            serde_json::json!(true),
            "`use_dora` is true, and it has no magnitude",
        ),
        ("lora_alpha", serde_json::json!("x"), "`lora_alpha`"),
        (
            "rank_pattern",
            serde_json::json!({"(": 2}),
            "`rank_pattern`",
        ),
        ("peft_type", serde_json::json!("VERA"), "OFT or LORA"),
    ] {
        let mut json: serde_json::Value = serde_json::from_str(&config).unwrap();
        json[field] = value;
        std::fs::write(home.path().join("adapter_config.json"), json.to_string()).unwrap();
        let error = Adapter::load(home.path(), &CPU).unwrap_err().to_string();
        assert!(error.contains(part), "{field}: {error}");
    }
}
