//! One layer of several adapters: common blocks, their product, and magnitudes.

use super::super::strength::Values;
use super::super::tensors::not_finite;
use super::Same;
use crate::adapter::StoredLayer;
use crate::config::{LayerKind, Magnitude, Map};
use crate::error::Result;
use crate::rotation;
use candle_core::{DType, Device, Tensor};

/// Entries of all blocks of one layer. Two small files may ask for large blocks, many times.
const MOST: usize = 1 << 28;

/// Rotations of several adapters on common blocks, `(rows, b, b)` each; none where an adapter turns nothing.
pub(super) struct Blocks {
    pub(super) size: usize,
    pub(super) each: Vec<Option<Tensor>>,
}

impl Same<'_> {
    /// The adapters one after the other.
    pub(super) fn product(&self) -> Result<StoredLayer> {
        let mut there = self.layers.iter().flatten();
        if let (Some(layer), None) = (there.next(), there.next()) {
            return Ok(layer.clone());
        }
        let kind = self.layers.iter().flatten().find_map(|layer| layer.kind);
        for (at, layer) in self.layers.iter().enumerate() {
            if layer
                .as_ref()
                .is_some_and(|l| l.kind.is_none() && l.kernel_factor != 1.)
            {
                return self.refuse(
                    at,
                    "may be a kernel, which turns the other way round; give the base, to tell",
                );
            }
        }
        let blocks = self.blocks()?;
        let mut product: Option<Tensor> = None;
        for r in blocks.each.iter().flatten() {
            product = Some(match product {
                None => r.clone(),
                // `E R_A R_B`, and `W R_A^T R_B^T = W (R_B R_A)^T`.
                Some(before) if kind == Some(LayerKind::Embedding) => before.matmul(r)?,
                Some(before) => r.matmul(&before)?,
            });
        }
        self.layer(blocks.size, product, &vec![1.; self.layers.len()])
    }

    /// The rotations of all adapters on the largest of their block sizes.
    pub(super) fn blocks(&self) -> Result<Blocks> {
        let mut found = Vec::new();
        for (at, layer) in self.layers.iter().enumerate() {
            let values = layer.as_ref().map(Values::of).transpose()?.flatten();
            if let (Some(layer), Some(_)) = (layer, &values) {
                if !layer.map.is_orthogonal() {
                    return self.refuse(
                        at,
                        "has the series for its map, which is not orthogonal; project it first (`convert \
                         --project cayley`)",
                    );
                }
                if layer.kind.is_none() && layer.kernel_factor.abs() != 1. {
                    return self.refuse(
                        at,
                        "has a divisor that its kind decides; give the base, to tell it",
                    );
                }
            }
            let r = values.map(|values| rotation::of_generator(values.layout.map, &values.q));
            found.push(r.transpose()?);
        }
        let dims = |r: &Tensor| Ok::<_, crate::Error>((r.dim(0)?, r.dim(1)?));
        let mut size = 1;
        for r in found.iter().flatten() {
            size = size.max(dims(r)?.1);
        }
        let rows = self.rows(&found, size)?;
        let mut each = Vec::new();
        for (at, r) in found.into_iter().enumerate() {
            each.push(match r {
                Some(r) => Some(self.expanded(at, &r, (rows, size))?),
                None => None,
            });
        }
        Ok(Blocks { size, each })
    }

    /// Blocks of the common size; 1 where all adapters have one row.
    fn rows(&self, found: &[Option<Tensor>], size: usize) -> Result<usize> {
        let mut width: Option<usize> = None;
        for (at, r) in found.iter().enumerate() {
            let Some((rows, b)) = r
                .as_ref()
                .map(|r| Ok::<_, crate::Error>((r.dim(0)?, r.dim(1)?)))
                .transpose()?
            else {
                continue;
            };
            if rows == 1 {
                continue;
            }
            if let Some(width) = width.filter(|width| *width != rows * b) {
                let found = rows * b;
                return self.refuse(
                    at,
                    format!("has the input width {found}, but {width} in an adapter before it"),
                );
            }
            width = Some(rows * b);
        }
        let Some(width) = width else { return Ok(1) };
        match width % size {
            0 => Ok(width / size),
            _ => self.refuse(
                0,
                format!("has the input width {width}, which blocks of size {size} do not divide"),
            ),
        }
    }

    /// `r` on `rows` blocks of the size, each a diagonal of smaller ones.
    fn expanded(&self, at: usize, r: &Tensor, (rows, size): (usize, usize)) -> Result<Tensor> {
        let (given, b, _) = r.dims3()?;
        if !size.is_multiple_of(b) {
            return self.refuse(
                at,
                format!("has blocks of size {b}, another adapter of {size}, and neither divides the other"),
            );
        }
        if rows.saturating_mul(size * size) > MOST {
            return self.refuse(
                at,
                format!("would have {rows} blocks of size {size} together with another adapter, which take too much memory"),
            );
        }
        let per_row = size / b;
        if b == size {
            return Ok(r.broadcast_as((rows, b, b))?.contiguous()?);
        }
        let values: Vec<f64> = r.flatten_all()?.to_vec1()?;
        let mut wide = vec![0.; rows * size * size];
        for (d, wide) in wide.chunks_exact_mut(size * size).enumerate() {
            for k in 0..per_row {
                let from = if given == 1 { 0 } else { d * per_row + k };
                let block = &values[from * b * b..][..b * b];
                for (i, row) in block.chunks_exact(b).enumerate() {
                    wide[(k * b + i) * size + k * b..][..b].copy_from_slice(row);
                }
            }
        }
        Ok(Tensor::from_vec(wide, (rows, size, size), &Device::Cpu)?)
    }

    /// The layer of those rotations; magnitudes multiply, each to the power of its weight.
    pub(super) fn layer(
        &self,
        block_size: usize,
        r: Option<Tensor>,
        weights: &[f64],
    ) -> Result<StoredLayer> {
        let mut there = self.layers.iter().flatten();
        let Some(first) = there.next() else {
            return self.refuse(0, "is in no adapter");
        };
        let mut layer = first.clone();
        let wide = |l: &StoredLayer| l.packed.dtype() == DType::F64;
        let dtype = match self.layers.iter().flatten().any(wide) {
            true => DType::F64,
            false => DType::F32,
        };
        if let Some(r) = r {
            let q = match rotation::inverse_cayley(&r) {
                Ok(q) => q,
                Err(_) => {
                    return self.refuse(
                        self.layers.len() - 1,
                        "would turn a plane by 180 degrees together with the adapters before it, which the \
                         Cayley map does not reach",
                    );
                }
            };
            layer.block_size = block_size;
            layer.shared = None;
            layer.map = Map::Cayley;
            layer.scaled = self.layers.iter().flatten().any(|layer| layer.scaled);
            layer.max_norm = None;
            let c = if layer.scaled {
                Map::Cayley.divisor(block_size)
            } else {
                1.
            };
            let known = layer.kind.is_some();
            let sign = if layer.kind.is_some_and(LayerKind::is_kernel) {
                -1.
            } else {
                1.
            };
            layer.kernel_factor = if known { -1. } else { layer.kernel_factor };
            layer.packed = (rotation::packed(&q)? * (c * sign))?.to_dtype(dtype)?;
        }
        self.magnitude(&mut layer, weights, dtype)?;
        Ok(layer)
    }

    fn magnitude(&self, layer: &mut StoredLayer, weights: &[f64], dtype: DType) -> Result<()> {
        let mut ratios: Vec<(Vec<f64>, f64)> = Vec::new();
        for (at, (of_adapter, weight)) in self.layers.iter().zip(weights).enumerate() {
            let Some(of_adapter) = of_adapter.as_ref().filter(|layer| layer.value.is_some()) else {
                continue;
            };
            let Some(ratio) = of_adapter.ratio(None, DType::F64)? else {
                return self.refuse(
                    at,
                    "has no `initial_norm`, so its ratio is not known; load it onto its base and save it",
                );
            };
            let ratio: Vec<f64> = ratio.to_vec1()?;
            if let Some((first, _)) = ratios
                .first()
                .filter(|(first, _)| first.len() != ratio.len())
            {
                let (found, expected) = (ratio.len(), first.len());
                return self.refuse(
                    at,
                    format!("has {found} outputs, but {expected} in an adapter before it"),
                );
            }
            if *weight != 1. && ratio.iter().any(|ratio| *ratio <= 0.) {
                return self.refuse(
                    at,
                    "has a factor of 0 or below, which has no geometric mean",
                );
            }
            ratios.push((ratio, *weight));
        }
        layer.norms = None;
        let Some((first, _)) = ratios.first() else {
            layer.magnitude = Magnitude::None;
            layer.value = None;
            return Ok(());
        };
        let mut product = vec![1.; first.len()];
        let mut logs = vec![0.; first.len()];
        for (ratio, weight) in &ratios {
            for ((product, log), ratio) in product.iter_mut().zip(&mut logs).zip(ratio) {
                *product *= ratio;
                *log += weight * ratio.ln();
            }
        }
        // A factor of 0 or below has no logarithm.
        let positive = ratios
            .iter()
            .flat_map(|(ratio, _)| ratio)
            .all(|ratio| *ratio > 0.);
        let (kind, values) = match positive {
            true => (Magnitude::Log, logs),
            false => (Magnitude::Factor, product),
        };
        layer.magnitude = kind;
        layer.value = Some(Tensor::new(values, &Device::Cpu)?.to_dtype(dtype)?);
        if let Some(ratio) = layer.ratio(None, DType::F32)?
            && let Some((index, found)) = not_finite(&ratio)?
        {
            let last = self.layers.len() - 1;
            return self.refuse(
                last,
                format!("would have the factor {found} at index {index}, beyond f32"),
            );
        }
        Ok(())
    }
}
