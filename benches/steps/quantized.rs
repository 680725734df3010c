//! One step of one layer over quantized or half weights: 512x1024x1024, forward and backward.

use super::{Run, seeded};
use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_doft::{DoftConfig, DoftLinear, frozen};
use candle_nn::{Module, VarBuilder, VarMap};
use std::sync::Arc;

pub const SHAPE: super::Shape = (512, 1024, 1024);

/// Stored types that are measured, by the name of their method.
pub const TYPES: [(&str, GgmlDType); 6] = [
    ("q4_0", GgmlDType::Q4_0),
    ("q4_1", GgmlDType::Q4_1),
    ("q5_1", GgmlDType::Q5_1),
    ("q8_0", GgmlDType::Q8_0),
    ("q4_k", GgmlDType::Q4K),
    ("q6_k", GgmlDType::Q6K),
];

/// `dense` is DOFT over the f32 weight, `q4_0` and so on over the quantized one, `bf16` over a half
/// weight with f32 activations; `qmatmul` is candle's quantized product, forward alone, for it has no
/// backward, and `forward` DOFT's forward over Q4_0.
pub fn run(method: &str) -> Result<Run> {
    let (tokens, width, out) = SHAPE;
    let weight = (seeded((out, width), 1)? / (width as f64).sqrt())?;
    let x = Var::from_tensor(&seeded((tokens, width), 2)?)?;
    let upstream = seeded((tokens, out), 3)?;
    let quantized = |dtype| QTensor::quantize(&weight, dtype).map(Arc::new);
    if method == "qmatmul" {
        let product = QMatMul::from_arc(quantized(GgmlDType::Q4_0)?)?;
        return Ok(Box::new(move || {
            std::hint::black_box(product.forward(&x)?);
            Ok(())
        }));
    }
    let stored = TYPES.iter().find(|(name, _)| *name == method);
    let base = match (method, stored) {
        ("dense", _) => frozen::Linear::new(weight, None),
        ("bf16", _) => frozen::Linear::new(weight.to_dtype(DType::BF16)?, None),
        ("forward", _) => frozen::Linear::quantized(quantized(GgmlDType::Q4_0)?, None)?,
        (_, Some((_, dtype))) => frozen::Linear::quantized(quantized(*dtype)?, None)?,
        (other, None) => candle_core::bail!("no method `{other}`"),
    };
    let expected = base.weight()?.to_dtype(DType::F32)?;
    let varmap = VarMap::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
    let layer = DoftLinear::new(base, &DoftConfig::default(), vb)?;
    let off = (layer.forward(&x)? - x.matmul(&expected.t()?)?)?;
    let off = off.abs()?.max_all()?.to_scalar::<f32>()?;
    assert!(off < 1e-3, "{method} is off by {off}");
    if method == "forward" {
        return Ok(Box::new(move || {
            std::hint::black_box(layer.forward(&x)?);
            Ok(())
        }));
    }
    Ok(Box::new(move || {
        let grads = (layer.forward(&x)? * &upstream)?.sum_all()?.backward()?;
        assert!(grads.get(&x).is_some());
        std::hint::black_box((grads, &varmap));
        Ok(())
    }))
}

/// The loss of 512 tokens over a head of SmolLM2's shape, forward and backward: `fused` with
/// `linear_cross_entropy`, `plain` with logits and candle's loss.
pub fn loss(method: &str) -> Result<Run> {
    let (tokens, width, classes) = (512, 576, 49_152);
    let weight = (seeded((classes, width), 1)? / (width as f64).sqrt())?;
    let hidden = Var::from_tensor(&seeded((tokens, width), 2)?)?;
    let targets = (0..tokens as u32).map(|t| t * 97 % classes as u32);
    let targets = Tensor::from_iter(targets, &Device::Cpu)?;
    let head = frozen::Linear::new(weight, None);
    let fused = method == "fused";
    let loss = move || -> Result<Tensor> {
        match fused {
            true => frozen::linear_cross_entropy(&hidden, &head, &targets),
            false => candle_nn::loss::cross_entropy(&head.forward(&hidden)?, &targets),
        }
    };
    Ok(Box::new(move || {
        std::hint::black_box(loss()?.backward()?);
        Ok(())
    }))
}
