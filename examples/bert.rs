//! A model to copy: a BERT encoder whose layers are built through an [`AdapterBuilder`], trained on a few
//! lines of text, saved, and loaded into candle-transformers' unmodified `BertModel`.

#[path = "support/mod.rs"]
mod support;

use anyhow::{Error, Result, anyhow, ensure};
use candle_core::{DType, Tensor, safetensors};
use candle_doft::merge::{Merge, Strength};
use candle_doft::{Adapter, AdapterBuilder, DoftConfig, DoftEmbedding, DoftLinear, Mode, frozen};
use candle_nn::{AdamW, Module, Optimizer, VarBuilder};
use candle_transformers::models::bert::{BertModel, Config};
use clap::Parser;
use std::path::PathBuf;
use support::device::DeviceName;

const WEATHER: [&str; 2] = ["rain falls on the hills", "a cold wind from the sea"];
const MONEY: [&str; 2] = ["shares fell after the report", "a loan with low interest"];

/// Trains a BERT encoder to bring texts on one matter together, and merges it into candle's own.
#[derive(Parser)]
struct Flags {
    /// A folder with `config.json`, `model.safetensors` and `tokenizer.json`.
    #[arg(long)]
    model: PathBuf,
    /// The adapter that is written.
    #[arg(long, default_value = "target/bert.safetensors")]
    out: PathBuf,
    /// Where to compute: cpu, cuda, cuda:N or metal
    #[arg(long, default_value_t, value_name = "DEVICE")]
    device: DeviceName,
}

struct Block {
    query: DoftLinear,
    key: DoftLinear,
    value: DoftLinear,
    output: DoftLinear,
    norm: frozen::LayerNorm,
    up: DoftLinear,
    down: DoftLinear,
    mlp_norm: frozen::LayerNorm,
    heads: usize,
}

impl Block {
    fn new(c: &Config, builder: &AdapterBuilder, vb: VarBuilder) -> candle_doft::Result<Self> {
        let (hidden, wide) = (c.hidden_size, c.intermediate_size);
        let linear = |path, from, to| builder.linear(from, to, vb.pp(path));
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
        let heads = |of: &DoftLinear| of.forward(x)?.reshape(shape)?.transpose(1, 2);
        let (q, k, v) = (heads(&self.query)?, heads(&self.key)?, heads(&self.value)?);
        let seen = frozen::attention(&q, &k, &v, Some(keep), (shape.3 as f64).powf(-0.5))?;
        let seen = seen.transpose(1, 2)?.reshape((batch, steps, hidden))?;
        let x = self.norm.forward(&(self.output.forward(&seen)? + x)?)?;
        let y = self.down.forward(&self.up.forward(&x)?.gelu_erf()?)?;
        self.mlp_norm.forward(&(y + x)?)
    }
}

struct Bert {
    tables: [DoftEmbedding; 3],
    norm: frozen::LayerNorm,
    blocks: Vec<Block>,
}

impl Bert {
    fn new(c: &Config, builder: &AdapterBuilder, vb: VarBuilder) -> candle_doft::Result<Self> {
        let inner = vb.pp("embeddings");
        let table = |name, rows| builder.embedding(rows, c.hidden_size, inner.pp(name));
        let block = |i| Block::new(c, builder, vb.pp(format!("encoder.layer.{i}")));
        let blocks: candle_doft::Result<_> = (0..c.num_hidden_layers).map(block).collect();
        let words = table("word_embeddings", c.vocab_size)?;
        let positions = table("position_embeddings", c.max_position_embeddings)?;
        let types = table("token_type_embeddings", c.type_vocab_size)?;
        Ok(Self {
            tables: [words, positions, types],
            norm: frozen::layer_norm(c.hidden_size, c.layer_norm_eps, inner.pp("LayerNorm"))?,
            blocks: blocks?,
        })
    }

    fn forward(&self, ids: &Tensor, keep: &Tensor) -> candle_core::Result<Tensor> {
        let positions = Tensor::arange(0, ids.dim(1)? as u32, ids.device())?;
        let x = (self.tables[0].forward(ids)? + self.tables[2].forward(&ids.zeros_like()?)?)?;
        let x = x.broadcast_add(&self.tables[1].forward(&positions)?)?;
        let mut x = self.norm.forward(&x)?;
        for block in &self.blocks {
            x = block.forward(&x, keep)?;
        }
        pooled(&x, keep)
    }
}

fn pooled(x: &Tensor, keep: &Tensor) -> candle_core::Result<Tensor> {
    let keep = keep.to_dtype(x.dtype())?.unsqueeze(2)?;
    let sum = x.broadcast_mul(&keep)?.sum(1)?;
    sum.broadcast_div(&sum.sqr()?.sum_keepdim(1)?.sqrt()?)
}

fn main() -> Result<()> {
    let flags = Flags::parse();
    let device = flags.device.open()?;
    let path = |name| flags.model.join(name);
    let file = path("config.json");
    let text = std::fs::read(&file).map_err(|e| anyhow!("{}: {e}", file.display()))?;
    let config: Config = serde_json::from_slice(&text)?;
    let tensors = safetensors::load(path("model.safetensors"), &device)?;
    let vb = VarBuilder::from_tensors(tensors, DType::F32, &device);
    let mut tokenizer =
        tokenizers::Tokenizer::from_file(path("tokenizer.json")).map_err(Error::msg)?;
    let tokenizer = tokenizer.with_padding(Some(Default::default()));
    let tokens = tokenizer.encode_batch([WEATHER, MONEY].concat(), true);
    let tokens = tokens.map_err(Error::msg)?;
    let ids: Vec<&[u32]> = tokens.iter().map(|t| t.get_ids()).collect();
    let keep: Vec<&[u32]> = tokens.iter().map(|t| t.get_attention_mask()).collect();
    let (ids, keep) = (Tensor::new(ids, &device)?, Tensor::new(keep, &device)?);
    let topics = Tensor::new(&[[1f32, 0.], [1., 0.], [0., 1.], [0., 1.]], &device)?;
    let builder = Adapter::builder(DoftConfig::default().with_targets("all-linear"), &device)?;
    let bert = Bert::new(&config, &builder, vb.clone())?;
    let adapter = builder.finish()?;
    let mut optimizer = AdamW::new_lr(adapter.vars(), 3e-3)?;
    for step in 1..=20 {
        let vectors = bert.forward(&ids, &keep)?;
        let apart = (vectors.matmul(&vectors.t()?)? - topics.matmul(&topics.t()?)?)?;
        let loss = apart.sqr()?.mean_all()?;
        let grads = loss.backward()?;
        adapter.check_gradients(&grads)?;
        optimizer.step(&grads)?;
        println!("step {step}: loss {:.4}", loss.to_scalar::<f32>()?);
    }
    adapter.save(&flags.out)?;
    let ours = adapter.with_mode(Mode::Eval, || bert.forward(&ids, &keep))?;
    let merge = Merge::new().with_file(&flags.out, &Default::default(), Strength::default())?;
    let merged = merge.build(vb, |vb| BertModel::load(vb, &config))?;
    let theirs = merged.forward(&ids, &ids.zeros_like()?, Some(&keep))?;
    let off = (ours - pooled(&theirs, &keep)?)?.abs()?.max_all()?;
    let off = off.to_scalar::<f32>()?;
    println!("largest difference to the merged BertModel: {off:e}");
    ensure!(off < 1e-4, "the merged model is another");
    Ok(())
}
