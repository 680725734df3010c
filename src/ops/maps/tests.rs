//! Kernels against their composed twins, and one operation against the steps that it stands for.

use super::cayley;
use super::clip::spectral_norm;
use super::composed::{LARGEST, Steps};
use super::exponential::{composed_in, without_a_look};
use super::packed::{Capped, Rotation};
use super::{Blockwise, Cayley, Clip, Exponential, Series, Skew, apply, rotation};
use crate::ops::tests::{assert_near_from, seeded};
use candle_core::{DType, Device, Result, Shape, Tensor, Var};

const SERIES: fn() -> Series = || Series::cayley_neumann(5, 1);

fn normal(shape: impl Into<Shape>, scale: f64, seed: u64, dtype: DType) -> Result<Tensor> {
    (seeded(shape, seed, DType::F64)? * scale)?.to_dtype(dtype)
}

/// Relative to the largest entry, or to 1, the size of those of a rotation.
fn assert_near(what: &str, a: &Tensor, b: &Tensor, tolerance: f64) -> Result<()> {
    assert_near_from(what, a, b, tolerance, 1.)
}

/// Two answers from one packed parameter, and its gradients from them for one uneven upstream.
fn compare(what: &str, theta: &Var, ours: Tensor, theirs: Tensor, tolerance: f64) -> Result<()> {
    assert_near(what, &ours, &theirs, tolerance)?;
    let upstream = normal(ours.shape().clone(), 1., 8, theta.dtype())?;
    let slope = |y: Tensor| (y * &upstream)?.sum_all()?.backward();
    let (ours, theirs) = (slope(ours)?, slope(theirs)?);
    let (ours, theirs) = (ours.get(theta).unwrap(), theirs.get(theta));
    // candle gives none for an index into nothing.
    let theirs = theirs.cloned().unwrap_or(theta.zeros_like()?);
    assert_near(&format!("slope of {what}"), ours, &theirs, 10. * tolerance)
}

/// The kernel of a map against its composed twin.
fn meets_its_twin<F: Blockwise>(dtype: DType, tolerance: f64, map: fn() -> F) -> Result<()> {
    for (blocks, b, scale) in [
        (1, 1, 1.),
        (3, 2, 0.5),
        (2, 5, 3.),
        (2, 32, 0.3),
        (2, 8, 0.),
        (0, 4, 1.),
    ] {
        let theta = Var::from_tensor(&normal((blocks, b * (b - 1) / 2), scale, 7, dtype)?)?;
        let kernel = apply(&apply(&theta, b, Skew)?, b, map())?;
        let composed = map().composed(&Skew.composed(&theta, b)?, b)?;
        let what = format!("{}, {blocks} of {b}", F::NAME);
        compare(&what, &theta, kernel, composed, tolerance)?;
    }
    Ok(())
}

#[test]
fn kernels_meet_their_composed_twins() -> Result<()> {
    for (dtype, tolerance) in [(DType::F64, 1e-11), (DType::F32, 2e-5)] {
        meets_its_twin(dtype, tolerance, || Cayley)?;
        meets_its_twin(dtype, tolerance, || Exponential)?;
        meets_its_twin(dtype, tolerance, SERIES)?;
        meets_its_twin(dtype, tolerance, || Clip(0.9))?;
    }
    Ok(())
}

/// In one operation and step by step, on CPU and composed; the cap is active or is not.
fn is_its_steps<M: Blockwise>(map: fn() -> M) -> Result<()> {
    for (blocks, b, cap) in [
        (3, 1, None),
        (0, 4, Some(1.)),
        (2, 2, None),
        (3, 5, Some(0.1)),
        (3, 5, Some(100.)),
        (2, 8, Some(0.3)),
    ] {
        let theta = Var::from_tensor(&normal((blocks, b * (b - 1) / 2), 1., 5, DType::F64)?)?;
        let divisor = 2. * (b as f64).sqrt();
        let what = format!("{}, {blocks} of {b}, {cap:?}", M::NAME);
        let at_once = rotation(&theta, b, divisor, cap, map())?;
        let mut q = apply(&(theta.as_tensor() / divisor)?, b, Skew)?;
        if let Some(cap) = cap {
            q = apply(&q, b, Clip(cap))?;
        }
        compare(&what, &theta, at_once.clone(), apply(&q, b, map())?, 1e-13)?;
        let factor = 1. / divisor;
        let composed = match cap {
            None => Rotation { factor, map: map() }.composed(&theta, b)?,
            Some(cap) => {
                let map = Capped(Clip(cap), map());
                Rotation { factor, map }.composed(&theta, b)?
            }
        };
        compare(&what, &theta, at_once, composed, 1e-11)?;
    }
    Ok(())
}

#[test]
fn one_operation_is_the_steps_that_it_stands_for() -> Result<()> {
    is_its_steps(|| Cayley)?;
    is_its_steps(|| Exponential)?;
    is_its_steps(SERIES)
}

#[test]
fn a_block_that_is_not_finite_spoils_no_other_composed_one() -> Result<()> {
    for (wrong, dtype) in [
        (f64::NAN, DType::F64),
        (f64::INFINITY, DType::F64),
        (1e30, DType::F32),
    ] {
        // The first block decides what `max` makes of a NaN.
        let mut values = normal((3, 10), 5., 3, DType::F64)?
            .flatten_all()?
            .to_vec1::<f64>()?;
        let clean = Tensor::from_slice(&values, (3, 10), &Device::Cpu)?.to_dtype(dtype)?;
        values[4] = wrong;
        let spoilt = Tensor::from_vec(values, (3, 10), &Device::Cpu)?.to_dtype(dtype)?;
        let rest = |r: Tensor| r.narrow(0, 1, 2);
        let q = |theta: &Tensor| Skew.composed(theta, 5);
        let (found, expected) = (q(&spoilt)?, q(&clean)?);
        let what = format!("{wrong}");
        for map in [
            |q: &Tensor| Cayley.composed(q, 5),
            |q: &Tensor| Exponential.composed(q, 5),
            |q: &Tensor| SERIES().composed(q, 5),
            |q: &Tensor| Clip(0.5).composed(q, 5),
        ] {
            let (found, expected) = (rest(map(&found)?)?, rest(map(&expected)?)?);
            assert_near(&what, &found, &expected, 1e-5)?;
        }
    }
    Ok(())
}

#[test]
fn composed_maps_are_orthogonal_in_f32_up_to_norm_100() -> Result<()> {
    let q = Skew.composed(&normal((1, 496), 1., 3, DType::F64)?, 32)?;
    let norm = spectral_norm(&q.flatten_all()?.to_vec1::<f64>()?, 32);
    let q = (q * (100. / norm))?.to_dtype(DType::F32)?;
    let eye = Tensor::eye(32, DType::F64, &Device::Cpu)?.unsqueeze(0)?;
    let narrow = composed_in(&q, 32, DType::F32)?;
    for (what, r) in [
        ("cayley", Cayley.composed(&q, 32)?),
        ("exp in f32", narrow.clone()),
    ] {
        let r = r.to_dtype(DType::F64)?;
        let square = r.matmul(&r.transpose(1, 2)?.contiguous()?)?;
        assert_near(what, &square, &eye, 1e-5)?;
    }
    // An angle of 100 radians is off by 100 roundings, and by some more from the squarings.
    assert_near("exp in f32", &narrow, &Exponential.composed(&q, 32)?, 5e-4)
}

/// What a GPU computes without a look at the values, on CPU.
struct Unseen<F>(F, fn(&Tensor, usize) -> Result<Tensor>);

impl<F: Blockwise> Blockwise for Unseen<F> {
    const NAME: &'static str = F::NAME;
    const KEEPS_RESULT: bool = F::KEEPS_RESULT;

    fn forward<T: super::Real>(&self, arg: &[T], b: usize, out: &mut [T]) {
        self.0.forward(arg, b, out);
    }

    fn backward<T: super::Real>(&self, kept: &[T], grad: &[T], b: usize, out: &mut [T]) {
        self.0.backward(kept, grad, b, out);
    }

    fn composed(&self, q: &Tensor, b: usize) -> Result<Tensor> {
        self.1(q, b)
    }
}

const UNSEEN: fn() -> Unseen<Cayley> =
    || Unseen(Cayley, |q, b| cayley::composed_in(q, b, Steps::Fixed));

#[test]
fn maps_that_look_at_no_value_meet_the_kernels() -> Result<()> {
    for (dtype, tolerance) in [(DType::F64, 1e-11), (DType::F32, 2e-5)] {
        meets_its_twin(dtype, tolerance, UNSEEN)?;
        meets_its_twin(dtype, tolerance, || Unseen(Exponential, without_a_look))?;
    }
    Ok(())
}

#[test]
fn maps_that_look_at_no_value_refuse_what_is_too_large_block_by_block() -> Result<()> {
    for map in [UNSEEN().1, without_a_look] {
        let theta = Tensor::new(
            &[[LARGEST * 0.999], [LARGEST * 1.001], [f64::NAN], [0.]],
            &Device::Cpu,
        )?;
        let r = map(&Skew.composed(&theta, 2)?, 2)?;
        let square = r.matmul(&r.transpose(1, 2)?.contiguous()?)?;
        let found = square.flatten_from(1)?.to_vec2::<f64>()?;
        for (block, row) in found.iter().enumerate() {
            for (entry, v) in row.iter().enumerate() {
                let expected = f64::from(u8::from(entry % 3 == 0));
                match block {
                    0 | 3 => assert!((v - expected).abs() < 1e-9, "block {block}: {row:?}"),
                    _ => assert!(v.is_nan(), "block {block}: {row:?}"),
                }
            }
        }
        // No rotation where there is no angle, to the bit.
        let start = r.get(3)?.flatten_all()?.to_vec1::<f64>()?;
        assert_eq!(start, [1., 0., 0., 1.]);
    }
    Ok(())
}

#[test]
fn the_fixed_steps_of_cayley_are_orthogonal_in_f32_up_to_norm_100() -> Result<()> {
    let q = Skew.composed(&normal((1, 496), 1., 3, DType::F64)?, 32)?;
    let norm = spectral_norm(&q.flatten_all()?.to_vec1::<f64>()?, 32);
    let eye = Tensor::eye(32, DType::F64, &Device::Cpu)?.unsqueeze(0)?;
    for size in [0.01, 1., 100.] {
        let q = (&q * (size / norm))?.to_dtype(DType::F32)?;
        let r = cayley::composed_in(&q, 32, Steps::Fixed)?.to_dtype(DType::F64)?;
        let square = r.matmul(&r.transpose(1, 2)?.contiguous()?)?;
        assert_near(&format!("norm {size}"), &square, &eye, 1e-5)?;
    }
    Ok(())
}

#[test]
fn the_composed_skew_and_its_slope_are_the_kernel_s_to_the_bit() -> Result<()> {
    for (blocks, b) in [(3, 2), (2, 5), (4, 32)] {
        let theta = Var::from_tensor(&normal((blocks, b * (b - 1) / 2), 1., 9, DType::F32)?)?;
        let (ours, theirs) = (Skew.composed(&theta, b)?, apply(&theta, b, Skew)?);
        let upstream = normal((blocks, b, b), 1., 10, DType::F32)?;
        let all = |q: &Tensor| -> Result<Vec<Vec<f32>>> {
            let slopes = (q * &upstream)?.sum_all()?.backward()?;
            let both = [q.clone(), slopes.get(&theta).unwrap().clone()];
            both.iter().map(|t| t.flatten_all()?.to_vec1()).collect()
        };
        assert_eq!(all(&ours)?, all(&theirs)?, "{blocks} blocks of {b}");
    }
    Ok(())
}
