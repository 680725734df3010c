//! The shape of `compare.json`, where one is named by `CANDLE_DOFT_COMPARE`.

use serde_json::Value;

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
