//! Small random models of each architecture, adapted end to end; and the real SmolLM2 where its file is
//! at hand (`CANDLE_DOFT_SMOLLM2`).

#[path = "support/mod.rs"]
mod common;
#[path = "../examples/support/llm/mod.rs"]
mod llm;
#[path = "../examples/support/methods.rs"]
#[allow(dead_code, reason = "others use the rest")]
mod methods;

use anyhow::Result;
use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Tensor};
use candle_doft::DoftConfig;
use candle_doft::merge::{Merge, Strength};
use candle_nn::VarBuilder;
use candle_transformers::models::{llama, qwen2, qwen3};
use common::tensors::{CPU, relative, seeded};
use llm::data::{Batch, Data, Order};
use llm::model::{Cache, Model};
use llm::sample::{Sampling, answer};
use llm::tokenizer::Text;
use llm::weights::{Weights, gguf_name, hugging_face_name, reordered, to_gguf, to_hugging_face};
use methods::{Method, Tuner};
use serde_json::json;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The configurations that are tried: each architecture, and Llama 3's positions.
fn configurations() -> Vec<serde_json::Value> {
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
fn tensors(config: &serde_json::Value) -> HashMap<String, Tensor> {
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
fn write_tokenizer(folder: &Path) {
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
fn write_folder(folder: &Path, config: &serde_json::Value) {
    std::fs::create_dir_all(folder).unwrap();
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let tensors = tensors(config);
    candle_core::safetensors::save(&tensors, folder.join("model.safetensors")).unwrap();
    write_tokenizer(folder);
}

/// The same model as a GGUF file, q and k of Llama in its own order of rows.
fn write_gguf(file: &Path, config: &serde_json::Value, kind: GgmlDType) -> Result<()> {
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

fn weights(config: &serde_json::Value) -> Result<Weights> {
    let shape = llm::config::Config::from_json(&config.to_string())?;
    Ok(Weights::from_tensors(shape, tensors(config)))
}

fn frozen(weights: &Weights) -> Result<Model> {
    Model::new(weights, &Tuner::new(Method::Frozen, 0, &CPU)?, &CPU)
}

fn doft(weights: &Weights) -> Result<(Model, Tuner)> {
    let config = DoftConfig::default().with_block_size(8);
    let tuner = Tuner::new(Method::Doft(Box::new(config)), 0, &CPU)?;
    Ok((Model::new(weights, &tuner, &CPU)?, tuner))
}

fn disturb(tuner: &Tuner) -> Result<()> {
    for (seed, (_, var)) in tuner.named_vars()?.into_iter().enumerate() {
        let noise = seeded(var.dims(), 500 + seed as u64).to_dtype(var.dtype())?;
        var.set(&var.add(&(noise * 0.2)?)?)?;
    }
    Ok(())
}

fn ids() -> Result<Tensor> {
    let ids: Vec<u32> = (0..2 * 40).map(|i| (i * 37 + i * i) % 260).collect();
    Ok(Tensor::from_vec(ids, (2, 40), &CPU)?)
}

fn logits(model: &Model, ids: &Tensor) -> Result<Tensor> {
    Ok(model.logits(&model.hidden(&model.embed(ids)?, None)?)?)
}

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
        assert!(off < 1e-5, "{text}: off by {off:e}");
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
        let mut next = model.next(&row[..7], &mut cache)?;
        for (t, id) in row.iter().enumerate().skip(7) {
            assert!(relative(&next, &all.get(0)?.get(t - 1)?) < 1e-5);
            next = model.next(&[*id], &mut cache)?;
        }
        assert_eq!(cache.len(), row.len());
    }
    Ok(())
}

fn loss(model: &Model, again: bool, tuner: &Tuner) -> Result<Tensor> {
    let ids = ids()?;
    let blocks = model.by_block(&tuner.named_vars()?);
    let hidden = model.hidden(&model.embed(&ids)?, again.then_some(blocks.as_slice()))?;
    let hidden = hidden.narrow(1, 0, 39)?;
    Ok(model.loss(&hidden, &ids.narrow(1, 1, 39)?)?)
}

#[test]
fn recomputed_activations_give_the_same_loss_and_gradients() -> Result<()> {
    for config in configurations() {
        let (model, tuner) = doft(&weights(&config)?)?;
        disturb(&tuner)?;
        let (kept, again) = (loss(&model, false, &tuner)?, loss(&model, true, &tuner)?);
        assert!(relative(&again, &kept) < 1e-6);
        let (kept, again) = (kept.backward()?, again.backward()?);
        for (name, var) in tuner.named_vars()? {
            let (kept, again) = (kept.get(&var).expect(&name), again.get(&var).expect(&name));
            let off = relative(again, kept);
            assert!(off < 1e-5, "{name}: off by {off:e}");
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
            let tuner = Tuner::new(method.clone(), 0, &CPU)?;
            let model = Model::new(&weights, &tuner, &CPU)?;
            let before = relative(
                &logits(&model, &ids()?)?,
                &logits(&frozen(&weights)?, &ids()?)?,
            );
            assert!(before < 1e-5, "{method:?} starts {before:e} away");
            disturb(&tuner)?;
            let grads = loss(&model, false, &tuner)?.backward()?;
            for (name, var) in tuner.named_vars()? {
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
            assert!(off < 1e-4, "{method:?}: merged is {off:e} away");
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
            same < 1e-5,
            "{config}: the file is another model by {same:e}"
        );
        let (model, tuner) = doft(&from_gguf)?;
        disturb(&tuner)?;
        let adapter = folder.path().join("adapter.safetensors");
        tuner.adapter().unwrap().save(&adapter)?;
        let merge = Merge::new().with_file(&adapter, &Default::default(), Strength::default())?;
        let merged = frozen(&base.merged(&merge)?)?;
        let off = relative(&logits(&merged, &ids()?)?, &logits(&model, &ids()?)?);
        assert!(off < 1e-5, "{config}: off by {off:e}");
    }
    Ok(())
}

#[test]
fn the_orders_of_rows_undo_each_other() -> Result<()> {
    for size in [2, 8, 64] {
        for row in 0..size {
            assert_eq!(to_gguf(to_hugging_face(row, size), size), row);
        }
    }
    // Row 5 of a head of 8 is the second half of pair 1.
    assert_eq!(to_hugging_face(5, 8), 3);
    let tensor = QTensor::quantize(&seeded((16, 32), 1).to_dtype(DType::F32)?, GgmlDType::Q4_0)?;
    let there = reordered(&tensor, 2, &CPU, to_gguf)?;
    let back = reordered(&there, 2, &CPU, to_hugging_face)?;
    assert_eq!(tensor.data()?, back.data()?);
    assert_ne!(tensor.data()?, there.data()?);
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
        llm::config::Config::from_json(&config.to_string())?,
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

fn model_folder(folder: &Path) -> Result<(Weights, Text)> {
    write_folder(folder, &configurations()[1]);
    let weights = Weights::open(folder, false, &CPU)?;
    let text = Text::open(&weights)?;
    Ok((weights, text))
}

#[test]
fn text_becomes_sequences_and_unusable_text_an_error() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (_, text) = model_folder(folder.path())?;
    assert_eq!(text.decode(&text.encode("a 7é\n")?)?, "a 7é\n");
    let write = |name: &str, content: &str| {
        let file = folder.path().join(name);
        std::fs::write(&file, content).unwrap();
        file
    };
    let error = |file: PathBuf| {
        let error = Data::open(Some(&file), &text, 16, 0)
            .err()
            .expect("an error");
        format!("{error:#}")
    };
    let short = error(write("short.txt", "too short"));
    assert!(
        short.contains("short.txt") && short.contains("9 tokens"),
        "{short}"
    );
    assert!(error(write("empty.jsonl", "\n\n")).contains("0 usable examples"));
    assert!(error(write("bad.jsonl", "{\"text\": 3}")).contains("line 1"));
    let typo = error(write(
        "typo.jsonl",
        "{\"prompt\": \"a\", \"answer\": \"b\"}",
    ));
    assert!(typo.contains("line 1"), "{typo}");
    assert!(error(folder.path().join("none.txt")).contains("none.txt"));

    let long = write("long.txt", &"abcdefgh ".repeat(40));
    let data = Data::open(Some(&long), &text, 16, 0)?;
    assert!(data.train.iter().all(|s| s.ids.len() == 16));
    assert_eq!(data.train.len() + data.validation.len(), 23);

    // The loss is of the completion and of the token that ends it.
    let lines: String = (0..20)
        .map(|i| format!("{{\"prompt\": \"p{i}\", \"completion\": \"yes\"}}\n"))
        .collect();
    let data = Data::open(Some(&write("pairs.jsonl", &lines)), &text, 64, 0)?;
    assert_eq!((data.train.len(), data.validation.len()), (18, 2));
    let sequence = &data.train[0];
    let learned: Vec<u32> = sequence
        .ids
        .iter()
        .zip(&sequence.learned)
        .filter_map(|(id, learned)| learned.then_some(*id))
        .collect();
    let mut expected = text.encode("yes")?;
    expected.extend(text.end_of_turn());
    assert_eq!(learned, expected);
    let batch = Batch::new(&[&data.train[0], &data.train[1]], &CPU)?;
    assert_eq!(batch.tokens, 8);
    let picked = batch
        .ids
        .flatten_all()?
        .index_select(&batch.rows, 0)?
        .to_vec1::<u32>()?;
    // Each row holds the token before its target.
    let targets = batch.targets.to_vec1::<u32>()?;
    assert_eq!(picked[1..4], targets[..3]);

    let mut order = Order::new(3, 5);
    let first: Vec<usize> = (0..10).map(|i| order.at(i)).collect();
    let again: Vec<usize> = (0..10).rev().map(|i| order.at(i)).collect();
    assert!(again.into_iter().rev().eq(first.iter().copied()));
    let mut epoch = first[..5].to_vec();
    epoch.sort_unstable();
    assert_eq!(epoch, [0, 1, 2, 3, 4]);
    assert_ne!(first[..5], first[5..]);
    Ok(())
}

#[test]
fn an_unknown_split_of_a_gguf_file_is_an_error() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("model.gguf");
    write_gguf(&file, &configurations()[0], GgmlDType::F32)?;
    let mut weights = Weights::open(&file, false, &CPU)?;
    let mut set = |key: &str, value: Value| {
        weights
            .metadata
            .insert(format!("tokenizer.ggml.{key}"), value);
        Text::open(&weights).err().map(|error| format!("{error:#}"))
    };
    let llama = set("model", Value::String("llama".into())).unwrap();
    assert!(
        llama.contains("`llama`") && llama.contains("tokenizer.json"),
        "{llama}"
    );
    set("model", Value::String("gpt2".into()));
    set("merges", Value::Array(Vec::new()));
    let unknown = set("pre", Value::String("tekken".into())).unwrap();
    assert!(unknown.contains("`tekken`"), "{unknown}");
    assert_eq!(set("pre", Value::String("smollm".into())), None);
    Ok(())
}

/// The programs, from an untouched model to a merged one.
#[test]
fn the_programs_train_stop_resume_merge_and_generate() -> Result<()> {
    let test = std::env::current_exe()?;
    let programs = test
        .parent()
        .and_then(Path::parent)
        .unwrap()
        .join("examples");
    if !programs.join("finetune").exists() {
        println!("SKIPPED: the examples are not built");
        return Ok(());
    }
    let run = |program: &str, arguments: &[&str]| {
        let out = Command::new(programs.join(program))
            .args(arguments)
            .output()
            .unwrap();
        (
            out.status.code(),
            String::from_utf8(out.stdout).unwrap(),
            String::from_utf8(out.stderr).unwrap(),
        )
    };
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name).display().to_string();
    model_folder(&folder.path().join("model"))?;
    let lines: String = (0..40)
        .map(|i| format!("{{\"prompt\": \"say {i}\", \"completion\": \"it is {i}\"}}\n"))
        .collect();
    std::fs::write(at("data.jsonl"), lines)?;
    let (model, data) = (at("model"), at("data.jsonl"));
    let common = [
        "--model",
        &model,
        "--data",
        &data,
        "--steps",
        "6",
        "--batch",
        "2",
        "--accumulate",
        "2",
        "--seq",
        "32",
        "--block-size",
        "8",
        "--lr",
        "0.02",
        "--warmup",
        "2",
        "--every",
        "2",
        "--sample-tokens",
        "4",
        "--held-out",
        "4",
    ];
    let finetune = |more: &[&str]| {
        let arguments: Vec<&str> = common.iter().chain(more).copied().collect();
        let (code, out, err) = run("finetune", &arguments);
        assert_eq!(code, Some(0), "{more:?}: {out} {err}");
        out
    };
    for method in ["doft", "lora", "dora", "oft"] {
        let (whole, parts) = (
            at(&format!("{method}-whole")),
            at(&format!("{method}-parts")),
        );
        finetune(&[
            "--method",
            method,
            "--out",
            &whole,
            "--merge-to",
            &at("merged"),
        ]);
        finetune(&["--method", method, "--out", &parts, "--stop-after", "3"]);
        finetune(&["--method", method, "--out", &parts, "--resume"]);
        let bytes = |folder: &str| std::fs::read(Path::new(folder).join("adapter.safetensors"));
        assert_eq!(
            bytes(&whole)?,
            bytes(&parts)?,
            "{method}: resumed is not the same"
        );
        let metrics = std::fs::read_to_string(Path::new(&parts).join("metrics.jsonl"))?;
        let steps: Vec<u64> = metrics
            .lines()
            .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
            .filter(|line| line.get("loss").is_some())
            .map(|line| line["step"].as_u64().unwrap())
            .collect();
        assert_eq!(steps, [1, 2, 3, 4, 5, 6], "{method}");
        assert!(Path::new(&whole).join("loss.svg").exists());
    }
    finetune(&["--method", "none", "--out", &at("none")]);
    let again = at("again");
    finetune(&["--out", &again, "--checkpoint-activations"]);

    let adapter = Path::new(&at("doft-whole"))
        .join("adapter.safetensors")
        .display()
        .to_string();
    finetune(&["--out", &at("last"), "--merge-to", &at("merged")]);
    let generate = |arguments: &[&str]| {
        let (code, out, err) = run("generate", arguments);
        assert_eq!(code, Some(0), "{out} {err}");
        out
    };
    let ask = ["--prompt", "say 3", "--max-tokens", "12"];
    let with = |first: &[&str]| generate(&[first, ask.as_slice()].concat());
    let unmerged = with(&["--model", &model, "--adapter", &adapter]);
    assert_eq!(with(&["--model", &at("merged")]), unmerged);
    assert_eq!(
        with(&["--model", &model, "--adapter", &adapter, "--merge"]),
        unmerged
    );
    let half = with(&["--model", &model, "--adapter", &adapter, "--strength", "0"]);
    assert_eq!(half, with(&["--model", &model]));
    let warm = with(&["--model", &model, "--temperature", "2", "--seed", "1"]);
    assert_eq!(
        warm,
        with(&["--model", &model, "--temperature", "2", "--seed", "1"])
    );

    // The merged folder holds the weights that act.
    let merged = Weights::open(Path::new(&at("merged")), false, &CPU)?;
    let tuner = Tuner::with_adapter(
        Method::Doft(Box::default()),
        candle_doft::Adapter::load(&adapter, &CPU)?,
    );
    let base = Weights::open(Path::new(&model), false, &CPU)?;
    let off = relative(
        &logits(&frozen(&merged)?, &ids()?)?,
        &logits(&Model::new(&base, &tuner, &CPU)?, &ids()?)?,
    );
    assert!(off < 1e-4, "merged is {off:e} away");

    for (arguments, expected) in [
        (
            vec!["--model", "nowhere", "--out", &again],
            "nowhere: no such file",
        ),
        (
            vec![
                "--model", &model, "--out", &again, "--resume", "--lr", "0.5",
            ],
            "resume with the same flags",
        ),
        (
            vec!["--model", &model, "--out", &again, "--seq", "4096"],
            "--seq 4096",
        ),
    ] {
        let (code, _, err) = run("finetune", &arguments);
        assert_eq!(code, Some(1), "{err}");
        assert!(err.contains(expected) && err.lines().count() == 1, "{err}");
    }
    assert_eq!(run("finetune", &["--model", &model]).0, Some(2));
    Ok(())
}

/// The file that `tests/llm/reference.py` made with transformers.
fn reference() -> serde_json::Value {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/smollm2.json");
    serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap()
}

#[test]
fn the_real_model_has_the_tokens_loss_and_logits_of_transformers() -> Result<()> {
    let Some(file) = std::env::var_os("CANDLE_DOFT_SMOLLM2") else {
        println!("SKIPPED: CANDLE_DOFT_SMOLLM2 does not name SmolLM2-135M-Instruct.Q4_1.gguf");
        return Ok(());
    };
    let reference = reference();
    let weights = Weights::open(Path::new(&file), false, &CPU)?;
    let text = Text::open(&weights)?;
    let list =
        |value: &serde_json::Value| -> Vec<u32> { serde_json::from_value(value.clone()).unwrap() };
    for (line, expected) in reference["tokens"].as_object().unwrap() {
        assert_eq!(text.encode(line)?, list(expected), "{line:?}");
        assert!(!text.decode(&text.encode(line)?)?.contains("<|"));
    }
    let start = list(&reference["prompt"]);
    assert_eq!(text.prompt("Define Happiness.")?, start);
    let ids = list(&reference["ids"]);
    let model = frozen(&weights)?;
    let input = Tensor::new(ids.as_slice(), &CPU)?.unsqueeze(0)?;
    let hidden = model.hidden(&model.embed(&input)?, None)?;
    let learned = ids.len() - start.len();
    let rows = hidden.get(0)?.narrow(0, start.len() - 1, learned)?;
    let targets = Tensor::new(&ids[start.len()..], &CPU)?;
    let loss = model.loss(&rows, &targets)?.to_scalar::<f32>()?;
    let expected = reference["loss"].as_f64().unwrap();
    assert!(
        (f64::from(loss) - expected).abs() < 1e-3,
        "{loss}, expected {expected}"
    );
    let last = model.logits(&hidden.get(0)?.narrow(0, ids.len() - 1, 1)?)?;
    let last = last.flatten_all()?.to_vec1::<f32>()?;
    let largest = reference["largest_logit"].as_f64().unwrap();
    let logits = reference["last_logits"].as_array().unwrap();
    for (i, expected) in logits.iter().enumerate() {
        let off = (f64::from(last[64 * i]) - expected.as_f64().unwrap()).abs();
        assert!(off < 1e-3 * largest, "logit {} is off by {off:e}", 64 * i);
    }
    let sampling = Sampling {
        temperature: 0.,
        seed: 0,
        max_tokens: 8,
    };
    assert!(!answer(&model, &text, "Define Happiness.", sampling, |_| Ok(()))?.is_empty());
    Ok(())
}
