//! [`reduce`]: the gradients of a step whose micro-batches lie on all ranks.

use super::agree::{other, rank};
use super::tree::Tree;
use super::{Processes, share};
use crate::error::{Error, Result};
use crate::train::Gradients;
use candle_core::{DType, WithDType};
use std::convert::Infallible;
use std::fmt::Display;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// A micro-batch of a step, by its number among those of all ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Micro {
    /// Its number in the step: which data it takes.
    pub index: usize,
    /// Its number in the run, for [`Adapter::set_step`](crate::Adapter::set_step): dropout masks then
    /// depend on the micro-batch and not on who makes it.
    pub key: u64,
}

/// What the micro-batches of all ranks came to, the same on each.
#[derive(Debug)]
#[non_exhaustive]
pub struct Reduced {
    /// Their sum, to be clipped and given to [`AdamW::step`](crate::train::AdamW::step).
    pub gradients: Gradients,
    /// The sum of what the micro-batches returned.
    pub loss: f64,
    /// Whether a rank was asked to stop: all end after this step.
    pub stop: bool,
    /// How long this rank was in the reduction, from the end of its micro-batches: that includes waiting for slower
    /// ranks, so the least of all ranks is what the reduction itself takes. 0 in one process.
    pub exchange: Duration,
}

/// Runs the micro-batches of a step, each on one rank, and sums their gradients on all.
///
/// `gradients` are new ones of [`AdamW::gradients`](crate::train::AdamW::gradients). `micro` makes one
/// micro-batch, adds its gradients to those that it is handed, and returns its part of the loss; with
/// [`Gradients::backward`] and weights that are shares of the tokens of all micro-batches. `stop` is looked
/// at once.
///
/// Sums go through a tree over the numbers of micro-batches, in one process too: bits are the same for every
/// power-of-two number of ranks that divides `micro_batches`; for another number they differ by rounding.
/// Every rank sends and receives `2 (N - 1) / N` of the bytes of the gradients.
///
/// # Errors
///
/// That of `micro`; [`Error::Rank`] with that of another rank. All ranks have one at the same step, and no
/// variable has moved.
///
/// # Examples
///
/// ```
/// # use candle_core::{DType, Device, Tensor};
/// # use candle_doft::{Adapter, Error, train::AdamW};
/// # use candle_nn::{Module, VarBuilder};
/// use candle_doft::train::parallel;
/// use std::sync::atomic::AtomicBool;
///
/// # let builder = Adapter::builder(Default::default(), &Device::Cpu)?;
/// # let vb = VarBuilder::zeros(DType::F64, &Device::Cpu).pp("layer");
/// # let layer = builder.linear(32, 8, vb)?;
/// # let adapter = builder.finish()?;
/// # let mut optimizer = AdamW::for_adapter(&adapter, Default::default())?;
/// # let data = vec![Tensor::ones((2, 32), DType::F64, &Device::Cpu)?; 4];
/// let group = parallel::open()?;
/// let stop = AtomicBool::new(false); // set on Ctrl-C
/// let reduced = parallel::reduce(&*group, optimizer.gradients(), 4, &stop, |gradients, micro| {
///     adapter.set_step(micro.key);
///     let loss = (layer.forward(&data[micro.index])? - 1.)?.sqr()?.mean_all()?;
///     gradients.backward(&loss, 1. / 4.)?;
///     Ok::<_, Error>(loss.to_scalar::<f64>()? / 4.)
/// })?;
/// let mut gradients = reduced.gradients;
/// gradients.clip(1.)?;
/// optimizer.step(&gradients)?;
/// assert!(reduced.loss > 0. && !reduced.stop);
/// group.finish()?;
/// # Ok::<(), Error>(())
/// ```
pub fn reduce<E: From<Error> + Display>(
    group: &dyn Processes,
    gradients: Gradients,
    micro_batches: usize,
    stop: &AtomicBool,
    mut micro: impl FnMut(&mut Gradients, Micro) -> Result<f64, E>,
) -> Result<Reduced, E> {
    let mine = share(group, micro_batches);
    let first = (gradients.step() - 1) * micro_batches as u64;
    let mut local = || -> Result<Option<(Gradients, f64)>, E> {
        let mut tree = Tree::new(mine.len());
        for index in mine.clone() {
            let mut leaf = gradients.empty();
            let key = first + index as u64;
            let loss = micro(&mut leaf, Micro { index, key })?;
            tree.push((leaf, loss), |(mut sum, loss), (right, more)| {
                sum.append(right)?;
                Ok::<_, Error>((sum, loss + more))
            })?;
        }
        Ok(tree.sum())
    };
    // Every rank has to come to the exchange, whatever became of its part.
    let result = local();
    let stop = stop.load(Ordering::SeqCst);
    let (sum, result) = match result {
        Ok(sum) => (sum, Ok(())),
        Err(error) => (None, Err(error)),
    };
    let (sum, loss) = sum.unwrap_or_else(|| (gradients.empty(), 0.));
    if group.size() == 1 {
        result?;
        return Ok(Reduced {
            gradients: sum,
            loss,
            stop,
            exchange: Duration::ZERO,
        });
    }
    let said = Said {
        failed: result.is_err(),
        stop,
        step: sum.step(),
        loss,
    };
    let start = Instant::now();
    let exchanged = match sum.dtype() {
        DType::F64 => exchange::<f64>(group, sum, said),
        _ => exchange::<f32>(group, sum, said),
    };
    match exchanged {
        Ok(Exchanged::All(reduced)) => Ok(Reduced {
            exchange: start.elapsed(),
            ..reduced
        }),
        Ok(Exchanged::Failed(first)) => other(group, first, result),
        Err(error) => {
            // Its own error says more than that of an exchange which it had to break.
            result?;
            Err(error.into())
        }
    }
}

/// What a rank says beside its gradients.
#[derive(Clone, Copy)]
struct Said {
    failed: bool,
    stop: bool,
    step: u64,
    loss: f64,
}

impl Said {
    const BYTES: usize = 24;

    fn put(&self, out: &mut Vec<u8>) {
        out.extend([u8::from(self.failed), u8::from(self.stop), 0, 0, 0, 0, 0, 0]);
        out.extend(self.step.to_le_bytes());
        out.extend(self.loss.to_le_bytes());
    }

    fn get(bytes: &[u8]) -> Self {
        let word = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            word
        };
        Self {
            failed: bytes[0] != 0,
            stop: bytes[1] != 0,
            step: u64::from_le_bytes(word(8)),
            loss: f64::from_le_bytes(word(16)),
        }
    }
}

/// What an exchange came to: all have the sum, or all know who failed first.
enum Exchanged {
    All(Reduced),
    Failed(usize),
}

/// A number as it is sent.
pub(super) trait Wire: WithDType + std::ops::Add<Output = Self> {
    fn put(self, out: &mut Vec<u8>);
    fn get(bytes: &[u8]) -> Self;
}

macro_rules! wire {
    ($float:ty) => {
        impl Wire for $float {
            fn put(self, out: &mut Vec<u8>) {
                out.extend(self.to_le_bytes());
            }

            fn get(bytes: &[u8]) -> Self {
                let mut value = [0; size_of::<$float>()];
                value.copy_from_slice(bytes);
                Self::from_le_bytes(value)
            }
        }
    };
}

wire!(f32);
wire!(f64);

/// Numbers that go out at once: buffers stay small beside the gradients, and counts of bytes within what an
/// engine counts with.
pub(super) const BLOCK: usize = 1 << 22;

/// Sums over ranks: each receives a part of every rank's numbers, sums it in the order of the tree, and
/// sends the sum to all.
fn exchange<T: Wire>(group: &dyn Processes, mut sum: Gradients, said: Said) -> Result<Exchanged> {
    let ranks = group.size();
    let mut flat: Vec<T> = sum.flat()?;
    // A variable that no rank has a gradient of stays without one.
    let there = sum.there();
    let number = |there: &bool| T::from_f64(f64::from(u8::from(*there)));
    flat.extend(there.iter().map(number));
    let mut all = Vec::new();
    for (block, values) in flat.chunks_mut(BLOCK).enumerate() {
        let part = values.len().div_ceil(ranks);
        let head = if block == 0 { Said::BYTES } else { 0 };
        let row = head + part * size_of::<T>();
        let mut send = Vec::with_capacity(row * ranks);
        for rank in 0..ranks {
            if block == 0 {
                said.put(&mut send);
            }
            let (from, to) = (rank * part, (rank + 1) * part);
            let len = values.len();
            let mine = &values[from.min(len)..to.min(len)];
            mine.iter().for_each(|value| value.put(&mut send));
            send.resize(row * (rank + 1), 0);
        }
        let mut received = vec![0; send.len()];
        group.all_to_all(&send, &mut received)?;
        let rows = received.chunks_exact(row);
        if block == 0 {
            all = rows.clone().map(Said::get).collect();
            if let Some(first) = all.iter().position(|said| said.failed) {
                return Ok(Exchanged::Failed(first));
            }
            if let Some(other) = all.iter().position(|other| other.step != all[0].step) {
                let (found, expected) = (all[other].step, all[0].step);
                let reason = format!("it is at step {found}, expected {expected} as rank 0");
                return Err(rank(other, reason));
            }
        }
        let sums = over_ranks(ranks, rows.map(|row| numbers::<T>(&row[head..])), |a, b| {
            a.into_iter().zip(b).map(|(a, b)| a + b).collect()
        });
        send.clear();
        sums.into_iter()
            .flatten()
            .for_each(|value| value.put(&mut send));
        received.truncate(part * size_of::<T>() * ranks);
        group.all_gather(&send, &mut received)?;
        for (value, sum) in values.iter_mut().zip(numbers(&received)) {
            *value = sum;
        }
    }
    let counts = flat.split_off(flat.len() - there.len());
    let there: Vec<bool> = counts.iter().map(|count| count.to_f64() > 0.).collect();
    sum.set(&flat, &there)?;
    let losses = over_ranks(ranks, all.iter().map(|said| said.loss), |a, b| a + b);
    Ok(Exchanged::All(Reduced {
        gradients: sum,
        loss: losses.unwrap_or(0.),
        stop: all.iter().any(|said| said.stop),
        exchange: Duration::ZERO,
    }))
}

pub(super) fn numbers<T: Wire>(bytes: &[u8]) -> Vec<T> {
    bytes.chunks_exact(size_of::<T>()).map(T::get).collect()
}

pub(super) fn over_ranks<T>(
    ranks: usize,
    items: impl Iterator<Item = T>,
    mut add: impl FnMut(T, T) -> T,
) -> Option<T> {
    let mut tree = Tree::new(ranks);
    for item in items {
        let Ok(()) = tree.push(item, |a, b| Ok::<_, Infallible>(add(a, b)));
    }
    tree.sum()
}
