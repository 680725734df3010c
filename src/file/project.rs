//! Mending: layers whose series left the orthogonal group get the rotation that is nearest to it.

use super::changes::{Cause, LayerChange};
use super::strength::{KIND_UNKNOWN, Values};
use super::tensors::refused;
use crate::adapter::{Stored, StoredLayer};
use crate::config::Map;
use crate::error::{Result, shown};
use crate::rotation::{self, Planes, WIDEST_TURN, series_at};
use candle_core::Tensor;
use std::path::Path;

/// The least singular value of a block from which its rotation can be told: below it, a plane is all but
/// crossed out, and what would be left of it is rounding.
const LEAST: f64 = 0.01;

/// Replaces each series by the Cayley map of its polar factor; what changed, by layer.
pub(super) fn apply(stored: &mut Stored) -> Result<Vec<LayerChange>> {
    stored.check_rotations("a projection")?;
    let mut changes = Vec::new();
    for (path, layer) in &mut stored.layers {
        if let Some((projected, change)) = projected(&stored.file, path, layer)? {
            *layer = projected;
            changes.push(change);
        }
    }
    let mut layers = stored.layers.values();
    if layers.all(|layer| layer.map == Map::Cayley) {
        stored.config.map = Map::Cayley;
    }
    if stored.layers.values().all(|layer| layer.max_norm.is_none()) {
        stored.config.max_norm = None;
    }
    Ok(changes)
}

/// The series is a polynomial `p` of a skew `Q`, so its polar factor has the same planes: one of
/// eigenvalue `il` turns by the angle of `p(il)`, and `|p(il)|` is the singular value that is left out.
fn projected(
    file: &Path,
    path: &str,
    layer: &StoredLayer,
) -> Result<Option<(StoredLayer, LayerChange)>> {
    if layer.map.is_orthogonal() {
        return Ok(None);
    }
    let map = layer.map;
    let mut layer = layer.clone();
    layer.map = Map::Cayley;
    let Some(values) = Values::of(&layer)? else {
        return Ok(Some((
            layer,
            LayerChange::new(path, Cause::Projection, 0., 0.),
        )));
    };
    let refuse = |reason: String| refused(file, format!("layer `{}`: {reason}", shown(path)));
    if !values.of_any_kind(&layer) {
        return refuse(KIND_UNKNOWN.into());
    }
    let planes = Planes::of(&values.q)?;
    let angle = |l: f64| series_at(map, l).map_or(0., |(re, im)| im.atan2(re));
    let (mut least, mut furthest, mut widest) = (1f64, 0f64, 0f64);
    for l in planes.sizes() {
        let size = series_at(map, l).map_or(1., |(re, im)| re.hypot(im));
        least = least.min(size);
        furthest = furthest.max((size - 1.).abs());
        widest = widest.max(angle(l).abs().to_degrees());
    }
    if least < LEAST {
        return refuse(format!(
            "a block of its series has the singular value {least:.1e}, which leaves no rotation to project \
             on, expected {LEAST} or more; train it further under another map, or leave it out"
        ));
    }
    if widest > WIDEST_TURN {
        return refuse(format!(
            "its series turns a plane by {widest:.2} degrees, and the Cayley map ends below 180"
        ));
    }
    let before = rotation::of_generator(map, &values.q)?;
    let q = planes.odd(|l| (angle(l) / 2.).tan())?;
    let after = rotation::cayley(&q)?;
    let entry = largest_entry(&before, &after)?;
    layer.packed = values.packed(&q)?;
    layer.max_norm = None;
    let change = LayerChange::new(path, Cause::Projection, entry, furthest);
    Ok(Some((layer, change)))
}

/// `max |A - B|`.
pub(super) fn largest_entry(a: &Tensor, b: &Tensor) -> Result<f64> {
    let off = (a - b)?.abs()?.flatten_all()?.to_vec1::<f64>()?;
    Ok(off.into_iter().fold(0., f64::max))
}
