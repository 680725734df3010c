//! Strengths that are done in the file: layers whose planes turn by part of their angle.

use super::tensors::not_finite;
use crate::adapter::{Stored, StoredLayer, Warning};
use crate::config::{BlockLayout, LayerKind, Magnitude, Map, Strengths};
use crate::error::{Error, Result, shown};
use crate::rotation::{self, Planes};
use candle_core::{DType, Tensor};
use std::f64::consts::PI;

/// Gives every layer its strength: planes turn by `s` times their angle, ratios become `ratio^s`. A cap
/// on `Q` is folded into the values. Layers of strength 1 stay as they are.
pub(super) fn apply(
    stored: &mut Stored,
    strengths: &Strengths,
    warnings: &mut Vec<Warning>,
) -> Result<()> {
    strengths.check_values()?;
    strengths.check_patterns(stored.layers.keys().map(String::as_str))?;
    let mut changed = false;
    for (path, layer) in &mut stored.layers {
        let strength = strengths.of(path)?;
        if strength != 1. {
            *layer = at(path, layer, strength)?;
            changed = true;
        }
    }
    if changed {
        for name in stored.extras.keys() {
            let message = "an extra tensor is there in full, whatever the strength";
            warnings.push(Warning::new(name, message));
        }
    }
    if stored.layers.values().all(|layer| layer.max_norm.is_none()) {
        stored.config.max_norm = None;
    }
    Ok(())
}

/// The layer at a strength.
pub(super) fn at(path: &str, layer: &StoredLayer, strength: f64) -> Result<StoredLayer> {
    let refuse = |reason: String| {
        let reason = format!("layer `{}` {reason}", shown(path));
        Err(Error::Strength { strength, reason })
    };
    if layer.low_rank.is_some() {
        return refuse(
            "is LoRA or DoRA, which a strength in the file is not for; give it when you merge"
                .into(),
        );
    }
    let mut layer = layer.clone();
    if let Some(values) = Values::of(&layer)? {
        if !values.of_any_kind(&layer) {
            return refuse(format!("is unclear: {KIND_UNKNOWN}"));
        }
        if !layer.map.is_orthogonal() {
            let reason = "has the series for its map, which is not orthogonal; project it on the Cayley \
                          map first (`--project cayley`)";
            return refuse(reason.into());
        }
        let planes = Planes::of(&values.q)?;
        let angle = match layer.map {
            Map::Exponential => planes.widest(),
            Map::Cayley | Map::CayleyNeumann { .. } => 2. * planes.widest().atan(),
        };
        if strength.abs() * angle >= PI * (1. - 1e-9) {
            let (widest, found) = (angle.to_degrees(), (strength * angle).abs().to_degrees());
            return refuse(format!(
                "would turn a plane by {found:.2} degrees, expected less than 180; its widest plane turns by \
                 {widest:.2}, so take a strength below {:.3}",
                180. / widest
            ));
        }
        let proportional = layer.map == Map::Exponential || strength == -1. || strength == 0.;
        layer.packed = match (proportional, layer.max_norm) {
            // Without the way through `Q`, which would round.
            (true, None) => (&layer.packed * strength)?,
            (true, Some(_)) => values.packed(&(&values.q * strength)?)?,
            (false, _) => values.packed(&planes.odd(|l| (strength * l.atan()).tan())?)?,
        };
        layer.max_norm = None;
    }
    let Some(value) = &layer.value else {
        return Ok(layer);
    };
    let powers = powers(&layer, value, strength)?;
    match powers {
        Some(value) => layer.value = Some(value.to_dtype(value_dtype(&layer))?),
        None if layer.magnitude == Magnitude::Absolute && layer.norms.is_none() => {
            let reason = "has no `initial_norm`, so its ratio is not known; load it onto its base and save it";
            return refuse(reason.into());
        }
        None => {
            let reason = "has a factor of 0 or below, which has no such power";
            return refuse(reason.into());
        }
    }
    if let Some(ratio) = layer.ratio(None, DType::F32)?
        && let Some((index, found)) = not_finite(&ratio)?
    {
        return refuse(format!(
            "would have the factor {found} at index {index}, beyond f32"
        ));
    }
    Ok(layer)
}

fn value_dtype(layer: &StoredLayer) -> DType {
    layer.value.as_ref().map_or(DType::F32, Tensor::dtype)
}

/// The magnitude of which the ratio is `ratio^s`, in f64; none where that is no number.
fn powers(layer: &StoredLayer, value: &Tensor, strength: f64) -> Result<Option<Tensor>> {
    let value = value.to_dtype(DType::F64)?;
    if layer.magnitude == Magnitude::Log {
        return Ok(Some((value * strength)?));
    }
    let Some(ratio) = layer.ratio(None, DType::F64)? else {
        return Ok(None);
    };
    let ratio: Vec<f64> = ratio.to_vec1()?;
    if ratio.iter().any(|ratio| *ratio <= 0.) {
        return Ok(None);
    }
    let powers: Vec<f64> = ratio.iter().map(|ratio| ratio.powf(strength)).collect();
    let powers = Tensor::new(powers, value.device())?;
    Ok(Some(match &layer.norms {
        Some(norms) => {
            let norms = norms.to_dtype(DType::F64)?;
            // A dead row has no ratio, and keeps what it has.
            norms.gt(0.)?.where_cond(&(powers * &norms)?, &value)?
        }
        None => powers,
    }))
}

/// Why a layer cannot be changed.
pub(super) const KIND_UNKNOWN: &str =
    "kernels have another divisor than matrices; give the base, to tell them";

/// The rotation of a layer as `Q`, and the way back to what it stores.
pub(super) struct Values {
    /// `(rows, b, b)`, f64, with divisor and cap in it.
    pub(super) q: Tensor,
    pub(super) layout: BlockLayout,
    /// From the values of a layer of this kind to those that are stored.
    factor: f64,
    dtype: DType,
}

impl Values {
    /// None where the blocks turn nothing. A layer of unknown kind is read as a linear layer: for a
    /// kernel everything is the other way round, and so is what comes back.
    pub(super) fn of(layer: &StoredLayer) -> Result<Option<Self>> {
        let rows = layer.rows();
        // As many blocks as there are rows: where they stand changes nothing here.
        let Some(layout) = layer.layout(&[1, rows * layer.block_size])? else {
            return Ok(None);
        };
        let kind = layer.kind.unwrap_or(LayerKind::Linear);
        let theta = layer.theta(kind)?.to_dtype(DType::F64)?;
        Ok(Some(Self {
            q: rotation::generator(&theta, &layout)?,
            layout,
            factor: if kind.is_kernel() {
                1. / layer.kernel_factor
            } else {
                1.
            },
            dtype: layer.packed.dtype(),
        }))
    }

    /// Whether what holds for a linear layer of these values holds for a kernel, where the layer may be
    /// one: true up to the sign, and for what is in proportion to `Q`.
    pub(super) fn of_any_kind(&self, layer: &StoredLayer) -> bool {
        let proportional = layer.map == Map::Exponential && layer.max_norm.is_none();
        layer.kind.is_some() || layer.kernel_factor.abs() == 1. || proportional
    }

    /// What a layer stores for another `Q` of the same map and divisor.
    pub(super) fn packed(&self, q: &Tensor) -> Result<Tensor> {
        let packed = (rotation::packed(q)? * (self.layout.divisor() * self.factor))?;
        Ok(packed.to_dtype(self.dtype)?)
    }
}
