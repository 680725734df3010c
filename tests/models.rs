//! Merged `VarBuilder`s on models of candle-transformers, which know nothing of this crate.

mod support;

use candle_core::{D, DType, Device, Result, Tensor, safetensors};
use candle_doft::file::LoadOptions;
use candle_doft::merge::{Merge, Strength};
use candle_doft::{Adapter, DoftConfig, DoftLinear};
use candle_nn::{Linear, VarBuilder, VarMap};
use candle_transformers::models::bert::{BertModel, Config as BertConfig};
use candle_transformers::models::llama::{Cache, Config as LlamaConfig, Llama};
use candle_transformers::models::stable_diffusion::unet_2d::{
    BlockConfig, UNet2DConditionModel, UNet2DConditionModelConfig,
};
use std::collections::HashMap;
use std::path::Path;
use support::tensors::{CPU, bits, disturb_all, relative, seeded, values};

type Tensors = HashMap<String, Tensor>;

fn vb(tensors: &Tensors) -> VarBuilder<'static> {
    VarBuilder::from_tensors(tensors.clone(), DType::F32, &CPU)
}

/// The tensors that a model asks for, seeded: matrices and kernels with rows of about unit norm.
fn weights(build: impl FnOnce(VarBuilder) -> Result<()>) -> Result<Tensors> {
    let varmap = VarMap::new();
    build(VarBuilder::from_varmap(&varmap, DType::F32, &CPU))?;
    let data = varmap.data().lock().unwrap();
    let mut names: Vec<&String> = data.keys().collect();
    names.sort();
    let mut tensors = Tensors::new();
    for (seed, name) in names.into_iter().enumerate() {
        let var = &data[name];
        let value = match var.rank() {
            1 => var.as_tensor().copy()?.detach(),
            _ => {
                let width: usize = var.dims()[1..].iter().product();
                (seeded(var.dims(), seed as u64) / (width as f64).sqrt())?.to_dtype(DType::F32)?
            }
        };
        tensors.insert(name.clone(), value);
    }
    Ok(tensors)
}

/// Adapts the named linear layers, away from their start.
fn adapt(tensors: &Tensors, paths: &[&str]) -> candle_doft::Result<(Adapter, Vec<DoftLinear>)> {
    let builder = Adapter::builder(DoftConfig::default().with_block_size(8), &CPU)?;
    let mut layers = Vec::new();
    for path in paths {
        let weight = tensors[&format!("{path}.weight")].clone();
        layers.push(builder.wrap(path, Linear::new(weight, None))?);
    }
    let adapter = builder.finish()?;
    disturb_all(adapter.vars(), 0.3)?;
    Ok((adapter, layers))
}

/// A model on the merged `VarBuilder` equals the model on weights merged by hand, and not its base.
fn check(
    tensors: &Tensors,
    paths: &[&str],
    run: impl Fn(VarBuilder) -> Result<Tensor>,
) -> candle_doft::Result<()> {
    let (adapter, layers) = adapt(tensors, paths)?;
    let mut by_hand = tensors.clone();
    for (path, layer) in paths.iter().zip(&layers) {
        by_hand.insert(format!("{path}.weight"), layer.effective_weight()?);
    }
    let expected = run(vb(&by_hand))?;
    assert_eq!(bits(&adapter.merged(vb(tensors), &run)?), bits(&expected));
    // From a file as well.
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("adapter.safetensors");
    adapter.save(&file)?;
    let merge = Merge::new().with_file(&file, &LoadOptions::default(), Strength::default())?;
    assert_eq!(bits(&merge.build(vb(tensors), &run)?), bits(&expected));
    assert!(
        relative(&run(vb(tensors))?, &expected) > 1e-3,
        "the adapter changes nothing"
    );
    Ok(())
}

fn run_bert(vb: VarBuilder, config: &BertConfig) -> Result<Tensor> {
    let model = BertModel::load(vb, config)?;
    let ids = Tensor::new(&[[3u32, 17, 29, 4, 1]], &CPU)?;
    model.forward(&ids, &ids.zeros_like()?, None)
}

const BERT: [&str; 3] = [
    "encoder.layer.0.attention.self.query",
    "encoder.layer.1.attention.output.dense",
    "encoder.layer.1.intermediate.dense",
];

#[test]
fn a_small_bert_runs_merged() -> candle_doft::Result<()> {
    let config = BertConfig {
        vocab_size: 40,
        hidden_size: 32,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        intermediate_size: 48,
        max_position_embeddings: 16,
        ..BertConfig::default()
    };
    let tensors = weights(|vb| BertModel::load(vb, &config).map(|_| ()))?;
    check(&tensors, &BERT, |vb| run_bert(vb, &config))
}

/// The real MiniLM, where a folder with its `model.safetensors` and `config.json` is at hand.
#[test]
fn the_real_minilm_runs_merged() -> candle_doft::Result<()> {
    let Some(folder) = std::env::var_os("CANDLE_DOFT_MINILM") else {
        println!("SKIPPED: set CANDLE_DOFT_MINILM to a folder with the model");
        return Ok(());
    };
    let folder = Path::new(&folder);
    let config = std::fs::read(folder.join("config.json")).unwrap();
    let config: BertConfig = serde_json::from_slice(&config).unwrap();
    let mut tensors = safetensors::load(folder.join("model.safetensors"), &Device::Cpu)?;
    tensors.retain(|_, tensor| tensor.dtype() == DType::F32);
    check(&tensors, &BERT, |vb| run_bert(vb, &config))
}

#[test]
fn a_small_llama_runs_merged() -> candle_doft::Result<()> {
    let config = LlamaConfig {
        hidden_size: 32,
        intermediate_size: 48,
        vocab_size: 40,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        use_flash_attn: false,
        rms_norm_eps: 1e-5,
        rope_theta: 1e4,
        bos_token_id: None,
        eos_token_id: None,
        rope_scaling: None,
        max_position_embeddings: 64,
        tie_word_embeddings: false,
    };
    let tensors = weights(|vb| Llama::load(vb, &config).map(|_| ()))?;
    let run = |vb: VarBuilder| {
        let model = Llama::load(vb, &config)?;
        let mut cache = Cache::new(false, DType::F32, &config, &CPU)?;
        model.forward(&Tensor::new(&[[3u32, 17, 29, 4]], &CPU)?, 0, &mut cache)
    };
    let paths = [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.mlp.down_proj",
        "lm_head",
    ];
    check(&tensors, &paths, run)
}

/// `W_flat blockdiag(R)` in f64, from OneTrainer's sides: kernels are turned the other way round.
fn turned(weight: &Tensor, theta: &Tensor, b: usize) -> Result<Tensor> {
    let divisor = 2. * ((b - 1) as f64).sqrt();
    let scaled: Vec<f64> = values(theta).iter().map(|v| v / divisor).collect();
    let r = support::naive::cayley(&scaled, b);
    let width: usize = weight.dims()[1..].iter().product();
    let rows = weight.dim(0)?;
    let (w, kernel) = (values(weight), weight.rank() == 4);
    let mut out = vec![0.; w.len()];
    for row in 0..rows {
        for column in 0..width {
            let (d, j) = (column / b, column % b);
            out[row * width + column] = (0..b)
                .map(|i| {
                    let (from, to) = if kernel { (i, j) } else { (j, i) };
                    w[row * width + d * b + i] * r[d * b * b + from * b + to]
                })
                .sum();
        }
    }
    Tensor::from_vec(out, weight.shape(), &CPU)?.to_dtype(DType::F32)
}

#[test]
fn a_small_unet_runs_merged_by_onetrainer_s_flattened_names() -> candle_doft::Result<()> {
    let block = |out_channels, cross| BlockConfig {
        out_channels,
        use_cross_attn: cross,
        attention_head_dim: 4,
    };
    let config = UNet2DConditionModelConfig {
        blocks: vec![block(32, Some(1)), block(32, None)],
        layers_per_block: 1,
        cross_attention_dim: 16,
        norm_num_groups: 8,
        ..UNet2DConditionModelConfig::default()
    };
    let build = |vb: VarBuilder| UNet2DConditionModel::new(vb, 4, 4, false, config.clone());
    let tensors = weights(|vb| build(vb).map(|_| ()))?;
    let (x, text) = (seeded((1, 4, 8, 8), 1), seeded((1, 3, 16), 2));
    let (x, text) = (x.to_dtype(DType::F32)?, text.to_dtype(DType::F32)?);
    let run = |vb: VarBuilder| build(vb)?.forward(&x, 7., &text);
    let b = 8;
    let mut adapter = Tensors::new();
    let mut by_hand = tensors.clone();
    for (seed, path) in [
        "down_blocks.0.resnets.0.conv1",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "mid_block.resnets.0.conv2",
        "up_blocks.1.attentions.0.proj_in",
    ]
    .into_iter()
    .enumerate()
    {
        let weight = &tensors[&format!("{path}.weight")];
        let width: usize = weight.dims()[1..].iter().product();
        let theta =
            (seeded((width / b, b * (b - 1) / 2), seed as u64) * 0.5)?.to_dtype(DType::F32)?;
        let module = format!("lora_unet_{}", path.replace('.', "_"));
        by_hand.insert(format!("{path}.weight"), turned(weight, &theta, b)?);
        adapter.insert(format!("{module}.oft_R.weight"), theta);
        for marker in ["scaled_oft", "cans_oft"] {
            adapter.insert(format!("{module}.oft_R.{marker}"), Tensor::new(1f32, &CPU)?);
        }
    }
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("unet.safetensors");
    safetensors::save(&adapter, &file)?;
    let merge = Merge::new().with_file(&file, &LoadOptions::default(), Strength::default())?;
    let found = merge.build(vb(&tensors), run)?;
    assert_eq!(found.dim(D::Minus1)?, 8);
    assert!(relative(&found, &run(vb(&by_hand))?) < 5e-6);
    assert!(relative(&found, &run(vb(&tensors))?) > 1e-3);
    Ok(())
}
