//! Tables that are given, as JSON.

use super::families::flux;
use super::merged::{SMALL, adapter};
use super::spelling::{How, Spelling, Tensors, diffusers, original, plain, stacked};
use super::support::golden::load;
use super::support::programs::example;
use super::support::tensors::{CPU, bits};
use candle_core::{DType, safetensors};
use candle_doft::file::LoadOptions;
use candle_doft::merge::{CheckpointOptions, Merge, NameTable, Strength, inspect_with};
use candle_nn::VarBuilder;
use serde_json::{Value, json};
use std::process::Output;

/// A model that no table is found for: fused, swapped and transposed weights.
fn model() -> Vec<Spelling> {
    let parts = [("block.to_q", 16), ("block.to_k", 8), ("block.to_v", 8)];
    vec![
        stacked("b.qkv.weight", &parts, &[24]),
        plain("b.mod.weight", "block.norm", &[16, 8]).with(How::Swapped),
        plain("b.projection", "block.proj", &[12, 8]).with(How::Turned),
        plain("b.conv.weight", "block.conv", &[4, 8, 3, 3]),
    ]
}

fn table() -> Value {
    json!({
        "layers": {
            "block.to_q": {"tensor": "b.qkv.weight", "rows": [[0, 16]]},
            "block.to_k": {"tensor": "b.qkv.weight", "rows": [[16, 24]]},
            "block.to_v": {"tensor": "b.qkv.weight", "rows": [[24, 32]]},
            "unet.block.norm": {"tensor": "b.mod.weight", "rows": [[8, 16], [0, 8]]},
            "block.proj": {"tensor": "b.projection", "transposed": true},
            "block.conv": "b.conv.weight",
        },
        "unnamed": ["vae."],
    })
}

struct Place {
    home: tempfile::TempDir,
    base: Tensors,
    expected: Tensors,
}

impl Place {
    fn new() -> candle_doft::Result<Self> {
        let home = tempfile::tempdir().unwrap();
        let model = model();
        let adapter = adapter(&model, |path| {
            format!("lora_unet_{}", path.replace('.', "_"))
        })?;
        safetensors::save(&adapter, home.path().join("adapter"))?;
        let plain = diffusers(&model)?;
        let mut base = original(&model, &plain)?;
        base.insert("vae.conv.weight".into(), plain["block.conv.weight"].clone());
        safetensors::save(&plain, home.path().join("plain"))?;
        safetensors::save(&base, home.path().join("base"))?;
        let text = serde_json::to_vec(&table()).unwrap();
        std::fs::write(home.path().join("names.json"), text).unwrap();
        let merge = Self::merge(&home)?;
        let (from, to) = (home.path().join("plain"), home.path().join("merged"));
        merge.checkpoint(from, &to, CheckpointOptions::default())?;
        let expected = original(&model, &load(&to)?.into_iter().collect())?;
        Ok(Self {
            home,
            base,
            expected,
        })
    }

    fn merge(home: &tempfile::TempDir) -> candle_doft::Result<Merge> {
        let file = home.path().join("adapter");
        Merge::new().with_file(file, &LoadOptions::default(), Strength::default())
    }

    fn path(&self, name: &str) -> String {
        self.home.path().join(name).to_str().unwrap().to_string()
    }

    fn check(&self, found: &Tensors) {
        assert_eq!(found.len(), self.base.len());
        for (name, tensor) in found {
            let expected = self.expected.get(name).unwrap_or(&self.base[name]);
            assert_eq!(bits(tensor), bits(expected), "{name}");
        }
    }

    fn run(&self, name: &str, more: &[&str]) -> Option<Output> {
        let mut program = example(name)?;
        program.args([
            "--base",
            &self.path("base"),
            "--adapter",
            &self.path("adapter"),
        ]);
        Some(program.args(more).output().unwrap())
    }
}

#[test]
fn a_given_table_translates_any_checkpoint() -> candle_doft::Result<()> {
    let place = Place::new()?;
    let merge = Place::merge(&place.home)?.with_names(NameTable::load(place.path("names.json"))?);
    let to = place.path("merged");
    let report = merge.checkpoint(place.path("base"), &to, CheckpointOptions::default())?;
    assert_eq!(report.merged.len(), 4);
    place.check(&load(to.as_ref())?.into_iter().collect());
    let vb = VarBuilder::from_tensors(place.base.clone(), DType::F32, &CPU);
    let found = merge.build(vb, |vb| {
        let all = place.base.iter();
        let all = all.map(|(name, t)| Ok((name.clone(), vb.get(t.shape(), name)?)));
        all.collect::<candle_doft::Result<Tensors>>()
    })?;
    place.check(&found);
    let table = NameTable::load(place.path("names.json"))?;
    let options = LoadOptions::default();
    let base = place.home.path().join("base");
    let adapter = place.path("adapter");
    let found = inspect_with(&adapter, &options, Some(&base), Some(&table))?;
    assert!(
        found
            .layers
            .iter()
            .all(|l| l.mismatch.is_none() && l.norm_drift < Some(1e-5))
    );
    assert_eq!((found.layers.len(), found.warnings), (6, vec![]));
    // Without it nothing is found.
    let found = inspect_with(&adapter, &options, Some(&base), None)?;
    assert!(found.layers.iter().all(|layer| layer.mismatch.is_some()));
    Ok(())
}

#[test]
fn the_programs_take_a_table() -> candle_doft::Result<()> {
    let place = Place::new()?;
    let (to, names) = (place.path("out"), place.path("names.json"));
    let Some(run) = place.run("merge", &["--output", &to, "--names", &names]) else {
        return Ok(());
    };
    assert!(run.status.success(), "{run:?}");
    place.check(&load(to.as_ref())?.into_iter().collect());
    let run = place
        .run("inspect", &["--json", "--names", &names])
        .unwrap();
    let found: Value = serde_json::from_slice(&run.stdout).unwrap();
    let layers = found["layers"].as_array().unwrap();
    assert!(layers.iter().all(|layer| layer["mismatch"].is_null()));
    std::fs::remove_file(&to).unwrap();
    std::fs::write(&names, r#"{"layers": {"block.conv": 3}}"#).unwrap();
    let run = place
        .run("merge", &["--output", &to, "--names", &names])
        .unwrap();
    let said = String::from_utf8(run.stderr).unwrap();
    assert_eq!(
        (run.status.code(), said.lines().count()),
        (Some(1), 1),
        "{said}"
    );
    assert!(said.contains("names.json: a table of names: "), "{said}");
    assert!(!std::path::Path::new(&to).exists());
    Ok(())
}

#[test]
fn what_a_table_leaves_out_is_named() -> candle_doft::Result<()> {
    let place = Place::new()?;
    let error = |change: fn(&mut Value)| {
        let mut table = table();
        change(&mut table);
        let table = NameTable::from_json(&table.to_string()).unwrap();
        let merge = Place::merge(&place.home).unwrap().with_names(table);
        let to = place.path("nothing");
        let error = merge.checkpoint(place.path("base"), &to, CheckpointOptions::default());
        assert!(!std::path::Path::new(&to).exists());
        error.unwrap_err().to_string()
    };
    let unnamed = error(|table| table["unnamed"] = json!([]));
    assert!(
        unnamed.starts_with("`vae.conv.weight` is not in the table of names for the given table")
    );
    let missing = error(|table| table["layers"]["block.conv"] = json!("elsewhere.weight"));
    assert!(
        missing.contains("the first is `lora_unet_block_conv`"),
        "{missing}"
    );
    let long = error(|table| table["layers"]["block.to_v"]["rows"] = json!([[24, 33]]));
    assert_eq!(
        long,
        "`NameTable`: the table is row 33 of `b.qkv.weight` for `block.to_v`, expected rows of a tensor of \
         shape [32, 24]"
    );
    let short = error(|table| table["layers"]["block.to_v"]["rows"] = json!([[24, 28]]));
    assert!(
        short.contains("dora_log_multiplier` has 8 elements"),
        "{short}"
    );
    Ok(())
}

#[test]
fn a_table_that_contradicts_itself_is_refused() {
    for (text, part) in [
        ("", "EOF"),
        ("[]", "expected an object"),
        ("{}", "missing field `layers`"),
        (r#"{"layers": {}, "more": 1}"#, "unknown field `more`"),
        (
            r#"{"layers": {"a": {"tensor": "t", "row": [[0, 1]]}}}"#,
            "`rows`",
        ),
        (r#"{"layers": {"a": {"rows": [[0, 1]]}}}"#, "`tensor`"),
        (
            r#"{"layers": {"a": {"tensor": "t", "rows": [[0, -1]]}}}"#,
            "`rows`",
        ),
        (r#"{"layers": {"a": "t", "a": "s"}}"#, "`a` is named twice"),
        (
            r#"{"layers": {"a": {"tensor": "t", "rows": []}}}"#,
            "`a` has a range of no rows",
        ),
        (
            r#"{"layers": {"a": {"tensor": "t", "rows": [[4, 4]]}}}"#,
            "`a` has a range of no rows",
        ),
        (
            r#"{"layers": {"a": {"tensor": "t", "rows": [[0, 4], [3, 6]]}}}"#,
            "`a` has a row twice",
        ),
        (
            r#"{"layers": {"a": "t", "b": "t"}}"#,
            "`a` and `b` share rows of `t`",
        ),
        (
            r#"{"layers": {"a": {"tensor": "t", "rows": [[0, 4]]}, "b": {"tensor": "t", "rows": [[2, 6]]}}}"#,
            "`a` and `b` share rows of `t`",
        ),
    ] {
        let error = NameTable::from_json(text).unwrap_err().to_string();
        assert!(
            error.contains(part) && error.lines().count() == 1,
            "{text}: {error}"
        );
    }
}

/// A table that is given takes the place of the one that would be found.
#[test]
fn a_given_table_comes_before_a_found_one() -> candle_doft::Result<()> {
    let home = tempfile::tempdir().unwrap();
    let model = flux(1, 1, false, SMALL);
    let base = original(&model, &diffusers(&model)?)?;
    safetensors::save(&base, home.path().join("base"))?;
    safetensors::save(
        &adapter(&model[..1], str::to_string)?,
        home.path().join("adapter"),
    )?;
    let table = r#"{"layers": {"x_embedder": "img_in.weight"}, "unnamed": ["double_blocks.", "single_blocks.",
        "final_layer.", "time_in.", "vector_in."]}"#;
    let merge = Place::merge(&home)?;
    let named = merge.clone().with_names(NameTable::from_json(table)?);
    let (from, to) = (home.path().join("base"), home.path().join("merged"));
    let error = named.checkpoint(&from, &to, CheckpointOptions::default());
    let error = error.unwrap_err().to_string();
    assert!(
        error.starts_with("`txt_in.weight` is not in the table"),
        "{error}"
    );
    assert_eq!(
        merge
            .checkpoint(&from, &to, CheckpointOptions::default())?
            .merged,
        ["img_in.weight"]
    );
    Ok(())
}
