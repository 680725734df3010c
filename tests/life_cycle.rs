//! How a model and its adapter live together: nothing that is meant to be adapted is silently absent.

mod support;

use candle_core::{DType, Result, Tensor};
use candle_doft::file::{LoadOptions, Target, convert};
use candle_doft::merge::{Merge, Strength};
use candle_doft::{Adapter, AdapterBuilder, DoftConfig, DoftLinear, Error, Mode, Pattern, Targets};
use candle_nn::{AdamW, Linear, Module, ModuleT, Optimizer, VarBuilder};
use std::collections::HashMap;
use support::tensors::{CPU, bits, disturb_all, relative, seeded};

/// A checkpoint with two layers below `model`.
fn vb() -> VarBuilder<'static> {
    let mut tensors = HashMap::new();
    for (seed, path) in ["model.a", "model.b"].iter().enumerate() {
        let weight = seeded((32, 32), seed as u64 + 1)
            .to_dtype(DType::F32)
            .unwrap();
        tensors.insert(format!("{path}.weight"), weight);
    }
    VarBuilder::from_tensors(tensors, DType::F32, &CPU)
}

fn x() -> Tensor {
    seeded((4, 32), 9).to_dtype(DType::F32).unwrap()
}

struct Model {
    a: DoftLinear,
    b: DoftLinear,
}

impl Model {
    fn new(builder: &AdapterBuilder, vb: VarBuilder) -> candle_doft::Result<Self> {
        Ok(Self {
            a: builder.linear_no_bias(32, 32, vb.pp("a"))?,
            b: builder.linear_no_bias(32, 32, vb.pp("b"))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.b.forward(&self.a.forward(x)?.relu()?)
    }
}

/// The same model without adapter support.
fn plain(vb: VarBuilder) -> Result<(Linear, Linear)> {
    let layer = |name| candle_nn::linear_no_bias(32, 32, vb.pp(name));
    Ok((layer("a")?, layer("b")?))
}

fn trained(config: DoftConfig) -> candle_doft::Result<(Model, Adapter)> {
    let builder = Adapter::builder(config.with_block_size(8), &CPU)?;
    let model = Model::new(&builder, vb().pp("model"))?;
    let adapter = builder.finish()?;
    disturb_all(adapter.vars(), 0.3)?;
    Ok((model, adapter))
}

#[test]
fn a_path_is_the_whole_prefix_in_training_and_merging() -> candle_doft::Result<()> {
    let (model, adapter) = trained(DoftConfig::default())?;
    let expected = model.forward(&x())?;
    let run = |(a, b): (Linear, Linear)| b.forward(&a.forward(&x())?.relu()?);
    // With the prefix given before, and inside.
    let before = adapter.merged(vb().pp("model"), plain)?;
    let inside = adapter.merged(vb(), |vb| plain(vb.pp("model")))?;
    let (before, inside) = (run(before)?, run(inside)?);
    assert!(relative(&before, &expected) < 1e-5);
    assert_eq!(bits(&before), bits(&inside));
    assert!(relative(&run(plain(vb().pp("model"))?)?, &expected) > 1e-2);
    Ok(())
}

#[test]
fn merging_into_a_model_that_asks_for_other_paths_is_an_error() -> candle_doft::Result<()> {
    let (_, adapter) = trained(DoftConfig::default())?;
    let tensors = |path: &str| {
        let weight = seeded((32, 32), 1).to_dtype(DType::F32).unwrap();
        let named = [(format!("{path}.weight"), weight)];
        VarBuilder::from_tensors(named.into_iter().collect(), DType::F32, &CPU)
    };
    let built = adapter.merged(tensors("net.model_a"), |vb| {
        vb.get((32, 32), "net.model_a.weight")
    });
    let error = Error::from(built.unwrap_err()).to_string();
    assert!(
        error.contains("2 of 2 layers") && error.contains("`net.model_a`"),
        "{error}"
    );
    // One of two is an error as well, unless that is allowed; and merged counts as used.
    let half = |vb: VarBuilder| vb.get((32, 32), "model.a.weight");
    assert!(adapter.merged(vb(), half).is_err());
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("adapter.safetensors");
    adapter.save(&file)?;
    let partial = LoadOptions::default().with_allow_partial(true);
    let merge = Merge::new().with_file(&file, &partial, Strength::default())?;
    merge.build(vb(), half)?;
    assert_eq!(merge.warnings().len(), 1);
    merge.build(vb().pp("model"), plain)?;
    assert!(merge.warnings().is_empty());
    Ok(())
}

#[test]
fn dropout_trains_in_a_sequential_and_behind_module_t() -> candle_doft::Result<()> {
    let builder = Adapter::builder(
        DoftConfig::default().with_block_size(8).with_dropout(0.5),
        &CPU,
    )?;
    let layer = builder.linear_no_bias(32, 32, vb().pp("model.a"))?;
    let adapter = builder.finish()?;
    disturb_all(adapter.vars(), 0.3)?;
    let net = candle_nn::seq()
        .add(layer.clone())
        .add(candle_nn::Activation::Relu);
    let mut optimizer = AdamW::new_lr(adapter.vars(), 1e-2)?;
    let start = bits(&adapter.vars()[0]);
    for (step, forward) in [
        &(|| net.forward(&x())) as &dyn Fn() -> Result<Tensor>,
        &|| layer.forward_t(&x(), true),
        // The flag has no effect: the mode decides.
        &|| layer.forward_t(&x(), false),
    ]
    .into_iter()
    .enumerate()
    {
        let before = bits(&adapter.vars()[0]);
        adapter.set_step(step as u64);
        let (first, second) = (forward()?, forward()?);
        assert_ne!(bits(&first), bits(&second), "blocks are dropped");
        let grads = (first + second)?.sqr()?.mean_all()?.backward()?;
        adapter.check_gradients(&grads)?;
        optimizer.step(&grads)?;
        assert_ne!(bits(&adapter.vars()[0]), before);
        let eval = || adapter.with_mode(Mode::Eval, forward);
        assert_eq!(bits(&eval()?), bits(&eval()?));
    }
    assert_ne!(bits(&adapter.vars()[0]), start);
    Ok(())
}

#[test]
fn the_dropout_of_a_loaded_adapter_can_be_changed() -> candle_doft::Result<()> {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("adapter.safetensors");
    trained(DoftConfig::default().with_dropout(0.5))?
        .1
        .save(&file)?;
    for (dropout, same) in [(None, false), (Some(0.), true)] {
        let mut options = LoadOptions::default();
        options.dropout = dropout;
        let builder = Adapter::load_with(&file, &CPU, &options)?;
        let model = Model::new(&builder, vb().pp("model"))?;
        builder.finish()?;
        let (first, second) = (model.forward(&x())?, model.forward(&x())?);
        assert_eq!(bits(&first) == bits(&second), same, "{dropout:?}");
    }
    let wrong = LoadOptions::default().with_dropout(1.5);
    let error = Adapter::load_with(&file, &CPU, &wrong)
        .unwrap_err()
        .to_string();
    assert!(error.contains("`dropout` is 1.5"), "{error}");
    Ok(())
}

/// A struct of adaptable layers runs on merged weights, or as the base.
#[test]
fn an_adapter_without_targets_is_the_frozen_model() -> candle_doft::Result<()> {
    let (model, adapter) = trained(DoftConfig::default())?;
    let none = || DoftConfig::default().with_targets(Targets::None);
    let merged = adapter.merged(vb().pp("model"), |vb| {
        let builder = Adapter::builder(none(), &CPU)?;
        let model = Model::new(&builder, vb)?;
        let frozen = builder.finish()?;
        assert!(frozen.vars().is_empty() && !model.a.is_adapted());
        assert_eq!(frozen.report().frozen_layers, 2);
        Ok::<_, Error>(model)
    })?;
    assert!(relative(&merged.forward(&x())?, &model.forward(&x())?) < 1e-5);
    let builder = Adapter::builder(none(), &CPU)?;
    Model::new(&builder, vb().pp("model"))?;
    let home = tempfile::tempdir().unwrap();
    let saved = builder
        .finish()?
        .save(home.path().join("nothing.safetensors"));
    assert!(matches!(saved, Err(Error::NoLayers)));
    assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 0);
    Ok(())
}

#[test]
fn a_list_or_a_regular_expression_given_as_a_string_gets_a_hint() -> candle_doft::Result<()> {
    for (pattern, hint) in [
        (
            "a,b",
            "; a list of patterns is given as one string each, as in `[\"a\", \"b\"]`",
        ),
        (
            "model.(a|b)",
            "; a plain string is a name or a glob, a regular expression is `Pattern::Regex`",
        ),
        (
            ".*a",
            "; a plain string is a name or a glob, a regular expression is `Pattern::Regex`",
        ),
        ("c", ""),
    ] {
        let builder = Adapter::builder(DoftConfig::default().with_targets(pattern), &CPU)?;
        Model::new(&builder, vb().pp("model"))?;
        let error = builder.finish().unwrap_err().to_string();
        let start = format!("config: targets `{pattern}` matches no layer; the nearest are ");
        assert!(error.starts_with(&start), "{error}");
        assert!(error.ends_with(&format!("`{hint}")), "{error}");
    }
    let regex = Targets::from(Pattern::Regex("model.(a|b)".into()));
    let (model, _) = trained(DoftConfig::default().with_targets(regex))?;
    assert!(model.a.is_adapted() && model.b.is_adapted());
    Ok(())
}

#[test]
fn targets_and_excludes_replace_what_was_set_before() -> candle_doft::Result<()> {
    let config = DoftConfig::default().with_targets("b").with_targets("a");
    let config = config.with_exclude(["a"]).with_exclude(["b"]);
    let (model, _) = trained(config)?;
    assert!(model.a.is_adapted() && !model.b.is_adapted());
    Ok(())
}

/// candle's models are often built first and loaded then; norms would be of the values before.
#[test]
fn a_base_that_changed_after_building_is_refused_by_name() -> candle_doft::Result<()> {
    let varmap = candle_nn::VarMap::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F32, &CPU);
    let builder = Adapter::builder(DoftConfig::default().with_block_size(8), &CPU)?;
    let layer = builder.linear_no_bias(32, 16, vb.pp("late"))?;
    let other = builder.linear_no_bias(32, 16, vb.pp("early"))?;
    let conv = builder.conv2d_no_bias(8, 4, 3, Default::default(), vb.pp("conv"))?;
    let adapter = builder.finish()?;
    other.forward(&x())?;
    let set = |name: &str, shape: &[usize]| {
        let value = seeded(shape, 5).to_dtype(DType::F32).unwrap();
        varmap.clone().set_one(name, value)
    };
    set("late.weight", &[16, 32])?;
    set("conv.weight", &[4, 8, 3, 3])?;
    let error = layer.forward(&x()).unwrap_err().to_string();
    assert!(
        error.starts_with("layer `late`: its base weight changed after it was built"),
        "{error}"
    );
    let image = Tensor::zeros((1, 8, 5, 5), DType::F32, &CPU)?;
    assert!(
        conv.forward(&image)
            .unwrap_err()
            .to_string()
            .contains("`conv`")
    );
    assert!(
        adapter
            .with_mode(Mode::Off, || layer.forward(&x()))
            .is_err()
    );
    other.forward(&x())?;
    Ok(())
}

#[test]
fn what_the_system_says_of_a_file_is_told_once() {
    let error = Adapter::load("/no/such/file.safetensors", &CPU).unwrap_err();
    let chain = format!("{:#}", anyhow::Error::from(error));
    assert_eq!(chain.matches("No such file").count(), 1, "{chain}");
}

/// A row that is no number makes every output none, and a checkpoint is often damaged in one tensor.
#[test]
fn a_base_that_is_not_finite_is_refused_by_layer_and_row() -> candle_doft::Result<()> {
    for value in [f32::NAN, f32::INFINITY, f32::MAX] {
        let mut rows = vec![1f32; 8 * 16];
        rows[5 * 16..5 * 16 + 2].fill(value);
        let weight = Tensor::from_vec(rows, (8, 16), &CPU)?;
        let builder = Adapter::builder(DoftConfig::default().with_block_size(8), &CPU)?;
        let error = builder.wrap("late", Linear::new(weight, None)).unwrap_err();
        let error = error.to_string();
        assert!(
            error.starts_with("layer `late`: row 5 of its base weight has norm "),
            "{error}"
        );
    }
    Ok(())
}

/// Two builds of one `Merge` at the same time do not count for each other.
#[test]
fn a_merge_that_builds_two_models_at_once_checks_each_alone() -> candle_doft::Result<()> {
    let weight = || Tensor::ones((8, 16), DType::F32, &CPU);
    let builder = Adapter::builder(DoftConfig::default().with_block_size(8), &CPU)?;
    for path in ["a", "b"] {
        builder.wrap(path, Linear::new(weight()?, None))?;
    }
    let adapter = builder.finish()?;
    let merge = Merge::new().with_adapter(&adapter, Strength::default())?;
    let both = std::sync::Barrier::new(2);
    let half = |path: &'static str| {
        let tensors = ["a", "b"].map(|p| (format!("{p}.weight"), weight().unwrap()));
        let vb = VarBuilder::from_tensors(tensors.into_iter().collect(), DType::F32, &CPU);
        let built = merge.build(vb, |vb| -> candle_doft::Result<()> {
            both.wait();
            vb.get((8, 16), &format!("{path}.weight"))?;
            both.wait();
            Ok(())
        });
        built.map_err(|error| error.to_string())
    };
    let (a, b) = std::thread::scope(|threads| {
        let (a, b) = (threads.spawn(|| half("a")), threads.spawn(|| half("b")));
        (a.join().unwrap(), b.join().unwrap())
    });
    assert!(a.unwrap_err().contains("`b`") && b.unwrap_err().contains("`a`"));
    Ok(())
}

#[test]
fn extra_tensors_count_as_used_when_they_are_read_and_no_earlier() -> candle_doft::Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("head.safetensors");
    let config = DoftConfig::default().with_targets(Targets::None);
    let builder = Adapter::builder(config, &CPU)?;
    builder.extra("head.weight", &Tensor::ones((2, 4), DType::F32, &CPU)?)?;
    let adapter = builder.finish()?;
    adapter.save(&file)?;
    // A file of an extra tensor alone, and a model that asks for nothing.
    let error = Adapter::load(&file, &CPU)?.finish().unwrap_err();
    assert!(matches!(error, Error::FileUnused { .. }), "{error}");
    // Asking whether it is there is not reading it; of two adapters the last has it.
    let merge = Merge::new()
        .with_adapter(&adapter, Strength::default())?
        .with_adapter(&adapter, Strength::default())?;
    let build = |read: bool| {
        merge.build(
            VarBuilder::zeros(DType::F32, &CPU),
            |vb| -> candle_doft::Result<()> {
                assert!(vb.contains_tensor("head.weight"));
                if read {
                    vb.get((2, 4), "head.weight")?;
                }
                Ok(())
            },
        )
    };
    assert!(matches!(build(false), Err(Error::FileUnused { .. })));
    build(true)?;
    let partial = Merge::new().with_adapter(&adapter, Strength::default())?;
    let partial = partial.with_allow_partial(true);
    assert!(
        partial
            .build(VarBuilder::zeros(DType::F32, &CPU), |_| Ok::<_, Error>(()))
            .is_err()
    );
    Ok(())
}

#[test]
fn the_dropout_of_a_rule_is_loaded_and_one_out_of_range_refused() -> candle_doft::Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a.safetensors");
    let rule = candle_doft::config::Rule::new("a").with_dropout(0.5);
    let config = DoftConfig::default().with_block_size(8).with_rule(rule);
    let builder = Adapter::builder(config, &CPU)?;
    Model::new(&builder, vb().pp("model"))?;
    let adapter = builder.finish()?;
    disturb_all(adapter.vars(), 0.3)?;
    adapter.save(&file)?;
    for (dropout, drops) in [(None, true), (Some(0.), false)] {
        let mut options = LoadOptions::default();
        options.dropout = dropout;
        let builder = Adapter::load_with(&file, &CPU, &options)?;
        let model = Model::new(&builder, vb().pp("model"))?;
        builder.finish()?;
        let runs: Vec<_> = (0..8)
            .map(|_| bits(&model.forward(&x()).unwrap()))
            .collect();
        assert_eq!(runs.iter().any(|run| *run != runs[0]), drops, "{dropout:?}");
    }
    for dropout in [1., -0.1, f64::NAN] {
        let options = LoadOptions::default().with_dropout(dropout);
        assert!(Adapter::load_with(&file, &CPU, &options).is_err());
        let out = folder.path().join("out.safetensors");
        let converted = convert(&file, &out, Target::Doft, &options, &Default::default());
        assert!(converted.is_err() && !out.exists());
    }
    Ok(())
}

/// A second layer would train a tensor of another dtype than it asked for, without a word.
#[test]
fn an_extra_tensor_has_one_shape_and_dtype() -> candle_doft::Result<()> {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("adapter.safetensors");
    let value = Tensor::new(&[[1f32, 1e6]], &CPU)?;
    let ask = |builder: &AdapterBuilder| -> candle_doft::Result<()> {
        builder.extra("head.bias", &value)?;
        let vb = builder.extra_vb(DType::F16).pp("head");
        for error in [
            builder
                .extra("head.bias", &value.to_dtype(DType::F16)?)
                .unwrap_err()
                .to_string(),
            vb.get((1, 2), "bias").unwrap_err().to_string(),
            vb.get_unchecked("bias").unwrap_err().to_string(),
        ] {
            assert_eq!(
                error,
                "layer `head.bias`: the extra tensor has dtype F16, expected F32, as it was first made"
            );
        }
        let vb = builder.extra_vb(DType::F32).pp("head");
        let error = vb.get((2, 2), "bias").unwrap_err().to_string();
        assert_eq!(
            error,
            "layer `head.bias`: the extra tensor has shape [2, 2], expected [1, 2], as it was first made"
        );
        assert_eq!(vb.get((1, 2), "bias")?.to_vec2::<f32>()?, [[1., 1e6]]);
        Ok(())
    };
    let builder = Adapter::builder(DoftConfig::default(), &CPU)?;
    ask(&builder)?;
    builder.finish()?.save(&file)?;
    ask(&Adapter::load(&file, &CPU)?)?;
    // The first to ask chooses the dtype, as with candle's, if that can hold the values of the file.
    let builder = Adapter::load(&file, &CPU)?;
    let error = builder
        .extra("head.bias", &value.to_dtype(DType::F16)?)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("`head.bias` has a value at index 1 that is inf in F16"),
        "{error}"
    );
    let wide = builder.extra("head.bias", &value.to_dtype(DType::F64)?)?;
    assert_eq!(wide.to_vec2::<f64>()?, [[1., 1e6]]);
    Ok(())
}
