//! What `compare` says with numbers: its statistics, and the shape of `compare.json` where one is named
//! by `CANDLE_DOFT_COMPARE`.

#[path = "../examples/compare/stats.rs"]
#[allow(dead_code, reason = "the example uses the rest")]
mod stats;

use candle_doft::rng::SplitMix64;
use serde_json::Value;
use stats::{geometric, interval, median, student};

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

fn number(run: &Value, key: &str) -> f64 {
    let value = run[key].as_f64();
    let value = value.unwrap_or_else(|| panic!("`{key}` is {} in {run}", run[key]));
    assert!(value.is_finite());
    value
}

/// The methods that a task has runs of.
fn methods(value: &Value, task: &str) -> Vec<String> {
    let runs = value["runs"].as_array().unwrap().iter();
    let mut methods: Vec<String> = runs
        .filter(|run| run["task"] == task)
        .map(|run| run["method"].as_str().unwrap().to_string())
        .collect();
    methods.sort();
    methods.dedup();
    methods
}

#[test]
fn compare_json_has_its_shape() {
    let Ok(file) = std::env::var("CANDLE_DOFT_COMPARE") else {
        println!("SKIPPED: CANDLE_DOFT_COMPARE names no compare.json");
        return;
    };
    let text = std::fs::read_to_string(&file).unwrap();
    let value: Value = serde_json::from_str(&text).unwrap();
    for run in value["runs"].as_array().unwrap() {
        assert!(run["task"].is_string() && run["method"].is_string());
        assert!(number(run, "lr") > 0.);
        assert!(number(run, "trainable_parameters") >= 1.);
        assert!(run["seed"].is_u64() && run["diverged"].is_boolean());
        for key in ["validation", "test", "original_task"] {
            let accuracy = number(run, key);
            assert!((0. ..=1.).contains(&accuracy), "{key}: {accuracy}");
        }
        assert!(number(run, "seconds_per_step") >= 0.);
        match &run["steps_to_target"] {
            Value::Null => {}
            steps => assert!(steps.is_u64(), "{steps}"),
        }
    }
    let tasks = value["summary"]["tasks"].as_array().unwrap();
    let names: Vec<&str> = tasks.iter().map(|t| t["task"].as_str().unwrap()).collect();
    assert_eq!(names, ["turned", "pairs"]);
    for task in tasks {
        let made = methods(&value, task["task"].as_str().unwrap());
        for method in task["methods"].as_array().unwrap() {
            let name = method["method"].as_str().unwrap();
            assert!(made.iter().any(|m| m == name), "no run of {name}");
            let test = &method["test"];
            let (mean, low, high) = (
                number(test, "mean"),
                number(test, "low"),
                number(test, "high"),
            );
            assert!(low <= mean && mean <= high);
            assert!(number(test, "n") >= 2.);
        }
        for name in ["lora", "dora", "oft", "doft", "doft_unscaled", "full"] {
            assert!(made.iter().any(|m| m == name), "no run of {name}");
        }
        assert!(!task["pairs"].as_array().unwrap().is_empty());
        for cost in task["costs"].as_array().unwrap() {
            assert!(number(&cost["seconds_per_step"], "mean") > 0.);
        }
        for look in task["orthogonality"].as_array().unwrap() {
            if look["method"] == "doft" {
                for point in look["trace"].as_array().unwrap() {
                    assert!(number(point, "orthogonality_error") < 1e-5);
                }
            }
        }
    }
    let folder = std::path::Path::new(&file).parent().unwrap();
    for picture in ["curves.svg", "rates.svg", "blocks.svg", "norms.svg"] {
        let svg = std::fs::read_to_string(folder.join(picture)).unwrap();
        assert!(svg.starts_with("<svg") && !svg.contains("NaN"), "{picture}");
    }
}
