//! The adapter that `extract` finds between two models that `finetune` merged: the one that was trained, and the
//! same greedy text. On a small model, and on the real one (`CANDLE_DOFT_SMOLLM2`).

use crate::common::programs::example;
use crate::programs::Home;
use anyhow::Result;
use candle_core::{Device, safetensors};

/// Trains from `model`, merges, and extracts from the two folders.
fn comes_back(home: &Home, model: &str) -> Result<()> {
    let (base, tuned) = (home.at("base"), home.at("tuned"));
    let none = ["--method", "none", "--steps", "1", "--merge-to", &base];
    let of = |out: &str| [String::from("--out"), home.at(out)];
    let run = |out: &str, more: &[&str]| {
        let out = of(out);
        let start = [&out[0], &out[1], "--model", model, "--sample-tokens", "0"];
        home.finetune(&[&start[..], &["--seq", "64", "--held-out", "1"], more].concat());
    };
    run("none", &none);
    run("run", &["--steps", "3", "--merge-to", &tuned]);
    let output = home.at("extracted.safetensors");
    let block = ["--block-size", "8", "--output", &output];
    let ended = home.run(
        "extract",
        &[&["--base", &base, "--tuned", &tuned][..], &block].concat(),
    );
    assert_eq!(ended.code, Some(0), "{}", ended.err);

    let load = |name: &str| safetensors::load(home.path(name), &Device::Cpu);
    let (found, trained) = (
        load("extracted.safetensors")?,
        load("run/adapter.safetensors")?,
    );
    let rotations = trained.iter().filter(|(name, _)| name.contains("oft_R"));
    let mut count = 0;
    for (name, trained) in rotations {
        let largest = |t: candle_core::Tensor| t.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>();
        let off = largest((&found[name] - trained)?)? / largest(trained.clone())?;
        assert!(off < 1e-3, "{name} is off by {off:e} of its largest value");
        count += 1;
    }
    assert!(count >= 14, "{count} rotations");

    let ask = ["--prompt", "say 3", "--max-tokens", "16", "--model"];
    let merged = home.generate(&[&ask[..], &[&tuned]].concat());
    let adapted = home.generate(&[&ask[..], &[&base, "--adapter", &output]].concat());
    assert_eq!(merged, adapted);
    Ok(())
}

#[test]
fn the_adapter_and_its_text_come_back_from_merged_folders() -> Result<()> {
    let Some(home) = Home::new()? else {
        return Ok(());
    };
    if example("extract").is_none() {
        return Ok(());
    }
    comes_back(&home, &home.at("model"))
}

#[test]
fn the_same_of_the_real_model() -> Result<()> {
    let (Some(home), Some(file)) = (Home::new()?, std::env::var_os("CANDLE_DOFT_SMOLLM2")) else {
        println!("SKIPPED: CANDLE_DOFT_SMOLLM2 does not name SmolLM2-135M-Instruct.Q4_1.gguf");
        return Ok(());
    };
    if example("extract").is_none() {
        return Ok(());
    }
    comes_back(&home, &file.to_string_lossy())
}
