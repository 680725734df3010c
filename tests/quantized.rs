//! Quantized and half bases: the same product as the weight they expand to, and never the whole of it.

mod support;

use candle_core::quantized::{GgmlDType, QMatMul, QTensor, gguf_file};
use candle_core::{DType, Result, Tensor, Var};
use candle_doft::frozen::{self, QuantizedVarBuilder};
use candle_doft::{Adapter, DoftConfig, DoftLinear, Mode};
use candle_nn::{Linear, Module, VarBuilder, VarMap};
use std::sync::Arc;
use support::tensors::{CPU, bits, disturb, relative, seeded};
use support::tolerance::{self, QUANTIZED};

const TYPES: [GgmlDType; 15] = [
    GgmlDType::F32,
    GgmlDType::F16,
    GgmlDType::BF16,
    GgmlDType::Q4_0,
    GgmlDType::Q4_1,
    GgmlDType::Q5_0,
    GgmlDType::Q5_1,
    GgmlDType::Q8_0,
    GgmlDType::Q8_1,
    GgmlDType::Q2K,
    GgmlDType::Q3K,
    GgmlDType::Q4K,
    GgmlDType::Q5K,
    GgmlDType::Q6K,
    GgmlDType::Q8K,
];

fn weight(out: usize, width: usize) -> Result<Tensor> {
    (seeded((out, width), 1) / (width as f64).sqrt())?.to_dtype(DType::F32)
}

fn quantized(out: usize, width: usize, dtype: GgmlDType) -> Result<Arc<QTensor>> {
    Ok(Arc::new(QTensor::quantize(&weight(out, width)?, dtype)?))
}

fn wrapped(base: frozen::Linear, config: &DoftConfig) -> Result<(DoftLinear, VarMap)> {
    let varmap = VarMap::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F32, &CPU).pp("layer");
    let layer = DoftLinear::new(base, config, vb)?;
    disturb(&varmap, 0.2)?;
    Ok((layer, varmap))
}

#[test]
fn every_type_gives_the_outputs_and_gradients_of_the_weight_it_expands_to() -> Result<()> {
    // 2,100 rows of 256 are more than one panel.
    for (out, width) in [(40, 256), (2100, 256)] {
        for dtype in TYPES {
            let tensor = quantized(out, width, dtype)?;
            let dense = tensor.dequantize(&CPU)?;
            // A bias far above the product: the magnitude's gradient is recomputed in panels.
            let bias = (seeded(out, 2).to_dtype(DType::F32)? * 1e4)?;
            let config = DoftConfig::default();
            let base = frozen::Linear::quantized(tensor, Some(bias.clone()))?;
            let (ours, vars) = wrapped(base, &config)?;
            let (theirs, twins) = wrapped(Linear::new(dense, Some(bias.clone())).into(), &config)?;
            assert_eq!(bits(&ours.magnitude()?), bits(&theirs.magnitude()?));
            for rows in [1, 5, 70] {
                let x = Var::from_tensor(&seeded((rows, width), 3).to_dtype(DType::F32)?)?;
                let upstream = seeded((rows, out), 4).to_dtype(DType::F32)?;
                let what = format!("{dtype:?}, {rows} rows of {out}");
                let near = |name: &str, a: &Tensor, b: &Tensor| {
                    let off = relative(a, b);
                    assert!(off < QUANTIZED, "{what}: {name} is off by {off:e}");
                };
                let (a, b) = (ours.forward(&x)?, theirs.forward(&x)?);
                let without = |y: &Tensor| y.broadcast_sub(&bias);
                // What the bias leaves of f32 in y, relative to the product.
                let off = relative(&without(&a)?, &without(&b)?);
                assert!(off < 2e-3, "{what}: y without bias is off by {off:e}");
                near("y", &a, &b);
                let a = (a * &upstream)?.sum_all()?.backward()?;
                let b = (b * &upstream)?.sum_all()?.backward()?;
                near("dx", a.get(&x).expect("dx"), b.get(&x).expect("dx"));
                let twins = twins.data().lock().unwrap();
                for (name, var) in vars.data().lock().unwrap().iter() {
                    near(
                        name,
                        a.get(var).expect(name),
                        b.get(&twins[name]).expect(name),
                    );
                }
            }
        }
    }
    Ok(())
}

#[test]
fn merged_equals_unmerged_and_a_fresh_layer_changes_no_bit() -> Result<()> {
    for dtype in TYPES {
        let base = frozen::Linear::quantized(quantized(40, 256, dtype)?, None)?;
        let x = seeded((9, 256), 3).to_dtype(DType::F32)?;
        let vb = VarBuilder::zeros(DType::F32, &CPU);
        let fresh = DoftLinear::new(base.clone(), &DoftConfig::default(), vb)?;
        assert_eq!(
            bits(&fresh.forward(&x)?),
            bits(&base.forward(&x)?),
            "{dtype:?}"
        );
        let (layer, _) = wrapped(base, &DoftConfig::default())?;
        let off = relative(&layer.merge()?.forward(&x)?, &layer.forward(&x)?);
        assert!(off < tolerance::merged(DType::F32), "{dtype:?}: {off:e}");
    }
    Ok(())
}

#[test]
fn half_activations_pass_over_quantized_and_half_weights() -> Result<()> {
    let base = frozen::Linear::quantized(quantized(40, 256, GgmlDType::Q4_0)?, None)?;
    let (layer, _) = wrapped(base, &DoftConfig::default())?;
    let x = seeded((9, 256), 3);
    for dtype in [DType::F16, DType::BF16] {
        let x = x.to_dtype(dtype)?;
        let wide = layer.forward(&x.to_dtype(DType::F32)?)?;
        let y = layer.forward(&x)?;
        assert_eq!(y.dtype(), dtype);
        assert!(relative(&y.to_dtype(DType::F32)?, &wide) < tolerance::merged(dtype));
        // f32 activations over a half weight need not be cast by the caller.
        let half = Linear::new(weight(40, 256)?.to_dtype(dtype)?, None);
        let (layer, _) = wrapped(half.into(), &DoftConfig::default())?;
        assert_eq!(layer.forward(&x.to_dtype(DType::F32)?)?.dtype(), DType::F32);
    }
    let error = layer.forward(&x).unwrap_err().to_string();
    assert_eq!(
        error,
        "layer `layer`: the input has dtype F64, expected one of [F32, F16, BF16], which its weight \
         can be multiplied with"
    );
    Ok(())
}

/// 1e4 times 256 terms leaves f16's range in the sum of squares, but not in what is asked for.
#[test]
fn large_activations_and_magnitudes_stay_finite() -> Result<()> {
    for dtype in [DType::F16, DType::BF16] {
        let base = Linear::new((weight(40, 256)? * 0.01)?.to_dtype(dtype)?, None);
        let (layer, varmap) = wrapped(base.into(), &DoftConfig::default())?;
        let data = varmap.data().lock().unwrap();
        let mu = &data["layer.dora_log_multiplier"];
        mu.set(&Tensor::full(3f32, mu.shape(), &CPU)?)?;
        drop(data);
        let x = seeded((9, 256), 3).clamp(-1., 1.)?;
        let x = Var::from_tensor(&(x * 1e4)?.to_dtype(dtype)?)?;
        let y = layer.forward(&x)?;
        let grads = y.to_dtype(DType::F32)?.mean_all()?.backward()?;
        let finite = |t: &Tensor| {
            let sum = t
                .to_dtype(DType::F64)
                .unwrap()
                .abs()
                .unwrap()
                .sum_all()
                .unwrap();
            let sum = sum.to_scalar::<f64>().unwrap();
            assert!(sum.is_finite() && sum > 0., "{dtype:?}: {sum}");
        };
        finite(&y);
        finite(grads.get(&x).expect("dx"));
        for var in varmap.all_vars() {
            finite(grads.get(&var).expect("a gradient"));
        }
    }
    Ok(())
}

#[test]
fn fast_decode_is_candle_s_product_and_only_on_request() -> Result<()> {
    let tensor = quantized(40, 256, GgmlDType::Q4_0)?;
    let base = frozen::Linear::quantized(tensor.clone(), None)?;
    let candle = QMatMul::from_arc(tensor)?;
    let x = seeded((8, 256), 3).to_dtype(DType::F32)?;
    let fast = base.clone().with_fast_decode(true);
    assert_eq!(bits(&fast.forward(&x)?), bits(&candle.forward(&x)?));
    assert_ne!(bits(&base.forward(&x)?), bits(&candle.forward(&x)?));
    let nine = seeded((9, 256), 3).to_dtype(DType::F32)?;
    assert_eq!(bits(&fast.forward(&nine)?), bits(&base.forward(&nine)?));
    // Where something trains, the product is the one that is trained.
    let var = Var::from_tensor(&x)?;
    assert_eq!(bits(&fast.forward(&var)?), bits(&base.forward(&x)?));
    let builder = Adapter::builder(DoftConfig::default(), &CPU)?;
    let layer = builder.wrap("layer", fast)?;
    let slow = builder.wrap("slow", base)?;
    let adapter = builder.finish()?;
    assert_eq!(bits(&layer.forward(&x)?), bits(&slow.forward(&x)?));
    let quick = adapter.with_mode(Mode::Eval, || layer.forward(&x))?;
    let exact = slow.forward(&x)?;
    assert_ne!(bits(&quick), bits(&exact));
    assert!(relative(&quick, &exact) < 0.01);
    Ok(())
}

#[test]
fn a_gguf_file_is_adapted_and_trained() -> candle_doft::Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let q = QTensor::quantize(&weight(64, 256)?, GgmlDType::Q4K)?;
    let bias = QTensor::quantize(&seeded(64, 2).to_dtype(DType::F32)?, GgmlDType::F32)?;
    let table = QTensor::quantize(&weight(50, 256)?, GgmlDType::Q8_0)?;
    let mut file = std::fs::File::create(&path).unwrap();
    let tensors = [
        ("blk.0.attn_q.weight", &q),
        ("blk.0.attn_q.bias", &bias),
        ("token_embd.weight", &table),
    ];
    gguf_file::write(&mut file, &[], &tensors)?;
    drop(file);

    let vb = QuantizedVarBuilder::from_gguf(&path, &CPU)?;
    assert!(vb.contains_tensor("token_embd.weight") && !vb.contains_tensor("output.weight"));
    let builder = Adapter::builder(DoftConfig::default(), &CPU)?;
    let embed = builder.embedding(50, 256, vb.pp("token_embd"))?;
    let query = builder.linear(256, 64, vb.pp("blk.0.attn_q"))?;
    let bare = builder.wrap("bare", QMatMul::from_qtensor(q)?)?;
    for (width, path, expected) in [
        (128, "blk.0.attn_q", "blk.0.attn_q.weight"),
        (256, "blk.1.attn_q", "blk.1.attn_q.bias"),
        (256, "blk.0.attn_q", "`blk.0.attn_q` is wrapped already"),
    ] {
        let error = builder.linear(width, 64, vb.pp(path)).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
    let adapter = builder.finish()?;
    let run = || -> candle_doft::Result<Tensor> {
        let x = embed.forward(&Tensor::new(&[1u32, 2, 49], &CPU)?)?;
        Ok((query.forward(&x)? + bare.forward(&x)?)?
            .sqr()?
            .mean_all()?)
    };
    let loss = run()?;
    let grads = loss.backward()?;
    assert_eq!(adapter.check_gradients(&grads)?.checked, 5);
    for var in adapter.vars() {
        let grad = grads.get(&var).expect("a gradient");
        var.set(&var.sub(&(grad * 0.5)?)?)?;
    }
    let (before, after) = (loss.to_scalar::<f32>()?, run()?.to_scalar::<f32>()?);
    assert!(after < before, "{after} after {before}");
    let report = adapter.report();
    assert_eq!(report.layers[0].path, "bare");
    assert_eq!(report.layers[1].shape, [64, 256]);
    Ok(())
}

#[test]
fn a_quantized_tensor_that_is_no_matrix_is_refused() -> Result<()> {
    let cube = QTensor::quantize(
        &Tensor::zeros((2, 3, 32), DType::F32, &CPU)?,
        GgmlDType::Q8_0,
    )?;
    assert_eq!(
        frozen::Linear::quantized(Arc::new(cube), None)
            .unwrap_err()
            .to_string(),
        "layer `the linear layer`: the weight has shape [2, 3, 32], expected 2 axes, none of them empty"
    );
    let bias = Tensor::zeros(3, DType::F32, &CPU)?;
    let matrix = quantized(40, 256, GgmlDType::Q4_0)?;
    assert_eq!(
        frozen::Linear::quantized(matrix, Some(bias))
            .unwrap_err()
            .to_string(),
        "layer `the linear layer`: the bias has shape [3], expected [40], one for each output"
    );
    Ok(())
}
