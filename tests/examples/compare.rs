//! A sweep in parts; and the shape of `compare.json`, where one is named by `CANDLE_DOFT_COMPARE`.

use crate::common::programs::example;
use serde_json::Value;
use std::path::Path;

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

/// The runs of a folder but for their times, in one order.
fn runs(folder: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(folder.join("runs-turned.jsonl")).unwrap();
    let run = |line: &str| {
        let mut run: Value = serde_json::from_str(line).unwrap();
        run["seconds_per_step"] = Value::Null;
        run.to_string()
    };
    let mut runs: Vec<String> = text.lines().skip(1).map(run).collect();
    runs.sort();
    runs
}

#[test]
fn parts_of_a_sweep_join_to_the_runs_of_the_whole_one() {
    let home = tempfile::tempdir().unwrap();
    let folder = |name: &str| home.path().join(name);
    let run = |more: &[&str]| -> Option<String> {
        let common = "--quick --task turned --methods oft:16 lora:2 --steps 4";
        let mut command = example("compare")?;
        let done = command.args(common.split(' ')).args(more).output().unwrap();
        assert!(done.status.success(), "{more:?}: {done:?}");
        Some(String::from_utf8(done.stdout).unwrap())
    };
    let at = |name: &str| folder(name).display().to_string();
    let Some(out) = run(&["--shard", "1/1", "--out", &at("whole")]) else {
        return;
    };
    assert_eq!(out, "turned: runs of part 1/1: 12\n");
    for part in ["1", "2", "3"] {
        let shard = format!("{part}/3");
        run(&["--shard", &shard, "--out", &at(part)]);
    }
    let merge = |parts: &[&str]| {
        let folders: Vec<String> = parts.iter().map(|part| at(part)).collect();
        let out = at("joined");
        let mut flags = vec!["--out", out.as_str(), "--merge"];
        flags.extend(folders.iter().map(String::as_str));
        run(&flags).unwrap()
    };
    let lacking = merge(&["1", "3"]);
    assert!(lacking.contains("runs taken in: 8\n"), "{lacking}");
    for method in ["OFT b16", "LoRA r2"] {
        let line = format!("turned: {method} lacks runs: --lrs 0.016\n");
        assert!(lacking.contains(&line), "{lacking}");
    }
    // After so few steps the highest rate is the best.
    let whole = merge(&["1", "2"]);
    assert!(whole.contains("runs taken in: 4\n"), "{whole}");
    let line = "turned: the best rate of OFT b16 lies at an end: --lrs 0.256\n";
    assert!(whole.contains(line), "{whole}");
    assert_eq!(runs(&folder("joined")), runs(&folder("whole")));

    run(&["--shard", "1/1", "--lrs", "0.256", "--out", &at("more")]);
    let further = merge(&["more"]);
    assert!(!further.contains(line), "{further}");
}
