//! Which dialect a file or folder is, and reading it whole.

use super::options::LoadOptions;
use super::tensors::{Tensors, refused, shown};
use super::{canonical, keys, metadata, onetrainer, peft};
use crate::adapter::{PEFT_PREFIX, Stored, StoredLayer};
use crate::config::DoftConfig;
use crate::error::{Error, Result};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Who wrote a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Dialect {
    /// This crate.
    Doft,
    /// OneTrainer, or a writer of its keys.
    OneTrainer,
    /// PEFT from 0.16.
    Peft,
    /// PEFT 0.14 and 0.15.
    PeftFullMatrices,
}

impl std::fmt::Display for Dialect {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Doft => "doft",
            Self::OneTrainer => "onetrainer",
            Self::Peft => "peft",
            Self::PeftFullMatrices => "peft-0.14",
        })
    }
}

/// Reads a file, or the adapter file of a folder.
pub(super) fn read(path: &Path, options: &LoadOptions) -> Result<(Dialect, Stored)> {
    let folder = std::fs::metadata(path).map_err(Error::io(path))?.is_dir();
    let home = if folder { Some(path) } else { path.parent() };
    let config = match home {
        Some(home) if home.as_os_str().is_empty() => peft::Config::beside(Path::new(".")),
        Some(home) => peft::Config::beside(home),
        None => Ok(None),
    };
    let file = match (folder, &config) {
        (false, _) => path.to_path_buf(),
        (true, Ok(None)) => inside(path, &[OURS, PEFTS])?,
        (true, _) => inside(path, &[PEFTS])?,
    };
    let bytes = std::fs::read(&file).map_err(Error::io(&file))?;
    let tensors = Tensors::new(&file, &bytes)?;
    let format = tensors.metadata().get("format").map(String::as_str);
    if format == Some(metadata::CHECKPOINT) {
        let reason = "a checkpoint, to resume a run from; the adapter of a run is another file";
        return refused(&file, reason);
    }
    let canonical = format == Some(metadata::FORMAT);
    if canonical && !folder {
        return Ok((Dialect::Doft, canonical::from_tensors(&tensors)?));
    }
    let names = tensors.names();
    let peft_keys = names.iter().any(|name| name.starts_with(PEFT_PREFIX));
    // A config beside a file of another tool is none of its business.
    let config = if folder || peft_keys { config? } else { None };
    if canonical && config.is_none() {
        return Ok((Dialect::Doft, canonical::from_tensors(&tensors)?));
    }
    for name in &names {
        if let Some(reason) = keys::refused_family(name) {
            return refused(&file, format!("`{}` {reason}", shown(name)));
        }
    }
    other(&tensors, config.as_ref(), options)
}

/// Names of adapter files in a folder: this crate's and PEFT's.
const OURS: &str = "adapter.safetensors";
const PEFTS: &str = "adapter_model.safetensors";

/// The first of `names` that is there.
fn inside(folder: &Path, names: &[&str]) -> Result<PathBuf> {
    let mut files = names.iter().map(|name| folder.join(name));
    match files.find(|file| file.exists()) {
        Some(file) => Ok(file),
        None => refused(
            folder,
            format!("a folder without `{}`", names.join("` or `")),
        ),
    }
}

fn other(
    tensors: &Tensors,
    config: Option<&peft::Config>,
    options: &LoadOptions,
) -> Result<(Dialect, Stored)> {
    let roles: Vec<(&str, &str)> = tensors
        .names()
        .into_iter()
        .filter_map(|key| keys::parse(key).map(|(_, role)| (key, role)))
        .collect();
    let has = |name: &str| roles.iter().any(|(_, role)| *role == name);
    let of_onetrainer = |role: &str| {
        role.starts_with("dora_")
            || role == "initial_norm"
            || role.ends_with("_metadata")
            || role.starts_with("oft_R.") && role != "oft_R.weight"
    };
    let onetrainer = roles.iter().any(|(_, role)| of_onetrainer(role));
    let prefixed = roles
        .iter()
        .any(|(key, role)| key.starts_with(PEFT_PREFIX) && role.ends_with("R.weight"));
    let full = has("oft_r") || has("oft_s");
    if full && !has("oft_s") {
        let reason = "`oft_r` without `oft_s` is LyCORIS or an early PEFT, which rotate the output \
                      side of a weight; this crate rotates the input side and cannot express it";
        return refused(tensors.file(), reason);
    }
    if (config.is_some() || full) && onetrainer {
        return refused(
            tensors.file(),
            "it has the keys of OneTrainer and of PEFT together",
        );
    }
    let peft = full || config.is_some() || has("oft_embedding_R.weight") || prefixed && !onetrainer;
    if peft {
        let (layers, extras, warnings) = peft::read(tensors, config, options)?;
        let dialect = if full {
            Dialect::PeftFullMatrices
        } else {
            Dialect::Peft
        };
        let mut stored = stored(tensors, layers)?;
        stored.extras = extras;
        stored.warnings = warnings;
        return Ok((dialect, stored));
    }
    if !has("oft_R.weight") {
        let names = tensors.names();
        let first: Vec<String> = names.iter().take(5).map(|name| shown(name)).collect();
        let reason = format!(
            "it holds no adapter tensors; its first keys are `{}`",
            first.join("`, `")
        );
        return refused(tensors.file(), reason);
    }
    let (layers, extras, warnings) = onetrainer::read(tensors, options)?;
    let mut stored = stored(tensors, layers)?;
    stored.extras = extras;
    stored.warnings = warnings;
    Ok((Dialect::OneTrainer, stored))
}

/// An adapter whose configuration has the most common value of each field.
fn stored(tensors: &Tensors, layers: BTreeMap<String, StoredLayer>) -> Result<Stored> {
    if layers.is_empty() {
        return refused(tensors.file(), "it holds no adapted layer");
    }
    let all = || layers.values();
    let config = DoftConfig {
        block_size: common(all().map(|l| l.block_size.max(2))),
        map: common(all().map(|l| l.map)),
        scaled: common(all().map(|l| l.scaled)),
        max_norm: common(all().map(|l| l.max_norm)),
        magnitude: common(all().map(|l| l.magnitude)),
        ..DoftConfig::default()
    };
    Ok(Stored {
        file: tensors.file().to_path_buf(),
        config,
        layers,
        extras: BTreeMap::new(),
        warnings: Vec::new(),
        allow_partial: false,
    })
}

/// The most common value; of several, the one that comes first.
fn common<T: PartialEq + Default>(values: impl Iterator<Item = T>) -> T {
    let mut counted: Vec<(T, usize)> = Vec::new();
    for value in values {
        match counted.iter_mut().find(|(known, _)| *known == value) {
            Some((_, count)) => *count += 1,
            None => counted.push((value, 1)),
        }
    }
    let most = counted.iter().map(|(_, count)| *count).max();
    let first = counted.into_iter().find(|(_, count)| Some(*count) == most);
    first.map(|(value, _)| value).unwrap_or_default()
}
