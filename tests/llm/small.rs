//! Small random models of each architecture, as tensors, as a folder and as a GGUF file.

use crate::common::tensors::{CPU, disturb_all, seeded};
use crate::support::llm;
use crate::support::llm::gguf_names::{gguf_name, hugging_face_name, reordered, to_gguf};
use crate::support::llm::model::Model;
use crate::support::llm::tokenizer::Text;
use crate::support::llm::weights::Weights;
use crate::support::methods::{Method, Tuner, TunerBuilder};
use anyhow::Result;
use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Tensor};
use candle_doft::DoftConfig;
use serde_json::json;
use std::collections::HashMap;
use std::path::Path;

/// The configurations that are tried: each architecture, and Llama 3's positions.
pub fn configurations() -> Vec<serde_json::Value> {
    let base = json!({
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 128,
        "vocab_size": 260,
        "tie_word_embeddings": false,
        "hidden_act": "silu",
        "eos_token_id": 257,
    });
    let with = |changes: serde_json::Value| {
        let mut config = base.clone();
        for (key, value) in changes.as_object().unwrap() {
            config[key] = value.clone();
        }
        config
    };
    vec![
        base.clone(),
        with(json!({
            "tie_word_embeddings": true,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        })),
        with(json!({
            "model_type": "qwen2",
            "tie_word_embeddings": true,
            "sliding_window": 128,
            "max_window_layers": 2,
            "use_sliding_window": false,
        })),
        with(json!({
            "model_type": "qwen3",
            "head_dim": 24,
            "attention_bias": false,
            "sliding_window": null,
            "max_window_layers": 2,
            "use_sliding_window": false,
        })),
    ]
}

/// Seeded weights of a configuration.
pub fn tensors(config: &serde_json::Value) -> HashMap<String, Tensor> {
    let get = |key: &str| config[key].as_u64().map(|n| n as usize);
    let (hidden, wide) = (
        get("hidden_size").unwrap(),
        get("intermediate_size").unwrap(),
    );
    let heads = get("num_attention_heads").unwrap();
    let head = get("head_dim").unwrap_or(hidden / heads);
    let (q, kv) = (heads * head, get("num_key_value_heads").unwrap() * head);
    let kind = config["model_type"].as_str().unwrap();
    let mut all = HashMap::new();
    let mut add = |name: String, shape: &[usize], scale: f64, shift: f64| {
        let values = seeded(shape, 7 + all.len() as u64);
        let tensor = ((values * scale).unwrap() + shift).unwrap();
        all.insert(name, tensor.to_dtype(DType::F32).unwrap());
    };
    let rows = get("vocab_size").unwrap();
    add("model.embed_tokens.weight".into(), &[rows, hidden], 0.5, 0.);
    if config["tie_word_embeddings"] == false {
        add("lm_head.weight".into(), &[rows, hidden], 0.3, 0.);
    }
    add("model.norm.weight".into(), &[hidden], 0.1, 1.);
    for layer in 0..get("num_hidden_layers").unwrap() {
        let path = format!("model.layers.{layer}");
        add(format!("{path}.input_layernorm.weight"), &[hidden], 0.1, 1.);
        let after = format!("{path}.post_attention_layernorm.weight");
        add(after, &[hidden], 0.1, 1.);
        for (name, out, width) in [
            ("self_attn.q_proj", q, hidden),
            ("self_attn.k_proj", kv, hidden),
            ("self_attn.v_proj", kv, hidden),
            ("self_attn.o_proj", hidden, q),
            ("mlp.gate_proj", wide, hidden),
            ("mlp.up_proj", wide, hidden),
            ("mlp.down_proj", hidden, wide),
        ] {
            let scale = 1. / (width as f64).sqrt();
            add(format!("{path}.{name}.weight"), &[out, width], scale, 0.);
            let biased = kind == "qwen2" && name.contains("attn") && !name.contains("o_proj");
            if biased {
                add(format!("{path}.{name}.bias"), &[out], 0.2, 0.);
            }
        }
        if kind == "qwen3" {
            add(format!("{path}.self_attn.q_norm.weight"), &[head], 0.1, 1.);
            add(format!("{path}.self_attn.k_norm.weight"), &[head], 0.1, 1.);
        }
    }
    all
}

/// A tokenizer of single bytes, with a token for the beginning and one for the end.
pub fn write_tokenizer(folder: &Path) {
    use tokenizers::models::bpe::{BPE, Vocab};
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;
    let mut alphabet: Vec<String> = ByteLevel::alphabet()
        .into_iter()
        .map(String::from)
        .collect();
    alphabet.sort();
    let vocabulary: Vocab = alphabet.into_iter().zip(0u32..).collect();
    let bpe = BPE::builder()
        .vocab_and_merges(vocabulary, Vec::new())
        .build()
        .unwrap();
    let mut tokenizer = tokenizers::Tokenizer::new(bpe);
    tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
    tokenizer.with_decoder(Some(tokenizers::decoders::byte_level::ByteLevel::default()));
    let special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"];
    let special = special.map(|name| tokenizers::AddedToken::from(name, true));
    tokenizer.add_special_tokens(special).unwrap();
    tokenizer
        .save(folder.join("tokenizer.json"), false)
        .unwrap();
}

/// A folder in Hugging Face layout.
pub fn write_folder(folder: &Path, config: &serde_json::Value) {
    std::fs::create_dir_all(folder).unwrap();
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let tensors = tensors(config);
    candle_core::safetensors::save(&tensors, folder.join("model.safetensors")).unwrap();
    write_tokenizer(folder);
}

pub fn model_folder(folder: &Path) -> Result<(Weights, Text)> {
    write_folder(folder, &configurations()[1]);
    let weights = Weights::open(folder, false, &CPU)?;
    let text = Text::open(&weights)?;
    Ok((weights, text))
}

/// The same model as a GGUF file, q and k of Llama in its own order of rows.
pub fn write_gguf(file: &Path, config: &serde_json::Value, kind: GgmlDType) -> Result<()> {
    let name = config["model_type"].as_str().unwrap();
    let count = |key: &str| Value::U32(config[key].as_u64().unwrap() as u32);
    let tokens = (0..260).map(|i| Value::String(format!("t{i}"))).collect();
    let mut metadata = vec![
        (
            "general.architecture".to_string(),
            Value::String(name.into()),
        ),
        (format!("{name}.embedding_length"), count("hidden_size")),
        (
            format!("{name}.feed_forward_length"),
            count("intermediate_size"),
        ),
        (format!("{name}.block_count"), count("num_hidden_layers")),
        (
            format!("{name}.attention.head_count"),
            count("num_attention_heads"),
        ),
        (
            format!("{name}.attention.head_count_kv"),
            count("num_key_value_heads"),
        ),
        (
            format!("{name}.context_length"),
            count("max_position_embeddings"),
        ),
        (format!("{name}.rope.freq_base"), Value::F32(10_000.)),
        (
            format!("{name}.attention.layer_norm_rms_epsilon"),
            Value::F32(1e-5),
        ),
        ("tokenizer.ggml.tokens".into(), Value::Array(tokens)),
    ];
    if let Some(head) = config["head_dim"].as_u64() {
        metadata.push((
            format!("{name}.attention.key_length"),
            Value::U32(head as u32),
        ));
    }
    let mut stored = Vec::new();
    for (path, tensor) in tensors(config) {
        let gguf = gguf_name(&path).unwrap();
        assert_eq!(hugging_face_name(&gguf).unwrap(), path);
        let kind = if tensor.rank() == 2 {
            kind
        } else {
            GgmlDType::F32
        };
        let quantized = QTensor::quantize(&tensor, kind)?;
        let heads = match gguf.rsplit('.').nth(1) {
            Some("attn_q") if name == "llama" => Some(4),
            Some("attn_k") if name == "llama" => Some(2),
            _ => None,
        };
        let quantized = match heads {
            Some(heads) => reordered(&quantized, heads, &CPU, to_gguf)?,
            None => quantized,
        };
        stored.push((gguf, quantized));
    }
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
    let stored: Vec<(&str, &QTensor)> = stored.iter().map(|(k, v)| (k.as_str(), v)).collect();
    Ok(gguf_file::write(
        &mut std::fs::File::create(file)?,
        &metadata,
        &stored,
    )?)
}

pub fn weights(config: &serde_json::Value) -> Result<Weights> {
    let shape = llm::config::Config::from_json(&config.to_string())?;
    Ok(Weights::from_tensors(shape, tensors(config)))
}

pub fn frozen(weights: &Weights) -> Result<Model> {
    Model::new(weights, &TunerBuilder::new(Method::Frozen, 0, &CPU)?, &CPU)
}

pub fn doft(weights: &Weights) -> Result<(Model, Tuner)> {
    let config = DoftConfig::default().with_block_size(8);
    let builder = TunerBuilder::new(Method::Doft(Box::new(config)), 0, &CPU)?;
    let model = Model::new(weights, &builder, &CPU)?;
    Ok((model, builder.finish()?))
}

pub fn disturb(tuner: &Tuner) -> Result<()> {
    let vars = tuner.named_vars().into_iter();
    Ok(disturb_all(vars.map(|(_, var)| var), 0.2)?)
}

pub fn ids() -> Result<Tensor> {
    let ids: Vec<u32> = (0..2 * 40).map(|i| (i * 37 + i * i) % 260).collect();
    Ok(Tensor::from_vec(ids, (2, 40), &CPU)?)
}

pub fn logits(model: &Model, ids: &Tensor) -> Result<Tensor> {
    Ok(model.logits(&model.hidden(&model.embed(ids)?, false)?)?)
}
