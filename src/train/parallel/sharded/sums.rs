//! Sums over ranks, in the forward pass or in the backward pass.

use super::exchange::Link;
use crate::ops::graft;
use crate::train::parallel::Processes;
use crate::train::parallel::reduce::{BLOCK, Wire, numbers, over_ranks};
use candle_core::{DType, Device, Result, Tensor};

/// `x`, whose gradient is the sum of those of all ranks: before layers that are split by their outputs.
pub(super) fn entered(link: Link, x: &Tensor) -> Result<Tensor> {
    if link.size == 1 || !x.track_op() {
        return Ok(x.clone());
    }
    let back = move |_: &Tensor, _: &Tensor, dy: &Tensor| Ok((Some(summed(link, dy)?), None));
    graft::grafted(x, x, x.detach(), Box::new(back))
}

/// The sum of `x` of all ranks, whose gradient is that of the sum: behind layers that are split by their
/// inputs.
pub(super) fn left(link: Link, x: &Tensor) -> Result<Tensor> {
    if link.size == 1 {
        return Ok(x.clone());
    }
    let sum = summed(link, &x.detach())?;
    if !x.track_op() {
        return Ok(sum);
    }
    let back = |_: &Tensor, _: &Tensor, dy: &Tensor| Ok((Some(dy.clone()), None));
    graft::grafted(x, x, sum, Box::new(back))
}

/// The sum over ranks, in f32 or wider; the same bits on all.
fn summed(link: Link, x: &Tensor) -> Result<Tensor> {
    let flat = x.to_device(&Device::Cpu)?.flatten_all()?;
    let sum = match x.dtype() {
        DType::F64 => {
            let mut values = flat.to_vec1::<f64>()?;
            link.with(|group| sum(group, &mut values))?;
            Tensor::from_vec(values, x.shape(), x.device())?
        }
        _ => {
            let mut values = flat.to_dtype(DType::F32)?.to_vec1::<f32>()?;
            link.with(|group| sum(group, &mut values))?;
            Tensor::from_vec(values, x.shape(), x.device())?
        }
    };
    sum.to_dtype(x.dtype())
}

/// Each rank sums a part, in the tree over ranks, and sends it to all.
fn sum<T: Wire>(group: &dyn Processes, values: &mut [T]) -> crate::Result<()> {
    let ranks = group.size();
    for values in values.chunks_mut(BLOCK) {
        let part = values.len().div_ceil(ranks);
        let row = part * size_of::<T>();
        let mut send = Vec::with_capacity(row * ranks);
        values.iter().for_each(|value| value.put(&mut send));
        send.resize(row * ranks, 0);
        let mut received = vec![0; send.len()];
        group.all_to_all(&send, &mut received)?;
        let rows = received.chunks_exact(row).map(numbers::<T>);
        let sums = over_ranks(ranks, rows, |a, b| {
            a.into_iter().zip(b).map(|(a, b)| a + b).collect()
        });
        send.clear();
        let sums = sums.into_iter().flatten();
        sums.for_each(|value| value.put(&mut send));
        group.all_gather(&send, &mut received)?;
        for (value, sum) in values.iter_mut().zip(numbers(&received)) {
            *value = sum;
        }
    }
    Ok(())
}
