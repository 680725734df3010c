//! What a DOFT linear layer promises: it starts at its base, merges to what it computes, keeps the
//! norms it scales, and refuses what it cannot run.

mod support;

use candle_core::{DType, Result, Tensor, Var};
use candle_doft::{Adapter, DoftConfig, DoftLinear, Magnitude, Mode, frozen};
use candle_nn::{Linear, Module, VarBuilder};
use support::MAPS;
use support::tensors::{
    CPU, bits, disturb, disturb_all, linear, relative, seeded, values, wrapped,
};
use support::tolerance;

#[test]
fn a_fresh_layer_answers_what_candle_answers_bit_for_bit() -> Result<()> {
    for dtype in [DType::F32, DType::F64] {
        for (out, width, bias) in [
            (48, 64, true),
            (7, 96, false),
            (1, 32, true),
            (300, 512, true),
        ] {
            let base = linear(out, width, bias, dtype)?;
            for magnitude in [Magnitude::Log, Magnitude::Factor, Magnitude::Absolute] {
                let config = DoftConfig::default().with_magnitude(magnitude);
                let (layer, _) = wrapped(&base, &config)?;
                for shape in [
                    vec![5, width],
                    vec![1, width],
                    vec![2, 3, width],
                    vec![2, 1, 3, width],
                ] {
                    let x = seeded(shape.as_slice(), 3).to_dtype(dtype)?;
                    let (ours, theirs) = (layer.forward(&x)?, base.forward(&x)?);
                    assert_eq!(ours.dims(), theirs.dims());
                    assert_eq!(
                        bits(&ours),
                        bits(&theirs),
                        "{dtype:?} {magnitude:?} {shape:?}"
                    );
                }
            }
        }
    }
    Ok(())
}

#[test]
fn strided_and_offset_input_gives_the_same_result() -> Result<()> {
    let base = linear(24, 64, true, DType::F32)?;
    let (layer, varmap) = wrapped(&base, &DoftConfig::default().with_block_size(16))?;
    disturb(&varmap, 0.3)?;
    let x = seeded((64, 10), 4).to_dtype(DType::F32)?.t()?;
    let narrowed = seeded((10, 80), 4).to_dtype(DType::F32)?.narrow(1, 9, 64)?;
    let broadcast = seeded((1, 64), 4)
        .to_dtype(DType::F32)?
        .broadcast_as((10, 64))?;
    let permuted = seeded((3, 64, 2), 4)
        .to_dtype(DType::F32)?
        .permute((2, 0, 1))?;
    for x in [x, narrowed, broadcast, permuted] {
        let copy = x.force_contiguous()?;
        assert_eq!(bits(&layer.forward(&x)?), bits(&layer.forward(&copy)?));
    }
    Ok(())
}

#[test]
fn an_empty_batch_gives_an_empty_answer_and_gradients_of_zero() -> Result<()> {
    let (layer, varmap) = wrapped(&linear(24, 64, true, DType::F32)?, &DoftConfig::default())?;
    for shape in [&[0, 64][..], &[0, 3, 64], &[2, 0, 64]] {
        let x = Var::from_tensor(&Tensor::zeros(shape, DType::F32, &CPU)?)?;
        let y = layer.forward(&x)?;
        assert_eq!(y.dims()[..shape.len() - 1], shape[..shape.len() - 1]);
        assert_eq!(y.dims().last(), Some(&24));
        let grads = y.sum_all()?.backward()?;
        assert_eq!(grads.get(&x).expect("dx").dims(), shape);
        for var in varmap.all_vars() {
            let grad = values(grads.get(&var).expect("a gradient"));
            assert!(grad.iter().all(|g| *g == 0.));
        }
    }
    Ok(())
}

#[test]
fn a_nan_spoils_its_own_row_alone() -> Result<()> {
    let (layer, varmap) = wrapped(&linear(24, 64, true, DType::F32)?, &DoftConfig::default())?;
    disturb(&varmap, 0.3)?;
    let x = seeded((5, 64), 3).to_dtype(DType::F32)?;
    let mut rows = x.to_vec2::<f32>()?;
    rows[2][7] = f32::NAN;
    let (whole, spoilt) = (
        layer.forward(&x)?,
        layer.forward(&Tensor::new(rows, &CPU)?)?,
    );
    for row in 0..5 {
        let spoilt = spoilt.get(row)?;
        match row {
            2 => assert!(values(&spoilt).iter().all(|v| v.is_nan())),
            _ => assert_eq!(bits(&spoilt), bits(&whole.get(row)?)),
        }
    }
    Ok(())
}

#[test]
fn merged_equals_unmerged_and_row_norms_equal_the_magnitude() -> Result<()> {
    let kinds = [
        Magnitude::Log,
        Magnitude::Factor,
        Magnitude::Absolute,
        Magnitude::None,
    ];
    for dtype in [DType::F32, DType::F64] {
        let tolerance = tolerance::merged(dtype);
        for map in MAPS {
            for magnitude in kinds {
                for (share, max_norm) in [(false, None), (true, None), (false, Some(0.2))] {
                    let base = linear(40, 96, true, dtype)?;
                    let config = DoftConfig::default()
                        .with_map(map)
                        .with_magnitude(magnitude)
                        .with_block_share(share)
                        .with_max_norm(max_norm);
                    let (layer, varmap) = wrapped(&base, &config)?;
                    disturb(&varmap, 0.4)?;
                    let x = seeded((17, 96), 5).to_dtype(dtype)?;
                    let merged = layer.merge()?;
                    let off = relative(&merged.forward(&x)?, &layer.forward(&x)?);
                    assert!(off < tolerance, "{dtype:?} {config:?}: {off:e}");
                    if map.is_orthogonal() {
                        let norms = merged.weight().sqr()?.sum(1)?.sqrt()?;
                        let off = relative(&norms, &layer.magnitude()?);
                        assert!(off < tolerance, "norms, {dtype:?} {config:?}: {off:e}");
                    }
                    assert!(
                        relative(merged.weight(), base.weight()) > 1e-2,
                        "nothing moved"
                    );
                }
            }
        }
    }
    Ok(())
}

#[test]
fn half_precision_merges_within_its_rounding() -> Result<()> {
    for dtype in [DType::F16, DType::BF16] {
        let base = linear(40, 96, true, dtype)?;
        let (layer, varmap) = wrapped(&base, &DoftConfig::default())?;
        let x = seeded((17, 96), 5).to_dtype(dtype)?;
        assert!(relative(&layer.forward(&x)?, &base.forward(&x)?) < tolerance::merged(dtype));
        disturb(&varmap, 0.4)?;
        let off = relative(&layer.merge()?.forward(&x)?, &layer.forward(&x)?);
        assert!(off < tolerance::merged(dtype), "{dtype:?}: {off:e}");
    }
    Ok(())
}

#[test]
fn a_dead_row_keeps_ratio_one_and_gets_no_gradient() -> Result<()> {
    for magnitude in [Magnitude::Log, Magnitude::Factor, Magnitude::Absolute] {
        let mut rows = seeded((4, 32), 6).to_vec2::<f64>()?;
        rows[2] = vec![0.; 32];
        let weight = Tensor::new(rows, &CPU)?;
        let bias = seeded(4, 7);
        let config = DoftConfig::default().with_magnitude(magnitude);
        let (layer, varmap) = wrapped(&Linear::new(weight, Some(bias.clone())), &config)?;
        disturb(&varmap, 0.5)?;
        let x = seeded((3, 32), 8);
        let y = layer.forward(&x)?;
        assert_eq!(
            y.narrow(1, 2, 1)?.flatten_all()?.to_vec1::<f64>()?,
            [bias.to_vec1::<f64>()?[2]; 3]
        );
        assert_eq!(layer.magnitude()?.to_vec1::<f64>()?[2], 0.);
        let grads = (y * seeded((3, 4), 9))?.sum_all()?.backward()?;
        for (name, var) in varmap.data().lock().unwrap().iter() {
            let grad = grads
                .get(var)
                .expect(name)
                .flatten_all()?
                .to_vec1::<f64>()?;
            assert!(grad.iter().all(|g| g.is_finite()), "{name}");
            if !name.contains("oft_R") {
                assert_eq!(grad[2], 0., "{name}");
                assert!(grad[1] != 0., "{name}");
            }
        }
    }
    Ok(())
}

#[test]
fn merging_means_the_adapter_in_every_mode() -> Result<()> {
    let base = linear(24, 64, true, DType::F32)?;
    let builder = Adapter::builder(DoftConfig::default(), &CPU)?;
    let layer = builder.wrap("layer", base.clone())?;
    let adapter = builder.finish()?;
    disturb_all(adapter.vars(), 0.3)?;
    let x = seeded((5, 64), 3).to_dtype(DType::F32)?;
    let weight = bits(&layer.effective_weight()?);
    assert_ne!(weight, bits(base.weight()));
    for mode in [Mode::Train, Mode::Eval, Mode::Off] {
        adapter.set_mode(mode)?;
        assert_eq!(bits(&layer.effective_weight()?), weight, "{mode:?}");
        assert_eq!(bits(layer.merge()?.weight()), weight, "{mode:?}");
        let vb = VarBuilder::from_tensors(
            [("layer.weight".to_string(), base.weight().clone())].into(),
            DType::F32,
            &CPU,
        );
        let merged = adapter.merged(vb, |vb| vb.get((24, 64), "layer.weight"))?;
        assert_eq!(bits(&merged), weight, "{mode:?}");
    }
    assert_eq!(bits(&layer.forward(&x)?), bits(&base.forward(&x)?));
    assert_eq!(bits(&layer.clone().forward(&x)?), bits(&base.forward(&x)?));
    Ok(())
}

#[test]
fn evaluation_is_constant_and_outside_the_graph() -> Result<()> {
    let builder = Adapter::builder(DoftConfig::default(), &CPU)?;
    let layer = builder.wrap("layer", linear(24, 64, true, DType::F32)?)?;
    let adapter = builder.finish()?;
    disturb_all(adapter.vars(), 0.3)?;
    let x = seeded((5, 64), 3).to_dtype(DType::F32)?;
    let before = bits(&layer.forward(&x)?);
    assert!(layer.forward(&x)?.track_op());
    adapter.set_mode(Mode::Eval)?;
    assert_eq!(bits(&layer.forward(&x)?), before);
    assert!(!layer.forward(&x)?.track_op());
    disturb_all(adapter.vars(), 0.3)?;
    assert_eq!(bits(&layer.forward(&x)?), before);
    // The input's gradient still passes.
    let var = Var::from_tensor(&x)?;
    assert!(
        layer
            .forward(&var)?
            .sum_all()?
            .backward()?
            .get(&var)
            .is_some()
    );
    adapter.set_mode(Mode::Eval)?;
    assert_ne!(bits(&layer.forward(&x)?), before);
    Ok(())
}

#[test]
fn dropout_drops_whole_blocks_repeats_by_seed_and_ends_with_training() -> Result<()> {
    let base = linear(24, 64, false, DType::F64)?;
    let config = DoftConfig::default()
        .with_block_size(4)
        .with_dropout(0.5)
        .with_seed(7);
    let (first, varmap) = wrapped(&base, &config)?;
    let (second, other) = wrapped(&base, &config)?;
    disturb(&varmap, 0.3)?;
    disturb(&other, 0.3)?;
    let x = seeded((5, 64), 3);
    let run = |layer: &DoftLinear| bits(&layer.forward(&x).unwrap());
    let (a, b) = (run(&first), run(&first));
    assert_ne!(a, b, "each pass draws a mask of its own");
    assert_eq!((run(&second), run(&second)), (a, b));

    // Rows of the identity show R itself, in training: each block is R_d or the identity.
    let eye = Linear::new(Tensor::eye(64, DType::F64, &CPU)?, None);
    let config = config.with_magnitude(Magnitude::None);
    let builder = Adapter::builder(config, &CPU)?;
    let layer = builder.wrap("layer", eye)?;
    let adapter = builder.finish()?;
    disturb_all(adapter.vars(), 0.3)?;
    let r = layer.rotation()?;
    let acted = layer.forward(&Tensor::eye(64, DType::F64, &CPU)?)?;
    let (mut kept, mut dropped) = (0, 0);
    for d in 0..16 {
        let block = acted.narrow(0, 4 * d, 4)?.narrow(1, 4 * d, 4)?;
        if relative(&block, &r.get(d)?) < 1e-12 {
            kept += 1;
        } else {
            assert_eq!(bits(&block), bits(&Tensor::eye(4, DType::F64, &CPU)?));
            dropped += 1;
        }
    }
    assert!(kept > 0 && dropped > 0 && kept + dropped == 16);
    let whole = layer.merge()?.forward(&x)?;
    let y = adapter.with_mode(Mode::Eval, || layer.forward(&x))?;
    assert!(relative(&y, &whole) < 1e-12);
    Ok(())
}

#[test]
fn a_wrong_input_is_named_with_its_layer() -> Result<()> {
    let base = linear(24, 64, true, DType::F32)?;
    let (layer, _) = wrapped(&base, &DoftConfig::default())?;
    let error = |x: Tensor| layer.forward(&x).unwrap_err().to_string();
    assert_eq!(
        error(Tensor::zeros((2, 63), DType::F32, &CPU)?),
        "layer `layer`: the input has shape [2, 63], expected (.., 64) of rank 2 or more"
    );
    assert_eq!(
        error(Tensor::zeros(64, DType::F32, &CPU)?),
        "layer `layer`: the input has shape [64], expected (.., 64) of rank 2 or more"
    );
    assert_eq!(
        error(Tensor::zeros((2, 64), DType::F64, &CPU)?),
        "layer `layer`: the input has dtype F64, expected F32, the dtype of the weight"
    );
    assert_eq!(
        error(Tensor::zeros((2, 64), DType::U32, &CPU)?),
        "layer `layer`: the input has dtype U32, expected F32, the dtype of the weight"
    );
    Ok(())
}

#[test]
fn a_wrong_weight_is_refused_when_the_layer_is_made() -> Result<()> {
    let error = |weight: Tensor, config: &DoftConfig| {
        let vb = VarBuilder::zeros(DType::F32, &CPU).pp("a.b");
        let base = Linear::new(weight, None);
        DoftLinear::new(base, config, vb).unwrap_err().to_string()
    };
    let config = DoftConfig::default();
    assert_eq!(
        error(Tensor::zeros((2, 3, 4), DType::F32, &CPU)?, &config),
        "layer `a.b`: the weight has shape [2, 3, 4], expected 2 axes, none of them empty"
    );
    assert_eq!(
        error(Tensor::zeros((0, 64), DType::F32, &CPU)?, &config),
        "layer `a.b`: the weight has shape [0, 64], expected 2 axes, none of them empty"
    );
    assert_eq!(
        error(Tensor::zeros((4, 64), DType::I64, &CPU)?, &config),
        "layer `a.b`: the weight has dtype I64, expected f32, f64, f16 or bf16"
    );
    assert_eq!(
        error(
            Tensor::zeros((4, 7), DType::F32, &CPU)?,
            &config.with_block_size(4)
        ),
        "layer `a.b`: the divisor of its width 7 nearest to block size 4 is 1, which rotates \
         nothing; choose another block size for it or exclude it"
    );
    Ok(())
}

/// candle's own layer would spread a bias of one number, or fail; a kernel would add it to one output.
#[test]
fn a_bias_that_does_not_fit_is_refused() -> Result<()> {
    let x = Tensor::zeros((2, 64), DType::F32, &CPU)?;
    for shape in [&[1][..], &[23], &[25], &[1, 24]] {
        let bias = Tensor::zeros(shape, DType::F32, &CPU)?;
        let weight = linear(24, 64, false, DType::F32)?.weight().clone();
        let base = Linear::new(weight, Some(bias));
        let fault = format!("the bias has shape {shape:?}, expected [24], one for each output");
        let error = |error: candle_core::Error| error.to_string();
        assert_eq!(
            error(
                wrapped(&base, &DoftConfig::default())
                    .err()
                    .expect("an error")
            ),
            format!("layer `layer`: {fault}")
        );
        assert_eq!(
            error(frozen::Linear::from(base).forward(&x).unwrap_err()),
            format!("layer `the linear layer`: {fault}")
        );
    }
    Ok(())
}

#[test]
fn types_can_be_shared_between_threads() {
    use candle_doft::{Adapter, DoftConv1d, DoftConv2d, DoftEmbedding, file, frozen, merge, train};

    fn shared<T: std::fmt::Debug + Send + Sync>() {}
    fn cloned<T: Clone + std::fmt::Debug + Send + Sync>() {}
    cloned::<(Adapter, DoftConfig, candle_doft::params::Params)>();
    cloned::<(DoftLinear, DoftConv1d, DoftConv2d, DoftEmbedding)>();
    cloned::<(
        frozen::Linear,
        frozen::Conv1d,
        frozen::Conv2d,
        frozen::Embedding,
    )>();
    cloned::<(
        frozen::RmsNorm,
        frozen::LayerNorm,
        frozen::QuantizedVarBuilder,
    )>();
    cloned::<(
        file::LoadOptions,
        merge::Merge,
        merge::Inspection,
        train::Checkpoint,
    )>();
    shared::<(candle_doft::Error, train::AdamW, train::Gradients)>();
}
