//! Arithmetic of adapters: strengths done in a file, projections, readers of the plain series, several
//! adapters made one, and adapters extracted from finished fine-tunes.

#[path = "../support/mod.rs"]
mod support;

mod extract;
mod extract_files;
mod hostile;
mod mean;
mod product;
mod projection;
mod series;
mod strength;

use candle_core::{DType, Tensor};
use candle_doft::file::{Changes, Conversion, LoadOptions, Target, convert_with};
use candle_doft::merge::{CheckpointOptions, Merge, Strength, weight_shapes};
use candle_doft::{Adapter, DoftConfig, Result};
use candle_nn::{Conv2d, Conv2dConfig, Embedding, Linear};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use support::golden::load;
use support::tensors::{CPU, disturb_all, seeded};
use tempfile::TempDir;

/// A folder with a base: two matrices, a kernel that is not square, a table, a norm; all f64.
struct Home(TempDir);

impl Home {
    fn new() -> Self {
        let home = Self(tempfile::tempdir().unwrap());
        let tensors: HashMap<&str, Tensor> = HashMap::from([
            ("a.weight", seeded((40, 32), 1)),
            ("b.weight", seeded((24, 16), 2)),
            ("conv.weight", seeded((48, 4, 4, 2), 3)),
            ("embed.weight", seeded((50, 16), 4)),
            ("norm.weight", seeded(12, 5)),
        ]);
        candle_core::safetensors::save(&tensors, home.base()).unwrap();
        home
    }

    fn base(&self) -> PathBuf {
        self.path("base.safetensors")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Saves an adapter of all layers, or of those that are named, moved away from the identity.
    fn adapter(&self, name: &str, config: DoftConfig, scale: f64, seed: usize) -> Result<PathBuf> {
        self.adapter_of(name, &["a", "b", "conv", "embed"], config, scale, seed)
    }

    fn adapter_of(
        &self,
        name: &str,
        layers: &[&str],
        config: DoftConfig,
        scale: f64,
        seed: usize,
    ) -> Result<PathBuf> {
        self.adapter_over(&self.base(), name, layers, config, scale, seed)
    }

    /// The same over another base.
    fn adapter_over(
        &self,
        base: &Path,
        name: &str,
        layers: &[&str],
        config: DoftConfig,
        scale: f64,
        seed: usize,
    ) -> Result<PathBuf> {
        let base = load(base)?;
        let builder = Adapter::builder(config, &CPU)?;
        for layer in layers {
            let weight = base[&format!("{layer}.weight")].clone();
            match *layer {
                "conv" => {
                    let conv = Conv2d::new(weight, None, Conv2dConfig::default());
                    builder.wrap("conv", conv)?;
                }
                "embed" => {
                    builder.wrap("embed", Embedding::new(weight, 16))?;
                }
                name => {
                    builder.wrap(name, Linear::new(weight, None))?;
                }
            }
        }
        let adapter = builder.finish()?;
        let vars = [adapter.rotation_vars(), adapter.magnitude_vars()].concat();
        disturb_all(vars.iter().skip(seed % vars.len()).cloned(), scale)?;
        disturb_all(vars.iter().take(seed % vars.len()).cloned(), scale)?;
        let path = self.path(name);
        adapter.save(&path)?;
        Ok(path)
    }

    /// The base with adapters in it, one after the other.
    fn merged(&self, adapters: &[&Path]) -> Result<BTreeMap<String, Tensor>> {
        self.merged_at(adapters, Strength::default())
    }

    fn merged_at(
        &self,
        adapters: &[&Path],
        strength: Strength,
    ) -> Result<BTreeMap<String, Tensor>> {
        let output = self.path("merged.safetensors");
        let mut merge = Merge::new();
        for adapter in adapters {
            merge = merge.with_file(adapter, &LoadOptions::default(), strength)?;
        }
        merge.checkpoint(self.base(), &output, CheckpointOptions::default())?;
        Ok(load(&output)?)
    }

    fn convert(
        &self,
        from: &Path,
        to: &str,
        target: Target,
        changes: Changes,
    ) -> Result<(PathBuf, Conversion)> {
        let output = self.path(to);
        let shapes = weight_shapes(self.base())?;
        let options = LoadOptions::default();
        let done = convert_with(from, &output, target, &options, &shapes, &changes)?;
        Ok((output, done))
    }
}

/// All weights of two checkpoints are the same within `tolerance`.
fn assert_same(
    what: &str,
    found: &BTreeMap<String, Tensor>,
    expected: &BTreeMap<String, Tensor>,
    tolerance: f64,
) {
    assert_eq!(
        found.keys().collect::<Vec<_>>(),
        expected.keys().collect::<Vec<_>>()
    );
    for (name, expected) in expected {
        let off = support::tensors::relative(&found[name], expected);
        assert!(off <= tolerance, "{what}: {name} is off by {off:e}");
    }
}

/// Bytes of all that lies in a folder, by name: nothing appeared when nothing should.
fn listing(home: &Home) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(home.0.path()).unwrap();
    let mut names: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    names.sort();
    names
}

fn text<T: std::fmt::Debug>(result: Result<T>) -> String {
    let text = result.unwrap_err().to_string();
    assert!(!text.contains('\n'), "{text}");
    text
}

fn f64_config() -> DoftConfig {
    // Over an f64 base parameters are f64.
    assert_eq!(seeded(1, 0).dtype(), DType::F64);
    DoftConfig::default().with_block_size(8)
}
