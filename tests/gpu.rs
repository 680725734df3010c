//! The layers on a GPU against the same layers on CPU.
//!
//! `CANDLE_DOFT_DEVICE` names the device (`cuda:1`, `metal`); without it the first card is taken where the
//! tests are built with the feature `cuda`. With `cpu` the composed path is not met: that checks the tests.

#[path = "../examples/support/device.rs"]
mod device;
mod support;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_doft::train::AdamW;
use candle_doft::{Adapter, DoftConfig, DoftLinear, Map};
use candle_nn::{Linear, Module, ParamsAdamW, VarBuilder, VarMap};
use device::DeviceName;
use support::MAPS;
use support::tensors::{CPU, linear, named, seeded, values};

const WIDTH: usize = 32;
const OUT: usize = 12;

/// The device to test; says so where there is none. One that was asked for by name has to be there.
fn card() -> Option<Device> {
    if let Ok(name) = std::env::var("CANDLE_DOFT_DEVICE") {
        return Some(name.parse::<DeviceName>().unwrap().open().unwrap());
    }
    match "cuda".parse::<DeviceName>().map(DeviceName::open) {
        Ok(Ok(device)) => Some(device),
        Ok(Err(error)) => {
            println!("SKIPPED: there is no GPU: {error:#}");
            None
        }
        Err(why) => {
            println!("SKIPPED: {why}");
            None
        }
    }
}

/// Values on the host, as f64: Metal has no f64.
fn host(x: &Tensor) -> Vec<f64> {
    values(&x.to_device(&CPU).unwrap())
}

fn base(dtype: DType, device: &Device) -> Result<Linear> {
    let host = linear(OUT, WIDTH, true, dtype)?;
    let bias = host.bias().map(|bias| bias.to_device(device)).transpose()?;
    Ok(Linear::new(host.weight().to_device(device)?, bias))
}

fn config(map: Map) -> DoftConfig {
    DoftConfig::default().with_block_size(8).with_map(map)
}

/// A layer on a device, with its parameters `noise` away from the start.
fn layer(
    config: &DoftConfig,
    dtype: DType,
    noise: f64,
    device: &Device,
) -> Result<(DoftLinear, Vec<(String, Var)>)> {
    let varmap = VarMap::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F32, device).pp("layer");
    let layer = DoftLinear::new(base(dtype, device)?, config, vb)?;
    let vars = named(&varmap, []);
    for (seed, (_, var)) in vars.iter().enumerate() {
        let more = (seeded(var.dims(), 10 + seed as u64) * noise)?.to_dtype(var.dtype())?;
        var.set(&(var.as_tensor() + more.to_device(device)?)?)?;
    }
    Ok((layer, vars))
}

/// The output, and the gradients of the input and of every parameter, by name.
fn outcome(config: &DoftConfig, dtype: DType, device: &Device) -> Result<Vec<(String, Vec<f64>)>> {
    let (layer, vars) = layer(config, dtype, 0.3, device)?;
    let x = seeded((7, WIDTH), 3).to_dtype(dtype)?.to_device(device)?;
    let x = Var::from_tensor(&x)?;
    let y = layer.forward(&x)?;
    let upstream = seeded((7, OUT), 4).to_dtype(dtype)?.to_device(device)?;
    let slopes = (&y * upstream)?.sum_all()?.backward()?;
    let mut all = vec![("y".to_string(), host(&y))];
    let vars = vars.into_iter().chain([("x".to_string(), x)]);
    all.extend(vars.map(|(name, var)| (name, host(slopes.get(&var).unwrap()))));
    Ok(all)
}

#[test]
fn every_map_has_the_values_and_gradients_of_the_cpu() -> Result<()> {
    let Some(device) = card() else { return Ok(()) };
    for map in MAPS {
        for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::BF16, 1.6e-2)] {
            for cap in [None, Some(0.2)] {
                let config = config(map).with_max_norm(cap);
                let ours = outcome(&config, dtype, &device)?;
                let theirs = outcome(&config, dtype, &CPU)?;
                assert_eq!(ours.len(), theirs.len());
                assert!(ours.len() >= 4, "only {} tensors", ours.len());
                for ((name, ours), (_, theirs)) in ours.iter().zip(&theirs) {
                    let largest = theirs.iter().fold(0f64, |m, v| m.max(v.abs()));
                    assert!(largest > 0., "{map:?} {dtype:?} {cap:?}: {name} is 0");
                    for (a, b) in ours.iter().zip(theirs) {
                        let off = (a - b).abs() / largest;
                        assert!(off <= tolerance, "{map:?} {dtype:?} {cap:?} {name}: {off}");
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_fresh_layer_is_candle_s_to_the_bit() -> Result<()> {
    let Some(device) = card() else { return Ok(()) };
    for map in MAPS {
        let (layer, _) = layer(&config(map), DType::F32, 0., &device)?;
        let x = seeded((7, WIDTH), 3)
            .to_dtype(DType::F32)?
            .to_device(&device)?;
        let theirs = base(DType::F32, &device)?.forward(&x)?;
        assert_eq!(host(&layer.forward(&x)?), host(&theirs), "{map:?}");
    }
    Ok(())
}

#[test]
fn an_empty_batch_gives_an_empty_answer() -> Result<()> {
    let Some(device) = card() else { return Ok(()) };
    for map in MAPS {
        let (layer, _) = layer(&config(map), DType::F32, 0.3, &device)?;
        let y = layer.forward(&Tensor::zeros((0, WIDTH), DType::F32, &device)?)?;
        assert_eq!(y.dims(), [0, OUT], "{map:?}");
    }
    Ok(())
}

#[test]
fn a_nan_stays_in_its_block() -> Result<()> {
    let Some(device) = card() else { return Ok(()) };
    for map in MAPS {
        let (layer, vars) = layer(&config(map), DType::F32, 0.3, &device)?;
        let clean = host(&layer.rotation()?);
        // Packed rows are the only parameter of two dimensions.
        let (_, theta) = vars.iter().find(|(_, var)| var.rank() == 2).unwrap();
        let (blocks, n) = theta.dims2()?;
        let mut wrong = host(theta);
        wrong[n] = f64::NAN;
        let wrong = Tensor::from_vec(wrong, (blocks, n), &CPU)?.to_dtype(DType::F32)?;
        theta.set(&wrong.to_device(&device)?)?;
        let spoilt = host(&layer.rotation()?);
        let size = clean.len() / blocks;
        assert!(blocks > 2);
        for (block, (a, b)) in clean.chunks(size).zip(spoilt.chunks(size)).enumerate() {
            match block {
                1 => assert!(b.iter().any(|v| v.is_nan()), "{map:?}"),
                _ => assert_eq!(a, b, "{map:?}, block {block}"),
            }
        }
    }
    Ok(())
}

/// The losses of 200 steps towards a layer that was turned, and the adapter that they end with.
fn run(map: Map, device: &Device) -> candle_doft::Result<(Vec<f64>, Adapter, DoftLinear)> {
    let (target, _) = layer(&config(map), DType::F32, 0.5, device)?;
    let builder = Adapter::builder(config(map), device)?;
    let layer = builder.wrap("fc", base(DType::F32, device)?)?;
    let adapter = builder.finish()?;
    let params = ParamsAdamW {
        lr: 1e-2,
        weight_decay: 0.,
        ..Default::default()
    };
    let mut optimizer = AdamW::for_adapter(&adapter, params)?;
    let x = seeded((64, WIDTH), 3).to_dtype(DType::F32)?;
    let x = x.to_device(device)?;
    let y = target.forward(&x)?.detach();
    let mut losses = Vec::new();
    for _ in 0..200 {
        let loss = (layer.forward(&x)? - &y)?.sqr()?.mean_all()?;
        let mut gradients = optimizer.gradients();
        gradients.backward(&loss, 1.)?;
        gradients.clip(1.)?;
        optimizer.step(&gradients)?;
        losses.push(f64::from(loss.to_scalar::<f32>()?));
    }
    Ok((losses, adapter, layer))
}

#[test]
fn two_hundred_steps_fall_as_on_cpu_and_two_runs_have_equal_bits() -> candle_doft::Result<()> {
    let Some(device) = card() else { return Ok(()) };
    for map in MAPS {
        let (ours, again, theirs) = (run(map, &device)?, run(map, &device)?, run(map, &CPU)?);
        assert_eq!(ours.0, again.0, "{map:?}");
        let last = |losses: &[f64]| losses[losses.len() - 1];
        assert!(last(&ours.0) < 0.1 * ours.0[0], "{map:?}: {:?}", ours.0);
        for (step, (a, b)) in ours.0.iter().zip(&theirs.0).enumerate() {
            let near = 1e-2 * b + 1e-6;
            assert!((a - b).abs() <= near, "{map:?}, step {step}: {a}, {b}");
        }
    }
    Ok(())
}

#[test]
fn what_is_trained_there_loads_on_cpu() -> candle_doft::Result<()> {
    let Some(device) = card() else { return Ok(()) };
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("adapter.safetensors");
    let (_, adapter, there) = run(Map::Cayley, &device)?;
    adapter.save(&file)?;
    let builder = Adapter::load(&file, &CPU)?;
    let here = builder.wrap("fc", base(DType::F32, &CPU)?)?;
    builder.finish()?;
    let x = seeded((7, WIDTH), 5).to_dtype(DType::F32)?;
    let theirs = host(&there.forward(&x.to_device(&device)?)?);
    let ours = host(&here.forward(&x)?);
    let largest = theirs.iter().fold(0f64, |m, v| m.max(v.abs()));
    assert!(largest > 0.);
    for (a, b) in ours.iter().zip(&theirs) {
        assert!((a - b).abs() <= 1e-5 * largest, "{a}, {b}");
    }
    Ok(())
}
