//! Attention that keeps q, k, v, its output and two numbers for each row.
//!
//! ```text
//! P = softmax(s Q K^T + mask),  O = P V
//! M_i = max_j s q_i . k_j,  L_i = sum_j exp(s q_i . k_j - M_i)
//! dV = P^T dO,  dS = P * (dO V^T - D) * s,  D_i = dO_i . O_i,  dQ = dS K,  dK = dS^T Q
//! ```
//!
//! Scores exist for one block of rows at a time, and P is made again from `M` and `L` on the way back
//! ("FlashAttention-2", arXiv:2307.08691, algorithms 1 and 2; the blocks here are of rows alone, for a
//! cache holds a strip of scores, and `M` and `L` are apart, for in f32 a large `M` swamps `ln L`). Query `i` of `T` sees the keys up to `S - T + i`, or all that are kept.

use super::composed::composed_in;
use super::gemm::{Mat, MatMut, multiply};
use super::real::{Real, by_dtype, elements, narrowed, slice, tensor_as, with_elements};
use super::rows::{exponentials, largest, sum_of};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp3, D, Layout, Result, Shape, Storage, Tensor};
use rayon::prelude::*;
use std::borrow::Cow;
use std::sync::{Arc, OnceLock};

/// Rows whose scores exist at once.
const ROWS: usize = 64;

/// The op. Its arguments are q `(B, H, T, d)`, k and v `(B, H / g, S, d)`; its answer is
/// `(B, T, H, d)`, which is how the projection that follows wants it.
#[derive(Clone)]
pub(crate) struct Attention {
    scale: f64,
    sees: Sees,
    /// `M` and `L`, `(B, T, H)`.
    sums: Arc<OnceLock<Vec<[f64; 2]>>>,
}

/// Which keys a query sees.
#[derive(Clone, Debug)]
pub(crate) enum Sees {
    /// Query `i` of `T` those up to `S - T + i`.
    Earlier,
    /// Every query those that are kept, of `(B, S)`; without a list all of them.
    Kept(Option<Arc<[bool]>>),
}

impl Sees {
    /// The keys that the queries up to `end` see at most.
    fn until(&self, s: &Sizes, end: usize) -> usize {
        match self {
            Self::Earlier => s.keys - s.steps + end,
            Self::Kept(_) => s.keys,
        }
    }

    /// Puts `hidden` where query `step` of a batch does not see the key of a score.
    fn hide<T: Copy>(&self, s: &Sizes, batch: usize, step: usize, scores: &mut [T], hidden: T) {
        match self {
            Self::Earlier => scores[s.keys - s.steps + step + 1..].fill(hidden),
            Self::Kept(None) => {}
            Self::Kept(Some(kept)) => {
                let kept = &kept[batch * s.keys..];
                for (score, kept) in scores.iter_mut().zip(kept) {
                    if !kept {
                        *score = hidden;
                    }
                }
            }
        }
    }

    /// How many of the first keys of a score row can be seen at all.
    fn visible(&self, s: &Sizes, step: usize) -> usize {
        self.until(s, step + 1)
    }
}

/// A rank 4 tensor as matrices, one for each of the first two indices.
struct Heads<'a, T: Real> {
    data: Cow<'a, [T]>,
    strides: [usize; 4],
    rows: usize,
    width: usize,
}

impl<'a, T: Real> Heads<'a, T> {
    fn new(storage: &'a CpuStorage, layout: &Layout) -> Result<Self> {
        let (_, _, rows, width) = layout.shape().dims4()?;
        let native = storage.dtype() == T::DTYPE;
        let (data, strides) = match native {
            true => (
                Cow::Borrowed(slice(storage, layout)?),
                layout.stride().to_vec(),
            ),
            false => (
                elements(storage, layout)?,
                Layout::contiguous(layout.shape()).stride().to_vec(),
            ),
        };
        Ok(Self {
            data,
            strides: [strides[0], strides[1], strides[2], strides[3]],
            rows,
            width,
        })
    }

    fn get(&self, batch: usize, head: usize) -> Mat<'_, T> {
        let start = batch * self.strides[0] + head * self.strides[1];
        let data = &self.data[start.min(self.data.len())..];
        Mat::new(
            data,
            (self.rows, self.width),
            (self.strides[2], self.strides[3]),
        )
    }
}

fn with_heads<T: Real, A>(x: &Tensor, f: impl FnOnce(Heads<T>) -> Result<A>) -> Result<A> {
    let (storage, layout) = x.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => f(Heads::new(storage, layout)?),
        _ => Err(super::real::not_on_cpu()),
    }
}

/// The sizes of one attention.
#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    heads: usize,
    group: usize,
    steps: usize,
    keys: usize,
    width: usize,
}

impl Sizes {
    fn new(q: &[usize], k: &[usize]) -> Self {
        Self {
            batch: q[0],
            heads: q[1],
            group: q[1] / k[1].max(1),
            steps: q[2],
            keys: k[2],
            width: q[3],
        }
    }

    /// Blocks of rows.
    fn blocks(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        let starts = (0..self.steps).step_by(ROWS);
        starts.map(|start| (start, ROWS.min(self.steps - start)))
    }
}

impl Attention {
    pub(crate) fn new(scale: f64, sees: Sees) -> Self {
        Self {
            scale,
            sees,
            sums: Arc::default(),
        }
    }

    /// The same out of candle's operations, scores and all; `(B, T, H, d)`.
    pub(crate) fn composed(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let s = Sizes::new(q.dims(), k.dims());
        let dtype = composed_in(q.dtype());
        let repeat = |t: &Tensor| -> Result<Tensor> {
            t.to_dtype(dtype)?
                .unsqueeze(2)?
                .broadcast_as((s.batch, s.heads / s.group, s.group, s.keys, s.width))?
                .reshape((s.batch, s.heads, s.keys, s.width))
        };
        let (k, v) = (repeat(k)?, repeat(v)?);
        let scores = (q.to_dtype(dtype)?.contiguous()?.matmul(&k.t()?)? * self.scale)?;
        let (batches, steps) = match self.sees {
            Sees::Earlier => (1, s.steps),
            Sees::Kept(_) => (s.batch, 1),
        };
        let mut mask = vec![0f32; batches * steps * s.keys];
        if s.keys > 0 {
            for (row, mask) in mask.chunks_exact_mut(s.keys).enumerate() {
                let (batch, step) = (row / steps, row % steps);
                self.sees.hide(&s, batch, step, mask, f32::NEG_INFINITY);
            }
        }
        let mask = Tensor::from_vec(mask, (batches, 1, steps, s.keys), q.device())?;
        let scores = scores.broadcast_add(&mask.to_dtype(dtype)?)?;
        let scores = scores
            .broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?
            .exp()?;
        let weights = scores.broadcast_div(&scores.sum_keepdim(D::Minus1)?)?;
        weights.matmul(&v)?.to_dtype(q.dtype())?.transpose(1, 2)
    }

    fn forward<T: Real>(
        &self,
        (q, ql): (&CpuStorage, &Layout),
        (k, kl): (&CpuStorage, &Layout),
        (v, vl): (&CpuStorage, &Layout),
    ) -> Result<(CpuStorage, Shape)> {
        let s = Sizes::new(ql.dims(), kl.dims());
        let shape = Shape::from((s.batch, s.steps, s.heads, s.width));
        let (queries, keys) = (Heads::<T>::new(q, ql)?, Heads::<T>::new(k, kl)?);
        let values = Heads::<T>::new(v, vl)?;
        let row = s.heads * s.width;
        let mut y = vec![T::zero(); s.batch * s.steps * row];
        let mut sums = vec![[0f64; 2]; s.batch * s.steps * s.heads];
        let scale = T::from_f64(self.scale);
        let per_batch = y
            .par_chunks_mut((s.steps * row).max(1))
            .zip(sums.par_chunks_mut((s.steps * s.heads).max(1)));
        per_batch.enumerate().for_each(|(batch, (y, sums))| {
            let blocks = y
                .par_chunks_mut(ROWS * row)
                .zip(sums.par_chunks_mut(ROWS * s.heads));
            blocks.enumerate().for_each(|(block, (y, sums))| {
                let (start, rows) = (block * ROWS, y.len() / row);
                let seen = self.sees.until(&s, start + rows);
                let mut scores = vec![T::zero(); rows * seen];
                for head in 0..s.heads {
                    let q = queries.get(batch, head).part((start, rows), (0, s.width));
                    let k = keys
                        .get(batch, head / s.group)
                        .part((0, seen), (0, s.width));
                    let v = values
                        .get(batch, head / s.group)
                        .part((0, seen), (0, s.width));
                    multiply(
                        MatMut::new(&mut scores, (rows, seen), seen),
                        q,
                        k.t(),
                        false,
                    );
                    for (i, row) in scores.chunks_exact_mut(seen).enumerate() {
                        let (row, later) = row.split_at_mut(self.sees.visible(&s, start + i));
                        later.fill(T::zero());
                        row.iter_mut().for_each(|v| *v *= scale);
                        if let Sees::Kept(_) = self.sees {
                            let hidden = T::from_f64(f64::NEG_INFINITY);
                            self.sees.hide(&s, batch, start + i, row, hidden);
                        }
                        let shift = largest(row);
                        let sum = exponentials(row, shift);
                        let inverse = T::one() / sum;
                        row.iter_mut().for_each(|v| *v *= inverse);
                        sums[i * s.heads + head] = [shift.to_f64(), sum.to_f64()];
                    }
                    let p = Mat::row_major(&scores, rows, seen);
                    let y = MatMut::new(&mut y[head * s.width..], (rows, s.width), row);
                    multiply(y, p, v, false);
                }
            });
        });
        let _ = self.sums.set(sums);
        Ok((narrowed(y, q.dtype())?, shape))
    }

    fn backward<T: Real>(
        &self,
        (q, k, v): (&Tensor, &Tensor, &Tensor),
        y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let s = Sizes::new(q.dims(), k.dims());
        let Some(sums) = self.sums.get() else {
            return Err(candle_core::Error::Msg("attention has not run".into()));
        };
        let mut dq = vec![T::zero(); q.elem_count()];
        let mut dk = vec![T::zero(); k.elem_count()];
        let mut dv = vec![T::zero(); v.elem_count()];
        with_heads::<T, _>(q, |q| {
            with_heads::<T, _>(k, |k| {
                with_heads::<T, _>(v, |v| {
                    with_elements::<T, _>(y, |y| {
                        with_elements::<T, _>(dy, |dy| {
                            let part = (s.keys * s.width).max(1);
                            dq.par_chunks_mut((s.group * s.steps * s.width).max(1))
                                .zip(dk.par_chunks_mut(part).zip(dv.par_chunks_mut(part)))
                                .enumerate()
                                .for_each(|(pair, (dq, (dk, dv)))| {
                                    let inputs = (&q, &k, &v);
                                    self.pair(pair, &s, inputs, (y, dy, sums), (dq, dk, dv));
                                });
                            Ok(())
                        })
                    })
                })
            })
        })?;
        let give = |d: Vec<T>, like: &Tensor| tensor_as(d, like.shape(), like.dtype()).map(Some);
        Ok((give(dq, q)?, give(dk, k)?, give(dv, v)?))
    }

    /// The gradients of one head of keys, from all heads of queries that share it.
    fn pair<T: Real>(
        &self,
        pair: usize,
        s: &Sizes,
        (q, k, v): (&Heads<T>, &Heads<T>, &Heads<T>),
        (y, dy, sums): (&[T], &[T], &[[f64; 2]]),
        (dq, dk, dv): (&mut [T], &mut [T], &mut [T]),
    ) {
        let kv_heads = s.heads / s.group;
        let (batch, kv_head) = (pair / kv_heads, pair % kv_heads);
        let (k, v) = (k.get(batch, kv_head), v.get(batch, kv_head));
        let row = s.heads * s.width;
        let scale = T::from_f64(self.scale);
        let mut p = vec![T::zero(); ROWS * s.keys];
        let mut ds = vec![T::zero(); ROWS * s.keys];
        for g in 0..s.group {
            let head = kv_head * s.group + g;
            let queries = q.get(batch, head);
            for (start, rows) in s.blocks() {
                let seen = self.sees.until(s, start + rows);
                let all = (0, s.width);
                let q = queries.part((start, rows), all);
                let (k, v) = (k.part((0, seen), all), v.part((0, seen), all));
                let first = (batch * s.steps + start) * row + head * s.width;
                let dy_rows = Mat::new(&dy[first..], (rows, s.width), (row, 1));
                let (p, ds) = (&mut p[..rows * seen], &mut ds[..rows * seen]);
                multiply(MatMut::new(p, (rows, seen), seen), q, k.t(), false);
                multiply(MatMut::new(ds, (rows, seen), seen), dy_rows, v.t(), false);
                let both = p.chunks_exact_mut(seen).zip(ds.chunks_exact_mut(seen));
                for (i, (p, ds)) in both.enumerate() {
                    let at = first + i * row;
                    let along = sum_of(&y[at..at + s.width], &dy[at..at + s.width], |y, d| y * d);
                    let [shift, sum] = sums[(batch * s.steps + start + i) * s.heads + head];
                    let (shift, inverse) = (T::from_f64(shift), T::one() / T::from_f64(sum));
                    let visible = self.sees.visible(s, start + i);
                    p[visible..].fill(T::zero());
                    ds[visible..].fill(T::zero());
                    for (p, ds) in p[..visible].iter_mut().zip(&mut ds[..visible]) {
                        *p = (*p * scale - shift).exp() * inverse;
                        *ds = *p * (*ds - along) * scale;
                    }
                    if let Sees::Kept(_) = self.sees {
                        self.sees.hide(s, batch, start + i, p, T::zero());
                        self.sees.hide(s, batch, start + i, ds, T::zero());
                    }
                }
                let (p, ds) = (
                    Mat::row_major(p, rows, seen),
                    Mat::row_major(ds, rows, seen),
                );
                let to = &mut dq[(g * s.steps + start) * s.width..];
                multiply(MatMut::new(to, (rows, s.width), s.width), ds, k, false);
                multiply(MatMut::new(dk, (seen, s.width), s.width), ds.t(), q, true);
                multiply(
                    MatMut::new(dv, (seen, s.width), s.width),
                    p.t(),
                    dy_rows,
                    true,
                );
            }
        }
    }
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        ql: &Layout,
        k: &CpuStorage,
        kl: &Layout,
        v: &CpuStorage,
        vl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        by_dtype!(q, forward((q, ql), (k, kl), (v, vl)), self)
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        by_dtype!(q, backward((q, k, v), y, dy), self)
    }
}
