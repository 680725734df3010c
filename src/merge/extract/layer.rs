//! From the fit of one layer to what an adapter stores.

use super::LayerExtraction;
use super::fit::{Fit, Fitting};
use super::pair::{Pair, Scan};
use crate::adapter::{StoredLayer, fingerprint};
use crate::config::{BlockLayout, DoftConfig, LayerKind, Magnitude, Map};
use crate::error::{Error, Result};
use crate::rotation;
use candle_core::{DType, Device, Tensor};

/// What an extraction has no place for in a configuration.
pub(super) fn check_config(config: &DoftConfig) -> Result<()> {
    config.validate()?;
    let maps = config.rules.iter().filter_map(|rule| rule.map);
    if let Some(map) = maps.chain([config.map]).find(|map| *map != Map::Cayley) {
        return Err(Error::config(
            "map",
            map,
            "cayley, the one that is extracted",
        ));
    }
    let caps = config.rules.iter().filter_map(|rule| rule.max_norm);
    let caps = caps.filter(|cap| *cap != 0.).chain(config.max_norm);
    match caps.into_iter().next() {
        Some(cap) => Err(Error::config("max_norm", cap, "none in an extraction")),
        None => Ok(()),
    }
}

/// Layer, report, and `|T - W_eff|^2` with and without the magnitude.
pub(super) type Fitted = (StoredLayer, LayerExtraction, [f64; 2]);

/// The layer of a weight pair that differs; the reason where there is none.
pub(super) fn fitted(
    path: &str,
    kind: LayerKind,
    pair: &Pair,
    scan: &Scan,
    config: &DoftConfig,
) -> Result<Result<Fitted, &'static str>> {
    let config = config.for_layer(path)?;
    let layout = match config.layout(path, pair.dims().1) {
        Ok(layout) => layout,
        Err(Error::NothingToRotate { .. }) => {
            return Ok(Err("its width has no divisor near the block size"));
        }
        Err(error) => return Err(error),
    };
    let magnitude = config.magnitude_of(kind);
    let fitting = Fitting {
        pair,
        scan,
        block_size: layout.block_size,
        shared: layout.shared,
        magnitude: magnitude != Magnitude::None,
    };
    let fit = fitting.run()?;
    if fit.rest >= fit.change {
        return Ok(Err("no rotation of its blocks brings the base closer"));
    }
    let r = match kind {
        LayerKind::Embedding => fit.x.clone(),
        LayerKind::Linear | LayerKind::Conv1d | LayerKind::Conv2d => {
            fit.x.transpose(1, 2)?.contiguous()?
        }
    };
    let found = report((path, kind), scan, &layout, &fit, &r)?;
    let stored = stored((pair, kind), scan, &layout, magnitude, &fit, &r)?;
    let unexplained = [fit.rest, fit.rest_of_rotation.min(fit.change)];
    Ok(Ok((stored, found, unexplained)))
}

fn stored(
    (pair, kind): (&Pair, LayerKind),
    scan: &Scan,
    layout: &BlockLayout,
    magnitude: Magnitude,
    fit: &Fit,
    r: &Tensor,
) -> Result<StoredLayer> {
    let dtype = match pair.dtype_before {
        DType::F64 => DType::F64,
        _ => DType::F32,
    };
    let norms: Vec<f64> = scan.before.iter().map(|square| square.sqrt()).collect();
    let norms = Tensor::new(norms, &Device::Cpu)?.to_dtype(dtype)?;
    let sign = if kind.is_kernel() { -1. } else { 1. };
    let q = rotation::inverse_cayley(r)?;
    let packed = (rotation::packed(&q)? * (layout.divisor() * sign))?;
    let value = fit.ratio.as_ref().map(|ratio| -> Result<Tensor> {
        let ratio = Tensor::new(ratio.as_slice(), &Device::Cpu)?;
        let value = match magnitude {
            Magnitude::Log => ratio.log()?,
            Magnitude::Factor | Magnitude::None => ratio,
            Magnitude::Absolute => (ratio * norms.to_dtype(DType::F64)?)?,
        };
        Ok(value.to_dtype(dtype)?)
    });
    Ok(StoredLayer {
        kind: Some(kind),
        shape: Some(pair.shape.clone()),
        block_size: layout.block_size,
        shared: None,
        map: layout.map,
        scaled: layout.scaled,
        max_norm: None,
        magnitude,
        packed: packed.to_dtype(dtype)?,
        kernel_factor: -1.,
        value: value.transpose()?,
        base: fingerprint(&norms)?,
        norms: (magnitude == Magnitude::Absolute).then_some(norms),
        low_rank: None,
    })
}

fn report(
    (path, kind): (&str, LayerKind),
    scan: &Scan,
    layout: &BlockLayout,
    fit: &Fit,
    r: &Tensor,
) -> Result<LayerExtraction> {
    let angles = rotation::angles(r)?;
    let angle = angles.iter().flatten().fold(0f64, |most, a| most.max(*a));
    let ratio = fit.ratio.as_deref().unwrap_or(&[1.]);
    let size = scan.before.iter().sum::<f64>().sqrt();
    let share = |rest: f64| 1. - rest / fit.change;
    Ok(LayerExtraction {
        path: path.to_string(),
        kind,
        block_size: layout.block_size,
        change: if size > 0. {
            fit.change.sqrt() / size
        } else {
            f64::INFINITY
        },
        explained: share(fit.rest),
        explained_by_rotation: share(fit.rest_of_rotation.min(fit.change)),
        max_angle_degrees: angle.to_degrees(),
        ratio_min: ratio.iter().copied().fold(f64::INFINITY, f64::min),
        ratio_max: ratio.iter().copied().fold(f64::NEG_INFINITY, f64::max),
        half_turns: fit.half_turns,
        squared_change: fit.change,
    })
}
