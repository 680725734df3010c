//! The fused products against their composed twins.

use super::attention::{Attention, Sees};
use super::norm::Norm;
use super::pointwise::{Rope, SiluMul, Softmax};
use super::{Weight, composed, embedding, linear, loss};
use crate::rng::SplitMix64;
use candle_core::{DType, Device, Result, Shape, Tensor, Var};

pub(super) fn seeded(shape: impl Into<Shape>, seed: u64, dtype: DType) -> Result<Tensor> {
    let shape = shape.into();
    let mut rng = SplitMix64::new(seed);
    let values: Vec<f64> = (0..shape.elem_count()).map(|_| rng.normal()).collect();
    Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)
}

/// Each entry within `tolerance` of the largest of `b`; a NaN never is.
pub(super) fn assert_near(what: &str, a: &Tensor, b: &Tensor, tolerance: f64) -> Result<()> {
    assert_near_from(what, a, b, tolerance, 0.)
}

/// The same, of the largest of `b` or of `least`.
pub(super) fn assert_near_from(
    what: &str,
    a: &Tensor,
    b: &Tensor,
    tolerance: f64,
    least: f64,
) -> Result<()> {
    assert_eq!(a.dims(), b.dims(), "{what}");
    let flat = |x: &Tensor| x.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>();
    let (a, b) = (flat(a)?, flat(b)?);
    let scale = b.iter().fold(least, |most, b| most.max(b.abs()));
    for (i, (a, b)) in a.iter().zip(&b).enumerate() {
        let off = (a - b).abs();
        assert!(
            off <= tolerance * scale,
            "{what}: entry {i} is {a:e}, expected {b:e}, off by {off:e} of {scale:e}"
        );
    }
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
            (33, 11, false),
            (5, 1, false),
            (1, 1, true),
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
fn half_types_are_computed_in_f32_and_rounded_once() -> Result<()> {
    for (dtype, tolerance) in [(DType::F16, 2e-3), (DType::BF16, 1.6e-2)] {
        // Values that are exact in the half type, so that both sides start alike.
        let exact = |shape: (usize, usize), seed| seeded(shape, seed, dtype);
        let weight = exact((37, 64), 1)?;
        let x = Var::from_tensor(&exact((70, 64), 3)?)?;
        let wide = Var::from_tensor(&x.to_dtype(DType::F32)?)?;
        let r = Var::from_tensor(&seeded((4, 16, 16), 5, DType::F32)?)?;
        let ratio = Var::from_tensor(&seeded(37, 6, DType::F32)?)?;
        let bias = seeded(37, 7, DType::F32)?;
        let upstream = seeded((70, 37), 8, dtype)?;
        let run = |x: &Var, weight: Weight| -> Result<_> {
            let y = linear::doft(x, &r, Some(&ratio), &weight, Some(&bias))?;
            let upstream = upstream.to_dtype(y.dtype())?;
            let grads = (&y * upstream)?.sum_all()?.backward()?;
            let of = |v: &Var| grads.get(v).expect("a gradient").clone();
            Ok([y, of(x), of(&r), of(&ratio)])
        };
        let half = run(&x, Weight::dense(&weight))?;
        let mixed = run(&wide, Weight::dense(&weight))?;
        let full = run(&wide, Weight::dense(&weight.to_dtype(DType::F32)?))?;
        assert_eq!(half[0].dtype(), dtype);
        assert_eq!(mixed[0].dtype(), DType::F32);
        for (i, what) in ["y", "dx", "dr", "dratio"].into_iter().enumerate() {
            assert_near(
                &format!("{dtype:?} with f32: {what}"),
                &mixed[i],
                &full[i],
                1e-5,
            )?;
            let wide = half[i].to_dtype(DType::F32)?;
            assert_near(&format!("{dtype:?}: {what}"), &wide, &full[i], tolerance)?;
        }
    }
    Ok(())
}

#[test]
fn embeddings_equal_their_composed_twins() -> Result<()> {
    let table = seeded((11, 12), 1, DType::F64)?;
    let ids = Tensor::new(&[3u32, 0, 10, 3], &Device::Cpu)?;
    for shared in [false, true] {
        let blocks = if shared { 1 } else { 3 };
        let r = Var::from_tensor(&seeded((blocks, 4, 4), 2, DType::F64)?)?;
        let ratio = Var::from_tensor(&seeded(4, 3, DType::F64)?)?;
        let upstream = seeded((4, 12), 4, DType::F64)?;
        let fused = embedding::doft(&Weight::dense(&table), &ids, &r, Some(&ratio))?;
        let twin = composed::embedding(&table.index_select(&ids, 0)?, &r, Some(&ratio))?;
        assert_near("y", &fused, &twin, 1e-13)?;
        let of = |y: &Tensor| (y * &upstream)?.sum_all()?.backward();
        let (fused, twin) = (of(&fused)?, of(&twin)?);
        for var in [&r, &ratio] {
            let (Some(fused), Some(twin)) = (fused.get(var), twin.get(var)) else {
                panic!("no gradient");
            };
            assert_near("a gradient", fused, twin, 1e-13)?;
        }
    }
    Ok(())
}

/// One op and its composed twin: values and the gradient of every variable.
pub(super) fn twins(
    what: &str,
    vars: &[&Var],
    fused: impl Fn() -> Result<Tensor>,
    twin: impl Fn() -> Result<Tensor>,
    tolerance: f64,
) -> Result<()> {
    let (fused, twin) = (fused()?, twin()?);
    assert_near(what, &fused, &twin, tolerance)?;
    let upstream = seeded(fused.shape().clone(), 90, fused.dtype())?;
    let of = |y: &Tensor| (y * &upstream)?.sum_all()?.backward();
    let (fused, twin) = (of(&fused)?, of(&twin)?);
    for (i, var) in vars.iter().enumerate() {
        let (Some(fused), Some(twin)) = (fused.get(var), twin.get(var)) else {
            panic!("{what}: no gradient for variable {i}");
        };
        assert_near(&format!("{what}: gradient {i}"), fused, twin, tolerance)?;
    }
    Ok(())
}

pub(super) fn var(shape: impl Into<Shape>, seed: u64, dtype: DType) -> Result<Var> {
    Var::from_tensor(&seeded(shape, seed, dtype)?)
}

const DTYPES: [(DType, f64); 4] = [
    (DType::F64, 1e-13),
    (DType::F32, 3e-6),
    (DType::F16, 5e-3),
    (DType::BF16, 3e-2),
];

#[test]
fn frozen_functions_equal_their_composed_twins() -> Result<()> {
    for (dtype, tolerance) in DTYPES {
        for width in [1, 7, 16, 40, 1000] {
            let x = var((2, 3, width), 1, dtype)?;
            let other = var((2, 3, width), 2, dtype)?;
            for (remove_mean, bias) in [(true, true), (true, false), (false, false)] {
                if width == 1 {
                    continue; // The gradient is what eps leaves of it.
                }
                let norm = Norm {
                    weight: seeded(width, 3, dtype)?,
                    bias: bias.then(|| seeded(width, 4, dtype)).transpose()?,
                    eps: 1e-5,
                    remove_mean,
                };
                let what = format!("norm, {dtype:?}, {width}, {remove_mean}");
                let twin = || norm.composed(&x);
                twins(&what, &[&x], || norm.forward(&x), twin, tolerance)?;
                let both = |(sum, normed): (Tensor, Tensor)| Tensor::cat(&[sum, normed], 0);
                let fused = || both(norm.forward_residual(&x, &other)?);
                let twin = || {
                    let sum = (x.as_tensor() + other.as_tensor())?;
                    let normed = norm.composed(&sum)?;
                    both((sum, normed))
                };
                twins(&what, &[&x, &other], fused, twin, tolerance)?;
            }
            let what = format!("{dtype:?}, {width}");
            let (fused, twin) = (|| x.apply_op1(Softmax), || Softmax::composed(&x));
            twins(&format!("softmax, {what}"), &[&x], fused, twin, tolerance)?;
            let fused = || x.apply_op2(&other, SiluMul);
            let twin = || SiluMul::composed(&x, &other);
            twins(
                &format!("silu, {what}"),
                &[&x, &other],
                fused,
                twin,
                tolerance,
            )?;
            let logits = var((5, width), 6, dtype)?;
            let targets: Vec<u32> = (0..5).map(|i| (i * 7) % width as u32).collect();
            let fused = || loss::cross_entropy(&logits, targets.clone());
            let twin = || loss::composed_cross_entropy(&logits, &targets);
            if width > 1 {
                twins(&format!("loss, {what}"), &[&logits], fused, twin, tolerance)?;
            }
        }
    }
    Ok(())
}

#[test]
fn rotary_embedding_equals_its_composed_twin() -> Result<()> {
    for (dtype, tolerance) in DTYPES {
        for (interleaved, batched) in [(false, false), (true, false), (false, true)] {
            let x = var((2, 3, 5, 8), 1, dtype)?;
            let table = |seed| match batched {
                true => seeded((2, 6, 4), seed, dtype),
                false => seeded((6, 4), seed, dtype),
            };
            let (cos, sin) = (table(2)?, table(3)?);
            let rope = Rope {
                cos,
                sin,
                interleaved,
            };
            let (fused, twin) = (|| x.apply_op1(rope.clone()), || rope.composed(&x));
            twins(&format!("rope, {dtype:?}"), &[&x], fused, twin, tolerance)?;
        }
    }
    Ok(())
}

#[test]
fn attention_equals_its_composed_twin() -> Result<()> {
    for (dtype, tolerance) in DTYPES {
        // With and without earlier keys, one block of rows and several, groups of 1, 2 and 4.
        for (steps, keys, heads, kinds) in
            [(5, 5, 4, 4), (1, 9, 4, 2), (70, 70, 4, 1), (3, 130, 2, 2)]
        {
            let (q, k) = (
                var((2, steps, heads, 8), 1, dtype)?,
                var((2, kinds, keys, 8), 2, dtype)?,
            );
            let v = var((2, kinds, keys, 8), 3, dtype)?;
            let kept: Vec<bool> = (0..2 * keys).map(|i| i % 3 != 1 || i % keys == 0).collect();
            for sees in [
                Sees::Earlier,
                Sees::Kept(None),
                Sees::Kept(Some(kept.into())),
            ] {
                let attention = || Attention::new(0.3, sees.clone());
                // A transposed view, as projections give it.
                let fused = || q.transpose(1, 2)?.apply_op3(&k, &v, attention());
                let twin = || attention().composed(&q.transpose(1, 2)?.contiguous()?, &k, &v);
                let what =
                    format!("attention, {dtype:?}, {steps} of {keys}, {heads}/{kinds}, {sees:?}");
                twins(&what, &[&q, &k, &v], fused, twin, tolerance)?;
            }
        }
    }
    Ok(())
}

#[test]
fn the_loss_over_a_head_equals_the_loss_over_its_logits() -> Result<()> {
    for (dtype, tolerance) in DTYPES {
        // Several chunks of rows, and several panels of a half head.
        let (rows, width, classes) = (300, 16, 50);
        let head = Weight::dense(&seeded((classes, width), 1, dtype)?);
        let bias = seeded(classes, 2, dtype)?;
        let hidden = var((rows, width), 3, dtype)?;
        let targets: Vec<u32> = (0..rows as u32).map(|t| t * 13 % classes as u32).collect();
        for bias in [None, Some(&bias)] {
            let fused = || loss::linear_cross_entropy(&hidden, &head, bias, targets.clone());
            let twin = || {
                let logits = composed::frozen(&hidden, &head, bias)?;
                loss::composed_cross_entropy(&logits, &targets)
            };
            let detached = || loss::composed_linear_cross_entropy(&hidden, &head, bias, &targets);
            let what = format!("head, {dtype:?}");
            twins(&what, &[&hidden], fused, twin, tolerance)?;
            twins(&what, &[&hidden], detached, twin, 3. * tolerance)?;
        }
        let constant = hidden.detach();
        let loss = loss::linear_cross_entropy(&constant, &head, None, targets.clone())?;
        let twin = loss::linear_cross_entropy(&hidden, &head, None, targets.clone())?;
        assert_near("without a gradient", &loss, &twin, 0.)?;
    }
    Ok(())
}
