//! [`extract`]: the adapter that is closest to a finished fine-tune.

mod fit;
mod layer;
mod pair;
mod plan;

use super::header::Source;
use crate::adapter::{Stored, StoredLayer, Warning};
use crate::config::{DoftConfig, LayerKind, Targets};
use crate::error::{Error, Result, shown};
use crate::file;
use candle_core::Tensor;
use pair::Pair;
use plan::{Pairs, Planned};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// How an adapter is extracted, and who is told of the progress.
///
/// # Examples
///
/// ```
/// use candle_doft::DoftConfig;
/// use candle_doft::merge::ExtractOptions;
///
/// let mut options = ExtractOptions::default();
/// options.config = DoftConfig::default().with_block_size(64).with_targets(["q_proj", "v_proj"]);
/// options.extras = true;
/// ```
#[derive(Default)]
#[non_exhaustive]
pub struct ExtractOptions<'a> {
    /// Block size, kinds of magnitude, targets, excludes and rules. The map is Cayley's, without a cap. A
    /// checkpoint does not tell an embedding from a matrix: tables that are named as one, such as
    /// `embed_tokens`, are adapted only where a pattern of the targets matches them.
    pub config: DoftConfig,
    /// Keeps changed tensors of the fine-tune that are not adapted as extra tensors of the adapter.
    pub extras: bool,
    /// Is called with the bytes of the base that are done and those in all, after each tensor.
    pub progress: Option<&'a mut dyn FnMut(u64, u64)>,
}

impl std::fmt::Debug for ExtractOptions<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ExtractOptions")
            .field("config", &self.config)
            .field("extras", &self.extras)
            .finish_non_exhaustive()
    }
}

/// One layer of an [`Extraction`].
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct LayerExtraction {
    /// Its path.
    pub path: String,
    /// Its kind.
    pub kind: LayerKind,
    /// Width of a rotation block.
    pub block_size: usize,
    /// How far the fine-tune moved it: `|T - W| / |W|`.
    pub change: f64,
    /// The share of that which the adapter explains: `1 - |T - W_eff|^2 / |T - W|^2`.
    pub explained: f64,
    /// The share that the best rotation explains without a magnitude.
    pub explained_by_rotation: f64,
    /// The largest rotation angle in degrees.
    pub max_angle_degrees: f64,
    /// The least ratio `m / n0`, 1 without a magnitude.
    pub ratio_min: f64,
    /// The largest.
    pub ratio_max: f64,
    /// Blocks with a plane of nearly 180 degrees, which was turned by 179.9 instead.
    pub half_turns: usize,
    /// `|T - W|^2`.
    squared_change: f64,
}

/// A tensor that the fine-tune changed and that was not adapted.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LeftTensor {
    /// Its name.
    pub name: String,
    /// Why.
    pub reason: String,
    /// Whether it is an extra tensor of the adapter.
    pub kept: bool,
}

/// What an extraction found.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Extraction {
    /// The adapted layers, by path.
    pub layers: Vec<LayerExtraction>,
    /// Layers that are the same in both checkpoints, which the adapter does not have.
    pub unchanged: usize,
    /// What the fine-tune changed beside them, by name.
    pub left: Vec<LeftTensor>,
    /// The share of the change of the adapted layers that the adapter explains.
    pub explained: f64,
    /// The same without magnitudes.
    pub explained_by_rotation: f64,
    /// The share of the whole change that is in the adapted layers.
    pub adapted: f64,
    /// What readers of the adapter should know.
    pub warnings: Vec<Warning>,
}

/// Writes the adapter that comes closest to a fine-tune: for every target the rotation and the ratios with
/// the least `|T - W_eff|^2`, `T` the weight after and `W` the one before.
///
/// ```text
/// W_eff = diag(m) W blockdiag(R)^T
/// R from m:  the rotation with the largest tr(R sum_o m_o w_o t_o^T), block by block
/// m from R:  m_o = <T_o, (W R^T)_o> / |W_o|^2, kept above 0; 1 for rows of zeros
/// ```
///
/// In turns, until nothing changes; in f64. Never further from `T` than the base is: a layer that no
/// rotation brings closer is left out, as are layers that did not change. Rows that leave a block free turn
/// it as little as they allow. A merged checkpoint of such an adapter gives it back; for a fine-tune of
/// another kind the shares say how much of it a rotation of blocks can be. Both checkpoints are files or
/// folders of safetensors, in any float dtypes, and are read tensor by tensor.
///
/// # Errors
///
/// * [`Error::Io`], and [`Error::File`] for a checkpoint that is not whole; for a target that the fine-tune
///   lacks, a tensor of another shape, a value that is not finite, or two checkpoints that are the same.
/// * [`Error::NoMatch`] for a pattern that matches no layer, and [`Error::Config`] for a map other than
///   Cayley's or a cap.
///
/// Nothing is written then.
///
/// # Examples
///
/// ```
/// # use candle_core::{DType, Device, Tensor, safetensors};
/// # use std::collections::HashMap;
/// use candle_doft::merge::{ExtractOptions, extract};
/// # let folder = tempfile::tempdir().unwrap();
/// # let (base, tuned) = (folder.path().join("base.safetensors"), folder.path().join("tuned.safetensors"));
/// # let output = folder.path().join("adapter.safetensors");
///
/// // Two axes change their places, and a sign: a turn by 90 degrees.
/// let before = Tensor::new(&[[1f64, 2.], [3., -1.]], &Device::Cpu)?;
/// let after = Tensor::new(&[[-2f64, 1.], [1., 3.]], &Device::Cpu)?;
/// safetensors::save(&HashMap::from([("head.weight", before)]), &base)?;
/// safetensors::save(&HashMap::from([("head.weight", after)]), &tuned)?;
/// let found = extract(&base, &tuned, &output, ExtractOptions::default())?;
/// assert!((found.layers[0].max_angle_degrees - 90.).abs() < 1e-6);
/// assert!(found.explained > 1. - 1e-9);
/// # Ok::<(), candle_doft::Error>(())
/// ```
pub fn extract(
    base: impl AsRef<Path>,
    tuned: impl AsRef<Path>,
    output: impl AsRef<Path>,
    mut options: ExtractOptions,
) -> Result<Extraction> {
    let (base, tuned, output) = (base.as_ref(), tuned.as_ref(), output.as_ref());
    check_output(output, [base, tuned])?;
    layer::check_config(&options.config)?;
    let pairs = Pairs::open(base, tuned)?;
    let plan = pairs.plan(&options.config)?;
    let mut job = Job::default();
    let total = pairs.base.sources.iter().map(Source::size).sum();
    let mut done = 0;
    for (name, planned) in &plan {
        done += job.tensor(&pairs, name, planned, &options)?;
        if let Some(progress) = &mut options.progress {
            progress(done, total);
        }
    }
    job.added(&pairs, options.extras)?;
    job.finish(&pairs, output, &options.config)
}

/// Refuses a place where nothing can be written, before the work.
fn check_output(output: &Path, inputs: [&Path; 2]) -> Result<()> {
    if output.is_dir() {
        return Err(Error::file(
            output,
            "it is a folder, expected a file to write to",
        ));
    }
    let same = |input: &Path| match (input.canonicalize(), output.canonicalize()) {
        (Ok(input), Ok(output)) => input == output,
        _ => false,
    };
    if inputs.into_iter().any(same) {
        let reason = "it is one of the checkpoints, expected another file to write the adapter to";
        return Err(Error::file(output, reason));
    }
    file::temporary(output).map(drop)
}

/// What was found so far.
#[derive(Default)]
struct Job {
    layers: BTreeMap<String, StoredLayer>,
    extras: BTreeMap<String, Tensor>,
    found: Vec<LayerExtraction>,
    /// `|T - W|^2` times what is not explained, with the magnitude and without.
    unexplained: [f64; 2],
    left: Vec<LeftTensor>,
    /// `|T - W|^2` of what is left.
    squared_left: f64,
    unchanged: usize,
}

impl Job {
    /// One tensor of the base; its bytes.
    fn tensor(
        &mut self,
        pairs: &Pairs,
        name: &str,
        planned: &Planned,
        options: &ExtractOptions,
    ) -> Result<u64> {
        let (Some(base), Some(tuned)) = (pairs.base.source(name), pairs.tuned.source(name)) else {
            if let Planned::Missing = planned {
                self.left(name, "the fine-tune lacks it", false);
            }
            return Ok(0);
        };
        let (start, end) = base.info(name)?.data_offsets;
        let size = (end - start) as u64;
        match planned {
            Planned::Layer { path, kind } => {
                let Some(pair) = Pair::of(base, tuned, name)? else {
                    let of_base = file::float(base.info(name)?.dtype).is_none();
                    let source = if of_base { base } else { tuned };
                    let (found, name) = (source.info(name)?.dtype, shown(name));
                    let reason =
                        format!("`{name}` has dtype {found:?}, expected F64, F32, F16 or BF16");
                    return Err(Error::file(&source.path, reason));
                };
                let scan = pair.scan(true)?;
                if !scan.changed {
                    self.unchanged += 1;
                    return Ok(size);
                }
                match layer::fitted(path, *kind, &pair, &scan, &options.config)? {
                    Ok((stored, found, unexplained)) => {
                        self.layers.insert(path.clone(), stored);
                        for (sum, part) in self.unexplained.iter_mut().zip(unexplained) {
                            *sum += part;
                        }
                        self.found.push(found);
                    }
                    Err(reason) => {
                        self.squared_left += scan.change;
                        self.keep(name, reason, options.extras, || pair.after())?;
                    }
                }
            }
            Planned::Other(reason) => self.other(base, tuned, name, reason, options.extras)?,
            Planned::Missing => {}
        }
        Ok(size)
    }

    /// A tensor that is not adapted: looked at only as far as it changed.
    fn other(
        &mut self,
        base: &Source,
        tuned: &Source,
        name: &str,
        reason: &str,
        extras: bool,
    ) -> Result<()> {
        let Some(pair) = Pair::of(base, tuned, name)? else {
            if base.bytes(name)? != tuned.bytes(name)? {
                self.left(name, "it does not hold floats", false);
            }
            return Ok(());
        };
        let scan = pair.scan(false)?;
        if !scan.changed {
            return Ok(());
        }
        self.squared_left += scan.change;
        self.keep(name, reason, extras, || pair.after())
    }

    /// What the fine-tune has and the base has not.
    fn added(&mut self, pairs: &Pairs, extras: bool) -> Result<()> {
        let names = pairs
            .tuned
            .places
            .keys()
            .filter(|name| !pairs.base.places.contains_key(*name));
        let names: Vec<String> = names.cloned().collect();
        for name in names {
            let Some(source) = pairs.tuned.source(&name) else {
                continue;
            };
            let reason = "the base has no such tensor";
            if file::float(source.info(&name)?.dtype).is_none() {
                self.left(
                    &name,
                    "the base has no such tensor, and it does not hold floats",
                    false,
                );
            } else {
                self.keep(&name, reason, extras, || source.tensor(&name))?;
            }
        }
        Ok(())
    }

    fn keep(
        &mut self,
        name: &str,
        reason: &str,
        extras: bool,
        tensor: impl FnOnce() -> Result<Tensor>,
    ) -> Result<()> {
        if extras {
            self.extras.insert(name.to_string(), tensor()?);
        }
        self.left(name, reason, extras);
        Ok(())
    }

    fn left(&mut self, name: &str, reason: &str, kept: bool) {
        self.left.push(LeftTensor {
            name: name.to_string(),
            reason: reason.to_string(),
            kept,
        });
    }

    fn finish(mut self, pairs: &Pairs, output: &Path, config: &DoftConfig) -> Result<Extraction> {
        if self.layers.is_empty() && self.extras.is_empty() {
            let reason = match self.left.first() {
                None => "nothing to extract: it holds the same values as the base".to_string(),
                Some(first) => format!(
                    "nothing to extract: no target differs from the base in what a rotation explains; {} other \
                     tensors do, the first is `{}` ({}); `--extras` keeps them",
                    self.left.len(),
                    shown(&first.name),
                    first.reason
                ),
            };
            return Err(Error::file(pairs.tuned_path, reason));
        }
        self.found.sort_by(|a, b| a.path.cmp(&b.path));
        self.left.sort_by(|a, b| a.name.cmp(&b.name));
        let half_turns = self.found.iter().filter(|layer| layer.half_turns > 0);
        let warnings = half_turns.map(|layer| {
            let message = format!(
                "{} of its blocks turn a plane by nearly 180 degrees; 179.9 stands for it",
                layer.half_turns
            );
            Warning::new(&layer.path, message)
        });
        let mut warnings: Vec<Warning> = warnings.collect();
        let change: f64 = self.found.iter().map(|layer| layer.squared_change).sum();
        let share = |unexplained: f64| {
            if change > 0. {
                1. - unexplained / change
            } else {
                0.
            }
        };
        let whole = change + self.squared_left;
        let stored = Stored {
            file: output.to_path_buf(),
            config: DoftConfig {
                targets: Targets::All,
                exclude: Vec::new(),
                rules: Vec::new(),
                ..config.clone()
            },
            layers: self.layers,
            extras: self.extras,
            warnings: Vec::new(),
            unannounced: BTreeSet::new(),
            allow_partial: false,
            allow_changed_base: false,
        };
        warnings.extend(file::write_stored(&stored, output)?);
        Ok(Extraction {
            explained: share(self.unexplained[0]),
            explained_by_rotation: share(self.unexplained[1]),
            adapted: if whole > 0. { change / whole } else { 1. },
            layers: self.found,
            unchanged: self.unchanged,
            left: self.left,
            warnings,
        })
    }
}
