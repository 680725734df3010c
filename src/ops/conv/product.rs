//! The forward product over the patches of an image.

use super::geometry::{Sizes, patches};
use crate::ops::Weight;
use crate::ops::blocks::{Blocks, rotate_back};
use crate::ops::gemm::{Mat, MatMut, multiply, multiply_wide};
use crate::ops::real::{Real, tensor, with_elements};
use candle_core::{Result, Tensor};
use rayon::prelude::*;

/// `blockdiag(r)^T x` for columns `x` `(K, count)`.
fn rotate_columns<T: Real>(x: &[T], r: Blocks<T>, count: usize, to: &mut [T]) {
    let size = r.size() * count;
    to.par_chunks_mut(size).enumerate().for_each(|(d, to)| {
        let x = Mat::row_major(&x[d * size..][..size], r.size(), count);
        let to = MatMut::new(to, (r.size(), count), count);
        multiply(to, r.get(d).t(), x, false);
    });
}

/// `W . blockdiag(R)^T` for a dense weight of dtype `T`.
pub(super) fn rotated_weight<T: Real>(weight: &Tensor, r: Blocks<T>) -> Result<Tensor> {
    let (_, width) = weight.dims2()?;
    let mut values = with_elements::<T, _>(weight, |values| Ok(values.to_vec()))?;
    rotate_back(&mut values, width, r);
    tensor(values, weight.shape())
}

/// The convolution without magnitude and bias, in panels: `W . (R^T) . X` for all images and groups.
pub(super) fn product<T: Real>(
    x: &[T],
    s: &Sizes,
    weight: &Weight,
    rotation: Option<Blocks<T>>,
) -> Result<Vec<T>> {
    let (positions, patch, groups) = (s.positions(), s.patch(), s.geometry.groups);
    let mut y = vec![T::zero(); s.answer().elem_count()];
    let many = s.units() >= rayon::current_num_threads();
    let unit = |(index, y): (usize, &mut [T])| {
        let rows = index % groups * s.outputs..(index % groups + 1) * s.outputs;
        let x = &x[index * s.image()..][..s.image()];
        let mut columns = vec![T::zero(); patch * s.panel()];
        let mut turned = vec![T::zero(); rotation.map_or(0, |_| columns.len())];
        for (start, count) in s.panels() {
            let columns = &mut columns[..patch * count];
            patches(x, s, (start, count), columns);
            let columns = match rotation {
                None => &*columns,
                Some(r) => {
                    let turned = &mut turned[..patch * count];
                    rotate_columns(columns, r, count, turned);
                    &*turned
                }
            };
            let columns = Mat::row_major(columns, patch, count);
            weight.panels::<T>(rows.clone(), |first, w| {
                let y = &mut y[(first - rows.start) * positions + start..];
                let y = MatMut::new(y, (w.rows(), count), positions);
                match many {
                    true => multiply(y, w, columns, false),
                    false => multiply_wide(y, w, columns, false),
                }
            })?;
        }
        Ok::<(), candle_core::Error>(())
    };
    let size = (s.outputs * positions).max(1);
    match many {
        true => y.par_chunks_mut(size).enumerate().try_for_each(unit)?,
        false => y.chunks_mut(size).enumerate().try_for_each(unit)?,
    }
    Ok(y)
}
