//! What is not in a table is named, and nothing is written.

use super::families::flux;
use super::merged::{SMALL, adapter};
use super::spelling::{Spelling, Tensors, diffusers, original, plain};
use super::support::golden::load;
use super::support::tensors::{CPU, bits, seeded};
use candle_core::{DType, Tensor, safetensors};
use candle_doft::file::LoadOptions;
use candle_doft::merge::{CheckpointOptions, Merge, Strength, inspect};
use candle_nn::VarBuilder;
use std::path::PathBuf;

struct Place {
    home: tempfile::TempDir,
    model: Vec<Spelling>,
    base: Tensors,
}

impl Place {
    /// A small Flux, and an adapter of all its layers.
    fn new() -> candle_doft::Result<Self> {
        let model = flux(1, 1, false, SMALL);
        let base = original(&model, &diffusers(&model)?)?;
        let home = tempfile::tempdir().unwrap();
        let place = Self { home, model, base };
        place.save("base", &place.base)?;
        place.save("adapter", &adapter(&place.model, str::to_string)?)?;
        Ok(place)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    fn save(&self, name: &str, tensors: &Tensors) -> candle_doft::Result<()> {
        Ok(safetensors::save(tensors, self.path(name))?)
    }

    fn merge(&self, options: &LoadOptions) -> candle_doft::Result<Merge> {
        Merge::new().with_file(self.path("adapter"), options, Strength::default())
    }

    fn checkpoint(&self, merge: &Merge) -> candle_doft::Result<()> {
        let to = self.path("merged");
        let done = merge.checkpoint(self.path("base"), &to, CheckpointOptions::default());
        assert_eq!(to.exists(), done.is_ok());
        done.map(|_| ())
    }

    /// The error of merging on disk, without the name of the folder.
    fn error(&self) -> String {
        let merge = self.merge(&LoadOptions::default()).unwrap();
        let error = self.checkpoint(&merge).unwrap_err().to_string();
        error.replace(&format!("{}/", self.home.path().display()), "")
    }

    /// The error of a `VarBuilder` that is asked for every tensor.
    fn through_vb(&self) -> candle_doft::Result<()> {
        let tensors: Tensors = load(&self.path("base"))?.into_iter().collect();
        let vb = VarBuilder::from_tensors(tensors.clone(), DType::F32, &CPU);
        self.merge(&LoadOptions::default())?.build(vb, |vb| {
            for (name, tensor) in &tensors {
                vb.get(tensor.shape(), name)?;
            }
            Ok(())
        })
    }
}

#[test]
fn a_layer_that_the_table_lacks_is_named() -> candle_doft::Result<()> {
    let place = Place::new()?;
    let mut base = place.base.clone();
    let strange = seeded((16, 16), 1).to_dtype(DType::F32)?;
    base.insert("double_blocks.0.img_gate.weight".into(), strange.clone());
    place.save("base", &base)?;
    let expected = "`double_blocks.0.img_gate.weight` is not in the table of names for Flux, so what an \
         adapter calls it is not known; name it in a table of your own (`NameTable::load`, `--names FILE`)";
    assert_eq!(place.error(), expected);
    assert_eq!(place.through_vb().unwrap_err().to_string(), expected);
    let found = inspect(
        place.path("adapter"),
        &LoadOptions::default(),
        Some(&place.path("base")),
    )?;
    let told = found.warnings.iter().map(ToString::to_string);
    let expected = "`double_blocks.0.img_gate.weight`: the table of names for Flux lacks it";
    assert_eq!(told.collect::<Vec<_>>(), [expected]);
    // Other parts of a checkpoint, vectors, and tensors that are no layers are none of its business.
    base.remove("double_blocks.0.img_gate.weight");
    base.insert("vae.decoder.conv_in.weight".into(), strange.clone());
    base.insert(
        "first_stage_model.decoder.conv_in.weight".into(),
        strange.clone(),
    );
    base.insert(
        "double_blocks.0.norm.weight".into(),
        seeded(16, 2).to_dtype(DType::F32)?,
    );
    base.insert("pos_embed".into(), strange);
    place.save("base", &base)?;
    place.through_vb()?;
    place.checkpoint(&place.merge(&LoadOptions::default())?)
}

#[test]
fn a_weight_that_cannot_be_parted_is_named() -> candle_doft::Result<()> {
    let place = Place::new()?;
    let mut base = place.base.clone();
    let name = "double_blocks.0.txt_attn.qkv.weight";
    base.insert(name.into(), seeded((49, 16), 1).to_dtype(DType::F32)?);
    place.save("base", &base)?;
    // Asked for by a layer of its own, or by no layer at all.
    let error = place.error();
    assert!(
        error.contains("the first is `transformer_blocks.0.attn.add_k_proj`"),
        "{error}"
    );
    place.save("adapter", &adapter(&place.model[..1], str::to_string)?)?;
    let error = place.error();
    assert!(
        error.starts_with(&format!("`{name}` is not in the table of names for Flux")),
        "{error}"
    );
    Ok(())
}

#[test]
fn a_module_that_the_table_does_not_know_is_named() -> candle_doft::Result<()> {
    let place = Place::new()?;
    let more = plain("", "transformer_blocks.7.attn.to_q", &[16, 16]);
    let more = [place.model.clone(), vec![more]].concat();
    place.save("adapter", &adapter(&more, str::to_string)?)?;
    let expected = "adapter: 1 of 29 layers and extra tensors match nothing in the model, the first is \
         `transformer_blocks.7.attn.to_q`; the nearest are `transformer.transformer_blocks.0.attn.to_q`, \
         `transformer.transformer_blocks.0.attn.to_k`, `transformer.transformer_blocks.0.attn.to_v`; is this";
    let error = place.error();
    assert!(error.starts_with(expected), "{error}");
    let error = place.through_vb().unwrap_err().to_string();
    assert!(
        error.contains("the first is `transformer_blocks.7.attn.to_q`"),
        "{error}"
    );
    // Left out by choice, with a warning.
    let merge = place.merge(&LoadOptions::default().with_allow_partial(true))?;
    place.checkpoint(&merge)?;
    let told: Vec<String> = merge.warnings().iter().map(ToString::to_string).collect();
    let expected = "`transformer_blocks.7.attn.to_q`: it matches no weight and was not merged";
    assert_eq!(told, [expected]);
    Ok(())
}

#[test]
fn two_modules_for_one_part_are_named() -> candle_doft::Result<()> {
    let place = Place::new()?;
    let one = &place.model[..1];
    let mut both = adapter(one, |path| format!("lora_unet_{path}"))?;
    both.extend(adapter(one, |path| format!("lora_transformer_{path}"))?);
    place.save("adapter", &both)?;
    let expected = "adapter: `lora_transformer_x_embedder` and `lora_unet_x_embedder` both mean \
         `transformer.x_embedder`; choose a component, or rename";
    let error = place.error();
    assert_eq!(error, expected);
    Ok(())
}

/// The bias of a layer that the base calls otherwise would be added beside the one that it replaces.
#[test]
fn an_extra_tensor_of_a_translated_layer_is_refused() -> candle_doft::Result<()> {
    let place = Place::new()?;
    let folder = place.path("adapter");
    std::fs::remove_file(&folder).unwrap();
    std::fs::create_dir(&folder).unwrap();
    let config = r#"{"peft_type": "OFT", "oft_block_size": 4, "bias": "oft_only", "peft_version": "0.18.0"}"#;
    std::fs::write(folder.join("adapter_config.json"), config).unwrap();
    let path = "base_model.model.transformer_blocks.0.attn.to_q";
    let theta = (seeded((4, 6), 1) * 0.3)?.to_dtype(DType::F32)?;
    let bias = Tensor::ones(16, DType::F32, &CPU)?;
    let tensors = Tensors::from([
        (format!("{path}.oft_R.weight"), theta.clone()),
        (format!("{path}.base_layer.bias"), bias),
    ]);
    safetensors::save(&tensors, folder.join("adapter_model.safetensors"))?;
    let error = place.error();
    let expected = "the checkpoint has `transformer_blocks.0.attn.to_q.bias` under another name, and extra \
         tensors are not translated; merge into a base with the names of the adapter";
    assert!(error.ends_with(expected), "{error}");
    assert!(place.through_vb().is_err());
    // Without it the layer alone is merged, in its rows.
    let tensors = Tensors::from([(format!("{path}.oft_R.weight"), theta)]);
    safetensors::save(&tensors, folder.join("adapter_model.safetensors"))?;
    place.checkpoint(&place.merge(&LoadOptions::default())?)?;
    let name = "double_blocks.0.img_attn.qkv";
    let merged = load(&place.path("merged"))?;
    let (bias, weight) = (format!("{name}.bias"), format!("{name}.weight"));
    assert_eq!(bits(&merged[&bias]), bits(&place.base[&bias]));
    let rest = |tensor: &Tensor| tensor.narrow(0, 16, 32).map(|rows| bits(&rows));
    assert_eq!(rest(&merged[&weight])?, rest(&place.base[&weight])?);
    Ok(())
}

/// An adapter with the names of the checkpoint needs no table, whatever else the checkpoint has.
#[test]
fn names_of_the_checkpoint_need_no_table() -> candle_doft::Result<()> {
    let place = Place::new()?;
    let mut base = place.base.clone();
    let strange = seeded((16, 16), 1).to_dtype(DType::F32)?;
    base.insert("double_blocks.0.img_gate.weight".into(), strange);
    place.save("base", &base)?;
    let whole = plain("", "double_blocks.0.img_attn.qkv", &[48, 16]);
    place.save(
        "adapter",
        &adapter(&[whole], |path| format!("diffusion_model.{path}"))?,
    )?;
    place.checkpoint(&place.merge(&LoadOptions::default())?)?;
    place.through_vb()
}
