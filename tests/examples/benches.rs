//! What the benches say with numbers: dates, tables, and whether a bound is kept.

use crate::bounds::BOUNDS;
use crate::markdown;
use crate::results::{Entry, Estimate};
use crate::support::context::civil;
use serde_json::{Value, json};

fn context(quick: bool) -> Value {
    json!({
        "cpu": "a processor",
        "cores": 2,
        "rustc": "1.95.0",
        "candle": "0.11.1",
        "allocator": "mimalloc",
        "date": "2026-11-25",
        "quick": quick,
    })
}

fn entry(what: &str, shape: &str, pair: (&str, &str), median: f64) -> Entry {
    let entry = json!({
        "what": what,
        "shape": shape,
        "numerator": pair.0,
        "denominator": pair.1,
        "median": median,
        "low": median - 0.01,
        "high": median + 0.01,
        "numerator_seconds": 0.0123,
        "denominator_seconds": 0.01,
        "context": context(false),
    });
    serde_json::from_value(entry).expect("an entry")
}

fn verdict(start: &str, entries: &[Entry]) -> String {
    let bound = BOUNDS.iter().find(|bound| bound.what.starts_with(start));
    bound.expect("a bound").verdict(entries)
}

#[test]
fn dates_are_those_of_the_calendar() {
    assert_eq!(civil(0), (1970, 1, 1));
    assert_eq!(civil(11_016), (2000, 2, 29));
    assert_eq!(civil(20_453), (2025, 12, 31));
    assert_eq!(civil(47_541), (2100, 3, 1));
}

#[test]
fn a_median_above_its_bound_does_not_keep_it() {
    let step = |shape, median| entry("linear_step", shape, ("doft", "frozen"), median);
    let square = "512x1024x1024";
    let start = "`doft` against `frozen`";
    assert_eq!(verdict(start, &[]), "not measured");
    assert_eq!(verdict(start, &[step(square, 1.10)]), "yes");
    assert_eq!(verdict(start, &[step(square, 1.104)]), "no");
    // That of another shape says nothing.
    assert_eq!(verdict(start, &[step("512x3072x768", 1.)]), "not measured");
    let start = "the same at 2048x1024x1024";
    let both = [step("2048x1024x1024", 1.05), step("128x4096x4096", 1.2)];
    assert_eq!(verdict(start, &both[..1]), "not measured");
    assert_eq!(verdict(start, &both), "1 of 2");
    // Without a shape of its own a bound is for all.
    let oft = |shape, median| entry("linear_step", shape, ("doft", "oft"), median);
    let all = [oft(square, 1.01), oft("128x4096x4096", 1.05)];
    assert_eq!(verdict("`doft` against `oft`", &all), "1 of 2");
}

/// Two limits in one line, each for its own entry.
#[test]
fn a_quick_model_says_nothing_about_the_whole_one() {
    let step = |shape| entry("llm_step", shape, ("doft", "gemm"), 1.5);
    let start = "`llm_step`";
    assert_eq!(verdict(start, &[step("4x128, 2 layers")]), "not measured");
    assert_eq!(verdict(start, &[step("4x128, 30 layers")]), "yes");
    let map = |below, median| entry("rotation", "32x32", ("cayley", below), median);
    let maps = [map("series", 0.9), map("doft_step", 0.03)];
    assert_eq!(verdict("exact Cayley", &maps), "1 of 2");
}

#[test]
fn the_table_says_what_was_asked_found_and_where() {
    let entries = [
        entry("linear_step", "512x1024x1024", ("doft", "frozen"), 1.104),
        entry("linear_step", "512x1024x1024", ("frozen", "gemm"), 1.2),
        entry("linear_step", "128x4096x4096", ("doft", "frozen"), 1.05),
        entry("linear_step", "128x4096x4096", ("frozen", "gemm"), 1.02),
        entry("decode", "1x1024x1024", ("cached", "merged"), 1.2),
    ];
    let text = markdown::bounds(&BOUNDS, &entries);
    let line =
        "| `doft` against `frozen`, b = 32, 512x1024x1024 | 1.10 | 1.104 [1.094, 1.114] | no |";
    assert!(text.contains(line), "{text}");
    let place = "2 cores of a processor, Rust 1.95.0, candle 0.11.1, mimalloc, 2026-11-25.";
    assert!(text.contains(place), "{text}");
    assert!(!text.contains("quick"), "{text}");
    let text = markdown::ratios(&entries);
    for line in [
        "|  | 512x1024x1024 | 128x4096x4096 |",
        "| doft over frozen | 1.10 [1.09, 1.11] | 1.05 [1.04, 1.06] |",
        "| cached over merged | 1x1024x1024 | 1.20 [1.19, 1.21] | 12.3 and 10.0 ms |",
    ] {
        assert!(text.contains(line), "{text}");
    }
}

#[test]
fn growth_and_criterion_have_the_floor_beside_the_rest() {
    let here = serde_json::from_value(context(false)).expect("a context");
    let ratio = |median| json!({ "median": median, "low": median, "high": median });
    let growth = json!({
        "context": context(true),
        "sweeps": [{
            "name": "tokens",
            "fixed": "b = 32",
            "points": [{
                "value": 512,
                "seconds": { "doft": 0.012, "frozen": 0.011, "gemm": 0.01 },
                "ratios": {
                    "doft/frozen": ratio(1.09),
                    "doft/gemm": ratio(1.2),
                    "frozen/gemm": ratio(1.1),
                },
            }],
        }],
    });
    let text = markdown::growth(&serde_json::from_value(growth).expect("a growth"));
    for line in [
        "| tokens | gemm, ms | frozen, ms | doft, ms |",
        "| 512 | 10.0 | 11.0 | 12.0 | 1.10 [1.10, 1.10] | 1.20 [1.20, 1.20] |",
        "A quick run: rough, not to be published.",
    ] {
        assert!(text.contains(line), "{text}");
    }
    let estimate = |method: &str, value: &str| Estimate {
        group: "linear_step".into(),
        method: method.into(),
        value: value.into(),
        seconds: 0.01,
        at: std::time::UNIX_EPOCH,
    };
    let estimates = [
        estimate("gemm", "8x4x4"),
        estimate("doft", "8x4x4"),
        estimate("doft", "1x4x4"),
    ];
    let text = markdown::criterion(&estimates, &here);
    for line in [
        "|  | 8x4x4 | 1x4x4 |",
        "| gemm | 10.0 |  |",
        "| doft | 10.0 | 10.0 |",
    ] {
        assert!(text.contains(line), "{text}");
    }
}
