//! What the programs write to and read from: bases that stay, folders of other models, resumed runs, adapters with
//! trained tensors, and where the hub's variables say that models lie.

use crate::common::tensors::{CPU, bits, seeded};
use crate::programs::{Ended, Home};
use crate::small::{configurations, frozen, ids, logits, tensors, write_folder, write_gguf};
use crate::support::llm::weights::Weights;
use anyhow::Result;
use candle_core::quantized::GgmlDType;
use candle_core::{DType, Tensor, safetensors};
use serde_json::json;
use std::collections::HashMap;

fn refused(ended: Ended, parts: &[&str]) {
    assert_eq!(ended.code, Some(1), "{}", ended.err);
    let last = ended.err.lines().last().unwrap_or_default();
    for part in parts {
        assert!(last.contains(part), "no `{part}` in {}", ended.err);
    }
}

#[test]
fn a_merge_spares_the_base_and_folders_of_other_models() -> Result<()> {
    let Some(home) = Home::new()? else {
        return Ok(());
    };
    let out = home.at("out");
    let run =
        |to: &str| home.try_finetune(&["--out", &out, "--steps", "1", "--merge-to", &home.at(to)]);
    let same = ["holds the base model itself", "another folder"];
    refused(run("model"), &same);
    refused(run("model/../model"), &same);
    // Before the first step: nothing was trained for it.
    assert!(!home.path("out/adapter.safetensors").exists());
    for stale in [
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model.gguf",
        "chat_template.jinja",
    ] {
        let folder = home.path("other");
        std::fs::create_dir_all(&folder)?;
        std::fs::write(folder.join(stale), b"{}")?;
        refused(run("other"), &[stale, "remove it"]);
        std::fs::remove_dir_all(&folder)?;
    }
    std::fs::create_dir_all(home.path("model/1_Pooling"))?;
    std::fs::write(home.path("model/1_Pooling/config.json"), b"{}")?;
    for _ in 0..2 {
        assert_eq!(run("merged").code, Some(0));
        assert!(home.path("merged/1_Pooling/config.json").exists());
    }
    Ok(())
}

#[test]
fn a_gguf_base_survives_and_a_merged_one_is_laid_out_as_it_says() -> Result<()> {
    let Some(home) = Home::new()? else {
        return Ok(());
    };
    std::fs::create_dir(home.path("g"))?;
    let file = home.path("g/model.gguf");
    write_gguf(&file, &configurations()[0], GgmlDType::F32)?;
    let before = std::fs::read(&file)?;
    let (out, model) = (home.at("out"), home.at("g/model.gguf"));
    let run = |to: &str| {
        home.try_finetune(&[
            "--model",
            &model,
            "--out",
            &out,
            "--steps",
            "1",
            "--merge-to",
            &home.at(to),
        ])
    };
    // The small file has no merges, so its tokenizer lies beside it, with its own names for the tokens.
    let ended = run("g");
    assert_eq!(ended.code, Some(1), "{}", ended.err);
    assert!(std::fs::read(&file)? == before);
    Ok(())
}

#[test]
fn a_run_is_not_resumed_on_another_base_of_the_same_shape() -> Result<()> {
    let Some(home) = Home::new()? else {
        return Ok(());
    };
    let out = home.at("out");
    home.finetune(&["--out", &out, "--stop-after", "1"]);
    let mut all = tensors(&configurations()[1]);
    let name = "model.layers.1.mlp.up_proj.weight";
    all.insert(name.into(), (&all[name] * 1.25)?);
    let file = home.path("model/model.safetensors");
    let kept = std::fs::read(&file)?;
    safetensors::save(&all, &file)?;
    refused(
        home.try_finetune(&["--out", &out, "--resume"]),
        &["`base` was", "the same model"],
    );
    std::fs::write(&file, kept)?;
    home.finetune(&["--out", &out, "--resume"]);
    Ok(())
}

/// A PEFT folder of a rotation, a norm and the table of the embedding.
fn write_peft(home: &Home, whole: &[(&str, Tensor)]) -> Result<()> {
    std::fs::create_dir_all(home.path("peft"))?;
    let theta = (seeded((8, 28), 3) * 0.3)?.to_dtype(DType::F32)?;
    let mut stored = HashMap::from([(
        "base_model.model.model.layers.0.self_attn.q_proj.oft_R.weight".to_string(),
        theta,
    )]);
    for (name, tensor) in whole {
        stored.insert(format!("base_model.model.{name}"), tensor.clone());
    }
    safetensors::save(&stored, home.path("peft/adapter_model.safetensors"))?;
    let config = json!({"peft_type": "OFT", "oft_block_size": 8, "peft_version": "0.19.0",
        "modules_to_save": ["embed_tokens", "norm", "lm_head"]});
    std::fs::write(home.path("peft/adapter_config.json"), config.to_string())?;
    Ok(())
}

#[test]
fn trained_tensors_beside_the_layers_act_merged_and_unmerged() -> Result<()> {
    let Some(home) = Home::new()? else {
        return Ok(());
    };
    let base = tensors(&configurations()[1]);
    let (table, norm) = ("model.embed_tokens.weight", "model.norm.weight");
    let (new_table, new_norm) = ((&base[table] + 0.3)?, (&base[norm] * 0.5)?);
    let mut answers = Vec::new();
    for whole in [
        vec![(norm, new_norm.clone())],
        vec![(table, new_table.clone()), (norm, new_norm.clone())],
        vec![("lm_head.weight", new_table.clone())],
    ] {
        write_peft(&home, &whole)?;
        let ask = [
            "--prompt",
            "say 3",
            "--max-tokens",
            "16",
            "--adapter",
            &home.at("peft"),
        ];
        let unmerged = home.generate(&[&["--model", &home.at("model")][..], &ask].concat());
        let merged =
            home.generate(&[&["--model", &home.at("model"), "--merge"][..], &ask].concat());
        assert_eq!(merged, unmerged);
        // The same as a checkpoint on disk, whose head is untied where the table was trained.
        std::fs::remove_dir_all(home.path("disk")).ok();
        let flags = [
            "--base",
            &home.at("model"),
            "--adapter",
            &home.at("peft"),
            "--output",
            &home.at("disk"),
        ];
        let ended = home.run("merge", &flags);
        assert_eq!(ended.code, Some(0), "{}", ended.err);
        let on_disk = home.generate(&[
            "--model",
            &home.at("disk"),
            "--prompt",
            "say 3",
            "--max-tokens",
            "16",
        ]);
        assert_eq!(on_disk, unmerged);
        let stored = safetensors::load(home.path("disk/model.safetensors"), &CPU)?;
        if whole.len() == 2 {
            assert_eq!(bits(&stored["lm_head.weight"]), bits(&base[table]));
            assert_eq!(bits(&stored[table]), bits(&new_table));
        }
        let model = frozen(&Weights::open(&home.path("disk"), false, &CPU)?)?;
        answers.push(bits(&logits(&model, &ids()?)?));
    }
    let base = frozen(&Weights::open(&home.path("model"), false, &CPU)?)?;
    answers.push(bits(&logits(&base, &ids()?)?));
    answers.sort();
    answers.dedup();
    assert_eq!(answers.len(), 4);
    write_peft(
        &home,
        &[(
            "model.strange.norm.weight",
            Tensor::ones(3, DType::F32, &CPU)?,
        )],
    )?;
    let flags = [
        "--model",
        &home.at("model"),
        "--adapter",
        &home.at("peft"),
        "--prompt",
        "x",
    ];
    refused(home.run("generate", &flags), &["model.strange.norm.weight"]);
    Ok(())
}

#[test]
fn the_variables_of_the_hub_mean_what_they_mean() -> Result<()> {
    let Some(home) = Home::new()? else {
        return Ok(());
    };
    let repository = home.path("cache/models--org--tiny");
    std::fs::create_dir_all(repository.join("refs"))?;
    std::fs::write(repository.join("refs/main"), "0123abcd")?;
    write_folder(&repository.join("snapshots/0123abcd"), &configurations()[1]);
    let ask = ["--model", "org/tiny", "--prompt", "x", "--max-tokens", "3"];
    for name in ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"] {
        let mut command = home.command("generate");
        let ended: Ended = command
            .args(ask)
            .env(name, home.path("cache"))
            .output()?
            .into();
        assert_eq!(ended.code, Some(0), "{name}: {}", ended.err);
    }
    let mut command = home.command("generate");
    let ended = command
        .args(ask)
        .env("HF_HUB_OFFLINE", "1")
        .output()?
        .into();
    refused(
        ended,
        &["HF_HUB_OFFLINE asks for no network", "HF_HUB_CACHE"],
    );
    Ok(())
}

/// As the folders of a pipeline are called; each gets the layers that are its own.
#[test]
fn a_file_of_several_models_is_merged_into_each_by_its_folder() -> Result<()> {
    let Some(home) = Home::new()? else {
        return Ok(());
    };
    let mut adapter = HashMap::new();
    for (seed, prefix) in ["lora_te1_", "lora_te2_"].into_iter().enumerate() {
        let theta = (seeded((2, 28), seed as u64) * 0.2)?.to_dtype(DType::F32)?;
        adapter.insert(format!("{prefix}a_q.oft_R.weight"), theta);
    }
    safetensors::save(&adapter, home.path("both.safetensors"))?;
    let weight = seeded((4, 16), 9).to_dtype(DType::F32)?;
    let mut merged = Vec::new();
    for (folder, flags) in [
        ("text_encoder", &[][..]),
        ("text_encoder_2", &[]),
        ("elsewhere", &["--component", "te2"]),
        ("elsewhere", &["--component", "te1"]),
    ] {
        std::fs::create_dir_all(home.path(folder))?;
        let base = HashMap::from([("a.q.weight", weight.clone())]);
        safetensors::save(&base, home.path(folder).join("model.safetensors"))?;
        let (base, file, out) = (
            home.at(folder),
            home.at("both.safetensors"),
            home.at("merged_out"),
        );
        let usual = ["--base", &base, "--adapter", &file, "--output", &out];
        let ended = home.run("merge", &[&usual[..], flags].concat());
        assert_eq!(ended.code, Some(0), "{}", ended.err);
        assert_eq!(
            ended.err.contains("note: the base lies in a folder"),
            flags.is_empty()
        );
        let found = safetensors::load(home.path("merged_out/model.safetensors"), &CPU)?;
        merged.push(bits(&found["a.q.weight"]));
    }
    assert!(merged[0] != merged[1] && merged[1] == merged[2] && merged[0] == merged[3]);
    let usual = [
        "--base",
        &home.at("elsewhere"),
        "--adapter",
        &home.at("both.safetensors"),
        "--output",
        &home.at("x"),
    ];
    refused(
        home.run("merge", &usual),
        &["both mean `a.q`", "--component"],
    );
    Ok(())
}

#[cfg(unix)]
#[test]
fn a_reader_that_stops_ends_a_program_quietly() -> Result<()> {
    use std::io::Read;
    let Some(home) = Home::new()? else {
        return Ok(());
    };
    let theta = seeded((2, 28), 1).to_dtype(DType::F32)?;
    let name = |i: usize| format!("a.rather.long.name.of.a.layer.{i}.oft_R.weight");
    let tensors: HashMap<_, _> = (0..2000).map(|i| (name(i), theta.clone())).collect();
    safetensors::save(&tensors, home.path("many.safetensors"))?;
    let mut command = home.command("inspect");
    let mut child = command
        .args(["--adapter", &home.at("many.safetensors")])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()?;
    let mut first = [0; 16];
    child.stdout.take().unwrap().read_exact(&mut first)?;
    let ended: Ended = child.wait_with_output()?.into();
    assert_eq!((ended.code, ended.err.as_str()), (Some(0), ""));
    Ok(())
}
