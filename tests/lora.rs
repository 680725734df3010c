//! LoRA and DoRA as layers of the library: PEFT's folders run, train and merge as in PEFT; beside rotations in one
//! model; saved, loaded, and written for PEFT.

mod support;

use candle_core::{DType, Module, Tensor};
use candle_doft::config::{LowRank, Rule, Strengths};
use candle_doft::file::{Changes, LoadOptions, Target, convert, convert_with};
use candle_doft::merge::{CheckpointOptions, Merge, Strength, inspect};
use candle_doft::train::AdamW;
use candle_doft::{Adapter, AdapterBuilder, Adapters, DoftConfig, DoftLinear, Mode};
use candle_nn::{Conv2d, Conv2dConfig, Embedding, Linear, ParamsAdamW};
use std::collections::BTreeMap;
use std::path::Path;
use support::golden::{golden, load};
use support::programs::python;
use support::tensors::{CPU, bits, disturb_all, relative, seeded};

type Tensors = BTreeMap<String, Tensor>;

/// What PEFT computes in f32 is off its own f64 by as much.
const BOUND: f64 = 2e-6;

fn linear(base: &Tensors, path: &str) -> Linear {
    let weight = base[&format!("{path}.weight")].clone();
    Linear::new(weight, base.get(&format!("{path}.bias")).cloned())
}

/// The model of a golden case, through the builder.
fn run(
    case: &str,
    builder: &AdapterBuilder,
    base: &Tensors,
    x: &Tensor,
) -> candle_doft::Result<Box<dyn Fn() -> candle_core::Result<Tensor>>> {
    let x = x.clone();
    Ok(match case {
        "conv" => {
            let conv = |path: &str, config| {
                let layer = linear(base, path);
                Conv2d::new(layer.weight().clone(), layer.bias().cloned(), config)
            };
            let strided = Conv2dConfig {
                stride: 2,
                padding: 1,
                ..Default::default()
            };
            let first = builder.wrap("conv", conv("conv", strided))?;
            let second = builder.wrap("point", conv("point", Conv2dConfig::default()))?;
            Box::new(move || second.forward(&first.forward(&x)?.tanh()?))
        }
        "embedding" => {
            let table = builder.wrap("table", Embedding::new(base["table.weight"].clone(), 8))?;
            let weight = builder.extra("head.weight", &base["head.weight"])?;
            let bias = builder.extra("head.bias", &base["head.bias"])?;
            let head = Linear::new(weight.as_tensor().clone(), Some(bias.as_tensor().clone()));
            Box::new(move || head.forward(&table.forward(&x)?))
        }
        "transposed" => {
            let weight = base["up.weight"].t()?.contiguous()?;
            let up = builder.wrap("up", Linear::new(weight, Some(base["up.bias"].clone())))?;
            Box::new(move || up.forward(&x))
        }
        _ => {
            let mut up = linear(base, "up");
            if case == "rslora" {
                let bias = builder.extra("up.bias", &base["up.bias"])?;
                up = Linear::new(up.weight().clone(), Some(bias.as_tensor().clone()));
            }
            let bias = up.bias().cloned();
            let up = builder.wrap("up", Linear::new(up.weight().clone(), None))?;
            let down = builder.wrap("down", linear(base, "down"))?;
            Box::new(move || {
                let y = up.forward(&x)?;
                let y = match &bias {
                    Some(bias) => y.broadcast_add(bias)?,
                    None => y,
                };
                down.forward(&y.tanh()?)
            })
        }
    })
}

const CASES: [&str; 7] = [
    "lora",
    "dora",
    "rslora",
    "patterns",
    "transposed",
    "conv",
    "embedding",
];

#[test]
fn folders_of_peft_run_train_and_merge_as_in_peft() -> candle_doft::Result<()> {
    let home = tempfile::tempdir().unwrap();
    for case in CASES {
        let folder = golden("lora").join(case);
        let base = load(&folder.join("base.safetensors"))?;
        let io = load(&folder.join("io.safetensors"))?;
        let close = |what: &str, found: &Tensor, expected: &Tensor| {
            let off = relative(found, expected);
            assert!(off < BOUND, "{case}, {what}: off by {off:e}");
        };
        let builder = Adapter::load(&folder, &CPU)?;
        let forward = run(case, &builder, &base, &io["x"])?;
        let adapter = builder.finish()?;
        let y = forward()?;
        close("y", &y, &io["y"]);
        let held = adapter.with_mode(Mode::Eval, &*forward)?;
        close("held y", &held, &io["y"]);
        assert!(!held.track_op() || case == "embedding" || case == "rslora");
        let grads = (y * &io["g"])?.sum_all()?.backward()?;
        let mut seen = 0;
        for (name, var) in adapter.named_vars() {
            let key = match name.as_str() {
                "head.weight" | "head.bias" => name.replace("head.", "head.modules_to_save."),
                "up.bias" => "up.base_layer.bias".to_string(),
                _ => name.clone(),
            };
            let grad = grads.get(&var).unwrap_or_else(|| panic!("{case}: {name}"));
            close(&name, grad, &io[&format!("grad.{key}")]);
            seen += 1;
        }
        assert_eq!(
            seen,
            io.keys().filter(|key| key.starts_with("grad.")).count()
        );
        // On disk.
        let merged = home.path().join(format!("{case}.safetensors"));
        let merge =
            Merge::new().with_file(&folder, &LoadOptions::default(), Strength::default())?;
        merge.checkpoint(
            folder.join("base.safetensors"),
            &merged,
            CheckpointOptions::default(),
        )?;
        let merged = load(&merged)?;
        for (key, expected) in io
            .iter()
            .filter_map(|(k, t)| Some((k.strip_prefix("merged.")?, t)))
        {
            close(key, &merged[key], expected);
        }
        let found = inspect(
            &folder,
            &LoadOptions::default(),
            Some(&folder.join("base.safetensors")),
        )?;
        assert_eq!(found.dialect.to_string(), "lora");
        assert!(
            found
                .layers
                .iter()
                .all(|layer| layer.rank.is_some() && layer.mismatch.is_none())
        );
        // Saved as a file of this crate, and as a folder for PEFT.
        let own = home.path().join("own.safetensors");
        adapter.save(&own)?;
        let builder = Adapter::load(&own, &CPU)?;
        let again = run(case, &builder, &base, &io["x"])?;
        builder
            .finish()?
            .save(home.path().join("again.safetensors"))?;
        assert_eq!(bits(&again()?), bits(&forward()?), "{case}");
        let read = |name: &str| std::fs::read(home.path().join(name)).unwrap();
        assert!(
            read("own.safetensors") == read("again.safetensors"),
            "{case}"
        );
    }
    Ok(())
}

#[test]
fn folders_for_peft_are_read_by_peft() -> candle_doft::Result<()> {
    let home = tempfile::tempdir().unwrap();
    let target = Target::Peft {
        drop_magnitude: false,
    };
    for case in CASES {
        let folder = golden("lora").join(case);
        let out = home.path().join(case);
        let options = LoadOptions::default();
        convert(&folder, &out, target, &options, &Default::default())?;
        let theirs = load(&folder.join("adapter_model.safetensors"))?;
        let ours = load(&out.join("adapter_model.safetensors"))?;
        let names: Vec<&String> = theirs.keys().collect();
        assert_eq!(ours.keys().collect::<Vec<_>>(), names, "{case}");
        for (name, tensor) in &theirs {
            assert_eq!(bits(tensor), bits(&ours[name]), "{case}: {name}");
        }
        // What is written is read here as what it was.
        let merged = |adapter: &Path| -> candle_doft::Result<Vec<u8>> {
            let file = home.path().join("merged.safetensors");
            let merge = Merge::new().with_file(adapter, &options, Strength::default())?;
            merge.checkpoint(
                folder.join("base.safetensors"),
                &file,
                CheckpointOptions::default(),
            )?;
            Ok(std::fs::read(file).unwrap())
        };
        assert!(merged(&out)? == merged(&folder)?, "{case}");
        let (Some(mut python), false) = (python("peft, transformers"), case == "transposed") else {
            continue;
        };
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/peft/merge.py");
        let file = home.path().join("theirs.safetensors");
        let base = folder.join("base.safetensors");
        let ended = python
            .arg(script)
            .args([&base, &out, &file])
            .output()
            .unwrap();
        assert!(
            ended.status.success(),
            "{}",
            String::from_utf8_lossy(&ended.stderr)
        );
        let io = load(&folder.join("io.safetensors"))?;
        for (name, weight) in load(&file)? {
            let Some(expected) = io.get(&format!("merged.{name}")) else {
                continue;
            };
            assert!(relative(&weight, expected) < BOUND, "{case}: {name}");
        }
    }
    Ok(())
}

fn wrap(builder: &AdapterBuilder, path: &str) -> candle_doft::Result<DoftLinear> {
    let weight = (seeded((24, 32), 9) * 0.2)?.to_dtype(DType::F32)?;
    let bias = seeded(24, 8).to_dtype(DType::F32)?;
    builder.wrap(path, Linear::new(weight, Some(bias)))
}

#[test]
fn rotations_and_low_rank_matrices_live_in_one_model_and_one_file() -> candle_doft::Result<()> {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("both.safetensors");
    let config = DoftConfig::default()
        .with_block_size(8)
        .with_rule(Rule::new("b").with_low_rank(LowRank::new(4, 8.)))
        .with_rule(
            Rule::new("c").with_low_rank(LowRank::new(2, 8.).with_rslora(true).with_dora(true)),
        );
    let x = seeded((3, 32), 1).to_dtype(DType::F32)?;
    let build = |builder: AdapterBuilder| -> candle_doft::Result<(Vec<DoftLinear>, Adapter)> {
        let layers = ["a", "b", "c"].map(|path| wrap(&builder, path).unwrap());
        Ok((layers.into(), builder.finish()?))
    };
    let (layers, adapter) = build(Adapter::builder(config.clone(), &CPU)?)?;
    // A fresh one changes nothing but for rounding.
    for layer in &layers {
        let base = layer.base().forward(&x)?;
        assert!(relative(&layer.forward(&x)?, &base) < 1e-6);
    }
    let names: Vec<String> = adapter
        .named_vars()
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    let expected = [
        "a.oft_R.weight",
        "a.dora_log_multiplier",
        "b.lora_A.weight",
        "b.lora_B.weight",
        "c.lora_A.weight",
        "c.lora_B.weight",
        "c.lora_magnitude_vector.weight",
    ];
    assert_eq!(names, expected);
    let report = adapter.report();
    let ranks: Vec<Option<usize>> = report.layers.iter().map(|layer| layer.rank).collect();
    assert_eq!(ranks, [None, Some(4), Some(2)]);
    assert_eq!(
        report.trainable,
        4 * 28 + 24 + 4 * (32 + 24) + 2 * (32 + 24) + 24
    );
    // The same seed, the same start.
    let (again, _) = build(Adapter::builder(config, &CPU)?)?;
    assert_eq!(bits(&again[1].forward(&x)?), bits(&layers[1].forward(&x)?));
    // It trains.
    let params = ParamsAdamW {
        lr: 1e-2,
        weight_decay: 0.,
        ..Default::default()
    };
    let mut optimizer = AdamW::for_adapter(&adapter, params)?;
    let loss = |layers: &[DoftLinear]| -> candle_core::Result<Tensor> {
        let mut sum = Tensor::zeros((), DType::F32, &CPU)?;
        for layer in layers {
            sum = (sum + layer.forward(&x)?.sqr()?.mean_all()?)?;
        }
        Ok(sum)
    };
    let before = loss(&layers)?.to_scalar::<f32>()?;
    for step in 0..30 {
        let mut gradients = optimizer.gradients();
        let grads = gradients.backward(&loss(&layers)?, 1.)?;
        if step == 1 {
            adapter.check_gradients(&grads)?;
        }
        optimizer.step(&gradients)?;
    }
    assert!(loss(&layers)?.to_scalar::<f32>()? < 0.9 * before);
    // Merged, saved and loaded it is the same.
    for layer in &layers {
        let merged = layer.merge()?.forward(&x)?;
        assert!(relative(&merged, &layer.forward(&x)?) < 2e-6);
    }
    adapter.save(&file)?;
    let (loaded, _) = build(Adapter::load(&file, &CPU)?)?;
    for (a, b) in loaded.iter().zip(&layers) {
        assert_eq!(bits(&a.forward(&x)?), bits(&b.forward(&x)?));
    }
    // A PEFT folder has one kind, and turns are of rotations alone.
    let target = Target::Peft {
        drop_magnitude: true,
    };
    let options = LoadOptions::default();
    let error = convert(
        &file,
        home.path().join("peft"),
        target,
        &options,
        &Default::default(),
    );
    assert!(
        error
            .unwrap_err()
            .to_string()
            .contains("2 of 3 layers are LoRA or DoRA")
    );
    let error = Merge::new()
        .with_file(&file, &options, Strength::geodesic(0.5))
        .unwrap_err();
    assert!(
        error
            .to_string()
            .contains("low-rank matrices, which turn nothing"),
        "{error}"
    );
    for (target, changes, part) in [
        (
            Target::Series {
                drop_magnitude: true,
            },
            Changes::default(),
            "the plain series is for rotations",
        ),
        (
            Target::Doft,
            Changes::default().with_strength(Strengths::from(0.5)),
            "is LoRA or DoRA",
        ),
        (
            Target::Doft,
            Changes::default().with_projection(true),
            "a projection is for rotations",
        ),
    ] {
        let out = home.path().join("out.safetensors");
        let error = convert_with(&file, &out, target, &options, &Default::default(), &changes);
        let error = error.unwrap_err().to_string();
        assert!(error.contains(part) && !out.exists(), "{error}");
    }
    let error = DoftConfig::lora(0, 1.).validate().unwrap_err().to_string();
    assert!(error.contains("`rank` is 0"), "{error}");
    let error = DoftConfig::lora(4, 1.)
        .with_dropout(0.1)
        .validate()
        .unwrap_err()
        .to_string();
    assert!(error.contains("`dropout` is 0.1"), "{error}");
    Ok(())
}

#[test]
fn rows_of_a_batch_run_under_rotations_lora_and_dora_together() -> candle_doft::Result<()> {
    let builder = Adapter::builder(DoftConfig::default().with_block_size(8), &CPU)?;
    let layer = wrap(&builder, "a")?;
    let adapters = Adapters::new("doft", builder.finish()?);
    adapters.add("lora", DoftConfig::lora(4, 8.))?;
    adapters.add("dora", DoftConfig::dora(2, 4.))?;
    for name in adapters.names() {
        disturb_all(adapters.get(&name)?.vars(), 0.2)?;
    }
    let x = seeded((5, 3, 32), 1).to_dtype(DType::F32)?;
    let rows = [Some("dora"), Some("doft"), None, Some("lora"), Some("dora")];
    let mixed = adapters.rows(&rows)?.run(|| layer.forward(&x))?;
    for (i, name) in rows.iter().enumerate() {
        let alone = match name {
            Some(name) => adapters
                .get(name)?
                .with_mode(Mode::Eval, || layer.forward(&x))?,
            None => layer.base().forward(&x)?,
        };
        assert!(relative(&mixed.get(i)?, &alone.get(i)?) < 1e-6, "row {i}");
    }
    Ok(())
}
