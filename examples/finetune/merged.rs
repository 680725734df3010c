//! A model with its adapter merged, as a Hugging Face folder and as a GGUF file.

use crate::support::llm::config::{Architecture, Config};
use crate::support::llm::gguf_names::{gguf_name, reordered, to_gguf};
use crate::support::llm::model::Model;
use crate::support::llm::tokenizer::Text;
use crate::support::llm::weights::Weights;
use crate::support::{files, progress};
use anyhow::{Context, Result, ensure};
use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use candle_doft::file::{replace_with, save_tensors};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Refuses a folder that holds the base, or files of a model that [`write`] would leave there: they would be
/// read for parts of the new one. To be asked before a run.
pub(crate) fn check(folder: &Path, weights: &Weights) -> Result<()> {
    if !folder.exists() {
        return Ok(());
    }
    ensure!(
        folder.is_dir(),
        "{} is a file, expected a folder or a new name",
        folder.display()
    );
    let home = match weights.path.is_dir() {
        true => Some(weights.path.as_path()),
        false => weights.path.parent(),
    };
    let home = home.filter(|home| !home.as_os_str().is_empty());
    ensure!(
        home.unwrap_or(Path::new(".")).canonicalize()? != folder.canonicalize()?,
        "{} holds the base model itself; give another folder",
        folder.display()
    );
    let mut written: BTreeSet<PathBuf> = OWN.iter().map(PathBuf::from).collect();
    match weights.metadata.is_empty() {
        true => written.extend(others(&weights.path)?),
        false => written.extend(["model.gguf", "tokenizer_config.json"].map(PathBuf::from)),
    }
    for entry in std::fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let name = entry?.file_name();
        let text = name.to_string_lossy();
        let of_a_model = is_weights(&text) || READ.contains(&text.as_ref());
        ensure!(
            !of_a_model || written.contains(Path::new(&name)),
            "{} holds {text} of another model, which the merged one has none of; remove it or give another folder",
            folder.display()
        );
    }
    Ok(())
}

/// What is written whatever the base.
const OWN: [&str; 3] = ["config.json", "tokenizer.json", "model.safetensors"];

/// Files beside the weights that decide what a model answers.
const READ: [&str; 8] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "special_tokens_map.json",
];

/// Whether a file holds weights, or says which files do.
fn is_weights(name: &str) -> bool {
    let ends = [
        ".safetensors",
        ".safetensors.index.json",
        ".bin",
        ".bin.index.json",
        ".gguf",
    ];
    ends.iter().any(|end| name.ends_with(end))
}

/// What lies beside the weights of a model, in folders too, by the path in its folder; what is hidden is left
/// out.
fn others(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![PathBuf::new()];
    while let Some(within) = folders.pop() {
        let home = folder.join(&within);
        for entry in std::fs::read_dir(&home).with_context(|| home.display().to_string())? {
            let name = entry?.file_name();
            let (path, text) = (home.join(&name), name.to_string_lossy());
            if text.starts_with('.') {
                continue;
            }
            if path.is_dir() && !path.is_symlink() {
                folders.push(within.join(&name));
            } else if path.is_file() && !is_weights(&text) {
                found.push(within.join(&name));
            }
        }
    }
    found.sort();
    Ok(found)
}

/// Writes `folder/model.safetensors` with its config and tokenizer, and `folder/model.gguf` where the
/// model came from a GGUF file, whose metadata and tokenizer it keeps.
pub(crate) fn write(
    folder: &Path,
    weights: &Weights,
    model: &Model,
    text: &Text,
    kind: GgmlDType,
) -> Result<()> {
    check(folder, weights)?;
    files::make_folder(folder)?;
    let tensors = tensors(weights, model)?;
    write_configuration(folder, weights, text)?;
    if !weights.metadata.is_empty() {
        write_gguf(&folder.join("model.gguf"), weights, &tensors, kind)?;
    }
    // The weights last: a folder without them is not taken for a model.
    let format = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    let file = folder.join("model.safetensors");
    save_tensors(&file, &tensors, &format)
        .with_context(|| format!("cannot write {}", file.display()))
}

/// Every tensor by its Hugging Face name, on the host: what was dense in its own dtype, what was quantized in f32.
fn tensors(weights: &Weights, model: &Model) -> Result<BTreeMap<String, Tensor>> {
    let bar = progress::bar(weights.names().len(), "merge");
    let mut all = BTreeMap::new();
    for name in weights.names() {
        all.insert(
            name.to_string(),
            weights.stored(name)?.to_device(&Device::Cpu)?,
        );
        bar.inc(1);
    }
    for (path, layer) in model.linears() {
        let name = format!("{path}.weight");
        let merged = layer.merge()?.weight().to_device(&Device::Cpu)?;
        let dtype = all.get(&name).map_or(DType::F32, Tensor::dtype);
        all.insert(name, merged.to_dtype(dtype)?.contiguous()?);
    }
    bar.finish_and_clear();
    Ok(all)
}

fn write_configuration(folder: &Path, weights: &Weights, text: &Text) -> Result<()> {
    if weights.path.is_dir() {
        for name in others(&weights.path)? {
            let (from, to) = (weights.path.join(&name), folder.join(&name));
            if let Some(home) = to.parent() {
                std::fs::create_dir_all(home).with_context(|| home.display().to_string())?;
            }
            let mut content = std::fs::read(&from).with_context(|| from.display().to_string())?;
            if name == Path::new("config.json") {
                content = untied(content, weights)?;
            }
            files::replace(&to, &content)?;
        }
        return Ok(());
    }
    let config = serde_json::to_string_pretty(&huggingface(&weights.config, text)?)?;
    files::replace(&folder.join("config.json"), config.as_bytes())?;
    files::replace(&folder.join("tokenizer.json"), text.json()?.as_bytes())?;
    let tokenizer = serde_json::to_string_pretty(&text.settings())?;
    files::replace(&folder.join("tokenizer_config.json"), tokenizer.as_bytes())
}

/// A `config.json` that says what the weights are: the base's may tie a head that has a weight of its own.
fn untied(content: Vec<u8>, weights: &Weights) -> Result<Vec<u8>> {
    let mut json: serde_json::Value = serde_json::from_slice(&content).context("config.json")?;
    if weights.config.tied || json["tie_word_embeddings"] != true {
        return Ok(content);
    }
    json["tie_word_embeddings"] = false.into();
    Ok(serde_json::to_vec_pretty(&json)?)
}

fn huggingface(config: &Config, text: &Text) -> Result<serde_json::Value> {
    let (kind, class) = match config.architecture {
        Architecture::Llama => ("llama", "LlamaForCausalLM"),
        Architecture::Qwen2 => ("qwen2", "Qwen2ForCausalLM"),
        Architecture::Qwen3 => ("qwen3", "Qwen3ForCausalLM"),
    };
    let scaling = match &config.factors {
        None => config.scaling,
        Some(factors) => Some(config.scaling_behind(factors).context(
            "the GGUF file stretches positions in a way that a config.json cannot say; leave out --merge-to",
        )?),
    };
    let mut json = serde_json::json!({
        "architectures": [class],
        "model_type": kind,
        "hidden_act": "silu",
        "hidden_size": config.hidden,
        "intermediate_size": config.intermediate,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.eps,
        "rope_theta": config.theta,
        "max_position_embeddings": config.context,
        "vocab_size": config.vocabulary,
        "tie_word_embeddings": config.tied,
        "eos_token_id": text.ends,
        "torch_dtype": "float32",
    });
    if let Some(scaling) = scaling {
        json["rope_scaling"] = serde_json::to_value(scaling)?;
        json["rope_scaling"]["rope_type"] = "llama3".into();
    }
    Ok(json)
}

fn write_gguf(
    file: &Path,
    weights: &Weights,
    tensors: &BTreeMap<String, Tensor>,
    kind: GgmlDType,
) -> Result<()> {
    let config = &weights.config;
    let mut quantized = Vec::new();
    for (name, tensor) in tensors {
        let Some(gguf) = gguf_name(name) else {
            anyhow::bail!("tensor `{name}` has no name in a GGUF file");
        };
        let wide = tensor.to_dtype(DType::F32)?;
        let whole = tensor.rank() == 2 && tensor.dim(1)?.is_multiple_of(kind.block_size());
        let kind = if whole { kind } else { GgmlDType::F32 };
        let tensor = QTensor::quantize(&wide, kind)?;
        let heads = match (config.architecture, gguf.rsplit('.').nth(1)) {
            (Architecture::Llama, Some("attn_q")) => Some(config.heads),
            (Architecture::Llama, Some("attn_k")) => Some(config.kv_heads),
            _ => None,
        };
        let tensor = match heads {
            Some(heads) => reordered(&tensor, heads, &Device::Cpu, to_gguf)?,
            None => tensor,
        };
        quantized.push((gguf, tensor));
    }
    if let Some(factors) = &config.factors {
        let factors = Tensor::new(factors.as_slice(), &Device::Cpu)?;
        let factors = QTensor::quantize(&factors, GgmlDType::F32)?;
        quantized.push(("rope_freqs.weight".into(), factors));
    }
    let mut metadata: Vec<(&str, &Value)> = weights
        .metadata
        .iter()
        .map(|(k, v)| (k.as_str(), v))
        .collect();
    metadata.sort_by_key(|(key, _)| *key);
    // What was true of the original's layout no longer holds: types, places, parts.
    metadata.retain(|(key, _)| {
        !matches!(*key, "general.file_type" | "general.alignment") && !key.starts_with("split.")
    });
    let tensors: Vec<(&str, &QTensor)> = quantized.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let written = replace_with(file, |out| gguf_file::write(out, &metadata, &tensors));
    written.with_context(|| format!("cannot write {}", file.display()))
}
