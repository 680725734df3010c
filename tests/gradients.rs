//! Gradients of whole layers against central differences in f64, and of each path against the other.

mod support;

use candle_core::{DType, Result, Tensor, Var};
use candle_doft::{DoftConfig, Magnitude, Map};
use candle_nn::{Linear, Module};
use support::slopes::check_slopes;
use support::tensors::{CPU, disturb, linear, named, seeded, values, wrapped};
use support::{MAPS, assert_close};

/// Compares every gradient of the layer with the slope of the loss.
fn check(base: &Linear, config: &DoftConfig, x: &Tensor, what: &str) -> Result<()> {
    let (layer, varmap) = wrapped(base, config)?;
    disturb(&varmap, 0.3)?;
    let x = Var::from_tensor(x)?;
    check_slopes(what, &named(&varmap, [("x", &x)]), || layer.forward(&x))
}

#[test]
fn every_map_and_magnitude_kind_has_the_slope_of_the_loss() -> Result<()> {
    let base = linear(5, 12, true, DType::F64)?;
    let x = seeded((3, 12), 3);
    let kinds = [
        Magnitude::Log,
        Magnitude::Factor,
        Magnitude::Absolute,
        Magnitude::None,
    ];
    let series = |terms, last_coefficient| Map::CayleyNeumann {
        terms,
        last_coefficient,
    };
    for map in MAPS.into_iter().chain([series(2, 2), series(7, 2)]) {
        for magnitude in kinds {
            for (share, scaled, max_norm) in [
                (false, true, None),
                (false, false, None),
                (true, true, None),
                (false, true, Some(0.1)),
                (true, false, Some(0.5)),
            ] {
                let config = DoftConfig::default()
                    .with_block_size(4)
                    .with_map(map)
                    .with_magnitude(magnitude)
                    .with_block_share(share)
                    .with_scaled(scaled)
                    .with_max_norm(max_norm);
                check(&base, &config, &x, &format!("{config:?}"))?;
            }
        }
    }
    Ok(())
}

#[test]
fn other_ranks_and_block_sizes_have_the_slope_of_the_loss() -> Result<()> {
    for (width, b, shape) in [
        (6, 2, vec![2, 2, 6]),
        (9, 3, vec![1, 9]),
        (16, 16, vec![1, 2, 2, 16]),
    ] {
        let base = linear(4, width, false, DType::F64)?;
        let config = DoftConfig::default().with_block_size(b);
        check(&base, &config, &seeded(shape, 3), &format!("b = {b}"))?;
    }
    Ok(())
}

#[test]
fn a_transposed_input_has_the_slope_of_the_loss() -> Result<()> {
    let base = linear(5, 8, true, DType::F64)?;
    let (layer, varmap) = wrapped(&base, &DoftConfig::default().with_block_size(4))?;
    disturb(&varmap, 0.3)?;
    let source = Var::from_tensor(&seeded((8, 3), 3))?;
    let vars = named(&varmap, [("source", &source)]);
    check_slopes("transposed", &vars, || layer.forward(&source.t()?))
}

/// The magnitude's gradient comes from `y - bias` over the ratio, which holds nothing when the ratio
/// is 0 and little when the bias swamps it.
#[test]
fn the_magnitude_s_gradient_survives_a_ratio_of_zero_and_a_huge_bias() -> Result<()> {
    let base = linear(5, 8, false, DType::F64)?;
    for (ratio, bias) in [(0., 0.), (0., 1e6), (1., 1e6), (1e-300, 1.)] {
        for dtype in [DType::F32, DType::F64] {
            let bias = Tensor::full(bias, 5, &CPU)?.to_dtype(dtype)?;
            let base = Linear::new(base.weight().to_dtype(dtype)?, Some(bias));
            let config = DoftConfig::default()
                .with_block_size(4)
                .with_magnitude(Magnitude::Factor);
            let (layer, varmap) = wrapped(&base, &config)?;
            disturb(&varmap, 0.3)?;
            let factor = varmap.data().lock().unwrap()["layer.dora_multiplier"].clone();
            let mut start = values(&factor);
            start[1] = ratio;
            start[3] = -ratio;
            factor.set(&Tensor::new(start, &CPU)?.to_dtype(dtype)?)?;
            let (x, upstream) = (seeded((3, 8), 3), seeded((3, 5), 20));
            let y = layer.forward(&x.to_dtype(dtype)?)?;
            let grads = (y * upstream.to_dtype(dtype)?)?.sum_all()?.backward()?;
            // dy/dfactor is the product of the rotated input and the weight, whatever the factor.
            let one = Tensor::ones(5, dtype, &CPU)?;
            factor.set(&one)?;
            let product = layer.merge()?.weight().to_dtype(DType::F64)?;
            let expected = (x.matmul(&product.t()?)? * &upstream)?.sum(0)?;
            let tolerance = if dtype == DType::F64 { 1e-13 } else { 2e-6 };
            let what = format!("ratio {ratio}, {dtype:?}");
            assert_close(
                &what,
                grads.get(&factor).unwrap(),
                &values(&expected),
                tolerance,
                tolerance,
            );
        }
    }
    Ok(())
}
