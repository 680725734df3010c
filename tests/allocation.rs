//! What a training step allocates: nothing of the weight's size, and nothing that stays.

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_doft::train::{AdamW, recomputed};
use candle_doft::{Adapter, Adapters, DoftConfig, DoftLinear, frozen};
use candle_nn::{Linear, Module, ParamsAdamW, VarBuilder, VarMap};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

/// Counts what is asked of the system's allocator.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static LARGEST: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn took(size: usize) {
    LARGEST.fetch_max(size, SeqCst);
    PEAK.fetch_max(LIVE.fetch_add(size, SeqCst) + size, SeqCst);
}

#[allow(unsafe_code, reason = "an allocator that counts")]
// SAFETY: every call goes on to the system's allocator with the arguments it came with.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        took(layout.size());
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        took(layout.size());
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), SeqCst);
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Tests share the counters.
static ALONE: Mutex<()> = Mutex::new(());

const SIZE: usize = 2048;
const WEIGHT_BYTES: usize = SIZE * SIZE * 4;
const ROWS: usize = 64;

/// The largest allocation and the peak while `f` runs, in bytes above what was live before.
fn counted<T>(f: impl FnOnce() -> T) -> (T, usize, usize) {
    let before = LIVE.load(SeqCst);
    LARGEST.store(0, SeqCst);
    PEAK.store(before, SeqCst);
    let answer = f();
    (answer, LARGEST.load(SeqCst), PEAK.load(SeqCst) - before)
}

/// What a step keeps, and its peak: medians over some. `gemm` gives each thread a buffer for good when it
/// first has work for it, which may be in any step, and threads of the test harness come and go; what a
/// step leaves behind, every one leaves.
fn median_step(step: impl Fn() -> Result<()>) -> Result<(usize, usize)> {
    let (mut kept, mut peaks) = (Vec::new(), Vec::new());
    for _ in 0..9 {
        let live = LIVE.load(SeqCst);
        let (done, _, peak) = counted(&step);
        done?;
        kept.push(LIVE.load(SeqCst).saturating_sub(live));
        peaks.push(peak);
    }
    kept.sort_unstable();
    peaks.sort_unstable();
    Ok((kept[4], peaks[4]))
}

/// A step that leaves something behind does so each time, so that the count can fail.
#[test]
fn what_a_step_leaves_behind_is_counted() -> Result<()> {
    let _alone = ALONE.lock();
    let left = Mutex::new(Vec::new());
    let (kept, peak) = median_step(|| {
        if let Ok(mut left) = left.lock() {
            left.push(vec![0u8; 10_000]);
        }
        Ok(())
    })?;
    assert!(kept >= 10_000 && peak >= 10_000, "{kept}, {peak}");
    Ok(())
}

fn setting() -> Result<(Linear, Var, Tensor)> {
    const { assert!(WEIGHT_BYTES >= 16 << 20) };
    let weight = Tensor::randn(0f32, 0.02, (SIZE, SIZE), &Device::Cpu)?;
    let x = Var::randn(0f32, 1., (ROWS, SIZE), &Device::Cpu)?;
    let upstream = Tensor::randn(0f32, 1., (ROWS, SIZE), &Device::Cpu)?;
    Ok((Linear::new(weight, None), x, upstream))
}

#[test]
fn a_training_step_allocates_nothing_of_the_weight_s_size_and_keeps_nothing() -> Result<()> {
    let _alone = ALONE.lock();
    let (base, x, upstream) = setting()?;
    let varmap = VarMap::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
    let (layer, largest, _) = counted(|| DoftLinear::new(base, &DoftConfig::default(), vb));
    let layer = layer?;
    assert!(
        largest < WEIGHT_BYTES / 4,
        "making the layer copied the weight: {largest} bytes"
    );

    let step = || -> Result<()> {
        let grads = (layer.forward(&x)? * &upstream)?.sum_all()?.backward()?;
        assert!(grads.get(&layer.base().weight()?).is_none());
        for var in varmap.all_vars() {
            assert!(grads.get(&var).is_some());
        }
        Ok(())
    };
    let (done, largest, _) = counted(step);
    done?;
    assert!(
        largest < WEIGHT_BYTES / 4,
        "one allocation of {largest} bytes"
    );
    let (kept, peak) = median_step(step)?;
    assert!(peak < WEIGHT_BYTES, "{peak} bytes at the peak");
    assert!(kept <= 4096, "the step kept {kept} bytes");
    Ok(())
}

/// The same count sees what candle's own layer does, so that it can fail.
#[test]
fn candle_s_layer_makes_a_gradient_of_the_weight_s_size() -> Result<()> {
    let _alone = ALONE.lock();
    let (base, x, upstream) = setting()?;
    let step = || (base.forward(&x)? * &upstream)?.sum_all()?.backward();
    let (grads, largest, _) = counted(step);
    grads?;
    assert!(largest >= WEIGHT_BYTES, "only {largest} bytes");
    Ok(())
}

/// After the forward pass only y is new: the rotated input is gone.
#[test]
fn the_forward_pass_keeps_its_answer_and_nothing_of_its_size_besides() -> Result<()> {
    let _alone = ALONE.lock();
    let (base, x, _) = setting()?;
    let varmap = VarMap::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
    let layer = DoftLinear::new(base, &DoftConfig::default().with_block_size(4), vb)?;
    layer.forward(&x)?;
    let live = LIVE.load(SeqCst);
    let y = layer.forward(&x)?;
    let kept = LIVE.load(SeqCst) - live;
    let answer = y.elem_count() * 4;
    // theta / c, Q, R and the ratio: small beside y for so small a block.
    let parameters = varmap
        .all_vars()
        .iter()
        .map(|v| v.elem_count() * 4)
        .sum::<usize>();
    assert!(
        kept < answer + 8 * parameters,
        "{kept} bytes kept, y has {answer}"
    );
    Ok(())
}

/// Beside inputs and answers, a step through a half or quantized weight needs its panels alone.
#[test]
fn a_step_through_a_quantized_or_half_weight_never_widens_the_whole() -> Result<()> {
    let _alone = ALONE.lock();
    const WIDE: usize = 4096;
    const LIMIT: usize = 8 << 20;
    let weight = Tensor::randn(0f32, 0.02, (WIDE, WIDE), &Device::Cpu)?;
    let quantized = QTensor::quantize(&weight, GgmlDType::Q4_0)?;
    let bases = [
        frozen::Linear::quantized(Arc::new(quantized), None)?,
        frozen::Linear::new(weight.to_dtype(DType::BF16)?, None),
        frozen::Linear::new(weight.to_dtype(DType::F16)?, None),
    ];
    drop(weight);
    for base in bases {
        let dtype = base.dtype();
        let x = Var::randn(0f32, 1., (16, WIDE), &Device::Cpu)?;
        let x = Var::from_tensor(&x.to_dtype(dtype)?)?;
        let varmap = VarMap::new();
        let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
        let config = DoftConfig::default().with_block_size(8);
        let (layer, _, peak) = counted(|| DoftLinear::new(base, &config, vb));
        let layer = layer?;
        assert!(peak < LIMIT, "{dtype:?}: {peak} bytes to make the layer");
        let step = || -> Result<()> {
            let grads = layer.forward(&x)?.sqr()?.mean_all()?.backward()?;
            assert!(grads.get(&x).is_some());
            Ok(())
        };
        let (kept, peak) = median_step(step)?;
        assert!(
            peak < LIMIT,
            "{dtype:?}: {peak} bytes at the peak of a step"
        );
        assert!(kept <= 4096, "{dtype:?}: the step kept {kept} bytes");
    }
    Ok(())
}

/// The loss over a head holds the logits of 128 rows, the plain one those of all, several times.
#[test]
fn the_loss_over_a_head_needs_less_than_a_quarter_of_the_plain_one() -> Result<()> {
    let _alone = ALONE.lock();
    let (rows, width, classes) = (512, 64, 49_152);
    let head = Tensor::randn(0f32, 0.1, (classes, width), &Device::Cpu)?;
    let head = frozen::Linear::new(head, None);
    let hidden = Var::randn(0f32, 1., (rows, width), &Device::Cpu)?;
    let targets = Tensor::arange(0u32, rows as u32, &Device::Cpu)?;
    let (fused, _, ours) = counted(|| {
        frozen::linear_cross_entropy(&hidden, &head, &targets).and_then(|loss| loss.backward())
    });
    let (plain, _, theirs) = counted(|| {
        let logits = head.forward(&hidden)?;
        candle_nn::loss::cross_entropy(&logits, &targets)?.backward()
    });
    assert!(4 * ours < theirs, "{ours} bytes, plain {theirs}");
    let (fused, plain) = (fused?, plain?);
    let off = (fused.get(&hidden).expect("dh") - plain.get(&hidden).expect("dh"))?;
    assert!(off.abs()?.max_all()?.to_scalar::<f32>()? < 1e-7);
    Ok(())
}

/// Moments and sums of gradients are values: they hold no graph of earlier steps.
#[test]
fn training_for_long_keeps_no_more_than_training_for_short() -> candle_doft::Result<()> {
    let _alone = ALONE.lock();
    let builder = Adapter::builder(DoftConfig::default(), &Device::Cpu)?;
    let weight = Tensor::randn(0f32, 0.1, (512, 64), &Device::Cpu)?;
    let layer = builder.wrap("layer", Linear::new(weight, None))?;
    let adapter = builder.finish()?;
    let params = ParamsAdamW {
        weight_decay: 0.,
        ..Default::default()
    };
    let mut optimizer = AdamW::for_adapter(&adapter, params)?;
    let x = Tensor::randn(0f32, 1., (4, 64), &Device::Cpu)?;
    let mut step = || -> candle_doft::Result<usize> {
        let mut gradients = optimizer.gradients();
        for _ in 0..2 {
            gradients.backward(&layer.forward(&x)?.sqr()?.mean_all()?, 0.5)?;
        }
        gradients.clip(1.)?;
        optimizer.step(&gradients)?;
        drop(gradients);
        Ok(LIVE.load(SeqCst))
    };
    let mut after = |steps: usize| (0..steps).try_fold(0, |_, _| step());
    let (early, late) = (after(10)?, after(50)?);
    // A thread gets a buffer when it first has work; one tensor a step would be 50 x 150 bytes.
    let more = late.saturating_sub(early);
    assert!(more <= 4096, "{more} bytes more after 50 steps");
    Ok(())
}

/// Of sixteen blocks the plain step holds all activations, and the other one those of one block.
#[test]
fn recomputed_blocks_need_the_memory_of_one() -> candle_doft::Result<()> {
    let _alone = ALONE.lock();
    const BLOCKS: usize = 16;
    let (rows, width, wide) = (256, 64, 512);
    let config = DoftConfig::default().with_block_size(4).with_dropout(0.1);
    let builder = Adapter::builder(config, &Device::Cpu)?;
    let layer = |path: String, out: usize, width: usize| {
        let weight = Tensor::randn(0f32, 0.05, (out, width), &Device::Cpu)?;
        builder.wrap(&path, Linear::new(weight, None))
    };
    let mut blocks = Vec::new();
    for i in 0..BLOCKS {
        let up = layer(format!("up{i}"), wide, width)?;
        blocks.push((up, layer(format!("down{i}"), width, wide)?));
    }
    let adapter = builder.finish()?;
    let x = Tensor::randn(0f32, 1., (rows, width), &Device::Cpu)?;
    let step = |again: bool| -> Result<()> {
        let mut y = x.clone();
        for (up, down) in &blocks {
            let (up, down) = (up.clone(), down.clone());
            let block = move |x: &Tensor| x + down.forward(&up.forward(x)?.tanh()?)?;
            y = match again {
                true => recomputed(&y, block)?,
                false => block(&y)?,
            };
        }
        let grads = y.sqr()?.mean_all()?.backward()?;
        assert!(adapter.vars().iter().all(|var| grads.get(var).is_some()));
        Ok(())
    };
    let (kept, plain) = median_step(|| step(false))?;
    assert!(kept <= 4096, "the plain step kept {kept} bytes");
    let (kept, again) = median_step(|| step(true))?;
    assert!(kept <= 4096, "the step kept {kept} bytes");
    // Two activations of a block are `wide`.
    let all = BLOCKS * 2 * rows * wide * 4;
    assert!(plain > all, "{plain} bytes of {all} were kept");
    assert!(3 * again < plain, "{again} bytes, plain {plain}");
    Ok(())
}

/// Eight adapters on one layer, each with its rotations made, against eight layers.
#[test]
fn eight_adapters_take_less_than_a_fifth_of_eight_merged_layers() -> candle_doft::Result<()> {
    let _alone = ALONE.lock();
    let width = 1024;
    let before = LIVE.load(SeqCst);
    let weight = Tensor::randn(0f32, 0.02, (width, width), &Device::Cpu)?;
    let builder = Adapter::builder(DoftConfig::default(), &Device::Cpu)?;
    let layer = builder.wrap("layer", Linear::new(weight, None))?;
    let adapters = Adapters::new("0", builder.finish()?);
    let mut pins = vec![adapters.get("0")?.pin()?];
    for i in 1..8 {
        pins.push(adapters.add(&i.to_string(), DoftConfig::default())?.pin()?);
    }
    let rows: Vec<_> = pins.iter().map(Some).collect();
    let scope = adapters.rows_of(&rows);
    let x = Tensor::ones((8, width), DType::F32, &Device::Cpu)?;
    let y = scope.run(|| layer.forward(&x))?;
    let taken = LIVE.load(SeqCst) - before;
    let merged = 8 * width * width * 4;
    assert!(5 * taken < merged, "{taken} bytes, eight layers {merged}");
    assert!(
        taken > width * width * 4,
        "{taken} bytes: the weight is not counted"
    );
    assert_eq!(y.dims(), [8, width]);
    Ok(())
}
