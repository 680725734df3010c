//! Strengths between base and adapter and beyond, and what a merge rounds.

use super::support::orthogonal_maps;
use super::support::tensors::{bits, relative};
use super::{adapter, base};
use candle_core::{DType, Tensor};
use candle_doft::merge::{Merge, Strength};
use candle_doft::{DoftConfig, Map};

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
