//! Where a merge writes: what it replaces, what it leaves alone, what it leaves behind.

use super::support::tensors::{CPU, bits, seeded};
use super::{adapter, adapter_with, base};
use candle_core::{DType, safetensors};
use candle_doft::file::{replace_with, save_tensors};
use candle_doft::merge::{CheckpointOptions, Merge, Strength};
use candle_doft::{DoftConfig, Error};
use std::collections::HashMap;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

fn merge(scale: f64) -> candle_doft::Result<Merge> {
    let adapter = adapter(DoftConfig::default(), scale)?;
    Merge::new().with_adapter(&adapter, Strength::default())
}

fn write(folder: &Path) {
    std::fs::create_dir_all(folder).unwrap();
    safetensors::save(&base(DType::F32).unwrap(), folder.join("model.safetensors")).unwrap();
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn folders_within_a_base_come_along_and_what_is_hidden_does_not() -> candle_doft::Result<()> {
    let home = tempfile::tempdir().unwrap();
    let from = home.path().join("model");
    write(&from);
    std::fs::create_dir_all(from.join("1_Pooling/deep")).unwrap();
    std::fs::create_dir_all(from.join(".git")).unwrap();
    std::fs::write(from.join("1_Pooling/config.json"), b"{\"a\": 1}").unwrap();
    std::fs::write(from.join("1_Pooling/deep/x.bin"), b"x").unwrap();
    std::fs::write(from.join(".git/HEAD"), b"ref").unwrap();
    // A folder within the base is not copied into itself.
    let to = from.join("merged");
    for _ in 0..2 {
        merge(0.3)?.checkpoint(&from, &to, CheckpointOptions::default())?;
        assert_eq!(names(&to), ["1_Pooling", "model.safetensors"]);
        assert_eq!(names(&to.join("1_Pooling")), ["config.json", "deep"]);
        let copied = std::fs::read(to.join("1_Pooling/config.json")).unwrap();
        assert_eq!(copied, b"{\"a\": 1}");
    }
    Ok(())
}

#[test]
fn weights_of_another_model_in_the_output_folder_are_refused() -> candle_doft::Result<()> {
    let home = tempfile::tempdir().unwrap();
    let (from, to) = (home.path().join("model"), home.path().join("merged"));
    write(&from);
    for stale in [
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "pytorch_model.bin",
        "other.gguf",
    ] {
        std::fs::create_dir_all(&to).unwrap();
        std::fs::write(to.join(stale), b"old").unwrap();
        let merged = merge(0.3)?.checkpoint(&from, &to, CheckpointOptions::default());
        let error = merged.unwrap_err().to_string();
        assert!(
            error.contains(stale) && error.contains("remove it"),
            "{error}"
        );
        assert_eq!(names(&to), [stale]);
        std::fs::remove_file(to.join(stale)).unwrap();
    }
    // What the merge writes itself, it replaces.
    std::fs::write(to.join("model.safetensors"), b"old").unwrap();
    std::fs::write(to.join("notes.txt"), b"kept").unwrap();
    merge(0.3)?.checkpoint(&from, &to, CheckpointOptions::default())?;
    assert_eq!(names(&to), ["model.safetensors", "notes.txt"]);
    // And a base is merged in place, whatever it is called.
    let same = home.path().join("merged/../model");
    merge(0.3)?.checkpoint(&from, &same, CheckpointOptions::default())?;
    Ok(())
}

#[test]
fn a_merge_that_is_stopped_leaves_nothing() -> candle_doft::Result<()> {
    let home = tempfile::tempdir().unwrap();
    let (from, to) = (home.path().join("model"), home.path().join("merged"));
    write(&from);
    for after in 0..5 {
        let stop = AtomicBool::new(false);
        let mut seen = 0;
        let mut progress = |_: u64, _: u64| {
            seen += 1;
            if seen == after + 1 {
                stop.store(true, Ordering::Relaxed);
            }
        };
        let mut options = CheckpointOptions::default();
        options.progress = Some(&mut progress);
        options.stop = Some(&stop);
        let error = merge(0.3)?.checkpoint(&from, &to, options).unwrap_err();
        assert!(matches!(error, Error::Stopped { .. }), "{error}");
        assert!(!to.exists(), "after {after}");
    }
    Ok(())
}

#[test]
fn what_a_killed_process_left_is_removed_and_what_another_writes_is_not() -> candle_doft::Result<()>
{
    let home = tempfile::tempdir().unwrap();
    let at = |name: &str| home.path().join(name);
    std::fs::write(at(".doftkilled.tmp"), b"half").unwrap();
    std::fs::write(at(".doft.notes"), b"mine").unwrap();
    let busy = std::fs::File::create(at(".doftbusy.tmp")).unwrap();
    busy.lock().unwrap();
    replace_with(at("file"), |out| {
        out.write_all(b"whole").map_err(candle_core::Error::wrap)
    })?;
    assert_eq!(names(home.path()), [".doft.notes", ".doftbusy.tmp", "file"]);
    drop(busy);
    // An error leaves the old file, and nothing beside it.
    let failed = replace_with(at("file"), |out| {
        out.write_all(b"half").ok();
        Err(Error::NoLayers)
    });
    assert!(matches!(failed, Err(Error::NoLayers)));
    assert_eq!(std::fs::read(at("file")).unwrap(), b"whole");
    assert_eq!(names(home.path()), [".doft.notes", "file"]);
    Ok(())
}

#[test]
fn saved_tensors_are_those_that_candle_reads() -> candle_doft::Result<()> {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("a.safetensors");
    let mut tensors = std::collections::BTreeMap::new();
    for (seed, dtype) in [DType::F16, DType::F64, DType::BF16, DType::F32]
        .into_iter()
        .enumerate()
    {
        let tensor = seeded((3, 5), seed as u64).to_dtype(dtype)?;
        tensors.insert(format!("{dtype:?}"), tensor.t()?);
    }
    save_tensors(&file, &tensors, &Default::default())?;
    let read: HashMap<_, _> = safetensors::load(&file, &CPU)?;
    for (name, tensor) in &tensors {
        assert_eq!(read[name].dtype(), tensor.dtype());
        let wide = |t: &candle_core::Tensor| t.to_dtype(DType::F64);
        assert_eq!(bits(&wide(&read[name])?), bits(&wide(tensor)?), "{name}");
    }
    let ids = std::collections::BTreeMap::from([(
        "ids".to_string(),
        candle_core::Tensor::new(&[1u32], &CPU)?,
    )]);
    let before = std::fs::read(&file).unwrap();
    assert!(save_tensors(&file, &ids, &Default::default()).is_err());
    assert_eq!(std::fs::read(&file).unwrap(), before);
    assert_eq!(names(home.path()), ["a.safetensors"]);
    Ok(())
}

/// Readers take one of two tensors of a name, and not all the same.
#[test]
fn a_name_that_stands_twice_in_a_header_is_refused() -> candle_doft::Result<()> {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("twice.safetensors");
    let entry = |from: usize| {
        format!(
            r#""a.weight":{{"dtype":"F32","shape":[1,2],"data_offsets":[{from},{}]}}"#,
            from + 8
        )
    };
    let header = format!("{{{},{}}}", entry(0), entry(8));
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + 16, 0);
    std::fs::write(&file, bytes).unwrap();
    let expected = "has `a.weight` twice";
    let loaded = candle_doft::Adapter::load(&file, &CPU)
        .unwrap_err()
        .to_string();
    assert!(loaded.contains(expected), "{loaded}");
    let to = home.path().join("out.safetensors");
    let merged = merge(0.1)?.checkpoint(&file, &to, CheckpointOptions::default());
    let merged = merged.unwrap_err().to_string();
    assert!(merged.contains(expected), "{merged}");
    Ok(())
}

/// In PEFT the head keeps the old table when the embedding is trained whole.
#[test]
fn a_table_that_was_trained_whole_leaves_a_tied_head_as_it_was() -> candle_doft::Result<()> {
    let home = tempfile::tempdir().unwrap();
    let (from, to) = (home.path().join("model"), home.path().join("merged"));
    let table = seeded((10, 16), 40).to_dtype(DType::F32)?;
    let trained = (&table + 1.)?;
    std::fs::create_dir(&from).unwrap();
    let mut tensors = base(DType::F32)?;
    tensors.insert("model.embed_tokens.weight".into(), table.clone());
    safetensors::save(&tensors, from.join("model.safetensors"))?;
    std::fs::write(from.join("config.json"), r#"{"tie_word_embeddings": true}"#).unwrap();
    for (name, table_after, head_after) in [
        ("model.embed_tokens.weight", &trained, &table),
        ("lm_head.weight", &table, &trained),
    ] {
        let adapter = adapter_with(DoftConfig::default(), 0.2, &[(name, &trained)])?;
        let merge = Merge::new().with_adapter(&adapter, Strength::default())?;
        let report = merge.checkpoint(&from, &to, CheckpointOptions::default())?;
        assert!(report.untied);
        let merged = safetensors::load(to.join("model.safetensors"), &CPU)?;
        assert_eq!(
            bits(&merged["model.embed_tokens.weight"]),
            bits(table_after)
        );
        assert_eq!(bits(&merged["lm_head.weight"]), bits(head_after));
        let config = std::fs::read_to_string(to.join("config.json")).unwrap();
        assert!(
            config.contains(r#""tie_word_embeddings": false"#),
            "{config}"
        );
    }
    Ok(())
}
