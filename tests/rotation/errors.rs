//! Errors say what was found, what was expected, and in which function.

use super::RotationMap;
use super::support::tensors::CPU;
use candle_core::{DType, Tensor};
use candle_doft::rotation::{cayley, cayley_neumann, clip, exponential, geodesic, rotation, skew};
use candle_doft::{DoftConfig, Error, Map, Result};

#[test]
fn errors_say_what_to_mend() -> Result<()> {
    let text = |result: Result<Tensor>| result.unwrap_err().to_string();
    let flat = Tensor::zeros((3, 3), DType::F32, &CPU)?;
    assert_eq!(
        text(cayley(&flat)),
        "`cayley`: the shape of `q` is [3, 3], expected square blocks (D, b, b) with b from 1"
    );
    let oblong = Tensor::zeros((1, 3, 2), DType::F32, &CPU)?;
    let half = Tensor::zeros((1, 2, 2), DType::F16, &CPU)?;
    let maps: [RotationMap; 4] = [
        cayley,
        exponential,
        |q| cayley_neumann(q, 5, 1),
        |q| clip(q, 1.),
    ];
    for map in maps {
        assert!(text(map(&oblong)).contains("is [1, 3, 2], expected square blocks"));
        let dtype = text(map(&half));
        assert!(
            dtype.ends_with("the dtype is F16, expected F32 or F64; convert it with `to_dtype`")
        );
        assert!(map(&Tensor::zeros((1, 0, 0), DType::F32, &CPU)?).is_err());
    }
    assert!(text(skew(&flat, 4)).contains("(D, 6) for blocks of size 4"));
    assert!(skew(&flat, 0).is_err());
    assert!(text(skew(&flat.to_dtype(DType::U8)?, 3)).contains("the dtype is U8"));
    let q = Tensor::zeros((1, 2, 2), DType::F32, &CPU)?;
    assert!(text(cayley_neumann(&q, 65, 1)).contains("`map.terms` is 65, expected at most 64"));
    assert!(text(cayley_neumann(&q, 5, 3)).contains("is 3, expected 1 or 2"));
    for norm in [0., -1., f64::NAN, f64::INFINITY] {
        assert!(text(clip(&q, norm)).contains("`max_norm`"));
    }
    let layout = DoftConfig::default().with_block_size(3).layout("x", 6)?;
    let wrong = rotation(&flat, &layout);
    assert_eq!(
        text(wrong),
        "`rotation`: the shape of `theta` is [3, 3], expected [2, 3]"
    );
    let theta = Tensor::zeros((2, 3), DType::F32, &CPU)?;
    let endless = geodesic(&theta, &layout, f64::NAN);
    assert_eq!(text(endless), "strength NaN: it is not a finite number");
    let series = DoftConfig::default()
        .with_block_size(3)
        .with_map(Map::SERIES);
    let refused = geodesic(&theta, &series.layout("x", 6)?, 0.5).unwrap_err();
    assert!(matches!(refused, Error::Strength { .. }));
    assert!(refused.to_string().contains("not orthogonal"));
    Ok(())
}
