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
use candle_core::{Device, Tensor, bail};
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

    /// Those of one position for each row, `(B, 1, head_dim / 2)`.
    fn tables_at(&self, positions: &[u32]) -> candle_core::Result<(Tensor, Tensor)> {
        let positions = Tensor::new(positions, self.cos.device())?;
        let part = |table: &Tensor| table.index_select(&positions, 0)?.unsqueeze(1);
        Ok((part(&self.cos)?, part(&self.sin)?))
    }
}

/// Tokens by which a cache grows.
const ROOM: usize = 256;

/// Keys and values of the tokens so far, for each block. They are written into room that is there, so
/// that a token copies none of those before it, and they hold no graph.
///
/// Rows of a batch may differ in length: shorter ones are padded behind their tokens. No token sees what comes
/// after it, so padding matters only to tokens that are decoded later, and these leave it out by `keep`.
#[derive(Default)]
pub struct Cache {
    blocks: Vec<KvCache>,
    /// For each row, which of the keys are those of its tokens.
    keep: Vec<Vec<u8>>,
}

/// Where the tokens of a pass stand.
struct Places {
    cos: Tensor,
    sin: Tensor,
    /// Which keys are no padding, where some are.
    keep: Option<Tensor>,
}

impl Cache {
    /// Keys of each row so far, with padding.
    pub fn len(&self) -> usize {
        self.keep.first().map_or(0, Vec::len)
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

    /// Goes on with some rows alone, in this order.
    pub fn retain(&mut self, rows: &[usize]) -> candle_core::Result<()> {
        let ids: Vec<u32> = rows.iter().map(|row| *row as u32).collect();
        for block in &mut self.blocks {
            if let (Some(k), Some(v)) = (block.k()?, block.v()?) {
                let ids = Tensor::new(ids.as_slice(), k.device())?;
                let kept = |of: Tensor| of.contiguous()?.index_select(&ids, 0);
                block.reset();
                block.append(&kept(k)?, &kept(v)?)?;
            }
        }
        self.keep = rows.iter().map(|row| self.keep[*row].clone()).collect();
        Ok(())
    }

    /// Takes in how many tokens each row gets of `steps`, and says where they stand.
    fn place(
        &mut self,
        tokens: &[usize],
        steps: usize,
        rotary: &Rotary,
    ) -> candle_core::Result<Places> {
        if self.keep.is_empty() {
            self.keep = vec![Vec::new(); tokens.len()];
        }
        let before = self.len();
        let count = |row: &Vec<u8>| row.iter().map(|kept| u32::from(*kept)).sum::<u32>();
        let positions: Vec<u32> = self.keep.iter().map(count).collect();
        for (row, tokens) in self.keep.iter_mut().zip(tokens) {
            row.resize(before + tokens, 1);
            row.resize(before + steps, 0);
        }
        let padded = positions
            .iter()
            .any(|position| *position as usize != before);
        if !padded {
            let (cos, sin) = rotary.tables(before, steps)?;
            return Ok(Places {
                cos,
                sin,
                keep: None,
            });
        }
        let one_each = steps == 1 && tokens.iter().all(|tokens| *tokens == 1);
        if !one_each || self.keep.len() != tokens.len() {
            bail!("rows of different lengths go on with one token each");
        }
        let (cos, sin) = rotary.tables_at(&positions)?;
        let keep = Tensor::from_vec(
            self.keep.concat(),
            (tokens.len(), before + 1),
            rotary.cos.device(),
        )?;
        Ok(Places {
            cos,
            sin,
            keep: Some(keep),
        })
    }
}

/// The cache, where to find the block in it, and the places of the new tokens.
type Cached<'a> = (&'a mut Cache, usize, &'a Places);

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
        cache: Option<Cached>,
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
            Some((cache, block, places)) => {
                let turned = |x| frozen::rope(x, &places.cos, &places.sin);
                let (k, v) = cache.extend(block, turned(&k)?, v)?;
                match &places.keep {
                    None => frozen::causal_attention(&turned(&q)?, &k, &v, scale)?,
                    // One query, which sees all keys.
                    Some(keep) => frozen::attention(&turned(&q)?, &k, &v, Some(keep), scale)?,
                }
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
        cache: Option<Cached>,
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

    /// The logits behind the last of some more tokens of each row, `(B, vocabulary)`; the cache grows by them.
    /// The first call may bring rows of any lengths; later ones bring as many tokens for each row, one if the
    /// lengths differ.
    pub fn next(&self, rows: &[&[u32]], cache: &mut Cache) -> candle_core::Result<Tensor> {
        let tokens: Vec<usize> = rows.iter().map(|row| row.len()).collect();
        let steps = tokens.iter().copied().max().unwrap_or(0);
        if tokens.contains(&0) || steps == 0 {
            bail!("every row needs a token");
        }
        let places = cache.place(&tokens, steps, &self.rotary)?;
        let padded = rows.iter().flat_map(|row| {
            let padding = std::iter::repeat_n(row[0], steps - row.len());
            row.iter().copied().chain(padding)
        });
        let ids = Tensor::from_vec(padded.collect(), (rows.len(), steps), &self.device)?;
        let mut x = self.embed(&ids)?;
        for (index, block) in self.blocks.iter().enumerate() {
            x = block.forward(&x, &self.rotary, Some((&mut *cache, index, &places)))?;
        }
        let last = tokens.iter().enumerate();
        let last: Vec<u32> = last.map(|(row, n)| (row * steps + n - 1) as u32).collect();
        let last = Tensor::new(last, &self.device)?;
        let last = x.flatten_to(1)?.index_select(&last, 0)?;
        self.logits(&self.norm.forward(&last)?)
    }
}
