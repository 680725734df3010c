//! Bad files do no harm: an error each, no panic, no output, the old one intact.

mod support;

use candle_core::{DType, Tensor, safetensors};
use candle_doft::file::{LoadOptions, Target, convert};
use candle_doft::merge::{CheckpointOptions, Merge, Strength, inspect};
use candle_doft::{Adapter, DoftConfig, rng::SplitMix64};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::process::Command;
use support::golden::golden;
use support::tensors::{CPU, linear, seeded};

/// What a reader says of a file of these bytes, in one line.
fn read(file: &Path, bytes: &[u8]) -> Option<String> {
    std::fs::write(file, bytes).unwrap();
    let error = Adapter::load(file, &CPU).err()?.to_string();
    assert!(!error.contains('\n'), "{error}");
    Some(error.replace(&file.display().to_string(), "FILE"))
}

fn file_of(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

#[test]
fn a_onetrainer_file_cut_anywhere_or_with_bytes_changed_never_panics() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("adapter.safetensors");
    for case in ["doft_g1_linear", "clip_active"] {
        let good =
            std::fs::read(golden("onetrainer").join(case).join("adapter.safetensors")).unwrap();
        let header = 8 + u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
        for length in 0..header.min(2000) {
            assert!(read(&file, &good[..length]).is_some());
        }
        let mut rng = SplitMix64::new(9);
        let mut refused = 0;
        for _ in 0..5000 {
            let mut bytes = good.clone();
            // Half of the flips hit the header, where they tell more.
            let reach = if rng.below(2) == 0 {
                header
            } else {
                bytes.len()
            };
            let place = rng.below(reach);
            bytes[place] ^= 1 << rng.below(8);
            refused += usize::from(read(&file, &bytes).is_some());
        }
        assert!(
            refused > 1000,
            "{case}: only {refused} of 5000 were noticed"
        );
    }
}

#[test]
fn headers_that_lie_are_refused_without_allocating_what_they_claim() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("adapter.safetensors");
    let rows = |shape: &str, end: u64| {
        format!(
            r#"{{"a.oft_R.weight":{{"dtype":"F32","shape":{shape},"data_offsets":[0,{end}]}}}}"#
        )
    };
    let two = |name: &str, start: u64, end: u64| {
        format!(
            r#"{{"a.oft_R.weight":{{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]}},"{name}":{{"dtype":"F32","shape":[2,1],"data_offsets":[{start},{end}]}}}}"#
        )
    };
    let huge = 1u64 << 40;
    for (what, bytes) in [
        ("no data", file_of(&rows("[2,1]", 8), 0)),
        ("more data than it says", file_of(&rows("[2,1]", 8), 16)),
        ("an end beyond the file", file_of(&rows("[2,1]", huge), 8)),
        (
            "axes that overflow",
            file_of(&rows("[4294967296,4294967296,4294967296]", 8), 8),
        ),
        (
            "rows without end",
            file_of(&rows(&format!("[{huge},0]"), 0), 0),
        ),
        (
            "columns without end",
            file_of(&rows(&format!("[0,{huge}]"), 0), 0),
        ),
        (
            "entries that overlap",
            file_of(&two("b.oft_R.weight", 4, 12), 12),
        ),
        ("a hole", file_of(&two("b.oft_R.weight", 12, 20), 20)),
        ("no block size", file_of(&rows("[1,2]", 8), 8)),
        ("no rows", file_of(&rows("[0,1]", 0), 0)),
        ("three axes", file_of(&rows("[1,1,2]", 8), 8)),
        ("deep JSON", file_of(&"[".repeat(100_000), 0)),
        ("not JSON", file_of("{", 0)),
        ("not text", file_of("\u{0}\u{1}", 0)),
    ] {
        let error = read(&file, &bytes).unwrap_or_else(|| panic!("{what} was read"));
        assert!(error.starts_with("FILE: "), "{what}: {error}");
    }
    let twice = two("a.oft_R.weight", 8, 16);
    assert!(
        read(&file, &file_of(&twice, 16)).is_some(),
        "the same key twice"
    );
    let spelled = two("a_oft_R_weight", 8, 16);
    let error = read(&file, &file_of(&spelled, 16)).unwrap();
    assert!(
        error.contains("are the same tensor of one layer"),
        "{error}"
    );
}

#[test]
fn markers_and_magnitudes_that_mean_nothing_are_refused() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("adapter.safetensors");
    let rotation = || Tensor::ones((2, 6), DType::F32, &CPU).unwrap();
    let number = |v: f32| Tensor::new(v, &CPU).unwrap();
    let ones = |n: usize| Tensor::ones(n, DType::F32, &CPU).unwrap();
    for (extra, expected) in [
        (
            vec![("a.oft_R.scaled_oft", number(0.5))],
            "its marker `scaled_oft` is Float(0.5)",
        ),
        (
            vec![("a.oft_R.clipped_oft", number(-1.))],
            "its marker `clipped_oft` is Float(-1.0)",
        ),
        (
            vec![("a.oft_R.cans_oft", number(0.))],
            "its marker `cans_oft` is false or 0",
        ),
        (vec![("a.oft_R.scaled_oft", ones(2))], "is not one value"),
        (
            vec![("a.dora_scale", ones(3)), ("a.dora_multiplier", ones(3))],
            "it has several magnitudes",
        ),
        (
            vec![("a.initial_norm", ones(3))],
            "it has `initial_norm` without `dora_scale`",
        ),
        (
            vec![("a.dora_log_multiplier", number(1.))],
            "expected one element for each output",
        ),
        (
            vec![("b.dora_scale", ones(3))],
            "`b.dora_scale` belongs to no rotation in the file",
        ),
        (
            vec![("a.alpha", number(4.))],
            "1 unexpected keys, the first are `a.alpha`",
        ),
        (
            vec![("a.oft_R.spin", number(4.))],
            "1 unexpected keys, the first are `a.oft_R.spin`",
        ),
        (
            vec![("a.dora_log_multiplier", (ones(3) * 1e4).unwrap())],
            "its factor is inf at index 0",
        ),
        (
            vec![
                ("a.dora_scale", (ones(3) * 1e30).unwrap()),
                ("a.initial_norm", (ones(3) * 1e-30).unwrap()),
            ],
            "its factor is inf at index 0",
        ),
        (
            vec![
                ("a.dora_scale", ones(3)),
                ("a.initial_norm", (ones(3) * -1.).unwrap()),
            ],
            "its `initial_norm` holds -1",
        ),
        (
            vec![("a.dora_scale", ones(3)), ("a.initial_norm", ones(4))],
            "its `initial_norm` has 4 elements, its `dora_scale` 3",
        ),
        (
            vec![("a.oft_R.cans_exp", ones(2))],
            "the marker `a.oft_R.cans_exp` is not one value",
        ),
        (
            vec![
                ("a.oft_block_size_metadata", number(4.)),
                ("a.alpha", number(8.)),
            ],
            "`alpha` is 8, its blocks are of size 4",
        ),
        (
            vec![("a.oft_coft_metadata", number(0.5))],
            "`oft_coft_metadata` is 0.5, expected 0 or 1",
        ),
        (
            vec![("a.dora_multiplier", (ones(3) * f64::NAN).unwrap())],
            "has NaN at index 0",
        ),
    ] {
        let mut tensors = HashMap::from([("a.oft_R.weight", rotation())]);
        tensors.extend(extra);
        safetensors::save(&tensors, &file).unwrap();
        let error = Adapter::load(&file, &CPU).expect_err(expected).to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn a_peft_folder_with_a_config_that_means_nothing_is_refused() {
    let home = tempfile::tempdir().unwrap();
    let source = golden("peft/linear_default");
    let (tensors, config) = ("adapter_model.safetensors", "adapter_config.json");
    std::fs::copy(source.join(tensors), home.path().join(tensors)).unwrap();
    let good = std::fs::read_to_string(source.join(config)).unwrap();
    let good: serde_json::Value = serde_json::from_str(&good).unwrap();
    for (field, value, expected) in [
        (
            "peft_type",
            serde_json::json!("VERA"),
            "`peft_type` is \"VERA\", expected OFT",
        ),
        (
            "use_cayley_neumann",
            serde_json::json!(3),
            "`use_cayley_neumann` is 3, expected true or false",
        ),
        (
            "num_cayley_neumann_terms",
            serde_json::json!(65),
            "is 65, expected a whole number up to 64",
        ),
        (
            "fan_in_fan_out",
            serde_json::json!(true),
            "expected false: its base would be stored",
        ),
        (
            "bias",
            serde_json::json!("some"),
            "expected none, oft_only (lora_only",
        ),
        (
            "bias",
            serde_json::json!(3),
            "expected none, oft_only (lora_only",
        ),
        (
            "peft_version",
            serde_json::json!(0.18),
            "`peft_version` is 0.18, expected a version",
        ),
        (
            "modules_to_save",
            serde_json::json!("head"),
            "`modules_to_save` is \"head\", expected a list of names",
        ),
        (
            "eps",
            serde_json::json!(-1),
            "`eps` is -1, expected a finite number from 0",
        ),
        (
            "oft_block_size",
            serde_json::Value::Null,
            "PEFT 0.13 or older",
        ),
    ] {
        let mut changed = good.clone();
        changed[field] = value;
        std::fs::write(home.path().join(config), changed.to_string()).unwrap();
        let error = Adapter::load(home.path(), &CPU)
            .expect_err(field)
            .to_string();
        assert!(error.contains(expected), "{field}: {error}");
    }
    std::fs::write(home.path().join(config), "{".repeat(5000)).unwrap();
    let error = Adapter::load(home.path(), &CPU).unwrap_err().to_string();
    assert!(error.contains("not JSON"), "{error}");
    std::fs::write(home.path().join(config), vec![b' '; 2 << 20]).unwrap();
    let error = Adapter::load(home.path(), &CPU).unwrap_err().to_string();
    assert!(error.contains("larger than 1048576 bytes"), "{error}");
}

#[test]
fn one_row_is_shared_only_where_the_config_says_so() {
    let home = tempfile::tempdir().unwrap();
    let source = golden("peft/linear_block_share");
    let (tensors, config) = ("adapter_model.safetensors", "adapter_config.json");
    std::fs::copy(source.join(tensors), home.path().join(tensors)).unwrap();
    let text = std::fs::read_to_string(source.join(config)).unwrap();
    let text = text.replace(r#""block_share": true"#, r#""block_share": false"#);
    std::fs::write(home.path().join(config), text).unwrap();
    let merge = |folder: &Path| {
        let options = LoadOptions::default();
        let merge = Merge::new().with_file(folder, &options, Strength::default())?;
        let (base, output) = (source.join("base.safetensors"), home.path().join("out"));
        merge.checkpoint(base, output, CheckpointOptions::default())
    };
    assert!(merge(&source).is_ok());
    let error = merge(home.path()).unwrap_err().to_string();
    assert!(
        error.contains("has 1 row of block size 8, though the file shares no block"),
        "{error}"
    );
}

#[test]
fn rows_without_entries_cost_nothing_however_many() {
    let home = tempfile::tempdir().unwrap();
    let (file, output) = (home.path().join("adapter"), home.path().join("peft"));
    let header = r#"{"a.oft_R.weight":{"dtype":"F32","shape":[4294967295,0],"data_offsets":[0,0]},
        "a.oft_coft_metadata":{"dtype":"F32","shape":[],"data_offsets":[0,4]},
        "a.coft_eps_metadata":{"dtype":"F32","shape":[],"data_offsets":[4,8]},
        "a.dora_multiplier":{"dtype":"F32","shape":[1,1],"data_offsets":[8,12]}}"#;
    let mut bytes = file_of(header, 0);
    bytes.extend([1f32; 3].map(f32::to_le_bytes).concat());
    assert_eq!(read(&file, &bytes), None);
    let options = LoadOptions::default();
    let found = inspect(&file, &options, None).unwrap();
    assert_eq!(found.layers[0].max_angle_degrees, 0.);
    let target = Target::Peft {
        drop_magnitude: false,
    };
    convert(&file, &output, target, &options, &BTreeMap::new()).unwrap();
}

/// Where a child of this test finds what it has to do.
const CHILD: &str = "CANDLE_DOFT_HOSTILE_CHILD";

fn saved(folder: &Path) -> PathBuf {
    let builder = Adapter::builder(DoftConfig::default(), &CPU).unwrap();
    builder
        .wrap("q", linear(512, 512, false, DType::F32).unwrap())
        .unwrap();
    let adapter = builder.finish().unwrap();
    let file = folder.join("adapter.safetensors");
    if std::env::var_os(CHILD).is_some() {
        let written = adapter.save(&file);
        println!("saved: {written:?}");
    }
    file
}

fn child(test: &str, folder: &Path, before: &str) -> Command {
    let program = std::env::current_exe().unwrap();
    let mut command = Command::new("sh");
    let call = format!("{before} exec \"$0\" --exact {test} --nocapture");
    command.arg("-c").arg(call).arg(program).env(CHILD, folder);
    command
}

#[cfg(unix)]
#[test]
fn a_full_disk_leaves_the_old_file() {
    if let Some(folder) = std::env::var_os(CHILD) {
        saved(Path::new(&folder));
        return;
    }
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("adapter.safetensors");
    std::fs::write(&file, b"the old file").unwrap();
    // No file may grow beyond 8 KiB, as on a disk that is full; the signal for it is ignored.
    let test = "a_full_disk_leaves_the_old_file";
    let run = child(test, home.path(), "trap '' XFSZ; ulimit -f 16;")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&run.stdout);
    assert!(
        said.contains("saved: Err(") && said.contains("File too large"),
        "{said}"
    );
    assert_eq!(std::fs::read(&file).unwrap(), b"the old file");
    assert_eq!(
        std::fs::read_dir(home.path()).unwrap().count(),
        1,
        "a temporary file is left"
    );
}

#[cfg(unix)]
#[test]
fn a_process_killed_while_it_saves_leaves_a_whole_file() {
    if let Some(folder) = std::env::var_os(CHILD) {
        loop {
            saved(Path::new(&folder));
        }
    }
    let home = tempfile::tempdir().unwrap();
    let test = "a_process_killed_while_it_saves_leaves_a_whole_file";
    for delay in [30, 60, 90, 121, 157] {
        let mut running = child(test, home.path(), "")
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(delay));
        running.kill().unwrap();
        running.wait().unwrap();
        let file = home.path().join("adapter.safetensors");
        if file.exists() {
            let _builder = Adapter::load(&file, &CPU).expect("a whole file");
        }
    }
    assert!(
        home.path().join("adapter.safetensors").exists(),
        "it was killed before it saved"
    );
}

#[test]
fn a_failed_merge_or_conversion_leaves_the_previous_output() {
    let home = tempfile::tempdir().unwrap();
    let (base, output) = (
        home.path().join("base.safetensors"),
        home.path().join("out"),
    );
    let weight = seeded((12, 48), 1).to_dtype(DType::F32).unwrap();
    safetensors::save(&HashMap::from([("other.weight", weight)]), &base).unwrap();
    std::fs::write(&output, b"the previous output").unwrap();
    let adapter = golden("onetrainer/doft_g3_linear/adapter.safetensors");
    let options = LoadOptions::default();
    let merge = Merge::new()
        .with_file(&adapter, &options, Strength::default())
        .unwrap();
    assert!(
        merge
            .checkpoint(&base, &output, CheckpointOptions::default())
            .is_err()
    );
    let target = Target::Peft {
        drop_magnitude: false,
    };
    assert!(convert(&adapter, &output, target, &options, &BTreeMap::new()).is_err());
    assert_eq!(std::fs::read(&output).unwrap(), b"the previous output");
    assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 2);
    let found = inspect(&adapter, &options, Some(&base)).unwrap();
    assert_eq!(
        found.layers[0].mismatch.as_deref(),
        Some("the base has no such weight")
    );
}
