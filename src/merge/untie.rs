//! A head that shares its weight with the embedding: it gets one of its own when an adapter changes
//! only one of the two.

use super::Merge;
use super::header::Source;
use crate::error::{Error, Result};
use serde_json::{Value, json};
use std::path::Path;

/// The head's path, and the tables that it may share the weight of.
const HEAD: &str = "lm_head";
const TABLES: [&str; 4] = [
    "model.embed_tokens",
    "embed_tokens",
    "transformer.wte",
    "wte",
];

/// The head that is written beside the table.
pub(super) struct Untied {
    /// Name of the table's weight.
    pub(super) table: String,
    /// File that holds it, and the head from now on.
    pub(super) file: String,
}

impl Untied {
    /// The name of the new weight.
    pub(super) fn name() -> String {
        format!("{HEAD}.weight")
    }

    pub(super) fn path() -> &'static str {
        HEAD
    }

    /// Whether a head has to be written: the base has none, and an adapter has one of head and table
    /// but not both, or different ones. `tied` is what the base's configuration says.
    pub(super) fn of(merge: &Merge, sources: &[Source], tied: bool) -> Result<Option<Self>> {
        let names: Vec<Vec<String>> = sources.iter().map(Source::names).collect();
        let has = |name: &str| names.iter().flatten().any(|n| n == name);
        if has(&Self::name()) {
            return Ok(None);
        }
        let Some(table) = TABLES.iter().find(|table| has(&format!("{table}.weight"))) else {
            return Ok(None);
        };
        let adapted = |path: &str| -> Result<bool> {
            for part in merge.parts.iter() {
                let found = part.stored.find(path)?;
                if found.is_some() && part.strength.value != 0. {
                    return Ok(true);
                }
            }
            Ok(false)
        };
        if !(adapted(HEAD)? || tied && adapted(table)?) {
            return Ok(None);
        }
        let table = format!("{table}.weight");
        let holder = names
            .iter()
            .position(|names| names.contains(&table))
            .unwrap_or(0);
        let file = sources[holder].path.file_name().unwrap_or_default();
        Ok(Some(Self {
            table,
            file: file.to_string_lossy().into_owned(),
        }))
    }

    /// Whether the file is the one that gets the head.
    pub(super) fn is_in(&self, path: &Path) -> bool {
        path.file_name()
            .is_some_and(|name| name.to_string_lossy() == self.file)
    }

    /// The header of that file with the head behind all other data.
    pub(super) fn head(&self, source: &Source) -> Result<Vec<u8>> {
        let header = serde_json::from_slice(&source.head[8..]);
        let mut header: Value = header.map_err(|e| Error::file(&source.path, e.to_string()))?;
        let table = header[&self.table].clone();
        let ends = source
            .names()
            .into_iter()
            .map(|name| Ok(source.info(&name)?.data_offsets.1));
        let start = ends
            .collect::<Result<Vec<usize>>>()?
            .into_iter()
            .max()
            .unwrap_or(0);
        let (from, to) = source.info(&self.table)?.data_offsets;
        header[Self::name()] = json!({
            "dtype": table["dtype"],
            "shape": table["shape"],
            "data_offsets": [start, start + to - from],
        });
        let mut text = header.to_string().into_bytes();
        text.resize(text.len().next_multiple_of(8), b' ');
        let mut head = (text.len() as u64).to_le_bytes().to_vec();
        head.append(&mut text);
        Ok(head)
    }

    /// A file beside the checkpoint that has to know: its configuration, or the index of its shards.
    pub(super) fn edited(&self, path: &Path) -> Result<Option<Vec<u8>>> {
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let index = name.ends_with(".safetensors.index.json");
        if name != "config.json" && !index {
            return Ok(None);
        }
        let mut json = read(path)?;
        match index {
            true => json["weight_map"][Self::name()] = json!(self.file),
            false => json["tie_word_embeddings"] = json!(false),
        }
        Ok(Some((format!("{json:#}") + "\n").into_bytes()))
    }
}

/// Whether a folder's configuration says that head and table are one.
pub(super) fn tied(folder: &Path) -> Result<bool> {
    let config = folder.join("config.json");
    match config.exists() {
        true => Ok(read(&config)?["tie_word_embeddings"] == json!(true)),
        false => Ok(false),
    }
}

fn read(path: &Path) -> Result<Value> {
    let text = std::fs::read(path).map_err(Error::io(path))?;
    let parsed: Result<Value, _> = serde_json::from_slice(&text);
    match parsed {
        Ok(json) if json.is_object() => Ok(json),
        _ => Err(Error::file(path, "expected a JSON object")),
    }
}
