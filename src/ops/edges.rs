//! The ops at the edge of what they take: views, nothing at all, values that are not finite, a bias that
//! does not fit.

use super::norm::Norm;
use super::tests::{seeded, twins, var};
use super::{Weight, composed, conv, embedding, linear, loss};
use candle_core::{DType, Device, Result, Tensor, Var};

/// The same leaves seen through `view` and through its copy: values and gradients.
fn sees_its_copy(what: &str, leaf: &Var, view: impl Fn(&Tensor) -> Result<Tensor>) -> Result<()> {
    let weight = Weight::dense(&seeded((5, 24), 1, leaf.dtype())?);
    let wide = composed::composed_in(leaf.dtype());
    let r = var((6, 4, 4), 2, wide)?;
    let ratio = var(5, 3, wide)?;
    let run = |x: Tensor| linear::doft(&x, &r, Some(&ratio), &weight, None);
    let seen = || run(view(leaf)?);
    let copied = || run(view(leaf)?.force_contiguous()?);
    let tolerance = match leaf.dtype() {
        DType::F64 => 1e-14,
        DType::F32 => 1e-6,
        _ => 2e-3,
    };
    twins(what, &[leaf, &r, &ratio], seen, copied, tolerance)
}

#[test]
fn a_view_gives_what_its_copy_gives() -> Result<()> {
    for dtype in [DType::F64, DType::F32, DType::F16] {
        let what = |view: &str| format!("{view}, {dtype:?}");
        for rows in [1, 40] {
            sees_its_copy(&what("narrow"), &var((rows, 30), 6, dtype)?, |x| {
                x.narrow(1, 3, 24)
            })?;
            sees_its_copy(&what("transposed"), &var((24, rows), 6, dtype)?, |x| x.t())?;
            sees_its_copy(&what("one row"), &var((1, 24), 6, dtype)?, |x| {
                x.broadcast_as((rows, 24))
            })?;
            sees_its_copy(&what("one column"), &var((rows, 1), 6, dtype)?, |x| {
                x.broadcast_as((rows, 24))
            })?;
        }
    }
    Ok(())
}

#[test]
fn an_empty_input_has_gradients_of_zero() -> Result<()> {
    let weight = Weight::dense(&seeded((5, 8), 1, DType::F32)?);
    let bias = seeded(5, 3, DType::F32)?;
    let x = Var::zeros((0, 8), DType::F32, &Device::Cpu)?;
    let r = Var::from_tensor(&seeded((2, 4, 4), 2, DType::F32)?)?;
    // A ratio of 0 asks for the product itself.
    let ratio = Var::new(&[1f32, 0., 1., 1., 0.], &Device::Cpu)?;
    let linear = linear::doft(&x, &r, Some(&ratio), &weight, Some(&bias))?;
    let ids = Tensor::zeros(0, DType::U32, &Device::Cpu)?;
    let rows = embedding::doft(&weight, &ids, &r, None)?;
    assert_eq!((linear.dims(), rows.dims()), (&[0, 5][..], &[0, 8][..]));
    let grads = (linear.sum_all()? + rows.sum_all()?)?.backward()?;
    for (var, count) in [(&x, 0), (&r, 32), (&ratio, 5)] {
        let grad = grads.get(var).expect("a gradient").flatten_all()?;
        assert_eq!(grad.to_vec1::<f32>()?, vec![0.; count]);
    }
    Ok(())
}

#[test]
fn a_row_that_is_not_finite_spoils_no_other_row() -> Result<()> {
    let weight = Weight::dense(&seeded((5, 24), 1, DType::F32)?);
    let (r, ratio) = (var((6, 4, 4), 2, DType::F32)?, var(5, 3, DType::F32)?);
    for wrong in [f32::NAN, f32::INFINITY, f32::MAX] {
        let mut rows = seeded((20, 24), 4, DType::F32)?.to_vec2::<f32>()?;
        let run = |rows: &[Vec<f32>]| -> Result<(Tensor, Tensor)> {
            let x = Var::from_tensor(&Tensor::new(rows.to_vec(), &Device::Cpu)?)?;
            let y = linear::doft(&x, &r, Some(&ratio), &weight, None)?;
            let grads = y.sqr()?.sum_all()?.backward()?;
            Ok((y, grads.get(&x).expect("a gradient").clone()))
        };
        let clean = run(&rows)?;
        rows[7][5] = wrong;
        let spoilt = run(&rows)?;
        assert_ne!(
            spoilt.0.get(7)?.to_vec1::<f32>()?,
            clean.0.get(7)?.to_vec1::<f32>()?
        );
        for row in (0..20).filter(|row| *row != 7) {
            let of = |t: &Tensor| t.get(row)?.to_vec1::<f32>();
            assert_eq!(of(&spoilt.0)?, of(&clean.0)?, "y of row {row}, {wrong}");
            assert_eq!(of(&spoilt.1)?, of(&clean.1)?, "dx of row {row}, {wrong}");
        }
    }
    Ok(())
}

#[test]
fn a_bias_of_another_length_is_refused() -> Result<()> {
    let weight = Weight::dense(&seeded((5, 8), 1, DType::F32)?);
    let x = seeded((3, 8), 2, DType::F32)?;
    let image = seeded((1, 8, 4), 2, DType::F32)?;
    for count in [1, 4, 6] {
        let bias = seeded(count, 3, DType::F32)?;
        let norm = Norm {
            weight: seeded(8, 4, DType::F32)?,
            bias: Some(bias.clone()),
            eps: 1e-5,
            remove_mean: true,
        };
        let geometry = conv::Geometry {
            kernel: (1, 1),
            stride: (1, 1),
            padding: (0, 0),
            dilation: (1, 1),
            groups: 1,
            one_dimensional: true,
        };
        let targets = vec![0, 1, 2];
        for answer in [
            linear::frozen(&x, &weight, Some(&bias)),
            loss::linear_cross_entropy(&x, &weight, Some(&bias), targets),
            conv::conv(&image, None, &weight, Some(&bias), geometry),
            norm.forward(&x),
        ] {
            let error = answer.expect_err("a bias of another length");
            assert!(error.to_string().contains("a bias that does not fit"));
        }
    }
    Ok(())
}
