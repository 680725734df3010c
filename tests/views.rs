//! A fresh adapter changes no bit of what its base answers to a view: transposed, cut, or of stride 0.

mod support;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Result, Tensor};
use candle_doft::adapter::Wrap;
use candle_doft::layer::Doft;
use candle_doft::{Adapter, DoftConfig, frozen};
use candle_nn::{Conv1d, Conv1dConfig, Conv2d, Conv2dConfig, Embedding, Linear, Module};
use std::sync::Arc;
use support::tensors::{CPU, seeded};

/// The bits of every value, whatever the dtype.
fn bits(x: &Tensor) -> Vec<u64> {
    let wide = x.to_dtype(DType::F64).and_then(|x| x.flatten_all());
    let values = wide.and_then(|x| x.to_vec1::<f64>()).unwrap();
    values.into_iter().map(f64::to_bits).collect()
}

fn made(shape: &[usize], dtype: DType) -> Result<Tensor> {
    seeded(shape, 3).to_dtype(dtype)
}

/// Views `(rows, width)`.
fn matrices(rows: usize, width: usize, dtype: DType) -> Result<Vec<(&'static str, Tensor)>> {
    let of = |shape: &[usize]| made(shape, dtype);
    Ok(vec![
        ("plain", of(&[rows, width])?),
        ("transposed", of(&[width, rows])?.t()?),
        (
            "cut, transposed",
            of(&[width, rows + 3])?.narrow(1, 1, rows)?.t()?,
        ),
        ("cut", of(&[rows, width + 5])?.narrow(1, 2, width)?),
        ("one row", of(&[1, width])?.broadcast_as((rows, width))?),
        ("one column", of(&[rows, 1])?.broadcast_as((rows, width))?),
        ("one value", of(&[1, 1])?.broadcast_as((rows, width))?),
        (
            "every other",
            of(&[rows, width, 2])?.narrow(2, 0, 1)?.squeeze(2)?,
        ),
        (
            "every other, transposed",
            of(&[width, rows, 2])?.narrow(2, 0, 1)?.squeeze(2)?.t()?,
        ),
    ])
}

/// Views of rank 3 and 4.
fn batches(rows: usize, width: usize, dtype: DType) -> Result<Vec<(&'static str, Tensor)>> {
    let of = |shape: &[usize]| made(shape, dtype);
    Ok(vec![
        ("features first", of(&[2, width, rows])?.transpose(1, 2)?),
        ("steps first", of(&[rows, 2, width])?.transpose(0, 1)?),
        (
            "one batch",
            of(&[1, rows, width])?.broadcast_as((3, rows, width))?,
        ),
        ("heads first", of(&[2, rows, 3, width])?.transpose(1, 2)?),
    ])
}

const SHAPES: [(usize, usize, usize); 12] = [
    (1, 64, 48),
    (3, 64, 48),
    (7, 96, 1),
    (40, 256, 130),
    (1, 512, 512),
    (2, 1024, 33),
    (1, 32, 1),
    (5, 32, 1),
    (16, 32, 16),
    (17, 32, 16),
    (1, 2, 3),
    (7, 3, 3),
];

/// The layer with a fresh adapter, and its base alone.
fn both<B: Wrap>(base: B, block: usize) -> candle_doft::Result<Doft<B::Frozen>> {
    let config = DoftConfig::default().with_block_size(block);
    let builder = Adapter::builder(config, &CPU)?;
    let layer = builder.wrap("layer", base)?;
    builder.finish()?;
    Ok(layer)
}

#[test]
fn a_linear_layer_answers_views_as_its_base_and_as_candle_does_their_copies()
-> candle_doft::Result<()> {
    for dtype in [DType::F32, DType::F64] {
        for (rows, width, out) in SHAPES {
            for weight in [
                seeded((out, width), 1).to_dtype(dtype)?,
                seeded((width, out), 1).to_dtype(dtype)?.t()?,
            ] {
                let base = Linear::new(weight, Some(seeded(out, 2).to_dtype(dtype)?));
                let layer = both(base.clone(), 32.min(width))?;
                let views = [matrices(rows, width, dtype)?, batches(rows, width, dtype)?];
                for (view, x) in views.concat() {
                    let what = format!("{dtype:?}, {rows} rows, {width} to {out}: {view}");
                    let y = bits(&layer.forward(&x)?);
                    assert_eq!(y, bits(&layer.base().forward(&x)?), "{what}");
                    let copy = base.forward(&x.force_contiguous()?)?;
                    assert_eq!(y, bits(&copy), "candle, {what}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn half_and_quantized_linear_layers_answer_views_as_their_base() -> candle_doft::Result<()> {
    for (rows, width, out) in SHAPES.into_iter().filter(|(_, width, _)| width % 32 == 0) {
        let weight = seeded((out, width), 1).to_dtype(DType::F32)?;
        let quantized = Arc::new(QTensor::quantize(&weight, GgmlDType::Q8_0)?);
        for (base, dtype) in [
            (
                frozen::Linear::quantized(quantized.clone(), None)?,
                DType::F32,
            ),
            (frozen::Linear::quantized(quantized, None)?, DType::F16),
            (
                frozen::Linear::new(weight.to_dtype(DType::BF16)?, None),
                DType::F32,
            ),
            (
                frozen::Linear::new(weight.to_dtype(DType::BF16)?, None),
                DType::BF16,
            ),
            (
                frozen::Linear::new(weight.to_dtype(DType::F16)?, None),
                DType::F16,
            ),
        ] {
            let layer = both(base, 32)?;
            let views = [matrices(rows, width, dtype)?, batches(rows, width, dtype)?];
            for (view, x) in views.concat() {
                let (y, base) = (layer.forward(&x)?, layer.base().forward(&x)?);
                assert_eq!(
                    bits(&y),
                    bits(&base),
                    "{view} of {dtype:?}, {rows}, {width} to {out}"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn convolutions_answer_views_as_their_base_and_as_candle_does() -> candle_doft::Result<()> {
    for dtype in [DType::F32, DType::F64, DType::F16] {
        let of = |shape: &[usize]| made(shape, dtype);
        let exact = |groups: usize| groups == 1 && dtype != DType::F16;
        for (c, out, k, h, w, groups) in [
            (4, 6, 3, 8, 7, 1),
            (4, 6, 3, 8, 7, 2),
            (32, 16, 1, 5, 5, 1),
            (8, 1, 2, 4, 4, 1),
        ] {
            let bias = Some(seeded(out, 2).to_dtype(dtype)?);
            let kernel = seeded((out, c / groups, k, k), 1).to_dtype(dtype)?;
            let base = Conv2d::new(
                kernel,
                bias.clone(),
                Conv2dConfig {
                    groups,
                    ..Default::default()
                },
            );
            let layer = both(base.clone(), c / groups * k * k)?;
            for (view, x) in [
                ("channels last", of(&[2, h, w, c])?.permute((0, 3, 1, 2))?),
                ("turned", of(&[2, c, w, h])?.transpose(2, 3)?),
                ("one image", of(&[1, c, h, w])?.broadcast_as((2, c, h, w))?),
                (
                    "one channel",
                    of(&[2, 1, h, w])?.broadcast_as((2, c, h, w))?,
                ),
                ("one value", of(&[1, 1, 1, 1])?.broadcast_as((2, c, h, w))?),
                (
                    "cut",
                    of(&[2, c, h + 2, w + 3])?
                        .narrow(2, 1, h)?
                        .narrow(3, 2, w)?,
                ),
            ] {
                let (y, frozen) = (layer.forward(&x)?, layer.base().forward(&x)?);
                assert_eq!(bits(&y), bits(&frozen), "{view}, {c} to {out}");
                if exact(groups) {
                    assert_eq!(
                        bits(&y),
                        bits(&base.forward(&x)?),
                        "candle, {view}, {c} to {out}"
                    );
                }
            }
            let kernel = seeded((out, c / groups, k), 1).to_dtype(dtype)?;
            let base = Conv1d::new(
                kernel,
                bias,
                Conv1dConfig {
                    groups,
                    ..Default::default()
                },
            );
            let layer = both(base.clone(), c / groups * k)?;
            for (view, x) in [
                ("channels last", of(&[2, h, c])?.transpose(1, 2)?),
                ("one text", of(&[1, c, h])?.broadcast_as((2, c, h))?),
                ("one channel", of(&[2, 1, h])?.broadcast_as((2, c, h))?),
                ("cut", of(&[2, c, h + 2])?.narrow(2, 1, h)?),
            ] {
                let (y, frozen) = (layer.forward(&x)?, layer.base().forward(&x)?);
                assert_eq!(bits(&y), bits(&frozen), "{view}, {c} to {out}");
                if exact(groups) {
                    assert_eq!(
                        bits(&y),
                        bits(&base.forward(&x)?),
                        "candle, {view}, {c} to {out}"
                    );
                }
            }
        }
    }
    Ok(())
}

#[test]
fn embeddings_answer_views_of_ids_and_tables_as_their_base() -> candle_doft::Result<()> {
    for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
        for (view, table) in matrices(11, 32, dtype)? {
            let base = Embedding::new(table, 32);
            let layer = both(base, 32)?;
            for ids in [
                Tensor::new(&[3u32, 0, 10, 3], &CPU)?,
                Tensor::new(&[[3u32, 0], [10, 3]], &CPU)?.t()?,
                Tensor::new(&[[3u32], [1]], &CPU)?.broadcast_as((2, 3))?,
            ] {
                let (y, base) = (layer.forward(&ids)?, layer.base().forward(&ids)?);
                assert_eq!(
                    bits(&y),
                    bits(&base),
                    "{view} of {dtype:?}, ids {:?}",
                    ids.dims()
                );
            }
        }
    }
    Ok(())
}
