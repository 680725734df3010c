//! What ranks say to one another outside a step.

use crate::threads::on;
use candle_doft::train::parallel::{Alone, agree, any, each, lead, open, same, share};
use candle_doft::{Error, Result};

fn refused(what: &str) -> Result<u8> {
    Err(Error::NotAdapted { layer: what.into() })
}

#[test]
fn a_phase_succeeds_on_all_ranks_or_on_none() {
    let all = on(3, |group| {
        let good: Result<usize> = agree(group, Ok(group.rank()));
        assert_eq!(good.unwrap(), group.rank());
        let result = match group.rank() {
            0 => Ok(1),
            rank => refused(&format!("of {rank}")),
        };
        agree(group, result).unwrap_err().to_string()
    });
    let own = |rank| {
        format!(
            "layer `of {rank}` has no rotation: it is outside the targets, or has low-rank matrices"
        )
    };
    // Each that failed tells its own, the others that of the first.
    assert_eq!(all.0, [format!("rank 1: {}", own(1)), own(1), own(2)]);
}

/// Text is cut, also inside a letter of several bytes.
#[test]
fn a_long_error_of_another_rank_is_cut() {
    let long = "é".repeat(1000);
    let all = on(2, |group| {
        let result = match group.rank() {
            0 => Ok(0),
            _ => refused(&long),
        };
        agree(group, result).unwrap_err().to_string()
    });
    assert!(
        all.0[0].starts_with("rank 1: layer `éé") && all.0[0].ends_with("é"),
        "{}",
        all.0[0]
    );
    assert!(all.0[0].len() < 600 && all.0[1].len() > 2000);
}

#[test]
fn the_first_rank_works_alone_and_fails_for_all() {
    let all = on(3, |group| {
        let mut worked = false;
        let done: Result<()> = lead(group, || {
            worked = true;
            Ok(())
        });
        done.unwrap();
        assert_eq!(worked, group.rank() == 0);
        let failed: Result<()> = lead(group, || refused("all").map(drop));
        failed.unwrap_err().to_string()
    });
    assert!(all.0[0].starts_with("layer") && all.0[1].starts_with("rank 0: layer"));
    assert_eq!(all.0[1], all.0[2]);
}

#[test]
fn ranks_with_another_value_are_named_with_both() {
    let value = |rank: usize| match rank {
        2 => format!("{{\"{}\": 1, \"lr\": 0.5}}", "x".repeat(100)),
        _ => format!("{{\"{}\": 1, \"lr\": 0.25}}", "x".repeat(100)),
    };
    let all = on(4, |group| -> Result<String> {
        same(group, "the flags", "equal")?;
        Ok(same(group, "the flags", &value(group.rank()))
            .unwrap_err()
            .to_string())
    });
    for error in all.0 {
        let error = error.unwrap();
        assert!(error.starts_with("rank 2: the flags: "), "{error}");
        assert!(
            error.contains("\"lr\": 0.5}, expected ")
                && error.contains("\"lr\": 0.25} as on rank 0"),
            "{error}"
        );
    }
    // One value is the beginning of the other.
    let all = on(2, |group| {
        same(group, "threads", &"1".repeat(1 + group.rank()))
            .unwrap_err()
            .to_string()
    });
    let expected =
        "rank 1: threads: 11, expected 1 as on rank 0; give all ranks the same files and settings";
    assert_eq!(all.0, [expected, expected]);
}

#[test]
fn work_is_shared_and_its_numbers_are_in_order() {
    for size in 1..6 {
        for count in 0..9 {
            let all = on(size, |group| {
                each(group, count, |i| Ok::<_, Error>(i as f64 / 3.)).unwrap()
            });
            let expected: Vec<f64> = (0..count).map(|i| i as f64 / 3.).collect();
            assert!(
                all.0.iter().all(|found| *found == expected),
                "{count} on {size}"
            );
            let shares = on(size, |group| share(group, count)).0;
            let joined: Vec<usize> = shares.into_iter().flatten().collect();
            assert_eq!(joined, (0..count).collect::<Vec<_>>());
        }
    }
    let all = on(2, |group| {
        let failing = |i: usize| match i {
            3 => refused("three").map(f64::from),
            i => Ok(i as f64),
        };
        each(group, 4, failing).unwrap_err().to_string()
    });
    assert!(
        all.0[0].starts_with("rank 1: layer `three`"),
        "{}",
        all.0[0]
    );
}

#[test]
fn one_that_says_so_is_enough() {
    for said in [None, Some(0), Some(2)] {
        let all = on(3, |group| any(group, said == Some(group.rank())).unwrap());
        assert_eq!(all.0, [said.is_some(); 3]);
    }
}

#[test]
fn alone_is_a_group_of_one() -> Result<()> {
    let group = open()?;
    assert_eq!((group.rank(), group.size()), (0, 1));
    let mut received = [0; 3];
    group.all_to_all(&[1, 2, 3], &mut received)?;
    assert_eq!(received, [1, 2, 3]);
    group.all_gather(&[4, 5, 6], &mut received)?;
    assert_eq!(received, [4, 5, 6]);
    assert!(agree(&Alone, refused("here")).is_err());
    assert!(!any(&Alone, false)? && any(&Alone, true)?);
    group.finish()
}
