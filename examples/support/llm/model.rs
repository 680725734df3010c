//! A decoder of the Llama family that can be adapted: SmolLM2, Llama 2 and 3, Qwen2, 2.5 and 3.
//!
//! What makes it adaptable, compared with any candle model, is three things:
//!
//! * linear layers are built through `builder.wrap_linear(path, base)`. With DOFT alone the builder would be
//!   a `candle_doft::Adapter`, which has the same method; here it also speaks LoRA and DoRA;
//! * norms, rotary embedding, attention, gated product and loss are those of `candle_doft::frozen`,
//!   which pass gradients on where candle's cut the graph;
//! * the base weights never enter the graph, so the backward pass makes gradients for the adapter alone.
//!
//! Paths and rows are Hugging Face's, whatever file the weights came from.

use super::super::methods::{Tuned, TunerBuilder};
use super::config::{Architecture, Config};
use super::weights::Weights;
use anyhow::Result;
use candle_core::{Device, Tensor};
use candle_doft::frozen::{self, RmsNorm};
use candle_doft::train::recomputed;
use candle_nn::Module;
use candle_nn::kv_cache::KvCache;
use std::sync::Arc;

/// Positions as cosines and sines, `(context, head_dim / 2)` each.
#[derive(Clone)]
struct Rotary {
    cos: Tensor,
    sin: Tensor,
}

impl Rotary {
    fn new(config: &Config, device: &Device) -> Result<Self> {
        let frequencies = config.frequencies();
        let angles = (0..config.context)
            .flat_map(|t| frequencies.iter().map(move |f| (t as f64 * f) as f32));
        let angles: Vec<f32> = angles.collect();
        let angles = Tensor::from_vec(angles, (config.context, frequencies.len()), device)?;
        Ok(Self {
            cos: angles.cos()?,
            sin: angles.sin()?,
        })
    }

    /// Cosines and sines of the positions from `start` on.
    fn tables(&self, start: usize, steps: usize) -> candle_core::Result<(Tensor, Tensor)> {
        let part = |table: &Tensor| table.narrow(0, start, steps);
        Ok((part(&self.cos)?, part(&self.sin)?))
    }
}

/// Tokens by which a cache grows.
const ROOM: usize = 256;

/// Keys and values of the tokens so far, for each block. They are written into room that is there, so
/// that a token copies none of those before it, and they hold no graph.
#[derive(Default)]
pub struct Cache {
    blocks: Vec<KvCache>,
    tokens: usize,
}

impl Cache {
    /// Tokens so far.
    pub fn len(&self) -> usize {
        self.tokens
    }

    /// All keys and values of a block, the new ones behind those that are known.
    fn extend(
        &mut self,
        block: usize,
        k: Tensor,
        v: Tensor,
    ) -> candle_core::Result<(Tensor, Tensor)> {
        if block == self.blocks.len() {
            self.blocks.push(KvCache::new(2, ROOM));
        }
        self.blocks[block].append(&k.contiguous()?, &v.contiguous()?)
    }
}

struct Attention {
    q: Tuned,
    k: Tuned,
    v: Tuned,
    o: Tuned,
    norms: Option<(RmsNorm, RmsNorm)>,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

impl Attention {
    fn new(config: &Config, path: &str, weights: &Weights, builder: &TunerBuilder) -> Result<Self> {
        let (hidden, head_dim) = (config.hidden, config.head_dim);
        let (wide, narrow) = (config.heads * head_dim, config.kv_heads * head_dim);
        let linear = |name: &str, from, to| -> Result<Tuned> {
            let path = format!("{path}.{name}");
            Ok(builder.wrap_linear(&path, weights.linear(&path, from, to)?)?)
        };
        let norm = |name: &str| weights.norm(&format!("{path}.{name}"), head_dim);
        let norms = match config.architecture {
            Architecture::Qwen3 => Some((norm("q_norm")?, norm("k_norm")?)),
            _ => None,
        };
        Ok(Self {
            q: linear("q_proj", hidden, wide)?,
            k: linear("k_proj", hidden, narrow)?,
            v: linear("v_proj", hidden, narrow)?,
            o: linear("o_proj", wide, hidden)?,
            norms,
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim,
        })
    }

    fn forward(
        &self,
        x: &Tensor,
        rotary: &Rotary,
        cache: Option<(&mut Cache, usize)>,
    ) -> candle_core::Result<Tensor> {
        let (batch, steps, _) = x.dims3()?;
        let heads = |y: Tensor, count| y.reshape((batch, steps, count, self.head_dim));
        let mut q = heads(self.q.forward(x)?, self.heads)?;
        let mut k = heads(self.k.forward(x)?, self.kv_heads)?;
        let v = heads(self.v.forward(x)?, self.kv_heads)?.transpose(1, 2)?;
        if let Some((of_q, of_k)) = &self.norms {
            (q, k) = (of_q.forward(&q)?, of_k.forward(&k)?);
        }
        let (q, k) = (q.transpose(1, 2)?, k.transpose(1, 2)?);
        let scale = 1. / (self.head_dim as f64).sqrt();
        let y = match cache {
            None => {
                let (cos, sin) = rotary.tables(0, steps)?;
                frozen::rotary_causal_attention(&q, &k, &v, (&cos, &sin), scale)?
            }
            Some((cache, block)) => {
                let (cos, sin) = rotary.tables(cache.len(), steps)?;
                let turned = |x| frozen::rope(x, &cos, &sin);
                let (k, v) = cache.extend(block, turned(&k)?, v)?;
                frozen::causal_attention(&turned(&q)?, &k, &v, scale)?
            }
        };
        // The answer lies in memory as the projection wants it.
        let y = y.transpose(1, 2)?.reshape((batch, steps, ()))?;
        self.o.forward(&y)
    }
}

struct Mlp {
    gate: Tuned,
    up: Tuned,
    down: Tuned,
}

impl Mlp {
    fn new(config: &Config, path: &str, weights: &Weights, builder: &TunerBuilder) -> Result<Self> {
        let linear = |name: &str, from, to| -> Result<Tuned> {
            let path = format!("{path}.{name}");
            Ok(builder.wrap_linear(&path, weights.linear(&path, from, to)?)?)
        };
        let (hidden, wide) = (config.hidden, config.intermediate);
        Ok(Self {
            gate: linear("gate_proj", hidden, wide)?,
            up: linear("up_proj", hidden, wide)?,
            down: linear("down_proj", wide, hidden)?,
        })
    }

    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let gated = frozen::silu_mul(&self.gate.forward(x)?, &self.up.forward(x)?)?;
        self.down.forward(&gated)
    }
}

struct Block {
    before_attention: RmsNorm,
    attention: Attention,
    before_mlp: RmsNorm,
    mlp: Mlp,
}

impl Block {
    fn new(config: &Config, path: &str, weights: &Weights, builder: &TunerBuilder) -> Result<Self> {
        let norm = |name: &str| weights.norm(&format!("{path}.{name}"), config.hidden);
        Ok(Self {
            before_attention: norm("input_layernorm")?,
            attention: Attention::new(config, &format!("{path}.self_attn"), weights, builder)?,
            before_mlp: norm("post_attention_layernorm")?,
            mlp: Mlp::new(config, &format!("{path}.mlp"), weights, builder)?,
        })
    }

    fn forward(
        &self,
        x: &Tensor,
        rotary: &Rotary,
        cache: Option<(&mut Cache, usize)>,
    ) -> candle_core::Result<Tensor> {
        let normed = self.before_attention.forward(x)?;
        let attended = self.attention.forward(&normed, rotary, cache)?;
        let (x, normed) = self.before_mlp.forward_residual(x, &attended)?;
        x + self.mlp.forward(&normed)?
    }
}

/// The model.
pub struct Model {
    pub config: Config,
    embedding: frozen::Embedding,
    blocks: Vec<Arc<Block>>,
    norm: RmsNorm,
    head: frozen::Linear,
    rotary: Rotary,
    device: Device,
}

impl Model {
    /// Builds the model over its weights; the builder decides what is adapted.
    pub fn new(weights: &Weights, builder: &TunerBuilder, device: &Device) -> Result<Self> {
        let config = weights.config.clone();
        let embedding =
            weights.embedding("model.embed_tokens", config.vocabulary, config.hidden)?;
        let head = match config.tied {
            true => embedding.as_linear(),
            false => weights.linear("lm_head", config.hidden, config.vocabulary)?,
        };
        let blocks = (0..config.layers).map(|layer| {
            let path = format!("model.layers.{layer}");
            Block::new(&config, &path, weights, builder).map(Arc::new)
        });
        Ok(Self {
            embedding,
            blocks: blocks.collect::<Result<_>>()?,
            norm: weights.norm("model.norm", config.hidden)?,
            head,
            rotary: Rotary::new(&config, device)?,
            device: device.clone(),
            config,
        })
    }

    /// The embedded tokens, `(B, T, hidden)`.
    pub fn embed(&self, ids: &Tensor) -> candle_core::Result<Tensor> {
        self.embedding
            .forward(ids)?
            .to_dtype(candle_core::DType::F32)
    }

    /// The hidden states behind the last norm, `(B, T, hidden)`, for embedded tokens. With `again`, a
    /// block's activations are made again in the backward pass instead of kept.
    pub fn hidden(&self, embedded: &Tensor, again: bool) -> candle_core::Result<Tensor> {
        let mut x = embedded.clone();
        for block in &self.blocks {
            x = match again {
                false => block.forward(&x, &self.rotary, None)?,
                true => {
                    let (block, rotary) = (block.clone(), self.rotary.clone());
                    recomputed(&x, move |x| block.forward(x, &rotary, None))?
                }
            };
        }
        self.norm.forward(&x)
    }

    /// The linear layers that can be adapted, by path.
    pub fn linears(&self) -> Vec<(String, &Tuned)> {
        let mut all = Vec::new();
        for (index, block) in self.blocks.iter().enumerate() {
            let (attention, mlp) = (&block.attention, &block.mlp);
            for (name, layer) in [
                ("self_attn.q_proj", &attention.q),
                ("self_attn.k_proj", &attention.k),
                ("self_attn.v_proj", &attention.v),
                ("self_attn.o_proj", &attention.o),
                ("mlp.gate_proj", &mlp.gate),
                ("mlp.up_proj", &mlp.up),
                ("mlp.down_proj", &mlp.down),
            ] {
                all.push((format!("model.layers.{index}.{name}"), layer));
            }
        }
        all
    }

    /// The mean loss of the rows of `hidden` `(N, hidden)` whose next tokens are `targets` `(N)`.
    pub fn loss(&self, hidden: &Tensor, targets: &Tensor) -> candle_core::Result<Tensor> {
        frozen::linear_cross_entropy(hidden, &self.head, targets)
    }

    /// The logits of hidden states.
    pub fn logits(&self, hidden: &Tensor) -> candle_core::Result<Tensor> {
        self.head.forward(hidden)
    }

    /// The logits of the last of some more tokens, `(vocabulary)`; the cache grows by them.
    pub fn next(&self, ids: &[u32], cache: &mut Cache) -> candle_core::Result<Tensor> {
        let steps = ids.len();
        let ids = Tensor::new(ids, &self.device)?.unsqueeze(0)?;
        let mut x = self.embed(&ids)?;
        for (index, block) in self.blocks.iter().enumerate() {
            x = block.forward(&x, &self.rotary, Some((&mut *cache, index)))?;
        }
        cache.tokens += steps;
        let last = x.narrow(1, x.dim(1)? - 1, 1)?;
        self.logits(&self.norm.forward(&last)?)?.flatten_all()
    }
}
