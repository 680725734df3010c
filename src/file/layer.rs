//! What the dialects of other tools share: from stored values to one layer.

use super::group::Group;
use super::options::{Divisor, LoadOptions};
use super::tensors::refused;
use crate::adapter::{Stored, StoredLayer, Warning};
use crate::config::{DoftConfig, LayerKind, Magnitude, Map};
use crate::error::Result;
use candle_core::{DType, Tensor};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// One layer as a dialect describes it.
pub(super) struct Description {
    pub(super) kind: Option<LayerKind>,
    /// Packed rows, as they are stored, and the size of their blocks.
    pub(super) packed: Tensor,
    pub(super) block_size: usize,
    /// Whether the file says that its one row stands for all blocks.
    pub(super) shared: Option<bool>,
    pub(super) map: Map,
    /// The tool's map is the inverse of `map`: that of `-v`.
    pub(super) inverse: bool,
    /// The tool rotates kernels by `W R`, not by `W R^T` as it does matrices.
    pub(super) kernels_turned: bool,
    pub(super) divisor: Divisor,
    /// The divisor of kernels, where it is another.
    pub(super) kernel_divisor: Option<Divisor>,
    pub(super) max_norm: Option<f64>,
    /// Projection of the values before use: `eps`.
    pub(super) coft: Option<f64>,
    pub(super) magnitude: Magnitude,
    pub(super) value: Option<Tensor>,
    pub(super) norms: Option<Tensor>,
}

impl Description {
    /// Unscaled rotations by a map, turned as this crate turns them; neither cap nor magnitude.
    pub(super) fn new(map: Map, (packed, block_size): (Tensor, usize)) -> Self {
        Self {
            kind: None,
            packed,
            block_size,
            shared: None,
            map,
            inverse: false,
            kernels_turned: false,
            divisor: Divisor::None,
            kernel_divisor: None,
            max_norm: None,
            coft: None,
            magnitude: Magnitude::None,
            value: None,
            norms: None,
        }
    }

    /// Folds everything in which the file differs from this crate into the packed values; what the
    /// caller decides replaces what the file says.
    pub(super) fn layer(mut self, group: &Group, options: &LoadOptions) -> Result<StoredLayer> {
        if let Some(map) = options.map {
            (self.map, self.inverse) = (map, false);
        }
        if let Some(divisor) = options.divisor {
            (self.divisor, self.kernel_divisor) = (divisor, None);
        }
        let b = self.block_size;
        let mut packed = self.packed.to_dtype(DType::F64)?;
        if let Some(eps) = self.coft {
            packed = project(&packed, eps)?;
        }
        let scaled = self.divisor != Divisor::None;
        let ours = if scaled { self.map.divisor(b) } else { 1. };
        // Exactly 1 where the conventions agree, so that values stay bit for bit.
        let over = |theirs: f64| if ours == theirs { 1. } else { ours / theirs };
        let sign = |turned: bool| if turned { -1. } else { 1. };
        let factor = sign(self.inverse) * over(self.divisor.value(b));
        let of_kernels = self.kernel_divisor.unwrap_or(self.divisor);
        let of_kernels = sign(self.inverse != self.kernels_turned) * over(of_kernels.value(b));
        let wide = |tensor: Option<Tensor>| tensor.map(|t| t.to_dtype(DType::F32)).transpose();
        group.checked(StoredLayer {
            kind: self.kind,
            shape: None,
            block_size: b,
            shared: self.shared,
            map: self.map,
            scaled,
            max_norm: self.max_norm,
            magnitude: self.magnitude,
            packed: (packed * factor)?.to_dtype(DType::F32)?,
            kernel_factor: of_kernels / factor,
            value: wide(self.value)?,
            norms: wide(self.norms)?,
            base: None,
        })
    }
}

/// COFT's projection: rows of Frobenius norm above `eps / sqrt(rows)` are scaled down to it.
fn project(packed: &Tensor, eps: f64) -> Result<Tensor> {
    if packed.elem_count() == 0 {
        // Rows without entries may be more than there is memory for.
        return Ok(packed.clone());
    }
    let limit = eps / (packed.dim(0)? as f64).sqrt();
    let mut rows: Vec<Vec<f64>> = packed.to_vec2()?;
    for row in &mut rows {
        let norm = (2. * row.iter().map(|v| v * v).sum::<f64>()).sqrt();
        if norm > limit {
            row.iter_mut().for_each(|v| *v *= limit / norm);
        }
    }
    Ok(Tensor::new(rows, packed.device())?)
}

/// The adapter of a file whose configuration is that of its layers: the most common value of each
/// field.
pub(super) fn stored(
    file: &Path,
    layers: BTreeMap<String, StoredLayer>,
    extras: BTreeMap<String, Tensor>,
    warnings: Vec<Warning>,
) -> Result<Stored> {
    if layers.is_empty() {
        return refused(file, "it holds no adapted layer");
    }
    let all = || layers.values();
    let config = DoftConfig {
        block_size: common(all().map(|l| l.block_size.max(2))),
        map: common(all().map(|l| l.map)),
        scaled: common(all().map(|l| l.scaled)),
        max_norm: common(all().map(|l| l.max_norm)),
        magnitude: common(all().map(|l| l.magnitude)),
        ..DoftConfig::default()
    };
    Ok(with_config(file, config, layers, extras, warnings))
}

/// What a file holds, with a warning for layers whose blocks are too small to rotate anything.
pub(super) fn with_config(
    file: &Path,
    config: DoftConfig,
    layers: BTreeMap<String, StoredLayer>,
    extras: BTreeMap<String, Tensor>,
    mut warnings: Vec<Warning>,
) -> Stored {
    let idle = layers.iter().filter(|(_, layer)| layer.block_size == 1);
    let idle =
        idle.map(|(module, _)| Warning::new(module, "its blocks are of size 1 and rotate nothing"));
    warnings.extend(idle);
    Stored {
        file: file.to_path_buf(),
        config,
        layers,
        extras,
        unannounced: BTreeSet::new(),
        warnings,
        allow_partial: false,
        allow_changed_base: false,
    }
}

/// The most common value; of several, the one that comes first.
fn common<T: PartialEq + Default>(values: impl Iterator<Item = T>) -> T {
    let mut counted: Vec<(T, usize)> = Vec::new();
    for value in values {
        match counted.iter_mut().find(|(known, _)| *known == value) {
            Some((_, count)) => *count += 1,
            None => counted.push((value, 1)),
        }
    }
    let most = counted.iter().map(|(_, count)| *count).max();
    let first = counted.into_iter().find(|(_, count)| Some(*count) == most);
    first.map(|(value, _)| value).unwrap_or_default()
}
