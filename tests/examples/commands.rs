//! The examples as programs: what they print, how they end. `cargo test` builds them.

use crate::common::golden::{cases, golden};
use crate::common::programs::example;
use crate::common::tensors::{CPU, relative};
use crate::common::tolerance::GOLDEN_WEIGHTS;
use candle_core::safetensors;
use std::path::Path;
use std::process::Output;

/// Runs an example, where it was built.
fn run(name: &str, arguments: &[&str]) -> Option<Output> {
    Some(example(name)?.args(arguments).output().unwrap())
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn merge_writes_the_weights_of_the_golden_files() {
    let home = tempfile::tempdir().unwrap();
    let output = home.path().join("merged.safetensors");
    let mut seen = 0;
    for folder in cases("onetrainer") {
        let case = folder.file_name().unwrap().to_str().unwrap();
        let base = folder.join("base.safetensors");
        let io = safetensors::load(folder.join("io.safetensors"), &CPU).unwrap();
        for flavour in ["adapter.safetensors", "adapter.internal.safetensors"] {
            let adapter = folder.join(flavour);
            // The internal file of that case has the names of another model: a matter of the library.
            if !adapter.exists() || (case == "mangled_legacy" && flavour.contains("internal")) {
                continue;
            }
            let mut arguments = vec!["--base", path(&base), "--adapter", path(&adapter)];
            arguments.extend(["--output", path(&output)]);
            if (case, flavour) == ("doft_g1_early_linear", "adapter.safetensors") {
                arguments.extend(["--divisor", "sqrtn"]);
            }
            let Some(run) = run("merge", &arguments) else {
                return;
            };
            assert!(run.status.success(), "{case}: {run:?}");
            let merged = safetensors::load(&output, &CPU).unwrap();
            let expected = io
                .iter()
                .filter(|(name, _)| name.ends_with("w_eff") && !name.starts_with("as_loaded"));
            for (_, expected) in expected {
                let expected = expected.flatten_all().unwrap();
                let near = |w: &candle_core::Tensor| {
                    let w = w.flatten_all().unwrap();
                    w.dims() == expected.dims() && relative(&w, &expected) <= GOLDEN_WEIGHTS
                };
                assert!(merged.values().any(near), "{case}, {flavour}");
                seen += 1;
            }
        }
    }
    assert!(seen >= 50, "only {seen} weights");
    for folder in cases("peft") {
        let base = folder.join("base.safetensors");
        let mut arguments = vec!["--base", path(&base), "--adapter", path(&folder)];
        arguments.extend(["--output", path(&output)]);
        let Some(run) = run("merge", &arguments) else {
            return;
        };
        assert!(run.status.success(), "{folder:?}: {run:?}");
        let expected = safetensors::load(folder.join("expected.safetensors"), &CPU).unwrap();
        for (name, weight) in safetensors::load(&output, &CPU).unwrap() {
            assert!(
                relative(&weight, &expected[&name]) <= GOLDEN_WEIGHTS,
                "{folder:?}, {name}"
            );
        }
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
    for example in [
        "inspect",
        "merge",
        "convert",
        "combine",
        "extract",
        "quickstart",
    ] {
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

#[test]
fn a_file_of_another_sort_is_called_by_its_name() {
    let home = tempfile::tempdir().unwrap();
    let adapter = golden("peft/linear_default");
    let (file, output) = (home.path().join("file"), home.path().join("output"));
    for (content, parts) in [
        ("GGUF and more of it", ["a GGUF file", "safetensors"]),
        ("PK\x03\x04 and more", ["a zip archive", "safetensors"]),
        (
            "version https://git-lfs.github.com/spec/v1",
            ["Git LFS", "git lfs pull"],
        ),
        (
            "plain text, and more",
            ["does not begin", "length of a header"],
        ),
    ] {
        std::fs::write(&file, content).unwrap();
        let Some(inspected) = run("inspect", &["--adapter", path(&file)]) else {
            return;
        };
        let arguments = ["--adapter", path(&adapter), "--base", path(&file)];
        let arguments = [arguments.as_slice(), &["--output", path(&output)]].concat();
        for ended in [inspected, run("merge", &arguments).unwrap()] {
            assert_eq!(ended.status.code(), Some(1));
            let said = String::from_utf8(ended.stderr).unwrap();
            assert_eq!(said.lines().count(), 1, "{said}");
            for part in parts {
                assert!(said.contains(part), "no `{part}` in {said}");
            }
        }
    }
}

#[test]
fn an_output_that_cannot_be_is_named_with_what_would_do() {
    let home = tempfile::tempdir().unwrap();
    let adapter = golden("peft/linear_default");
    let base = adapter.join("base.safetensors");
    let (folder, file) = (home.path().join("folder"), home.path().join("file"));
    std::fs::create_dir(&folder).unwrap();
    std::fs::copy(&base, folder.join("model.safetensors")).unwrap();
    std::fs::write(&file, "").unwrap();
    let lost = home.path().join("none").join("merged.safetensors");
    for (base, output, part) in [
        (&base, &lost, "none does not exist; make it first"),
        (&base, &folder, "a folder, expected a file"),
        (&folder, &file, "a file, expected a folder"),
    ] {
        let arguments = ["--adapter", path(&adapter), "--base", path(base)];
        let arguments = [arguments.as_slice(), &["--output", path(output)]].concat();
        let Some(ended) = run("merge", &arguments) else {
            return;
        };
        assert_eq!(ended.status.code(), Some(1));
        let said = String::from_utf8(ended.stderr).unwrap();
        assert!(said.contains(part) && !said.contains(".doft"), "{said}");
    }
    assert!(!lost.exists());
    assert_eq!(std::fs::read(&file).unwrap(), b"");
}

#[test]
fn a_peft_folder_without_its_configuration_is_read_with_a_warning() {
    let home = tempfile::tempdir().unwrap();
    let name = "adapter_model.safetensors";
    let from = golden("peft/linear_default").join(name);
    std::fs::copy(from, home.path().join(name)).unwrap();
    let Some(ended) = run("inspect", &["--adapter", path(home.path())]) else {
        return;
    };
    assert!(ended.status.success(), "{ended:?}");
    let said = String::from_utf8(ended.stdout).unwrap();
    assert!(said.contains("no adapter_config.json beside it"), "{said}");
}

/// A folder that is there and takes no files, whoever asks.
#[cfg(target_os = "linux")]
#[test]
fn a_folder_that_cannot_be_written_to_is_told_before_the_work() {
    let arguments = ["--out", "/proc/self", "--steps", "1000000"];
    let Some(ended) = run("quickstart", &arguments) else {
        return;
    };
    assert_eq!(ended.status.code(), Some(1));
    let said = String::from_utf8(ended.stderr).unwrap();
    assert!(
        said.starts_with("error: cannot write into /proc/self"),
        "{said}"
    );
}

#[test]
fn a_device_is_refused_in_plain_words_before_anything_is_read() {
    let home = tempfile::tempdir().unwrap();
    let out = home.path().join("out");
    let programs: [(&str, &[&str]); 5] = [
        ("quickstart", &["--out", path(&out)]),
        ("finetune", &["--model", "none.gguf", "--out", path(&out)]),
        ("generate", &["--model", "none.gguf", "--prompt", "?"]),
        ("compare", &["--out", path(&out)]),
        ("bert", &["--model", "none"]),
    ];
    let mut refused = vec![
        ("tpu", "expected cpu, cuda, cuda:N or metal"),
        ("cuda:", "expected the number of a card after `cuda:`"),
        ("cuda:+1", "as in cuda:1, and found `+1`"),
        ("cpu:1", "expected cpu, cuda, cuda:N or metal"),
    ];
    if !cfg!(feature = "cuda") {
        refused.push(("cuda:1", "cargo build --release --features cuda --examples"));
    }
    if !cfg!(feature = "metal") {
        refused.push(("metal", "without the feature `metal`"));
    }
    for (name, arguments) in programs {
        for (device, expected) in &refused {
            let Some(run) = run(name, &[arguments, &["--device", device]].concat()) else {
                return;
            };
            let told = String::from_utf8_lossy(&run.stderr);
            assert_eq!(run.status.code(), Some(2), "{name} {device}: {told}");
            assert!(told.contains(expected), "{name} {device}: {told}");
            assert!(!out.exists(), "{name} {device}");
        }
    }
}
