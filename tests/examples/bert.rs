//! The BERT example on a tiny folder in Hugging Face layout.

use crate::common::programs::example;
use crate::common::tensors::seeded;
use candle_core::{DType, Device};
use candle_nn::{VarBuilder, VarMap};
use candle_transformers::models::bert::{BertModel, Config};
use std::path::Path;
use tokenizers::models::wordlevel::WordLevel;

const CONFIG: &str = r#"{"vocab_size": 40, "hidden_size": 64, "intermediate_size": 96, "hidden_act": "gelu",
    "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32, "type_vocab_size": 2,
    "hidden_dropout_prob": 0.1, "initializer_range": 0.02, "layer_norm_eps": 1e-12, "pad_token_id": 0,
    "use_cache": true, "model_type": "bert"}"#;

fn write_model(folder: &Path) {
    std::fs::write(folder.join("config.json"), CONFIG).unwrap();
    let config: Config = serde_json::from_str(CONFIG).unwrap();
    let varmap = VarMap::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
    BertModel::load(vb, &config).unwrap();
    for (name, var) in varmap.data().lock().unwrap().iter() {
        if !name.contains("LayerNorm") {
            let values = (seeded(var.shape().clone(), name.len() as u64) * 0.2).unwrap();
            var.set(&values.to_dtype(DType::F32).unwrap()).unwrap();
        }
    }
    varmap.save(folder.join("model.safetensors")).unwrap();
    let words =
        "[PAD] [UNK] rain falls on the hills a cold wind from sea shares fell after report loan";
    let words = words.split(' ').enumerate();
    let vocab = words
        .map(|(id, word)| (word.to_string(), id as u32))
        .collect();
    let model = WordLevel::builder().vocab(vocab).unk_token("[UNK]".into());
    let mut tokenizer = tokenizers::Tokenizer::new(model.build().unwrap());
    tokenizer.with_pre_tokenizer(Some(tokenizers::pre_tokenizers::whitespace::Whitespace));
    tokenizer
        .save(folder.join("tokenizer.json"), false)
        .unwrap();
}

#[test]
fn bert_trains_and_is_merged_into_candle_s_model() {
    let home = tempfile::tempdir().unwrap();
    write_model(home.path());
    let adapter = home.path().join("adapter.safetensors");
    let Some(mut bert) = example("bert") else {
        return;
    };
    bert.arg("--model")
        .arg(home.path())
        .arg("--out")
        .arg(&adapter);
    let run = bert.output().unwrap();
    assert!(run.status.success(), "{run:?}");
    let text = String::from_utf8(run.stdout).unwrap();
    let loss = |step: &str| -> f32 {
        let line = text
            .lines()
            .find(|line| line.starts_with(step))
            .expect(step);
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    assert!(loss("step 20:") < 0.5 * loss("step 1:"), "{text}");
    let off = text.rsplit(' ').next().unwrap().trim();
    assert!(off.parse::<f32>().unwrap() < 1e-5, "{text}");
    assert!(adapter.exists());

    let mut missing = example("bert").unwrap();
    let run = missing
        .args(["--model", "/no/such/folder"])
        .output()
        .unwrap();
    assert_eq!(run.status.code(), Some(1));
    let text = String::from_utf8(run.stderr).unwrap();
    assert!(text.contains("/no/such/folder/config.json"), "{text}");
}
