//! The tables name every layer of candle's models, and no other.

use super::families::{Sizes, clip, flux, open_clip, sd3, unet_names};
use super::spelling::{How, Spelling, behind, layers, plain};
use super::support::tensors::CPU;
use candle_core::{DType, Device, Result, Shape, Tensor};
use candle_doft::merge::NameTable;
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use candle_transformers::models::flux::model as of_flux;
use candle_transformers::models::mmdit::model as of_mmdit;
use candle_transformers::models::stable_diffusion::clip as of_clip;
use candle_transformers::models::stable_diffusion::unet_2d::{
    BlockConfig, UNet2DConditionModel, UNet2DConditionModelConfig,
};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

type Shapes = BTreeMap<String, Vec<usize>>;

/// Notes what a model asks for; one number stands for each tensor, so that models of any size are built.
struct Recorder {
    seen: Arc<Mutex<Shapes>>,
    has: fn(&str) -> bool,
}

impl SimpleBackend for Recorder {
    fn get(&self, shape: Shape, name: &str, _: Init, dtype: DType, _: &Device) -> Result<Tensor> {
        let mut seen = self.seen.lock().unwrap();
        seen.insert(name.to_string(), shape.dims().to_vec());
        Tensor::zeros((), dtype, &CPU)?.broadcast_as(shape)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> Result<Tensor> {
        candle_core::bail!("no shape for {name}")
    }

    fn contains_tensor(&self, name: &str) -> bool {
        (self.has)(name)
    }
}

/// The weights with more than one axis that a model asks for.
fn record(has: fn(&str) -> bool, build: impl FnOnce(VarBuilder) -> Result<()>) -> Result<Shapes> {
    let seen = Arc::<Mutex<Shapes>>::default();
    let recorder = Recorder {
        seen: Arc::clone(&seen),
        has,
    };
    build(VarBuilder::from_backend(
        Box::new(recorder),
        DType::F32,
        CPU,
    ))?;
    let mut shapes = seen.lock().unwrap().clone();
    // A table of positions that is added, and no layer.
    shapes.retain(|name, shape| shape.len() > 1 && name != "pos_embed");
    Ok(shapes)
}

/// The table that is found by the names of the original has all of its layers, each with its rows.
fn complete(model: &[Spelling], family: &str) -> candle_doft::Result<()> {
    let table = NameTable::detect(model.iter().map(|spelling| spelling.tensor.as_str()));
    let table = table.expect("the family is found");
    assert_eq!(table.family(), family);
    for spelling in model {
        let parts = table.parts(&spelling.tensor, &spelling.shape())?;
        let parts = parts.unwrap_or_else(|| panic!("{} is not named", spelling.tensor));
        let mut at = 0;
        assert_eq!(parts.len(), spelling.layers.len());
        for (part, (path, shape)) in parts.iter().zip(&spelling.layers) {
            let rows = shape[0];
            let expected = match spelling.how {
                How::Swapped => vec![rows / 2..rows, 0..rows / 2],
                _ => std::iter::once(at..at + rows).collect(),
            };
            assert_eq!((&part.module, &part.rows), (path, &expected));
            assert_eq!(part.transposed, spelling.how == How::Turned);
            at += rows;
        }
    }
    Ok(())
}

/// The tensors of a model of the original, as candle builds it, are those that were written down.
fn same_tensors(found: &Shapes, model: &[Spelling]) {
    let tensors = model
        .iter()
        .map(|spelling| (spelling.tensor.clone(), spelling.shape()));
    assert_eq!(*found, tensors.collect::<Shapes>());
}

#[test]
fn every_layer_of_candle_s_flux_is_named() -> candle_doft::Result<()> {
    for config in [of_flux::Config::dev(), of_flux::Config::schnell()] {
        let sizes = Sizes {
            hidden: config.hidden_size,
            context: config.context_in_dim,
            pooled: config.vec_in_dim,
            channels: config.in_channels,
            time: 256,
        };
        let build = |vb: VarBuilder| of_flux::Flux::new(&config, vb).map(|_| ());
        let model = flux(
            config.depth,
            config.depth_single_blocks,
            config.guidance_embed,
            sizes,
        );
        same_tensors(&record(|_| false, build)?, &model);
        complete(&behind(model.clone(), "", "transformer."), "Flux")?;
        complete(
            &behind(model, "model.diffusion_model.", "transformer."),
            "Flux",
        )?;
    }
    Ok(())
}

#[test]
fn every_layer_of_candle_s_stable_diffusion_3_is_named() -> candle_doft::Result<()> {
    type Has = fn(&str) -> bool;
    let medium: Has = |name| {
        let block = name.split('.').nth(1).and_then(|i| i.parse::<usize>().ok());
        name.contains("attn2") && block.is_some_and(|block| block < 13)
    };
    for (config, has, dual) in [
        (of_mmdit::Config::sd3_medium(), (|_| false) as Has, 0),
        (of_mmdit::Config::sd3_5_medium(), medium, 13),
        (of_mmdit::Config::sd3_5_large(), |_| false, 0),
    ] {
        let sizes = Sizes {
            hidden: config.head_size * config.depth,
            context: config.context_embed_size,
            pooled: config.adm_in_channels,
            channels: config.in_channels,
            time: config.frequency_embedding_size,
        };
        let build = |vb: VarBuilder| of_mmdit::MMDiT::new(&config, false, vb).map(|_| ());
        let model = sd3(config.depth, dual, sizes);
        same_tensors(&record(has, build)?, &model);
        let prefix = "model.diffusion_model.";
        complete(&behind(model, prefix, "transformer."), "Stable Diffusion 3")?;
    }
    Ok(())
}

/// The U-Net of candle, which has the names of diffusers, in the spelling of the original. `levels` are
/// transformer blocks and channels.
pub fn unet(
    levels: &[(usize, usize)],
    layers: usize,
    linear: bool,
    conditioned: bool,
) -> Result<Vec<Spelling>> {
    let block = |(depth, channels): &(usize, usize)| BlockConfig {
        out_channels: *channels,
        use_cross_attn: (*depth > 0).then_some(*depth),
        attention_head_dim: 2,
    };
    let config = UNet2DConditionModelConfig {
        blocks: levels.iter().map(block).collect(),
        layers_per_block: layers,
        cross_attention_dim: 16,
        norm_num_groups: 4,
        use_linear_projection: linear,
        ..UNet2DConditionModelConfig::default()
    };
    let build = |vb: VarBuilder| UNet2DConditionModel::new(vb, 4, 4, false, config).map(|_| ());
    let mut found = record(|_| false, build)?;
    if conditioned {
        let time = 4 * levels[0].1;
        found.insert("add_embedding.linear_1.weight".into(), vec![time, 16]);
        found.insert("add_embedding.linear_2.weight".into(), vec![time, time]);
    }
    let depths: Vec<usize> = levels.iter().map(|level| level.0).collect();
    let mut model = Vec::new();
    for (new, old) in unet_names(&depths, layers, conditioned) {
        // Not every residual block changes its width.
        if let Some(shape) = found.remove(&format!("{new}.weight")) {
            model.push(plain(format!("{old}.weight"), new, &shape));
        }
    }
    assert!(found.is_empty(), "{:?}", found.keys());
    Ok(model)
}

/// A U-Net of one residual block in each level.
pub fn small_unet(depths: &[usize], linear: bool, conditioned: bool) -> Result<Vec<Spelling>> {
    let channels = [32, 64, 96];
    let levels: Vec<_> = depths.iter().copied().zip(channels).collect();
    unet(&levels, 1, linear, conditioned)
}

/// Stable Diffusion XL in one file, but small.
pub fn sdxl() -> Result<Vec<Spelling>> {
    let unet = unet(&[(0, 32), (2, 64), (3, 64)], 2, true, true)?;
    let mut model = behind(unet, "model.diffusion_model.", "unet.");
    let first = "conditioner.embedders.0.transformer.";
    model.extend(behind(clip(2, 16, [30, 8]), first, "text_encoder."));
    let second = open_clip(3, 24, [30, 8], true);
    model.extend(behind(
        second,
        "conditioner.embedders.1.model.",
        "text_encoder_2.",
    ));
    Ok(model)
}

#[test]
fn every_layer_of_candle_s_u_nets_is_named() -> candle_doft::Result<()> {
    let prefix = "model.diffusion_model.";
    let one = [(1, 320), (1, 640), (1, 1280), (0, 1280)];
    for linear in [false, true] {
        let model = unet(&one, 2, linear, false)?;
        complete(&behind(model, prefix, "unet."), "Stable Diffusion")?;
    }
    let model = unet(&[(0, 320), (2, 640), (10, 1280)], 2, true, true)?;
    assert_eq!(layers(&model).len(), 794);
    complete(&behind(model, prefix, "unet."), "Stable Diffusion")?;
    complete(&sdxl()?, "Stable Diffusion XL")?;
    for levels in [
        vec![(1, 32)],
        vec![(1, 32), (0, 32), (2, 64), (0, 64), (0, 64)],
    ] {
        for layers in [1, 2, 3] {
            let model = unet(&levels, layers, true, false)?;
            complete(&behind(model, "", "unet."), "Stable Diffusion")?;
        }
    }
    Ok(())
}

#[test]
fn every_layer_of_candle_s_text_encoders_is_named() -> candle_doft::Result<()> {
    let found = |config: of_clip::Config| {
        record(
            |_| false,
            |vb| of_clip::ClipTextTransformer::new(vb, &config).map(|_| ()),
        )
    };
    let same_layers = |found: Shapes, model: &[Spelling]| {
        let paths: BTreeSet<String> = found.into_keys().collect();
        let layers = layers(model)
            .into_keys()
            .filter(|path| path != "text_projection");
        assert_eq!(paths, layers.map(|path| format!("{path}.weight")).collect());
    };
    let l = clip(12, 768, [49408, 77]);
    same_tensors(&found(of_clip::Config::v1_5())?, &l);
    let prefix = "cond_stage_model.transformer.";
    complete(&behind(l.clone(), prefix, "text_encoder."), "text encoders")?;
    let prefix = "conditioner.embedders.0.transformer.";
    complete(&behind(l.clone(), prefix, "text_encoder."), "text encoders")?;
    let h = open_clip(23, 1024, [49408, 77], false);
    same_layers(found(of_clip::Config::v2_1())?, &h);
    complete(
        &behind(h, "cond_stage_model.model.", "text_encoder."),
        "text encoders",
    )?;
    let g = open_clip(32, 1280, [49408, 77], true);
    same_layers(found(of_clip::Config::sdxl2())?, &g);
    let prefix = "conditioner.embedders.1.model.";
    complete(&behind(g, prefix, "text_encoder_2."), "text encoders")?;
    // Checkpoints from before transformers had the level `text_model`.
    let old = l.into_iter().map(|mut spelling| {
        spelling.tensor = spelling.tensor.replace("text_model.", "");
        spelling
    });
    let prefix = "cond_stage_model.transformer.";
    complete(
        &behind(old.collect(), prefix, "text_encoder."),
        "text encoders",
    )
}

#[test]
fn other_checkpoints_have_no_table() {
    for names in [
        vec!["transformer_blocks.0.attn.to_q.weight", "proj_out.weight"],
        vec!["down_blocks.0.resnets.0.conv1.weight", "conv_in.weight"],
        vec!["model.layers.0.self_attn.q_proj.weight"],
        // Flux 2 has no modulation in its blocks.
        vec![
            "double_blocks.0.img_attn.qkv.weight",
            "single_blocks.0.linear1.weight",
        ],
        // A ControlNet has the first half of a U-Net.
        vec![
            "input_blocks.0.0.weight",
            "middle_block.0.in_layers.2.weight",
        ],
        vec![],
    ] {
        assert!(NameTable::detect(names).is_none());
    }
}

/// A file may say of a tensor without elements that its axes are of any length.
#[test]
fn shapes_of_any_size_are_taken_or_left() -> candle_doft::Result<()> {
    let sizes = Sizes {
        hidden: 16,
        context: 8,
        pooled: 8,
        channels: 4,
        time: 8,
    };
    let mut prefixed = behind(sd3(1, 0, sizes), "model.diffusion_model.", "transformer.");
    prefixed.extend(behind(
        open_clip(1, 8, [4, 4], true),
        "cond_stage_model.model.",
        "text_encoder.",
    ));
    let mut flux = flux(1, 1, true, sizes);
    flux.extend(behind(
        open_clip(1, 8, [4, 4], true),
        "conditioner.embedders.1.model.",
        "x.",
    ));
    for model in [prefixed, flux, sdxl()?] {
        let table = NameTable::detect(model.iter().map(|spelling| spelling.tensor.as_str()));
        let table = table.expect("the family is found");
        for spelling in model {
            for shape in [
                &[][..],
                &[0],
                &[0, 0],
                &[0, usize::MAX, 9],
                &[usize::MAX, 0],
                &[7, 1, 1],
            ] {
                for part in table.parts(&spelling.tensor, shape)?.into_iter().flatten() {
                    assert!(part.rows.iter().all(|rows| rows.start <= rows.end));
                    assert!(!part.transposed || shape.len() == 2);
                }
            }
        }
    }
    Ok(())
}
