//! Names in adapter files: paths of any letters, and modules that mean one layer each.

mod support;

use candle_core::{DType, Tensor};
use candle_doft::file::LoadOptions;
use candle_doft::{Adapter, AdapterBuilder, DoftConfig, DoftLinear, Result};
use std::path::PathBuf;
use support::tensors::{CPU, bits, disturb_all, linear};

fn wrapped(builder: AdapterBuilder, path: &str) -> Result<(Adapter, DoftLinear)> {
    let layer = builder.wrap(path, linear(4, 16, false, DType::F32)?)?;
    Ok((builder.finish()?, layer))
}

fn config() -> DoftConfig {
    DoftConfig::default().with_block_size(4)
}

fn place() -> (tempfile::TempDir, PathBuf) {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("adapter.safetensors");
    (home, file)
}

#[test]
fn paths_of_any_letters_come_back_and_those_that_could_not_are_not_saved() -> Result<()> {
    let (_home, file) = place();
    let odd = ["a\"b", "line\nbreak", "ü.q", "a.default.b", "oft_R", "a_b."];
    for path in odd {
        let (adapter, layer) = wrapped(Adapter::builder(config(), &CPU)?, path)?;
        disturb_all(adapter.vars(), 1.)?;
        adapter.save(&file)?;
        let (loaded, again) = wrapped(Adapter::load(&file, &CPU)?, path)?;
        assert_eq!(loaded.vars().len(), 2);
        let weights = (layer.effective_weight()?, again.effective_weight()?);
        assert_eq!(bits(&weights.0), bits(&weights.1), "{path:?}");
    }
    let before = std::fs::read(&file).unwrap();
    let (adapter, _) = wrapped(Adapter::builder(config(), &CPU)?, "doft_extra.q")?;
    let error = adapter.save(&file).unwrap_err().to_string();
    let expected = "a layer of path `doft_extra.q` cannot be read back; give it another path";
    assert!(error.ends_with(expected), "{error}");
    assert_eq!(std::fs::read(&file).unwrap(), before);
    // What a model lacks is told in one line, whatever its name.
    let (adapter, _) = wrapped(Adapter::builder(config(), &CPU)?, "line\nbreak")?;
    adapter.save(&file)?;
    let error = wrapped(Adapter::load(&file, &CPU)?, "other");
    let error = error.unwrap_err().to_string();
    assert!(error.contains("`line\\nbreak`"), "{error}");
    Ok(())
}

#[test]
fn a_module_means_one_layer_of_the_model() -> Result<()> {
    let (_home, file) = place();
    let (adapter, _) = wrapped(Adapter::builder(config(), &CPU)?, "text_encoder.q")?;
    adapter.save(&file)?;
    let load = || Adapter::load(&file, &CPU);
    let wrap = |builder: &AdapterBuilder, path: &str| {
        builder.wrap(path, linear(4, 16, false, DType::F32)?)
    };
    // The prefix may be missing in the model; but not where the model has the layer by its name.
    assert!(wrap(&load()?, "q")?.is_adapted());
    let builder = load()?;
    assert!(wrap(&builder, "text_encoder.q")?.is_adapted());
    assert!(!wrap(&builder, "q")?.is_adapted());
    let builder = load()?;
    wrap(&builder, "q")?;
    let error = wrap(&builder, "text_encoder.q").unwrap_err().to_string();
    let expected = "`q` and `text_encoder.q` both mean `text_encoder.q`; rename";
    assert!(error.ends_with(expected), "{error}");
    Ok(())
}

/// Also where other tools would mean something by it.
#[test]
fn an_extra_tensor_may_have_any_name() -> Result<()> {
    let (_home, file) = place();
    let names = ["head.oft_r", "head.oft_blocks", "head.dora_scale"];
    let builder = Adapter::builder(config(), &CPU)?;
    let value = Tensor::ones((2, 3), DType::F32, &CPU)?;
    for name in names {
        builder.extra(name, &value)?;
    }
    wrapped(builder, "q")?.0.save(&file)?;
    let builder = Adapter::load(&file, &CPU)?;
    for name in names {
        let found = builder.extra(name, &value.zeros_like()?)?;
        assert_eq!(bits(&found), bits(&value), "{name}");
    }
    wrapped(builder, "q")?;
    Ok(())
}

/// A file of which a model uses a part is saved as that part, and says so.
#[test]
fn what_a_model_left_of_a_file_is_not_saved_in_silence() -> Result<()> {
    let (home, file) = place();
    let builder = Adapter::builder(config(), &CPU)?;
    for path in ["k", "v"] {
        builder.wrap(path, linear(4, 16, false, DType::F32)?)?;
    }
    wrapped(builder, "q")?.0.save(&file)?;
    let partial = LoadOptions::default().with_allow_partial(true);
    let (adapter, _) = wrapped(Adapter::load_with(&file, &CPU, &partial)?, "q")?;
    let part = home.path().join("part.safetensors");
    let warnings = adapter.save(&part)?;
    assert_eq!(warnings.len(), 1);
    assert_eq!(
        warnings[0].to_string(),
        "`k`: left out, for it matches no layer or tensor of the model, as 1 more"
    );
    let (again, _) = wrapped(Adapter::load(&part, &CPU)?, "q")?;
    assert!(again.save(&part)?.is_empty());
    Ok(())
}
