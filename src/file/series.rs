//! Writing the one tensor that kohya's readers of OFT take from a layer: `oft_R.weight`, always the five
//! terms of the series, unscaled. They drop every other key without a word, so a file of this target has
//! none.

use super::canonical::in_onetrainers_convention;
use super::changes::{Cause, LayerChange, warning};
use super::peft_write::scales;
use super::project::largest_entry;
use super::strength::Values;
use super::tensors::{check_finite, refused};
use super::write;
use crate::adapter::{Stored, StoredLayer, Warning};
use crate::config::{LayerKind, Map};
use crate::error::{Result, shown};
use crate::params::names;
use crate::rotation::{self, Planes, WIDEST_TURN};
use candle_core::{DType, Tensor};
use std::collections::BTreeMap;

/// A difference below this is lost in the rounding of the file.
const ROUNDING: f64 = 1e-9;

/// The file, how far its layers are from what they were, and what its readers should know.
pub(super) fn to_bytes(
    stored: &Stored,
    drop_magnitude: bool,
) -> Result<(Vec<u8>, Vec<LayerChange>, Vec<Warning>)> {
    stored.check_rotations("the plain series")?;
    let mut warnings = Vec::new();
    check(stored, drop_magnitude, &mut warnings)?;
    let stored = in_onetrainers_convention(stored, &mut warnings)?;
    let (mut tensors, mut changes) = (BTreeMap::new(), Vec::new());
    for (path, layer) in &stored.layers {
        let Some(values) = Values::of(layer)? else {
            warnings.push(Warning::new(
                path,
                "left out: its blocks of size 1 turn nothing",
            ));
            continue;
        };
        let (packed, change) = rows(&stored, path, layer, &values)?;
        tensors.insert(format!("{path}.{}", names::ROTATION), packed);
        changes.extend(change);
    }
    if tensors.is_empty() {
        return refused(&stored.file, "it has no layer that turns anything");
    }
    if stored
        .layers
        .values()
        .any(|l| l.kind.is_some_and(LayerKind::is_kernel))
    {
        let message =
            "its readers take no kernel with groups or dilation, and leave such a layer as it is";
        warnings.push(Warning::new(names::ROTATION, message));
    }
    let what = "its readers compute the series of 5 terms and not the map of the adapter:";
    warnings.extend(warning(&changes, Cause::Series, what));
    check_finite(&tensors)?;
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    Ok((write::safetensors(&tensors, &metadata)?, changes, warnings))
}

/// Refuses what the file has no place for.
fn check(stored: &Stored, drop_magnitude: bool, warnings: &mut Vec<Warning>) -> Result<()> {
    if let Some(name) = stored.extras.keys().next() {
        let name = shown(name);
        let reason = format!(
            "a file of the series cannot hold the extra tensor `{name}`, which its readers would drop; \
             merge the adapter into its base instead"
        );
        return refused(&stored.file, reason);
    }
    for (path, layer) in &stored.layers {
        let refuse = |reason: &str| {
            let path = shown(path);
            let reason = format!("layer `{path}`: a file of the series {reason}");
            refused(&stored.file, reason)
        };
        if layer.kind == Some(LayerKind::Embedding) {
            return refuse("has no embeddings; exclude it or merge the adapter into its base");
        }
        if scales(layer)? {
            if !drop_magnitude {
                return refuse(
                    "has no magnitude, and its readers would drop it; `--drop-magnitude` goes on without",
                );
            }
            warnings.push(Warning::new(path, "its magnitude was dropped"));
        }
    }
    Ok(())
}

/// The packed rows of one layer, and how far their series is from its map.
fn rows(
    stored: &Stored,
    path: &str,
    layer: &StoredLayer,
    values: &Values,
) -> Result<(Tensor, Option<LayerChange>)> {
    let as_stored = !layer.scaled && layer.max_norm.is_none();
    if layer.map == Map::SERIES && as_stored {
        return Ok((layer.packed.to_dtype(DType::F32)?, None));
    }
    let q = match layer.map {
        // A plane of the exponential turns by `l`, one of the series by `2 atan l`.
        Map::Exponential => {
            let planes = Planes::of(&values.q)?;
            let widest = planes.widest().to_degrees();
            if widest > WIDEST_TURN {
                let path = shown(path);
                let reason = format!(
                    "layer `{path}` turns a plane by {widest:.2} degrees, and the series ends below 180"
                );
                return refused(&stored.file, reason);
            }
            planes.odd(|l| (l / 2.).tan())?
        }
        Map::Cayley | Map::CayleyNeumann { .. } => values.q.clone(),
    };
    let kernel = layer.kind.is_some_and(LayerKind::is_kernel);
    // `W R` and not `W R^T`, as the file has it for kernels.
    let sign = if kernel { -1. } else { 1. };
    let packed = match (&layer.map, as_stored) {
        (Map::Exponential, _) | (_, false) => (rotation::packed(&q)? * sign)?,
        (_, true) => layer.packed.clone(),
    };
    let before = rotation::of_generator(layer.map, &values.q)?;
    let after = rotation::of_generator(Map::SERIES, &q)?;
    let entry = largest_entry(&after, &before)?;
    let share = rotation::spectral_norm(&(after - before)?)?;
    let change = LayerChange::new(path, Cause::Series, entry, share);
    let change = Some(change).filter(|change| change.weight_share > ROUNDING);
    Ok((packed.to_dtype(DType::F32)?, change))
}
