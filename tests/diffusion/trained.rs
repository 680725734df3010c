//! An adapter that was trained here, on layers with the names of diffusers: its fingerprints are of the
//! rows that each layer has in a fused weight.

use super::families::{flux, open_clip};
use super::merged::SMALL;
use super::spelling::{Spelling, Tensors, diffusers, layers, original};
use super::support::golden::load;
use super::support::tensors::{CPU, bits, disturb_all, relative};
use candle_core::{DType, Tensor, safetensors};
use candle_doft::file::LoadOptions;
use candle_doft::merge::{CheckpointOptions, Merge, Strength, inspect};
use candle_doft::{Adapter, DoftConfig, Magnitude};
use candle_nn::{Linear, VarBuilder};
use std::path::Path;

/// Adapts the layers whose paths hold one of these, away from their start, and saves them.
fn train(
    model: &[Spelling],
    base: &Tensors,
    targets: &[&str],
    magnitude: Magnitude,
    file: &Path,
) -> candle_doft::Result<()> {
    let config = DoftConfig::default().with_block_size(4);
    let builder = Adapter::builder(config.with_magnitude(magnitude), &CPU)?;
    for path in layers(model).keys() {
        if targets.iter().any(|target| path.contains(target)) {
            let weight = base[&format!("{path}.weight")].clone();
            builder.wrap(path, Linear::new(weight, None))?;
        }
    }
    let adapter = builder.finish()?;
    disturb_all(adapter.vars(), 0.2)?;
    adapter.save(file)?;
    Ok(())
}

fn save(base: &Tensors, home: &tempfile::TempDir) -> candle_doft::Result<std::path::PathBuf> {
    let path = home.path().join("base.safetensors");
    safetensors::save(base, &path)?;
    Ok(path)
}

#[test]
fn a_part_of_a_fused_weight_is_checked_and_turned_in_its_own_rows() -> candle_doft::Result<()> {
    let home = tempfile::tempdir().unwrap();
    let (file, to) = (home.path().join("adapter"), home.path().join("merged"));
    let model = flux(1, 1, false, SMALL);
    let base = diffusers(&model)?;
    let fused = original(&model, &base)?;
    let name = "single_blocks.0.linear1.weight";
    for magnitude in [Magnitude::Log, Magnitude::Absolute, Magnitude::Factor] {
        // Of four parts the second and the last.
        let targets = ["single_transformer_blocks.0.attn.to_k", "proj_mlp"];
        train(&model, &base, &targets, magnitude, &file)?;
        let from = save(&fused, &home)?;
        let merge = Merge::new().with_file(&file, &LoadOptions::default(), Strength::default())?;
        let report = merge.checkpoint(&from, &to, CheckpointOptions::default())?;
        assert_eq!(report.merged, [name]);
        let (before, after) = (&fused[name], &load(&to)?[name]);
        let h = SMALL.hidden;
        for (from, rows, stays) in [
            (0, h, true),
            (h, h, false),
            (2 * h, h, true),
            (3 * h, 4 * h, false),
        ] {
            let (before, after) = (before.narrow(0, from, rows)?, after.narrow(0, from, rows)?);
            match stays {
                true => assert_eq!(bits(&before), bits(&after), "from row {from}"),
                false => assert!(relative(&after, &before) > 1e-2, "from row {from}"),
            }
        }
        // Other rows than those of the training, beside parts that are as they were.
        let mut other = fused.clone();
        let values = before.narrow(0, h, h)?;
        let changed = (values.narrow(0, 0, h / 2)? * 1.5)?;
        let changed = Tensor::cat(&[&changed, &values.narrow(0, h / 2, h / 2)?], 0)?;
        let rest = before.narrow(0, 2 * h, 5 * h)?;
        let changed = Tensor::cat(&[&before.narrow(0, 0, h)?, &changed, &rest], 0)?;
        other.insert(name.into(), changed);
        let from = save(&other, &home)?;
        let error = merge.checkpoint(&from, &to, CheckpointOptions::default());
        let expected = "`transformer.single_transformer_blocks.0.attn.to_k` is not the base weight it was trained \
             on, by its row norms; `allow_changed_base` uses it all the same";
        let error = error.unwrap_err().to_string();
        assert!(error.ends_with(expected), "{error}");
        let found = inspect(&file, &LoadOptions::default(), Some(&from))?;
        let changed = found.layers.iter().filter(|layer| layer.mismatch.is_some());
        let changed: Vec<&str> = changed.map(|layer| layer.path.as_str()).collect();
        assert_eq!(changed, ["single_transformer_blocks.0.attn.to_k"]);
        let vb = VarBuilder::from_tensors(other, DType::F32, &CPU);
        let error = merge.build(vb, |vb| vb.get((7 * h, h), name));
        assert!(
            error
                .unwrap_err()
                .to_string()
                .contains("to_k` is not the base")
        );
    }
    Ok(())
}

/// One after the other, of different sorts: the whole weight by its own name, then parts of it by others.
#[test]
fn adapters_of_either_spelling_are_merged_in_their_order() -> candle_doft::Result<()> {
    let home = tempfile::tempdir().unwrap();
    let (whole, parts) = (home.path().join("whole"), home.path().join("parts"));
    let model = flux(1, 1, false, SMALL);
    let base = diffusers(&model)?;
    let fused = original(&model, &base)?;
    let (path, h) = ("double_blocks.0.img_attn.qkv", SMALL.hidden);
    let weight = &fused[&format!("{path}.weight")];
    let builder = Adapter::builder(DoftConfig::default().with_block_size(8), &CPU)?;
    let layer = builder.wrap(path, Linear::new(weight.clone(), None))?;
    let adapter = builder.finish()?;
    disturb_all(adapter.vars(), 0.2)?;
    adapter.save(&whole)?;
    train(
        &model,
        &base,
        &["transformer_blocks.0.attn.to_v"],
        Magnitude::Log,
        &parts,
    )?;
    let options = LoadOptions::default();
    let merge = Merge::new().with_file(&whole, &options, Strength::default())?;
    let merge = merge.with_file(&parts, &options, Strength::default())?;
    let vb = VarBuilder::from_tensors(fused, DType::F32, &CPU);
    let partial = merge.build(vb, |vb| {
        vb.get((7 * h, h), "single_blocks.0.linear1.weight")?;
        vb.get((3 * h, h), &format!("{path}.weight"))
    })?;
    let turned = layer.effective_weight()?;
    assert_eq!(
        bits(&partial.narrow(0, 0, 2 * h)?),
        bits(&turned.narrow(0, 0, 2 * h)?)
    );
    assert!(relative(&partial.narrow(0, 2 * h, h)?, &turned.narrow(0, 2 * h, h)?) > 1e-2);
    Ok(())
}

#[test]
fn a_transposed_weight_is_turned_and_stays_transposed() -> candle_doft::Result<()> {
    let home = tempfile::tempdir().unwrap();
    let (file, to) = (home.path().join("adapter"), home.path().join("merged"));
    let behind = |s: Spelling| s.behind("conditioner.embedders.1.model.", "text_encoder_2.");
    let model: Vec<Spelling> = open_clip(1, 16, [20, 8], true)
        .into_iter()
        .map(behind)
        .collect();
    let base = diffusers(&model)?;
    train(&model, &base, &["text_projection"], Magnitude::Log, &file)?;
    let from = save(&original(&model, &base)?, &home)?;
    let merge = Merge::new().with_file(&file, &LoadOptions::default(), Strength::default())?;
    merge.checkpoint(&from, &to, CheckpointOptions::default())?;
    let found = &load(&to)?["conditioner.embedders.1.model.text_projection"];
    let name = "text_encoder_2.text_projection";
    let merge = Merge::new().with_file(&file, &LoadOptions::default(), Strength::default())?;
    let expected = merge.weight(name, &base[&format!("{name}.weight")], false)?;
    let expected = expected.unwrap();
    assert_eq!(found.dims(), [16, 8]);
    assert_eq!(bits(&found.t()?.contiguous()?), bits(&expected));
    Ok(())
}
