//! A weight before and after a fine-tune.

use super::super::header::Source;
use crate::config::LayerKind;
use crate::error::{Error, Result, shown};
use candle_core::{DType, Tensor};

/// Elements that are widened to f64 together, so that little lies beside the two weights.
pub(super) const CHUNK: usize = 1 << 20;

/// Both weights, as they are stored.
pub(super) struct Pair {
    pub(super) before: Tensor,
    pub(super) after: Tensor,
    pub(super) kind: LayerKind,
}

impl Pair {
    pub(super) fn read(
        base: &mut Source,
        tuned: &mut Source,
        name: &str,
        kind: LayerKind,
    ) -> Result<Self> {
        let before = base.tensor(name)?;
        let after = tuned.tensor(name)?;
        for (source, tensor) in [(&*base, &before), (&*tuned, &after)] {
            if !sum_of_squares(tensor)?.is_finite() {
                return Err(of_source(source, name));
            }
        }
        Ok(Self {
            before,
            after,
            kind,
        })
    }
}

/// The error for a tensor of which a value is not finite.
pub(super) fn not_finite<T>(
    base: &Source,
    tuned: &Source,
    name: &str,
    before: &Tensor,
) -> Result<T> {
    match sum_of_squares(before)?.is_finite() {
        true => Err(of_source(tuned, name)),
        false => Err(of_source(base, name)),
    }
}

fn of_source(source: &Source, name: &str) -> Error {
    let name = shown(name);
    let reason =
        format!("`{name}` holds a NaN or an infinity, or values above the range; is it damaged?");
    Error::file(&source.path, reason)
}

/// Whether the weight after is another one, and not that before in the dtype of the fine-tune.
pub(super) fn changed(before: &Tensor, after: &Tensor) -> Result<bool> {
    for (before, after) in chunks(before, after)? {
        let before = before.to_dtype(after.dtype())?.to_dtype(DType::F64)?;
        let off = before.ne(&after.to_dtype(DType::F64)?)?;
        if off.to_dtype(DType::U32)?.max(0)?.to_scalar::<u32>()? > 0 {
            return Ok(true);
        }
    }
    Ok(false)
}

/// `|T - W|^2`.
pub(super) fn squared_distance(before: &Tensor, after: &Tensor) -> Result<f64> {
    let mut sum = 0.;
    for (before, after) in chunks(before, after)? {
        let off = (after.to_dtype(DType::F64)? - before.to_dtype(DType::F64)?)?;
        sum += off.sqr()?.sum_all()?.to_scalar::<f64>()?;
    }
    Ok(sum)
}

fn sum_of_squares(x: &Tensor) -> Result<f64> {
    let mut sum = 0.;
    for (x, _) in chunks(x, x)? {
        sum += x
            .to_dtype(DType::F64)?
            .sqr()?
            .sum_all()?
            .to_scalar::<f64>()?;
    }
    Ok(sum)
}

/// Parts of two tensors of one shape, flat.
fn chunks(a: &Tensor, b: &Tensor) -> Result<Vec<(Tensor, Tensor)>> {
    let (a, b) = (a.flatten_all()?, b.flatten_all()?);
    let all = a.elem_count();
    let parts = (0..all).step_by(CHUNK).map(|start| {
        let size = CHUNK.min(all - start);
        Ok((a.narrow(0, start, size)?, b.narrow(0, start, size)?))
    });
    parts.collect()
}
