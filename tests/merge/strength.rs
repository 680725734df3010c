//! Strengths between base and adapter and beyond, and what a merge rounds.

use super::support::orthogonal_maps;
use super::support::tensors::{bits, relative};
use super::{adapter, base};
use candle_core::{DType, Tensor};
use candle_doft::merge::{Merge, Strength};
use candle_doft::{DoftConfig, Magnitude, Map};

#[test]
fn strength_goes_from_the_base_to_the_adapter_and_back() -> candle_doft::Result<()> {
    for map in orthogonal_maps() {
        let adapter = adapter(DoftConfig::default().with_map(map), 0.5)?;
        let weight = base(DType::F64)?["a.weight"].clone();
        let at = |strength| -> candle_doft::Result<Tensor> {
            let merge = Merge::new().with_adapter(&adapter, strength)?;
            Ok(merge
                .weight("a", &weight, false)?
                .expect("an adapted layer"))
        };
        let full = at(Strength::linear(1.))?;
        assert_eq!(bits(&at(Strength::linear(0.))?), bits(&weight));
        assert_eq!(bits(&at(Strength::geodesic(0.))?), bits(&weight));
        assert!(relative(&at(Strength::geodesic(1.))?, &full) < 2e-14);
        let half = ((&weight + &full)? / 2.)?;
        assert!(relative(&at(Strength::linear(0.5))?, &half) < 2e-14);
        // Twice half the way is the way, and back again is the start.
        let merge = Merge::new()
            .with_adapter(&adapter, Strength::geodesic(0.5))?
            .with_adapter(&adapter, Strength::geodesic(0.5))?;
        let twice = merge
            .weight("a", &weight, false)?
            .expect("an adapted layer");
        assert!(relative(&twice, &full) < 2e-14);
        let merge = Merge::new()
            .with_adapter(&adapter, Strength::linear(1.))?
            .with_adapter(&adapter, Strength::geodesic(-1.))?;
        let undone = merge
            .weight("a", &weight, false)?
            .expect("an adapted layer");
        assert!(relative(&undone, &weight) < 2e-14);
    }
    let error = |config: DoftConfig, strength| {
        let adapter = adapter(config, 0.5).unwrap();
        Merge::new()
            .with_adapter(&adapter, strength)
            .unwrap_err()
            .to_string()
    };
    assert_eq!(
        error(
            DoftConfig::default().with_map(Map::SERIES),
            Strength::geodesic(0.5)
        ),
        "strength 0.5: layer `a` has the series for its map, which is not orthogonal; take the \
         linear strength"
    );
    assert_eq!(
        error(DoftConfig::default(), Strength::linear(f64::NAN)),
        "strength NaN: it is not a finite number"
    );
    Ok(())
}

#[test]
fn half_precision_bases_are_computed_in_f32_and_rounded_once() -> candle_doft::Result<()> {
    let adapter = adapter(DoftConfig::default(), 0.5)?;
    let merge = Merge::new().with_adapter(&adapter, Strength::default())?;
    for dtype in [DType::F16, DType::BF16] {
        let weight = base(dtype)?["a.weight"].clone();
        let merged = merge
            .weight("a", &weight, false)?
            .expect("an adapted layer");
        assert_eq!(merged.dtype(), dtype);
        let wide = merge
            .weight("a", &weight.to_dtype(DType::F32)?, false)?
            .expect("the same");
        let rounded = wide.to_dtype(dtype)?.to_dtype(DType::F32)?;
        assert_eq!(bits(&merged.to_dtype(DType::F32)?), bits(&rounded));
    }
    Ok(())
}

/// Each step on the way would round for itself: to the adapter, a part of the way back, to the next one.
#[test]
fn steps_of_a_merge_over_a_half_base_are_rounded_once() -> candle_doft::Result<()> {
    let (first, second) = (
        adapter(DoftConfig::default(), 0.5)?,
        adapter(DoftConfig::default(), 0.3)?,
    );
    for strengths in [
        vec![Strength::linear(0.7)],
        vec![Strength::linear(-1.3)],
        vec![Strength::linear(1.), Strength::linear(1.)],
        vec![Strength::geodesic(0.5), Strength::linear(0.2)],
        vec![Strength::linear(0.), Strength::geodesic(1.)],
        vec![Strength::linear(0.), Strength::linear(0.)],
    ] {
        let mut merge = Merge::new();
        for (adapter, strength) in [&first, &second].into_iter().zip(&strengths) {
            merge = merge.with_adapter(adapter, *strength)?;
        }
        for dtype in [DType::F16, DType::BF16] {
            for name in ["a", "b"] {
                let weight = base(dtype)?[&format!("{name}.weight")].clone();
                let merged = |weight: &Tensor| -> candle_doft::Result<Tensor> {
                    let merged = merge.weight(name, weight, false)?;
                    Ok(merged.expect("an adapted layer"))
                };
                let half = merged(&weight)?;
                assert_eq!(half.dtype(), dtype);
                let wide = merged(&weight.to_dtype(DType::F32)?)?.to_dtype(dtype)?;
                let (half, wide) = (half.to_dtype(DType::F32)?, wide.to_dtype(DType::F32)?);
                assert_eq!(bits(&half), bits(&wide), "{strengths:?}, {dtype:?}, {name}");
            }
        }
    }
    // What only the last rounding takes out of the range.
    let merge = Merge::new().with_adapter(&first, Strength::linear(3e5))?;
    let weight = base(DType::F16)?["a.weight"].clone();
    let error = merge.weight("a", &weight, false).unwrap_err().to_string();
    assert!(error.contains("the merged `a` is not finite"), "{error}");
    Ok(())
}

/// A row whose norm is above f32: a magnitude relative to it would make it 0.
#[test]
fn a_base_whose_row_norm_is_out_of_range_is_refused_by_name() -> candle_doft::Result<()> {
    let config = DoftConfig::default().with_magnitude(Magnitude::Absolute);
    let merge = Merge::new().with_adapter(&adapter(config, 0.1)?, Strength::default())?;
    let huge = (base(DType::F32)?["a.weight"].ones_like()? * 2e38)?;
    let error = merge.weight("a", &huge, true).unwrap_err().to_string();
    assert!(
        error.contains("layer `a`: row 0 of its base weight has norm inf"),
        "{error}"
    );
    Ok(())
}
