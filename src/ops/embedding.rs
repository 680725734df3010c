//! The DOFT embedding: rows of a frozen table, rotated and scaled.
//!
//! ```text
//! y_t = ratio_t * (E[id_t] . blockdiag(R))
//! dR_d = sum_t E[id_t]_d^T (ratio_t dy_t)_d        dratio_t = dy_t . (E[id_t] . blockdiag(R))
//! ```
//!
//! The table lives inside the op, and only the rows in use are read, again on the way back.

use super::blocks::{Blocks, gradient, rotate};
use super::gemm::Mat;
use super::real::{Real, by_dtype, elements, narrowed, tensor, with_elements};
use super::weight::gather;
use super::{Weight, composed};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Device, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

/// The rows of the table that `ids` `(n)` (u32) name, `(n, hidden)`, outside any graph.
pub(crate) fn rows(table: &Weight, ids: &Tensor) -> Result<Tensor> {
    match table.qtensor() {
        // candle looks up rows of whole tables alone.
        None => table.tensor()?.contiguous()?.index_select(ids, 0),
        Some(quantized) if !matches!(table.device(), Device::Cpu) => quantized.embedding(ids),
        Some(_) => {
            let rows = gather::<f32>(table, &ids.to_vec1()?)?;
            tensor(rows, (ids.elem_count(), table.in_dim()))
        }
    }
}

/// The same, rotated by `r` and scaled by `ratio` `(n)`, with gradients to both.
pub(crate) fn doft(
    table: &Weight,
    ids: &Tensor,
    r: &Tensor,
    ratio: Option<&Tensor>,
) -> Result<Tensor> {
    if !matches!(table.device(), Device::Cpu) {
        return composed::embedding(&rows(table, ids)?, r, ratio);
    }
    let op = Lookup {
        table: table.clone(),
        ids: ids.to_vec1()?,
    };
    let r = r.contiguous()?;
    match ratio {
        None => r.apply_op1(op),
        Some(ratio) => r.apply_op2(&ratio.contiguous()?, op),
    }
}

/// The op. Its arguments are R, then the ratio of each row.
#[derive(Clone)]
struct Lookup {
    table: Weight,
    ids: Vec<u32>,
}

impl Lookup {
    /// The rows, and the rows rotated.
    fn rotated<T: Real>(&self, r: &[T], layout: &Layout) -> Result<(Vec<T>, Vec<T>)> {
        let rows = gather::<T>(&self.table, &self.ids)?;
        let x = Mat::row_major(&rows, self.ids.len(), self.table.in_dim());
        let rotated = rotate(x, Blocks::new(r, layout.shape())?);
        Ok((rows, rotated))
    }

    fn forward<T: Real>(
        &self,
        (r, layout): (&CpuStorage, &Layout),
        ratio: Option<(&CpuStorage, &Layout)>,
    ) -> Result<(CpuStorage, Shape)> {
        let width = self.table.in_dim();
        let (_, mut y) = self.rotated::<T>(&elements::<T>(r, layout)?, layout)?;
        if let Some((ratio, layout)) = ratio {
            scale(&mut y, &elements::<T>(ratio, layout)?, width);
        }
        let dtype = self.table.dtype();
        Ok((narrowed(y, dtype)?, Shape::from((self.ids.len(), width))))
    }

    fn backward<T: Real>(
        &self,
        r: &Tensor,
        ratio: Option<&Tensor>,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let width = self.table.in_dim();
        let layout = Layout::contiguous(r.shape());
        let (rows, rotated) = with_elements::<T, _>(r, |r| self.rotated(r, &layout))?;
        let mut dy = with_elements::<T, _>(dy, |dy| Ok(dy.to_vec()))?;
        let dratio = match ratio {
            Some(ratio) if ratio.track_op() => {
                let pairs = dy.par_chunks(width).zip(rotated.par_chunks(width));
                let sums = pairs.map(|(dy, y)| {
                    let products = dy.iter().zip(y).map(|(dy, y)| dy.to_f64() * y.to_f64());
                    T::from_f64(products.sum())
                });
                Some(tensor(sums.collect::<Vec<T>>(), ratio.shape())?)
            }
            _ => None,
        };
        if !r.track_op() {
            return Ok((None, dratio));
        }
        if let Some(ratio) = ratio {
            with_elements::<T, _>(ratio, |ratio| {
                scale(&mut dy, ratio, width);
                Ok(())
            })?;
        }
        let matrix = |values| Mat::row_major(values, self.ids.len(), width);
        let dr = with_elements::<T, _>(r, |values| {
            let r = Blocks::new(values, r.shape())?;
            Ok(gradient(matrix(&rows), matrix(&dy), r))
        })?;
        Ok((Some(tensor(dr, r.shape())?), dratio))
    }
}

fn scale<T: Real>(rows: &mut [T], ratio: &[T], width: usize) {
    let pairs = rows.par_chunks_mut(width).zip(ratio);
    pairs.for_each(|(row, scale)| row.iter_mut().for_each(|v| *v *= *scale));
}

impl CustomOp1 for Lookup {
    fn name(&self) -> &'static str {
        "oft-embedding"
    }

    fn cpu_fwd(&self, r: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        by_dtype!(self.table, forward((r, l), None), self)
    }

    fn bwd(&self, r: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let (dr, _) = by_dtype!(self.table, backward(r, None, dy), self)?;
        Ok(dr)
    }
}

impl CustomOp2 for Lookup {
    fn name(&self) -> &'static str {
        "doft-embedding"
    }

    fn cpu_fwd(
        &self,
        r: &CpuStorage,
        rl: &Layout,
        ratio: &CpuStorage,
        sl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        by_dtype!(self.table, forward((r, rl), Some((ratio, sl))), self)
    }

    fn bwd(
        &self,
        r: &Tensor,
        ratio: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        by_dtype!(self.table, backward(r, Some(ratio), dy), self)
    }
}
