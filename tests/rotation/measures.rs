//! Angles of a rotation, and parts of it.

use super::support::tensors::CPU;
use super::support::{assert_close, orthogonal_maps, uneven};
use super::{entries, tensor};
use approx::assert_abs_diff_eq;
use candle_core::{DType, Tensor};
use candle_doft::rotation::{
    angles, cayley, cayley_neumann, exponential, geodesic, orthogonality_error, rotation, skew,
};
use candle_doft::{DoftConfig, Result};

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
        assert_abs_diff_eq!(*found, expected, epsilon = 1e-14);
    }
    // The identity, a half turn in every plane, equal planes, and the series.
    let eye = Tensor::eye(4, DType::F32, &CPU)?.unsqueeze(0)?;
    assert_eq!(angles(&eye)?, [[0., 0.]]);
    assert_eq!(angles(&eye.neg()?)?, [[std::f64::consts::PI; 2]]);
    let q = skew(&tensor(&[1., 0., 0., 0., 0., 1.], (1, 6)), 4)?;
    for angle in &angles(&cayley(&q)?)?[0] {
        assert_abs_diff_eq!(*angle, std::f64::consts::FRAC_PI_2, epsilon = 1e-14);
    }
    let series = cayley_neumann(&skew(&tensor(&[0.5], (1, 1)), 2)?, 5, 1)?;
    let expected = 0.75f64.atan2(0.5625);
    assert_abs_diff_eq!(angles(&series)?[0][0], expected, epsilon = 1e-14);
    assert_eq!(
        angles(&Tensor::ones((3, 1, 1), DType::F64, &CPU)?)?,
        [[0f64; 0]; 3]
    );
    Ok(())
}

#[test]
fn geodesics_take_part_of_the_way() -> Result<()> {
    for map in orthogonal_maps() {
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
            assert_close(&name, &at(1.)?, &flat(&r)?, 1e-13, 0.);
            assert_close(&name, &at(-1.)?, &back, 1e-13, 0.);
            let half = at(0.5)?;
            assert_close(&name, &half.matmul(&half)?, &flat(&r)?, 1e-13, 0.);
            let eye = Tensor::eye(b, DType::F64, &CPU)?.broadcast_as((2, b, b))?;
            assert_close(&name, &at(0.)?, &flat(&eye)?, 1e-14, 0.);
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
