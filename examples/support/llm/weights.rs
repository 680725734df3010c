//! Frozen weights by their Hugging Face paths, out of safetensors or out of a GGUF file.
//!
//! GGUF files name tensors their own way, and those of Llama models hold the rows of q and k in another
//! order (pairs side by side instead of half a head apart). Both are undone here, once, so that models
//! and adapters know Hugging Face's names and rows alone.

use super::config::{Architecture, Config};
use anyhow::{Context, Result, bail, ensure};
use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{DType, Device, Tensor};
use candle_doft::frozen;
use candle_doft::merge::Merge;
use safetensors::tensor::Metadata;
use std::collections::HashMap;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A tensor as it was stored, or expanded.
#[derive(Clone)]
enum Stored {
    Dense(Tensor),
    Quantized(Arc<QTensor>),
}

/// The weights of one model.
#[derive(Clone)]
pub struct Weights {
    pub config: Config,
    /// Metadata of a GGUF file.
    pub metadata: HashMap<String, Value>,
    /// Where the model came from: a folder or a GGUF file.
    pub path: PathBuf,
    tensors: HashMap<String, Stored>,
}

impl Weights {
    /// Reads a folder in Hugging Face layout, or a GGUF file. Quantized and half weights stay what they
    /// are unless `dequantize` is set, which expands them to f32.
    pub fn open(path: &Path, dequantize: bool, device: &Device) -> Result<Self> {
        let read = match path.is_dir() {
            true => Self::from_folder(path, device),
            false => Self::from_gguf(path, device),
        };
        let mut weights = read.with_context(|| path.display().to_string())?;
        if dequantize {
            for tensor in weights.tensors.values_mut() {
                *tensor = Stored::Dense(match tensor {
                    Stored::Dense(tensor) => tensor.to_dtype(DType::F32)?,
                    Stored::Quantized(tensor) => tensor.dequantize(device)?,
                });
            }
        }
        Ok(weights)
    }

    fn from_folder(folder: &Path, device: &Device) -> Result<Self> {
        let text = std::fs::read_to_string(folder.join("config.json"));
        let text = text.context(
            "config.json cannot be read; --model takes a GGUF file or a folder in Hugging Face layout",
        )?;
        let config = Config::from_json(&text)?;
        let index = folder.join("model.safetensors.index.json");
        let files = match index.exists() {
            false => vec!["model.safetensors".to_string()],
            true => shards(&index)?,
        };
        let mut tensors = HashMap::new();
        for file in files {
            let read = read_safetensors(&folder.join(&file), device);
            let read = read.with_context(|| format!("{file} cannot be read; fetch it again"))?;
            tensors.extend(read.into_iter().map(|(n, t)| (n, Stored::Dense(t))));
        }
        Ok(Self {
            config,
            metadata: HashMap::new(),
            path: folder.to_path_buf(),
            tensors,
        })
    }

    fn from_gguf(file: &Path, device: &Device) -> Result<Self> {
        let mut reader = std::fs::File::open(file)?;
        let mut magic = [0; 4];
        let long = reader.read_exact(&mut magic).is_ok();
        ensure!(
            !long || &magic == b"GGUF",
            "not a GGUF file; --model takes one, or a folder in Hugging Face layout: config.json, \
             tokenizer.json and safetensors files"
        );
        reader.rewind()?;
        let content =
            Content::read(&mut reader).context("not a whole GGUF file; fetch it again")?;
        let tied = !content.tensor_infos.contains_key("output.weight");
        let mut config = Config::from_gguf(&content.metadata, tied)?;
        let mut tensors = HashMap::new();
        for name in content.tensor_infos.keys() {
            let tensor = content.tensor(&mut reader, name, device);
            let tensor = tensor.with_context(|| {
                format!("tensor `{name}` cannot be read, the file is cut short; fetch it again")
            })?;
            if name == "rope_freqs.weight" {
                config.factors = Some(tensor.dequantize(device)?.to_vec1()?);
                continue;
            }
            let Some(path) = hugging_face_name(name) else {
                bail!("tensor `{name}` belongs to no layer of this family");
            };
            let heads = match (config.architecture, name.rsplit('.').nth(1)) {
                (Architecture::Llama, Some("attn_q")) => Some(config.heads),
                (Architecture::Llama, Some("attn_k")) => Some(config.kv_heads),
                _ => None,
            };
            let tensor = match heads {
                Some(heads) => reordered(&tensor, heads, device, to_hugging_face)?,
                None => tensor,
            };
            // What is not quantized is used as it is.
            let tensor = match tensor.dtype() {
                GgmlDType::F32 => Stored::Dense(tensor.dequantize(device)?),
                _ => Stored::Quantized(Arc::new(tensor)),
            };
            tensors.insert(path, tensor);
        }
        Ok(Self {
            config,
            metadata: content.metadata,
            path: file.to_path_buf(),
            tensors,
        })
    }

    /// Weights that were never stored: for tests and benches.
    pub fn from_tensors(config: Config, tensors: HashMap<String, Tensor>) -> Self {
        let tensors = tensors.into_iter();
        Self {
            config,
            metadata: HashMap::new(),
            path: PathBuf::new(),
            tensors: tensors.map(|(n, t)| (n, Stored::Dense(t))).collect(),
        }
    }

    /// The same with adapters merged; a quantized weight that one changes is expanded.
    pub fn merged(mut self, merge: &Merge) -> Result<Self> {
        for name in self
            .names()
            .into_iter()
            .map(str::to_string)
            .collect::<Vec<_>>()
        {
            let Some(path) = name.strip_suffix(".weight") else {
                continue;
            };
            let quantized = matches!(self.tensors.get(&name), Some(Stored::Quantized(_)));
            // Rows that a training run on other bits of the same model has are near enough.
            if let Some(merged) = merge.weight(path, &self.stored(&name)?, quantized)? {
                self.tensors.insert(name, Stored::Dense(merged));
            }
        }
        merge.check_used()?;
        Ok(self)
    }

    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// All names, sorted.
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.tensors.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    /// Bytes that the weights take as they are held.
    pub fn bytes(&self) -> usize {
        let of = |tensor: &Stored| match tensor {
            Stored::Dense(t) => t.elem_count() * t.dtype().size_in_bytes(),
            Stored::Quantized(t) => t.storage_size_in_bytes(),
        };
        self.tensors.values().map(of).sum()
    }

    fn get(&self, name: &str, shape: &[usize]) -> Result<&Stored> {
        let Some(tensor) = self.tensors.get(name) else {
            bail!("the model lacks the tensor `{name}`");
        };
        let found = match tensor {
            Stored::Dense(tensor) => tensor.dims(),
            Stored::Quantized(tensor) => tensor.shape().dims(),
        };
        ensure!(
            found == shape,
            "tensor `{name}` has shape {found:?}, its configuration asks for {shape:?}"
        );
        Ok(tensor)
    }

    /// A tensor as it is held; one that is quantized in f32.
    pub fn stored(&self, name: &str) -> Result<Tensor> {
        match self.tensors.get(name) {
            Some(Stored::Dense(tensor)) => Ok(tensor.clone()),
            Some(Stored::Quantized(tensor)) => Ok(tensor.dequantize(&tensor.device())?),
            None => bail!("the model lacks the tensor `{name}`"),
        }
    }

    /// A dense tensor in f32.
    pub fn dense(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        Ok(match self.get(name, shape)? {
            Stored::Dense(tensor) => tensor.to_dtype(DType::F32)?,
            Stored::Quantized(tensor) => tensor.dequantize(&tensor.device())?,
        })
    }

    /// The linear layer at `path`, with the bias that is there.
    pub fn linear(&self, path: &str, in_dim: usize, out_dim: usize) -> Result<frozen::Linear> {
        let bias = format!("{path}.bias");
        let bias = match self.contains(&bias) {
            true => Some(self.dense(&bias, &[out_dim])?),
            false => None,
        };
        Ok(
            match self.get(&format!("{path}.weight"), &[out_dim, in_dim])? {
                Stored::Dense(weight) => frozen::Linear::new(weight.clone(), bias),
                Stored::Quantized(weight) => frozen::Linear::quantized(weight.clone(), bias)?,
            },
        )
    }

    pub fn embedding(&self, path: &str, rows: usize, width: usize) -> Result<frozen::Embedding> {
        Ok(match self.get(&format!("{path}.weight"), &[rows, width])? {
            Stored::Dense(table) => frozen::Embedding::new(table.clone()),
            Stored::Quantized(table) => frozen::Embedding::quantized(table.clone())?,
        })
    }

    pub fn norm(&self, path: &str, size: usize) -> Result<frozen::RmsNorm> {
        let weight = self.dense(&format!("{path}.weight"), &[size])?;
        Ok(frozen::RmsNorm::new(weight, self.config.eps))
    }
}

/// The names of the files that an index of shards lists.
pub fn shards(index: &Path) -> Result<Vec<String>> {
    let content: serde_json::Value = serde_json::from_slice(&std::fs::read(index)?)
        .with_context(|| index.display().to_string())?;
    let map = content["weight_map"].as_object();
    let map = map.with_context(|| format!("{} lacks `weight_map`", index.display()))?;
    let mut names: Vec<String> = map
        .values()
        .filter_map(|name| name.as_str().map(str::to_string))
        .collect();
    names.sort_unstable();
    names.dedup();
    Ok(names)
}

/// The tensors of a file, one after the other: candle's own `load` holds the whole file beside them.
fn read_safetensors(file: &Path, device: &Device) -> Result<Vec<(String, Tensor)>> {
    let mut reader = std::fs::File::open(file)?;
    let whole = reader.metadata()?.len();
    let mut size = [0; 8];
    reader.read_exact(&mut size)?;
    let start = u64::from_le_bytes(size).saturating_add(8);
    ensure!(start <= whole, "its header is cut short");
    let mut header = vec![0; (start - 8) as usize];
    reader.read_exact(&mut header)?;
    let header: Metadata = serde_json::from_slice(&header)?;
    let mut tensors = Vec::new();
    for (name, info) in header.tensors() {
        let (from, to) = info.data_offsets;
        let dtype = DType::try_from(info.dtype)?;
        let elements = info
            .shape
            .iter()
            .try_fold(1usize, |n, axis| n.checked_mul(*axis));
        let bytes = elements.and_then(|n| n.checked_mul(dtype.size_in_bytes()));
        ensure!(
            to.checked_sub(from) == bytes && to as u64 <= whole - start,
            "tensor `{name}` is cut short"
        );
        let mut bytes = vec![0; to - from];
        reader.seek(SeekFrom::Start(start + from as u64))?;
        reader.read_exact(&mut bytes)?;
        let tensor = Tensor::from_raw_buffer(&bytes, dtype, &info.shape, device)?;
        tensors.push((name, tensor));
    }
    Ok(tensors)
}

/// `blk.3.attn_q.weight` is `model.layers.3.self_attn.q_proj.weight`.
pub fn hugging_face_name(name: &str) -> Option<String> {
    match name {
        "token_embd.weight" => return Some("model.embed_tokens.weight".into()),
        "output_norm.weight" => return Some("model.norm.weight".into()),
        "output.weight" => return Some("lm_head.weight".into()),
        _ => {}
    }
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let (part, kind) = rest.rsplit_once('.')?;
    let path = PARTS.iter().find(|(gguf, _)| *gguf == part)?.1;
    Some(format!("model.layers.{layer}.{path}.{kind}"))
}

/// The way back.
pub fn gguf_name(name: &str) -> Option<String> {
    match name {
        "model.embed_tokens.weight" => return Some("token_embd.weight".into()),
        "model.norm.weight" => return Some("output_norm.weight".into()),
        "lm_head.weight" => return Some("output.weight".into()),
        _ => {}
    }
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (path, kind) = rest.rsplit_once('.')?;
    let part = PARTS
        .iter()
        .find(|(_, huggingface)| *huggingface == path)?
        .0;
    Some(format!("blk.{layer}.{part}.{kind}"))
}

/// The parts of a block, GGUF's name and Hugging Face's.
const PARTS: [(&str, &str); 11] = [
    ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// Where row `row` of a Hugging Face head of `size` rows lies in a GGUF file: pair `i`, which is rows
/// `i` and `i + size/2` there, is rows `2i` and `2i + 1` here.
pub fn to_hugging_face(row: usize, size: usize) -> usize {
    let half = size / 2;
    row % half * 2 + row / half
}

/// The way back: where row `row` of a GGUF head lies in Hugging Face's.
pub fn to_gguf(row: usize, size: usize) -> usize {
    row / 2 + row % 2 * (size / 2)
}

/// A tensor with the rows of each head taken from `source(row, size of a head)`, nothing requantized.
pub fn reordered(
    tensor: &QTensor,
    heads: usize,
    device: &Device,
    source: fn(usize, usize) -> usize,
) -> Result<QTensor> {
    let rows = tensor.shape().dims()[0];
    ensure!(
        rows.is_multiple_of(heads),
        "{rows} rows do not make {heads} heads"
    );
    let size = rows / heads;
    let data = tensor.data()?;
    let width = data.len() / rows;
    let mut moved = Vec::with_capacity(data.len());
    for row in 0..rows {
        let from = row / size * size + source(row % size, size);
        moved.extend_from_slice(&data[from * width..(from + 1) * width]);
    }
    let storage = QStorage::from_data(moved.into(), device, tensor.dtype())?;
    Ok(QTensor::new(storage, tensor.shape().clone())?)
}
