//! One training step of a language model of SmolLM2-135M's shape with random weights: 4 sequences of 128
//! tokens, all linear layers of each block adapted.

use super::Run;
use crate::support::llm::config::{Architecture, Config};
use crate::support::llm::model::Model;
use crate::support::llm::weights::Weights;
use crate::support::methods::{Method, TunerBuilder};
use candle_core::{Device, Result, Shape, Tensor, Var};
use candle_doft::DoftConfig;
use candle_doft::rng::SplitMix64;
use std::collections::HashMap;
use std::collections::hash_map::Entry;

const SEQUENCES: usize = 4;
const TOKENS: usize = 128;

/// Layers of the whole model, and of one that is timed in a hurry, with fewer words as well.
pub const LAYERS: usize = 30;
pub const QUICK_LAYERS: usize = 2;

fn config(layers: usize) -> Config {
    Config {
        architecture: Architecture::Llama,
        hidden: 576,
        intermediate: 1536,
        layers,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        eps: 1e-5,
        theta: 1e5,
        scaling: None,
        factors: None,
        context: TOKENS,
        vocabulary: if layers < LAYERS { 4096 } else { 49_152 },
        tied: true,
    }
}

fn uniform(shape: impl Into<Shape>, bound: f32, rng: &mut SplitMix64) -> Result<Tensor> {
    let shape = shape.into();
    let mut value = || bound * (2. * rng.uniform() as f32 - 1.);
    let values = (0..shape.elem_count()).map(|_| value()).collect();
    Tensor::from_vec(values, shape, &Device::Cpu)
}

/// The linear layers of a block: name, width, outputs.
fn linears(c: &Config) -> [(&'static str, usize, usize); 7] {
    let (wide, narrow) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
    [
        ("self_attn.q_proj", c.hidden, wide),
        ("self_attn.k_proj", c.hidden, narrow),
        ("self_attn.v_proj", c.hidden, narrow),
        ("self_attn.o_proj", wide, c.hidden),
        ("mlp.gate_proj", c.hidden, c.intermediate),
        ("mlp.up_proj", c.hidden, c.intermediate),
        ("mlp.down_proj", c.intermediate, c.hidden),
    ]
}

/// Weights that the sides of a comparison share.
pub fn weights(layers: usize) -> Result<Weights> {
    let config = config(layers);
    let mut rng = SplitMix64::new(1);
    let mut tensors = HashMap::new();
    let ones = Tensor::ones(config.hidden, candle_core::DType::F32, &Device::Cpu)?;
    let table = uniform((config.vocabulary, config.hidden), 0.05, &mut rng)?;
    tensors.insert("model.embed_tokens.weight".to_string(), table);
    tensors.insert("model.norm.weight".into(), ones.clone());
    for layer in 0..layers {
        let path = format!("model.layers.{layer}");
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            tensors.insert(format!("{path}.{norm}.weight"), ones.clone());
        }
        for (name, width, out) in linears(&config) {
            let weight = uniform((out, width), (3. / width as f32).sqrt(), &mut rng)?;
            tensors.insert(format!("{path}.{name}.weight"), weight);
        }
    }
    Ok(Weights::from_tensors(config, tensors))
}

/// `doft` and `lora` train; `none` passes gradients through the whole model to its embedded tokens;
/// `gemm` is the bare products of the base weights and of attention, forward and backward.
pub fn run(method: &str, weights: &Weights) -> anyhow::Result<Run> {
    let mut rng = SplitMix64::new(2);
    let count = SEQUENCES * TOKENS;
    let mut ids = |_| rng.below(weights.config.vocabulary) as u32;
    let ids: Vec<u32> = (0..count).map(&mut ids).collect();
    let targets = Tensor::new(ids.as_slice(), &Device::Cpu)?;
    let ids = targets.reshape((SEQUENCES, TOKENS))?;
    let (rank, alpha) = (8, 8.);
    let method = match method {
        "gemm" => return Ok(products(weights)?),
        "doft" => Method::Doft(Box::default()),
        "oft" => Method::Doft(Box::new(DoftConfig::oft())),
        "lora" => Method::Lora { rank, alpha },
        "dora" => Method::Dora { rank, alpha },
        _ => Method::Frozen,
    };
    let frozen = matches!(method, Method::Frozen);
    let builder = TunerBuilder::new(method, 0, &Device::Cpu)?;
    let model = Model::new(weights, &builder, &Device::Cpu)?;
    let vars = builder.finish()?.named_vars();
    Ok(Box::new(move || {
        let mut embedded = model.embed(&ids)?;
        let tokens = Var::from_tensor(&embedded)?;
        if frozen {
            embedded = tokens.as_tensor().clone();
        }
        let hidden = model.hidden(&embedded, false)?.flatten_to(1)?;
        let grads = model.loss(&hidden, &targets)?.backward()?;
        let missing = vars.iter().find(|(_, var)| grads.get(var).is_none());
        assert!(missing.is_none() && (!frozen || grads.get(&tokens).is_some()));
        std::hint::black_box(grads);
        Ok(())
    }))
}

fn products(weights: &Weights) -> Result<Run> {
    let c = weights.config.clone();
    let rows = SEQUENCES * TOKENS;
    let mut rng = SplitMix64::new(3);
    let mut pairs = Vec::new();
    for layer in 0..c.layers {
        for (name, width, out) in linears(&c) {
            let path = format!("model.layers.{layer}.{name}.weight");
            let weight = weights.stored(&path).map_err(candle_core::Error::wrap)?;
            pairs.push((weight, width, out));
        }
    }
    let head = weights.stored("model.embed_tokens.weight");
    let head = head.map_err(candle_core::Error::wrap)?;
    pairs.push((head, c.hidden, c.vocabulary));
    let mut inputs: HashMap<usize, Tensor> = HashMap::new();
    for (_, width, out) in &pairs {
        for size in [*width, *out] {
            if let Entry::Vacant(place) = inputs.entry(size) {
                place.insert(uniform((rows, size), 1., &mut rng)?);
            }
        }
    }
    let heads = (SEQUENCES, c.heads, TOKENS, c.head_dim);
    let q = uniform(heads, 1., &mut rng)?;
    let p = uniform((SEQUENCES, c.heads, TOKENS, TOKENS), 1., &mut rng)?;
    Ok(Box::new(move || {
        for (weight, width, out) in &pairs {
            std::hint::black_box(inputs[width].matmul(&weight.t()?)?);
            std::hint::black_box(inputs[out].matmul(weight)?);
        }
        for _ in 0..c.layers {
            // Scores and their gradient, twice; output, dV, dQ and dK.
            for _ in 0..2 {
                std::hint::black_box(q.matmul(&q.t()?)?);
            }
            for _ in 0..4 {
                std::hint::black_box(p.matmul(&q)?);
            }
        }
        Ok(())
    }))
}
