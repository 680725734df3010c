//! One learning rate for both groups and every block size: the size of the first Adam step.

mod support;

use candle_core::{DType, Result};
use candle_doft::{DoftConfig, Magnitude};
use candle_nn::{AdamW, Linear, Module, Optimizer, ParamsAdamW};
use support::MAPS;
use support::tensors::{seeded, values, wrapped};

const LR: f64 = 1e-3;
const WIDTH: usize = 256;

/// One Adam step from the start on a loss without symmetry: the root mean square of the angle by
/// which a row turns, and the relative change of each magnitude.
fn first_step(config: &DoftConfig) -> Result<(f64, Vec<f64>)> {
    let weight = seeded((200, WIDTH), 1);
    let (layer, varmap) = wrapped(&Linear::new(weight.clone(), None), config)?;
    let params = ParamsAdamW {
        lr: LR,
        eps: 1e-12,
        weight_decay: 0.,
        ..Default::default()
    };
    let before = layer.magnitude()?;
    let mut optimizer = AdamW::new(varmap.all_vars(), params)?;
    let y = layer.forward(&seeded((300, WIDTH), 2))?;
    optimizer.backward_step(&(y - seeded((300, 200), 3))?.sqr()?.mean_all()?)?;

    let change = ((layer.magnitude()? - &before)? / &before)?;
    // The turn alone: the angle between the old row and the new one.
    let after = layer.effective_weight()?;
    let norm = |t: &candle_core::Tensor| t.sqr()?.sum(1)?.sqrt();
    let chord = {
        let unit = after.broadcast_div(&norm(&after)?.unsqueeze(1)?)?;
        let old = weight.broadcast_div(&norm(&weight)?.unsqueeze(1)?)?;
        norm(&(unit - old)?)?
    };
    let turns = values(&chord);
    let mean_square = turns.iter().map(|t| t * t).sum::<f64>() / turns.len() as f64;
    assert_eq!(after.dtype(), DType::F64);
    Ok((mean_square.sqrt(), values(&change)))
}

#[test]
fn a_step_turns_a_row_by_lr_and_changes_its_magnitude_by_lr_for_every_block_size() -> Result<()> {
    for map in MAPS {
        for b in [4, 8, 16, 32, 64, 128] {
            for magnitude in [Magnitude::Log, Magnitude::Factor] {
                let config = DoftConfig::default()
                    .with_block_size(b)
                    .with_map(map)
                    .with_magnitude(magnitude);
                let (turn, changes) = first_step(&config)?;
                assert!(
                    (turn / LR - 1.).abs() < 0.1,
                    "b = {b}, {map:?}: {}",
                    turn / LR
                );
                for change in changes {
                    // exp(lr) - 1 is lr (1 + lr / 2).
                    assert!(
                        (change.abs() / LR - 1.).abs() < 0.6 * LR,
                        "b = {b}: {change}"
                    );
                }
            }
        }
    }
    Ok(())
}

#[test]
fn an_absolute_magnitude_moves_by_lr_itself() -> Result<()> {
    let config = DoftConfig::default().with_magnitude(Magnitude::Absolute);
    let weight = seeded((200, WIDTH), 1);
    let norms = values(&weight.sqr()?.sum(1)?.sqrt()?);
    let (_, changes) = first_step(&config)?;
    for (change, norm) in changes.iter().zip(norms) {
        assert!((change.abs() * norm / LR - 1.).abs() < 1e-9, "{change}");
    }
    Ok(())
}

#[test]
fn without_step_normalisation_the_turn_grows_as_the_root_of_the_block_size() -> Result<()> {
    for b in [4usize, 16, 64, 128] {
        let (turn, _) = first_step(&DoftConfig::default().with_block_size(b).with_scaled(false))?;
        let expected = 2. * ((b - 1) as f64).sqrt();
        assert!(
            (turn / LR / expected - 1.).abs() < 0.1,
            "b = {b}: {}",
            turn / LR
        );
    }
    Ok(())
}
