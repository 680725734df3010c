//! Files that other tools wrote, with what those tools compute from them.

use super::tensors::CPU;
use candle_core::{Result, Tensor, safetensors};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A file or folder below `tests/golden`.
pub fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(path)
}

/// The folders of a tool, in order.
pub fn cases(tool: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(golden(tool)).unwrap();
    let entries = entries.map(|entry| entry.unwrap().path());
    let mut cases: Vec<PathBuf> = entries.filter(|p| p.join("meta.json").exists()).collect();
    cases.sort();
    cases
}

/// The tensors of a file by name.
pub fn load(path: &Path) -> Result<BTreeMap<String, Tensor>> {
    Ok(safetensors::load(path, &CPU)?.into_iter().collect())
}
