//! What an adapter promises: the layers it was asked for, in a fixed order, and gradients that are
//! missed when they are missing.

mod support;

use candle_core::{DType, Device, Result, Tensor};
use candle_doft::config::{Indivisible, Rule};
use candle_doft::{
    Adapter, AdapterBuilder, DoftConfig, DoftLinear, Error, Magnitude, Mode, Pattern, Targets,
};
use candle_nn::{AdamW, Linear, Module, Optimizer, VarBuilder};
use support::tensors::{CPU, bits, linear, seeded, values};

fn vb() -> VarBuilder<'static> {
    let paths = [
        "layers.0.q_proj",
        "layers.0.k_proj",
        "layers.1.q_proj",
        "head",
    ];
    let mut tensors = std::collections::HashMap::new();
    for (seed, path) in paths.iter().enumerate() {
        let weight = seeded((32, 32), seed as u64).to_dtype(DType::F32).unwrap();
        tensors.insert(format!("{path}.weight"), (weight * 0.1).unwrap());
        let bias = seeded(32, 100).to_dtype(DType::F32).unwrap();
        tensors.insert(format!("{path}.bias"), bias);
    }
    VarBuilder::from_tensors(tensors, DType::F32, &CPU)
}

/// Two blocks of q and k and a head, the way a model would be built.
fn model(builder: &AdapterBuilder) -> candle_doft::Result<Vec<DoftLinear>> {
    let paths = [
        "layers.0.q_proj",
        "layers.0.k_proj",
        "layers.1.q_proj",
        "head",
    ];
    let layer = |path: &&str| builder.linear(32, 32, vb().pp(path));
    paths.iter().map(layer).collect()
}

fn start(config: DoftConfig) -> AdapterBuilder {
    Adapter::builder(config.with_block_size(8), &CPU).unwrap()
}

fn adapted(config: DoftConfig) -> Vec<String> {
    let builder = start(config);
    model(&builder).unwrap();
    let adapter = builder.finish().unwrap();
    let report = adapter.report();
    report.layers.into_iter().map(|layer| layer.path).collect()
}

#[test]
fn targets_excludes_and_rules_select_layers() {
    let all = [
        "head",
        "layers.0.k_proj",
        "layers.0.q_proj",
        "layers.1.q_proj",
    ];
    assert_eq!(adapted(DoftConfig::default()), all);
    assert_eq!(
        adapted(DoftConfig::default().with_targets("all-linear")),
        all
    );
    assert_eq!(
        adapted(DoftConfig::default().with_targets(["q_proj"])),
        all[2..]
    );
    assert_eq!(
        adapted(DoftConfig::default().with_targets(["layers.*.k_proj", "head"])),
        all[..2]
    );
    assert_eq!(
        adapted(DoftConfig::default().with_exclude(["head"])),
        all[1..]
    );
    let regex = Pattern::Regex(r"layers\.[1-9]\..*".into());
    assert_eq!(
        adapted(DoftConfig::default().with_targets(vec![regex])),
        all[3..]
    );
}

#[test]
fn later_rules_win_field_by_field() -> candle_doft::Result<()> {
    let config = DoftConfig::default()
        .with_rule(
            Rule::new("layers.0.*")
                .with_block_size(4)
                .with_scaled(false),
        )
        .with_rule(Rule::new("q_proj").with_block_size(16));
    let builder = start(config);
    let layers = model(&builder)?;
    builder.finish()?;
    let sizes: Vec<_> = layers
        .iter()
        .map(|l| l.layout().unwrap().block_size)
        .collect();
    assert_eq!(sizes, [16, 4, 16, 8]);
    let scaled: Vec<_> = layers.iter().map(|l| l.layout().unwrap().scaled).collect();
    assert_eq!(scaled, [false, false, true, true]);
    Ok(())
}

#[test]
fn a_pattern_that_matches_nothing_is_an_error_with_near_names() {
    for (config, field) in [
        (
            DoftConfig::default().with_targets(["q_prj", "head"]),
            "targets",
        ),
        (DoftConfig::default().with_exclude(["q_prj"]), "exclude"),
        (DoftConfig::default().with_rule(Rule::new("q_prj")), "rules"),
    ] {
        let builder = start(config);
        model(&builder).unwrap();
        let error = builder.finish().unwrap_err();
        assert!(matches!(error, Error::NoMatch { .. }));
        let text = error.to_string();
        let start = format!("config: {field} `q_prj` matches no layer; the nearest are `layers.");
        assert!(text.starts_with(&start), "{text}");
    }
}

#[test]
fn an_adapter_without_layers_is_an_error() {
    let error = start(DoftConfig::default())
        .finish()
        .unwrap_err()
        .to_string();
    assert!(error.starts_with("the adapter has no layers"), "{error}");
}

#[test]
fn a_bad_configuration_is_named_by_field() {
    let error = |config: DoftConfig| Adapter::builder(config, &CPU).unwrap_err().to_string();
    let config = DoftConfig::default;
    assert_eq!(
        error(config().with_block_size(0)),
        "config: `block_size` is 0, expected at least 1"
    );
    assert_eq!(
        error(config().with_max_norm(f64::NAN)),
        "config: `max_norm` is NaN, expected a finite number above 0"
    );
    assert_eq!(
        error(config().with_dropout(1.)),
        "config: `dropout` is 1, expected at least 0 and below 1"
    );
    assert_eq!(
        error(config().with_dropout(0.1).with_block_share(true)),
        "config: `dropout` is 0.1, expected 0 when one block is shared"
    );
    assert_eq!(
        error(config().with_targets(Targets::Patterns(vec![]))),
        "config: `targets` is an empty list, expected at least one pattern, `Targets::All` or `Targets::None`"
    );
    let text = error(config().with_exclude(vec![Pattern::Regex("(".into())]));
    assert!(
        text.starts_with("config: the pattern `(` cannot be read: "),
        "{text}"
    );
    let text = error(config().with_rule(Rule::new("a[")));
    assert!(
        text.starts_with("config: the pattern `a[` cannot be read: "),
        "{text}"
    );
}

#[test]
fn a_block_size_that_does_not_divide_is_adjusted_and_reported_or_refused() -> candle_doft::Result<()>
{
    let base = || linear(4, 50, false, DType::F32).unwrap();
    let builder = Adapter::builder(DoftConfig::default(), &CPU)?;
    let layer = builder.wrap("odd", base())?;
    let adapter = builder.finish()?;
    assert_eq!(layer.layout().unwrap().block_size, 25);
    let report = adapter.report().to_string();
    assert!(report.contains("(block size 32 was asked for)"), "{report}");

    let config = DoftConfig::default().with_indivisible(Indivisible::Error);
    let error = Adapter::builder(config, &CPU)?
        .wrap("odd", base())
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "layer `odd`: block size 32 does not divide its width 50; the nearest that does is 25"
    );
    Ok(())
}

#[test]
fn a_path_can_be_used_once() -> candle_doft::Result<()> {
    let builder = start(DoftConfig::default().with_targets(["a", "b"]));
    for path in ["a", "plain"] {
        builder.wrap(path, linear(4, 32, false, DType::F32)?)?;
        let again = builder.wrap(path, linear(4, 32, false, DType::F32)?);
        assert_eq!(
            again.unwrap_err().to_string(),
            format!("layer `{path}` is wrapped already; give each layer a path of its own")
        );
    }
    Ok(())
}

#[test]
fn a_layer_needs_a_path() -> candle_doft::Result<()> {
    let builder = start(DoftConfig::default());
    let built = builder.linear(32, 4, VarBuilder::zeros(DType::F32, &CPU));
    let wrapped = builder.wrap("", linear(4, 32, false, DType::F32)?);
    for layer in [built, wrapped] {
        let text = layer.unwrap_err().to_string();
        assert!(
            text.contains("the path of a layer is empty") && text.contains("vb.pp("),
            "{text}"
        );
    }
    Ok(())
}

#[test]
fn a_model_that_asked_for_nothing_of_the_file_cannot_be_run() -> candle_doft::Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("adapter.safetensors");
    let trained_builder = start(DoftConfig::default());
    trained_builder.wrap("fc1", linear(4, 32, false, DType::F32)?)?;
    let trained = trained_builder.finish()?;
    trained.save(&file)?;

    let empty = Adapter::load(&file, &CPU)?.finish();
    let text = empty.unwrap_err().to_string();
    assert!(text.contains("the first is `fc1`"), "{text}");
    let builder = Adapter::load(&file, &CPU)?;
    let other = builder.wrap("net.fc1", linear(4, 32, false, DType::F32)?)?;
    assert!(!other.is_adapted());
    let x = seeded((1, 32), 1).to_dtype(DType::F32)?;
    let refused = |layer: &DoftLinear| {
        let text = layer.forward(&x).unwrap_err().to_string();
        assert!(
            text.starts_with("layer `net.fc1`: the adapter is not finished"),
            "{text}"
        );
    };
    refused(&other);
    let text = builder.finish().unwrap_err().to_string();
    let end = "the first is `fc1`; the nearest are `net.fc1`; is this the model it was trained on?";
    assert!(text.ends_with(end), "{text}");
    refused(&other);
    Ok(())
}

#[test]
fn variables_come_in_an_order_that_depends_on_names_alone() -> candle_doft::Result<()> {
    let names = |reversed: bool| -> candle_doft::Result<Vec<String>> {
        let builder = start(DoftConfig::default());
        builder.extra("classifier.weight", &seeded((2, 2), 1))?;
        let mut paths = ["b", "a.x", "a"];
        if reversed {
            paths.reverse();
        }
        for path in paths {
            builder.wrap(path, linear(4, 32, false, DType::F32)?)?;
        }
        let adapter = builder.finish()?;
        assert_eq!(adapter.rotation_vars().len(), 3);
        assert_eq!(adapter.magnitude_vars().len(), 3);
        Ok(adapter
            .named_vars()
            .into_iter()
            .map(|(name, _)| name)
            .collect())
    };
    let expected = [
        "a.oft_R.weight",
        "a.dora_log_multiplier",
        "a.x.oft_R.weight",
        "a.x.dora_log_multiplier",
        "b.oft_R.weight",
        "b.dora_log_multiplier",
        "classifier.weight",
    ];
    assert_eq!(names(false)?, expected);
    assert_eq!(names(true)?, expected);
    Ok(())
}

#[test]
fn the_report_counts_what_trains() -> candle_doft::Result<()> {
    let builder = start(DoftConfig::default().with_targets(["q_proj"]));
    model(&builder)?;
    let adapter = builder.finish()?;
    let report = adapter.report();
    // Four blocks of 28 entries and 32 magnitudes a layer.
    assert_eq!(report.trainable, 2 * (4 * 28 + 32));
    assert_eq!(report.frozen_layers, 2);
    assert_eq!(report.total, 4 * (1024 + 32) + report.trainable);
    let text = report.to_string();
    assert!(
        text.contains("2 adapted, 2 frozen; 288 of 4512 parameters train (6.38 %)"),
        "{text}"
    );
    Ok(())
}

#[test]
fn an_extra_head_is_made_once_from_the_seed_and_trains() -> candle_doft::Result<()> {
    let build = || -> candle_doft::Result<(Adapter, DoftLinear, Linear)> {
        let builder = start(DoftConfig::default());
        let body = builder.wrap("body", linear(16, 32, false, DType::F32)?)?;
        let vb = builder.extra_vb(DType::F32).pp("head");
        let head = candle_nn::linear(16, 3, vb.clone())?;
        let again = candle_nn::linear(16, 3, vb.clone())?;
        assert_eq!(bits(head.weight()), bits(again.weight()));
        let wrong = builder.extra("head.weight", &seeded((2, 2), 1));
        let wrong = wrong.unwrap_err().to_string();
        assert!(
            wrong.contains("`head.weight`") && wrong.contains("[3, 16]"),
            "{wrong}"
        );
        let adapter = builder.finish()?;
        let late = vb.get((3, 3), "late").unwrap_err().to_string();
        assert!(
            late.starts_with("extra tensor `head.late`: the adapter is finished"),
            "{late}"
        );
        Ok((adapter, body, head))
    };
    let (adapter, body, head) = build()?;
    let (_, _, twin) = build()?;
    assert_eq!(bits(head.weight()), bits(twin.weight()));

    let before = bits(head.weight());
    let mut optimizer = AdamW::new_lr(adapter.vars(), 0.1)?;
    let x = seeded((4, 32), 3).to_dtype(DType::F32)?;
    let loss = head.forward(&body.forward(&x)?)?.sqr()?.mean_all()?;
    let grads = loss.backward()?;
    assert!(adapter.check_gradients(&grads)?.is_sound());
    optimizer.step(&grads)?;
    assert_ne!(bits(head.weight()), before);
    Ok(())
}

#[test]
fn a_cut_graph_is_named() -> candle_doft::Result<()> {
    let builder = start(DoftConfig::default());
    let layers = model(&builder)?;
    let adapter = builder.finish()?;
    let x = seeded((4, 32), 3).to_dtype(DType::F32)?;
    let target = seeded((4, 32), 4).to_dtype(DType::F32)?;
    let ones = Tensor::ones(32, DType::F32, &CPU)?;
    let run = |norm: &dyn Fn(&Tensor) -> Result<Tensor>| -> Result<_> {
        let mut h = norm(&layers[0].forward(&x)?)?;
        for layer in &layers[1..] {
            h = layer.forward(&h)?;
        }
        (h - &target)?.sqr()?.mean_all()?.backward()
    };
    // candle's own norm has no backward on contiguous input.
    let theirs = candle_nn::RmsNorm::new(ones.clone(), 1e-5);
    let error = adapter
        .check_gradients(&run(&|h| theirs.forward(h))?)
        .unwrap_err();
    let Error::Gradients(report) = &error else {
        panic!("{error}")
    };
    let missing = [
        "layers.0.q_proj.oft_R.weight",
        "layers.0.q_proj.dora_log_multiplier",
    ];
    assert_eq!(report.missing, missing);
    assert!(
        error
            .to_string()
            .contains("no gradient reached `layers.0.q_proj.oft_R.weight`")
    );
    assert!(error.to_string().contains("RmsNorm"), "{error}");

    let report = adapter.check_gradients(&run(&|h| Ok(h.clone()))?)?;
    assert_eq!((report.checked, report.zero.len()), (8, 0));
    assert_eq!(
        report.to_string(),
        "all 8 adapter parameters got a gradient"
    );
    Ok(())
}

#[test]
fn a_gradient_that_is_zero_by_symmetry_is_told_but_is_no_error() -> candle_doft::Result<()> {
    let builder = start(DoftConfig::default());
    let layers = model(&builder)?;
    let adapter = builder.finish()?;
    // A softmax sums to one: the sum of its outputs has no slope. And the upstream is all ones.
    let x = seeded((4, 32), 3).to_dtype(DType::F32)?;
    let mut h = x;
    for layer in &layers {
        h = layer.forward(&h)?;
    }
    let h = (h * 0.)?;
    let report = adapter.check_gradients(&h.sum_all()?.backward()?);
    // candle itself leaves out what is multiplied by the constant 0: that is a cut, and is named.
    assert!(matches!(report, Err(Error::Gradients(_))));

    // A magnitude in front of a normalisation of its single output has no slope, and never had.
    let builder = Adapter::builder(DoftConfig::default(), &Device::Cpu)?;
    let layer = builder.wrap("one", linear(1, 32, false, DType::F64)?)?;
    let adapter = builder.finish()?;
    let y = layer.forward(&seeded((4, 32), 3))?;
    let normed = y.broadcast_div(&y.sqr()?.sum_all()?.sqrt()?)?;
    let loss = (normed * seeded((4, 1), 5))?.sum_all()?;
    let report = adapter.check_gradients(&loss.backward()?)?;
    assert!(report.is_sound());
    let magnitude = adapter.magnitude_vars().remove(0);
    let slope = values(loss.backward()?.get(&magnitude).unwrap())[0];
    // Rounding may leave a trace of it, so either answer is right; a rotation is never zero here.
    assert_eq!(
        report.zero.contains(&"one.dora_log_multiplier".to_string()),
        slope == 0.
    );
    assert!(slope.abs() < 1e-12 && !report.zero.iter().any(|n| n.contains("oft_R")));
    Ok(())
}

#[test]
fn a_gradient_that_is_not_finite_is_named() -> candle_doft::Result<()> {
    let builder = start(DoftConfig::default());
    let layer = builder.wrap("a", linear(4, 32, false, DType::F32)?)?;
    let adapter = builder.finish()?;
    let x = (seeded((4, 32), 3).to_dtype(DType::F32)? * f64::INFINITY)?;
    let grads = layer.forward(&x)?.sum_all()?.backward()?;
    let error = adapter.check_gradients(&grads).unwrap_err().to_string();
    assert!(
        error.contains("`a.oft_R.weight`") && error.contains("not finite"),
        "{error}"
    );
    Ok(())
}

#[test]
fn scopes_restore_what_they_switched_even_after_a_panic() -> candle_doft::Result<()> {
    let builder = start(DoftConfig::default().with_magnitude(Magnitude::Factor));
    let layers = model(&builder)?;
    let adapter = builder.finish()?;
    for var in adapter.vars() {
        var.set(&(var.as_tensor() + 0.2)?)?;
    }
    let x = seeded((4, 32), 3).to_dtype(DType::F32)?;
    let adapted = bits(&layers[0].forward(&x)?);
    let base = layers[0].base().forward(&x)?;
    let off = adapter.with_mode(Mode::Off, || layers[0].forward(&x))?;
    assert_eq!(bits(&off), bits(&base));
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        adapter.with_mode(Mode::Off, || -> Result<()> { panic!("in the middle") })
    }));
    assert!(panicked.is_err());
    assert_eq!(bits(&layers[0].forward(&x)?), adapted);

    // What was set stays set, for what scopes leave alone.
    adapter.set_mode(Mode::Off)?;
    adapter.with_mode(Mode::Train, || -> Result<()> {
        assert_eq!(adapter.mode(), Mode::Train);
        assert_eq!(bits(&layers[0].forward(&x)?), adapted);
        Ok(())
    })?;
    assert_eq!(adapter.mode(), Mode::Off);
    assert_eq!(bits(&layers[0].forward(&x)?), bits(&base));
    adapter.set_mode(Mode::Train)?;

    let y = adapter.with_mode(Mode::Eval, || layers[0].forward(&x))?;
    assert!(!y.track_op() && bits(&y) == adapted);
    assert!(layers[0].forward(&x)?.track_op());
    Ok(())
}

#[test]
fn the_extra_tensors_of_a_file_are_there_before_they_are_asked_for() -> candle_doft::Result<()> {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("adapter.safetensors");
    let first_builder = start(DoftConfig::default());
    let expected = first_builder.extra("head.weight", &seeded((3, 4), 1))?;
    let first = first_builder.finish()?;
    first.save(&file)?;

    let builder = Adapter::load(&file, &CPU)?;
    let vb = builder.extra_vb(DType::F64);
    assert!(vb.contains_tensor("head.weight") && !vb.contains_tensor("head.bias"));
    assert_eq!(bits(&vb.get_unchecked("head.weight")?), bits(&expected));
    assert!(vb.get_unchecked("head.bias").is_err());
    assert_eq!(builder.finish()?.vars().len(), 1);
    Ok(())
}
