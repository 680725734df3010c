//! Frozen weights by their Hugging Face paths, out of safetensors or out of a GGUF file.
//!
//! GGUF files name tensors their own way, and those of Llama models hold the rows of q and k in another
//! order (pairs side by side instead of half a head apart). Both are undone here, once, so that models
//! and adapters know Hugging Face's names and rows alone.

use super::config::{Architecture, Config};
use super::gguf;
use super::gguf_names::{hugging_face_name, reordered, to_hugging_face};
use anyhow::{Context, Result, bail, ensure};
use candle_core::quantized::gguf_file::Value;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use candle_doft::merge::Merge;
use candle_doft::{AdapterBuilder, frozen};
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

impl Stored {
    fn expanded(&self) -> Result<Tensor> {
        Ok(match self {
            Self::Dense(tensor) => tensor.clone(),
            Self::Quantized(tensor) => tensor.dequantize(&tensor.device())?,
        })
    }
}

/// The table of the embedding, and the head that may share it.
const TABLE: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// Whether a stored head differs from the table that it is said to share: then it counts, as in
/// transformers. One that is equal goes.
fn untied(tensors: &mut HashMap<String, Stored>) -> Result<bool> {
    let (Some(Stored::Dense(head)), Some(Stored::Dense(table))) =
        (tensors.get(HEAD), tensors.get(TABLE))
    else {
        return Ok(false);
    };
    let same = head.shape() == table.shape()
        && head.dtype() == table.dtype()
        && head
            .ne(table)?
            .to_dtype(DType::F32)?
            .sum_all()?
            .to_scalar::<f32>()?
            == 0.;
    if same {
        tensors.remove(HEAD);
        return Ok(false);
    }
    eprintln!(
        "note: the configuration ties the head to the embedding, but the model has a head of its own; it is used"
    );
    Ok(true)
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
        weights
            .check_finite()
            .with_context(|| path.display().to_string())?;
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
            for (name, tensor) in read {
                if tensors.contains_key(&name) {
                    bail!("tensor `{name}` is in two files of the model; fetch it again");
                }
                tensors.insert(name, Stored::Dense(tensor));
            }
        }
        let mut config = config;
        config.tied = config.tied && !untied(&mut tensors)?;
        Ok(Self {
            config,
            metadata: HashMap::new(),
            path: folder.to_path_buf(),
            tensors,
        })
    }

    fn from_gguf(file: &Path, device: &Device) -> Result<Self> {
        let (_, first) = gguf::open(file)?;
        let parts = gguf::parts(file, &first.metadata)?;
        // The first part has the metadata, whichever was named.
        let mut metadata = None;
        let (mut tensors, mut factors) = (HashMap::new(), None);
        let mut config: Option<Config> = None;
        for part in &parts {
            let (mut reader, content) = gguf::open(part)?;
            let config = match &config {
                Some(config) => config,
                None => config.insert(Config::from_gguf(&content.metadata)?),
            };
            for name in content.tensor_infos.keys() {
                let tensor = content.tensor(&mut reader, name, device);
                let tensor = tensor.with_context(|| format!("tensor `{name}` cannot be read"))?;
                if name == "rope_freqs.weight" {
                    factors = Some(tensor.dequantize(device)?.to_vec1()?);
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
                if tensors.insert(path, tensor).is_some() {
                    bail!("tensor `{name}` is in two parts of the model");
                }
            }
            metadata.get_or_insert(content.metadata);
        }
        let mut config = config.context("it has no parts")?;
        config.factors = factors;
        config.tied = !tensors.contains_key("lm_head.weight");
        Ok(Self {
            config,
            metadata: metadata.unwrap_or_default(),
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

    /// The same with adapters merged and their extra tensors in place; a quantized weight that one changes is
    /// expanded. A head that shares the table of the embedding gets one of its own where only one of the
    /// two is changed, as in PEFT.
    pub fn merged(mut self, merge: &Merge) -> Result<Self> {
        let table = match self.config.tied {
            true => Some(self.tensors[TABLE].clone()),
            false => None,
        };
        let names: Vec<String> = self.names().into_iter().map(str::to_string).collect();
        let mut changed = false;
        for name in names {
            let quantized = matches!(self.tensors.get(&name), Some(Stored::Quantized(_)));
            // Rows that a training run on other bits of the same model has are near enough.
            if let Some(merged) = merge.tensor(&name, &self.stored(&name)?, quantized)? {
                changed |= name == TABLE;
                self.tensors.insert(name, Stored::Dense(merged));
            }
        }
        if let Some(table) = table {
            let quantized = matches!(table, Stored::Quantized(_));
            let head = merge.tensor(HEAD, &table.expanded()?, quantized)?;
            if changed || head.is_some() {
                let head = head.map_or(table, Stored::Dense);
                self.tensors.insert(HEAD.to_string(), head);
                self.config.tied = false;
            }
        }
        merge.check_used()?;
        Ok(self)
    }

    /// The same with the extra tensors that an adapter trained beside its layers: they take the place of the
    /// model's own while the adapter runs unmerged.
    pub fn with_extras(mut self, builder: &AdapterBuilder) -> Result<Self> {
        for name in builder.unasked_extras() {
            let known = match (name.as_str(), self.config.tied) {
                (HEAD, true) => TABLE,
                (name, _) => name,
            };
            let base = self.stored(known)?;
            let extra = builder.extra(&name, &base.to_dtype(DType::F32)?)?;
            if name == TABLE && self.config.tied || name == HEAD {
                if name == TABLE {
                    let table = self.tensors[TABLE].clone();
                    self.tensors.entry(HEAD.to_string()).or_insert(table);
                }
                self.config.tied = false;
            }
            let extra = Stored::Dense(extra.as_tensor().detach());
            self.tensors.insert(name, extra);
        }
        Ok(self)
    }

    /// Refuses a model whose dense tensors hold what is no number: every answer would be made of it.
    fn check_finite(&self) -> Result<()> {
        for name in self.names() {
            let Some(Stored::Dense(tensor)) = self.tensors.get(name) else {
                continue;
            };
            if !tensor.dtype().is_float() {
                continue;
            }
            let sum: f32 = tensor.to_dtype(DType::F32)?.sum_all()?.to_scalar()?;
            if sum.is_finite() {
                continue;
            }
            // The sum of finite values may be beyond the range.
            let values = tensor
                .to_dtype(DType::F32)?
                .flatten_all()?
                .to_vec1::<f32>()?;
            if let Some(at) = values.iter().position(|value| !value.is_finite()) {
                bail!(
                    "tensor `{name}` holds {} at index {at}: the model is damaged; fetch it again",
                    values[at]
                );
            }
        }
        Ok(())
    }

    /// A number that tells one model from another of the same shape: of parts of all tensors.
    pub fn fingerprint(&self) -> Result<u32> {
        const ROWS: usize = 4;
        let mut sum = flate2::Crc::new();
        for name in self.names() {
            sum.update(name.as_bytes());
            let part = |tensor: &Tensor| -> Result<Vec<f32>> {
                let rows = tensor.dim(0)?;
                let tensor = tensor.narrow(0, rows / 2, ROWS.min(rows - rows / 2))?;
                Ok(tensor.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?)
            };
            match &self.tensors[name] {
                Stored::Dense(tensor) => {
                    for value in part(tensor)? {
                        sum.update(&value.to_le_bytes());
                    }
                }
                Stored::Quantized(tensor) => {
                    let data = tensor.data()?;
                    let middle = data.len() / 2;
                    sum.update(&data[middle..data.len().min(middle + 4096)]);
                }
            }
        }
        Ok(sum.sum())
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
            Some(tensor) => tensor.expanded(),
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
