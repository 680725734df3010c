//! What a run keeps from step to step and in a checkpoint: copies in f32 of half variables, and what the
//! parameters of its layers mean.

mod support;

use candle_core::{DType, Result, Tensor, Var};
use candle_doft::config::Rule;
use candle_doft::train::{AdamW, Checkpoint, Group};
use candle_doft::{Adapter, DoftConfig, Magnitude, Map};
use candle_nn::{Linear, ParamsAdamW};
use support::tensors::{CPU, disturb_all, seeded, values};

const PARAMS: ParamsAdamW = ParamsAdamW {
    lr: 1e-2,
    beta1: 0.9,
    beta2: 0.999,
    eps: 1e-8,
    weight_decay: 0.1,
};

fn vars(dtype: DType) -> Result<Vec<(String, Var)>> {
    let var = |seed| Var::from_tensor(&seeded((3, 4), seed).to_dtype(dtype)?);
    Ok(vec![("a".into(), var(1)?), ("b".into(), var(2)?)])
}

fn loss(vars: &[(String, Var)], seed: u64) -> Result<Tensor> {
    let target = seeded((3, 4), seed).to_dtype(vars[0].1.dtype())?;
    ((vars[0].1.as_tensor() * vars[1].1.as_tensor())? - target)?
        .sqr()?
        .mean_all()
}

#[test]
fn variables_in_half_precision_move_by_the_rate_and_are_resumed() -> candle_doft::Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint.safetensors");
    for dtype in [DType::F16, DType::BF16] {
        let all = vars(dtype)?;
        let before: Vec<Tensor> = all.iter().map(|(_, v)| v.copy().unwrap()).collect();
        let params = ParamsAdamW {
            weight_decay: 0.,
            ..PARAMS
        };
        let mut optimizer = AdamW::new(vec![Group::new(all.clone())], params.clone())?;
        let mut gradients = optimizer.gradients();
        // Their squares are below the least number of f16.
        gradients.backward(&(loss(&all, 3)?.to_dtype(DType::F32)? * 1e-2)?, 1.)?;
        optimizer.step(&gradients)?;
        for ((name, var), before) in all.iter().zip(&before) {
            let moved = (var.as_tensor().to_dtype(DType::F64)? - before.to_dtype(DType::F64)?)?;
            let moved = moved.abs()?.flatten_all()?.to_vec1::<f64>()?;
            // Half of the last bit of a value below 4 is rounded away.
            let rounding = if dtype == DType::F16 { 1e-3 } else { 8e-3 };
            let near = moved.iter().all(|step| (step - params.lr).abs() < rounding);
            assert!(near, "{dtype:?} {name}: {moved:?}");
        }
        Checkpoint::save(&path, &optimizer, &(), &())?;
        let mut again = AdamW::new(vec![Group::new(vars(dtype)?)], params)?;
        Checkpoint::load(&path)?.restore(&mut again)?;
        assert_eq!(again.steps(), 1);
    }
    Ok(())
}

/// A step below the rounding of a half variable is lost unless it is made on a wider copy.
#[test]
fn steps_below_the_rounding_of_a_half_variable_add_up() -> candle_doft::Result<()> {
    let params = ParamsAdamW {
        lr: 1e-5,
        weight_decay: 0.,
        ..PARAMS
    };
    for dtype in [DType::F16, DType::BF16] {
        let var = Var::from_tensor(&Tensor::ones(3, dtype, &CPU)?)?;
        let mut optimizer = AdamW::new(
            vec![Group::new(vec![("a".into(), var.clone())])],
            params.clone(),
        )?;
        let mut run = |steps: u64| -> candle_doft::Result<Vec<f64>> {
            for _ in 0..steps {
                let mut gradients = optimizer.gradients();
                gradients.backward(&var.as_tensor().sum_all()?, 1.)?;
                optimizer.step(&gradients)?;
            }
            Ok(values(&var))
        };
        assert_eq!(run(1)?, [1.; 3], "1e-5 is below the rounding of {dtype:?}");
        // Halfway to the next value below 1 in f16 (2^-11) and in bf16 (2^-8) that is 0.01 away.
        let after = run(999)?;
        let rounding = if dtype == DType::F16 {
            2f64.powi(-12)
        } else {
            2f64.powi(-9)
        };
        let near = |v: &f64| (v - 0.99).abs() <= rounding + 3e-5; // and that of f32
        assert!(after.iter().all(near), "{dtype:?}: {after:?}");
        // What is set from outside counts, and the copy follows.
        var.set(&Tensor::full(0.5f32, 3, &CPU)?.to_dtype(dtype)?)?;
        let after = values(&var);
        let mut gradients = optimizer.gradients();
        gradients.backward(&var.as_tensor().sum_all()?, 1.)?;
        optimizer.step(&gradients)?;
        assert_eq!(
            (after, values(&var)),
            (vec![0.5; 3], vec![0.5; 3]),
            "{dtype:?}"
        );
    }
    Ok(())
}

/// 4,096 micro-batches of 1 each: in bf16 a sum stands still at 256, in f16 at 2,048.
#[test]
fn the_gradients_of_a_half_variable_are_summed_in_f32() -> candle_doft::Result<()> {
    for dtype in [DType::F16, DType::BF16] {
        let var = Var::from_tensor(&Tensor::zeros(4, dtype, &CPU)?)?;
        let optimizer = AdamW::new(vec![Group::new(vec![("a".into(), var.clone())])], PARAMS)?;
        let grads = var.as_tensor().sum_all()?.backward()?;
        let mut gradients = optimizer.gradients();
        for _ in 0..4096 {
            gradients.add(&grads, 1.)?;
        }
        assert_eq!(gradients.norm()?, 8192., "{dtype:?}");
        assert_eq!(gradients.clip(1e-4)?, 8192.);
        assert!((gradients.norm()? / 1e-4 - 1.).abs() < 1e-6, "{dtype:?}");
    }
    Ok(())
}

fn train(
    all: &[(String, Var)],
    optimizer: &mut AdamW,
    steps: std::ops::Range<u64>,
) -> candle_doft::Result<()> {
    for step in steps {
        let mut gradients = optimizer.gradients();
        gradients.backward(&loss(all, step)?, 1.)?;
        optimizer.step(&gradients)?;
    }
    Ok(())
}

#[test]
fn a_resumed_run_of_half_variables_goes_on_bit_for_bit() -> candle_doft::Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint.safetensors");
    let params = ParamsAdamW { lr: 3e-5, ..PARAMS };
    for dtype in [DType::F16, DType::BF16] {
        let start = || -> candle_doft::Result<_> {
            let all = vars(dtype)?;
            let optimizer = AdamW::new(vec![Group::new(all.clone())], params.clone())?;
            Ok((all, optimizer))
        };
        let (whole, mut optimizer) = start()?;
        train(&whole, &mut optimizer, 0..200)?;
        let (first, mut optimizer) = start()?;
        train(&first, &mut optimizer, 0..100)?;
        Checkpoint::save(&path, &optimizer, &(), &())?;
        let (second, mut optimizer) = start()?;
        Checkpoint::load(&path)?.restore(&mut optimizer)?;
        train(&second, &mut optimizer, 100..200)?;
        for ((a, b), c) in whole.iter().zip(&second).zip(&first) {
            assert_eq!(values(&a.1), values(&b.1), "{dtype:?} {}", a.0);
            assert_ne!(values(&a.1), values(&c.1), "{dtype:?} {} moved", a.0);
        }
    }
    Ok(())
}

/// Copies that are not those of their variables, and steps out of the range of f16.
#[test]
fn a_half_variable_out_of_step_or_out_of_range_is_refused() -> candle_doft::Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint.safetensors");
    let var = Var::from_tensor(&Tensor::full(6e4f32, 2, &CPU)?.to_dtype(DType::F16)?)?;
    let params = ParamsAdamW {
        lr: 6e3,
        weight_decay: 0.,
        ..PARAMS
    };
    let mut optimizer = AdamW::new(vec![Group::new(vec![("a".into(), var.clone())])], params)?;
    Checkpoint::save(&path, &optimizer, &(), &())?;
    let mut gradients = optimizer.gradients();
    gradients.backward(&(var.as_tensor() * -1e-4)?.sum_all()?, 1.)?;
    let error = optimizer.step(&gradients).unwrap_err().to_string();
    assert!(
        error.contains("`a`, in F16 after the step, is inf"),
        "{error}"
    );
    assert_eq!((values(&var), optimizer.steps()), (vec![6e4; 2], 0));

    let mut bytes = std::fs::read(&path).unwrap();
    let start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..start]).unwrap();
    let at = start + header["master.a"]["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[at..at + 4].copy_from_slice(&1f32.to_le_bytes());
    std::fs::write(&path, bytes).unwrap();
    let error = Checkpoint::load(&path)?
        .restore(&mut optimizer)
        .unwrap_err()
        .to_string();
    let expected = "tensor `master.a` has 1 at index 0, rounded, expected 60000, as `trained.a`";
    assert!(error.contains(expected), "{error}");
    Ok(())
}

/// Parameters of equal names and shapes that mean another layer under other settings.
#[test]
fn a_checkpoint_is_restored_into_no_other_adapter() -> candle_doft::Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint.safetensors");
    let start =
        |config: DoftConfig, bases: &[(&str, u64, (usize, usize))]| -> candle_doft::Result<_> {
            let builder = Adapter::builder(config.with_block_size(8), &CPU)?;
            for (path, seed, shape) in bases {
                let weight = seeded(*shape, *seed).to_dtype(DType::F32)?;
                builder.wrap(path, Linear::new(weight, None))?;
            }
            let adapter = builder.finish()?;
            let params = ParamsAdamW {
                weight_decay: 0.,
                ..PARAMS
            };
            let optimizer = AdamW::for_adapter(&adapter, params.clone())?;
            Ok((adapter, optimizer, params))
        };
    let bases = [("q", 1, (6, 32)), ("v", 2, (6, 8))];
    let config = || DoftConfig::default().with_max_norm(0.5);
    let (adapter, optimizer, params) = start(config(), &bases)?;
    disturb_all(adapter.vars(), 0.1)?;
    Checkpoint::save(&path, &optimizer, &(), &())?;
    let loaded = Checkpoint::load(&path)?;
    for (config, bases, expected) in [
        (
            config().with_map(Map::Exponential),
            bases,
            "`q` has `map` exponential, in the run `map` cayley",
        ),
        (config().with_map(Map::SERIES), bases, "`q` has `map`"),
        (
            config().with_scaled(false),
            bases,
            "`q` has `scaled` false, in the run `scaled` true",
        ),
        (
            config().with_max_norm(0.6),
            bases,
            "`q` has `max_norm` 0.6, in the run `max_norm` 0.5",
        ),
        (
            config().with_max_norm(None),
            bases,
            "`q` has no `max_norm`, in the run",
        ),
        // One block, which is stored as one that is shared is.
        (
            config().with_rule(Rule::new("v").with_block_share(true)),
            bases,
            "`v` has `block_share` true, in the run `block_share` false",
        ),
        (
            config().with_magnitude(Magnitude::Factor),
            bases,
            "it lacks `trained.q.dora_multiplier`",
        ),
        (
            config(),
            [bases[0], ("v", 9, (6, 8))],
            "`v` is over another base weight than in the run",
        ),
        (config(), bases, ""),
    ] {
        let (adapter, mut optimizer, params) = start(config, &bases)?;
        let before: Vec<_> = adapter.vars().iter().map(|var| values(var)).collect();
        let result = loaded.restore(&mut optimizer);
        let after: Vec<_> = adapter.vars().iter().map(|var| values(var)).collect();
        if expected.is_empty() {
            result?;
            assert_ne!(before, after);
            // Groups of one's own know it where they are told.
            let group = || vec![Group::new(adapter.named_vars())];
            let error = loaded.restore(&mut AdamW::new(group(), params.clone())?);
            let error = error.unwrap_err().to_string();
            assert!(
                error.contains("of which the optimizer knows nothing"),
                "{error}"
            );
            let mut own = AdamW::new(group(), params)?.with_adapter(&adapter)?;
            loaded.restore(&mut own)?;
        } else {
            let error = result.unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
            assert_eq!((before, optimizer.steps()), (after, 0));
        }
    }
    // A checkpoint that cannot be compared, and one of no adapter at all.
    let plain = || AdamW::new(vec![Group::new(adapter.named_vars())], params.clone());
    Checkpoint::save(&path, &plain()?, &(), &())?;
    let loaded = Checkpoint::load(&path)?;
    loaded.restore(&mut plain()?)?;
    let (_, mut optimizer, _) = start(config(), &bases)?;
    let error = loaded.restore(&mut optimizer).unwrap_err().to_string();
    assert!(
        error.contains("it does not say what the parameters of its layers mean"),
        "{error}"
    );
    Ok(())
}

/// The shape of the base is not in that of the parameters: 6 outputs of one block, or of two.
#[test]
fn a_shared_block_is_restored_over_no_other_width() -> candle_doft::Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint.safetensors");
    let start = |width: usize| -> candle_doft::Result<_> {
        let config = DoftConfig::default()
            .with_block_size(8)
            .with_block_share(true);
        let builder = Adapter::builder(config, &CPU)?;
        let weight = seeded((6, width), 1).to_dtype(DType::F32)?;
        builder.wrap("q", Linear::new(weight, None))?;
        let params = ParamsAdamW {
            weight_decay: 0.,
            ..PARAMS
        };
        AdamW::for_adapter(&builder.finish()?, params)
    };
    Checkpoint::save(&path, &start(16)?, &(), &())?;
    let error = Checkpoint::load(&path)?
        .restore(&mut start(32)?)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("layer `q` has `shape` [6, 32], in the run `shape` [6, 16]"),
        "{error}"
    );
    Ok(())
}
