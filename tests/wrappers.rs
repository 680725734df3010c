//! Keys of PEFT as programs around it write them: wrapped models, adapters by name, modules that were trained whole; and
//! paths of layers that look like keys of other tools.

mod support;

use candle_core::{DType, Tensor, safetensors};
use candle_doft::file::{LoadOptions, components};
use candle_doft::merge::{CheckpointOptions, Merge, Strength};
use candle_doft::{Adapter, DoftConfig};
use candle_nn::Linear;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::Path;
use support::tensors::{CPU, bits, disturb_all, seeded};

const Q: &str = "encoder.layer.0.query";

/// A PEFT folder of a rotation of `Q` and other tensors.
fn folder(home: &Path, rotation: &str, others: &[(&str, &[usize])], config: Value) {
    let mut tensors = HashMap::from([(
        rotation.to_string(),
        (seeded((2, 28), 1) * 0.1)
            .unwrap()
            .to_dtype(DType::F32)
            .unwrap(),
    )]);
    for (seed, (name, shape)) in others.iter().enumerate() {
        let tensor = seeded(*shape, 50 + seed as u64)
            .to_dtype(DType::F32)
            .unwrap();
        tensors.insert(name.to_string(), tensor);
    }
    safetensors::save(&tensors, home.join("adapter_model.safetensors")).unwrap();
    let mut all = json!({"peft_type": "OFT", "oft_block_size": 8, "peft_version": "0.19.0"});
    for (key, value) in config.as_object().unwrap() {
        all[key] = value.clone();
    }
    std::fs::write(home.join("adapter_config.json"), all.to_string()).unwrap();
}

fn base(home: &Path) -> std::path::PathBuf {
    let file = home.join("base.safetensors");
    let shapes: [(&str, &[usize]); 7] = [
        ("encoder.layer.0.query.weight", &[4, 16]),
        ("pre_classifier.weight", &[4, 4]),
        ("classifier.dense.weight", &[4, 4]),
        ("classifier.dense.bias", &[4]),
        ("classifier.out_proj.weight", &[2, 4]),
        ("qa_outputs.weight", &[2, 4]),
        ("embed.weight", &[5, 4]),
    ];
    let tensors = shapes.map(|(name, shape)| {
        let seed = name.len() as u64;
        (
            name.to_string(),
            seeded(shape, seed).to_dtype(DType::F32).unwrap(),
        )
    });
    safetensors::save(&HashMap::from(tensors), &file).unwrap();
    file
}

fn merged(
    home: &Path,
    options: &LoadOptions,
) -> candle_doft::Result<(HashMap<String, Tensor>, Vec<String>)> {
    let merge = Merge::new().with_file(home, options, Strength::default())?;
    let out = home.join("merged.safetensors");
    merge.checkpoint(base(home), &out, CheckpointOptions::default())?;
    let warnings = merge.warnings().iter().map(ToString::to_string).collect();
    Ok((safetensors::load(out, &CPU)?, warnings))
}

#[test]
fn what_wraps_a_model_does_not_show_in_its_paths() -> candle_doft::Result<()> {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    let mut expected = None;
    for key in [
        "base_model.model.encoder.layer.0.query.oft_R.weight",
        "base_model.model.encoder.layer.0.query.oft_R.default.weight",
        "base_model.model.encoder.layer.0.query.oft_R.fr.weight",
        "_orig_mod.base_model.model.encoder.layer.0.query.oft_R.weight",
        "base_model.model._orig_mod.encoder.layer.0.query.oft_R.weight",
        "module.base_model.model.encoder.layer.0.query.oft_R.weight",
        "module._orig_mod.base_model.model.encoder.layer.0.query.oft_R.weight",
        "_fsdp_wrapped_module.base_model.model.encoder.layer.0._fsdp_wrapped_module.query.oft_R.weight",
        "base_model.model.encoder.layer.0._checkpoint_wrapped_module.query.oft_R.weight",
    ] {
        folder(home, key, &[], json!({}));
        let (tensors, warnings) = merged(home, &LoadOptions::default())?;
        assert!(warnings.is_empty(), "{key}: {warnings:?}");
        let found = bits(&tensors["encoder.layer.0.query.weight"]);
        assert_eq!(
            &found,
            expected.get_or_insert_with(|| found.clone()),
            "{key}"
        );
        // The same file without its folder.
        let builder = Adapter::load(home.join("adapter_model.safetensors"), &CPU)?;
        let weight = Tensor::ones((4, 16), DType::F32, &CPU)?;
        assert!(builder.wrap(Q, Linear::new(weight, None))?.is_adapted());
    }
    let two = "base_model.model.encoder.layer.1.query.oft_R.de.weight";
    folder(
        home,
        "base_model.model.encoder.layer.0.query.oft_R.fr.weight",
        &[(two, &[2, 28])],
        json!({}),
    );
    let error = Adapter::load(home, &CPU).unwrap_err().to_string();
    assert!(
        error.contains("the adapters `de`, `fr` together"),
        "{error}"
    );
    Ok(())
}

#[test]
fn modules_that_were_trained_whole_are_told_by_peft_s_rule() -> candle_doft::Result<()> {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    let q = "base_model.model.encoder.layer.0.query.oft_R.weight";
    let head: &[(&str, &[usize])] = &[
        ("base_model.model.classifier.dense.weight", &[4, 4]),
        ("base_model.model.classifier.dense.bias", &[4]),
        (
            "base_model.model.classifier.modules_to_save.default.out_proj.weight",
            &[2, 4],
        ),
        // The end of a segment is enough.
        ("base_model.model.pre_classifier.weight", &[4, 4]),
    ];
    for config in [
        json!({"modules_to_save": ["classifier", "score"]}),
        json!({"task_type": "SEQ_CLS"}),
        json!({"task_type": "TOKEN_CLS"}),
    ] {
        folder(home, q, head, config.clone());
        let (tensors, warnings) = merged(home, &LoadOptions::default())?;
        assert!(warnings.is_empty(), "{config}: {warnings:?}");
        for (seed, (key, shape)) in head.iter().enumerate() {
            let name = key
                .replace("base_model.model.", "")
                .replace("modules_to_save.default.", "");
            let trained = seeded(*shape, 50 + seed as u64).to_dtype(DType::F32)?;
            assert_eq!(bits(&tensors[&name]), bits(&trained), "{name}");
        }
    }
    folder(
        home,
        q,
        &[("base_model.model.qa_outputs.weight", &[2, 4])],
        json!({"task_type": "QUESTION_ANS"}),
    );
    assert!(merged(home, &LoadOptions::default())?.1.is_empty());
    Ok(())
}

#[test]
fn a_whole_tensor_that_nothing_announces_is_taken_where_the_base_has_it() -> candle_doft::Result<()>
{
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    let q = "base_model.model.encoder.layer.0.query.oft_R.weight";
    folder(
        home,
        q,
        &[("base_model.model.embed.weight", &[5, 4])],
        json!({}),
    );
    let (tensors, warnings) = merged(home, &LoadOptions::default())?;
    assert!(
        warnings.len() == 1 && warnings[0].contains("does not announce"),
        "{warnings:?}"
    );
    let trained = seeded((5, 4), 50).to_dtype(DType::F32)?;
    assert_eq!(bits(&tensors["embed.weight"]), bits(&trained));

    folder(
        home,
        q,
        &[("base_model.model.stranger.weight", &[5, 4])],
        json!({}),
    );
    let error = merged(home, &LoadOptions::default())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("`stranger.weight`") && error.contains("no such tensor"),
        "{error}"
    );
    for key in [
        "base_model.model.encoder.layer.0.query.oft_R.other",
        "stranger.weight",
    ] {
        folder(home, q, &[(key, &[5, 4])], json!({}));
        let error = merged(home, &LoadOptions::default())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains(key) && error.contains("--allow-unknown"),
            "{error}"
        );
        let options = LoadOptions::default().with_allow_unknown(true);
        let (_, warnings) = merged(home, &options)?;
        assert!(warnings.iter().any(|w| w.contains(key)), "{warnings:?}");
    }
    Ok(())
}

/// An adapter that was saved has to load, whatever its layers are called.
#[test]
fn a_path_that_looks_like_another_tool_s_key_is_saved_and_read() -> candle_doft::Result<()> {
    let home = tempfile::tempdir().unwrap();
    let (first, second) = (home.path().join("a"), home.path().join("b"));
    let paths = [
        "blocks.lora_A",
        "lora_up.0",
        "x.oft_diag.y",
        "hada_w1_a",
        "lokr_w1",
        "boft_R.z",
        "a.alpha",
        "b.default",
        "c.base_layer",
        "modules_to_save.d",
        "base_model.model.e",
        "module.f",
        "_orig_mod.g",
        "oft_R.h",
        "i.dora_log_multiplier_row",
        "lora_unet_j",
        "k.oft_R.weight.l",
    ];
    let weight = Tensor::ones((4, 16), DType::F32, &CPU)?;
    let wrap = |builder: &candle_doft::AdapterBuilder| -> candle_doft::Result<()> {
        for path in paths {
            let layer = builder.wrap(path, Linear::new(weight.clone(), None))?;
            assert!(layer.is_adapted(), "{path}");
        }
        Ok(())
    };
    let builder = Adapter::builder(DoftConfig::default().with_block_size(8), &CPU)?;
    wrap(&builder)?;
    let adapter = builder.finish()?;
    disturb_all(adapter.vars(), 0.2)?;
    adapter.save(&first)?;
    let builder = Adapter::load(&first, &CPU)?;
    wrap(&builder)?;
    builder.finish()?.save(&second)?;
    assert!(std::fs::read(&first).unwrap() == std::fs::read(&second).unwrap());
    Ok(())
}

#[test]
fn a_component_goes_by_the_names_that_files_and_folders_have_for_it() -> candle_doft::Result<()> {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("sdxl.safetensors");
    let mut tensors = HashMap::new();
    for (seed, prefix) in ["lora_unet_", "lora_te1_", "lora_te2_"]
        .into_iter()
        .enumerate()
    {
        let theta = seeded((2, 28), seed as u64).to_dtype(DType::F32)?;
        tensors.insert(format!("{prefix}a_q.oft_R.weight"), theta);
    }
    safetensors::save(&tensors, &file)?;
    let options = LoadOptions::default();
    let found = components(&file, &options)?;
    assert_eq!(found, ["denoiser", "text_encoder", "text_encoder_2"]);
    for (names, module) in [
        (vec!["denoiser", "unet", "transformer"], "lora_unet_"),
        (vec!["text_encoder", "te1", "te"], "lora_te1_"),
        (vec!["text_encoder_2", "te2"], "lora_te2_"),
    ] {
        for name in names {
            let builder = Adapter::load_with(&file, &CPU, &options.clone().with_component(name))?;
            let weight = Tensor::ones((4, 16), DType::F32, &CPU)?;
            builder.wrap("a.q", Linear::new(weight, None))?;
            let vars = builder.finish()?.named_vars();
            let expected = &tensors[&format!("{module}a_q.oft_R.weight")];
            assert_eq!(bits(&vars[0].1), bits(expected), "{name}: {:?}", vars[0].0);
        }
    }
    let none = Adapter::load_with(&file, &CPU, &options.with_component("te3")).unwrap_err();
    let none = none.to_string();
    assert!(
        none.contains("no layer is of component `te3`, some are of `denoiser`"),
        "{none}"
    );
    Ok(())
}
