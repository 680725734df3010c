//! Merged models, as other programs read them: `transformers`, where Python has it
//! (`CANDLE_DOFT_PYTHON`, else `python3`).

use crate::common::programs;
use crate::common::tensors::{CPU, relative};
use crate::programs::Home;
use crate::small::{configurations, frozen, logits, write_gguf};
use crate::support::llm::weights::Weights;
use anyhow::{Context, Result};
use candle_core::Tensor;
use candle_core::quantized::GgmlDType;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;

/// What both sides read, and how far apart their logits may be.
struct Case {
    name: String,
    /// A folder, or a GGUF file.
    model: PathBuf,
    ids: Vec<u32>,
}

impl Case {
    fn json(&self) -> Value {
        let file = self.model.is_file();
        let folder = if file {
            self.model.parent()
        } else {
            Some(self.model.as_path())
        };
        let gguf = self.model.file_name().filter(|_| file);
        json!({
            "name": self.name,
            "folder": folder,
            "gguf": gguf.map(|name| name.to_string_lossy()),
            "ids": self.ids,
        })
    }
}

/// Python with what `readers.py` needs.
fn python() -> Option<Command> {
    programs::python("torch, transformers, accelerate, safetensors, gguf")
}

fn check(mut python: Command, home: &Home, cases: &[Case]) -> Result<()> {
    let (list, output) = (home.path("cases.json"), home.path("logits.safetensors"));
    let json: Vec<Value> = cases.iter().map(Case::json).collect();
    std::fs::write(&list, serde_json::to_vec(&json)?)?;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/llm/readers.py");
    let run = python
        .arg(script)
        .args([&list, &output])
        .env("HF_HUB_OFFLINE", "1")
        .output()?;
    assert!(
        run.status.success(),
        "{}",
        String::from_utf8_lossy(&run.stderr)
    );
    let theirs = candle_core::safetensors::load(&output, &CPU)?;
    for case in cases {
        let model = frozen(&Weights::open(&case.model, false, &CPU)?)?;
        let ids = Tensor::new(case.ids.as_slice(), &CPU)?.unsqueeze(0)?;
        let ours = logits(&model, &ids)?.get(0)?;
        let theirs = theirs.get(&case.name).context(case.name.clone())?;
        let off = relative(&ours, theirs);
        println!("{}: {off:e}", case.name);
        // Sums in another order, through as many layers as there are.
        assert!(off < 1e-4, "{}: logits are off by {off:e}", case.name);
    }
    Ok(())
}

/// A model adapted and merged by `finetune`; a GGUF file is answered with the folder that came with it.
fn merged(
    home: &Home,
    name: &str,
    model: &str,
    gguf: bool,
    more: &[&str],
) -> Vec<(String, PathBuf)> {
    let folder = format!("{name}-merged");
    let (out, to) = (home.at(&format!("{name}-out")), home.at(&folder));
    let flags = ["--model", model, "--out", &out, "--merge-to", &to];
    home.finetune(&[&flags, more].concat());
    let mut all = vec![(folder.clone(), home.path(&folder))];
    if gguf {
        all.push((
            format!("{folder}-gguf"),
            home.path(&folder).join("model.gguf"),
        ));
    }
    all
}

#[test]
fn small_merged_models_have_the_logits_of_transformers() -> Result<()> {
    let Some(python) = python() else {
        println!("SKIPPED: merged models were not read by transformers, for there is none");
        return Ok(());
    };
    let mut cases = Vec::new();
    let Some(home) = Home::new()? else {
        return Ok(());
    };
    for (number, config) in configurations().iter().enumerate() {
        let kind = config["model_type"].as_str().unwrap();
        let name = format!("{kind}-{number}");
        crate::small::write_folder(&home.path(&name), config);
        cases.extend(merged(&home, &name, &home.at(&name), false, &[]));
        // A GGUF file has no way to say how Llama 3 stretches its positions but by factors.
        if config.get("rope_scaling").is_none() {
            let file = home.path(&name).join("base.gguf");
            write_gguf(&file, config, GgmlDType::F32)?;
            let file = file.display().to_string();
            let name = format!("{name}-from-gguf");
            // Of a GGUF file of Qwen3 transformers does not read the size of a head, and takes 128.
            let gguf = kind != "qwen3";
            cases.extend(merged(&home, &name, &file, gguf, &[]));
        }
    }
    let ids: Vec<u32> = (0..40).map(|i| (i * 37 + i * i) % 260).collect();
    let case = |(name, model)| Case {
        name,
        model,
        ids: ids.clone(),
    };
    let cases: Vec<Case> = cases.into_iter().map(case).collect();
    check(python, &home, &cases)
}

#[test]
fn the_real_model_merged_has_the_logits_of_transformers() -> Result<()> {
    let file = std::env::var("CANDLE_DOFT_SMOLLM2");
    let (Ok(file), Some(python)) = (file, python()) else {
        println!("SKIPPED: no real merged model was read by transformers");
        return Ok(());
    };
    let Some(home) = Home::new()? else {
        return Ok(());
    };
    let cases = merged(
        &home,
        "smollm2",
        &file,
        true,
        &["--steps", "2", "--seq", "96"],
    );
    let ids: Vec<u32> = (0..40).map(|i| (i * 1237 + i * i) % 49_152).collect();
    let case = |(name, model)| Case {
        name,
        model,
        ids: ids.clone(),
    };
    let cases: Vec<Case> = cases.into_iter().map(case).collect();
    check(python, &home, &cases)
}
