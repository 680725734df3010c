//! Optimizer, clipping, schedules and checkpoints.

mod support;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_doft::train::{AdamW, Checkpoint, Group, Schedule};
use candle_doft::{Adapter, DoftConfig, DoftLinear, Error, Magnitude};
use candle_nn::{Linear, Module, Optimizer, ParamsAdamW};
use serde_json::json;
use support::tensors::{CPU, bits, relative, seeded};

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
fn steps_are_those_of_candle_s_adamw() -> candle_doft::Result<()> {
    let (ours, theirs) = (vars(DType::F64)?, vars(DType::F64)?);
    let mut optimizer = AdamW::new(vec![Group::new(ours.clone())], PARAMS)?;
    let plain = theirs.iter().map(|(_, var)| var.clone()).collect();
    let mut candle = candle_nn::AdamW::new(plain, PARAMS)?;
    for step in 0..20 {
        let mut gradients = optimizer.gradients();
        gradients.backward(&loss(&ours, step)?, 1.)?;
        optimizer.step(&gradients)?;
        candle.backward_step(&loss(&theirs, step)?)?;
        for ((name, a), (_, b)) in ours.iter().zip(&theirs) {
            assert!(relative(a, b) < 1e-14, "{name} after step {step}");
        }
    }
    assert_eq!(optimizer.steps(), 20);
    Ok(())
}

#[test]
fn groups_have_their_own_rate_and_decay() -> candle_doft::Result<()> {
    let all = vars(DType::F64)?;
    let before: Vec<Tensor> = all.iter().map(|(_, v)| v.copy().unwrap()).collect();
    let frozen = Group::new(vec![all[0].clone()]).with_rate(0.);
    let plain = Group::new(vec![all[1].clone()]).with_weight_decay(0.);
    let mut optimizer = AdamW::new(vec![frozen, plain], PARAMS)?;
    let mut gradients = optimizer.gradients();
    let grads = gradients.backward(&loss(&all, 3)?, 1.)?;
    optimizer.step(&gradients)?;
    assert_eq!(bits(&all[0].1), bits(&before[0]));
    // The first step of Adam without decay is lr in the direction of the gradient's sign.
    let grad = grads.get(&all[1].1).expect("a gradient");
    let expected = grad.div(&(grad.abs()? + 1e-8)?)?;
    let moved = (&before[1] - all[1].1.as_tensor())?;
    assert!(relative(&moved, &(expected * 1e-2)?) < 5e-14);
    let error = optimizer.set_group_rate(2, 0.5).unwrap_err().to_string();
    assert!(
        error.contains("the group is 2, expected below 2"),
        "{error}"
    );
    Ok(())
}

#[test]
fn micro_batches_sum_to_the_batch_and_are_clipped_as_one() -> candle_doft::Result<()> {
    let all = vars(DType::F64)?;
    let optimizer = AdamW::new(vec![Group::new(all.clone())], PARAMS)?;
    let mut parts = optimizer.gradients();
    for seed in 0..4 {
        parts.backward(&loss(&all, seed)?, 0.25)?;
    }
    let mut whole = optimizer.gradients();
    let losses = (0..4)
        .map(|seed| loss(&all, seed))
        .collect::<Result<Vec<_>>>()?;
    whole.backward(&Tensor::stack(&losses, 0)?.mean(0)?, 1.)?;
    let (a, b) = (parts.norm()?, whole.norm()?);
    assert!((a / b - 1.).abs() < 1e-12, "{a} and {b}");
    assert_eq!(parts.clip(2. * a)?, a);
    assert_eq!(parts.norm()?, a, "below the limit nothing is scaled");
    assert_eq!(parts.clip(a / 3.)?, a);
    assert!((parts.norm()? / (a / 3.) - 1.).abs() < 1e-12);
    assert!(
        parts
            .clip(0.)
            .unwrap_err()
            .to_string()
            .contains("`max_norm` is 0")
    );
    Ok(())
}

#[test]
fn schedules_warm_up_and_fall() {
    let rates = |schedule: Schedule| -> Vec<f64> {
        let steps = [0, 1, 3, 4, 8, 12, 50];
        steps.iter().map(|step| schedule.rate(2., *step)).collect()
    };
    assert_eq!(rates(Schedule::constant(4)), [0.5, 1., 2., 2., 2., 2., 2.]);
    assert_eq!(
        rates(Schedule::linear(4, 12)),
        [0.5, 1., 2., 2., 1., 0., 0.]
    );
    let cosine = rates(Schedule::cosine(4, 12));
    let expected = [0.5, 1., 2., 2., 1., 0., 0.];
    let near = cosine
        .iter()
        .zip(expected)
        .all(|(a, b)| (a - b).abs() < 1e-12);
    assert!(near, "{cosine:?}");
    let floored = Schedule {
        floor: 0.1,
        ..Schedule::linear(0, 10)
    };
    assert!((floored.rate(1., 10) - 0.1).abs() < 1e-12);
    assert_eq!(Schedule::linear(0, 0).rate(1., 0), 0.);
}

struct Run {
    adapter: Adapter,
    layer: DoftLinear,
    optimizer: AdamW,
}

impl Run {
    fn new(magnitude: Magnitude) -> candle_doft::Result<Self> {
        let config = DoftConfig::default()
            .with_block_size(8)
            .with_dropout(0.3)
            .with_magnitude(magnitude);
        let builder = Adapter::builder(config, &CPU)?;
        let weight = (seeded((6, 32), 1) * 0.2)?.to_dtype(DType::F32)?;
        let layer = builder.wrap("layer", Linear::new(weight, None))?;
        let adapter = builder.finish()?;
        let params = ParamsAdamW {
            weight_decay: 0.,
            ..PARAMS
        };
        let optimizer = AdamW::for_adapter(&adapter, params)?;
        Ok(Self {
            adapter,
            layer,
            optimizer,
        })
    }

    fn train(&mut self, steps: std::ops::Range<u64>) -> candle_doft::Result<()> {
        for step in steps {
            self.adapter.set_step(step);
            let mut gradients = self.optimizer.gradients();
            for micro in 0..2 {
                let x = seeded((4, 32), 100 + 2 * step + micro).to_dtype(DType::F32)?;
                let target = x.narrow(1, 0, 6)?;
                let y = self.layer.forward(&x)?;
                gradients.backward(&(y - target)?.sqr()?.mean_all()?, 0.5)?;
            }
            gradients.clip(0.5)?;
            self.optimizer
                .set_rate(Schedule::cosine(2, 20).rate(1e-2, step));
            self.optimizer.step(&gradients)?;
        }
        Ok(())
    }
}

#[test]
fn a_resumed_run_ends_with_the_bytes_of_one_that_never_stopped() -> candle_doft::Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = folder.path().join("checkpoint.safetensors");
    for magnitude in [Magnitude::Log, Magnitude::Factor] {
        let mut whole = Run::new(magnitude)?;
        whole.train(0..20)?;
        let mut first = Run::new(magnitude)?;
        first.train(0..10)?;
        let config = first.adapter.config();
        Checkpoint::save(&checkpoint, &first.optimizer, config, &json!({"epoch": 1}))?;
        let mut second = Run::new(magnitude)?;
        let loaded = Checkpoint::load(&checkpoint)?;
        assert_eq!(loaded.steps(), 10);
        assert_eq!(loaded.state::<serde_json::Value>()?["epoch"], 1);
        assert_eq!(&loaded.config::<DoftConfig>()?, config);
        let other = loaded.state::<Vec<u8>>().unwrap_err().to_string();
        assert!(
            other.contains("its `state` is another: invalid type: map"),
            "{other}"
        );
        loaded.restore(&mut second.optimizer)?;
        second.train(10..20)?;
        let bytes = |run: &Run, name: &str| -> candle_doft::Result<Vec<u8>> {
            let path = folder.path().join(name);
            run.adapter.save(&path)?;
            Ok(std::fs::read(path).unwrap())
        };
        assert_eq!(bytes(&whole, "whole")?, bytes(&second, "second")?);
        // And a run that forgot its moments would not.
        let mut forgetful = Run::new(magnitude)?;
        for ((_, from), (_, to)) in first
            .adapter
            .named_vars()
            .iter()
            .zip(forgetful.adapter.named_vars())
        {
            to.set(from)?;
        }
        forgetful.train(10..20)?;
        assert_ne!(bytes(&whole, "whole")?, bytes(&forgetful, "forgetful")?);
    }
    Ok(())
}

#[test]
fn a_checkpoint_of_another_run_is_refused_and_changes_nothing() -> candle_doft::Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint.safetensors");
    let mut run = Run::new(Magnitude::Log)?;
    run.train(0..2)?;
    Checkpoint::save(&path, &run.optimizer, &(), &())?;
    let loaded = Checkpoint::load(&path)?;
    let error = Adapter::load(&path, &CPU).unwrap_err().to_string();
    assert!(error.contains("a checkpoint, to resume a run"), "{error}");

    let before = bits(&run.adapter.vars()[0]);
    let mut other = Run::new(Magnitude::Factor)?;
    let error = loaded
        .restore(&mut other.optimizer)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("it lacks `trained.layer.dora_multiplier`"),
        "{error}"
    );
    let mut fewer = AdamW::new(
        vec![Group::new(
            run.adapter.named_vars().into_iter().take(1).collect(),
        )],
        PARAMS,
    )?;
    let error = loaded.restore(&mut fewer).unwrap_err().to_string();
    assert!(error.contains("which the model does not train"), "{error}");
    let name = "layer.oft_R.weight".to_string();
    let small = vec![(name, Var::zeros((2, 3), DType::F32, &CPU)?)];
    let mut small = AdamW::new(vec![Group::new(small)], PARAMS)?;
    let error = loaded.restore(&mut small).unwrap_err().to_string();
    assert!(
        error.contains("has [4, 28] of F32, expected [2, 3] of F32, as the model"),
        "{error}"
    );
    assert_eq!(bits(&run.adapter.vars()[0]), before);

    let bytes = std::fs::read(&path).unwrap();
    for (content, expected) in [
        (&bytes[..bytes.len() - 1], "not a whole safetensors file"),
        (&b""[..], "not a whole safetensors file"),
    ] {
        std::fs::write(&path, content).unwrap();
        let error = Checkpoint::load(&path).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    let at = bytes
        .windows(11)
        .position(|w| w == br#""steps":"2""#)
        .unwrap();
    let mut long = bytes.clone();
    long.splice(at + 9..at + 10, u64::MAX.to_string().into_bytes());
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) + 19;
    long[..8].copy_from_slice(&header.to_le_bytes());
    std::fs::write(&path, long).unwrap();
    let error = Checkpoint::load(&path).unwrap_err().to_string();
    assert!(
        error.contains("its `steps` are `18446744073709551615`"),
        "{error}"
    );
    run.adapter.save(&path)?;
    let error = Checkpoint::load(&path).unwrap_err().to_string();
    assert!(
        error.contains("not a checkpoint: its format is `doft`"),
        "{error}"
    );
    Ok(())
}

#[test]
fn what_is_not_finite_or_missing_stops_the_step_by_name() -> candle_doft::Result<()> {
    let all = vars(DType::F32)?;
    let mut optimizer = AdamW::new(vec![Group::new(all.clone())], PARAMS)?;
    let mut gradients = optimizer.gradients();
    let nan = (loss(&all, 1)? * f64::NAN)?;
    assert_eq!(
        gradients.backward(&nan, 1.).unwrap_err().to_string(),
        "step 1: the loss is NaN; the step was not made: lower the learning rate or look for an \
         overflow, and go on from the last checkpoint"
    );
    // A finite loss whose gradient is not: the slope of a root at 0.
    let root = (loss(&all, 1)?
        + (all[1].1.as_tensor() - all[1].1.detach())?
            .sqrt()?
            .sum_all()?)?;
    gradients.backward(&root, 1.)?;
    let before = bits(&all[0].1);
    let error = optimizer.step(&gradients).unwrap_err();
    assert!(
        matches!(&error, Error::Diverged { step: 1, what, .. } if what.contains("`b`")),
        "{error}"
    );
    assert_eq!(bits(&all[0].1), before);

    let mut gradients = optimizer.gradients();
    gradients.backward(&all[0].1.as_tensor().sqr()?.sum_all()?, 1.)?;
    let error = optimizer.step(&gradients).unwrap_err().to_string();
    assert!(error.contains("no gradient reached `b`"), "{error}");
    assert_eq!(bits(&all[0].1), before);
    assert_eq!(optimizer.steps(), 0);
    Ok(())
}

#[test]
fn bad_settings_are_refused() -> candle_doft::Result<()> {
    let all = vars(DType::F32)?;
    let error = |groups: Vec<Group>, params| AdamW::new(groups, params).unwrap_err().to_string();
    assert_eq!(
        error(vec![], PARAMS),
        "`AdamW`: the variables is none, expected at least one"
    );
    let twice = vec![Group::new(all.clone()), Group::new(all.clone())];
    assert!(error(twice, PARAMS).contains("`a` twice"));
    let still = ParamsAdamW { eps: 0., ..PARAMS };
    assert!(error(vec![Group::new(all.clone())], still).contains("`eps` is 0"));
    let beta = ParamsAdamW {
        beta1: 1.,
        ..PARAMS
    };
    assert!(error(vec![Group::new(all.clone())], beta).contains("`beta1` is 1"));
    let rate = ParamsAdamW {
        lr: f64::NAN,
        ..PARAMS
    };
    assert!(error(vec![Group::new(all.clone())], rate).contains("`lr` is NaN"));
    let ids = vec![("ids".to_string(), Var::zeros(3, DType::U32, &Device::Cpu)?)];
    assert!(error(vec![Group::new(ids)], PARAMS).contains("`ids` of U32"));
    let run = Run::new(Magnitude::Factor)?;
    let error = AdamW::for_adapter(&run.adapter, PARAMS)
        .unwrap_err()
        .to_string();
    assert!(error.contains("`weight_decay` is 0.1"), "{error}");
    // An extra tensor is none of the magnitudes, whatever its name.
    let builder = Adapter::builder(DoftConfig::default(), &CPU)?;
    builder.extra("my.dora_scale", &Tensor::ones(3, DType::F32, &CPU)?)?;
    assert!(AdamW::for_adapter(&builder.finish()?, PARAMS).is_ok());
    Ok(())
}

#[test]
fn a_rate_that_is_none_moves_nothing() -> candle_doft::Result<()> {
    let all = vars(DType::F32)?;
    let before = bits(&all[0].1);
    let mut optimizer = AdamW::new(vec![Group::new(all.clone())], PARAMS)?;
    let mut gradients = optimizer.gradients();
    gradients.backward(&loss(&all, 1)?, 1.)?;
    optimizer.set_rate(f64::NAN);
    let error = optimizer.step(&gradients).unwrap_err().to_string();
    assert!(error.contains("the learning rate is NaN"), "{error}");
    assert_eq!(bits(&all[0].1), before);
    Ok(())
}

#[test]
fn gradients_serve_one_step() -> candle_doft::Result<()> {
    let mut run = Run::new(Magnitude::Log)?;
    let x = seeded((4, 32), 1).to_dtype(DType::F32)?;
    let mut gradients = run.optimizer.gradients();
    gradients.backward(&run.layer.forward(&x)?.sqr()?.mean_all()?, 1.)?;
    run.optimizer.step(&gradients)?;
    let before: Vec<_> = run.adapter.vars().iter().map(|var| bits(var)).collect();
    let error = run.optimizer.step(&gradients).unwrap_err().to_string();
    assert_eq!(
        error,
        "`AdamW`: the step of the gradients is 1, expected 2: `gradients` makes new ones for each step"
    );
    let after: Vec<_> = run.adapter.vars().iter().map(|var| bits(var)).collect();
    assert_eq!(before, after);
    assert_eq!(run.optimizer.steps(), 1);
    Ok(())
}

/// A finite step over an infinite second moment is 0: the variable would stand still, unseen.
#[test]
fn a_gradient_whose_square_overflows_stops_the_step_by_name() -> candle_doft::Result<()> {
    for (dtype, factor, stops) in [
        (DType::F32, 1e21, true),
        (DType::F32, 1e17, false),
        (DType::F64, 1e21, false),
    ] {
        let all = vars(dtype)?;
        let mut optimizer = AdamW::new(vec![Group::new(all.clone())], PARAMS)?;
        let mut gradients = optimizer.gradients();
        let sum = |i: usize| all[i].1.as_tensor().sum_all();
        gradients.backward(&(sum(0)? + (sum(1)? * factor)?)?, 1.)?;
        let before = bits(&all[1].1);
        match optimizer.step(&gradients) {
            Ok(()) => assert!(!stops && bits(&all[1].1) != before, "{dtype:?} {factor}"),
            Err(error) => {
                assert!(stops, "{error}");
                assert!(error.to_string().contains("gradient of `b`"), "{error}");
                assert_eq!(bits(&all[1].1), before);
            }
        }
    }
    Ok(())
}

/// Moments that no step makes: their run could not go on, or would go on as another.
#[test]
fn a_checkpoint_whose_moments_are_no_moments_is_refused() -> candle_doft::Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint.safetensors");
    let mut run = Run::new(Magnitude::Log)?;
    run.train(0..2)?;
    Checkpoint::save(&path, &run.optimizer, &(), &())?;
    let whole = std::fs::read(&path).unwrap();
    let start = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&whole[8..start]).unwrap();
    for (role, value, refused) in [
        ("second", -1e-9f32, true),
        ("second", f32::NAN, true),
        ("first", f32::INFINITY, true),
        ("trained", f32::NAN, true),
        ("first", -1e-9, false),
    ] {
        let key = format!("{role}.layer.oft_R.weight");
        let at = start + header[&key]["data_offsets"][0].as_u64().unwrap() as usize + 8;
        let mut bytes = whole.clone();
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        std::fs::write(&path, bytes).unwrap();
        let before = bits(&run.adapter.vars()[0]);
        match Checkpoint::load(&path)?.restore(&mut run.optimizer) {
            Ok(()) => assert!(!refused, "{role} {value}"),
            Err(error) => {
                let error = error.to_string();
                assert!(refused && error.contains(&key), "{error}");
                assert!(error.contains("at index 2"), "{error}");
                assert_eq!(bits(&run.adapter.vars()[0]), before);
            }
        }
    }
    Ok(())
}
