//! One adapter file, merged into a base under either names.

use super::families::{Sizes, clip, flux, open_clip, sd3};
use super::spelling::{Spelling, Tensors, behind, diffusers, layers, original};
use super::support::golden::load;
use super::support::tensors::{CPU, bits, relative, seeded};
use super::tables::{sdxl, small_unet};
use candle_core::{DType, Tensor, safetensors};
use candle_doft::file::LoadOptions;
use candle_doft::merge::{CheckpointOptions, Merge, Strength};
use candle_nn::VarBuilder;
use candle_transformers::models::flux::{WithForward, model as of_flux};
use candle_transformers::models::mmdit::model as of_mmdit;
use std::collections::BTreeMap;
use std::path::Path;

pub const SMALL: Sizes = Sizes {
    hidden: 16,
    context: 24,
    pooled: 8,
    channels: 12,
    time: 256,
};

/// A file of OneTrainer that adapts all these layers, with block sizes that change from one to the next.
pub fn adapter(model: &[Spelling], name: impl Fn(&str) -> String) -> candle_core::Result<Tensors> {
    let mut tensors = Tensors::new();
    for (seed, (path, shape)) in layers(model).into_iter().enumerate() {
        let (seed, width) = (seed as u64, shape[1..].iter().product::<usize>());
        // Another size for each of q, k and v, where the width has it for a divisor.
        let first = "qkv"
            .find(&path[path.len() - 1..])
            .unwrap_or(seed as usize % 3);
        let sizes = [2, 4, 8].into_iter().cycle().skip(first);
        let b = sizes.take(3).find(|b| width % b == 0).unwrap();
        let module = name(&path);
        let theta = (seeded((width / b, b * (b - 1) / 2), seed) * 0.5)?;
        let factor = (seeded(shape[0], 500 + seed) * 0.2)?.to_dtype(DType::F32)?;
        tensors.insert(
            format!("{module}.oft_R.weight"),
            theta.to_dtype(DType::F32)?,
        );
        tensors.insert(format!("{module}.dora_log_multiplier"), factor);
        for marker in ["scaled_oft", "cans_oft"] {
            tensors.insert(format!("{module}.oft_R.{marker}"), Tensor::new(1f32, &CPU)?);
        }
    }
    Ok(tensors)
}

/// What a merge makes of a base, on disk and through a `VarBuilder`.
pub fn merged(file: &Path, base: &Tensors) -> candle_doft::Result<Tensors> {
    let home = tempfile::tempdir().unwrap();
    let (from, to) = (home.path().join("base"), home.path().join("merged"));
    safetensors::save(base, &from)?;
    let merge = Merge::new().with_file(file, &LoadOptions::default(), Strength::default())?;
    merge.checkpoint(&from, &to, CheckpointOptions::default())?;
    assert_eq!(merge.warnings(), []);
    let found: Tensors = load(&to)?.into_iter().collect();
    let vb = VarBuilder::from_tensors(base.clone(), DType::F32, &CPU);
    merge.build(vb, |vb| {
        for (name, tensor) in &found {
            let through = vb.get(tensor.shape(), name)?;
            assert_eq!(bits(&through), bits(tensor), "{name}");
        }
        candle_doft::Result::<()>::Ok(())
    })?;
    Ok(found)
}

/// Merging and converting are the same in either order; every weight changes, and nothing else does. The
/// converted base is merged with a file that has other names for the layers.
fn agrees(model: &[Spelling], name: impl Fn(&str) -> String) -> candle_doft::Result<()> {
    let home = tempfile::tempdir().unwrap();
    let file = |to: &str, tensors: Tensors| -> candle_doft::Result<_> {
        let file = home.path().join(to);
        safetensors::save(&tensors, &file)?;
        Ok(file)
    };
    let plain = file("plain", adapter(model, str::to_string)?)?;
    let file = file("named", adapter(model, name)?)?;
    let base = diffusers(model)?;
    let expected = original(model, &merged(&plain, &base)?)?;
    let base = original(model, &base)?;
    let found = merged(&file, &base)?;
    assert_eq!(found.len(), base.len());
    for spelling in model {
        let name = &spelling.tensor;
        assert!(relative(&found[name], &base[name]) > 1e-2, "{name}");
    }
    for (name, tensor) in &found {
        assert_eq!(bits(tensor), bits(&expected[name]), "{name}");
        if !model.iter().any(|spelling| spelling.tensor == *name) {
            assert_eq!(bits(tensor), bits(&base[name]), "{name}");
        }
    }
    Ok(())
}

/// As OneTrainer exports it: what is before the name, and all dots flattened.
fn flat(path: &str) -> String {
    let (component, name) = path.split_once('.').unwrap();
    let prefix = match component {
        "text_encoder" => "lora_te1",
        "text_encoder_2" => "lora_te2",
        "text_encoder_3" => "lora_te3",
        other => &format!("lora_{other}"),
    };
    format!("{prefix}_{}", name.replace('.', "_"))
}

#[test]
fn flux_agrees() -> candle_doft::Result<()> {
    // The parts of a fused weight have blocks of different sizes.
    let file = adapter(&flux(1, 1, true, SMALL), str::to_string)?;
    let rows = ["to_q", "to_k", "to_v"].map(|part| {
        let key = format!("transformer_blocks.0.attn.{part}.oft_R.weight");
        file[&key].dims()[0]
    });
    let different = rows[0] != rows[1] && rows[1] != rows[2] && rows[0] != rows[2];
    assert!(different, "{rows:?}");
    for prefix in ["", "model.diffusion_model."] {
        let model = behind(flux(2, 2, true, SMALL), prefix, "transformer.");
        agrees(&model, flat)?;
        agrees(&model, str::to_string)?;
    }
    Ok(())
}

#[test]
fn flux_agrees_with_its_text_encoders_in_one_file() -> candle_doft::Result<()> {
    let prefix = "text_encoders.clip_l.transformer.";
    let mut model = behind(
        flux(1, 1, false, SMALL),
        "model.diffusion_model.",
        "transformer.",
    );
    model.extend(behind(clip(2, 16, [30, 8]), prefix, "text_encoder."));
    for layer in ["layer.0.SelfAttention.q", "layer.1.DenseReluDense.wi_0"] {
        let path = format!("encoder.block.0.{layer}");
        let t5 = super::spelling::plain(format!("{path}.weight"), path, &[16, 16]);
        model.push(t5.behind("text_encoders.t5xxl.transformer.", "text_encoder_2."));
    }
    agrees(&model, flat)
}

#[test]
fn stable_diffusion_3_agrees() -> candle_doft::Result<()> {
    for dual in [0, 2] {
        let model = sd3(3, dual, SMALL);
        agrees(&behind(model.clone(), "", "transformer."), flat)?;
        let mut model = behind(model, "model.diffusion_model.", "transformer.");
        for (name, component) in [("clip_l", "text_encoder"), ("clip_g", "text_encoder_2")] {
            let prefix = format!("text_encoders.{name}.transformer.");
            model.extend(behind(
                clip(1, 16, [30, 8]),
                &prefix,
                &format!("{component}."),
            ));
        }
        agrees(&model, flat)?;
    }
    Ok(())
}

#[test]
fn stable_diffusion_1_and_2_agree() -> candle_doft::Result<()> {
    for linear in [false, true] {
        let unet = small_unet(&[1, 1, 0], linear, false)?;
        agrees(&behind(unet.clone(), "", "unet."), flat)?;
        let mut model = behind(unet, "model.diffusion_model.", "unet.");
        let (text, prefix) = match linear {
            false => (clip(2, 16, [30, 8]), "cond_stage_model.transformer."),
            true => (open_clip(2, 16, [30, 8], false), "cond_stage_model.model."),
        };
        model.extend(behind(text, prefix, "text_encoder."));
        agrees(&model, flat)?;
        agrees(&model, |path| flat(path).replace("lora_te1", "lora_te"))?;
    }
    Ok(())
}

#[test]
fn stable_diffusion_xl_agrees_with_both_text_encoders() -> candle_doft::Result<()> {
    let model = sdxl()?;
    agrees(&model, flat)?;
    agrees(&model, str::to_string)?;
    // transformers 5 calls the layers of the first encoder otherwise.
    agrees(&model, |path| {
        path.replace("text_encoder.text_model.", "text_encoder.")
    })?;
    // ComfyUI's names for the encoders.
    agrees(&model, |path| {
        let path = path.replace("text_encoder_2.", "text_encoders.clip_g.transformer.");
        path.replace("text_encoder.", "text_encoders.clip_l.transformer.")
    })
}

/// Backups of OneTrainer from before 2026-07 have the names of the original, and a number for each part.
#[test]
fn numbered_parts_of_a_fused_weight_agree() -> candle_doft::Result<()> {
    for model in [flux(1, 1, true, SMALL), sd3(2, 1, SMALL)] {
        let model = behind(model, "", "transformer.");
        let mut numbered = BTreeMap::new();
        for spelling in &model {
            let path = spelling.tensor.trim_end_matches(".weight");
            for (i, (layer, _)) in spelling.layers.iter().enumerate() {
                let part = match spelling.layers.len() {
                    1 => layer.clone(),
                    _ => format!("transformer.{path}.{i}"),
                };
                numbered.insert(layer.clone(), part);
            }
        }
        agrees(&model, |layer| numbered[layer].clone())?;
    }
    Ok(())
}

/// A model of candle runs the same on the merged `VarBuilder` as on the converted weights of the other base.
#[test]
fn candle_s_flux_runs_on_an_adapter_with_the_names_of_diffusers() -> candle_doft::Result<()> {
    let config = of_flux::Config {
        in_channels: SMALL.channels,
        vec_in_dim: SMALL.pooled,
        context_in_dim: SMALL.context,
        hidden_size: SMALL.hidden,
        mlp_ratio: 4.,
        num_heads: 2,
        depth: 1,
        depth_single_blocks: 1,
        axes_dim: vec![2, 2, 4],
        theta: 10_000,
        qkv_bias: true,
        guidance_embed: false,
    };
    let model = behind(flux(1, 1, false, SMALL), "", "transformer.");
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("adapter.safetensors");
    safetensors::save(&adapter(&model, flat)?, &file)?;
    let with_norms = |base: &Tensors| -> candle_core::Result<Tensors> {
        let mut base = original(&model, base)?;
        for block in [
            "double_blocks.0.img_attn",
            "double_blocks.0.txt_attn",
            "single_blocks.0",
        ] {
            for norm in ["query_norm", "key_norm"] {
                let name = format!("{block}.norm.{norm}.scale");
                base.insert(name, Tensor::ones(8, DType::F32, &CPU)?);
            }
        }
        Ok(base)
    };
    let run = |vb: VarBuilder| -> candle_core::Result<Tensor> {
        let model = of_flux::Flux::new(&config, vb)?;
        let tensor = |shape: &[usize], seed| seeded(shape, seed).to_dtype(DType::F32);
        let (image, text) = (
            tensor(&[1, 4, SMALL.channels], 1)?,
            tensor(&[1, 3, SMALL.context], 2)?,
        );
        let ids = |n: usize| Tensor::zeros((1, n, 3), DType::F32, &CPU);
        let time = Tensor::new(&[0.5f32], &CPU)?;
        let pooled = tensor(&[1, SMALL.pooled], 3)?;
        model.forward(&image, &ids(4)?, &text, &ids(3)?, &time, &pooled, None)
    };
    let vb = |tensors: Tensors| VarBuilder::from_tensors(tensors, DType::F32, &CPU);
    let base = diffusers(&model)?;
    let by_hand = run(vb(with_norms(&merged(&file, &base)?)?))?;
    let plain = run(vb(with_norms(&base)?))?;
    let merge = Merge::new().with_file(&file, &LoadOptions::default(), Strength::default())?;
    let found = merge.build(vb(with_norms(&base)?), run)?;
    assert_eq!(bits(&found), bits(&by_hand));
    assert!(relative(&found, &plain) > 1e-2);
    Ok(())
}

/// candle builds Stable Diffusion 3 behind a prefix, with a second attention where the weights have one.
#[test]
fn candle_s_stable_diffusion_3_is_built_behind_its_prefix() -> candle_doft::Result<()> {
    let config = of_mmdit::Config {
        patch_size: 2,
        in_channels: SMALL.channels,
        out_channels: SMALL.channels,
        depth: 2,
        head_size: SMALL.hidden / 2,
        adm_in_channels: SMALL.pooled,
        pos_embed_max_size: 4,
        context_embed_size: SMALL.context,
        frequency_embedding_size: SMALL.time,
    };
    let prefix = "model.diffusion_model";
    let model = behind(sd3(2, 1, SMALL), &format!("{prefix}."), "transformer.");
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("adapter.safetensors");
    safetensors::save(&adapter(&model, flat)?, &file)?;
    let mut base = original(&model, &diffusers(&model)?)?;
    let positions = Tensor::zeros((1, 16, SMALL.hidden), DType::F32, &CPU)?;
    base.insert(format!("{prefix}.pos_embed"), positions);
    let merge = Merge::new().with_file(&file, &LoadOptions::default(), Strength::default())?;
    let build = |tensors: &Tensors| {
        let vb = VarBuilder::from_tensors(tensors.clone(), DType::F32, &CPU);
        merge.build(vb.pp(prefix), |vb| {
            of_mmdit::MMDiT::new(&config, false, vb).map_err(candle_doft::Error::from)
        })
    };
    // Every layer of the adapter was asked for.
    build(&base)?;
    let last = format!("{prefix}.joint_blocks.1.x_block.mlp.fc2.weight");
    let wrong = base[&last].narrow(0, 0, 8)?;
    base.insert(last, wrong);
    assert!(build(&base).is_err());
    Ok(())
}
