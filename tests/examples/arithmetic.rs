//! `convert`, `combine` and `extract` as programs.

use crate::common::golden::golden;
use crate::common::programs::example;
use crate::common::tensors::{CPU, relative};
use candle_core::safetensors::load;
use std::path::Path;
use std::process::Output;

fn run(name: &str, arguments: &[&str]) -> Option<Output> {
    Some(example(name)?.args(arguments).output().unwrap())
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn json(output: &Output) -> serde_json::Value {
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn an_adapter_is_mended_combined_merged_and_extracted() {
    let home = tempfile::tempdir().unwrap();
    let at = |name: &str| home.path().join(name);
    let case = golden("onetrainer/doft_g3_linear");
    let (base, source) = (
        case.join("base.safetensors"),
        case.join("adapter.safetensors"),
    );
    let (cayley, mean, merged) = (at("cayley"), at("mean"), at("merged"));
    let arguments = [
        "--adapter",
        path(&source),
        "--base",
        path(&base),
        "--to",
        "doft",
    ];
    let mend = ["--project", "cayley", "--json", "--output", path(&cayley)];
    let Some(done) = run("convert", &[&arguments[..], &mend].concat()) else {
        return;
    };
    let told = json(&done);
    assert_eq!(told["changes"][0]["cause"], "projection");
    let share = told["changes"][0]["weight_share"].as_f64().unwrap();
    assert!(share > 1e-3 && share < 0.1, "{share}");
    let weighted = format!("{}=0.5", path(&cayley));
    let arguments = [
        "--mode",
        "mean",
        "--adapter",
        &weighted,
        "--adapter",
        &weighted,
    ];
    let done = run(
        "combine",
        &[&arguments[..], &["--output", path(&mean)]].concat(),
    )
    .unwrap();
    assert!(done.status.success(), "{done:?}");
    let arguments = [
        "--base",
        path(&base),
        "--adapter",
        path(&mean),
        "--output",
        path(&merged),
    ];
    assert!(run("merge", &arguments).unwrap().status.success());
    let found = at("found");
    let arguments = [
        "--base",
        path(&base),
        "--tuned",
        path(&merged),
        "--output",
        path(&found),
    ];
    let more = ["--block-size", "16", "--targets", "**.to_q", "--json"];
    let told = json(&run("extract", &[&arguments[..], &more].concat()).unwrap());
    assert!(told["explained"].as_f64().unwrap() > 0.9999);
    assert!(told["layers"][0]["explained_by_rotation"].as_f64().unwrap() < 0.99);
    // Its 12 rows leave blocks of 16 free, so the adapter is another one, and the weights are the same.
    let again = at("again");
    let arguments = [
        "--base",
        path(&base),
        "--adapter",
        path(&found),
        "--output",
        path(&again),
    ];
    assert!(run("merge", &arguments).unwrap().status.success());
    let (found, expected) = (load(&again, &CPU).unwrap(), load(&merged, &CPU).unwrap());
    for (name, expected) in expected {
        let off = relative(&found[&name], &expected);
        assert!(off < 1e-6, "{name}: {off:e}");
    }
}

#[test]
fn wrong_arguments_are_told_and_nothing_is_written() {
    let home = tempfile::tempdir().unwrap();
    let output = home.path().join("output");
    let case = golden("onetrainer/doft_g3_linear");
    let (base, source) = (
        case.join("base.safetensors"),
        case.join("adapter.safetensors"),
    );
    let (base, source, out) = (path(&base), path(&source), path(&output));
    let weighted = format!("{source}=0.5");
    for (name, arguments, code, part) in [
        (
            "combine",
            vec![
                "--mode",
                "product",
                "--adapter",
                source,
                "--adapter",
                &weighted,
            ],
            2,
            "a product has no weights",
        ),
        (
            "combine",
            vec![
                "--mode",
                "mean",
                "--adapter",
                source,
                "--adapter",
                &weighted,
            ],
            2,
            "1 of 2 adapters have a weight",
        ),
        (
            "combine",
            vec!["--mode", "mean", "--adapter", &weighted],
            1,
            "expected two or more",
        ),
        (
            "combine",
            vec!["--mode", "mean", "--adapter", source, "--adapter", source],
            1,
            "project it first",
        ),
        (
            "extract",
            vec!["--base", base, "--tuned", base],
            1,
            "nothing to extract",
        ),
        (
            "convert",
            vec!["--adapter", source, "--to", "doft", "--strength", "0.5"],
            1,
            "project it on the Cayley map first",
        ),
        (
            "convert",
            vec!["--adapter", source, "--to", "doft", "--strength-for", "a"],
            2,
            "expected PATTERN=S",
        ),
        (
            "convert",
            vec!["--adapter", source, "--to", "doft", "--strength-for", "a=1"],
            1,
            "matches no layer",
        ),
        (
            "convert",
            vec!["--adapter", source, "--to", "series"],
            1,
            "`--drop-magnitude` goes on without",
        ),
    ] {
        let arguments = [&arguments[..], &["--output", out]].concat();
        let Some(ended) = run(name, &arguments) else {
            return;
        };
        let said = String::from_utf8(ended.stderr).unwrap();
        assert_eq!(ended.status.code(), Some(code), "{name}: {said}");
        assert!(said.contains(part), "{name}: {said}");
        assert!(code == 2 || said.lines().count() == 1, "{name}: {said}");
        assert!(!output.exists(), "{name}");
    }
}
