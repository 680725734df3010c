//! A BERT encoder under any method, its embeddings frozen: one vector of length 1 for each text.

use crate::support::methods::{Tuned, TunerBuilder};
use anyhow::{Error, Result, anyhow};
use candle_core::{DType, Device, Tensor, safetensors};
use candle_doft::frozen;
use candle_nn::{Embedding, Module, VarBuilder};
use candle_transformers::models::bert::Config;
use std::path::Path;
use tokenizers::{PaddingParams, Tokenizer, TruncationParams};

/// What lies in a folder in Hugging Face layout.
pub struct Files {
    config: Config,
    weights: VarBuilder<'static>,
    tokenizer: Tokenizer,
}

/// Tokens of some texts, and which of them are no padding.
#[derive(Clone)]
pub struct Tokens {
    ids: Tensor,
    keep: Tensor,
}

impl Files {
    /// Texts are cut off after `length` tokens.
    pub fn open(folder: &Path, length: usize) -> Result<Self> {
        let file = folder.join("config.json");
        let wrong = |e: &dyn std::fmt::Display| {
            let what = "expected a BERT encoder's folder in Hugging Face layout";
            anyhow!("{}: {e}; {what}", file.display())
        };
        let text = std::fs::read(&file).map_err(|e| wrong(&e))?;
        let config = serde_json::from_slice(&text).map_err(|e| wrong(&e))?;
        let tensors = safetensors::load(folder.join("model.safetensors"), &Device::Cpu)?;
        let mut tokenizer =
            Tokenizer::from_file(folder.join("tokenizer.json")).map_err(Error::msg)?;
        let cut = TruncationParams {
            max_length: length,
            ..Default::default()
        };
        tokenizer.with_truncation(Some(cut)).map_err(Error::msg)?;
        tokenizer.with_padding(Some(PaddingParams::default()));
        Ok(Self {
            config,
            weights: VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu),
            tokenizer,
        })
    }

    pub fn tokens(&self, texts: &[&str]) -> Result<Tokens> {
        let found = self.tokenizer.encode_batch(texts.to_vec(), true);
        let found = found.map_err(Error::msg)?;
        let ids: Vec<&[u32]> = found.iter().map(|t| t.get_ids()).collect();
        let keep: Vec<&[u32]> = found.iter().map(|t| t.get_attention_mask()).collect();
        Ok(Tokens {
            ids: Tensor::new(ids, &Device::Cpu)?,
            keep: Tensor::new(keep, &Device::Cpu)?,
        })
    }
}

struct Block {
    query: Tuned,
    key: Tuned,
    value: Tuned,
    output: Tuned,
    norm: frozen::LayerNorm,
    up: Tuned,
    down: Tuned,
    mlp_norm: frozen::LayerNorm,
    heads: usize,
}

impl Block {
    fn new(c: &Config, builder: &TunerBuilder, vb: &VarBuilder) -> Result<Self> {
        let (hidden, wide) = (c.hidden_size, c.intermediate_size);
        let linear = |path: &str, from, to| -> Result<Tuned> {
            let at = vb.pp(path);
            let name = at.prefix();
            Ok(builder.wrap_linear(&name, candle_nn::linear(from, to, at)?)?)
        };
        let norm = |path| frozen::layer_norm(hidden, c.layer_norm_eps, vb.pp(path));
        Ok(Self {
            query: linear("attention.self.query", hidden, hidden)?,
            key: linear("attention.self.key", hidden, hidden)?,
            value: linear("attention.self.value", hidden, hidden)?,
            output: linear("attention.output.dense", hidden, hidden)?,
            norm: norm("attention.output.LayerNorm")?,
            up: linear("intermediate.dense", hidden, wide)?,
            down: linear("output.dense", wide, hidden)?,
            mlp_norm: norm("output.LayerNorm")?,
            heads: c.num_attention_heads,
        })
    }

    fn forward(&self, x: &Tensor, keep: &Tensor) -> candle_core::Result<Tensor> {
        let (batch, steps, hidden) = x.dims3()?;
        let shape = (batch, steps, self.heads, hidden / self.heads);
        let heads = |of: &Tuned| of.forward(x)?.reshape(shape)?.transpose(1, 2);
        let (q, k, v) = (heads(&self.query)?, heads(&self.key)?, heads(&self.value)?);
        let seen = frozen::attention(&q, &k, &v, Some(keep), (shape.3 as f64).powf(-0.5))?;
        let seen = seen.transpose(1, 2)?.reshape((batch, steps, hidden))?;
        let x = self.norm.forward(&(self.output.forward(&seen)? + x)?)?;
        let y = self.down.forward(&self.up.forward(&x)?.gelu_erf()?)?;
        self.mlp_norm.forward(&(y + x)?)
    }
}

pub struct Encoder {
    words: Embedding,
    positions: Tensor,
    kind: Tensor,
    norm: frozen::LayerNorm,
    blocks: Vec<Block>,
}

impl Encoder {
    pub fn new(files: &Files, builder: &TunerBuilder) -> Result<Self> {
        let (c, vb) = (&files.config, &files.weights);
        let inner = vb.pp("embeddings");
        let table = |name: &str, rows: usize| {
            let shape = (rows, c.hidden_size);
            inner.get(shape, &format!("{name}_embeddings.weight"))
        };
        let blocks = (0..c.num_hidden_layers)
            .map(|i| Block::new(c, builder, &vb.pp(format!("encoder.layer.{i}"))));
        Ok(Self {
            words: Embedding::new(table("word", c.vocab_size)?, c.hidden_size),
            positions: table("position", c.max_position_embeddings)?,
            kind: table("token_type", c.type_vocab_size)?.get(0)?,
            norm: frozen::layer_norm(c.hidden_size, c.layer_norm_eps, inner.pp("LayerNorm"))?,
            blocks: blocks.collect::<Result<_>>()?,
        })
    }

    pub fn forward(&self, tokens: &Tokens) -> candle_core::Result<Tensor> {
        let Tokens { ids, keep } = tokens;
        let x = self.words.forward(ids)?.broadcast_add(&self.kind)?;
        let x = x.broadcast_add(&self.positions.narrow(0, 0, ids.dim(1)?)?)?;
        let mut x = self.norm.forward(&x)?;
        for block in &self.blocks {
            x = block.forward(&x, keep)?;
        }
        let keep = keep.to_dtype(x.dtype())?.unsqueeze(2)?;
        let sum = x.broadcast_mul(&keep)?.sum(1)?;
        unit(&sum)
    }
}

/// Rows brought to length 1.
pub fn unit(rows: &Tensor) -> candle_core::Result<Tensor> {
    rows.broadcast_div(&rows.sqr()?.sum_keepdim(1)?.sqrt()?)
}
