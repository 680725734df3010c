//! What a merged checkpoint has and its base had not: extra tensors of the adapters, and a head that
//! shared its weight with the embedding and no longer does.

use super::Merge;
use super::header::Source;
use crate::error::{Error, Result, shown};
use candle_core::Tensor;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// The head, and the tables that it may share the weight of.
const HEAD: &str = "lm_head.weight";
const TABLES: [&str; 4] = [
    "model.embed_tokens.weight",
    "embed_tokens.weight",
    "transformer.wte.weight",
    "wte.weight",
];

/// Tensors that are added, behind all others of a file.
pub(super) struct Added {
    /// The file of each, by its name in the folder.
    files: BTreeMap<String, String>,
    /// The table that a head begins as, where it gets a weight of its own.
    table: Option<String>,
    pub(super) untied: bool,
}

impl Added {
    /// What is to be added: extra tensors that the base lacks; and a head, when the base has none and
    /// an adapter has one of head and table but not both, or different ones. `tied` is what the
    /// base's configuration says.
    pub(super) fn of(merge: &Merge, sources: &[Source], tied: bool) -> Result<Self> {
        let holder = |name: &str| sources.iter().find(|source| source.has(name));
        let mut files = BTreeMap::new();
        for part in merge.parts.iter().filter(|part| part.strength.value != 0.) {
            for name in part.stored.extras.keys() {
                if let (None, Some(first)) = (holder(name), sources.first()) {
                    if part.stored.unannounced.contains(name) {
                        let reason = format!(
                            "`{}` is announced by no configuration, and the base has no such tensor; \
                             `allow_unknown` (--allow-unknown) skips it",
                            shown(name)
                        );
                        return Err(Error::file(&part.stored.file, reason));
                    }
                    part.warn(name, "the base has no such tensor; it was added");
                    files.insert(name.clone(), first.file_name());
                }
            }
        }
        let adapted = |name: &str| -> Result<bool> {
            let path = name.strip_suffix(".weight").unwrap_or(name);
            let parts = merge.parts.iter().filter(|part| part.strength.value != 0.);
            for part in parts {
                // A table that was trained whole turns away from the head as one that was adapted.
                if part.stored.extras.contains_key(name) || part.stored.find(path)?.is_some() {
                    return Ok(true);
                }
            }
            Ok(false)
        };
        let mut table = None;
        if holder(HEAD).is_none()
            && let Some((name, source)) = TABLES.into_iter().find_map(|t| Some((t, holder(t)?)))
            && (adapted(HEAD)? || tied && adapted(name)?)
        {
            table = Some(name.to_string());
            files.insert(HEAD.to_string(), source.file_name());
        }
        Ok(Self {
            untied: tied && files.contains_key(HEAD) || table.is_some(),
            files,
            table,
        })
    }

    pub(super) fn names(&self) -> impl Iterator<Item = String> {
        self.files.keys().cloned()
    }

    /// The tensors that a file gets, with the adapters in them.
    pub(super) fn tensors(
        &self,
        merge: &Merge,
        source: &mut Source,
        allow_changed_base: bool,
    ) -> Result<Vec<(String, Tensor)>> {
        let mut tensors = Vec::new();
        let file = source.file_name();
        for (name, _) in self.files.iter().filter(|(_, of)| **of == file) {
            merge.mark_extra(name);
            let tensor = match (merge.extra(name), &self.table) {
                (Some((_, extra)), _) => extra.clone(),
                (None, Some(table)) => source.tensor(table)?,
                (None, None) => continue,
            };
            let merged = match name.strip_suffix(".weight") {
                Some(path) => merge.weight(path, &tensor, allow_changed_base)?,
                None => None,
            };
            tensors.push((name.clone(), merged.unwrap_or(tensor)));
        }
        Ok(tensors)
    }

    /// The new text of a file beside the checkpoint that has to know: its configuration, or the index
    /// of its shards. `size` are the bytes of all tensors.
    pub(super) fn edited(&self, path: &Path, size: u64) -> Result<Option<Vec<u8>>> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let index = name.ends_with(".safetensors.index.json");
        let concerned = index && !self.files.is_empty() || self.untied && name == "config.json";
        if !concerned {
            return Ok(None);
        }
        let mut json = read(path)?;
        if index {
            let Some(Value::Object(map)) = json.get_mut("weight_map") else {
                return Err(Error::file(path, "its `weight_map` is not a JSON object"));
            };
            map.extend(
                self.files
                    .iter()
                    .map(|(name, file)| (name.clone(), json!(file))),
            );
            if let Some(total) = json.pointer_mut("/metadata/total_size") {
                *total = json!(size);
            }
        } else {
            json["tie_word_embeddings"] = json!(false);
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
