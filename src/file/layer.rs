//! What the dialects of other tools share: from stored values to one layer.

use super::options::Divisor;
use super::tensors::{Tensors, refused, shown};
use crate::adapter::{StoredLayer, Warning};
use crate::config::{LayerKind, Magnitude, Map};
use crate::error::{Error, Result};
use candle_core::{DType, Tensor};
use std::collections::BTreeMap;

/// Layers, extra tensors and warnings.
pub(super) type Read = (
    BTreeMap<String, StoredLayer>,
    BTreeMap<String, Tensor>,
    Vec<Warning>,
);

/// One layer as a dialect describes it.
pub(super) struct Description {
    pub(super) kind: Option<LayerKind>,
    pub(super) map: Map,
    /// On linear layers and embeddings; none for unscaled.
    pub(super) divisor: Option<Divisor>,
    /// On kernels, where it is another.
    pub(super) kernel_divisor: Option<Divisor>,
    /// The file's rotation is `R(sign Q)` on linear layers and on kernels, in this crate's sides.
    pub(super) sign: f64,
    pub(super) kernel_sign: f64,
    pub(super) max_norm: Option<f64>,
    /// Projection of the values before use: `eps`.
    pub(super) coft: Option<f64>,
}

/// Packed values and magnitude of one layer.
pub(super) struct Values {
    pub(super) packed: Tensor,
    pub(super) magnitude: Magnitude,
    pub(super) value: Option<Tensor>,
    pub(super) norms: Option<Tensor>,
}

impl Description {
    /// Folds everything in which the file differs from this crate into the packed values.
    pub(super) fn layer(&self, b: usize, values: Values) -> Result<StoredLayer> {
        let mut packed = values.packed.to_dtype(DType::F64)?;
        if let Some(eps) = self.coft {
            packed = project(&packed, eps)?;
        }
        let ours = match self.divisor {
            Some(_) => self.map.divisor(b),
            None => 1.,
        };
        let theirs = self.divisor.map_or(1., |divisor| divisor.value(b));
        let on_kernels = self
            .kernel_divisor
            .map_or(theirs, |divisor| divisor.value(b));
        // Exactly 1 where the conventions agree, so that values stay bit for bit.
        let factor = self.sign * if ours == theirs { 1. } else { ours / theirs };
        let kernel = self.kernel_sign
            * if ours == on_kernels {
                1.
            } else {
                ours / on_kernels
            };
        let packed = (packed * factor)?.to_dtype(DType::F32)?;
        Ok(StoredLayer {
            kind: self.kind,
            shape: None,
            block_size: b,
            map: self.map,
            scaled: self.divisor.is_some(),
            max_norm: self.max_norm,
            magnitude: values.magnitude,
            packed,
            kernel_factor: kernel / factor,
            value: values.value.map(|v| flat(&v)).transpose()?,
            norms: values.norms.map(|v| flat(&v)).transpose()?,
            base: None,
        })
    }
}

fn flat(tensor: &Tensor) -> Result<Tensor> {
    Ok(tensor.flatten_all()?.to_dtype(DType::F32)?)
}

/// COFT's projection: rows of Frobenius norm above `eps / sqrt(rows)` are scaled down to it.
fn project(packed: &Tensor, eps: f64) -> Result<Tensor> {
    let rows: Vec<Vec<f64>> = packed.to_vec2()?;
    let limit = eps / (rows.len() as f64).sqrt();
    let projected: Vec<Vec<f64>> = rows
        .into_iter()
        .map(|row| {
            let norm = (2. * row.iter().map(|v| v * v).sum::<f64>()).sqrt();
            let factor = if norm > limit { limit / norm } else { 1. };
            row.into_iter().map(|v| v * factor).collect()
        })
        .collect();
    Ok(Tensor::new(projected, packed.device())?)
}

/// The packed rows of a tensor and their block size.
pub(super) fn packed(tensors: &Tensors, key: &str) -> Result<(Tensor, usize)> {
    let tensor = tensors.read(key)?;
    let fail = || {
        Err(Error::FileTensor {
            file: tensors.file().to_path_buf(),
            tensor: shown(key),
            found: format!("shape {:?}", tensor.dims()),
            expected: "at least one row and b(b-1)/2 columns for a block size b".into(),
            fix: "the file is damaged or not an adapter",
        })
    };
    match tensor.dims() {
        &[rows, columns] if rows > 0 => match block_size(columns) {
            Some(b) => Ok((tensor, b)),
            None => fail(),
        },
        _ => fail(),
    }
}

/// `b` from `n = b (b - 1) / 2`, where it is whole.
pub(super) fn block_size(columns: usize) -> Option<usize> {
    let root = (1. + 8. * columns as f64).sqrt();
    let b = ((1. + root) / 2.).round() as usize;
    (b.checked_mul(b.checked_sub(1)?)? == columns.checked_mul(2)?).then_some(b)
}

/// A magnitude: one float for each output, in one of the shapes that the tools write.
pub(super) fn magnitude(tensors: &Tensors, key: &str) -> Result<Tensor> {
    let tensor = tensors.read(key)?;
    let one = |dims: &[usize]| dims.iter().all(|d| *d == 1);
    let fits = match tensor.dims() {
        [out] => *out > 0,
        [1, out, rest @ ..] if rest.len() == 2 => *out > 0 && one(rest),
        [out, rest @ ..] => *out > 0 && one(rest),
        [] => false,
    };
    if fits {
        return Ok(tensor);
    }
    Err(Error::FileTensor {
        file: tensors.file().to_path_buf(),
        tensor: shown(key),
        found: format!("shape {:?}", tensor.dims()),
        expected: "one element for each output, (out) or (out, 1 ..)".into(),
        fix: "it belongs to another kind of adapter or was cut",
    })
}

/// A factor has to stay finite in f32.
pub(super) fn check_factor(tensors: &Tensors, key: &str, factor: &Tensor) -> Result<()> {
    match super::tensors::not_finite(factor)? {
        None => Ok(()),
        Some((index, found)) => {
            let key = shown(key);
            refused(
                tensors.file(),
                format!("`{key}` makes a factor of {found} at index {index}"),
            )
        }
    }
}

pub(super) fn warning(subject: &str, message: impl Into<String>) -> Warning {
    Warning {
        subject: shown(subject),
        message: message.into(),
    }
}
