//! What befalls one rank ends the step of all, and nothing moves.

use crate::run::{Fault, Left, Plan, Run, train};
use crate::threads::on;
use candle_doft::train::parallel::{Alone, check_replicas};
use candle_doft::{Error, Result};

/// A run of four ranks in which something happens to the third at the third step.
fn with(fault: Fault) -> (Vec<Left>, Vec<u64>) {
    let plan = Plan {
        fault: Some((fault, 2, 2)),
        ..Plan::default()
    };
    let two = Plan {
        steps: 2,
        ..Plan::default()
    };
    (
        on(4, |group| train(group, &plan)).0,
        train(&Alone, &two).bits,
    )
}

#[test]
fn an_error_on_one_rank_is_everyones_at_the_same_step() {
    for (fault, own) in [
        (Fault::Data, "words.txt: cannot be read"),
        (Fault::Loss, "step 3: the loss is NaN"),
    ] {
        let (all, before) = with(fault);
        for (rank, left) in all.iter().enumerate() {
            assert_eq!(left.steps, 2, "{fault:?} on rank {rank}");
            assert!(left.bits == before, "{fault:?}: rank {rank} moved");
            let error = left.error.as_ref().unwrap();
            let text = error.to_string();
            match error {
                Error::Rank { rank: of, .. } if rank != 2 => {
                    assert_eq!(*of, 2);
                    assert!(text.starts_with(&format!("rank 2: {own}")), "{text}");
                }
                _ => assert!(rank == 2 && text.starts_with(own), "rank {rank}: {text}"),
            }
        }
    }
}

#[test]
fn a_gradient_that_is_no_number_stops_all_ranks_alike() {
    let (all, before) = with(Fault::Gradient);
    let text = |left: &Left| left.error.as_ref().unwrap().to_string();
    for (rank, left) in all.iter().enumerate() {
        assert!(matches!(left.error, Some(Error::Diverged { step: 3, .. })));
        assert_eq!(text(left), text(&all[0]), "rank {rank}");
        assert!(left.bits == before, "rank {rank} moved");
    }
}

#[test]
fn who_is_asked_to_stop_stops_all_after_the_step() {
    let (all, _) = with(Fault::Stop);
    let three = Plan {
        steps: 3,
        ..Plan::default()
    };
    let expected = train(&Alone, &three).bits;
    for (rank, left) in all.iter().enumerate() {
        assert!(left.error.is_none(), "{:?}", left.error);
        assert!(left.stopped && left.steps == 3, "rank {rank}");
        assert!(left.bits == expected, "rank {rank}");
    }
}

#[test]
fn a_disk_that_is_full_on_the_first_rank_is_everyones_error() {
    let plan = Plan {
        to: Some("/nowhere/at/all".into()),
        ..Plan::default()
    };
    for (rank, left) in on(3, |group| train(group, &plan)).0.iter().enumerate() {
        let text = left.error.as_ref().unwrap().to_string();
        assert_eq!(text.starts_with("rank 0: "), rank != 0, "{text}");
        assert!(text.contains("/nowhere/at/all"), "{text}");
    }
}

#[test]
fn a_rank_at_another_step_is_an_error_on_all() {
    let all = on(2, |group| -> Result<String> {
        let mut run = Run::new(&Plan::default())?;
        if group.rank() == 1 {
            let made = run.step(&Alone)?;
            run.optimizer.step(&made.gradients)?;
        }
        Ok(run.step(group).unwrap_err().to_string())
    });
    for error in all.0 {
        assert_eq!(
            error.unwrap(),
            "rank 1: it is at step 2, expected 1 as rank 0"
        );
    }
}

#[test]
fn replicas_that_drift_apart_are_told_by_the_tensor() {
    let all = on(3, |group| -> Result<String> {
        let run = Run::new(&Plan::default())?;
        check_replicas(group, &run.optimizer)?;
        let (name, var) = run.optimizer.named_vars().remove(1);
        if group.rank() == 2 {
            // By the last bit of what training would make of it.
            var.set(&(var.as_tensor() + 1e-7)?)?;
        }
        let error = check_replicas(group, &run.optimizer)
            .unwrap_err()
            .to_string();
        let expected = format!("rank 2: after step 0 its `trained.{name}` is not that of rank 0");
        assert!(error.starts_with(&expected), "{error}");
        Ok(error)
    });
    all.0.into_iter().for_each(|error| drop(error.unwrap()));
}
