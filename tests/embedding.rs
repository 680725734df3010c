//! What DOFT embeddings promise, over dense, half and quantized tables.

mod support;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Result, Tensor, safetensors};
use candle_doft::config::Rule;
use candle_doft::{Adapter, DoftConfig, DoftEmbedding, Magnitude, Pattern, frozen};
use candle_nn::{Embedding, Module, VarBuilder, VarMap};
use std::sync::Arc;
use support::golden::golden;
use support::slopes::check_slopes;
use support::tensors::{CPU, bits, disturb, disturb_all, named, relative, seeded, values};
use support::tolerance::{self, GOLDEN_WEIGHTS};

fn table(dtype: DType) -> Result<Tensor> {
    seeded((50, 32), 1).to_dtype(dtype)
}

fn wrapped(
    base: impl Into<frozen::Embedding>,
    config: &DoftConfig,
) -> Result<(DoftEmbedding, VarMap)> {
    let varmap = VarMap::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F32, &CPU).pp("embed");
    Ok((DoftEmbedding::new(base, config, vb)?, varmap))
}

fn with_magnitude(kind: Magnitude) -> DoftConfig {
    DoftConfig::default()
        .with_block_size(8)
        .with_embedding_magnitude(kind)
}

fn ids() -> Result<Tensor> {
    Tensor::new(&[[3u32, 0, 49], [3, 7, 3]], &CPU)
}

#[test]
fn a_fresh_layer_answers_what_candle_answers_bit_for_bit() -> Result<()> {
    for dtype in [DType::F32, DType::F64] {
        let base = Embedding::new(table(dtype)?, 32);
        for kind in [Magnitude::None, Magnitude::Log, Magnitude::Absolute] {
            let (layer, varmap) = wrapped(base.clone(), &with_magnitude(kind))?;
            for ids in [
                ids()?,
                ids()?.to_dtype(DType::I64)?,
                ids()?.to_dtype(DType::U8)?,
            ] {
                let expected = base.forward(&ids.to_dtype(DType::U32)?)?;
                let y = layer.forward(&ids)?;
                assert_eq!(y.dims(), [2, 3, 32]);
                assert_eq!(bits(&y), bits(&expected), "{dtype:?} {kind:?}");
            }
            let count = if kind == Magnitude::None { 1 } else { 2 };
            assert_eq!(varmap.all_vars().len(), count, "off unless asked for");
        }
    }
    Ok(())
}

#[test]
fn merged_equals_unmerged() -> Result<()> {
    for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
        for kind in [
            Magnitude::None,
            Magnitude::Log,
            Magnitude::Factor,
            Magnitude::Absolute,
        ] {
            for share in [false, true] {
                let config = with_magnitude(kind).with_block_share(share);
                let (layer, varmap) = wrapped(Embedding::new(table(dtype)?, 32), &config)?;
                disturb(&varmap, 0.4)?;
                let y = layer.forward(&ids()?)?;
                assert_eq!(y.dtype(), dtype);
                let merged = layer.merge()?;
                let off = relative(&merged.forward(&ids()?)?, &y);
                assert!(
                    off < tolerance::merged(dtype),
                    "{dtype:?} {kind:?}: {off:e}"
                );
                let norms = merged
                    .embeddings()
                    .to_dtype(DType::F64)?
                    .sqr()?
                    .sum(1)?
                    .sqrt()?;
                assert!(relative(&norms, &layer.magnitude()?) < tolerance::merged(dtype));
            }
        }
    }
    Ok(())
}

#[test]
fn gradients_are_slopes() -> Result<()> {
    for kind in [
        Magnitude::None,
        Magnitude::Log,
        Magnitude::Factor,
        Magnitude::Absolute,
    ] {
        for share in [false, true] {
            let config = with_magnitude(kind).with_block_share(share);
            let (layer, varmap) = wrapped(Embedding::new(table(DType::F64)?, 32), &config)?;
            disturb(&varmap, 0.3)?;
            let what = format!("{kind:?}, {share}");
            check_slopes(&what, &named(&varmap, []), || layer.forward(&ids()?))?;
        }
    }
    Ok(())
}

#[test]
fn a_quantized_table_is_the_table_it_expands_to() -> Result<()> {
    for dtype in [GgmlDType::Q4_0, GgmlDType::Q8_0, GgmlDType::F16] {
        let quantized = Arc::new(QTensor::quantize(&table(DType::F32)?, dtype)?);
        let dense = quantized.dequantize(&CPU)?;
        let config = with_magnitude(Magnitude::Log);
        let base = frozen::Embedding::quantized(quantized)?;
        let (ours, varmap) = wrapped(base, &config)?;
        let (theirs, twin) = wrapped(Embedding::new(dense, 32), &config)?;
        disturb(&varmap, 0.3)?;
        disturb(&twin, 0.3)?;
        let (a, b) = (ours.forward(&ids()?)?, theirs.forward(&ids()?)?);
        assert!(relative(&a, &b) < tolerance::merged(DType::F32));
        let (a, b) = (
            a.sqr()?.mean_all()?.backward()?,
            b.sqr()?.mean_all()?.backward()?,
        );
        let twin = twin.data().lock().unwrap();
        for (name, var) in varmap.data().lock().unwrap().iter() {
            let (a, b) = (a.get(var).expect(name), b.get(&twin[name]).expect(name));
            assert!(relative(a, b) < tolerance::merged(DType::F32), "{name}");
        }
    }
    Ok(())
}

#[test]
fn a_rule_turns_the_magnitude_on_and_a_file_remembers_it() -> candle_doft::Result<()> {
    let rule = Rule::new(Pattern::from("embed")).with_magnitude(Magnitude::Factor);
    let config = DoftConfig::default().with_block_size(8).with_rule(rule);
    let builder = Adapter::builder(config, &CPU)?;
    let base = || Embedding::new(table(DType::F32).unwrap(), 32);
    let layer = builder.wrap("embed", base())?;
    let adapter = builder.finish()?;
    let names: Vec<String> = adapter.named_vars().into_iter().map(|(n, _)| n).collect();
    assert_eq!(
        names,
        ["embed.oft_embedding_R.weight", "embed.dora_multiplier"]
    );
    disturb_all(adapter.vars(), 0.1)?;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("adapter.safetensors");
    adapter.save(&file)?;
    let again_builder = Adapter::load(&file, &CPU)?;
    let loaded = again_builder.wrap("embed", base())?;
    again_builder.finish()?;
    let off = relative(&loaded.forward(&ids()?)?, &layer.forward(&ids()?)?);
    // Factors above 0 are stored as logarithms.
    assert!(off < 1e-6, "{off:e}");
    Ok(())
}

#[test]
fn an_embedding_of_peft_gives_its_table() -> candle_doft::Result<()> {
    let folder = golden("peft/embedding");
    let base = safetensors::load(folder.join("base.safetensors"), &CPU)?;
    let expected = safetensors::load(folder.join("expected.safetensors"), &CPU)?;
    let builder = Adapter::load(&folder, &CPU)?;
    let (name, table) = base
        .iter()
        .find(|(name, _)| name.contains("embed"))
        .expect("a table");
    let path = name.strip_suffix(".weight").unwrap();
    let layer = builder.wrap(path, Embedding::new(table.clone(), table.dim(1)?))?;
    builder.finish()?;
    let (_, merged) = expected
        .iter()
        .find(|(name, tensor)| name.contains("embed") && tensor.dims() == table.dims())
        .expect("a merged table");
    let off = relative(&layer.effective_weight()?, merged);
    assert!(off <= GOLDEN_WEIGHTS, "{off:e}");
    let ids = Tensor::arange(0u32, table.dim(0)? as u32, &CPU)?;
    assert!(relative(&layer.forward(&ids)?, merged) <= GOLDEN_WEIGHTS);
    Ok(())
}

#[test]
fn wrong_ids_are_named_with_their_layer() -> Result<()> {
    let (layer, _) = wrapped(
        Embedding::new(table(DType::F32)?, 32),
        &DoftConfig::default(),
    )?;
    let error = |ids: Tensor| layer.forward(&ids).unwrap_err().to_string();
    assert_eq!(
        error(Tensor::new(&[1f32], &CPU)?),
        "layer `embed`: the tensor of ids has dtype F32, expected u8, u32 or i64"
    );
    assert_eq!(
        error(Tensor::new(&[3u32, 50], &CPU)?),
        "`Embedding::forward`: an id is 50 in layer `embed`, expected below 50, the number of rows"
    );
    assert_eq!(
        error(Tensor::new(&[-1i64], &CPU)?),
        "`Embedding::forward`: an id is -1 in layer `embed`, expected below 50, the number of rows"
    );
    let none = Tensor::zeros((2, 0), DType::U32, &CPU)?;
    assert_eq!(layer.forward(&none)?.dims(), [2, 0, 32]);
    assert_eq!(layer.forward(&Tensor::new(3u32, &CPU)?)?.dims(), [32]);
    assert!(values(&layer.forward(&Tensor::new(&[0u32], &CPU)?)?).len() == 32);
    Ok(())
}

#[test]
fn a_table_that_is_no_matrix_is_refused() -> Result<()> {
    for shape in [&[32][..], &[2, 3, 32], &[0, 32]] {
        let table = frozen::Embedding::new(Tensor::zeros(shape, DType::F32, &CPU)?);
        let id = Tensor::new(0u32, &CPU)?;
        let error = table.forward(&id).unwrap_err().to_string();
        let expected = format!(
            "layer `the embedding`: the weight has shape {shape:?}, expected 2 axes, none of them empty"
        );
        assert_eq!(error, expected);
        assert!(wrapped(table, &DoftConfig::default()).is_err());
    }
    Ok(())
}

/// Of any strides: transposed, cut from a wider one, expanded from one column.
#[test]
fn a_strided_table_is_the_table_that_it_shows() -> Result<()> {
    let transposed = seeded((32, 50), 1).t()?;
    let cut = seeded((50, 40), 1).narrow(1, 5, 32)?;
    let expanded = seeded((50, 1), 1).broadcast_as((50, 32))?;
    for table in [transposed, cut, expanded] {
        let (ours, varmap) = wrapped(Embedding::new(table.clone(), 32), &DoftConfig::default())?;
        let copy = table.force_contiguous()?;
        let (twin, other) = wrapped(Embedding::new(copy, 32), &DoftConfig::default())?;
        let rows = |layer: &DoftEmbedding| layer.base().forward(&ids()?);
        assert_eq!(bits(&rows(&ours)?), bits(&rows(&twin)?));
        disturb(&varmap, 0.3)?;
        disturb(&other, 0.3)?;
        assert_eq!(bits(&ours.forward(&ids()?)?), bits(&twin.forward(&ids()?)?));
    }
    Ok(())
}

#[test]
fn dropout_turns_blocks_off_and_repeats_by_seed() -> Result<()> {
    let config = DoftConfig::default().with_block_size(4).with_dropout(0.5);
    let make = || -> Result<DoftEmbedding> {
        let (layer, varmap) = wrapped(Embedding::new(table(DType::F32)?, 32), &config)?;
        disturb(&varmap, 0.3)?;
        Ok(layer)
    };
    let (first, second) = (make()?, make()?);
    let y = first.forward(&ids()?)?;
    assert_eq!(bits(&y), bits(&second.forward(&ids()?)?));
    // Where a block was dropped, its columns are those of the table.
    let plain = first.base().forward(&ids()?)?;
    let same = |d: usize| {
        let part = |t: &Tensor| bits(&t.narrow(2, 4 * d, 4).unwrap().contiguous().unwrap());
        part(&y) == part(&plain)
    };
    let dropped = (0..8).filter(|d| same(*d)).count();
    assert!(dropped > 0 && dropped < 8, "{dropped} of 8");
    Ok(())
}
