//! What a model computes: candle-transformers' logits, the same with a cache, the same recomputed, and
//! the same merged.

use crate::common::tensors::{CPU, relative};
use crate::small::{
    configurations, disturb, doft, frozen, ids, logits, tensors, weights, write_gguf,
};
use crate::support::llm::config::Config;
use crate::support::llm::model::{Cache, Model};
use crate::support::llm::weights::Weights;
use crate::support::methods::{Method, TunerBuilder};
use anyhow::Result;
use candle_core::quantized::GgmlDType;
use candle_core::{DType, Tensor};
use candle_doft::DoftConfig;
use candle_doft::merge::{Merge, Strength};
use candle_nn::VarBuilder;
use candle_transformers::models::{llama, qwen2, qwen3};
use serde_json::json;
use std::collections::HashMap;

#[test]
fn logits_are_those_of_candle_transformers() -> Result<()> {
    for config in configurations() {
        let vb = VarBuilder::from_tensors(tensors(&config), DType::F32, &CPU);
        let text = config.to_string();
        let one = ids()?.narrow(0, 0, 1)?;
        let theirs = match config["model_type"].as_str().unwrap() {
            "llama" => {
                let shape: llama::LlamaConfig = serde_json::from_str(&text)?;
                let shape = shape.into_config(false);
                let mut cache = llama::Cache::new(false, DType::F32, &shape, &CPU)?;
                llama::Llama::load(vb, &shape)?.forward(&one, 0, &mut cache)?
            }
            "qwen2" => {
                let shape: qwen2::Config = serde_json::from_str(&text)?;
                qwen2::ModelForCausalLM::new(&shape, vb)?.forward(&one, 0)?
            }
            _ => {
                let shape: qwen3::Config = serde_json::from_str(&text)?;
                qwen3::ModelForCausalLM::new(&shape, vb)?.forward(&one, 0)?
            }
        };
        let ours = logits(&frozen(&weights(&config)?)?, &one)?;
        let last = ours.narrow(1, 39, 1)?.flatten_all()?;
        let off = relative(&last, &theirs.flatten_all()?);
        assert!(off < 5e-6, "{text}: off by {off:e}");
    }
    Ok(())
}

#[test]
fn a_cache_of_keys_changes_nothing() -> Result<()> {
    for config in configurations() {
        let (model, tuner) = doft(&weights(&config)?)?;
        disturb(&tuner)?;
        let all = logits(&model, &ids()?)?;
        let row: Vec<u32> = ids()?.get(0)?.to_vec1()?;
        let mut cache = Cache::default();
        let mut next = model.next(&[&row[..7]], &mut cache)?.get(0)?;
        for (t, id) in row.iter().enumerate().skip(7) {
            assert!(relative(&next, &all.get(0)?.get(t - 1)?) < 5e-6);
            next = model.next(&[&[*id]], &mut cache)?.get(0)?;
        }
        assert_eq!(cache.len(), row.len());
    }
    Ok(())
}

fn loss(model: &Model, again: bool) -> Result<Tensor> {
    let ids = ids()?;
    let hidden = model.hidden(&model.embed(&ids)?, again)?;
    let hidden = hidden.narrow(1, 0, 39)?;
    Ok(model.loss(&hidden, &ids.narrow(1, 1, 39)?)?)
}

#[test]
fn recomputed_activations_give_the_same_loss_and_gradients() -> Result<()> {
    for config in configurations() {
        let (model, tuner) = doft(&weights(&config)?)?;
        disturb(&tuner)?;
        let (kept, again) = (loss(&model, false)?, loss(&model, true)?);
        assert!(relative(&again, &kept) < 1e-6);
        let (kept, again) = (kept.backward()?, again.backward()?);
        for (name, var) in tuner.named_vars() {
            let (kept, again) = (kept.get(&var).expect(&name), again.get(&var).expect(&name));
            let off = relative(again, kept);
            assert!(off < 2e-6, "{name}: off by {off:e}");
        }
    }
    Ok(())
}

#[test]
fn recomputed_activations_give_every_method_its_gradients() -> Result<()> {
    let (rank, alpha) = (4, 4.);
    for method in [
        Method::Lora { rank, alpha },
        Method::Dora { rank, alpha },
        Method::Full,
    ] {
        let builder = TunerBuilder::new(method.clone(), 0, &CPU)?;
        let model = Model::new(&weights(&configurations()[2])?, &builder, &CPU)?;
        let tuner = builder.finish()?;
        disturb(&tuner)?;
        let kept = loss(&model, false)?.backward()?;
        let again = loss(&model, true)?.backward()?;
        for (name, var) in tuner.named_vars() {
            let (kept, again) = (kept.get(&var).expect(&name), again.get(&var).expect(&name));
            let off = relative(again, kept);
            assert!(off < 2e-6, "{method:?}: {name}: off by {off:e}");
        }
    }
    Ok(())
}

#[test]
fn every_method_trains_every_variable_and_merges_to_what_it_computes() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("model.gguf");
    write_gguf(&file, &configurations()[0], GgmlDType::Q8_0)?;
    let quantized = Weights::open(&file, false, &CPU)?;
    let dense = weights(&configurations()[3])?;
    let (rank, alpha) = (4, 4.);
    for weights in [quantized, dense] {
        for method in [
            Method::Doft(Box::new(DoftConfig::default().with_block_size(8))),
            Method::Doft(Box::new(DoftConfig::oft().with_block_size(8))),
            Method::Lora { rank, alpha },
            Method::Dora { rank, alpha },
        ] {
            let builder = TunerBuilder::new(method.clone(), 0, &CPU)?;
            let model = Model::new(&weights, &builder, &CPU)?;
            let tuner = builder.finish()?;
            let before = relative(
                &logits(&model, &ids()?)?,
                &logits(&frozen(&weights)?, &ids()?)?,
            );
            assert!(before < 1e-6, "{method:?} starts {before:e} away");
            disturb(&tuner)?;
            let grads = loss(&model, false)?.backward()?;
            for (name, var) in tuner.named_vars() {
                let grad = grads
                    .get(&var)
                    .unwrap_or_else(|| panic!("{method:?}: {name}"));
                let sum = grad.abs()?.sum_all()?.to_scalar::<f32>()?;
                assert!(sum > 0. && sum.is_finite(), "{method:?}: {name}: {sum}");
            }
            let mut merged = HashMap::new();
            for name in weights.names() {
                merged.insert(name.to_string(), weights.stored(name)?);
            }
            for (path, layer) in model.linears() {
                let layer = layer.merge()?;
                merged.insert(
                    format!("{path}.weight"),
                    layer.weight().to_dtype(DType::F32)?,
                );
            }
            let merged = frozen(&Weights::from_tensors(weights.config.clone(), merged))?;
            let off = relative(&logits(&merged, &ids()?)?, &logits(&model, &ids()?)?);
            assert!(off < 1e-5, "{method:?}: merged is {off:e} away");
        }
    }
    Ok(())
}

/// Trained on a GGUF file, whose rows of q and k lie in another order, and merged into safetensors.
#[test]
fn an_adapter_trained_on_gguf_fits_the_safetensors_of_the_model() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for config in [
        &configurations()[0],
        &configurations()[2],
        &configurations()[3],
    ] {
        let file = folder.path().join("model.gguf");
        write_gguf(&file, config, GgmlDType::F32)?;
        let from_gguf = Weights::open(&file, false, &CPU)?;
        let base = weights(config)?;
        let same = relative(
            &logits(&frozen(&from_gguf)?, &ids()?)?,
            &logits(&frozen(&base)?, &ids()?)?,
        );
        assert!(
            same < 1e-6,
            "{config}: the file is another model by {same:e}"
        );
        let (model, tuner) = doft(&from_gguf)?;
        disturb(&tuner)?;
        let adapter = folder.path().join("adapter.safetensors");
        tuner.adapter().unwrap().save(&adapter)?;
        let merge = Merge::new().with_file(&adapter, &Default::default(), Strength::default())?;
        let merged = frozen(&base.merged(&merge)?)?;
        let off = relative(&logits(&merged, &ids()?)?, &logits(&model, &ids()?)?);
        assert!(off < 5e-6, "{config}: off by {off:e}");
    }
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused_by_name() -> Result<()> {
    let error = |changes: serde_json::Value| {
        let mut config = configurations()[0].clone();
        for (key, value) in changes.as_object().unwrap() {
            config[key] = value.clone();
        }
        match weights(&config).and_then(|weights| frozen(&weights).map(|_| ())) {
            Ok(()) => panic!("{changes} was taken"),
            Err(error) => format!("{error:#}"),
        }
    };
    assert!(error(json!({"model_type": "gpt2"})).contains("model_type `gpt2`"));
    assert!(error(json!({"hidden_act": "gelu"})).contains("hidden_act `gelu`"));
    assert!(error(json!({"rope_scaling": {"rope_type": "yarn"}})).contains("yarn"));
    assert!(error(json!({"num_key_value_heads": 3})).contains("3 key heads"));
    assert!(error(json!({"intermediate_size": 0})).contains("intermediate size is 0"));
    let mut config = configurations()[0].clone();
    let mut short = weights(&config)?;
    short.config.vocabulary = 300;
    let error = frozen(&short).err().unwrap().to_string();
    assert_eq!(
        error,
        "tensor `model.embed_tokens.weight` has shape [260, 64], its configuration asks for [300, 64]"
    );
    config["model_type"] = "qwen3".into();
    let missing = frozen(&Weights::from_tensors(
        Config::from_json(&config.to_string())?,
        tensors(&configurations()[0]),
    ));
    assert!(
        missing
            .err()
            .unwrap()
            .to_string()
            .contains("self_attn.q_norm.weight")
    );
    Ok(())
}
