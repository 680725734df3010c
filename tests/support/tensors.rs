//! Seeded tensors and layers, and how far apart two tensors are.

use candle_core::{DType, Device, Result, Shape, Tensor, Var};
use candle_doft::{DoftConfig, DoftLinear, rng::SplitMix64};
use candle_nn::{Linear, VarBuilder, VarMap};

pub const CPU: Device = Device::Cpu;

/// Standard normal values in f64.
pub fn seeded(shape: impl Into<Shape>, seed: u64) -> Tensor {
    let shape = shape.into();
    let mut rng = SplitMix64::new(seed);
    let values: Vec<f64> = (0..shape.elem_count()).map(|_| rng.normal()).collect();
    Tensor::from_vec(values, shape, &CPU).unwrap()
}

/// A linear layer of seeded weight, rows of about unit norm.
pub fn linear(out: usize, width: usize, bias: bool, dtype: DType) -> Result<Linear> {
    let bias = bias.then(|| seeded(out, 2).to_dtype(dtype)).transpose()?;
    let weight = (seeded((out, width), 1) / (width as f64).sqrt())?;
    Ok(Linear::new(weight.to_dtype(dtype)?, bias))
}

/// A layer `layer` around `base`, and the parameters it trains.
pub fn wrapped(base: &Linear, config: &DoftConfig) -> Result<(DoftLinear, VarMap)> {
    let varmap = VarMap::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F32, &CPU).pp("layer");
    Ok((DoftLinear::new(base.clone(), config, vb)?, varmap))
}

/// What a map holds, in the order of the names, and what its layer is fed.
pub fn named<'a>(
    varmap: &VarMap,
    inputs: impl IntoIterator<Item = (&'a str, &'a Var)>,
) -> Vec<(String, Var)> {
    let data = varmap.data().lock().unwrap();
    let mut all: Vec<_> = data.iter().map(|(n, v)| (n.clone(), v.clone())).collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    let inputs = inputs.into_iter();
    all.extend(inputs.map(|(name, var)| (name.to_string(), var.clone())));
    all
}

/// Moves every parameter away from the start by normal noise, as training would.
pub fn disturb(varmap: &VarMap, scale: f64) -> Result<()> {
    disturb_all(named(varmap, []).into_iter().map(|(_, var)| var), scale)
}

/// The same of variables in an order of their own.
pub fn disturb_all(vars: impl IntoIterator<Item = Var>, scale: f64) -> Result<()> {
    for (seed, var) in vars.into_iter().enumerate() {
        let noise = seeded(var.dims(), 10 + seed as u64).to_dtype(var.dtype())?;
        var.set(&var.add(&(noise * scale)?)?)?;
    }
    Ok(())
}

/// The bits of every value of an f32 or f64 tensor.
pub fn bits(x: &Tensor) -> Vec<u64> {
    let x = x.flatten_all().unwrap();
    match x.dtype() {
        DType::F32 => {
            let x = x.to_vec1::<f32>().unwrap();
            x.iter().map(|v| u64::from(v.to_bits())).collect()
        }
        _ => {
            let x = x.to_vec1::<f64>().unwrap();
            x.iter().map(|v| v.to_bits()).collect()
        }
    }
}

/// Every value as f64.
pub fn values(x: &Tensor) -> Vec<f64> {
    let x = x.to_dtype(DType::F64).unwrap().flatten_all().unwrap();
    x.to_vec1().unwrap()
}

/// `max |a - b| / max |b|`.
pub fn relative(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    let (a, b) = (values(a), values(b));
    // `f64::max` would drop a NaN.
    let largest = |acc: f64, v: f64| {
        if acc.is_nan() || v > acc || v.is_nan() {
            v
        } else {
            acc
        }
    };
    let off = a.iter().zip(&b).map(|(a, b)| (a - b).abs());
    off.fold(0., largest) / b.iter().map(|b| b.abs()).fold(0., largest)
}
