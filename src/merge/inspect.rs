//! [`inspect`]: what an adapter file holds, as numbers.

use super::header::{self, Source};
use super::part::Part;
use super::target::Target;
use super::{NameTable, Strength};
use crate::adapter::{StoredLayer, Warning, differs, fingerprint};
use crate::config::{LayerKind, Magnitude, Map};
use crate::error::{Error, Result};
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
    /// Rank of low-rank matrices, which have no blocks; rotations have none.
    pub rank: Option<usize>,
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
    inspect_with(path, options, base, None)
}

/// [`inspect`] with a table of names, for a base that calls the layers otherwise; without one the names of
/// the base decide, as in [`Merge::with_names`](super::Merge::with_names).
///
/// # Errors
///
/// Those of [`inspect`], and of [`NameTable::parts`].
///
/// # Examples
///
/// ```
/// # use candle_core::{DType, Device, Tensor, safetensors};
/// # use candle_doft::{Adapter, DoftConfig};
/// # let folder = tempfile::tempdir().unwrap();
/// # let (path, base) = (folder.path().join("adapter.safetensors"), folder.path().join("base.safetensors"));
/// # let builder = Adapter::builder(DoftConfig::default(), &Device::Cpu)?;
/// # let weight = Tensor::ones((8, 64), DType::F32, &Device::Cpu)?;
/// # safetensors::save(&std::collections::HashMap::from([("out.weight", weight.clone())]), &base)?;
/// # builder.wrap("head", candle_nn::Linear::new(weight, None))?;
/// # builder.finish()?.save(&path)?;
/// use candle_doft::file::LoadOptions;
/// use candle_doft::merge::{NameTable, inspect_with};
///
/// let table = NameTable::from_json(r#"{"layers": {"head": "out.weight"}}"#)?;
/// let found = inspect_with(&path, &LoadOptions::default(), Some(&base), Some(&table))?;
/// assert_eq!(found.layers[0].mismatch, None);
/// # Ok::<(), candle_doft::Error>(())
/// ```
pub fn inspect_with(
    path: impl AsRef<Path>,
    options: &LoadOptions,
    base: Option<&Path>,
    names: Option<&NameTable>,
) -> Result<Inspection> {
    let (dialect, stored) = file::read_stored(path.as_ref(), options)?;
    let extras: usize = stored.extras.values().map(Tensor::elem_count).sum();
    let mut found = Inspection {
        dialect,
        warnings: stored.warnings.clone(),
        trainable_parameters: extras,
        layers: Vec::new(),
    };
    let part = Part::new(stored, Strength::default(), Vec::new());
    let mut weights = base.map(Weights::open).transpose()?;
    let mut places = match &weights {
        Some(weights) => weights.places(&part, names, &mut found.warnings)?,
        None => BTreeMap::new(),
    };
    for (module, layer) in &part.stored.layers {
        let magnitude = layer.value.as_ref().map_or(0, Tensor::elem_count);
        let matrices = layer.low_rank.as_ref().map_or(0, |low_rank| {
            let magnitude = low_rank.magnitude.as_ref().map_or(0, Tensor::elem_count);
            low_rank.a.elem_count() + low_rank.b.elem_count() + magnitude
        });
        found.trainable_parameters += layer.packed.elem_count() + magnitude + matrices;
        let mut of_layer = alone(module, layer)?;
        match (&mut weights, places.remove(module.as_str())) {
            (Some(weights), Some((name, target))) => {
                let weight = target.take(&weights.read(&name)?)?;
                against(&mut of_layer, &part, &target, &weight)?;
            }
            (Some(_), None) => of_layer.mismatch = Some("the base has no such weight".into()),
            (None, _) => {}
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
        rank: layer.low_rank.as_ref().map(|low_rank| low_rank.spec.rank),
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
    part: &Part,
    target: &Target,
    weight: &Tensor,
) -> Result<()> {
    let (layer, path, norms) = (target.layer, &target.path, row_norms(weight)?);
    let merged = part
        .check(target.module, layer, path, weight, &norms, true)
        .and_then(|()| part.merge(path, layer, weight, Some(&norms)));
    let merged = match merged {
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
    // Low-rank matrices keep no norm.
    if layer.low_rank.is_some() {
        return Ok(());
    }
    let ratio = layer.ratio(Some(&norms), DType::F64)?;
    if let Some((least, most)) = range(ratio.as_ref())? {
        (found.ratio_min, found.ratio_max) = (Some(least), Some(most));
    }
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

    /// The tensor of each layer of an adapter.
    fn places<'a>(
        &self,
        part: &'a Part,
        names: Option<&NameTable>,
        warnings: &mut Vec<Warning>,
    ) -> Result<BTreeMap<&'a str, (String, Target<'a>)>> {
        let shapes = header::shapes(&self.sources)?;
        let found = match names {
            Some(table) => Some(table.clone()),
            None => NameTable::detect(shapes.keys().map(String::as_str)),
        };
        let paths = part.stored.matched(self.paths.keys().map(String::as_str))?;
        for path in paths.into_values() {
            part.asked.insert(&part.stored, path)?;
        }
        let mut places = BTreeMap::new();
        let mut unnamed = Vec::new();
        let weights = |(_, shape): &(&String, &Vec<usize>)| (2..=4).contains(&shape.len());
        for (name, shape) in shapes.iter().filter(weights) {
            let targets = part.targets(name, shape, found.as_ref())?;
            if let (true, Some(table)) = (targets.is_empty(), &found)
                && table.lacks(name, shape)?
            {
                unnamed.push(name);
            }
            for target in targets {
                part.enter(&target)?;
                places.insert(target.module, (name.clone(), target));
            }
        }
        if let (true, Some(table)) = (part.is_translated(), &found) {
            let message = format!("the table of names for {} lacks it", table.family());
            warnings.extend(
                unnamed
                    .into_iter()
                    .map(|name| Warning::new(name, message.clone())),
            );
        }
        Ok(places)
    }

    /// One of its tensors.
    fn read(&mut self, name: &str) -> Result<Tensor> {
        let source = self.sources.iter_mut().find(|source| source.has(name));
        match source {
            Some(source) => source.tensor(name),
            None => Err(Error::argument(
                "inspect",
                "a tensor",
                format!("`{name}`"),
                "one of the base",
            )),
        }
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
