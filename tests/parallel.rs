//! One adapter, many threads and scopes; and one seed, one run.

mod support;

use candle_core::{DType, Result};
use candle_doft::{Adapter, DoftConfig, Error, Magnitude, Mode};
use candle_nn::{AdamW, Module, Optimizer, ParamsAdamW};
use support::tensors::{CPU, bits, disturb_all, linear, seeded};

#[test]
fn one_two_and_eight_threads_use_one_adapter_at_once() -> Result<()> {
    let builder = Adapter::builder(DoftConfig::default(), &CPU)?;
    let layer = builder.wrap("layer", linear(48, 96, true, DType::F32)?)?;
    let adapter = builder.finish()?;
    disturb_all(adapter.vars(), 0.3)?;
    adapter.set_mode(Mode::Eval)?;
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

#[test]
fn a_scope_keeps_the_values_of_its_start() -> candle_doft::Result<()> {
    let config = DoftConfig::default().with_dropout(0.5);
    let builder = Adapter::builder(config.with_magnitude(Magnitude::Factor), &CPU)?;
    let layer = builder.wrap("layer", linear(4, 64, false, DType::F32)?)?;
    let adapter = builder.finish()?;
    let x = seeded((4, 64), 3).to_dtype(DType::F32)?;
    let move_on = || {
        for var in adapter.vars() {
            var.set(&(var.as_tensor() + 0.2).unwrap()).unwrap();
        }
    };
    move_on();
    let held = bits(&adapter.with_mode(Mode::Eval, || layer.forward(&x))?);
    let as_held = || {
        let y = layer.forward(&x).unwrap();
        assert!(!y.track_op() && bits(&y) == held);
    };
    let scope = adapter.scope(Mode::Eval)?;
    scope.run(|| {
        move_on();
        as_held();
        // An inner scope takes the values of its own start.
        let inner = adapter.with_mode(Mode::Eval, || layer.forward(&x));
        assert_ne!(bits(&inner.unwrap()), held);
        as_held();
    });
    // A scope can be entered again, by another thread too, and keeps its values.
    std::thread::scope(|threads| {
        threads.spawn(|| scope.run(as_held));
    });
    assert!(layer.forward(&x)?.track_op());
    assert_ne!(bits(&layer.forward(&x)?), held);
    Ok(())
}

/// Sampling in one thread leaves the gradients of another alone, and the base runs beside both.
#[test]
fn a_mode_is_of_one_thread_in_its_scope() -> candle_doft::Result<()> {
    let builder = Adapter::builder(DoftConfig::default(), &CPU)?;
    let layer = builder.wrap("layer", linear(4, 64, false, DType::F32)?)?;
    let adapter = builder.finish()?;
    disturb_all(adapter.vars(), 0.3)?;
    let x = seeded((4, 64), 3).to_dtype(DType::F32)?;
    let (adapted, base) = (bits(&layer.forward(&x)?), bits(&layer.base().forward(&x)?));
    let together = std::sync::Barrier::new(3);
    let (layer, x, together) = (&layer, &x, &together);
    let runs = move || {
        together.wait();
        let y = layer.forward(x).unwrap();
        together.wait();
        (y.track_op(), bits(&y))
    };
    let adapter = &adapter;
    let inside = move |mode| adapter.with_mode(mode, || Ok::<_, Error>(runs())).unwrap();
    let (eval, off, train) = std::thread::scope(|threads| {
        let eval = threads.spawn(move || inside(Mode::Eval));
        let off = threads.spawn(move || inside(Mode::Off));
        let train = runs();
        (eval.join().unwrap(), off.join().unwrap(), train)
    });
    assert_eq!(eval, (false, adapted.clone()));
    assert_eq!(off, (false, base));
    assert_eq!(train, (true, adapted));
    Ok(())
}

/// Trains two layers with dropout for some steps; the bits of every parameter.
fn train() -> Result<Vec<Vec<u64>>> {
    let config = DoftConfig::default().with_dropout(0.2).with_seed(3);
    let builder = Adapter::builder(config, &CPU)?;
    let first = builder.wrap("first", linear(96, 64, true, DType::F32)?)?;
    let second = builder.wrap("second", linear(8, 96, true, DType::F32)?)?;
    let adapter = builder.finish()?;
    let (x, target) = (seeded((130, 64), 1), seeded((130, 8), 2));
    let (x, target) = (x.to_dtype(DType::F32)?, target.to_dtype(DType::F32)?);
    let mut optimizer = AdamW::new(adapter.vars(), ParamsAdamW::default())?;
    for step in 0..20 {
        adapter.set_step(step);
        let y = second.forward(&first.forward(&x)?.relu()?)?;
        optimizer.backward_step(&(y - &target)?.sqr()?.mean_all()?)?;
    }
    Ok(adapter.vars().iter().map(|var| bits(var)).collect())
}

#[test]
fn two_runs_with_one_seed_give_the_same_bits() -> Result<()> {
    let (first, second) = (train()?, train()?);
    assert!(!first.is_empty());
    assert_eq!(first, second);
    Ok(())
}
