//! The ops on numbers far from 1: against the same in f64, which has range to spare.

use super::attention::{Attention, Sees};
use super::conv::{self, Geometry};
use super::norm::Norm;
use super::tests::{assert_near, seeded};
use super::{Weight, linear, loss};
use candle_core::{DType, Device, Result, Tensor, Var};

/// A value and the gradient of each variable, for an upstream gradient.
fn run(y: &Tensor, upstream: &Tensor, vars: &[&Var]) -> Result<(Tensor, Vec<Tensor>)> {
    let along = (y.to_dtype(upstream.dtype())? * upstream)?.sum_all()?;
    let grads = along.backward()?;
    let of = |var: &&Var| grads.get(var).expect("a gradient").clone();
    Ok((y.detach(), vars.iter().map(of).collect()))
}

/// The same function of the same numbers in `dtype` and in f64: value and gradient within `tolerance`.
fn as_in_f64(
    what: &str,
    dtype: DType,
    tolerance: f64,
    x: &Tensor,
    f: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<()> {
    let x = x.to_dtype(dtype)?;
    let narrow = Var::from_tensor(&x)?;
    let wide = Var::from_tensor(&x.to_dtype(DType::F64)?)?;
    let (y, expected) = (f(&narrow)?, f(&wide)?);
    let upstream = seeded(y.shape().clone(), 90, dtype)?.to_dtype(DType::F64)?;
    let (y, grads) = run(&y, &upstream, &[&narrow])?;
    let (expected, slopes) = run(&expected, &upstream, &[&wide])?;
    assert_near(&format!("{what}, {dtype:?}"), &y, &expected, tolerance)?;
    let what = format!("{what}, {dtype:?}: gradient");
    assert_near(&what, &grads[0], &slopes[0], tolerance)
}

/// In f32 the logarithm of a sum is rounded away beside a logit of 1e8, and by 13 % beside one of 1e7.
#[test]
fn losses_of_huge_logits_are_those_of_their_differences() -> Result<()> {
    let rows = [
        [1e7f64, 1e7, 0.],
        [1e7, 1e7 + 1., 0.],
        [1e8, 1e8, 1e8],
        [-1e8, 0., -1e8 - 8.],
    ];
    let logits = Tensor::new(&rows, &Device::Cpu)?;
    let targets = vec![0, 1, 2, 1];
    for dtype in [DType::F32, DType::F64] {
        let of = |z: &Tensor| loss::cross_entropy(z, targets.clone());
        as_in_f64("cross entropy", dtype, 1e-6, &logits, of)?;
        let composed = |z: &Tensor| loss::composed_cross_entropy(z, &targets);
        as_in_f64("composed", dtype, 1e-6, &logits, composed)?;
    }
    let pair = Var::new(&[[1e8f32, 1e8]], &Device::Cpu)?;
    let y = loss::cross_entropy(&pair, vec![0])?;
    assert_eq!(y.to_scalar::<f32>()?, 2f32.ln());
    let grads = y.backward()?;
    assert_eq!(
        grads.get(&pair).expect("a gradient").to_vec2::<f32>()?,
        [[-0.5, 0.5]]
    );

    // A head whose products are those logits, exactly.
    let head = seeded((3, 4), 1, DType::F64)?.sign()?;
    let hidden = (seeded((4, 4), 2, DType::F64)?.sign()? * 33_554_432.)?;
    for dtype in [DType::F32, DType::F64] {
        let of = |h: &Tensor| {
            let head = Weight::dense(&head.to_dtype(h.dtype())?);
            loss::linear_cross_entropy(h, &head, None, targets.clone())
        };
        as_in_f64("a head", dtype, 1e-6, &hidden, of)?;
    }
    Ok(())
}

#[test]
fn attention_of_huge_scores_passes_gradients_of_their_differences() -> Result<()> {
    // Scores of 1e7 and 1e7 + 1, then 1e8 twice, and 0.
    let q = Tensor::new(&[[[[1e4f64, 1.], [1e5, 0.], [0., 0.]]]], &Device::Cpu)?;
    let k = Tensor::new(&[[[[1e3f64, 0.], [1e3, 1.], [1e3, 0.]]]], &Device::Cpu)?;
    let v = seeded((1, 1, 3, 2), 1, DType::F32)?;
    for sees in [Sees::Earlier, Sees::Kept(None)] {
        for dtype in [DType::F32, DType::F64] {
            let of = |q: &Tensor, k: &Tensor, v: &Tensor| {
                q.apply_op3(k, v, Attention::new(1., sees.clone()))
            };
            let (k, v) = (k.to_dtype(dtype)?, v.to_dtype(dtype)?);
            let like = |t: &Tensor, x: &Tensor| t.to_dtype(x.dtype());
            let at = |x: &Tensor| of(x, &like(&k, x)?, &like(&v, x)?);
            // What is left of keys of 1e3 when the slopes, which sum to 0, are rounded.
            as_in_f64("dq", dtype, 3e-3, &q, at)?;
            let at = |x: &Tensor| of(&like(&q, x)?, x, &like(&v, x)?);
            as_in_f64("dk", dtype, 3e-6, &k, at)?;
            let at = |x: &Tensor| of(&like(&q, x)?, &like(&k, x)?, x);
            as_in_f64("dv", dtype, 3e-6, &v, at)?;
        }
    }
    Ok(())
}

/// A mean over 4,096 rows: the gradient of each is below the least f16, that of the scaled loss is not.
#[test]
fn the_loss_over_a_half_head_is_scaled_before_it_is_rounded() -> Result<()> {
    let rows = 4096;
    let head = (seeded((8, 16), 1, DType::F32)? * 1e-3)?;
    let hidden = seeded((rows, 16), 2, DType::F16)?;
    let targets: Vec<u32> = (0..rows as u32).map(|t| t % 8).collect();
    let gradient = |hidden: &Var| -> Result<Tensor> {
        let head = Weight::dense(&head.to_dtype(DType::F16)?);
        let y = loss::linear_cross_entropy(hidden, &head, None, targets.clone())?;
        let grads = (y * 4096.)?.backward()?;
        Ok(grads.get(hidden).expect("a gradient").clone())
    };
    let half = gradient(&Var::from_tensor(&hidden)?)?;
    let wide = gradient(&Var::from_tensor(&hidden.to_dtype(DType::F32)?)?)?;
    assert_eq!(half.dtype(), DType::F16);
    assert_near("dhidden", &half, &wide, 1e-3)
}

/// Outputs below the range of f16 say nothing of the product: it is made again.
#[test]
fn a_magnitude_below_the_range_of_f16_has_its_gradient() -> Result<()> {
    let cases = |rows: usize| -> Result<_> {
        let x = seeded((rows, 16), 2, DType::F16)?;
        let r = seeded((4, 4, 4), 3, DType::F32)?;
        let ratio = Tensor::new(&[1e-8f32, 9e-8, 1e-6, 1e-4, 1., -1e-7], &Device::Cpu)?;
        Ok((x, r, Var::from_tensor(&ratio)?))
    };
    for bias in [None, Some(Tensor::zeros(6, DType::F32, &Device::Cpu)?)] {
        let (x, r, ratio) = cases(40)?;
        let weight = seeded((6, 16), 1, DType::F16)?;
        let gradient = |dtype: DType| -> Result<Tensor> {
            let weight = Weight::dense(&weight.to_dtype(dtype)?);
            let y = linear::doft(
                &x.to_dtype(dtype)?,
                &r,
                Some(&ratio),
                &weight,
                bias.as_ref(),
            )?;
            let grads = y.to_dtype(DType::F32)?.sum_all()?.backward()?;
            Ok(grads.get(&ratio).expect("a gradient").clone())
        };
        assert_near(
            "linear",
            &gradient(DType::F16)?,
            &gradient(DType::F32)?,
            2e-3,
        )?;

        let geometry = Geometry {
            kernel: (2, 2),
            stride: (1, 1),
            padding: (0, 0),
            dilation: (1, 1),
            groups: 1,
            one_dimensional: false,
        };
        let image = x.reshape((2, 4, 10, 8))?;
        let gradient = |dtype: DType| -> Result<Tensor> {
            let weight = Weight::dense(&weight.to_dtype(dtype)?);
            let factors = Some((&r, Some(ratio.as_tensor())));
            let y = conv::conv(
                &image.to_dtype(dtype)?,
                factors,
                &weight,
                bias.as_ref(),
                geometry,
            )?;
            let grads = y.to_dtype(DType::F32)?.sum_all()?.backward()?;
            Ok(grads.get(&ratio).expect("a gradient").clone())
        };
        assert_near(
            "a convolution",
            &gradient(DType::F16)?,
            &gradient(DType::F32)?,
            2e-3,
        )?;
    }
    Ok(())
}

/// Squares of 1e19 and more, and of 1e-23 and less, are not in f32.
#[test]
fn norms_of_rows_far_from_one_are_those_of_rows_of_one() -> Result<()> {
    let width = 24;
    let scales = [1e19, 3e19, 1e30, 1e38, 1., 1e-19, 1e-23, 1e-38, 0.];
    let plain = (seeded((scales.len(), width), 1, DType::F64)? * 0.5)?;
    for dtype in [DType::F32, DType::BF16, DType::F64] {
        let tolerance = if dtype == DType::BF16 { 2e-2 } else { 1e-5 };
        for (remove_mean, eps) in [(false, 1e-5), (true, 1e-5), (false, 0.), (true, 0.)] {
            let norm = Norm {
                weight: seeded(width, 3, DType::F64)?,
                bias: None,
                eps,
                remove_mean,
            };
            for (row, scale) in scales.iter().enumerate() {
                if eps == 0. && *scale == 0. {
                    continue; // 0 / 0
                }
                let x = (plain.narrow(0, row, 1)? * *scale)?.to_dtype(dtype)?;
                // The gradient of a row that is scaled is that of the row, divided.
                let of = |norm: &Norm, x: &Tensor, composed: bool| -> Result<(Tensor, Tensor)> {
                    let x = Var::from_tensor(x)?;
                    let y = if composed {
                        norm.composed(&x)?
                    } else {
                        norm.forward(&x)?
                    };
                    let upstream = seeded((1, width), 5, DType::F32)?.to_dtype(DType::F64)?;
                    let (y, grads) = run(&y, &upstream, &[&x])?;
                    Ok((y, (grads[0].to_dtype(DType::F64)? * scale.max(1e-30))?))
                };
                let wide = x.to_dtype(DType::F64)?;
                let expected = of(&norm, &wide, false)?;
                let what = format!("{dtype:?}, {remove_mean}, {eps:e}, rows of {scale:e}");
                for composed in [false, true] {
                    let (y, dx) = of(&norm, &x, composed)?;
                    assert_near(&what, &y, &expected.0, tolerance)?;
                    if *scale < 1e30 {
                        assert_near(&what, &dx, &expected.1, tolerance)?;
                    }
                }
            }
        }
    }
    // In f64 against rows of 1, whose answer is the same.
    let norm = Norm {
        weight: seeded(width, 3, DType::F64)?,
        bias: None,
        eps: 0.,
        remove_mean: true,
    };
    let expected = norm.forward(&plain)?;
    for scale in [1e160, 1e300, 1e-170, 1e-300] {
        let y = norm.forward(&(&plain * scale)?)?;
        assert_near(&format!("rows of {scale:e}"), &y, &expected, 1e-13)?;
    }
    Ok(())
}

#[test]
fn a_residual_far_from_one_is_normalised_as_its_sum() -> Result<()> {
    let norm = Norm {
        weight: seeded(24, 3, DType::F32)?,
        bias: None,
        eps: 1e-6,
        remove_mean: false,
    };
    let x = (seeded((3, 24), 1, DType::F32)? * 1e19)?;
    let mixed = Tensor::cat(&[&x, &seeded((2, 24), 2, DType::F32)?], 0)?;
    let residual = seeded((5, 24), 4, DType::F32)?;
    let (sum, normed) = norm.forward_residual(&mixed, &residual)?;
    let expected = norm.forward(&sum)?;
    assert_eq!(normed.to_vec2::<f32>()?, expected.to_vec2::<f32>()?);
    let largest = normed.abs()?.min(1)?.to_vec1::<f32>()?;
    assert!(largest.iter().all(|v| *v > 0.), "{largest:?}");
    Ok(())
}
