//! Values and gradients of every map against its slow twin, and against golden blocks.

use super::support::{assert_close, central_difference, dot, naive, uneven};
use super::{entries, tensor};
use candle_core::{DType, Tensor, Var};
use candle_doft::rotation::{cayley, cayley_neumann, clip, exponential, rotation, skew};
use candle_doft::{DoftConfig, Result};

/// Value and gradient of `map(skew(theta))` against its twin, in f64 and f32. Tolerances are relative
/// to the largest value and the largest slope, or to 1.
fn meets_its_twin(
    name: &str,
    cases: &[(usize, usize, f64)],
    map: impl Fn(&Tensor) -> Result<Tensor>,
    twin: impl Fn(&[f64], usize) -> Vec<f64>,
) -> Result<()> {
    for &(blocks, b, scale) in cases {
        let n = entries(b);
        let theta: Vec<f64> = uneven(blocks * n).iter().map(|v| v * scale).collect();
        // Ones would be symmetric, and hide a backward that reads its upstream transposed.
        let upstream = uneven(blocks * b * b);
        let value = twin(&theta, b);
        let size = value.iter().fold(1f64, |m, v| m.max(v.abs()));
        let loss = |t: &[f64]| dot(&twin(t, b), &upstream);
        let slope = central_difference(loss, &theta, 1e-5);
        let steep = slope.iter().fold(1f64, |m, v| m.max(v.abs()));
        let name = format!("{name}, {blocks} of {b}, scale {scale}");
        // Rounding of theta alone turns by `scale` roundings of the dtype.
        let f32_value = 1e-6 * scale.max(1.);
        // Differences lose 1e-5^2 of the third derivative and the twin's rounding over 1e-5.
        for (dtype, value_tolerance, slope_tolerance) in [
            (DType::F64, 5e-13, 5e-8),
            (DType::F32, f32_value, 1e-5 * scale.max(1.)),
        ] {
            let var = Var::from_tensor(&tensor(&theta, (blocks, n)).to_dtype(dtype)?)?;
            let r = map(&skew(&var, b)?)?;
            assert_eq!((r.dims(), r.dtype()), (&[blocks, b, b][..], dtype));
            assert_close(&name, &r, &value, value_tolerance * size, 0.);
            let weights = tensor(&upstream, (blocks, b, b)).to_dtype(dtype)?;
            let grads = (&r * weights)?.sum_all()?.backward()?;
            let grad = grads.get(&var).expect("theta received no gradient");
            assert_close(
                &format!("gradient of {name}"),
                grad,
                &slope,
                slope_tolerance * steep,
                0.,
            );
        }
    }
    Ok(())
}

/// (blocks, size, scale): one entry, one plane, odd sizes, several blocks, tiny, near a half turn.
const CASES: [(usize, usize, f64); 10] = [
    (1, 1, 1.),
    (1, 2, 1.),
    (3, 2, 50.),
    (2, 3, 0.5),
    (2, 5, 1e-8),
    (1, 5, 50.),
    (3, 8, 0.3),
    (2, 8, 3.),
    (1, 32, 0.1),
    (1, 32, 1e-8),
];

#[test]
fn skew_meets_its_twin() -> Result<()> {
    meets_its_twin("skew", &CASES, |q| Ok(q.clone()), naive::skew)
}

#[test]
fn cayley_meets_its_twin() -> Result<()> {
    meets_its_twin("cayley", &CASES, cayley, naive::cayley)?;
    meets_its_twin("cayley", &[(1, 32, 50.)], cayley, naive::cayley)
}

#[test]
fn exponential_meets_its_twin() -> Result<()> {
    meets_its_twin("exponential", &CASES, exponential, naive::exponential)
}

#[test]
fn the_series_meets_its_twin_for_every_case_of_terms() -> Result<()> {
    let cases = [
        (1, 1, 1.),
        (2, 2, 1.),
        (2, 3, 0.5),
        (2, 5, 1e-8),
        (1, 8, 3.),
    ];
    for terms in 0..=7 {
        for last in [1, 2] {
            let name = format!("series of {terms} terms, last {last}");
            let map = |q: &Tensor| cayley_neumann(q, terms, last);
            let twin = |t: &[f64], b: usize| naive::cayley_neumann(t, b, terms, last);
            meets_its_twin(&name, &cases, map, twin)?;
        }
    }
    let map = |q: &Tensor| cayley_neumann(q, 5, 1);
    let twin = |t: &[f64], b: usize| naive::cayley_neumann(t, b, 5, 1);
    meets_its_twin("series", &[(2, 32, 0.1)], map, twin)
}

#[test]
fn the_cap_meets_its_twin_on_both_sides() -> Result<()> {
    for max_norm in [0.2, 1e9] {
        let map = |q: &Tensor| clip(q, max_norm);
        let twin = |t: &[f64], b: usize| naive::clip(t, b, max_norm);
        let cases = [
            (1, 1, 1.),
            (2, 2, 1.),
            (2, 3, 0.5),
            (2, 5, 3.),
            (1, 8, 50.),
            (1, 32, 0.1),
        ];
        meets_its_twin(&format!("cap {max_norm}"), &cases, map, twin)?;
    }
    Ok(())
}

#[test]
fn maps_give_the_golden_blocks() -> Result<()> {
    let q = skew(&tensor(&[0.5], (1, 1)), 2)?;
    for (name, r, p, s) in [
        ("cayley", cayley(&q)?, 0.6, 0.8),
        ("exponential", exponential(&q)?, 0.8775826, 0.4794255),
        ("2 terms", cayley_neumann(&q, 2, 1)?, 1., 1.),
        ("3 terms", cayley_neumann(&q, 3, 1)?, 0.5, 0.875),
        ("4 terms", cayley_neumann(&q, 4, 1)?, 0.5, 0.875),
        ("5 terms", cayley_neumann(&q, 5, 1)?, 0.5625, 0.75),
        ("7 terms", cayley_neumann(&q, 7, 1)?, 0.609375, 0.8125),
        ("3 terms, last 2", cayley_neumann(&q, 3, 2)?, 0.5, 1.),
        ("5 terms, last 2", cayley_neumann(&q, 5, 2)?, 0.625, 0.75),
    ] {
        assert_close(name, &r, &[p, s, -s, p], 1e-7, 0.);
    }
    let config = DoftConfig::default().with_block_size(3);
    let r = rotation(&tensor(&[0.1, 0.2, 0.3], (1, 3)), &config.layout("x", 3)?)?;
    let expected = [
        0.9877150, 0.0547525, 0.1463601, -0.0842365, 0.9754300, 0.2035696, -0.1316180, -0.2133976,
        0.9680590,
    ];
    assert_close("scaled 3x3", &r, &expected, 1e-7, 0.);
    let config = DoftConfig::default()
        .with_block_size(2)
        .with_scaled(false)
        .with_max_norm(0.95);
    let r = rotation(&tensor(&[2.], (1, 1)), &config.layout("x", 2)?)?;
    assert_close(
        "capped",
        &r,
        &[0.0512484, 0.9986859, -0.9986859, 0.0512484],
        1e-7,
        0.,
    );
    Ok(())
}
