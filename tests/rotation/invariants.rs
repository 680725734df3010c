//! What holds for all inputs: orthogonality, the identity at zero, views, threads, a NaN in its block.

use super::support::tensors::{CPU, bits};
use super::support::{MAPS, assert_close, orthogonal_maps, uneven};
use super::{RotationMap, entries, tensor};
use candle_core::{DType, Tensor, Var};
use candle_doft::rng::SplitMix64;
use candle_doft::rotation::{
    angles, cayley, cayley_neumann, clip, exponential, orthogonality_error, rotation, skew,
};
use candle_doft::{DoftConfig, Map, Result};
use proptest::prelude::*;

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
            for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::F64, 1e-13)] {
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
            let eye = Tensor::eye(b, dtype, &CPU)?.broadcast_as((2, b, b))?;
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
        assert_close("extreme", &capped, &expected, 0., 1e-14);
    }
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
    for map in MAPS {
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
        for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::F64, 1e-13)] {
            let theta = random(blocks, b, scale, seed).to_dtype(dtype).unwrap();
            for map in orthogonal_maps() {
                let config = DoftConfig::default().with_block_size(b).with_map(map);
                let layout = config.with_scaled(false).layout("x", blocks * b).unwrap();
                let r = rotation(&theta, &layout).unwrap();
                prop_assert!(orthogonality_error(&r).unwrap() <= tolerance);
            }
        }
    }

    #[test]
    fn the_opposite_sign_is_the_transpose((blocks, b, scale, seed) in shapes()) {
        let theta = random(blocks, b, scale.min(1.), seed);
        for map in MAPS {
            let config = DoftConfig::default().with_block_size(b).with_map(map).with_max_norm(2.);
            let layout = config.layout("x", blocks * b).unwrap();
            let r = rotation(&theta, &layout).unwrap().transpose(1, 2).unwrap();
            let expected = r.flatten_all().unwrap().to_vec1::<f64>().unwrap();
            let back = rotation(&theta.neg().unwrap(), &layout).unwrap();
            assert_close(&format!("{map:?}"), &back, &expected, 1e-13, 0.);
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
