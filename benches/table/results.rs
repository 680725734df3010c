//! The files that the other benches leave.

use crate::support::context::Context;
use crate::support::stats::MedianInterval;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// One ratio of `ratios.json`.
#[derive(Clone, Debug, Deserialize)]
pub struct Entry {
    pub what: String,
    pub shape: String,
    pub numerator: String,
    pub denominator: String,
    pub median: f64,
    pub low: f64,
    pub high: f64,
    pub numerator_seconds: Option<f64>,
    pub denominator_seconds: Option<f64>,
    pub numerator_bytes: Option<u64>,
    pub denominator_bytes: Option<u64>,
    pub context: Context,
}

/// `growth.json`.
#[derive(Debug, Deserialize)]
pub struct Growth {
    pub context: Context,
    pub sweeps: Vec<Sweep>,
}

#[derive(Debug, Deserialize)]
pub struct Sweep {
    pub name: String,
    pub fixed: String,
    pub points: Vec<Point>,
}

#[derive(Debug, Deserialize)]
pub struct Point {
    pub value: usize,
    pub seconds: BTreeMap<String, f64>,
    pub ratios: BTreeMap<String, MedianInterval>,
}

/// A time of criterion's.
#[derive(Debug)]
pub struct Estimate {
    pub group: String,
    pub method: String,
    pub value: String,
    pub seconds: f64,
    /// When it was written.
    pub at: SystemTime,
}

/// A file's content, or none where there is no file.
pub fn read<T: serde::de::DeserializeOwned>(path: impl AsRef<Path>) -> anyhow::Result<Option<T>> {
    let path = path.as_ref();
    let Ok(text) = std::fs::read_to_string(path) else {
        return Ok(None);
    };
    let value = serde_json::from_str(&text);
    let value = value.map_err(|error| {
        let path = path.display();
        anyhow::anyhow!("{path} is not of this version, run its bench again: {error}")
    })?;
    Ok(Some(value))
}

#[derive(Deserialize)]
struct Benchmark {
    group_id: String,
    function_id: Option<String>,
    value_str: Option<String>,
}

#[derive(Deserialize)]
struct Estimates {
    median: Median,
}

#[derive(Deserialize)]
struct Median {
    point_estimate: f64,
}

/// The medians of criterion's last runs, in the order of their names.
pub fn criterion() -> anyhow::Result<Vec<Estimate>> {
    let mut found = Vec::new();
    // <group>/<method>/<value>/new.
    for group in folders(&root()) {
        for method in folders(&group) {
            for value in folders(&method) {
                let last = value.join("new");
                let names: Option<Benchmark> = read(last.join("benchmark.json"))?;
                let times: Option<Estimates> = read(last.join("estimates.json"))?;
                if let (Some(names), Some(times)) = (names, times) {
                    found.push(Estimate {
                        group: names.group_id,
                        method: names.function_id.unwrap_or_default(),
                        value: names.value_str.unwrap_or_default(),
                        seconds: 1e-9 * times.median.point_estimate,
                        at: std::fs::metadata(&last)?.modified()?,
                    });
                }
            }
        }
    }
    Ok(found)
}

/// Where criterion writes.
fn root() -> PathBuf {
    let variable = |name| std::env::var_os(name).map(PathBuf::from);
    variable("CRITERION_HOME").unwrap_or_else(|| {
        let target = variable("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
        target.join("criterion")
    })
}

fn folders(of: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(of).into_iter().flatten().flatten();
    let mut folders: Vec<_> = entries
        .map(|entry| entry.path())
        .filter(|path| path.is_dir())
        .collect();
    folders.sort();
    folders
}
