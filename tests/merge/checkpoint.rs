//! Checkpoints on disk: what is written, what is kept byte for byte, and what stops a merge.

use super::support::golden::load;
use super::support::tensors::{CPU, bits, relative, seeded};
use super::{adapter, adapter_with, base, one};
use candle_core::{DType, Result, Tensor, safetensors};
use candle_doft::file::LoadOptions;
use candle_doft::merge::{CheckpointOptions, Merge, Strength};
use candle_doft::{DoftConfig, Magnitude};
use candle_nn::VarBuilder;
use std::collections::HashMap;
use std::path::PathBuf;

/// Where a base file is and where it is merged to.
fn paths(home: &tempfile::TempDir) -> (PathBuf, PathBuf) {
    let base = home.path().join("base.safetensors");
    (base, home.path().join("out"))
}

#[test]
fn merging_an_identity_adapter_reproduces_the_checkpoint_byte_for_byte() -> candle_doft::Result<()>
{
    let home = tempfile::tempdir().unwrap();
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for magnitude in [Magnitude::Log, Magnitude::Absolute, Magnitude::None] {
            let config = DoftConfig::default().with_magnitude(magnitude);
            let (from, to) = paths(&home);
            safetensors::save(&base(dtype)?, &from)?;
            let merge = Merge::new().with_adapter(&adapter(config, 0.)?, Strength::default())?;
            let report = merge.checkpoint(&from, &to, CheckpointOptions::default())?;
            assert_eq!((report.merged.len(), report.copied), (2, 3));
            assert_eq!(
                std::fs::read(&from).unwrap(),
                std::fs::read(&to).unwrap(),
                "{dtype:?}"
            );
        }
    }
    Ok(())
}

#[test]
fn a_folder_of_shards_is_merged_whole_and_its_other_files_come_along() -> candle_doft::Result<()> {
    let home = tempfile::tempdir().unwrap();
    let (from, to) = (home.path().join("model"), home.path().join("merged"));
    std::fs::create_dir(&from).unwrap();
    let (mut first, mut second) = (HashMap::new(), HashMap::new());
    for (name, tensor) in base(DType::F32)? {
        let shard = if name == "a.weight" {
            &mut first
        } else {
            &mut second
        };
        shard.insert(name, tensor);
    }
    safetensors::save(&first, from.join("model-00001-of-00002.safetensors"))?;
    safetensors::save(&second, from.join("model-00002-of-00002.safetensors"))?;
    std::fs::write(from.join("config.json"), b"{}").unwrap();
    let adapter = adapter(DoftConfig::default(), 0.5)?;
    let merge = Merge::new().with_adapter(&adapter, Strength::default())?;
    let mut seen = Vec::new();
    let mut progress = |done, total| seen.push((done, total));
    let mut options = CheckpointOptions::default();
    options.progress = Some(&mut progress);
    merge.checkpoint(&from, &to, options)?;
    assert_eq!(seen.len(), 5);
    assert_eq!(seen[4].0, seen[4].1);
    let a = load(&to.join("model-00001-of-00002.safetensors"))?
        .remove("a.weight")
        .unwrap();
    let expected = merge.weight("a", &first["a.weight"], false)?.unwrap();
    assert_eq!(bits(&a), bits(&expected));
    assert_eq!(std::fs::read(to.join("config.json")).unwrap(), b"{}");
    assert_eq!(
        std::fs::read_dir(&to).unwrap().count(),
        3,
        "nothing else is left"
    );
    // In place.
    merge.checkpoint(&from, &from, CheckpointOptions::default())?;
    let shard = "model-00001-of-00002.safetensors";
    assert_eq!(
        std::fs::read(from.join(shard)).unwrap(),
        std::fs::read(to.join(shard)).unwrap()
    );
    Ok(())
}

#[test]
fn what_does_not_fit_stops_before_anything_is_written() -> candle_doft::Result<()> {
    let home = tempfile::tempdir().unwrap();
    let (from, to) = paths(&home);
    let error = |tensors: HashMap<String, Tensor>, merge: &Merge| {
        safetensors::save(&tensors, &from).unwrap();
        let error = merge
            .checkpoint(&from, &to, CheckpointOptions::default())
            .unwrap_err();
        assert!(!to.exists());
        assert_eq!(
            std::fs::read_dir(home.path()).unwrap().count(),
            1,
            "{error}"
        );
        error
            .to_string()
            .replace(&home.path().display().to_string(), "HOME")
    };
    let trained =
        Merge::new().with_adapter(&adapter(DoftConfig::default(), 0.5)?, Strength::default())?;
    let mut less = base(DType::F32)?;
    less.remove("b.weight");
    assert_eq!(
        error(less, &trained),
        "the adapter: 1 of 2 layers and extra tensors match nothing in the model, the first is `b`; \
         the nearest are `a.weight`, `conv.weight`, `norm.weight`; is this the model it was trained on? \
         `allow_partial` goes on without them"
    );
    let mut other = base(DType::F32)?;
    other.insert(
        "a.weight".into(),
        (seeded((12, 32), 77).to_dtype(DType::F32)? * 3.)?,
    );
    assert_eq!(
        error(other.clone(), &trained),
        "the adapter: `a` is not the base weight it was trained on, by its row norms; \
         `allow_changed_base` uses it all the same"
    );
    let mut wrong = base(DType::F32)?;
    wrong.insert("a.weight".into(), seeded((12, 40), 7).to_dtype(DType::F32)?);
    let found = error(wrong, &trained);
    assert!(
        found.contains("tensor `a.oft_R.weight` has a base weight [12, 32] on record"),
        "{found}"
    );
    let mut nan = base(DType::F32)?;
    let mut values = nan["a.weight"].flatten_all()?.to_vec1::<f32>()?;
    values[5] = f32::NAN;
    nan.insert("a.weight".into(), Tensor::from_vec(values, (12, 32), &CPU)?);
    let mut options = CheckpointOptions::default();
    options.allow_changed_base = true;
    safetensors::save(&nan, &from)?;
    let found = trained
        .checkpoint(&from, &to, options)
        .unwrap_err()
        .to_string();
    assert_eq!(found, "the adapter: the merged `a` is not finite");
    // Allowed by flag.
    safetensors::save(&other, &from)?;
    let mut options = CheckpointOptions::default();
    options.allow_changed_base = true;
    trained.checkpoint(&from, &to, options)?;
    assert!(to.exists());
    Ok(())
}

#[test]
fn a_base_that_is_cut_short_is_refused() -> candle_doft::Result<()> {
    let home = tempfile::tempdir().unwrap();
    let (from, to) = paths(&home);
    let merge =
        Merge::new().with_adapter(&adapter(DoftConfig::default(), 0.5)?, Strength::default())?;
    safetensors::save(&base(DType::F32)?, &from)?;
    let bytes = std::fs::read(&from).unwrap();
    for length in [0, 5, 9, 100, bytes.len() - 1] {
        std::fs::write(&from, &bytes[..length]).unwrap();
        let found = merge
            .checkpoint(&from, &to, CheckpointOptions::default())
            .unwrap_err();
        assert!(
            found.to_string().contains("not a whole safetensors file"),
            "{found}"
        );
        assert!(!to.exists());
    }
    Ok(())
}

#[test]
fn a_tied_head_gets_a_weight_of_its_own_when_one_of_the_two_is_adapted() -> candle_doft::Result<()>
{
    let home = tempfile::tempdir().unwrap();
    let (from, to) = (home.path().join("model"), home.path().join("merged"));
    std::fs::create_dir(&from).unwrap();
    let table = seeded((10, 16), 1).to_dtype(DType::F32)?;
    let tensors = HashMap::from([("model.embed_tokens.weight", table.clone())]);
    safetensors::save(&tensors, from.join("model.safetensors"))?;
    std::fs::write(
        from.join("config.json"),
        br#"{"tie_word_embeddings": true, "x": 1}"#,
    )
    .unwrap();
    let index = r#"{"weight_map": {"model.embed_tokens.weight": "model.safetensors"}}"#;
    std::fs::write(from.join("model.safetensors.index.json"), index).unwrap();
    let theta = (seeded((2, 28), 3) * 0.4)?.to_dtype(DType::F32)?;
    let file = home.path().join("adapter.safetensors");
    for key in [
        "lm_head.oft_R.weight",
        "base_model.model.model.embed_tokens.oft_embedding_R.weight",
    ] {
        safetensors::save(&HashMap::from([(key, theta.clone())]), &file)?;
        let merge = one(&file, &LoadOptions::default(), Strength::default())?;
        let report = merge.checkpoint(&from, &to, CheckpointOptions::default())?;
        assert!(report.untied, "{key}");
        let merged = load(&to.join("model.safetensors"))?;
        let (head, embedding) = (
            &merged["lm_head.weight"],
            &merged["model.embed_tokens.weight"],
        );
        let (kept, changed) = match key.starts_with("lm_head") {
            true => (embedding, head),
            false => (head, embedding),
        };
        assert_eq!(bits(kept), bits(&table), "{key}");
        assert!(relative(changed, &table) > 1e-2, "{key}");
        let json = |name: &str| -> serde_json::Value {
            serde_json::from_slice(&std::fs::read(to.join(name)).unwrap()).unwrap()
        };
        let config = json("config.json");
        assert_eq!(
            (&config["tie_word_embeddings"], &config["x"]),
            (&false.into(), &1.into())
        );
        let index = json("model.safetensors.index.json");
        assert_eq!(index["weight_map"]["lm_head.weight"], "model.safetensors");
        std::fs::remove_dir_all(&to).unwrap();
    }
    Ok(())
}

#[test]
fn a_partial_merge_is_a_choice_and_says_what_it_left_out() -> candle_doft::Result<()> {
    let home = tempfile::tempdir().unwrap();
    let (from, file) = (
        home.path().join("base.safetensors"),
        home.path().join("adapter.safetensors"),
    );
    let mut tensors = base(DType::F32)?;
    tensors.remove("b.weight");
    safetensors::save(&tensors, &from)?;
    adapter(DoftConfig::default(), 0.5)?.save(&file)?;
    let output = home.path().join("out");
    let strict = one(&file, &LoadOptions::default(), Strength::default())?;
    assert!(
        strict
            .checkpoint(&from, &output, CheckpointOptions::default())
            .is_err()
    );
    let partial = LoadOptions::default().with_allow_partial(true);
    let merge = one(&file, &partial, Strength::default())?;
    let report = merge.checkpoint(&from, &output, CheckpointOptions::default())?;
    assert_eq!(report.merged, ["a.weight"]);
    let warnings: Vec<String> = merge.warnings().iter().map(ToString::to_string).collect();
    assert_eq!(warnings, ["`b`: it matches no weight and was not merged"]);
    // Asked of a `VarBuilder`, the same is told afterwards.
    let vb = VarBuilder::from_tensors(tensors, DType::F32, &CPU);
    let built = strict.build(vb, |vb| vb.get((12, 32), "a.weight"));
    let error = built.unwrap_err().to_string();
    assert!(
        error.ends_with(
            "the first is `b`; the nearest are `a`; is this the model it was trained on? `allow_partial` goes \
             on without them"
        ),
        "{error}"
    );
    Ok(())
}

#[test]
fn an_extra_tensor_that_the_base_lacks_is_added() -> candle_doft::Result<()> {
    let home = tempfile::tempdir().unwrap();
    let (from, to) = (home.path().join("model"), home.path().join("merged"));
    std::fs::create_dir(&from).unwrap();
    safetensors::save(&base(DType::F32)?, from.join("model.safetensors"))?;
    let index = from.join("model.safetensors.index.json");
    std::fs::write(
        &index,
        r#"{"metadata": {"total_size": 1}, "weight_map": {"a.weight": "model.safetensors"}}"#,
    )
    .unwrap();
    let head = seeded((3, 5), 8).to_dtype(DType::F32)?;
    let ones = Tensor::ones(12, DType::F32, &CPU)?;
    let extras = [("head.weight", &head), ("norm.weight", &ones)];
    let adapter = adapter_with(DoftConfig::default(), 0., &extras)?;
    let at = |s| Merge::new().with_adapter(&adapter, Strength::linear(s));
    let report = at(1.)?.checkpoint(&from, &to, CheckpointOptions::default())?;
    assert_eq!(report.added, ["head.weight"]);
    assert_eq!(report.merged.len(), 3);
    let merged = load(&to.join("model.safetensors"))?;
    assert_eq!(bits(&merged["head.weight"]), bits(&head));
    assert_eq!(merged["norm.weight"].to_vec1::<f32>()?, [1.; 12]);
    let text = std::fs::read(to.join("model.safetensors.index.json")).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&text).unwrap();
    assert_eq!(json["weight_map"]["head.weight"], "model.safetensors");
    assert_eq!(json["weight_map"]["a.weight"], "model.safetensors");
    let bytes = |t: &Tensor| t.elem_count() * t.dtype().size_in_bytes();
    let all: usize = merged.values().map(bytes).sum();
    assert_eq!(json["metadata"]["total_size"], all);
    // Of any strength but 0 it is there in full, and that is told.
    let half = at(0.5)?;
    half.checkpoint(&from, &to, CheckpointOptions::default())?;
    let told: Vec<String> = half.warnings().iter().map(ToString::to_string).collect();
    assert!(
        told.iter()
            .any(|t| t.contains("`head.weight`: the base has no such tensor"))
    );
    assert!(
        told.iter()
            .any(|t| t.starts_with("`norm.weight`: an extra tensor is there in full"))
    );
    at(0.)?.checkpoint(&from, &to, CheckpointOptions::default())?;
    assert!(!load(&to.join("model.safetensors"))?.contains_key("head.weight"));
    // Through a `VarBuilder`, with its shape checked.
    let tensors = base(DType::F32)?;
    at(1.)?.build(VarBuilder::from_tensors(tensors, DType::F32, &CPU), |vb| {
        assert_eq!(bits(&vb.get((3, 5), "head.weight")?), bits(&head));
        assert!(vb.get((5, 3), "head.weight").is_err());
        vb.get(12, "norm.weight")?;
        vb.get((12, 32), "a.weight")?;
        vb.get((8, 16), "b.weight")?;
        candle_doft::Result::Ok(())
    })
}

#[test]
fn an_index_that_is_none_stops_the_merge_and_leaves_no_folder() -> candle_doft::Result<()> {
    let home = tempfile::tempdir().unwrap();
    let (from, to) = (home.path().join("model"), home.path().join("new/merged"));
    std::fs::create_dir(&from).unwrap();
    safetensors::save(&base(DType::F32)?, from.join("model.safetensors"))?;
    let head = Tensor::ones((3, 5), DType::F32, &CPU)?;
    let adapter = adapter_with(DoftConfig::default(), 0.5, &[("head.weight", &head)])?;
    let merge = Merge::new().with_adapter(&adapter, Strength::default())?;
    for text in [r#"{"weight_map": "here"}"#, "{}", "[]", ""] {
        std::fs::write(from.join("model.safetensors.index.json"), text).unwrap();
        let error = merge.checkpoint(&from, &to, CheckpointOptions::default());
        let error = error.unwrap_err().to_string();
        assert!(error.contains("model.safetensors.index.json: "), "{error}");
        let left = std::fs::read_dir(home.path()).unwrap().count();
        assert_eq!(left, 1, "{text}: a folder is left");
    }
    Ok(())
}

#[test]
fn a_weight_goes_to_the_module_that_means_it_best() -> candle_doft::Result<()> {
    let home = tempfile::tempdir().unwrap();
    let (from, to) = (home.path().join("base"), home.path().join("merged"));
    let theta = (seeded((4, 28), 3) * 0.4)?.to_dtype(DType::F32)?;
    let file = home.path().join("adapter.safetensors");
    safetensors::save(
        &HashMap::from([("unet.a.oft_R.weight", theta.clone())]),
        &file,
    )?;
    let weight = base(DType::F32)?["a.weight"].clone();
    let merge = one(&file, &LoadOptions::default(), Strength::default())?;
    let tensors = HashMap::from([
        ("a.weight", weight.clone()),
        ("unet.a.weight", weight.clone()),
    ]);
    safetensors::save(&tensors, &from)?;
    let report = merge.checkpoint(&from, &to, CheckpointOptions::default())?;
    assert_eq!(report.merged, ["unet.a.weight"]);
    assert_eq!(bits(&load(&to)?["a.weight"]), bits(&weight));
    // Two that it means equally well are for the caller to tell apart.
    safetensors::save(&HashMap::from([("unet.a.b.oft_R.weight", theta)]), &file)?;
    let merge = one(&file, &LoadOptions::default(), Strength::default())?;
    let names = ["unet_a.b.weight", "unet.a_b.weight"];
    safetensors::save(
        &HashMap::from(names.map(|name| (name, weight.clone()))),
        &from,
    )?;
    let error = merge.checkpoint(&from, &to, CheckpointOptions::default());
    let error = error.unwrap_err().to_string();
    let expected = "`unet.a_b` and `unet_a.b` both mean `unet.a.b`; rename";
    assert!(error.ends_with(expected), "{error}");
    Ok(())
}

#[test]
fn a_loaded_adapter_that_was_trained_on_is_merged_as_it_is_now() -> candle_doft::Result<()> {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("adapter.safetensors");
    adapter(DoftConfig::default(), 0.5)?.save(&file)?;
    let tensors = base(DType::F32)?;
    let partial = LoadOptions::default().with_allow_partial(true);
    let loaded_builder = candle_doft::Adapter::load_with(&file, &CPU, &partial)?;
    let weight = tensors["a.weight"].clone();
    let layer = loaded_builder.wrap("a", candle_nn::Linear::new(weight, None))?;
    let loaded = loaded_builder.finish()?;
    let merged = || {
        let vb = VarBuilder::from_tensors(tensors.clone(), DType::F32, &CPU);
        loaded.merged(vb, |vb| -> Result<_> {
            let a = vb.get((12, 32), "a.weight")?;
            Ok((a, vb.get((8, 16), "b.weight")?))
        })
    };
    let (a, _) = merged()?;
    assert!(relative(&layer.effective_weight()?, &a) < 1e-6);
    for var in loaded.vars() {
        var.set(&(var.as_tensor() * 0.5)?)?;
    }
    assert!(relative(&a, &layer.effective_weight()?) > 1e-2);
    let (a, b) = merged()?;
    assert!(relative(&a, &layer.effective_weight()?) < 1e-6);
    assert_eq!(
        bits(&b),
        bits(&tensors["b.weight"]),
        "no layer of the model"
    );
    Ok(())
}
