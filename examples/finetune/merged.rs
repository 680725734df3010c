//! A model with its adapter merged, as a Hugging Face folder and as a GGUF file.

use crate::support::llm::config::{Architecture, Config};
use crate::support::llm::model::Model;
use crate::support::llm::tokenizer::Text;
use crate::support::llm::weights::{Weights, gguf_name, reordered, to_gguf};
use crate::support::{files, progress};
use anyhow::{Context, Result, ensure};
use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

/// Writes `folder/model.safetensors` with its config and tokenizer, and `folder/model.gguf` where the
/// model came from a GGUF file, whose metadata and tokenizer it keeps.
pub(crate) fn write(
    folder: &Path,
    weights: &Weights,
    model: &Model,
    text: &Text,
    kind: GgmlDType,
) -> Result<()> {
    ensure!(
        !folder.exists() || folder != weights.path,
        "{} is the base model itself",
        folder.display()
    );
    files::make_folder(folder)?;
    let tensors = tensors(weights, model)?;
    write_configuration(folder, weights, text)?;
    if !weights.metadata.is_empty() {
        write_gguf(&folder.join("model.gguf"), weights, &tensors, kind)?;
    }
    // The weights last: a folder without them is not taken for a model.
    files::replace_by(&folder.join("model.safetensors"), |file| {
        let permissions = file.as_file().metadata()?.permissions();
        safetensors::serialize_to_file(tensors.iter(), Some(format()), file.path())?;
        // It put a file of its own there, which others may not read and which is not on disk yet.
        let written = std::fs::File::open(file.path())?;
        written.set_permissions(permissions)?;
        Ok(written.sync_all()?)
    })
}

fn format() -> std::collections::HashMap<String, String> {
    [("format".to_string(), "pt".to_string())].into()
}

/// Every tensor by its Hugging Face name: what was dense in its own dtype, what was quantized in f32.
fn tensors(weights: &Weights, model: &Model) -> Result<BTreeMap<String, Tensor>> {
    let bar = progress::bar(weights.names().len(), "merge");
    let mut all = BTreeMap::new();
    for name in weights.names() {
        all.insert(name.to_string(), weights.stored(name)?);
        bar.inc(1);
    }
    for (path, layer) in model.linears() {
        let name = format!("{path}.weight");
        let merged = layer.merge()?;
        let dtype = all.get(&name).map_or(DType::F32, Tensor::dtype);
        all.insert(name, merged.weight().to_dtype(dtype)?.contiguous()?);
    }
    bar.finish_and_clear();
    Ok(all)
}

fn write_configuration(folder: &Path, weights: &Weights, text: &Text) -> Result<()> {
    if weights.path.is_dir() {
        for name in [
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            "special_tokens_map.json",
        ] {
            let from = weights.path.join(name);
            if from.exists() {
                let content = std::fs::read(&from).context(from.display().to_string())?;
                files::replace(&folder.join(name), &content)?;
            }
        }
        return Ok(());
    }
    let config = serde_json::to_string_pretty(&huggingface(&weights.config, text)?)?;
    files::replace(&folder.join("config.json"), config.as_bytes())?;
    files::replace(&folder.join("tokenizer.json"), text.json()?.as_bytes())?;
    let tokenizer = serde_json::to_string_pretty(&text.settings())?;
    files::replace(&folder.join("tokenizer_config.json"), tokenizer.as_bytes())
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
    // The file type of the original no longer holds.
    metadata.retain(|(key, _)| *key != "general.file_type");
    let tensors: Vec<(&str, &QTensor)> = quantized.iter().map(|(n, t)| (n.as_str(), t)).collect();
    files::replace_by(file, |file| {
        let mut buffered = std::io::BufWriter::new(file);
        gguf_file::write(&mut buffered, &metadata, &tensors)?;
        Ok(buffered.flush()?)
    })
}
