//! What a run keeps from step to step and in a checkpoint: copies in f32 of half variables.

mod support;

use candle_core::{DType, Result, Tensor, Var};
use candle_doft::train::{AdamW, Checkpoint, Group};
use candle_nn::ParamsAdamW;
use support::tensors::{CPU, seeded, values};

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
