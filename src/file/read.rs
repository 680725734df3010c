//! Which dialect a file or folder is, by one table, and reading it whole.

use super::options::LoadOptions;
use super::tensors::{Tensors, refused};
use super::{canonical, keys, metadata, onetrainer, peft};
use crate::adapter::{PEFT_PREFIX, Stored};
use crate::error::{Error, Result, shown};
use std::path::{Path, PathBuf};

/// Who wrote a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Dialect {
    /// This crate.
    Doft,
    /// PEFT 0.14 and 0.15.
    PeftFullMatrices,
    /// PEFT from 0.16.
    Peft,
    /// OneTrainer, or a writer of its keys.
    OneTrainer,
}

/// How a dialect is told and read.
struct Reader {
    dialect: Dialect,
    name: &'static str,
    recognises: fn(&Found) -> bool,
    read: fn(&Found, &LoadOptions) -> Result<Stored>,
}

/// The dialects; the first that recognises a file reads it.
const READERS: [Reader; 4] = [
    Reader {
        dialect: Dialect::Doft,
        name: "doft",
        recognises: canonical::recognises,
        read: canonical::read,
    },
    Reader {
        dialect: Dialect::PeftFullMatrices,
        name: "peft-0.14",
        recognises: peft::recognises_full_matrices,
        read: peft::read,
    },
    Reader {
        dialect: Dialect::Peft,
        name: "peft",
        recognises: peft::recognises,
        read: peft::read,
    },
    Reader {
        dialect: Dialect::OneTrainer,
        name: "onetrainer",
        recognises: onetrainer::recognises,
        read: onetrainer::read,
    },
];

impl std::fmt::Display for Dialect {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let reader = READERS.iter().find(|reader| reader.dialect == *self);
        f.write_str(reader.map_or("unknown", |reader| reader.name))
    }
}

/// What there is at a path.
pub(super) struct Found<'a> {
    pub(super) tensors: Tensors<'a>,
    /// PEFT's configuration, of a folder or beside a file with PEFT's keys.
    pub(super) config: Option<peft::Config>,
}

impl Found<'_> {
    /// Whether a key has that role.
    pub(super) fn has(&self, role: &str) -> bool {
        self.any(|_, found| found == role)
    }

    /// Whether a key and its role are such.
    pub(super) fn any(&self, is: impl Fn(&str, &str) -> bool) -> bool {
        let names = self.tensors.names().into_iter();
        // What an extra tensor is called is its own business.
        let names = names.filter(|key| !key.starts_with(keys::EXTRA));
        let role = |key| keys::parse_named(key).map(|(_, role, _)| role);
        let mut roles = names.filter_map(|key| Some((key, role(key)?)));
        roles.any(|(key, role)| is(key, role))
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
        (true, Ok(None)) => inside(path, &[OURS, peft::TENSORS])?,
        (true, _) => inside(path, &[peft::TENSORS])?,
    };
    let bytes = std::fs::read(&file).map_err(Error::io(&file))?;
    let mut found = Found {
        tensors: Tensors::new(&file, &bytes)?,
        config: None,
    };
    if metadata::has_format(found.tensors.metadata(), metadata::CHECKPOINT) {
        let reason = "a checkpoint, to resume a run from; the adapter of a run is another file";
        return refused(&file, reason);
    }
    let names = found.tensors.names();
    // A config beside a file of another tool is none of its business.
    let of_peft = names
        .iter()
        .any(|name| keys::unwrapped(name).starts_with(PEFT_PREFIX));
    if folder || of_peft && !canonical::recognises(&found) {
        found.config = config?;
    }
    // What a path of this crate's own files is called is its own business too.
    if !canonical::recognises(&found) {
        refuse_families(&found)?;
    }
    if let Some(reader) = READERS.iter().find(|reader| (reader.recognises)(&found)) {
        return Ok((reader.dialect, (reader.read)(&found, options)?));
    }
    let names = found.tensors.names();
    let first: Vec<String> = names.iter().take(5).map(|name| shown(name)).collect();
    let first = first.join("`, `");
    refused(
        &file,
        format!("it holds no adapter tensors; its first keys are `{first}`"),
    )
}

/// This crate's name for an adapter in a folder.
const OURS: &str = "adapter.safetensors";

/// The first of `names` that is there.
fn inside(folder: &Path, names: &[&str]) -> Result<PathBuf> {
    let mut files = names.iter().map(|name| folder.join(name));
    if let Some(file) = files.find(|file| file.exists()) {
        return Ok(file);
    }
    let pickle = match folder.join("adapter_model.bin").exists() {
        true => "; it has `adapter_model.bin`, and pickles are not read: save it as safetensors",
        false => "",
    };
    let names = names.join("` or `");
    refused(folder, format!("a folder without `{names}`{pickle}"))
}

/// Refuses tensors of adapters that this crate cannot express, whatever lies beside them.
fn refuse_families(found: &Found) -> Result<()> {
    let file = found.tensors.file();
    let names = found.tensors.names();
    for name in names.iter().filter(|name| !name.starts_with(keys::EXTRA)) {
        if let Some(reason) = keys::refused_family(name) {
            return refused(file, format!("`{}` {reason}", shown(name)));
        }
    }
    if found.has("oft_r") && !found.has("oft_s") {
        let reason = "`oft_r` without `oft_s` is LyCORIS or an early PEFT, which rotate the output \
                      side of a weight; this crate rotates the input side and cannot express it";
        return refused(file, reason);
    }
    Ok(())
}
