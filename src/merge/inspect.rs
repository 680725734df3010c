//! [`inspect`]: what an adapter file holds, as numbers.

use super::header::{self, Source};
use super::{Merge, Strength};
use crate::adapter::{StoredLayer, Warning, differs, fingerprint};
use crate::config::{LayerKind, Magnitude, Map};
use crate::error::Result;
use crate::file::{self, Dialect, LoadOptions};
use crate::params::row_norms;
use crate::rotation;
use candle_core::{DType, Tensor};
use std::collections::BTreeMap;
use std::path::Path;

/// One layer of an [`Inspection`].
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct LayerInspection {
    /// Its path, as the file names it.
    pub path: String,
    /// Its kind, where the file or the base tells.
    pub kind: Option<LayerKind>,
    /// Width of a rotation block.
    pub block_size: usize,
    /// Stored blocks; 1 may be one that is shared.
    pub blocks: usize,
    /// From skew matrix to rotation.
    pub map: Map,
    /// Kind of magnitude.
    pub magnitude: Magnitude,
    /// The largest rotation angle in degrees.
    pub max_angle_degrees: f64,
    /// `max |R R^T - I|`.
    pub orthogonality_error: f64,
    /// The least `m / n0`; none where the file lacks `n0` and no base is at hand.
    pub ratio_min: Option<f64>,
    /// The largest `m / n0`.
    pub ratio_max: Option<f64>,
    /// With a base: the largest relative distance of a merged row's norm from the magnitude.
    pub norm_drift: Option<f64>,
    /// With a base: why it does not fit.
    pub mismatch: Option<String>,
}

/// What an adapter file holds.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Inspection {
    /// Who wrote it.
    pub dialect: Dialect,
    /// What is worth knowing.
    pub warnings: Vec<Warning>,
    /// Parameters that were trained.
    pub trainable_parameters: usize,
    /// The layers by path.
    pub layers: Vec<LayerInspection>,
}

/// Looks into an adapter, and at how it fits a checkpoint where one is given.
///
/// # Errors
///
/// Those of [`Adapter::load`](crate::Adapter::load), and of reading the checkpoint.
///
/// # Examples
///
/// ```
/// # use candle_core::{DType, Device, Tensor};
/// # use candle_doft::{Adapter, DoftConfig};
/// # let folder = tempfile::tempdir().unwrap();
/// # let path = folder.path().join("adapter.safetensors");
/// # let builder = Adapter::builder(DoftConfig::default(), &Device::Cpu)?;
/// # let weight = Tensor::ones((8, 64), DType::F32, &Device::Cpu)?;
/// # builder.wrap("head", candle_nn::Linear::new(weight, None))?;
/// # builder.finish()?.save(&path)?;
/// use candle_doft::file::LoadOptions;
/// use candle_doft::merge::inspect;
///
/// let found = inspect(&path, &LoadOptions::default(), None)?;
/// assert_eq!((found.layers[0].path.as_str(), found.layers[0].blocks), ("head", 2));
/// assert_eq!(found.layers[0].max_angle_degrees, 0.); // it was never trained
/// # Ok::<(), candle_doft::Error>(())
/// ```
pub fn inspect(
    path: impl AsRef<Path>,
    options: &LoadOptions,
    base: Option<&Path>,
) -> Result<Inspection> {
    let (dialect, stored) = file::read_stored(path.as_ref(), options)?;
    let extras: usize = stored.extras.values().map(Tensor::elem_count).sum();
    let mut found = Inspection {
        dialect,
        warnings: stored.warnings.clone(),
        trainable_parameters: extras,
        layers: Vec::new(),
    };
    let mut weights = base.map(Weights::open).transpose()?;
    let paths = weights
        .iter()
        .flat_map(|weights| weights.paths.keys().cloned());
    let paths: Vec<String> = paths.collect();
    let matched = stored.matched(paths.iter().map(String::as_str))?;
    let merge = Merge::new().with_stored(stored.clone(), Strength::default())?;
    for (module, layer) in &stored.layers {
        let magnitude = layer.value.as_ref().map_or(0, Tensor::elem_count);
        found.trainable_parameters += layer.packed.elem_count() + magnitude;
        let mut of_layer = alone(module, layer)?;
        if let Some(weights) = &mut weights {
            match matched.get(module.as_str()) {
                Some(path) => against(&mut of_layer, layer, &merge, path, &weights.read(path)?)?,
                None => of_layer.mismatch = Some("the base has no such weight".into()),
            }
        }
        found.layers.push(of_layer);
    }
    Ok(found)
}

fn alone(module: &str, layer: &StoredLayer) -> Result<LayerInspection> {
    let (mut angle, mut error) = (0f64, 0.);
    let (blocks, b) = (layer.rows(), layer.block_size);
    // As many blocks as there are rows: where they stand changes nothing here.
    if let Some(layout) = layer.layout(&[1, blocks * b])? {
        let theta = layer.theta(layer.kind.unwrap_or(LayerKind::Linear))?;
        let r = rotation::rotation(&theta.to_dtype(DType::F64)?, &layout)?;
        let angles = rotation::angles(&r)?;
        angle = angles.iter().flatten().fold(0., |most, a| most.max(*a));
        error = rotation::orthogonality_error(&r)?;
    }
    let range = range(layer.ratio(None, DType::F64)?.as_ref())?;
    let plain = layer.magnitude == Magnitude::None;
    Ok(LayerInspection {
        path: module.to_string(),
        kind: layer.kind,
        block_size: b,
        blocks,
        map: layer.map,
        magnitude: layer.magnitude,
        max_angle_degrees: angle.to_degrees(),
        orthogonality_error: error,
        ratio_min: range.map(|r| r.0).or(plain.then_some(1.)),
        ratio_max: range.map(|r| r.1).or(plain.then_some(1.)),
        norm_drift: None,
        mismatch: None,
    })
}

fn range(ratio: Option<&Tensor>) -> Result<Option<(f64, f64)>> {
    let Some(ratio) = ratio else {
        return Ok(None);
    };
    let values: Vec<f64> = ratio.to_vec1()?;
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    Ok(Some((
        least,
        values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
    )))
}

fn against(
    found: &mut LayerInspection,
    layer: &StoredLayer,
    merge: &Merge,
    path: &str,
    weight: &Tensor,
) -> Result<()> {
    let norms = row_norms(weight)?;
    let merged = match merge.weight(path, weight, true) {
        Ok(merged) => merged,
        Err(error) => {
            found.mismatch = Some(error.to_string());
            return Ok(());
        }
    };
    found.kind = found.kind.or(LayerKind::of_rank(weight.rank()));
    if let (Some(stored), Some(at_hand)) = (layer.base, fingerprint(&norms)?)
        && differs(&stored, &at_hand)
    {
        found.mismatch = Some("not the base weight it was trained on, by its row norms".into());
    }
    let ratio = layer.ratio(Some(&norms), DType::F64)?;
    if let Some((least, most)) = range(ratio.as_ref())? {
        (found.ratio_min, found.ratio_max) = (Some(least), Some(most));
    }
    let Some(merged) = merged else {
        return Ok(());
    };
    let wide = |t: &Tensor| t.to_dtype(DType::F64)?.to_vec1::<f64>();
    let (before, after) = (wide(&norms)?, wide(&row_norms(&merged)?)?);
    let ratio = match ratio {
        Some(ratio) => ratio.to_vec1::<f64>()?,
        None => vec![1.; before.len()],
    };
    let rows = before
        .iter()
        .zip(&after)
        .zip(&ratio)
        .filter(|((n, _), _)| **n > 0.);
    let drift = rows.map(|((n, after), ratio)| (after / (n * ratio.abs()) - 1.).abs());
    found.norm_drift = Some(drift.fold(0., f64::max));
    Ok(())
}

/// The weights of a checkpoint, read one by one.
struct Weights {
    sources: Vec<Source>,
    /// Path, and which file has it.
    paths: BTreeMap<String, usize>,
}

impl Weights {
    fn open(base: &Path) -> Result<Self> {
        let (mut sources, mut paths) = (Vec::new(), BTreeMap::new());
        for file in header::checkpoints(base)? {
            let source = Source::open(&file)?;
            for name in source.names() {
                let rank = source.info(&name)?.shape.len();
                if let (Some(path), 2..=4) = (name.strip_suffix(".weight"), rank) {
                    paths.insert(path.to_string(), sources.len());
                }
            }
            sources.push(source);
        }
        Ok(Self { sources, paths })
    }

    /// The weight of one of its paths.
    fn read(&mut self, path: &str) -> Result<Tensor> {
        self.sources[self.paths[path]].tensor(&format!("{path}.weight"))
    }
}

/// The shapes of a checkpoint's weights by path, from its headers alone: what
/// [`convert`](crate::file::convert) asks for.
///
/// # Errors
///
/// [`Error::Io`](crate::Error::Io), and [`Error::File`](crate::Error::File) for a file that is not whole.
///
/// # Examples
///
/// ```
/// # use candle_core::{DType, Device, Tensor, safetensors};
/// # let folder = tempfile::tempdir().unwrap();
/// # let base = folder.path().join("base.safetensors");
/// # let weight = Tensor::ones((8, 64), DType::F32, &Device::Cpu)?;
/// # safetensors::save(&std::collections::HashMap::from([("head.weight", weight)]), &base)?;
/// let shapes = candle_doft::merge::weight_shapes(&base)?;
/// assert_eq!(shapes["head"], [8, 64]);
/// # Ok::<(), candle_doft::Error>(())
/// ```
pub fn weight_shapes(base: impl AsRef<Path>) -> Result<BTreeMap<String, Vec<usize>>> {
    let weights = Weights::open(base.as_ref())?;
    let shape = |(path, place): (&String, &usize)| {
        let info = weights.sources[*place].info(&format!("{path}.weight"))?;
        Ok((path.clone(), info.shape.clone()))
    };
    weights.paths.iter().map(shape).collect()
}
