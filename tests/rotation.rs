//! The maps from packed parameters to rotations: values, gradients and invariants.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot go on fails"
)]

mod support;

use candle_core::{DType, Device, Tensor, Var};
use candle_doft::rng::SplitMix64;
use candle_doft::rotation::{
    angles, cayley, cayley_neumann, clip, exponential, geodesic, naive, orthogonality_error,
    rotation, skew,
};
use candle_doft::{DoftConfig, Error, Map, Result};
use proptest::prelude::*;
use support::{assert_close, central_difference, dot, uneven};

const CPU: Device = Device::Cpu;

type RotationMap = fn(&Tensor) -> Result<Tensor>;

fn tensor(values: &[f64], shape: impl Into<candle_core::Shape>) -> Tensor {
    Tensor::from_slice(values, shape, &CPU).unwrap()
}

fn entries(b: usize) -> usize {
    b * (b - 1) / 2
}

fn bits(x: &Tensor) -> Vec<u64> {
    let x = x.to_dtype(DType::F64).unwrap().flatten_all().unwrap();
    x.to_vec1::<f64>()
        .unwrap()
        .iter()
        .map(|v| v.to_bits())
        .collect()
}

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
        let f32_value = 1e-5 * scale.max(1.);
        // Differences lose 1e-5^2 of the third derivative and the twin's rounding over 1e-5.
        for (dtype, value_tolerance, slope_tolerance) in [
            (DType::F64, 1e-11, 2e-7),
            (DType::F32, f32_value, 1e-4 * scale.max(1.)),
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

/// Packed rows that are hard to keep orthogonal, each with `||Q||` of about `norm`.
fn hard(b: usize, norm: f64) -> Vec<(&'static str, Tensor)> {
    let mut rng = SplitMix64::new(b as u64);
    let mut normal = |n: usize| -> Vec<f64> { (0..n).map(|_| rng.normal()).collect() };
    let full = |f: &dyn Fn(usize, usize) -> f64| -> Vec<f64> {
        (0..b)
            .flat_map(|i| (i + 1..b).map(move |j| (i, j)))
            .map(|(i, j)| f(i, j))
            .collect()
    };
    let random = normal(entries(b));
    let small = normal(entries(b));
    let (u, v) = (normal(b), normal(b));
    let arrow = normal(b);
    let families = [
        ("random", random),
        (
            "one plane",
            full(&|i, j| {
                if (i, j) == (0, b - 1) {
                    1.
                } else {
                    1e-3 * small[i]
                }
            }),
        ),
        ("rank 2", full(&|i, j| u[i] * v[j] - v[i] * u[j])),
        ("arrow", full(&|i, j| if i == 0 { arrow[j] } else { 0. })),
        ("ones", full(&|_, _| 1.)),
    ];
    let scaled = |theta: Vec<f64>| {
        // The cap finds the norm: a tiny one scales down to exactly that.
        let tiny = clip(&skew(&tensor(&theta, (1, entries(b))), b).unwrap(), 1e-9).unwrap();
        (tiny * (norm / 1e-9)).unwrap()
    };
    families
        .into_iter()
        .map(|(name, theta)| (name, scaled(theta)))
        .collect()
}

#[test]
fn hard_blocks_stay_orthogonal_up_to_norm_100() -> Result<()> {
    for b in [2, 32, 256] {
        for (name, q) in hard(b, 100.) {
            for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F64, 1e-12)] {
                let q = q.to_dtype(dtype)?;
                for (map, r) in [("cayley", cayley(&q)?), ("exponential", exponential(&q)?)] {
                    let off = orthogonality_error(&r)?;
                    assert!(
                        off <= tolerance,
                        "{map} of {name}, size {b}, {dtype:?}: {off:e}"
                    );
                }
            }
        }
    }
    Ok(())
}

#[test]
fn zero_gives_the_identity_to_the_bit() -> Result<()> {
    for b in [1, 2, 3, 8, 32] {
        for dtype in [DType::F32, DType::F64] {
            let zero = Tensor::zeros((2, entries(b)), dtype, &CPU)?;
            let eye = Tensor::eye(b, DType::F64, &CPU)?.broadcast_as((2, b, b))?;
            for theta in [zero.clone(), zero.neg()?] {
                let q = skew(&theta, b)?;
                for (name, r) in [
                    ("cayley", cayley(&q)?),
                    ("exponential", exponential(&q)?),
                    ("series", cayley_neumann(&q, 5, 1)?),
                    ("capped", cayley(&clip(&q, 0.5)?)?),
                ] {
                    assert_eq!(bits(&r), bits(&eye), "{name}, size {b}, {dtype:?}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn no_blocks_give_no_blocks() -> Result<()> {
    let theta = Var::zeros((0, 6), DType::F32, &CPU)?;
    let q = clip(&skew(&theta, 4)?, 1.)?;
    for r in [cayley(&q)?, exponential(&q)?, cayley_neumann(&q, 5, 1)?] {
        assert_eq!(r.dims(), [0, 4, 4]);
        assert!(angles(&r)?.is_empty());
        assert_eq!(orthogonality_error(&r)?, 0.);
        let grads = r.sum_all()?.backward()?;
        assert_eq!(grads.get(&theta).unwrap().dims(), [0, 6]);
    }
    Ok(())
}

#[test]
fn a_nan_stays_in_its_block() -> Result<()> {
    let mut theta = uneven(3 * 10);
    let clean = tensor(&theta, (3, 10));
    theta[13] = f64::NAN;
    let theta = tensor(&theta, (3, 10));
    let maps: [(&str, RotationMap); 4] = [
        ("cayley", cayley),
        ("exponential", exponential),
        ("series", |q| cayley_neumann(q, 5, 1)),
        ("capped", |q| cayley(&clip(q, 0.5)?)),
    ];
    for (name, map) in maps {
        let (found, expected) = (map(&skew(&theta, 5)?)?, map(&skew(&clean, 5)?)?);
        for d in [0, 2] {
            assert_eq!(
                bits(&found.get(d)?),
                bits(&expected.get(d)?),
                "{name}, block {d}"
            );
        }
        let sum = found.get(1)?.sum_all()?.to_scalar::<f64>()?;
        assert!(sum.is_nan(), "{name} hides a NaN");
        assert!(orthogonality_error(&found)?.is_nan(), "{name}");
        assert!(angles(&found)?[1].iter().all(|a| a.is_nan()), "{name}");
    }
    Ok(())
}

#[test]
fn views_give_what_their_copies_give() -> Result<()> {
    let wide = tensor(&uneven(7 * 20), (20, 7));
    let view = wide.t()?.narrow(0, 2, 3)?.narrow(1, 4, 10)?;
    assert!(!view.is_contiguous());
    let copy = view.force_contiguous()?;
    let q = skew(&copy, 5)?;
    assert_eq!(bits(&skew(&view, 5)?), bits(&q));
    let turned = q.transpose(1, 2)?;
    let copy = turned.force_contiguous()?;
    for map in [cayley, exponential] {
        assert_eq!(bits(&map(&turned)?), bits(&map(&copy)?));
    }
    Ok(())
}

#[test]
fn the_cap_holds_the_true_norm() -> Result<()> {
    // Planes of norms 3, 3 and 1: a tie, in a basis where no entry shows it.
    let turn = rotation(
        &tensor(&uneven(15), (1, 15)),
        &DoftConfig::default().with_block_size(6).layout("x", 6)?,
    )?;
    let mut q = vec![0.; 36];
    for (plane, norm) in [3., 3., 1.].into_iter().enumerate() {
        q[2 * plane * 6 + 2 * plane + 1] = norm;
        q[(2 * plane + 1) * 6 + 2 * plane] = -norm;
    }
    let q = turn
        .matmul(&tensor(&q, (1, 6, 6)))?
        .matmul(&turn.transpose(1, 2)?.contiguous()?)?;
    let q = Var::from_tensor(&q)?;
    let capped = clip(&q, 1.5)?;
    assert_close(
        "tie",
        &capped,
        &(q.as_tensor() * 0.5)?.flatten_all()?.to_vec1()?,
        1e-14,
        0.,
    );
    let grads = capped.sqr()?.sum_all()?.backward()?;
    // Growing along Q changes nothing above the cap, so the gradient is at right angles to Q.
    let along = (grads.get(&q).unwrap() * q.as_tensor())?
        .sum_all()?
        .to_scalar::<f64>()?;
    assert!(along.abs() < 1e-12, "{along}");
    assert_eq!(bits(&clip(&q, 3.1)?), bits(&q), "an inactive cap changed Q");
    for scale in [1e-200, 1e200] {
        let capped = clip(&(q.as_tensor() * scale)?, 1.5 * scale)?;
        let expected = (q.as_tensor() * (0.5 * scale))?.flatten_all()?.to_vec1()?;
        assert_close("extreme", &capped, &expected, 0., 1e-13);
    }
    Ok(())
}

#[test]
fn angles_are_those_put_in() -> Result<()> {
    // Entries of one plane each: tiny, small, wide; scrambled by a rotation.
    let turn = exponential(&skew(&tensor(&uneven(21), (1, 21)), 7)?)?;
    let planes = [1e-9, 3.1, 0.7];
    let mut q = vec![0.; 49];
    for (plane, angle) in planes.into_iter().enumerate() {
        q[2 * plane * 7 + 2 * plane + 1] = angle;
        q[(2 * plane + 1) * 7 + 2 * plane] = -angle;
    }
    let back = turn.transpose(1, 2)?.contiguous()?;
    let r = exponential(&turn.matmul(&tensor(&q, (1, 7, 7)))?.matmul(&back)?)?;
    let found = angles(&r)?;
    assert_eq!(found.len(), 1);
    for (found, expected) in found[0].iter().zip([3.1, 0.7, 1e-9]) {
        assert!(
            (found - expected).abs() < 1e-14,
            "{found}, expected {expected}"
        );
    }
    // The identity, a half turn in every plane, equal planes, and the series.
    let eye = Tensor::eye(4, DType::F32, &CPU)?.unsqueeze(0)?;
    assert_eq!(angles(&eye)?, [[0., 0.]]);
    assert_eq!(angles(&eye.neg()?)?, [[std::f64::consts::PI; 2]]);
    let q = skew(&tensor(&[1., 0., 0., 0., 0., 1.], (1, 6)), 4)?;
    for angle in &angles(&cayley(&q)?)?[0] {
        assert!((angle - std::f64::consts::FRAC_PI_2).abs() < 1e-14);
    }
    let series = cayley_neumann(&skew(&tensor(&[0.5], (1, 1)), 2)?, 5, 1)?;
    assert!((angles(&series)?[0][0] - 0.75f64.atan2(0.5625)).abs() < 1e-14);
    assert_eq!(
        angles(&Tensor::ones((3, 1, 1), DType::F64, &CPU)?)?,
        [[0f64; 0]; 3]
    );
    Ok(())
}

#[test]
fn geodesics_take_part_of_the_way() -> Result<()> {
    for map in [Map::Cayley, Map::Exponential] {
        for (b, scale) in [(2, 1.), (3, 1e-8), (5, 3.), (8, 20.), (32, 1.)] {
            let config = DoftConfig::default()
                .with_block_size(b)
                .with_map(map)
                .with_scaled(false);
            let layout = config.with_max_norm(100.).layout("x", 2 * b)?;
            let theta = tensor(&uneven(2 * entries(b)), (2, entries(b)));
            let theta = (theta * scale)?;
            let r = rotation(&theta, &layout)?;
            let flat = |x: &Tensor| x.flatten_all().and_then(|x| x.to_vec1::<f64>());
            let at = |s: f64| geodesic(&theta, &layout, s);
            let back = flat(&r.transpose(1, 2)?)?;
            let name = format!("{map:?}, size {b}, scale {scale}");
            assert_close(&name, &at(1.)?, &flat(&r)?, 1e-12, 0.);
            assert_close(&name, &at(-1.)?, &back, 1e-12, 0.);
            let half = at(0.5)?;
            assert_close(&name, &half.matmul(&half)?, &flat(&r)?, 1e-12, 0.);
            let eye = Tensor::eye(b, DType::F64, &CPU)?.broadcast_as((2, b, b))?;
            assert_close(&name, &at(0.)?, &flat(&eye)?, 1e-13, 0.);
            for s in [-3.7, 0.3, 12.] {
                assert!(
                    orthogonality_error(&at(s)?)? < 1e-12,
                    "{name}, strength {s}"
                );
            }
            let f32_theta = theta.to_dtype(DType::F32)?;
            assert_eq!(geodesic(&f32_theta, &layout, 1.)?.dtype(), DType::F64);
        }
    }
    Ok(())
}

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

#[test]
fn answers_do_not_depend_on_the_number_of_threads() -> Result<()> {
    let theta = tensor(&uneven(40 * 120), (40, 120));
    let weights = tensor(&uneven(40 * 256), (40, 16, 16));
    let run = |threads: usize, map: Map| -> Result<(Vec<u64>, Vec<u64>)> {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        let config = DoftConfig::default()
            .with_block_size(16)
            .with_map(map)
            .with_max_norm(0.5);
        let layout = config.layout("x", 640)?;
        pool.install(|| {
            let var = Var::from_tensor(&theta)?;
            let r = rotation(&var, &layout)?;
            let grads = (&r * &weights)?.sum_all()?.backward()?;
            Ok((bits(&r), bits(grads.get(&var).unwrap())))
        })
    };
    for map in [Map::Cayley, Map::SERIES, Map::Exponential] {
        assert_eq!(run(1, map)?, run(5, map)?, "{map:?}");
    }
    Ok(())
}

fn shapes() -> impl Strategy<Value = (usize, usize, f64, u64)> {
    (1..4usize, 2..12usize, -8f64..1.7, any::<u64>())
        .prop_map(|(blocks, b, exponent, seed)| (blocks, b, 10f64.powf(exponent), seed))
}

fn random(blocks: usize, b: usize, scale: f64, seed: u64) -> Tensor {
    let mut rng = SplitMix64::new(seed);
    let theta: Vec<f64> = (0..blocks * entries(b))
        .map(|_| scale * rng.normal())
        .collect();
    tensor(&theta, (blocks, entries(b)))
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_theta_gives_a_rotation((blocks, b, scale, seed) in shapes()) {
        for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F64, 1e-12)] {
            let q = skew(&random(blocks, b, scale, seed).to_dtype(dtype).unwrap(), b).unwrap();
            for r in [cayley(&q).unwrap(), exponential(&q).unwrap()] {
                prop_assert!(orthogonality_error(&r).unwrap() <= tolerance);
            }
        }
    }

    #[test]
    fn the_opposite_sign_is_the_transpose((blocks, b, scale, seed) in shapes()) {
        let theta = random(blocks, b, scale.min(1.), seed);
        for map in [Map::Cayley, Map::SERIES, Map::Exponential] {
            let config = DoftConfig::default().with_block_size(b).with_map(map).with_max_norm(2.);
            let layout = config.layout("x", blocks * b).unwrap();
            let r = rotation(&theta, &layout).unwrap().transpose(1, 2).unwrap();
            let expected = r.flatten_all().unwrap().to_vec1::<f64>().unwrap();
            let back = rotation(&theta.neg().unwrap(), &layout).unwrap();
            assert_close(&format!("{map:?}"), &back, &expected, 1e-11, 0.);
        }
    }

    #[test]
    fn a_shared_block_is_each_of_its_copies((blocks, b, scale, seed) in shapes()) {
        let theta = random(1, b, scale, seed);
        let config = DoftConfig::default().with_block_size(b);
        let alone = config.layout("x", blocks * b).unwrap();
        let shared = config.with_block_share(true).layout("x", blocks * b).unwrap();
        let one = rotation(&theta, &shared).unwrap();
        let many = rotation(&theta.repeat((blocks, 1)).unwrap(), &alone).unwrap();
        let copies = one.repeat((blocks, 1, 1)).unwrap();
        prop_assert_eq!(bits(&many), bits(&copies));
    }
}
