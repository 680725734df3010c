//! One adapter, many threads and scopes; and one seed, one run.

mod support;

use candle_core::{DType, Result};
use candle_doft::{Adapter, DoftConfig, Magnitude};
use candle_nn::{AdamW, Module, Optimizer, ParamsAdamW};
use support::tensors::{CPU, bits, disturb, linear, seeded, wrapped};

#[test]
fn one_two_and_eight_threads_use_one_adapter_at_once() -> Result<()> {
    let (layer, varmap) = wrapped(&linear(48, 96, true, DType::F32)?, &DoftConfig::default())?;
    disturb(&varmap, 0.3)?;
    let layer = layer.inference()?;
    let inputs: Vec<_> = (0..8)
        .map(|seed| seeded((5 + seed as usize, 96), seed).to_dtype(DType::F32))
        .collect::<Result<_>>()?;
    let alone: Vec<_> = inputs
        .iter()
        .map(|x| bits(&layer.forward(x).unwrap()))
        .collect();
    for threads in [1, 2, 8] {
        std::thread::scope(|scope| {
            let work = |start: usize| {
                let (layer, inputs, alone) = (&layer, &inputs, &alone);
                move || {
                    for turn in 0..40 {
                        let i = (start + turn) % inputs.len();
                        assert_eq!(bits(&layer.forward(&inputs[i]).unwrap()), alone[i]);
                    }
                }
            };
            let running: Vec<_> = (0..threads).map(|start| scope.spawn(work(start))).collect();
            for thread in running {
                thread.join().expect("a thread saw another result");
            }
        });
    }
    Ok(())
}

/// An inner scope ends before the outer one, and those of two threads in any order.
#[test]
fn scopes_hold_until_the_last_of_them_ends() -> candle_doft::Result<()> {
    let config = DoftConfig::default().with_dropout(0.5);
    let adapter = Adapter::new(config.with_magnitude(Magnitude::Factor), &CPU)?;
    let layer = adapter.wrap_linear("layer", linear(4, 64, false, DType::F32)?)?;
    let x = seeded((4, 64), 3).to_dtype(DType::F32)?;
    let move_on = || {
        for var in adapter.vars().unwrap() {
            var.set(&(var.as_tensor() + 0.2).unwrap()).unwrap();
        }
    };
    move_on();
    let held = bits(&layer.forward_t(&x, false)?);
    let as_held = || {
        let y = layer.forward_t(&x, true).unwrap();
        assert!(!y.track_op() && bits(&y) == held);
    };
    let magnitude = bits(&layer.magnitude()?);
    adapter.inference(|| {
        move_on();
        adapter.inference(as_held).unwrap();
        as_held();
        assert_eq!(bits(&layer.magnitude().unwrap()), magnitude);
    })?;
    assert!(layer.forward_t(&x, true)?.track_op());
    assert_ne!(bits(&layer.forward_t(&x, false)?), held);

    let base = bits(&layer.base().forward(&x)?);
    let (entered, left) = (std::sync::Barrier::new(2), std::sync::Barrier::new(2));
    std::thread::scope(|threads| {
        threads.spawn(|| {
            adapter.disabled(|| entered.wait());
            left.wait();
        });
        adapter.disabled(|| {
            entered.wait();
            left.wait();
            // The other scope began with the layer on, and has ended.
            assert_eq!(bits(&layer.forward_t(&x, true).unwrap()), base);
        });
    });
    assert!(
        layer.forward_t(&x, true)?.track_op(),
        "a scope that ended left it off"
    );
    Ok(())
}

/// Trains two layers with dropout for some steps; the bits of every parameter.
fn train() -> Result<Vec<Vec<u64>>> {
    let config = DoftConfig::default().with_dropout(0.2).with_seed(3);
    let adapter = Adapter::new(config, &CPU)?;
    let first = adapter.wrap_linear("first", linear(96, 64, true, DType::F32)?)?;
    let second = adapter.wrap_linear("second", linear(8, 96, true, DType::F32)?)?;
    let (x, target) = (seeded((130, 64), 1), seeded((130, 8), 2));
    let (x, target) = (x.to_dtype(DType::F32)?, target.to_dtype(DType::F32)?);
    let mut optimizer = AdamW::new(adapter.vars()?, ParamsAdamW::default())?;
    for step in 0..20 {
        adapter.set_step(step);
        let y = second.forward_t(&first.forward_t(&x, true)?.relu()?, true)?;
        optimizer.backward_step(&(y - &target)?.sqr()?.mean_all()?)?;
    }
    Ok(adapter.vars()?.iter().map(|var| bits(var)).collect())
}

#[test]
fn two_runs_with_one_seed_give_the_same_bits() -> Result<()> {
    let (first, second) = (train()?, train()?);
    assert!(!first.is_empty());
    assert_eq!(first, second);
    Ok(())
}
