//! Means, medians and their intervals.

use crate::support::stats::{VALUES, geometric, interval, median, median_interval, student};
use candle_doft::rng::SplitMix64;

#[test]
fn quantiles_of_student_are_those_of_tables() {
    let table = [
        (1, 12.7062),
        (4, 2.7764),
        (10, 2.2281),
        (11, 2.2010),
        (19, 2.0930),
        (30, 2.0423),
        (120, 1.9799),
    ];
    for (degrees, expected) in table {
        let found: f64 = student(degrees);
        assert!((found - expected).abs() <= 2e-4, "{degrees}: {found}");
    }
}

#[test]
fn intervals_hold_the_mean_as_often_as_they_say() {
    let mut rng = SplitMix64::new(5);
    let (mut held, trials) = (0, 4000);
    for _ in 0..trials {
        let sample: Vec<f64> = (0..5).map(|_| 3. + rng.normal()).collect();
        let found = interval(&sample).unwrap();
        held += usize::from(found.low <= 3. && 3. <= found.high);
    }
    // 95 %, give or take four standard errors.
    let share = held as f64 / f64::from(trials);
    assert!((share - 0.95).abs() < 0.014, "{share}");
}

#[test]
fn an_interval_needs_two_finite_values() {
    assert_eq!(interval(&[1.]), None);
    assert_eq!(interval(&[1., f64::NAN]), None);
    assert_eq!(geometric(&[1., 0.]), None);
    let mean = geometric(&[1., 4.]).unwrap().mean;
    assert!((mean - 2.).abs() <= 4. * f64::EPSILON, "{mean}");
    assert_eq!(median(&[3., 1., 2.]), 2.);
    assert_eq!(median(&[3., 1.]), 2.);
}

#[test]
fn intervals_hold_the_median_as_often_as_they_say() {
    let mut rng = SplitMix64::new(7);
    for n in [VALUES, 25, 200] {
        let (mut held, trials) = (0, 4000);
        for _ in 0..trials {
            // Exponential: lopsided, as times are.
            let values: Vec<f64> = (0..n).map(|_| -(1. - rng.uniform()).ln()).collect();
            let found = median_interval(&values);
            assert!(found.low <= found.median && found.median <= found.high);
            let median = 2f64.ln();
            held += usize::from(found.low <= median && median <= found.high);
        }
        let share = f64::from(held as u32) / f64::from(trials);
        // Order statistics are whole numbers, so an interval may hold more, never four standard errors less.
        assert!(share > 0.95 - 0.014, "{share} at {n}");
        assert!(n < 25 || share < 0.985, "{share} at {n}");
    }
}

#[test]
fn medians_lie_in_the_middle() {
    assert_eq!(median(&[3., 1., 2.]), 2.);
    assert_eq!(median(&[4., 1., 2., 3.]), 2.5);
}
