//! Several adapters on one model: by name, one for each row, swapped under a running thread, and kept in memory.

mod support;

use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_doft::adapter::Average;
use candle_doft::train::AdamW;
use candle_doft::{
    Adapter, AdapterBuilder, Adapters, DoftConfig, DoftConv2d, DoftEmbedding, DoftLinear, Error,
    Magnitude, Map, Mode, Targets, frozen,
};
use candle_nn::{Conv2d, Embedding, Linear, ParamsAdamW};
use support::tensors::{CPU, bits, disturb_all, relative, seeded};

/// An embedding, a convolution over its rows, and two linear layers, one of them quantized or half.
struct Model {
    table: DoftEmbedding,
    conv: DoftConv2d,
    up: DoftLinear,
    down: DoftLinear,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Weights {
    Dense(DType),
    Quantized,
}

impl Model {
    fn new(builder: &AdapterBuilder, weights: Weights) -> candle_doft::Result<Self> {
        let (dtype, float) = match weights {
            Weights::Dense(dtype) => (dtype, dtype),
            Weights::Quantized => (DType::F32, DType::F32),
        };
        let tensor = |shape: &[usize], seed| seeded(shape, seed).to_dtype(float).unwrap();
        let bias = (seeded(64, 5) * 0.1)?.to_dtype(dtype)?;
        let up = match weights {
            Weights::Dense(_) => {
                builder.wrap("up", Linear::new(tensor(&[64, 32], 3), Some(bias)))?
            }
            Weights::Quantized => {
                let rows = QTensor::quantize(&tensor(&[64, 32], 3), GgmlDType::Q8_0)?;
                let up = frozen::Linear::from_qmatmul(QMatMul::from_qtensor(rows)?, Some(bias))?;
                builder.wrap("up", up)?
            }
        };
        Ok(Self {
            table: builder.wrap("table", Embedding::new(tensor(&[40, 32], 1), 32))?,
            conv: builder.wrap(
                "conv",
                Conv2d::new((tensor(&[2, 2, 3, 3], 2) * 0.3)?, None, padded()),
            )?,
            up,
            down: builder.wrap("down", Linear::new((tensor(&[8, 64], 4) * 0.2)?, None))?,
        })
    }

    /// `(B, 6)` ids to `(B, 6, 8)`.
    fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let x = self.table.forward(ids)?;
        let (rows, steps, width) = x.dims3()?;
        let image = x.reshape((rows, 2, steps / 2, width))?;
        let x = self.conv.forward(&image)?.reshape((rows, steps, width))?;
        self.down.forward(&self.up.forward(&x)?.tanh()?)
    }
}

fn padded() -> candle_nn::Conv2dConfig {
    candle_nn::Conv2dConfig {
        padding: 1,
        ..Default::default()
    }
}

fn ids(rows: usize) -> Tensor {
    let ids: Vec<u32> = (0..rows * 6).map(|i| (i * 7 % 40) as u32).collect();
    Tensor::from_vec(ids, (rows, 6), &CPU).unwrap()
}

fn configs() -> Vec<DoftConfig> {
    let base = DoftConfig::default().with_block_size(8);
    let all = Targets::All;
    vec![
        base.clone().with_targets(all.clone()),
        base.clone()
            .with_block_size(16)
            .with_magnitude(Magnitude::None),
        base.clone().with_map(Map::Exponential).with_targets("up"),
        base.clone()
            .with_block_size(4)
            .with_magnitude(Magnitude::Absolute)
            .with_exclude(["down"]),
        base.clone()
            .with_map(Map::SERIES)
            .with_targets(["conv", "table"]),
        base.clone().with_max_norm(0.2),
        base.clone().with_block_share(true),
        base.with_targets("down").with_magnitude(Magnitude::Factor),
    ]
}

/// A model under eight adapters that differ in everything, each away from its start.
fn eight(weights: Weights) -> candle_doft::Result<(Model, Adapters)> {
    let mut configs = configs().into_iter();
    let builder = Adapter::builder(configs.next().unwrap(), &CPU)?;
    let model = Model::new(&builder, weights)?;
    let adapters = Adapters::new("a0", builder.finish()?);
    for (i, config) in configs.enumerate() {
        adapters.add(&format!("a{}", i + 1), config)?;
    }
    for name in adapters.names() {
        disturb_all(adapters.get(&name)?.vars(), 0.2)?;
    }
    Ok((model, adapters))
}

#[test]
fn rows_under_their_own_adapters_are_what_each_is_alone() -> candle_doft::Result<()> {
    for (weights, bound) in [
        (Weights::Dense(DType::F32), 1e-6),
        (Weights::Dense(DType::F64), 1e-14),
        (Weights::Dense(DType::BF16), 2e-2),
        (Weights::Quantized, 1e-6),
    ] {
        let (model, adapters) = eight(weights)?;
        let names = adapters.names();
        let mut rows: Vec<Option<&str>> = names.iter().map(|name| Some(name.as_str())).collect();
        // The base, one that is not beside its like, and all of one.
        rows.extend([None, Some("a0"), Some("a3"), None]);
        let x = ids(rows.len());
        let mixed = adapters.rows(&rows)?.run(|| model.forward(&x))?;
        assert!(!mixed.track_op());
        let mut seen = Vec::new();
        for (i, name) in rows.iter().enumerate() {
            let alone = match name {
                Some(name) => adapters
                    .get(name)?
                    .with_mode(Mode::Eval, || model.forward(&x))?,
                None => adapters
                    .get("a0")?
                    .with_mode(Mode::Off, || model.forward(&x))?,
            };
            let (alone, found) = (alone.get(i)?, mixed.get(i)?);
            let off = relative(&found.to_dtype(DType::F64)?, &alone.to_dtype(DType::F64)?);
            assert!(off <= bound, "{weights:?}, row {i} under {name:?}: {off:e}");
            seen.push(bits(&alone.to_dtype(DType::F64)?));
        }
        seen.sort();
        seen.dedup();
        assert!(seen.len() >= 9, "{weights:?}: the adapters do not differ");
        // Rows of one adapter take its usual way, bit for bit.
        let same = adapters
            .rows(&[Some("a1"); 3])?
            .run(|| model.forward(&ids(3)))?;
        let alone = adapters
            .get("a1")?
            .with_mode(Mode::Eval, || model.forward(&ids(3)))?;
        assert_eq!(
            bits(&same.to_dtype(DType::F64)?),
            bits(&alone.to_dtype(DType::F64)?)
        );
    }
    Ok(())
}

/// candle's quantized product, which rounds activations row by row, so that rows do not meet in it either.
#[test]
fn fast_decoding_of_mixed_rows_is_that_of_each_row() -> candle_doft::Result<()> {
    let rows = QTensor::quantize(&seeded((64, 32), 3).to_dtype(DType::F32)?, GgmlDType::Q8_0)?;
    let base = frozen::Linear::from_qmatmul(QMatMul::from_qtensor(rows)?, None)?;
    let builder = Adapter::builder(DoftConfig::default().with_block_size(8), &CPU)?;
    let layer = builder.wrap("layer", base.with_fast_decode(true))?;
    let adapters = Adapters::new("a", builder.finish()?);
    adapters.add("b", DoftConfig::oft().with_block_size(4))?;
    for name in adapters.names() {
        disturb_all(adapters.get(&name)?.vars(), 0.3)?;
    }
    let x = seeded((3, 1, 32), 6).to_dtype(DType::F32)?;
    let names = [Some("b"), None, Some("a")];
    let mixed = adapters.rows(&names)?.run(|| layer.forward(&x))?;
    for (row, name) in names.into_iter().enumerate() {
        let x = x.narrow(0, row, 1)?;
        let alone = adapters.rows(&[name])?.run(|| layer.forward(&x))?;
        let off = relative(&mixed.narrow(0, row, 1)?, &alone);
        assert!(off < 1e-6, "row {row}: {off:e}");
    }
    Ok(())
}

#[test]
fn rows_that_do_not_fit_their_scope_are_errors() -> candle_doft::Result<()> {
    let (model, adapters) = eight(Weights::Dense(DType::F32))?;
    let scope = adapters.rows(&[Some("a0"), None])?;
    let error = scope
        .run(|| model.forward(&ids(3)))
        .unwrap_err()
        .to_string();
    assert!(error.contains("3 rows on axis 0, expected 2"), "{error}");
    let flat = Tensor::zeros((12, 64), DType::F32, &CPU)?;
    let error = scope
        .run(|| model.down.forward(&flat))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("layer `down`") && error.contains("12 rows"),
        "{error}"
    );
    let graph = Var::zeros((2, 64), DType::F32, &CPU)?;
    let error = scope
        .run(|| model.down.forward(&graph))
        .unwrap_err()
        .to_string();
    assert!(error.contains("for inference"), "{error}");
    let error = adapters.rows(&[Some("b")]).unwrap_err().to_string();
    assert!(
        error.contains("no adapter is called `b`; the model has `a0`, `a1`"),
        "{error}"
    );
    Ok(())
}

#[test]
fn adapters_are_added_loaded_replaced_and_removed() -> candle_doft::Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let (model, adapters) = eight(Weights::Dense(DType::F32))?;
    let run = || model.forward(&ids(2));
    let under = |name: &str| adapters.get(name)?.with_mode(Mode::Eval, run);
    let (first, second) = (under("a1")?, under("a3")?);
    for name in ["a1", "a3"] {
        adapters.get(name)?.save(folder.path().join(name))?;
    }
    // A file that does not fit changes nothing.
    let other = Adapter::builder(DoftConfig::default().with_block_size(8), &CPU)?;
    other.wrap(
        "elsewhere",
        Linear::new(Tensor::ones((4, 16), DType::F32, &CPU)?, None),
    )?;
    other.finish()?.save(folder.path().join("other"))?;
    let error = adapters
        .load("a1", folder.path().join("other"))
        .unwrap_err();
    assert!(matches!(error, Error::FileUnused { .. }), "{error}");
    assert_eq!(bits(&under("a1")?), bits(&first));
    assert!(matches!(
        adapters.add("a1", DoftConfig::default()),
        Err(Error::AdapterExists { .. })
    ));

    adapters.activate("a1", Mode::Eval)?;
    assert_eq!(adapters.active().as_deref(), Some("a1"));
    assert_eq!(bits(&run()?), bits(&first));
    assert!(matches!(
        adapters.remove("a1"),
        Err(Error::AdapterActs { .. })
    ));
    // What acts is replaced in its place and mode.
    let held = adapters.get("a1")?;
    adapters.load("a1", folder.path().join("a3"))?;
    assert_eq!(bits(&run()?), bits(&second));
    assert_eq!(
        (adapters.get("a1")?.mode(), held.mode()),
        (Mode::Eval, Mode::Off)
    );
    adapters.deactivate();
    assert_eq!(adapters.active(), None);
    adapters.remove("a1")?;
    assert!(!adapters.names().contains(&"a1".to_string()));
    adapters.load("new", folder.path().join("a1"))?;
    assert_eq!(bits(&under("new")?), bits(&first));
    // A model that was built with no adapter of its own.
    let builder = Adapter::builder(DoftConfig::default().with_targets(Targets::None), &CPU)?;
    let bare = Model::new(&builder, Weights::Dense(DType::F32))?;
    let loaded = Adapters::new("base", builder.finish()?);
    loaded.load("a1", folder.path().join("a1"))?;
    let found = loaded
        .get("a1")?
        .with_mode(Mode::Eval, || bare.forward(&ids(2)))?;
    assert_eq!(bits(&found), bits(&first));
    Ok(())
}

#[test]
fn each_adapter_trains_alone_and_saves_and_reports_what_is_its_own() -> candle_doft::Result<()> {
    let (model, adapters) = eight(Weights::Dense(DType::F32))?;
    let before: Vec<_> = adapters
        .names()
        .iter()
        .map(|name| adapters.get(name).unwrap().state().unwrap())
        .collect();
    let trained = adapters.get("a3")?;
    let mut optimizer = AdamW::for_adapter(
        &trained,
        ParamsAdamW {
            lr: 1e-2,
            weight_decay: 0.,
            ..Default::default()
        },
    )?;
    adapters.activate("a3", Mode::Train)?;
    let mut losses = Vec::new();
    for _ in 0..20 {
        let loss = model.forward(&ids(2))?.sqr()?.mean_all()?;
        let mut gradients = optimizer.gradients();
        let grads = gradients.backward(&loss, 1.)?;
        trained.check_gradients(&grads)?;
        optimizer.step(&gradients)?;
        losses.push(loss.to_scalar::<f32>()?);
    }
    assert!(losses[19] < 0.9 * losses[0], "{losses:?}");
    for (name, before) in adapters.names().iter().zip(&before) {
        let after = adapters.get(name)?.state()?;
        let same = before
            .values()
            .zip(after.values())
            .all(|((_, a), (_, b))| bits(a) == bits(b));
        assert_eq!(same, name != "a3", "{name}");
    }
    let report = trained.report();
    assert_eq!(report.layers.len(), 3);
    assert_eq!((report.frozen_layers, report.layers[0].block_size), (1, 3));
    // A fresh one changes no bit.
    adapters.add("fresh", DoftConfig::default().with_block_size(8))?;
    let run = || model.forward(&ids(2));
    let fresh = adapters.get("fresh")?.with_mode(Mode::Train, run)?;
    let base = adapters.get("fresh")?.with_mode(Mode::Off, run)?;
    assert_eq!(bits(&fresh), bits(&base));
    Ok(())
}

#[test]
fn a_scope_of_rows_holds_its_adapters_and_other_threads_enter_it() -> candle_doft::Result<()> {
    let (model, adapters) = eight(Weights::Dense(DType::F32))?;
    let rows = [Some("a2"), Some("a4"), None];
    let scope = adapters.rows(&rows)?;
    let before = scope.run(|| model.forward(&ids(3)))?;
    // It is pinned: training and removing change nothing in it.
    disturb_all(adapters.get("a2")?.vars(), 0.5)?;
    adapters.remove("a4")?;
    let others = std::thread::scope(|threads| {
        let run = || scope.run(|| model.forward(&ids(3)));
        let spawned = [threads.spawn(run), threads.spawn(run)];
        spawned.map(|thread| thread.join().unwrap())
    });
    for other in others {
        assert_eq!(bits(&other?), bits(&before));
    }
    // Outside it the first adapter acts as ever, here and in threads that were not given the scope.
    assert_eq!(adapters.active().as_deref(), Some("a0"));
    scope.run(|| {
        assert_eq!(adapters.active(), None);
        assert_eq!(adapters.get("a0").unwrap().mode(), Mode::Off);
    });
    let pinned = adapters.get("a2")?.pin()?;
    let again = adapters
        .rows_of(&[Some(&pinned), None, None])
        .run(|| model.forward(&ids(3)))?;
    assert_ne!(bits(&again.get(0)?), bits(&before.get(0)?));
    assert_eq!(bits(&again.get(2)?), bits(&before.get(2)?));
    Ok(())
}

#[test]
fn a_state_comes_back_bit_for_bit_and_an_average_is_the_sum_that_it_says() -> candle_doft::Result<()>
{
    let (model, adapters) = eight(Weights::Dense(DType::F32))?;
    let adapter = adapters.get("a0")?;
    let run = || model.forward(&ids(2));
    let (state, before) = (adapter.state()?, run()?);
    let mut average = Average::new(&adapter, 0.75)?;
    let mut expected: Vec<Vec<f64>> = Vec::new();
    for (_, value) in state.values() {
        expected.push(value.flatten_all()?.to_dtype(DType::F64)?.to_vec1()?);
    }
    for round in 0..5 {
        disturb_all(adapter.vars(), 0.1 + 0.05 * f64::from(round))?;
        average.update(&adapter)?;
        for (mean, (_, now)) in expected.iter_mut().zip(adapter.state()?.values()) {
            let now: Vec<f64> = now.flatten_all()?.to_dtype(DType::F64)?.to_vec1()?;
            mean.iter_mut()
                .zip(now)
                .for_each(|(m, x)| *m = 0.75 * *m + 0.25 * x);
        }
    }
    for (mean, (name, value)) in expected.iter().zip(average.state().values()) {
        let value: Vec<f64> = value.flatten_all()?.to_dtype(DType::F64)?.to_vec1()?;
        let off = mean
            .iter()
            .zip(&value)
            .map(|(a, b)| (a - b).abs())
            .fold(0., f64::max);
        assert!(off < 1e-6, "{name}: {off:e}");
    }
    assert_ne!(bits(&run()?), bits(&before));
    adapter.restore(&state)?;
    assert_eq!(bits(&run()?), bits(&before));
    let other = adapters.get("a1")?.state()?;
    let error = adapter.restore(&other).unwrap_err();
    assert!(matches!(error, Error::State { .. }), "{error}");
    assert_eq!(bits(&run()?), bits(&before));
    for decay in [1., -0.1, f64::NAN] {
        assert!(Average::new(&adapter, decay).is_err());
    }
    let _: &Device = adapter.device();
    Ok(())
}
