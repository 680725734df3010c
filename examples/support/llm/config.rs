//! The shape of a model, from a `config.json` or from the metadata of a GGUF file.

use super::gguf::integer;
use anyhow::{Context, Result, bail, ensure};
use candle_core::quantized::gguf_file::Value;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;

/// The members of the family that differ in what their layers hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// SmolLM2, Llama 2 and 3.
    Llama,
    /// Qwen2 and 2.5: q, k and v have a bias.
    Qwen2,
    /// Qwen3: q and k are normalised head by head.
    Qwen3,
}

/// How Llama 3 stretches its positions: wave lengths above `original / low` are divided by `factor`,
/// those below `original / high` are kept, and between the two it goes over smoothly.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize)]
pub struct Scaling {
    pub factor: f64,
    #[serde(rename = "low_freq_factor")]
    pub low: f64,
    #[serde(rename = "high_freq_factor")]
    pub high: f64,
    /// Positions that the model was trained on before.
    #[serde(rename = "original_max_position_embeddings")]
    pub original: usize,
}

/// The shape of a model.
#[derive(Clone, Debug)]
pub struct Config {
    pub architecture: Architecture,
    pub hidden: usize,
    pub intermediate: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub eps: f64,
    pub theta: f64,
    pub scaling: Option<Scaling>,
    /// Factors that a GGUF file divides each frequency by, instead of a scaling.
    pub factors: Option<Vec<f32>>,
    pub context: usize,
    pub vocabulary: usize,
    pub tied: bool,
}

#[derive(Deserialize)]
struct HuggingFace {
    model_type: String,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    rms_norm_eps: f64,
    rope_theta: Option<f64>,
    rope_scaling: Option<serde_json::Value>,
    rope_parameters: Option<serde_json::Value>,
    quantization_config: Option<serde_json::Value>,
    layer_types: Option<Vec<String>>,
    partial_rotary_factor: Option<f64>,
    pretraining_tp: Option<usize>,
    max_position_embeddings: usize,
    vocab_size: usize,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    #[serde(default)]
    use_sliding_window: bool,
    hidden_act: Option<String>,
    /// Whatever else there is: a field that changes what the model computes may be among it.
    #[serde(flatten)]
    others: HashMap<String, serde_json::Value>,
}

/// Fields that say nothing about what a forward pass computes.
const HARMLESS: [&str; 32] = [
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "do_sample",
    "dtype",
    "eos_token_id",
    "finetuning_task",
    "id2label",
    "initializer_range",
    "is_llama_config",
    "keys_to_ignore_at_inference",
    "label2id",
    "max_length",
    "max_window_layers",
    "num_beams",
    "pad_token_id",
    "return_dict",
    "sliding_window",
    "temperature",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "unk_token_id",
    "use_cache",
];

impl HuggingFace {
    /// Returns an error for a field that is not read and may change what the model computes. One that is
    /// absent, false or empty changes nothing.
    fn check_others(&self) -> Result<()> {
        if let Some(found) = self.quantization_config.as_ref().filter(|v| !v.is_null()) {
            let method = found.get("quant_method").unwrap_or(found);
            bail!(
                "config.json: the weights are quantized (`quantization_config`: {method}), which is not \
                 supported; use the original weights or a GGUF file"
            );
        }
        let whole = |kind: &String| kind == "full_attention";
        if let Some(kind) = self.layer_types.iter().flatten().find(|kind| !whole(kind)) {
            bail!("config.json: layer_types has `{kind}`, expected full_attention alone");
        }
        ensure!(
            self.partial_rotary_factor.unwrap_or(1.) == 1. && self.pretraining_tp.unwrap_or(1) == 1,
            "config.json: partial_rotary_factor and pretraining_tp other than 1 are not supported"
        );
        let mut names: Vec<&String> = self.others.keys().collect();
        names.sort();
        for name in names {
            let nothing = match &self.others[name] {
                serde_json::Value::Null | serde_json::Value::Bool(false) => true,
                serde_json::Value::Array(values) => values.is_empty(),
                serde_json::Value::Object(values) => values.is_empty(),
                _ => false,
            };
            let known = HARMLESS.contains(&name.as_str()) || name.starts_with("unsloth");
            ensure!(
                nothing || known,
                "config.json: the field `{name}` is not known to this program and may change what the \
                 model computes; remove it if it does not"
            );
        }
        Ok(())
    }

    /// Base and scaling of the rotary embedding: of `rope_parameters`, as transformers 5 writes them, or
    /// of `rope_theta` and `rope_scaling`.
    fn rope(&self) -> Result<(f64, Option<Scaling>)> {
        let new = self.rope_parameters.as_ref().filter(|v| !v.is_null());
        let old = self.rope_scaling.as_ref().filter(|v| !v.is_null());
        let (name, values) = match (new, old) {
            (Some(values), _) => ("rope_parameters", Some(values)),
            (None, values) => ("rope_scaling", values),
        };
        let inner = match new.and_then(|values| values.get("rope_theta")) {
            Some(theta) => Some(
                theta
                    .as_f64()
                    .with_context(|| format!("config.json: {name}: rope_theta"))?,
            ),
            None => None,
        };
        let theta = match (inner, self.rope_theta) {
            (Some(inner), Some(outer)) if inner != outer => {
                bail!("config.json: rope_theta is {outer}, in rope_parameters it is {inner}")
            }
            (inner, outer) => inner.or(outer).unwrap_or(10_000.),
        };
        let Some(values) = values else {
            return Ok((theta, None));
        };
        let fraction = values
            .get("partial_rotary_factor")
            .map_or(Some(1.), |v| v.as_f64());
        ensure!(
            fraction == Some(1.),
            "config.json: {name}: partial_rotary_factor other than 1 is not supported"
        );
        let kind = values.get("rope_type").or_else(|| values.get("type"));
        match kind.and_then(|kind| kind.as_str()) {
            Some("llama3") => {
                let scaling = serde_json::from_value(values.clone());
                Ok((
                    theta,
                    Some(scaling.with_context(|| format!("config.json: {name}"))?),
                ))
            }
            Some("default") => Ok((theta, None)),
            Some(other) => {
                bail!("config.json: {name} is of type `{other}`, expected default or llama3")
            }
            None => bail!("config.json: {name} lacks `rope_type`, expected default or llama3"),
        }
    }
}

impl Config {
    /// From the text of a `config.json`.
    pub fn from_json(text: &str) -> Result<Self> {
        let found: HuggingFace = serde_json::from_str(text).context("config.json")?;
        let architecture = match found.model_type.as_str() {
            "llama" => Architecture::Llama,
            "qwen2" => Architecture::Qwen2,
            "qwen3" => Architecture::Qwen3,
            other => bail!("config.json: model_type `{other}`, expected llama, qwen2 or qwen3"),
        };
        ensure!(
            !(found.attention_bias || found.mlp_bias || found.use_sliding_window),
            "config.json: attention_bias, mlp_bias and use_sliding_window are not supported"
        );
        let activation = found.hidden_act.as_deref().unwrap_or("silu");
        ensure!(
            activation == "silu",
            "config.json: hidden_act `{activation}`, expected silu"
        );
        found.check_others()?;
        let (theta, scaling) = found.rope()?;
        let heads = found.num_attention_heads;
        let config = Self {
            architecture,
            hidden: found.hidden_size,
            intermediate: found.intermediate_size,
            layers: found.num_hidden_layers,
            heads,
            kv_heads: found.num_key_value_heads.unwrap_or(heads),
            head_dim: found.head_dim.unwrap_or(found.hidden_size / heads.max(1)),
            eps: found.rms_norm_eps,
            theta,
            scaling,
            factors: None,
            context: found.max_position_embeddings,
            vocabulary: found.vocab_size,
            tied: found.tie_word_embeddings,
        };
        config.checked()
    }

    /// From the metadata of a GGUF file. Whether the head is tied shows in the tensors: it is here until
    /// one is found.
    pub fn from_gguf(metadata: &HashMap<String, Value>) -> Result<Self> {
        let text = |key: &str| match metadata.get(key) {
            Some(Value::String(text)) => Ok(text.as_str()),
            _ => bail!("the GGUF file lacks `{key}`"),
        };
        let name = text("general.architecture")?;
        let architecture = match name {
            "llama" => Architecture::Llama,
            "qwen2" => Architecture::Qwen2,
            "qwen3" => Architecture::Qwen3,
            other => bail!("architecture `{other}`, expected llama, qwen2 or qwen3"),
        };
        check_gguf_keys(metadata, name)?;
        let value = |key: &str| metadata.get(&format!("{name}.{key}"));
        let optional = |key: &str| match value(key) {
            None => Ok(None),
            Some(value) => match integer(value) {
                Some(count) => Ok(Some(count)),
                None => bail!("the GGUF file's `{name}.{key}` is not one whole number"),
            },
        };
        let count = |key: &str| {
            optional(key)?.with_context(|| format!("the GGUF file lacks `{name}.{key}`"))
        };
        let number = |key: &str| match value(key) {
            None => Ok(None),
            Some(Value::F32(number)) => Ok(Some(f64::from(*number))),
            Some(Value::F64(number)) => Ok(Some(*number)),
            Some(_) => bail!("the GGUF file's `{name}.{key}` is no number"),
        };
        match value("rope.scaling.type") {
            None => {}
            Some(Value::String(kind)) if kind == "none" => {}
            Some(kind) => bail!("rope scaling {kind:?} of a GGUF file is not supported"),
        }
        let hidden = count("embedding_length")?;
        let heads = count("attention.head_count")?;
        let head_dim = optional("attention.key_length")?.unwrap_or(hidden / heads.max(1));
        for key in ["attention.value_length", "rope.dimension_count"] {
            let found = optional(key)?.unwrap_or(head_dim);
            ensure!(
                found == head_dim,
                "the GGUF file's `{name}.{key}` is {found}, expected {head_dim}, the size of a head"
            );
        }
        let tokens = match metadata.get("tokenizer.ggml.tokens") {
            Some(Value::Array(tokens)) => tokens.len(),
            _ => count("vocab_size")?,
        };
        let config = Self {
            architecture,
            hidden,
            intermediate: count("feed_forward_length")?,
            layers: count("block_count")?,
            heads,
            kv_heads: optional("attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
            eps: number("attention.layer_norm_rms_epsilon")?
                .with_context(|| format!("the GGUF file lacks the epsilon of `{name}`"))?,
            theta: number("rope.freq_base")?.unwrap_or(10_000.),
            scaling: None,
            factors: None,
            context: count("context_length")?,
            vocabulary: tokens,
            tied: true,
        };
        config.checked()
    }

    fn checked(self) -> Result<Self> {
        let sizes = [
            ("hidden size", self.hidden),
            ("intermediate size", self.intermediate),
            ("number of layers", self.layers),
            ("number of heads", self.heads),
            ("number of key heads", self.kv_heads),
            ("head size", self.head_dim),
            ("context", self.context),
            ("vocabulary", self.vocabulary),
        ];
        for (what, size) in sizes {
            ensure!(size > 0, "the model's {what} is 0");
        }
        ensure!(
            self.heads.is_multiple_of(self.kv_heads) && self.head_dim.is_multiple_of(2),
            "{} heads over {} key heads of size {} do not fit",
            self.heads,
            self.kv_heads,
            self.head_dim
        );
        Ok(self)
    }

    /// Bytes of activations in f32 that a training step keeps at least for each token: what the norms,
    /// products and the attention of each block read. `again` is with all but the input of a block made
    /// again in the backward pass.
    pub fn activation_bytes(&self, again: bool) -> usize {
        let (wide, narrow) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let block = 4 * self.hidden + 2 * wide + 2 * narrow + 3 * self.intermediate;
        let kept = match again {
            true => self.layers * self.hidden + block,
            false => self.layers * block,
        };
        kept * size_of::<f32>()
    }

    fn plain_frequencies(&self) -> impl Iterator<Item = f64> {
        let half = self.head_dim / 2;
        (0..half).map(move |i| self.theta.powf(-(i as f64) / half as f64))
    }

    /// The scaling whose factors a GGUF file holds, where it is one with Llama 3's bounds of 1 and 4.
    pub fn scaling_behind(&self, factors: &[f32]) -> Option<Scaling> {
        let factors = || factors.iter().map(|f| f64::from(*f));
        let (low, high, factor) = (1., 4., factors().fold(1., f64::max));
        let mut pairs = self.plain_frequencies().zip(factors());
        // One frequency between the bounds says where they are.
        let (frequency, between) = pairs.find(|(_, f)| *f > 1.01 && *f < 0.99 * factor)?;
        let share = (1. / between - 1. / factor) / (1. - 1. / factor);
        let original = std::f64::consts::TAU / frequency * (low + share * (high - low));
        let original = original.round() as usize;
        let found = Scaling {
            factor,
            low,
            high,
            original,
        };
        let mut pairs = self.plain_frequencies().zip(factors());
        let same = pairs.all(|(f, factor)| (f / found.apply(f) / factor - 1.).abs() < 1e-4);
        same.then_some(found)
    }

    /// The frequency of each pair of a head.
    pub fn frequencies(&self) -> Vec<f64> {
        let plain = self.plain_frequencies();
        match (&self.scaling, &self.factors) {
            (Some(scaling), _) => plain.map(|f| scaling.apply(f)).collect(),
            (None, Some(factors)) => {
                let pairs = plain.zip(factors);
                pairs.map(|(f, factor)| f / f64::from(*factor)).collect()
            }
            (None, None) => plain.collect(),
        }
    }
}

impl Scaling {
    fn apply(&self, frequency: f64) -> f64 {
        let length = std::f64::consts::TAU / frequency;
        let share = (self.original as f64 / length - self.low) / (self.high - self.low);
        let share = share.clamp(0., 1.);
        (1. - share) * frequency / self.factor + share * frequency
    }
}

/// Keys of an architecture that a GGUF file may have: those that are read, and those that say nothing
/// about what a forward pass computes.
const GGUF_KEYS: [&str; 15] = [
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "vocab_size",
    // Tensors in another order than llama.cpp's converter writes them; rows are told by the architecture.
    "tensor_data_layout",
    "rope.scaling.finetuned",
];

fn check_gguf_keys(metadata: &HashMap<String, Value>, architecture: &str) -> Result<()> {
    let mut unread: Vec<&str> = metadata
        .keys()
        .filter_map(|key| key.strip_prefix(architecture)?.strip_prefix('.'))
        .filter(|key| !GGUF_KEYS.contains(key))
        .collect();
    unread.sort_unstable();
    match unread.first() {
        None => Ok(()),
        Some(key) => bail!(
            "the GGUF file has `{architecture}.{key}`, which is not known to this program and may change what \
             the model computes"
        ),
    }
}
