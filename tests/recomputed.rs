//! Blocks whose activations are made again: the gradients of the plain ones, and nothing lost in silence.

mod support;

use candle_core::backprop::GradStore;
use candle_core::{DType, Module, Result, Tensor, Var};
use candle_doft::train::recomputed;
use candle_doft::{Adapter, Adapters, DoftConfig, DoftEmbedding, DoftLinear, Magnitude, Mode};
use candle_nn::{Embedding, Linear};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use support::slopes::check_slopes;
use support::tensors::{CPU, bits, disturb_all, linear, seeded};

/// `x + down(tanh(up(x)))`, which uses its input twice.
#[derive(Clone)]
struct Block {
    up: DoftLinear,
    down: DoftLinear,
}

impl Block {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x + self.down.forward(&self.up.forward(x)?.tanh()?)?
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Way {
    Kept,
    Again,
    /// A block of all blocks, each run again.
    Nested,
}

/// Ids to rows of 8, through three blocks.
#[derive(Clone)]
struct Model {
    table: DoftEmbedding,
    blocks: Vec<Block>,
}

impl Model {
    fn through(&self, x: &Tensor, way: Way) -> Result<Tensor> {
        match way {
            Way::Kept => self.blocks.iter().try_fold(x.clone(), |x, b| b.forward(&x)),
            Way::Again => {
                let mut blocks = self.blocks.iter().cloned();
                blocks.try_fold(x.clone(), |x, b| recomputed(&x, move |x| b.forward(x)))
            }
            Way::Nested => {
                let inner = self.clone();
                recomputed(x, move |x| inner.through(x, Way::Again))
            }
        }
    }

    fn forward(&self, ids: &Tensor, way: Way) -> Result<Tensor> {
        let table = self.table.clone();
        let embedded = match way {
            Way::Kept => table.forward(ids)?,
            // An input that is no float.
            _ => recomputed(ids, move |ids| table.forward(ids))?,
        };
        self.through(&embedded, way)
    }
}

/// The model under two adapters that differ, both with dropout and away from their start.
fn model() -> candle_doft::Result<(Model, Adapters)> {
    let config = DoftConfig::default().with_block_size(4).with_dropout(0.4);
    let other = config
        .clone()
        .with_block_size(2)
        .with_magnitude(Magnitude::Absolute);
    let builder = Adapter::builder(config, &CPU)?;
    let layer = |path: &str, out: usize, width: usize, seed| {
        let weight = (seeded((out, width), seed) / (width as f64).sqrt())?;
        builder.wrap(path, Linear::new(weight, Some(seeded(out, seed + 1))))
    };
    let mut blocks = Vec::new();
    for i in 0..3 {
        let up = layer(&format!("up{i}"), 12, 8, 10 * i)?;
        let down = layer(&format!("down{i}"), 8, 12, 10 * i + 5)?;
        blocks.push(Block { up, down });
    }
    let table = builder.wrap("table", Embedding::new(seeded((20, 8), 90), 8))?;
    let adapters = Adapters::new("first", builder.finish()?);
    adapters.add("second", other)?;
    for name in adapters.names() {
        disturb_all(adapters.get(&name)?.vars(), 0.3)?;
    }
    Ok((Model { table, blocks }, adapters))
}

fn ids() -> Tensor {
    Tensor::new(&[[3u32, 1, 4], [1, 5, 9]], &CPU).unwrap()
}

fn upstream() -> Tensor {
    seeded((2, 3, 8), 77)
}

fn back(y: &Tensor) -> Result<GradStore> {
    (y * upstream())?.sum_all()?.backward()
}

fn assert_same(adapter: &Adapter, kept: &GradStore, again: &GradStore, what: &str) {
    for (name, var) in adapter.named_vars() {
        let kept = kept.get(&var).unwrap_or_else(|| panic!("{what}: {name}"));
        let again = again.get(&var).unwrap_or_else(|| panic!("{what}: {name}"));
        assert_eq!(bits(again), bits(kept), "{what}: {name}");
        let most = kept.abs().unwrap().max_all().unwrap();
        assert!(most.to_scalar::<f64>().unwrap() > 0., "{what}: {name} is 0");
    }
}

#[test]
fn values_and_gradients_are_those_of_the_plain_blocks_bit_for_bit() -> candle_doft::Result<()> {
    let (model, adapters) = model()?;
    for name in adapters.names() {
        let adapter = adapters.get(&name)?;
        let run = |way| {
            adapter.set_step(3);
            adapter.with_mode(Mode::Train, || model.forward(&ids(), way))
        };
        let kept = run(Way::Kept)?;
        let grads = back(&kept)?;
        for way in [Way::Again, Way::Nested] {
            // The backward pass is outside of the scope, and after more passes have drawn their masks.
            let again = run(way)?;
            adapter.with_mode(Mode::Train, || model.forward(&ids(), Way::Kept))?;
            adapter.set_step(9);
            assert_eq!(bits(&again), bits(&kept), "{name}");
            assert_same(&adapter, &grads, &back(&again)?, &name);
            // A graph serves more than one backward pass, in any thread.
            let twice = std::thread::scope(|threads| threads.spawn(|| back(&again)).join());
            assert_same(&adapter, &grads, &twice.unwrap()?, &name);
            assert!(adapter.check_gradients(&back(&again)?)?.missing.is_empty());
        }
        // Masks do act: without a step that is set anew, the next ones differ.
        let next = adapter.with_mode(Mode::Train, || model.forward(&ids(), Way::Again))?;
        assert_ne!(bits(&next), bits(&kept), "{name}");
    }
    Ok(())
}

#[test]
fn gradients_are_the_slopes_of_the_loss() -> candle_doft::Result<()> {
    let (model, adapters) = model()?;
    let adapter = adapters.get("first")?;
    let x = Var::from_tensor(&seeded((2, 3, 8), 4))?;
    for way in [Way::Again, Way::Nested] {
        let mut vars = adapter.named_vars();
        vars.retain(|(name, _)| !name.starts_with("table"));
        vars.push(("x".to_string(), x.clone()));
        check_slopes("recomputed", &vars, || {
            adapter.set_step(5);
            model.through(&x, way)
        })?;
    }
    Ok(())
}

#[test]
fn tensors_that_the_block_holds_get_their_gradients() -> Result<()> {
    let x = Var::from_tensor(&seeded((2, 4), 1))?;
    let own = Var::from_tensor(&seeded((4, 4), 2))?;
    let half = Var::from_tensor(&seeded(4, 3).to_dtype(DType::F32)?)?;
    // A part of the graph before the block, which depends on the input as well.
    let outside = (x.sqr()? * 0.5)?;
    let (held, scale) = (own.clone(), half.clone());
    let block = move |x: &Tensor| {
        let x = (x.matmul(&held)? + &outside)?.tanh()?;
        x.broadcast_mul(&scale.to_dtype(DType::F64)?)
    };
    let block = Arc::new(block);
    let kept = block(&x)?.sqr()?.sum_all()?.backward()?;
    let run = block.clone();
    let again = recomputed(&x, move |x| run(x))?
        .sqr()?
        .sum_all()?
        .backward()?;
    for (name, var) in [("own", &own), ("half", &half)] {
        assert_eq!(
            bits(again.get(var).expect(name)),
            bits(kept.get(var).expect(name))
        );
    }
    // Two ways lead to x here, whose sum is made in another order.
    let (kept, again) = (kept.get(&x).expect("dx"), again.get(&x).expect("dx"));
    let off = (kept - again)?.abs()?.max_all()?.to_scalar::<f64>()?;
    assert!(off < 1e-14, "{off:e}");
    Ok(())
}

#[test]
fn without_a_graph_nothing_is_recorded_and_an_input_without_one_gets_no_gradient()
-> candle_doft::Result<()> {
    let (model, adapters) = model()?;
    let adapter = adapters.get("first")?;
    let runs = Arc::new(AtomicUsize::new(0));
    let x = seeded((2, 3, 8), 4);
    let counted = |x: &Tensor| {
        let (block, runs) = (model.blocks[0].clone(), runs.clone());
        recomputed(x, move |x| {
            runs.fetch_add(1, Ordering::Relaxed);
            block.forward(x)
        })
    };
    let plain = adapter.with_mode(Mode::Eval, || counted(&x))?;
    assert!(!plain.track_op() && runs.load(Ordering::Relaxed) == 1);
    let block = &model.blocks[0];
    let expected = adapter.with_mode(Mode::Eval, || block.forward(&x))?;
    assert_eq!(bits(&plain), bits(&expected));
    let trained = counted(&x)?;
    let grads = back(&trained)?;
    assert_eq!(runs.load(Ordering::Relaxed), 3);
    assert!(grads.get(&x).is_none());
    let own = adapter.named_vars().into_iter();
    let own = own.filter(|(name, _)| name.starts_with("up0") || name.starts_with("down0"));
    for (name, var) in own {
        assert!(grads.get(&var).is_some(), "{name}");
    }
    // A frozen block passes the gradient of its input on.
    let var = Var::from_tensor(&x)?;
    let off = adapter.with_mode(Mode::Off, || counted(&var))?;
    let kept = adapter.with_mode(Mode::Off, || block.forward(&var))?;
    assert_eq!(
        bits(back(&off)?.get(&var).expect("dx")),
        bits(back(&kept)?.get(&var).expect("dx"))
    );
    Ok(())
}

#[test]
fn threads_do_not_meet() -> candle_doft::Result<()> {
    let (model, adapters) = model()?;
    let x = Var::from_tensor(&seeded((2, 3, 8), 4))?;
    let run = |name: &str, way| {
        let adapter = adapters.get(name)?.scope(Mode::Train)?;
        let y = adapter.run(|| model.through(&x, way))?;
        Ok::<_, candle_doft::Error>(y)
    };
    std::thread::scope(|threads| {
        let mut running = Vec::new();
        let (x, run) = (&x, &run);
        for i in 0..4 {
            running.push(threads.spawn(move || {
                for _ in 0..10 {
                    // Whatever masks are drawn, the second run has those of the first, or it fails.
                    let y = run(["first", "second"][i % 2], Way::Again).unwrap();
                    let grads = back(&y).unwrap();
                    assert!(grads.get(x).is_some());
                }
            }));
        }
        for thread in running {
            thread.join().unwrap();
        }
    });
    Ok(())
}

#[test]
fn a_panic_or_an_error_inside_leaves_the_thread_as_it_was() -> candle_doft::Result<()> {
    let (model, adapters) = model()?;
    let adapter = adapters.get("first")?;
    let x = Var::from_tensor(&seeded((2, 3, 8), 4))?;
    // Fails or panics from run `from` on.
    let fragile = |from: usize, panics: bool| {
        let (block, runs) = (model.blocks[0].clone(), AtomicUsize::new(1));
        recomputed(&x, move |x| {
            let y = block.forward(x)?;
            match runs.fetch_add(1, Ordering::Relaxed) >= from {
                true if panics => panic!("as asked"),
                true => candle_core::bail!("the cable is gone"),
                false => Ok(y),
            }
        })
    };
    let told = |error: candle_core::Error| error.to_string().starts_with("the cable is gone");
    assert!(told(fragile(1, false).unwrap_err()));
    assert!(told(back(&fragile(2, false)?).unwrap_err()));
    let caught = |f: &dyn Fn()| std::panic::catch_unwind(std::panic::AssertUnwindSafe(f));
    assert!(caught(&|| drop(fragile(1, true))).is_err());
    let y = fragile(2, true)?;
    assert!(caught(&|| drop(back(&y))).is_err());
    // Masks are drawn anew and not from what was left, and modes are obeyed.
    let run = || model.through(&x, Way::Kept);
    adapter.set_step(1);
    let (first, second) = (run()?, run()?);
    assert_ne!(bits(&first), bits(&second));
    adapter.set_step(1);
    assert_eq!(bits(&run()?), bits(&first));
    let off = adapter.with_mode(Mode::Off, run)?;
    assert_ne!(bits(&off), bits(&first));
    Ok(())
}

#[test]
fn a_second_run_that_differs_is_refused() -> candle_doft::Result<()> {
    let refused = |y: Result<Tensor>, parts: &[&str]| {
        let text = y
            .and_then(|y| y.sqr()?.sum_all()?.backward())
            .unwrap_err()
            .to_string();
        assert!(!text.contains('\n'), "{text}");
        for part in parts {
            assert!(text.contains(part), "no `{part}` in {text}");
        }
    };
    let x = Var::from_tensor(&seeded((2, 8), 1))?;
    let random = |x: &Tensor| candle_nn::ops::dropout(x, 0.5);
    refused(
        recomputed(&x, random),
        &["`recomputed`: the second output", "no random numbers"],
    );

    let (a, b) = (
        Var::from_tensor(&seeded(8, 2))?,
        Var::from_tensor(&seeded(8, 2))?,
    );
    let runs = AtomicUsize::new(0);
    let changing = recomputed(&x, move |x| match runs.fetch_add(1, Ordering::Relaxed) {
        0 => x.broadcast_mul(&a),
        _ => x.broadcast_mul(&b),
    });
    refused(
        changing,
        &[
            "the second run of the block is with 1 trainable tensors",
            "input alone",
        ],
    );

    let cut = recomputed(&x, |x| x.detach().affine(2., 0.));
    refused(
        cut,
        &["the input of the block is without a gradient", "`frozen`"],
    );

    let base = linear(8, 8, false, DType::F64)?;
    let builder = Adapter::builder(DoftConfig::default().with_block_size(4), &CPU)?;
    let layer = builder.wrap("layer", base)?;
    let adapter = builder.finish()?;
    let (held, runs) = (layer.clone(), AtomicUsize::new(0));
    let longer = recomputed(&x, move |x| match runs.fetch_add(1, Ordering::Relaxed) {
        0 => held.forward(x),
        _ => held.forward(&held.forward(x)?),
    });
    refused(longer, &["the second run of the block is of other layers"]);

    let held = layer.clone();
    let y = recomputed(&x, move |x| held.forward(x));
    disturb_all(adapter.vars(), 0.5)?;
    refused(y, &["off by", "no step of an optimizer"]);

    // Layers in threads that the block starts are not seen, so that their masks would be others.
    let builder = Adapter::builder(
        DoftConfig::default().with_block_size(2).with_dropout(0.5),
        &CPU,
    )?;
    let dropping = builder.wrap("dropping", linear(8, 32, false, DType::F64)?)?;
    let dropped = builder.finish()?;
    disturb_all(dropped.vars(), 0.5)?;
    let wide = Var::from_tensor(&seeded((2, 32), 1))?;
    let elsewhere = recomputed(&wide, move |x| {
        let run = || dropping.forward(x);
        std::thread::scope(|threads| threads.spawn(run).join().unwrap())
    });
    refused(elsewhere, &["the second output of the block is off by"]);

    // A mode that is set between the two changes nothing: the second run is like the first.
    let y = recomputed(&x, move |x| layer.forward(x))?;
    adapter.set_mode(Mode::Off)?;
    let grads = y.sqr()?.sum_all()?.backward()?;
    assert!(adapter.check_gradients(&grads)?.missing.is_empty());
    Ok(())
}
