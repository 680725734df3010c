//! Names in adapter files: paths of any letters, and modules that mean one layer each.

mod support;

use candle_core::DType;
use candle_doft::{Adapter, DoftConfig, DoftLinear, Error, Result};
use std::path::PathBuf;
use support::tensors::{CPU, bits, disturb_all, linear};

fn wrapped(adapter: Adapter, path: &str) -> Result<(Adapter, DoftLinear)> {
    let layer = adapter.wrap_linear(path, linear(4, 16, false, DType::F32)?)?;
    Ok((adapter, layer))
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
        let (adapter, layer) = wrapped(Adapter::new(config(), &CPU)?, path)?;
        disturb_all(adapter.vars()?, 1.)?;
        adapter.save(&file)?;
        let (loaded, again) = wrapped(Adapter::load(&file, &CPU)?, path)?;
        loaded.check_complete()?;
        let weights = (layer.effective_weight()?, again.effective_weight()?);
        assert_eq!(bits(&weights.0), bits(&weights.1), "{path:?}");
    }
    let before = std::fs::read(&file).unwrap();
    let (adapter, _) = wrapped(Adapter::new(config(), &CPU)?, "doft_extra.q")?;
    let error = adapter.save(&file).unwrap_err().to_string();
    let expected = "a layer of path `doft_extra.q` cannot be read back; give it another path";
    assert!(error.ends_with(expected), "{error}");
    assert_eq!(std::fs::read(&file).unwrap(), before);
    // What a model lacks is told in one line, whatever its name.
    let (adapter, _) = wrapped(Adapter::new(config(), &CPU)?, "line\nbreak")?;
    adapter.save(&file)?;
    let error = wrapped(Adapter::load(&file, &CPU)?, "other")?.0.vars();
    let error = error.unwrap_err().to_string();
    assert!(error.contains("`line\\nbreak`"), "{error}");
    Ok(())
}

#[test]
fn a_module_means_one_layer_of_the_model() -> Result<()> {
    let (_home, file) = place();
    let (adapter, _) = wrapped(Adapter::new(config(), &CPU)?, "text_encoder.q")?;
    adapter.save(&file)?;
    let load = || Adapter::load(&file, &CPU);
    let wrap = |adapter: &Adapter, path| Ok::<_, Error>(wrapped(adapter.clone(), path)?.1);
    // The prefix may be missing in the model; but not where the model has the layer by its name.
    assert!(wrap(&load()?, "q")?.is_adapted());
    let adapter = load()?;
    assert!(wrap(&adapter, "text_encoder.q")?.is_adapted());
    assert!(!wrap(&adapter, "q")?.is_adapted());
    let adapter = load()?;
    wrap(&adapter, "q")?;
    let error = wrap(&adapter, "text_encoder.q").unwrap_err().to_string();
    let expected = "`q` and `text_encoder.q` both mean `text_encoder.q`; rename";
    assert!(error.ends_with(expected), "{error}");
    Ok(())
}
