//! The texts of errors that the other tests do not meet: the name, what was found, what was expected.

mod support;

use candle_core::{DType, Module, Result, Tensor};
use candle_doft::file::Divisor;
use candle_doft::params::row_norms;
use candle_doft::{Adapter, DoftConfig, Error};
use candle_nn::{Linear, VarBuilder};
use support::tensors::{CPU, linear};

#[test]
fn a_layer_without_an_adapter_has_no_rotation() -> candle_doft::Result<()> {
    let builder = Adapter::builder(DoftConfig::default().with_targets(["q"]), &CPU)?;
    let plain = builder.wrap("k", linear(4, 32, false, DType::F32)?)?;
    let expected = "layer `k` has no rotation: it is outside the targets, or has low-rank matrices";
    assert_eq!(plain.rotation().unwrap_err().to_string(), expected);
    assert_eq!(plain.magnitude().unwrap_err().to_string(), expected);
    assert_eq!(plain.angles().unwrap_err().to_string(), expected);
    Ok(())
}

#[test]
fn another_device_is_named_with_the_one_expected() {
    // There is but one device here, so the error is made by hand.
    let error = Error::Device {
        layer: "q".into(),
        found: "cuda".into(),
        expected: "cpu".into(),
    };
    assert_eq!(
        error.to_string(),
        "layer `q` is on cuda, the adapter on cpu; build both on one device"
    );
}

#[test]
fn an_error_of_the_crate_goes_through_candle_s_and_keeps_its_text() -> Result<()> {
    let builder = Adapter::builder(DoftConfig::default(), &CPU)?;
    let layer = builder.wrap("q", linear(4, 32, false, DType::F32)?)?;
    builder.finish()?;
    let error = layer
        .forward(&Tensor::zeros((2, 3), DType::F32, &CPU)?)
        .unwrap_err();
    let text = "layer `q`: the input has shape [2, 3], expected (.., 32) of rank 2 or more";
    assert_eq!(error.to_string(), text);
    assert_eq!(Error::from(error).to_string(), text);
    Ok(())
}

#[test]
fn a_parameter_of_another_shape_in_the_var_builder_is_refused() -> Result<()> {
    let wrong = Tensor::zeros((3, 3), DType::F32, &CPU)?;
    let tensors = std::collections::HashMap::from([("q.oft_R.weight".to_string(), wrong)]);
    let vb = VarBuilder::from_tensors(tensors, DType::F32, &CPU).pp("q");
    let base = Linear::new(Tensor::zeros((4, 32), DType::F32, &CPU)?, None);
    let error = candle_doft::DoftLinear::new(base, &DoftConfig::default(), vb).unwrap_err();
    let text = error.to_string();
    assert!(
        matches!(error, Error::Candle(_)) && text.contains("oft_R.weight"),
        "{text}"
    );
    Ok(())
}

#[test]
fn norms_are_of_rows_of_floats() -> Result<()> {
    let text = |shape: &[usize], dtype| {
        let weight = Tensor::zeros(shape, dtype, &CPU).unwrap();
        row_norms(&weight).unwrap_err().to_string()
    };
    for shape in [&[4][..], &[0, 4], &[4, 0]] {
        assert_eq!(
            text(shape, DType::F32),
            format!(
                "`row_norms`: the shape of the weight is {shape:?}, expected (out, ..), no empty axis"
            )
        );
    }
    assert_eq!(
        text(&[2, 3], DType::U8),
        "`row_norms`: the dtype of the weight is U8, expected F32, F64, F16 or BF16"
    );
    Ok(())
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let error = Adapter::load("/no/such/adapter.safetensors", &CPU).unwrap_err();
    assert!(matches!(error, Error::Io { .. }));
    assert!(
        error
            .to_string()
            .starts_with("/no/such/adapter.safetensors: "),
        "{error}"
    );
}

#[test]
fn a_divisor_is_one_of_four() {
    let error = "half".parse::<Divisor>().unwrap_err().to_string();
    assert_eq!(
        error,
        "config: `divisor` is `half`, expected none, 2sqrt, sqrt or sqrtn"
    );
    assert_eq!("sqrtn".parse::<Divisor>().unwrap().value(8), 28f64.sqrt());
}

/// What `main` and `unwrap` print is what a reader can act on, as with candle's own error.
#[test]
fn an_error_is_shown_by_its_text() {
    let error = Adapter::load("/no/such/adapter", &CPU).unwrap_err();
    assert_eq!(format!("{error:?}"), error.to_string());
}

/// A checkpoint that was forgotten is zeros throughout.
#[test]
fn a_base_of_zeros_is_another_base_and_one_that_is_allowed_is_told() -> candle_doft::Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("adapter.safetensors");
    let builder = Adapter::builder(DoftConfig::default(), &CPU)?;
    builder.wrap("k", linear(4, 32, false, DType::F32)?)?;
    builder.finish()?.save(&file)?;
    let zeros = || candle_nn::Linear::new(Tensor::zeros((4, 32), DType::F32, &CPU).unwrap(), None);
    let error = Adapter::load(&file, &CPU)?.wrap("k", zeros()).unwrap_err();
    let error = error.to_string();
    assert!(
        error.contains("not the base weight it was trained on"),
        "{error}"
    );
    let options = candle_doft::file::LoadOptions::default().with_allow_changed_base(true);
    let builder = Adapter::load_with(&file, &CPU, &options)?;
    builder.wrap("k", zeros())?;
    let warnings = builder.finish()?.warnings();
    assert!(
        warnings.len() == 1 && warnings[0].subject == "k",
        "{warnings:?}"
    );
    Ok(())
}
