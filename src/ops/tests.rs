//! The fused products against their composed twins.

use super::{Weight, composed, linear};
use crate::rng::SplitMix64;
use candle_core::{DType, Device, Result, Shape, Tensor, Var};

fn seeded(shape: impl Into<Shape>, seed: u64, dtype: DType) -> Result<Tensor> {
    let shape = shape.into();
    let mut rng = SplitMix64::new(seed);
    let values: Vec<f64> = (0..shape.elem_count()).map(|_| rng.normal()).collect();
    Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)
}

fn assert_near(what: &str, a: &Tensor, b: &Tensor, tolerance: f64) -> Result<()> {
    assert_eq!(a.dims(), b.dims(), "{what}");
    if a.elem_count() == 0 {
        return Ok(());
    }
    let largest = |t: Tensor| {
        t.abs()?
            .flatten_all()?
            .max(0)?
            .to_dtype(DType::F64)?
            .to_scalar::<f64>()
    };
    let (off, scale) = (largest((a - b)?)?, largest(b.clone())?);
    assert!(
        off <= tolerance * scale,
        "{what}: off by {off:e} of {scale:e}"
    );
    Ok(())
}

/// One product both ways, on leaves of their own, and everything that comes back.
struct Case {
    x: Tensor,
    blocks: usize,
    b: usize,
    magnitude: bool,
    bias: bool,
}

impl Case {
    fn compare(&self, what: &str) -> Result<()> {
        let dtype = self.x.dtype();
        let tolerance = if dtype == DType::F64 { 1e-13 } else { 1e-5 };
        let width = self.x.dim(candle_core::D::Minus1)?;
        let out = 37;
        let weight = Weight::dense(&seeded((width, out), 1, dtype)?.t()?);
        let bias = seeded(out, 2, dtype)?;
        let bias = self.bias.then_some(&bias);
        let x = Var::from_tensor(&self.x)?;
        // Views of the leaves, so that strides and offsets reach the ops.
        let view = |x: &Var| {
            if self.x.is_contiguous() {
                x.as_tensor().clone()
            } else {
                self.restride(x)
            }
        };
        let r = Var::from_tensor(&seeded((self.blocks, self.b, self.b), 3, dtype)?)?;
        let ratio = Var::from_tensor(&seeded(out, 4, dtype)?)?;
        let given = self.magnitude.then_some(ratio.as_tensor());
        let fused = linear::doft(&view(&x), &r, given, &weight, bias)?;
        let twin = composed::doft(&view(&x), &r, given, &weight, bias)?;
        assert_near(&format!("{what}: y"), &fused, &twin, tolerance)?;
        let upstream = seeded(fused.shape().clone(), 5, dtype)?;
        let of = |y: &Tensor| (y * &upstream)?.sum_all()?.backward();
        let (fused, twin) = (of(&fused)?, of(&twin)?);
        for (name, var) in [("x", &x), ("r", &r), ("ratio", &ratio)] {
            if name == "ratio" && !self.magnitude {
                assert!(fused.get(var).is_none());
                continue;
            }
            let (fused, twin) = (fused.get(var), twin.get(var));
            let (Some(fused), Some(twin)) = (fused, twin) else {
                panic!("{what}: no gradient for {name}");
            };
            assert_near(&format!("{what}: d{name}"), fused, twin, tolerance)?;
        }
        Ok(())
    }

    fn restride(&self, x: &Var) -> Tensor {
        // The same values through a transposed copy.
        let last = x.rank() - 1;
        let turned = x.transpose(last - 1, last).and_then(|x| x.contiguous());
        turned
            .and_then(|x| x.transpose(last - 1, last))
            .expect("a transposed view")
    }
}

#[test]
fn the_fused_product_equals_its_composed_twin() -> Result<()> {
    for dtype in [DType::F32, DType::F64] {
        for (width, b, shared) in [
            (24, 4, false),
            (24, 4, true),
            (6, 2, false),
            (64, 64, false),
            (130, 65, true),
        ] {
            for (magnitude, bias) in [(true, true), (true, false), (false, true), (false, false)] {
                for shape in [
                    vec![1, width],
                    vec![200, width],
                    vec![2, 3, width],
                    vec![2, 1, 3, width],
                ] {
                    let what =
                        format!("{dtype:?}, {shape:?}, b = {b}, {shared}, {magnitude}, {bias}");
                    let blocks = if shared { 1 } else { width / b };
                    let x = seeded(shape, 6, dtype)?;
                    let case = Case {
                        x,
                        blocks,
                        b,
                        magnitude,
                        bias,
                    };
                    case.compare(&what)?;
                }
                let x = seeded((width, 9), 6, dtype)?.t()?;
                let blocks = if shared { 1 } else { width / b };
                let case = Case {
                    x,
                    blocks,
                    b,
                    magnitude,
                    bias,
                };
                case.compare("a transposed input")?;
            }
        }
    }
    Ok(())
}

#[test]
fn an_empty_input_has_gradients_of_zero() -> Result<()> {
    let weight = Weight::dense(&seeded((5, 8), 1, DType::F32)?);
    let x = Var::zeros((0, 8), DType::F32, &Device::Cpu)?;
    let r = Var::from_tensor(&seeded((2, 4, 4), 2, DType::F32)?)?;
    let ratio = Var::ones(5, DType::F32, &Device::Cpu)?;
    let grads = linear::doft(&x, &r, Some(&ratio), &weight, None)?
        .sum_all()?
        .backward()?;
    for (var, count) in [(&x, 0), (&r, 32), (&ratio, 5)] {
        let grad = grads.get(var).expect("a gradient").flatten_all()?;
        assert_eq!(grad.to_vec1::<f32>()?, vec![0.; count]);
    }
    Ok(())
}

#[test]
fn the_frozen_product_equals_its_composed_twin() -> Result<()> {
    for dtype in [DType::F32, DType::F64] {
        let weight = Weight::dense(&seeded((5, 8), 1, dtype)?);
        let bias = seeded(5, 2, dtype)?;
        for shape in [vec![1, 8], vec![2, 3, 8]] {
            let x = Var::from_tensor(&seeded(shape, 3, dtype)?)?;
            let fused = linear::frozen(&x, &weight, Some(&bias))?;
            let twin = composed::frozen(&x, &weight, Some(&bias))?;
            assert_near("y", &fused, &twin, 0.)?;
            let upstream = seeded(fused.shape().clone(), 4, dtype)?;
            let of = |y: Tensor| (y * &upstream)?.sum_all()?.backward();
            let (fused, twin) = (of(fused)?, of(twin)?);
            let (Some(fused), Some(twin)) = (fused.get(&x), twin.get(&x)) else {
                panic!("no gradient of x");
            };
            assert_near("dx", fused, twin, 0.)?;
        }
    }
    Ok(())
}

#[test]
fn half_types_take_the_composed_way_with_gradients() -> Result<()> {
    for dtype in [DType::F16, DType::BF16] {
        let weight = Weight::dense(&seeded((5, 8), 1, dtype)?);
        let x = Var::from_tensor(&seeded((3, 8), 3, dtype)?)?;
        let r = Var::from_tensor(&Tensor::eye(4, DType::F32, &Device::Cpu)?.repeat((2, 1, 1))?)?;
        let ratio = Var::ones(5, DType::F32, &Device::Cpu)?;
        let y = linear::doft(&x, &r, Some(&ratio), &weight, None)?;
        assert_eq!(y.dtype(), dtype);
        let grads = y.sum_all()?.backward()?;
        assert!(grads.get(&x).is_some());
        for var in [&r, &ratio] {
            assert_eq!(grads.get(var).expect("a gradient").dtype(), DType::F32);
        }
    }
    Ok(())
}
