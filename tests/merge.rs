//! Merging: every golden file gives the merged weight of its tool, on disk and through a
//! `VarBuilder`; the rest of a checkpoint stays as it is.

mod support;

use candle_core::{DType, Result, Tensor, safetensors};
use candle_doft::file::{Divisor, LoadOptions};
use candle_doft::merge::{CheckpointOptions, Merge, Strength};
use candle_doft::{Adapter, DoftConfig, Magnitude, Map};
use candle_nn::{Linear, VarBuilder};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use support::tensors::{CPU, bits, relative, seeded};
use support::tolerance::GOLDEN_WEIGHTS;

fn golden(tool: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(tool)
}

fn load(path: &Path) -> Result<BTreeMap<String, Tensor>> {
    Ok(safetensors::load(path, &CPU)?.into_iter().collect())
}

fn cases(tool: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(golden(tool))
        .unwrap()
        .map(|e| e.unwrap().path());
    let mut cases: Vec<PathBuf> = entries.filter(|p| p.join("meta.json").exists()).collect();
    cases.sort();
    cases
}

fn one(file: &Path, options: &LoadOptions, strength: Strength) -> candle_doft::Result<Merge> {
    Merge::new().with_file(file, options, strength)
}

/// The weights of a merged base, from disk, after they were found equal through a `VarBuilder`.
fn merged(merge: &Merge, base: &Path) -> candle_doft::Result<BTreeMap<String, Tensor>> {
    let home = tempfile::tempdir().unwrap();
    let output = home.path().join("merged.safetensors");
    merge.checkpoint(base, &output, CheckpointOptions::default())?;
    let found = load(&output)?;
    let tensors: HashMap<String, Tensor> = load(base)?.into_iter().collect();
    let vb = merge.var_builder(VarBuilder::from_tensors(tensors, DType::F32, &CPU));
    for (name, tensor) in &found {
        let through = vb.get(tensor.shape(), name)?;
        assert_eq!(bits(&through), bits(tensor), "{name}");
    }
    Ok(found)
}

#[test]
fn every_onetrainer_file_merges_to_its_weights() -> candle_doft::Result<()> {
    let mut seen = 0;
    for folder in cases("onetrainer") {
        let case = folder.file_name().unwrap().to_str().unwrap().to_string();
        let base = folder.join("base.safetensors");
        let io = load(&folder.join("io.safetensors"))?;
        for flavour in ["adapter.safetensors", "adapter.internal.safetensors"] {
            let file = folder.join(flavour);
            if !file.exists() {
                continue;
            }
            let options = match (case.as_str(), flavour) {
                ("doft_g1_early_linear", "adapter.safetensors") => {
                    LoadOptions::default().with_divisor(Divisor::SqrtEntries)
                }
                // Native names, which nobody but the caller can translate.
                ("mangled_legacy", "adapter.internal.safetensors") => LoadOptions::default()
                    .with_rename(|module| {
                        let attention = "transformer.transformer_blocks.0.attn.";
                        let native =
                            module.strip_prefix("transformer.double_blocks.0.img_attn.")?;
                        let ours = if native == "proj" { "to_out.0" } else { "to_q" };
                        Some(format!("{attention}{ours}"))
                    }),
                _ => LoadOptions::default(),
            };
            let found = merged(&one(&file, &options, Strength::default())?, &base)?;
            let weights: Vec<&Tensor> = io
                .iter()
                .filter(|(name, _)| name.ends_with("w_eff") && !name.starts_with("as_loaded"))
                .map(|(_, tensor)| tensor)
                .collect();
            for expected in weights {
                let fits = found.values().any(|w| {
                    w.elem_count() == expected.elem_count()
                        && relative(&w.flatten_all().unwrap(), &expected.flatten_all().unwrap())
                            <= GOLDEN_WEIGHTS
                });
                assert!(fits, "{case}, {flavour}");
                seen += 1;
            }
        }
    }
    assert!(seen >= 50, "only {seen} weights");
    Ok(())
}

#[test]
fn every_peft_folder_merges_to_its_weights() -> candle_doft::Result<()> {
    for folder in cases("peft") {
        let case = folder.file_name().unwrap().to_str().unwrap().to_string();
        let expected = load(&folder.join("expected.safetensors"))?;
        let merge = one(&folder, &LoadOptions::default(), Strength::default())?;
        let found = merged(&merge, &folder.join("base.safetensors"))?;
        assert!(!found.is_empty());
        for (name, weight) in found {
            let off = relative(&weight, &expected[&name]);
            assert!(off <= GOLDEN_WEIGHTS, "{case}: {name} is off by {off:e}");
        }
    }
    Ok(())
}

/// A base of two matrices, a kernel, a table and something else, in one dtype.
fn base(dtype: DType) -> Result<HashMap<String, Tensor>> {
    let mut tensors = HashMap::new();
    for (seed, (name, shape)) in [
        ("a.weight", vec![12, 32]),
        ("b.weight", vec![8, 16]),
        ("conv.weight", vec![6, 4, 3, 3]),
        ("table.weight", vec![10, 16]),
        ("norm.weight", vec![12]),
    ]
    .into_iter()
    .enumerate()
    {
        tensors.insert(
            name.to_string(),
            seeded(shape, seed as u64).to_dtype(dtype)?,
        );
    }
    Ok(tensors)
}

fn adapter(config: DoftConfig, scale: f64) -> candle_doft::Result<Adapter> {
    let adapter = Adapter::new(config.with_block_size(8), &CPU)?;
    for name in ["a", "b"] {
        let weight = base(DType::F32)?[&format!("{name}.weight")].clone();
        adapter.wrap_linear(name, Linear::new(weight, None))?;
    }
    for (seed, var) in adapter.vars()?.iter().enumerate() {
        let noise = (seeded(var.dims(), seed as u64) * scale)?.to_dtype(var.dtype())?;
        var.set(&var.add(&noise)?)?;
    }
    Ok(adapter)
}

#[test]
fn merging_an_identity_adapter_reproduces_the_checkpoint_byte_for_byte() -> candle_doft::Result<()>
{
    let home = tempfile::tempdir().unwrap();
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for magnitude in [Magnitude::Log, Magnitude::Absolute, Magnitude::None] {
            let config = DoftConfig::default().with_magnitude(magnitude);
            let (from, to) = (
                home.path().join("base.safetensors"),
                home.path().join("out"),
            );
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
fn strength_goes_from_the_base_to_the_adapter_and_back() -> candle_doft::Result<()> {
    for map in [Map::Cayley, Map::Exponential] {
        let adapter = adapter(DoftConfig::default().with_map(map), 0.5)?;
        let weight = base(DType::F64)?["a.weight"].clone();
        let at = |strength| -> candle_doft::Result<Tensor> {
            let merge = Merge::new().with_adapter(&adapter, strength)?;
            Ok(merge
                .weight("a", &weight, false)?
                .expect("an adapted layer"))
        };
        let full = at(Strength::linear(1.))?;
        assert_eq!(bits(&at(Strength::linear(0.))?), bits(&weight));
        assert_eq!(bits(&at(Strength::geodesic(0.))?), bits(&weight));
        assert!(relative(&at(Strength::geodesic(1.))?, &full) < 1e-12);
        let half = ((&weight + &full)? / 2.)?;
        assert!(relative(&at(Strength::linear(0.5))?, &half) < 1e-12);
        // Twice half the way is the way, and back again is the start.
        let merge = Merge::new()
            .with_adapter(&adapter, Strength::geodesic(0.5))?
            .with_adapter(&adapter, Strength::geodesic(0.5))?;
        let twice = merge
            .weight("a", &weight, false)?
            .expect("an adapted layer");
        assert!(relative(&twice, &full) < 1e-12);
        let merge = Merge::new()
            .with_adapter(&adapter, Strength::linear(1.))?
            .with_adapter(&adapter, Strength::geodesic(-1.))?;
        let undone = merge
            .weight("a", &weight, false)?
            .expect("an adapted layer");
        assert!(relative(&undone, &weight) < 1e-12);
    }
    let error = |config: DoftConfig, strength| {
        let adapter = adapter(config, 0.5).unwrap();
        Merge::new()
            .with_adapter(&adapter, strength)
            .unwrap_err()
            .to_string()
    };
    assert_eq!(
        error(
            DoftConfig::default().with_map(Map::SERIES),
            Strength::geodesic(0.5)
        ),
        "strength 0.5: layer `a` has the series for its map, which is not orthogonal; take the \
         linear strength"
    );
    assert_eq!(
        error(DoftConfig::default(), Strength::linear(f64::NAN)),
        "strength NaN: it is not a finite number"
    );
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
    let (from, to) = (
        home.path().join("base.safetensors"),
        home.path().join("out"),
    );
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
    let merge = |scale| {
        Merge::new().with_adapter(&adapter(DoftConfig::default(), scale)?, Strength::default())
    };
    let trained = merge(0.5)?;
    let mut less = base(DType::F32)?;
    less.remove("b.weight");
    assert_eq!(
        error(less, &trained),
        "the adapter: 1 of 2 layers and extra tensors match nothing in the model, the first is `b`; \
         the nearest are `a.weight`, `conv.weight`, `norm.weight`"
    );
    let mut other = base(DType::F32)?;
    other.insert(
        "a.weight".into(),
        (seeded((12, 32), 77).to_dtype(DType::F32)? * 3.)?,
    );
    assert_eq!(
        error(other.clone(), &trained),
        "the adapter: `a` is not the base weight it was trained on, by its row norms; allow a \
         changed base to merge it all the same"
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
    std::fs::remove_file(&to).unwrap();
    // A cut base.
    let bytes = std::fs::read(&from).unwrap();
    for length in [0, 5, 9, 100, bytes.len() - 1] {
        std::fs::write(&from, &bytes[..length]).unwrap();
        let found = trained
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
fn half_precision_bases_are_computed_in_f32_and_rounded_once() -> candle_doft::Result<()> {
    let adapter = adapter(DoftConfig::default(), 0.5)?;
    let merge = Merge::new().with_adapter(&adapter, Strength::default())?;
    for dtype in [DType::F16, DType::BF16] {
        let weight = base(dtype)?["a.weight"].clone();
        let merged = merge
            .weight("a", &weight, false)?
            .expect("an adapted layer");
        assert_eq!(merged.dtype(), dtype);
        let wide = merge
            .weight("a", &weight.to_dtype(DType::F32)?, false)?
            .expect("the same");
        let rounded = wide.to_dtype(dtype)?.to_dtype(DType::F32)?;
        assert_eq!(bits(&merged.to_dtype(DType::F32)?), bits(&rounded));
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
    let vb = strict.var_builder(VarBuilder::from_tensors(tensors, DType::F32, &CPU));
    vb.get((12, 32), "a.weight")?;
    let error = strict.check_used().unwrap_err().to_string();
    assert!(
        error.ends_with("the first is `b`; allow a partial use to go on without them"),
        "{error}"
    );
    Ok(())
}

#[test]
fn what_a_file_and_its_weight_disagree_on_is_told() -> candle_doft::Result<()> {
    let folder = golden("onetrainer").join("doft_g1_linear");
    let file = folder.join("adapter.safetensors");
    let merge = one(&file, &LoadOptions::default(), Strength::default())?;
    let tensors = load(&folder.join("base.safetensors"))?;
    let (name, weight) = tensors
        .iter()
        .find(|(name, _)| name.ends_with(".weight"))
        .unwrap();
    let path = name.trim_end_matches(".weight");
    let told = |merge: &Merge| {
        merge
            .warnings()
            .iter()
            .any(|w| w.message.contains("initial_norm"))
    };
    merge.weight(path, weight, false)?;
    assert!(!told(&merge));
    merge.weight(path, &(weight * 1.5)?, false)?;
    assert!(told(&merge));
    // Its magnitude has the axes of a matrix.
    let kernel = weight.reshape((12, 48, 1, 1))?;
    let error = merge.weight(path, &kernel, false).unwrap_err().to_string();
    assert!(
        error.contains("is a Conv2d layer, trained was a Linear layer"),
        "{error}"
    );
    let peft = golden("peft").join("conv3x3");
    let merge = one(&peft, &LoadOptions::default(), Strength::default())?;
    merged(&merge, &peft.join("base.safetensors"))?;
    assert!(
        merge
            .warnings()
            .iter()
            .any(|w| w.message.starts_with("PEFT's own forward"))
    );
    Ok(())
}
