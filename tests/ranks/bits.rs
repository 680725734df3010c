//! The same bits for every power-of-two number of ranks that divides the micro-batches, and near for others.

use crate::common::tensors::seeded;
use crate::run::{Plan, Run, train};
use crate::threads::on;
use candle_core::{DType, Var};
use candle_doft::train::parallel::{Alone, Processes, reduce};
use candle_doft::train::{AdamW, Gradients, Group};
use candle_doft::{Error, Result};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

static NEVER: AtomicBool = AtomicBool::new(false);

#[test]
fn every_power_of_two_that_divides_the_micro_batches_ends_with_the_same_bits() {
    for (micro_batches, dtype, ranks) in [
        (4, DType::F32, &[2, 4][..]),
        (6, DType::F32, &[2]),
        (8, DType::F32, &[2, 4, 8]),
        (12, DType::F32, &[2, 4]),
        (4, DType::F64, &[2, 4]),
        (4, DType::BF16, &[2, 4]),
    ] {
        let plan = Plan {
            micro_batches,
            dtype,
            steps: 3,
            ..Plan::default()
        };
        let alone = train(&Alone, &plan);
        assert!(alone.error.is_none(), "{:?}", alone.error);
        assert_eq!(alone.steps, 3);
        for size in ranks {
            for (rank, left) in on(*size, |group| train(group, &plan)).0.iter().enumerate() {
                let which = format!("{micro_batches} {dtype:?}, rank {rank} of {size}");
                assert!(left.error.is_none(), "{which}: {:?}", left.error);
                assert!(left.bits == alone.bits, "{which}");
                assert_eq!(left.losses, alone.losses, "{which}");
            }
        }
    }
}

/// Of one step, on each rank.
fn reduced(size: usize, plan: &Plan) -> Vec<Vec<f64>> {
    let work = |group: &dyn Processes| -> Result<Vec<f64>> {
        let mut run = Run::new(plan)?;
        run.step(group)?.gradients.flat()
    };
    let answers = on(size, work).0.into_iter();
    answers.map(Result::unwrap).collect()
}

#[test]
fn another_number_of_ranks_is_a_millionth_of_the_norm_away_at_most() {
    // Five ranks of three micro-batches: two are without data. Eight of four: half of them.
    for (size, micro_batches) in [(3, 4), (3, 11), (5, 3), (8, 4), (2, 1)] {
        let plan = Plan {
            micro_batches,
            ..Plan::default()
        };
        let alone = &reduced(1, &plan)[0];
        let norm = alone.iter().map(|v| v * v).sum::<f64>().sqrt();
        assert!(norm > 1e-3, "{norm:e}");
        let all = reduced(size, &plan);
        for (rank, found) in all.iter().enumerate() {
            let off = found.iter().zip(alone).map(|(a, b)| (a - b).powi(2));
            let off = off.sum::<f64>().sqrt() / norm;
            assert!(off < 1e-6, "rank {rank} of {size} is {off:e} away");
            assert_eq!(found, &all[0], "rank {rank} of {size}");
        }
    }
}

#[test]
fn masks_follow_the_micro_batch_and_not_the_rank() -> Result<()> {
    let plan = Plan {
        repeated: true,
        ..Plan::default()
    };
    // The same tokens of data with masks of their own: keys apart by the period of the tokens.
    let run = Run::new(&plan)?;
    let mut leaves: Vec<Vec<f64>> = Vec::new();
    let mut keys = Vec::new();
    let count = 8;
    reduce(
        &Alone,
        run.optimizer.gradients(),
        count,
        &NEVER,
        |gradients, micro| {
            let before = gradients.flat::<f64>()?;
            assert!(before.iter().all(|v| *v == 0.));
            let loss = run.micro(gradients, micro)?;
            leaves.push(gradients.flat()?);
            keys.push(micro.key);
            Ok::<_, Error>(loss)
        },
    )?;
    assert_eq!(keys, (0..8).collect::<Vec<u64>>());
    // Numbers 0 and 7 have the same data and the same weight.
    assert_ne!(leaves[0], leaves[7]);
    let still = Run::new(&Plan {
        dropout: 0.,
        ..plan
    })?;
    let mut same: Vec<Vec<f64>> = Vec::new();
    reduce(
        &Alone,
        still.optimizer.gradients(),
        count,
        &NEVER,
        |gradients, micro| {
            let loss = still.micro(gradients, micro)?;
            same.push(gradients.flat()?);
            Ok::<_, Error>(loss)
        },
    )?;
    assert_eq!(same[0], same[7]);
    Ok(())
}

#[test]
fn a_checkpoint_of_four_ranks_goes_on_on_any_number_to_the_same_bits() -> std::io::Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("checkpoint.safetensors");
    let plan = Plan::default();
    let whole = train(&Alone, &plan);
    let first = Plan {
        steps: 3,
        to: Some(file.clone()),
        ..Plan::default()
    };
    for left in on(4, |group| train(group, &first)).0 {
        assert!(left.error.is_none(), "{:?}", left.error);
    }
    let rest = Plan {
        from: Some(file),
        ..Plan::default()
    };
    assert!(train(&Alone, &rest).bits == whole.bits);
    for size in [2, 4] {
        let all = on(size, |group| train(group, &rest)).0;
        assert!(all.iter().all(|left| left.bits == whole.bits), "{size}");
    }
    Ok(())
}

fn optimizer(numbers: usize) -> Result<AdamW> {
    let var = |seed| Var::from_tensor(&seeded(numbers, seed).to_dtype(DType::F32)?);
    let vars = vec![("a".into(), var(1)?), ("b".into(), var(2)?)];
    AdamW::new(vec![Group::new(vars)], Default::default())
}

fn sum_of_squares(optimizer: &AdamW, which: usize) -> Result<candle_core::Tensor> {
    Ok(optimizer.named_vars()[which].1.sqr()?.sum_all()?)
}

/// More numbers than go out at once, of a length that no number of ranks divides.
#[test]
fn gradients_of_several_blocks_come_back_in_their_places() -> Result<()> {
    let work = |group: &dyn Processes| -> Result<(Vec<f32>, Vec<f32>)> {
        let optimizer = optimizer(2_500_003)?;
        let made = reduce(group, optimizer.gradients(), 3, &NEVER, |gradients, _| {
            gradients.backward(&sum_of_squares(&optimizer, 0)?, 1.)?;
            gradients.backward(&sum_of_squares(&optimizer, 1)?, 1.)?;
            Ok::<_, Error>(0.)
        })?;
        let mut expected = Vec::new();
        for (_, var) in optimizer.named_vars() {
            expected.extend((var.as_tensor() * 6.)?.to_vec1::<f32>()?);
        }
        Ok((made.gradients.flat()?, expected))
    };
    for answer in on(3, work).0 {
        let (found, expected) = answer?;
        let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-6 * b.abs();
        assert_eq!(found.len(), expected.len());
        assert!(found.iter().zip(&expected).all(near));
    }
    Ok(())
}

#[test]
fn a_rank_sends_two_parts_in_n_minus_one_of_n() -> Result<()> {
    for size in [2, 4] {
        let work = |group: &dyn Processes| -> Result<()> {
            let optimizer = optimizer(100_000)?;
            let made = reduce(
                group,
                optimizer.gradients(),
                size,
                &NEVER,
                |gradients, _| {
                    gradients.backward(&sum_of_squares(&optimizer, 0)?, 1.)?;
                    Ok::<_, Error>(0.)
                },
            )?;
            assert_eq!(made.gradients.step(), 1);
            assert!(made.exchange > Duration::ZERO);
            Ok(())
        };
        let (answers, shared) = on(size, work);
        answers.into_iter().collect::<Result<()>>()?;
        let each = shared.bytes.load(Ordering::Relaxed) as f64 / size as f64;
        let bytes = 2. * (size as f64 - 1.) / size as f64 * 200_000. * 4.;
        let more = each / bytes - 1.;
        assert!((0. ..0.001).contains(&more), "{each} of {bytes}");
        assert_eq!(shared.rounds.load(Ordering::Relaxed), 2);
    }
    Ok(())
}

#[test]
fn a_gradient_that_one_rank_alone_has_counts_and_one_that_none_has_is_missed() -> Result<()> {
    let work = |group: &dyn Processes| -> Result<String> {
        let mut optimizer = optimizer(4)?;
        let both = |optimizer: &AdamW, last: bool| {
            reduce(
                group,
                optimizer.gradients(),
                2,
                &NEVER,
                |gradients, micro| {
                    gradients.backward(&sum_of_squares(optimizer, 0)?, 1.)?;
                    if last && micro.index == 1 {
                        gradients.backward(&sum_of_squares(optimizer, 1)?, 1.)?;
                    }
                    Ok::<_, Error>(0.)
                },
            )
        };
        let made = both(&optimizer, true)?;
        optimizer.step(&made.gradients)?;
        let made = both(&optimizer, false)?;
        Ok(optimizer.step(&made.gradients).unwrap_err().to_string())
    };
    for error in on(2, work).0 {
        let error = error?;
        assert!(error.contains("no gradient reached `b`"), "{error}");
    }
    Ok(())
}

#[test]
fn flat_gradients_go_out_and_come_back() -> Result<()> {
    let optimizer = optimizer(3)?;
    let mut gradients: Gradients = optimizer.gradients();
    assert_eq!(gradients.flat::<f32>()?, [0.; 6]);
    gradients.backward(&sum_of_squares(&optimizer, 1)?, 1.)?;
    let flat: Vec<f32> = gradients.flat()?;
    assert!(flat[..3] == [0.; 3] && flat[3..].iter().all(|v| *v != 0.));
    let mut other = optimizer.gradients();
    other.set_flat(&flat)?;
    assert_eq!(other.flat::<f64>()?, gradients.flat::<f64>()?);
    let error = other.set_flat(&flat[1..]).unwrap_err().to_string();
    let expected =
        "`Gradients::set_flat`: the number of values is 5, expected 6, those of all variables";
    assert_eq!(error, expected);
    assert_eq!(other.flat::<f32>()?, flat);
    Ok(())
}
