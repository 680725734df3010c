//! What DOFT convolutions promise: they start at their base, merge to what they compute, have the
//! slopes of their loss as gradients, and compute what OneTrainer computes.

mod support;

use candle_core::{DType, Result, Tensor, Var, safetensors};
use candle_doft::config::Rule;
use candle_doft::{Adapter, DoftConfig, DoftConv1d, DoftConv2d, Error, Magnitude, Pattern, frozen};
use candle_nn::{Conv1d, Conv1dConfig, Conv2d, Conv2dConfig, Module, VarBuilder, VarMap};
use support::golden::golden;
use support::slopes::check_slopes;
use support::tensors::{CPU, bits, disturb, disturb_all, named, relative, seeded, values};
use support::tolerance::{self, GOLDEN_GRADIENTS, GOLDEN_VALUES};

const KINDS: [Magnitude; 4] = [
    Magnitude::Log,
    Magnitude::Factor,
    Magnitude::Absolute,
    Magnitude::None,
];

/// Stride, padding, dilation and groups.
const CONFIGS: [(usize, usize, usize, usize); 6] = [
    (1, 0, 1, 1),
    (2, 1, 1, 1),
    (1, 2, 2, 1),
    (2, 1, 1, 2),
    (1, 1, 2, 2),
    (1, 1, 1, 6),
];

fn conv2d(config: Conv2dConfig, kernel: (usize, usize), dtype: DType) -> Result<Conv2d> {
    let weight = seeded((12, 6 / config.groups, kernel.0, kernel.1), 1).to_dtype(dtype)?;
    let bias = seeded(12, 2).to_dtype(dtype)?;
    Ok(Conv2d::new(weight, Some(bias), config))
}

fn config2d((stride, padding, dilation, groups): (usize, usize, usize, usize)) -> Conv2dConfig {
    Conv2dConfig {
        stride,
        padding,
        dilation,
        groups,
        ..Default::default()
    }
}

fn config1d((stride, padding, dilation, groups): (usize, usize, usize, usize)) -> Conv1dConfig {
    Conv1dConfig {
        stride,
        padding,
        dilation,
        groups,
        ..Default::default()
    }
}

fn wrapped(base: Conv2d, config: &DoftConfig) -> Result<(DoftConv2d, VarMap)> {
    let varmap = VarMap::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F32, &CPU).pp("conv");
    Ok((DoftConv2d::new(base, config, vb)?, varmap))
}

#[test]
fn a_fresh_layer_answers_what_candle_answers() -> Result<()> {
    for dtype in [DType::F32, DType::F64] {
        for config in CONFIGS.map(config2d) {
            for (kernel, image) in [((3, 3), (8, 7)), ((1, 1), (5, 6)), ((3, 2), (7, 8))] {
                if kernel == (1, 1) && config.groups == 6 {
                    continue; // One entry to a patch: nothing to rotate.
                }
                let base = conv2d(config, kernel, dtype)?;
                let (layer, _) = wrapped(base.clone(), &DoftConfig::default())?;
                let x = seeded((2, 6, image.0, image.1), 3).to_dtype(dtype)?;
                let (ours, theirs) = (layer.forward(&x)?, base.forward(&x)?);
                let frozen = layer.base().forward(&x)?;
                assert_eq!(bits(&ours), bits(&frozen), "{config:?}");
                if config.groups == 1 {
                    assert_eq!(bits(&ours), bits(&theirs), "{config:?} {kernel:?}");
                } else {
                    assert!(relative(&ours, &theirs) < tolerance::merged(dtype) / 5.);
                }
            }
        }
    }
    Ok(())
}

#[test]
fn merged_equals_unmerged_and_norms_are_kept() -> Result<()> {
    for dtype in [DType::F32, DType::F64] {
        for config in CONFIGS.map(config2d) {
            for (kind, share) in KINDS.into_iter().flat_map(|k| [(k, false), (k, true)]) {
                let doft = DoftConfig::default()
                    .with_block_size(3)
                    .with_magnitude(kind)
                    .with_block_share(share);
                let (layer, varmap) = wrapped(conv2d(config, (3, 3), dtype)?, &doft)?;
                disturb(&varmap, 0.4)?;
                let x = seeded((2, 6, 9, 8), 4).to_dtype(dtype)?;
                let merged = layer.merge()?;
                let off = relative(&merged.forward(&x)?, &layer.forward(&x)?);
                assert!(
                    off < tolerance::merged(dtype),
                    "{config:?} {kind:?}: {off:e}"
                );
                let norms = merged.weight().flatten_from(1)?.sqr()?.sum(1)?.sqrt()?;
                assert!(relative(&norms, &layer.magnitude()?) < tolerance::merged(dtype));
                assert!(relative(merged.weight(), &layer.base().weight()?) > 1e-2);
            }
        }
    }
    Ok(())
}

#[test]
fn gradients_are_slopes() -> Result<()> {
    let images = [(5, 4), (4, 5), (5, 5)];
    for (i, config) in CONFIGS.map(config2d).into_iter().enumerate() {
        let kind = KINDS[i % KINDS.len()];
        let (height, width) = images[i % images.len()];
        // Without groups, block size 3 takes the way of the patches, 9 that of the weight.
        for (block, share) in [(3, false), (9, false), (3, true)] {
            let doft = DoftConfig::default()
                .with_block_size(block)
                .with_magnitude(kind)
                .with_block_share(share);
            let (layer, varmap) = wrapped(conv2d(config, (3, 3), DType::F64)?, &doft)?;
            disturb(&varmap, 0.3)?;
            let x = Var::from_tensor(&seeded((2, 6, height, width), 3))?;
            let what = format!("{config:?}, b = {block}");
            // A transposed view, so that strides reach the op.
            let view = || x.transpose(2, 3)?.contiguous()?.transpose(2, 3);
            check_slopes(&what, &named(&varmap, [("x", &x)]), || {
                layer.forward(&view()?)
            })?;
        }
    }
    Ok(())
}

#[test]
fn one_dimension_is_two_with_a_kernel_of_height_one() -> Result<()> {
    for config in CONFIGS.map(config1d) {
        let weight = seeded((12, 6 / config.groups, 3), 1);
        let base = Conv1d::new(weight, Some(seeded(12, 2)), config);
        let varmap = VarMap::new();
        let vb = VarBuilder::from_varmap(&varmap, DType::F32, &CPU).pp("conv");
        let doft = DoftConfig::default().with_block_size(3);
        let layer = DoftConv1d::new(base.clone(), &doft, vb)?;
        let x = Var::from_tensor(&seeded((2, 6, 9), 3))?;
        let (ours, theirs) = (layer.forward(&x)?, base.forward(&x)?);
        match config.groups {
            1 => assert_eq!(bits(&ours), bits(&theirs)),
            _ => assert!(relative(&ours, &theirs) < 1e-14),
        }
        disturb(&varmap, 0.3)?;
        let merged = layer.merge()?.forward(&x)?;
        assert!(relative(&merged, &layer.forward(&x)?) < tolerance::merged(DType::F64));
        check_slopes("1d", &named(&varmap, [("x", &x)]), || layer.forward(&x))?;
    }
    Ok(())
}

#[test]
fn half_kernels_merge_within_their_rounding() -> Result<()> {
    for dtype in [DType::F16, DType::BF16] {
        for groups in [1, 2] {
            let config = config2d((2, 1, 1, groups));
            let base = conv2d(config, (3, 3), dtype)?;
            let (layer, varmap) = wrapped(base, &DoftConfig::default().with_block_size(3))?;
            disturb(&varmap, 0.4)?;
            let x = seeded((2, 6, 9, 8), 4).to_dtype(dtype)?;
            let y = layer.forward(&x)?;
            assert_eq!(y.dtype(), dtype);
            let wide = x.to_dtype(DType::F32)?;
            assert_eq!(layer.forward(&wide)?.dtype(), DType::F32);
            // candle convolves in the half type, step by step; the merged weight in f32 is the twin.
            let merged = layer.merge()?;
            let (weight, bias) = (merged.weight(), merged.bias().unwrap());
            let bias = bias.to_dtype(DType::F32)?;
            let twin = Conv2d::new(weight.to_dtype(DType::F32)?, Some(bias), config);
            let off = relative(&y.to_dtype(DType::F32)?, &twin.forward(&wide)?);
            assert!(off < tolerance::merged(dtype), "{dtype:?}: {off:e}");
            let x = Var::from_tensor(&x)?;
            let grads = layer.forward(&x)?.sqr()?.mean_all()?.backward()?;
            for (name, var) in named(&varmap, [("x", &x)]) {
                let grad = values(grads.get(&var).expect(&name));
                assert!(grad.iter().all(|g| g.is_finite()), "{name}");
                assert!(grad.iter().any(|g| *g != 0.), "{name}");
            }
        }
    }
    Ok(())
}

/// Loaded as a user loads them: rotated the other way there, and so negated in this crate.
#[test]
fn kernels_of_onetrainer_give_its_outputs_and_gradients() -> Result<()> {
    let cases = [
        "oft_plain_conv3x3",
        "doft_g1_conv3x3",
        "doft_g3_conv1x1",
        "doft_g3_conv3x3",
        "share_conv3x3",
        "cans_clip_conv3x3",
        "cans_exp_conv3x3",
    ];
    for case in cases {
        let folder = golden("onetrainer").join(case);
        let meta = std::fs::read(folder.join("meta.json")).unwrap();
        let meta: serde_json::Value = serde_json::from_slice(&meta).unwrap();
        let path = meta["layers"][0]["path"].as_str().unwrap().to_string();
        let padding = meta["layers"][0]["padding"][0].as_u64().unwrap() as usize;
        let base = safetensors::load(folder.join("base.safetensors"), &CPU)?;
        let io = safetensors::load(folder.join("io.safetensors"), &CPU)?;
        let file = folder.join("adapter.safetensors");
        let stored = safetensors::load(&file, &CPU)?;
        let builder = Adapter::load(&file, &CPU)?;
        let weight = base[&format!("{path}.weight")].clone();
        let bias = base.get(&format!("{path}.bias")).cloned();
        let config = config2d((1, padding, 1, 1));
        let layer = builder.wrap(&path, Conv2d::new(weight, bias, config))?;
        let adapter = builder.finish()?;

        let x = Var::from_tensor(&io["x"])?;
        let y = layer.forward(&x)?;
        let off = |what: &str, found: &Tensor| relative(found, &io[what]);
        assert!(off("y", &y) <= GOLDEN_VALUES, "{case}: y");
        let found = off("w_eff", &layer.effective_weight()?);
        assert!(found <= GOLDEN_VALUES, "{case}: w_eff is off by {found:e}");
        let grads = (y * &io["g"])?.sum_all()?.backward()?;
        let dx = grads.get(&x).expect("a gradient of x");
        assert!(off("grad.x", dx) <= GOLDEN_GRADIENTS, "{case}: dx");
        for (name, var) in adapter.named_vars() {
            let role = name.strip_prefix(&format!("{path}.")).unwrap();
            let grad = grads.get(&var).expect(role).flatten_all()?;
            // What a parameter is divided or negated by, its gradient is multiplied with.
            let factor = match role {
                "oft_R.weight" => values(&stored[&name])[0] / values(&var)[0],
                _ => 1.,
            };
            let expected = io[&format!("grad.{role}")].flatten_all()?;
            let found = relative(&grad, &(expected * factor)?);
            assert!(
                found <= GOLDEN_GRADIENTS,
                "{case}: {role} is off by {found:e}"
            );
        }
    }
    Ok(())
}

#[test]
fn wrong_input_is_named_with_its_layer() -> Result<()> {
    let base = conv2d(config2d((1, 0, 1, 2)), (3, 3), DType::F32)?;
    let (layer, _) = wrapped(base, &DoftConfig::default())?;
    let error = |shape: &[usize], dtype| {
        let x = Tensor::zeros(shape, dtype, &CPU).unwrap();
        layer.forward(&x).unwrap_err().to_string()
    };
    assert_eq!(
        error(&[1, 5, 8, 8], DType::F32),
        "layer `conv`: the input has shape [1, 5, 8, 8], expected (N, 6, H, W)"
    );
    assert_eq!(
        error(&[6, 8, 8], DType::F32),
        "layer `conv`: the input has shape [6, 8, 8], expected (N, 6, H, W)"
    );
    assert_eq!(
        error(&[1, 6, 2, 8], DType::F32),
        "layer `conv`: the input has shape [1, 6, 2, 8], expected room for a kernel of (3, 3) with \
         dilation (1, 1) and padding (0, 0)"
    );
    assert_eq!(
        error(&[1, 6, 8, 8], DType::U32),
        "layer `conv`: the input has dtype U32, expected F32, the dtype of the weight"
    );
    assert_eq!(
        error(&[1, 6, 0, 8], DType::F32),
        "layer `conv`: the input has shape [1, 6, 0, 8], expected no empty axis but the first"
    );
    let x = Tensor::zeros((0, 6, 8, 8), DType::F32, &CPU)?;
    assert_eq!(layer.forward(&x)?.dims(), [0, 12, 6, 6]);

    let refused = |weight: Tensor, config| {
        let vb = VarBuilder::zeros(DType::F32, &CPU).pp("a");
        let base = Conv2d::new(weight, None, config);
        DoftConv2d::new(base, &DoftConfig::default(), vb)
    };
    let weight = Tensor::zeros((12, 6, 3), DType::F32, &CPU)?;
    assert_eq!(
        refused(weight, config2d((1, 0, 1, 1)))
            .unwrap_err()
            .to_string(),
        "layer `a`: the weight has shape [12, 6, 3], expected 4 axes, none of them empty"
    );
    // One that cannot run cannot be adapted.
    for (config, said) in [
        ((1, 0, 1, 5), "5 groups"),
        ((1, 0, 1, 0), "0 groups"),
        ((0, 0, 1, 1), "stride 0"),
        ((1, 0, 0, 1), "dilation 0"),
    ] {
        let weight = Tensor::zeros((12, 6, 3, 3), DType::F32, &CPU)?;
        let plain = frozen::Conv2d::new(weight.clone(), None, config2d(config));
        let x = Tensor::zeros((1, 6 * config.3.max(1), 8, 8), DType::F32, &CPU)?;
        let error = plain.forward(&x).unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
        let error = refused(weight, config2d(config)).unwrap_err().to_string();
        assert!(error.contains(said) && error.contains("`a`"), "{error}");
    }
    let weight = Tensor::zeros((12, 6, 3, 3), DType::F32, &CPU)?;
    let bias = Tensor::zeros(1, DType::F32, &CPU)?;
    let short = frozen::Conv2d::new(weight, Some(bias), config2d((1, 0, 1, 1)));
    let x = Tensor::zeros((1, 6, 8, 8), DType::F32, &CPU)?;
    assert_eq!(
        short.forward(&x).unwrap_err().to_string(),
        "layer `the convolution`: the bias has shape [1], expected [12], one for each output"
    );
    Ok(())
}

/// Settings from a file that is wrong: sizes that overflow are refused, those that do not are run.
#[test]
fn settings_as_large_as_a_number_can_be_are_refused_or_run() -> Result<()> {
    const HUGE: usize = 1 << 63;
    let weight = |k: usize| seeded((4, 2, k, k), 1).to_dtype(DType::F32);
    let x = Var::from_tensor(&seeded((1, 2, 5, 5), 2).to_dtype(DType::F32)?)?;
    let run = |k: usize, settings: (usize, usize, usize, usize)| -> Result<[Result<Tensor>; 3]> {
        let (weight, block) = (weight(k)?, DoftConfig::default().with_block_size(2));
        let plain = frozen::Conv2d::new(weight.clone(), None, config2d(settings));
        let line = frozen::Conv1d::new(weight.get_on_dim(2, 0)?, None, config1d(settings));
        let vb = VarBuilder::zeros(DType::F32, &CPU).pp("a");
        let adapted = DoftConv2d::new(plain.clone(), &block, vb);
        let of_line = line.forward(&x.get_on_dim(2, 0)?);
        let of_line = of_line.and_then(|y| y.unsqueeze(2));
        Ok([
            plain.forward(&x),
            adapted.map_err(Into::into).and_then(|a| a.forward(&x)),
            of_line,
        ])
    };
    for (settings, said) in [
        (
            (1, 0, HUGE, 1),
            "with dilation (9223372036854775808, 9223372036854775808)",
        ),
        ((1, 0, usize::MAX, 1), "room for a kernel"),
        ((1, HUGE, 1, 1), "room for a kernel"),
        ((1, HUGE - 1, 1, 1), "room for a kernel"),
        ((1, 1 << 61, 1, 1), "an answer that memory can hold"),
        ((HUGE, HUGE, HUGE, 1), "room for a kernel"),
        ((1, 0, 1, HUGE), "9223372036854775808 groups"),
    ] {
        let [plain, adapted, line] = run(3, settings)?;
        for y in [plain, adapted] {
            let error = y.expect_err(said).to_string();
            assert!(error.contains(said), "{settings:?}: {error}");
        }
        line.expect_err(said);
    }
    // One place, whatever the step to the next, and one tap, whatever the distance to another.
    for (k, plain, huge) in [
        (3, (100, 0, 1, 1), (HUGE, 0, 1, 1)),
        (1, (1, 0, 1, 1), (1, 0, HUGE, 1)),
    ] {
        for (y, expected) in run(k, huge)?.into_iter().zip(run(k, plain)?) {
            let (y, expected) = (y?, expected?);
            assert!(relative(&y, &expected) < 1e-6, "{huge:?}");
            let slope = |y: &Tensor| -> Result<Tensor> {
                let grads = y.sqr()?.sum_all()?.backward()?;
                Ok(grads.get(&x).expect("a gradient").clone())
            };
            assert!(relative(&slope(&y)?, &slope(&expected)?) < 1e-6, "{huge:?}");
        }
    }
    Ok(())
}

#[test]
fn dropout_repeats_by_seed() -> Result<()> {
    let doft = DoftConfig::default().with_block_size(3).with_dropout(0.5);
    let make = || -> Result<DoftConv2d> {
        let base = conv2d(config2d((1, 1, 1, 1)), (3, 3), DType::F32)?;
        let (layer, varmap) = wrapped(base, &doft)?;
        disturb(&varmap, 0.3)?;
        Ok(layer)
    };
    let (first, second) = (make()?, make()?);
    let x = seeded((1, 6, 5, 5), 3).to_dtype(DType::F32)?;
    let a = bits(&first.forward(&x)?);
    assert_eq!(a, bits(&second.forward(&x)?));
    assert_ne!(a, bits(&first.forward(&x)?));
    Ok(())
}

/// Kernels are stored the way OneTrainer turns them; what was trained is what is loaded and merged.
#[test]
fn trained_kernels_survive_saving_loading_and_merging() -> candle_doft::Result<()> {
    let two = conv2d(config2d((2, 1, 1, 2)), (3, 3), DType::F32)?;
    let weight = seeded((12, 6, 3), 1).to_dtype(DType::F32)?;
    let one = Conv1d::new(weight, None, config1d((1, 1, 1, 1)));
    let config = DoftConfig::default().with_block_size(3);
    let builder = Adapter::builder(config, &CPU)?;
    let first = builder.wrap("down", two.clone())?;
    let second = builder.wrap("audio", one.clone())?;
    let error = builder.wrap("down", two.clone()).unwrap_err().to_string();
    assert!(error.contains("`down` is wrapped already"), "{error}");
    let adapter = builder.finish()?;
    disturb_all(adapter.vars(), 0.2)?;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("adapter.safetensors");
    adapter.save(&file)?;

    let x = seeded((1, 6, 8, 7), 5).to_dtype(DType::F32)?;
    let builder = Adapter::load(&file, &CPU)?;
    let loaded = builder.wrap("down", two.clone())?;
    let other = builder.wrap("audio", one.clone())?;
    builder.finish()?;
    assert_eq!(bits(&loaded.forward(&x)?), bits(&first.forward(&x)?));
    let line = x.narrow(2, 0, 1)?.squeeze(2)?;
    assert_eq!(bits(&other.forward(&line)?), bits(&second.forward(&line)?));

    let tensors = [
        ("down.weight", two.weight().clone()),
        ("down.bias", two.bias().unwrap().clone()),
        ("audio.weight", one.weight().clone()),
    ];
    let tensors = tensors.map(|(name, tensor)| (name.to_string(), tensor));
    let vb = VarBuilder::from_tensors(tensors.into_iter().collect(), DType::F32, &CPU);
    let kernels = adapter.merged(vb, |vb| -> Result<_> {
        let down = vb.get((12, 3, 3, 3), "down.weight")?;
        Ok((down, vb.get((12, 6, 3), "audio.weight")?))
    })?;
    assert_eq!(bits(&kernels.0), bits(&first.effective_weight()?));
    assert_eq!(bits(&kernels.1), bits(&second.effective_weight()?));

    let builder = Adapter::load(&file, &CPU)?;
    let linear = candle_nn::Linear::new(Tensor::zeros((12, 27), DType::F32, &CPU)?, None);
    let error = builder.wrap("down", linear).unwrap_err().to_string();
    assert!(error.contains("`down` is a Linear layer"), "{error}");
    Ok(())
}

#[test]
fn layers_of_every_kind_take_their_settings_from_rules() -> candle_doft::Result<()> {
    let config = DoftConfig::default()
        .with_block_size(3)
        .with_rule(Rule::new(Pattern::from("down")).with_block_size(9))
        .with_rule(Rule::new(Pattern::from("up")).with_magnitude(Magnitude::None));
    let builder = Adapter::builder(config, &CPU)?;
    let base = || conv2d(config2d((1, 0, 1, 1)), (3, 3), DType::F32).unwrap();
    let down = builder.wrap("down", base())?;
    builder.wrap("up", base())?;
    let adapter = builder.finish()?;
    assert_eq!(down.layout().unwrap().block_size, 9);
    let names: Vec<String> = adapter.named_vars().into_iter().map(|(n, _)| n).collect();
    assert_eq!(
        names,
        [
            "down.oft_R.weight",
            "down.dora_log_multiplier",
            "up.oft_R.weight"
        ]
    );
    let linear_only = DoftConfig::default().with_targets(candle_doft::Targets::AllLinear);
    let builder = Adapter::builder(linear_only, &CPU)?;
    assert!(!builder.wrap("down", base())?.is_adapted());
    assert!(matches!(builder.finish(), Err(Error::NoLayers)));
    Ok(())
}
