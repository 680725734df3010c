//! The examples as programs: what they print, how they end. `cargo test` builds them.

mod support;

use candle_core::safetensors;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use support::tensors::{CPU, relative};

fn golden(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(case)
}

/// Runs an example, where it was built.
fn run(example: &str, arguments: &[&str]) -> Option<Output> {
    let test = std::env::current_exe().unwrap();
    let program = test.parent()?.parent()?.join("examples").join(example);
    if !program.exists() {
        println!("SKIPPED: the example {example} is not built; `cargo test` builds it");
        return None;
    }
    Some(Command::new(program).args(arguments).output().unwrap())
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn merge_writes_the_weights_of_the_golden_files() {
    let home = tempfile::tempdir().unwrap();
    let output = home.path().join("merged.safetensors");
    for case in [
        "doft_g3_linear",
        "doft_g3_conv3x3",
        "cans_large",
        "doft_g1_early_linear",
    ] {
        let folder = golden("onetrainer").join(case);
        let (base, adapter) = (
            folder.join("base.safetensors"),
            folder.join("adapter.safetensors"),
        );
        let mut arguments = vec!["--base", path(&base), "--adapter", path(&adapter)];
        arguments.extend(["--output", path(&output)]);
        if case == "doft_g1_early_linear" {
            arguments.extend(["--divisor", "sqrtn"]);
        }
        let Some(run) = run("merge", &arguments) else {
            return;
        };
        assert!(run.status.success(), "{case}: {run:?}");
        let io = safetensors::load(folder.join("io.safetensors"), &CPU).unwrap();
        let merged = safetensors::load(&output, &CPU).unwrap();
        let mut weights = merged.iter().filter(|(name, _)| name.ends_with(".weight"));
        let weight = weights.next().unwrap().1.flatten_all().unwrap();
        assert!(
            relative(&weight, &io["w_eff"].flatten_all().unwrap()) <= 2e-6,
            "{case}"
        );
    }
}

#[test]
fn inspect_answers_json_and_warns_of_the_ambiguous_divisor() {
    let adapter = golden("onetrainer/doft_g1_early_linear/adapter.safetensors");
    let Some(run) = run("inspect", &["--adapter", path(&adapter), "--json"]) else {
        return;
    };
    assert!(run.status.success());
    let json: serde_json::Value = serde_json::from_slice(&run.stdout).unwrap();
    assert_eq!(json["dialect"], "onetrainer");
    assert!(json["warnings"][0].as_str().unwrap().contains("divisor"));
    assert_eq!(json["layers"][0]["block_size"], 16);
    for key in [
        "path",
        "kind",
        "blocks",
        "map",
        "magnitude",
        "max_angle_degrees",
    ] {
        assert!(json["layers"][0].get(key).is_some(), "{key}");
    }
}

#[test]
fn errors_are_one_line_and_codes_are_those_of_the_table() {
    let home = tempfile::tempdir().unwrap();
    let missing = home.path().join("missing.safetensors");
    for example in ["inspect", "merge", "convert", "quickstart"] {
        let Some(help) = run(example, &["--help"]) else {
            return;
        };
        assert!(help.status.success() && !help.stdout.is_empty());
        let wrong = run(example, &["--no-such-flag"]).unwrap();
        assert_eq!(wrong.status.code(), Some(2), "{example}");
    }
    let failed = run("inspect", &["--adapter", path(&missing)]).unwrap();
    assert_eq!(failed.status.code(), Some(1));
    let said = String::from_utf8(failed.stderr).unwrap();
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(
        said.starts_with("error: ") && said.contains("missing.safetensors"),
        "{said}"
    );
    let source = golden("onetrainer/doft_g3_linear/adapter.safetensors");
    let output = home.path().join("peft");
    let arguments = [
        "--adapter",
        path(&source),
        "--output",
        path(&output),
        "--to",
        "peft",
    ];
    let refused = run("convert", &arguments).unwrap();
    assert_eq!(refused.status.code(), Some(1));
    assert!(!output.exists());
}
