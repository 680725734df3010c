//! A tensor before and after a fine-tune, read some rows at a time: nothing of its size is ever in memory.

use super::super::header::Source;
use crate::error::{Error, Result, shown};
use crate::file;
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

/// Elements that are read and widened to f64 together.
const CHUNK: usize = 1 << 20;

/// Both tensors, where they lie.
pub(super) struct Pair<'a> {
    base: &'a Source,
    tuned: &'a Source,
    name: &'a str,
    /// Of both of them.
    pub(super) shape: Vec<usize>,
    pub(super) dtype_before: DType,
    pub(super) dtype_after: DType,
}

/// What one look at all values tells.
pub(super) struct Scan {
    /// Whether the tensor after is another one, and not that before in the dtype of the fine-tune.
    pub(super) changed: bool,
    /// `|W_o|^2` of each row.
    pub(super) before: Vec<f64>,
    /// `|T_o|^2` of each row.
    pub(super) after: Vec<f64>,
    /// `|T - W|^2`.
    pub(super) change: f64,
}

impl<'a> Pair<'a> {
    /// None where one of them does not hold floats.
    pub(super) fn of(base: &'a Source, tuned: &'a Source, name: &'a str) -> Result<Option<Self>> {
        let (before, after) = (base.info(name)?, tuned.info(name)?);
        let dtypes = (file::float(before.dtype), file::float(after.dtype));
        let (Some(dtype_before), Some(dtype_after)) = dtypes else {
            return Ok(None);
        };
        Ok(Some(Self {
            base,
            tuned,
            name,
            shape: before.shape.clone(),
            dtype_before,
            dtype_after,
        }))
    }

    /// Rows, which are outputs, and their width; a vector is one row.
    pub(super) fn dims(&self) -> (usize, usize) {
        match self.shape.as_slice() {
            [out, inner @ ..] if !inner.is_empty() => (*out, inner.iter().product()),
            vector => (1, vector.iter().product()),
        }
    }

    /// Calls with the number of the first row, and some rows `(rows, width)` of both tensors as they are
    /// stored, until all were seen.
    pub(super) fn rows(
        &self,
        mut of_rows: impl FnMut(usize, Tensor, Tensor) -> Result<()>,
    ) -> Result<()> {
        let (out, width) = self.dims();
        if width == 0 {
            return Ok(());
        }
        let step = (CHUNK / width).max(1);
        for start in (0..out).step_by(step) {
            let rows = step.min(out - start);
            let part = |source: &Source, dtype: DType| -> Result<Tensor> {
                let size = dtype.size_in_bytes() * width;
                let bytes = source.bytes_at(self.name, start * size, rows * size)?;
                let device = &Device::Cpu;
                Ok(Tensor::from_raw_buffer(
                    &bytes,
                    dtype,
                    &[rows, width],
                    device,
                )?)
            };
            let before = part(self.base, self.dtype_before)?;
            of_rows(start, before, part(self.tuned, self.dtype_after)?)?;
        }
        Ok(())
    }

    /// Looks at all values once. Returns an error for one that is not finite where `all` have to be, or
    /// where the tensor changed.
    pub(super) fn scan(&self, all: bool) -> Result<Scan> {
        let mut scan = Scan {
            changed: false,
            before: Vec::new(),
            after: Vec::new(),
            change: 0.,
        };
        let width = self.dims().1;
        self.rows(|_, before, after| {
            let rounded = match before.dtype() == after.dtype() {
                true => None,
                false => Some(wide(&before.to_dtype(after.dtype())?)?),
            };
            let (before, after) = (wide(&before)?, wide(&after)?);
            let rounded = rounded.as_ref().unwrap_or(&before);
            // A NaN differs from itself, and is no change where both have one.
            let differ = |(w, t): (&f64, &f64)| w != t && !(w.is_nan() && t.is_nan());
            scan.changed |= rounded.par_iter().zip(&after).any(differ);
            let squares = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>();
            let of_rows = |x: &[f64]| x.par_chunks_exact(width).map(squares).collect::<Vec<f64>>();
            scan.before.extend(of_rows(&before));
            scan.after.extend(of_rows(&after));
            let apart = before
                .par_chunks_exact(width)
                .zip(after.par_chunks_exact(width));
            let apart =
                apart.map(|(w, t)| w.iter().zip(t).map(|(w, t)| (t - w).powi(2)).sum::<f64>());
            // Row by row in order, so that the sum does not depend on the number of threads.
            scan.change += apart.collect::<Vec<f64>>().iter().sum::<f64>();
            Ok(())
        })?;
        if all || scan.changed {
            for (source, squares) in [(self.base, &scan.before), (self.tuned, &scan.after)] {
                if !squares.iter().sum::<f64>().is_finite() {
                    let name = shown(self.name);
                    let reason = format!(
                        "`{name}` holds a NaN or an infinity, or values above the range; is it damaged?"
                    );
                    return Err(Error::file(&source.path, reason));
                }
            }
        }
        Ok(scan)
    }

    /// The whole tensor after.
    pub(super) fn after(&self) -> Result<Tensor> {
        self.tuned.tensor(self.name)
    }
}

fn wide(x: &Tensor) -> Result<Vec<f64>> {
    Ok(x.flatten_all()?.to_dtype(DType::F64)?.to_vec1()?)
}
