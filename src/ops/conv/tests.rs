//! The fused convolution against its composed twin.

use super::{Geometry, conv};
use crate::ops::tests::{assert_near, seeded};
use crate::ops::{Weight, composed};
use candle_core::{DType, Device, Result, Tensor, Var};

fn geometries() -> Vec<Geometry> {
    let base = Geometry {
        kernel: (3, 3),
        stride: (1, 1),
        padding: (0, 0),
        dilation: (1, 1),
        groups: 1,
        one_dimensional: false,
    };
    vec![
        base,
        Geometry {
            stride: (2, 2),
            padding: (1, 1),
            ..base
        },
        Geometry {
            kernel: (3, 2),
            padding: (2, 2),
            ..base
        },
        Geometry {
            dilation: (2, 2),
            padding: (1, 1),
            ..base
        },
        Geometry {
            groups: 2,
            stride: (2, 2),
            padding: (1, 1),
            ..base
        },
        Geometry {
            groups: 4,
            padding: (1, 1),
            ..base
        },
        Geometry {
            kernel: (1, 1),
            stride: (3, 3),
            ..base
        },
        Geometry {
            kernel: (2, 5),
            padding: (3, 3),
            stride: (2, 2),
            dilation: (1, 1),
            ..base
        },
    ]
}

#[test]
fn no_images_have_gradients_of_zero() -> Result<()> {
    for geometry in geometries() {
        let (groups, patch) = (geometry.groups, 2 * geometry.kernel.0 * geometry.kernel.1);
        for outputs in [2, 24] {
            let out = outputs * groups;
            let weight = Weight::dense(&seeded((out, patch), 1, DType::F32)?);
            let x = Var::zeros((0, 2 * groups, 9, 9), DType::F32, &Device::Cpu)?;
            let r = Var::from_tensor(&seeded((patch / 2, 2, 2), 2, DType::F32)?)?;
            let ratio = Var::zeros(out, DType::F32, &Device::Cpu)?;
            let y = conv(&x, Some((&r, Some(&ratio))), &weight, None, geometry)?;
            assert_eq!(y.dims()[..2], [0, out]);
            let grads = y.sum_all()?.backward()?;
            for (var, count) in [(&x, 0), (&r, 2 * patch), (&ratio, out)] {
                let grad = grads.get(var).expect("a gradient").flatten_all()?;
                assert_eq!(grad.to_vec1::<f32>()?, vec![0.; count], "{geometry:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn convolutions_equal_their_composed_twins() -> Result<()> {
    for geometry in geometries() {
        for (height, width) in [(8, 7), (7, 8), (9, 9)] {
            // 2 outputs of a group take the weight's way to dR, 24 that of the patches.
            for (outputs, images, shared) in [(2, 3, false), (24, 1, false), (24, 2, true)] {
                for (rotates, magnitude) in [(true, true), (true, false), (false, false)] {
                    let (groups, kernel) = (geometry.groups, geometry.kernel);
                    let (out, patch) = (outputs * groups, 2 * kernel.0 * kernel.1);
                    let dtype = DType::F64;
                    let weight = Weight::dense(&seeded((out, patch), 1, dtype)?);
                    let bias = seeded(out, 2, dtype)?;
                    let shape = (images, 2 * groups, height, width);
                    let x = Var::from_tensor(&seeded(shape, 3, dtype)?)?;
                    let blocks = if shared { 1 } else { patch / 2 };
                    let r = Var::from_tensor(&seeded((blocks, 2, 2), 4, dtype)?)?;
                    // A ratio of 0 and a bias that swamps the product: the recomputed gradient.
                    let mut ratio = seeded(out, 5, dtype)?.to_vec1::<f64>()?;
                    ratio[0] = 0.;
                    let ratio = Var::new(ratio, &Device::Cpu)?;
                    let factors = (r.as_tensor(), magnitude.then_some(ratio.as_tensor()));
                    let factors = rotates.then_some(factors);
                    let bias = (bias * 1e6)?;
                    let fused = conv(&x, factors, &weight, Some(&bias), geometry)?;
                    let twin = composed::conv(&x, factors, &weight, Some(&bias), geometry)?;
                    let what = format!("{geometry:?} {height}x{width} {outputs} {magnitude}");
                    assert_near(&what, &fused, &twin, 1e-13)?;
                    let upstream = seeded(fused.shape().clone(), 6, dtype)?;
                    let of = |y: &Tensor| (y * &upstream)?.sum_all()?.backward();
                    let (fused, twin) = (of(&fused)?, of(&twin)?);
                    let mut wanted = vec![("x", &x)];
                    if rotates {
                        wanted.push(("r", &r));
                    }
                    if magnitude {
                        wanted.push(("ratio", &ratio));
                    }
                    for (name, var) in wanted {
                        let (fused, twin) = (fused.get(var), twin.get(var));
                        let (Some(fused), Some(twin)) = (fused, twin) else {
                            panic!("{what}: no gradient for {name}");
                        };
                        assert_near(&format!("{what}: d{name}"), fused, twin, 1e-12)?;
                    }
                }
            }
        }
    }
    Ok(())
}
