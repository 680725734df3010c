//! Adapters swapped under a thread that runs the model: no pass is mixed, and nothing leaks. Alone in its program, whose
//! memory is looked at.

mod support;

use candle_core::{DType, Module, Result, Tensor};
use candle_doft::{Adapter, Adapters, DoftConfig, DoftLinear, Map, Mode};
use candle_nn::Linear;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use support::tensors::{CPU, bits, disturb_all, seeded};

/// Resident bytes of this process, where the system says.
fn resident() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = text.split_whitespace().nth(1)?.parse().ok()?;
    Some(pages * 4096)
}

/// Every pass comes from one whole adapter, old or new, and ten thousand swaps leave nothing behind.
#[test]
fn a_swap_under_a_running_thread_never_mixes_two_adapters() -> candle_doft::Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let weight = |seed| {
        (seeded((64, 64), seed) * 0.2)
            .unwrap()
            .to_dtype(DType::F32)
            .unwrap()
    };
    let builder = Adapter::builder(DoftConfig::default().with_block_size(16), &CPU)?;
    let layers: Vec<DoftLinear> = (0..4)
        .map(|i| builder.wrap(&format!("l{i}"), Linear::new(weight(i), None)))
        .collect::<candle_doft::Result<_>>()?;
    let adapters = Adapters::new("a", builder.finish()?);
    adapters.add(
        "b",
        DoftConfig::default()
            .with_block_size(8)
            .with_map(Map::Exponential),
    )?;
    for name in ["a", "b"] {
        disturb_all(adapters.get(name)?.vars(), 0.2)?;
        adapters.get(name)?.save(folder.path().join(name))?;
    }
    let x = seeded((2, 64), 9).to_dtype(DType::F32)?;
    let forward = || -> Result<Tensor> {
        let mut y = x.clone();
        for layer in &layers {
            y = layer.forward(&y)?.tanh()?;
        }
        Ok(y)
    };
    let mut known = Vec::new();
    for name in ["a", "b"] {
        known.push(bits(&adapters.get(name)?.with_mode(Mode::Eval, forward)?));
    }
    adapters.activate("a", Mode::Eval)?;
    let (stop, passes) = (AtomicBool::new(false), AtomicUsize::new(0));
    let (mut early, mut late) = (None, None);
    let seen = std::thread::scope(|threads| {
        let running = threads.spawn(|| {
            let mut seen = [0usize; 2];
            while !stop.load(Ordering::Relaxed) {
                let y = bits(&adapters.pass(forward).unwrap());
                let which = known.iter().position(|known| *known == y);
                seen[which.expect("a mixed pass")] += 1;
                passes.fetch_add(1, Ordering::Relaxed);
            }
            seen
        });
        for swap in 0..10_000 {
            let name = ["b", "a"][swap % 2];
            // Some of them replace the adapter itself.
            if swap % 100 == 99 {
                adapters.load(name, folder.path().join(name)).unwrap();
            }
            adapters.activate(name, Mode::Eval).unwrap();
            if swap == 1_000 {
                early = resident();
            }
        }
        late = resident();
        // On a machine of one core the thread may not have run yet.
        while passes.load(Ordering::Relaxed) < 20 {
            std::thread::yield_now();
        }
        stop.store(true, Ordering::Relaxed);
        running.join().unwrap()
    });
    assert!(seen[0] + seen[1] >= 20, "{seen:?}");
    if let (Some(early), Some(late)) = (early, late) {
        // A snapshot is 40 kB: nine thousand of them would be 360 MB.
        let grown = late.saturating_sub(early);
        assert!(
            grown < 16 << 20,
            "{grown} bytes more after 10,000 swaps than after 1,000"
        );
    }
    Ok(())
}
