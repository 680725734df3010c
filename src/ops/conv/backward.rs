//! The way back from the outputs to the input and to R.

use super::geometry::{Sizes, patches, scatter};
use super::product::rotated_weight;
use crate::ops::Weight;
use crate::ops::blocks::{Blocks, shared};
use crate::ops::gemm::{Mat, MatMut, multiply, multiply_wide};
use crate::ops::real::Real;
use candle_core::Result;
use rayon::prelude::*;

/// Images and groups whose gradients are summed before the next: bounds the partial sums, and keeps
/// their order whatever the number of threads.
const WAVE: usize = 16;

/// The weight's way is taken for up to this many outputs of a group for each row of a block. In
/// arithmetic the two are equal at 2. Steps in units of the frozen one's (2 cores, f32, b = 32, and 9 in
/// the last line; `cargo bench --bench ratios -- conv_step` with this constant at 0 and 1000):
///
/// | outputs of a group / b | layer | patches | weight |
/// |---|---|---|---|
/// | 20 | 640 -> 640, 1x1, 32x32 | 1.18 | 1.48 |
/// | 10 | 320 -> 320, 3x3, 32x32 | 1.22 | 1.55 |
/// | 4 | 128 -> 128, 3x3, 4 of 16x16 | 1.30 | 1.43 |
/// | 1 | the same in 4 groups | 1.62 | 1.48 |
/// | 1/8 | 320 -> 4, 3x3, 32x32 | 1.63 | 1.32 |
/// | 1/9 | 128 -> 128, depthwise, 4 of 16x16 | 1.46 | 1.30 |
const WEIGHT_WAY: usize = 3;

/// The way back to the input and to R.
pub(super) struct Back<'a, T> {
    pub(super) s: Sizes,
    pub(super) rotation: Option<Blocks<'a, T>>,
    /// Whether `dx` is wanted, and whether `dR` is.
    pub(super) need: (bool, bool),
    pub(super) scale: Option<&'a [T]>,
}

/// How a pass comes to dR.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    /// The weight at hand is rotated already; for dR its whole gradient is taken.
    Weight,
    /// The weight at hand is frozen; patches are rotated.
    Patches,
}

impl<T: Real> Back<'_, T> {
    /// `dx`, `(N, in, H, W)`, and `dR`; each empty when not needed.
    pub(super) fn run(
        &self,
        weight: &Weight,
        x: Option<&[T]>,
        dy: &[T],
    ) -> Result<(Vec<T>, Vec<T>)> {
        let s = &self.s;
        let rotated = match (self.rotation, weight.native(T::DTYPE)) {
            (Some(r), Some(dense)) if !self.need.1 || s.outputs <= WEIGHT_WAY * r.size() => {
                Some(Weight::dense(&rotated_weight(dense, r)?))
            }
            _ => None,
        };
        let way = match (&rotated, self.rotation) {
            (None, Some(_)) => Way::Patches,
            _ => Way::Weight,
        };
        let acting = rotated.as_ref().unwrap_or(weight);
        // Partial sums of one unit, and in how many places of the total they go.
        let (partial, places) = match (self.rotation.filter(|_| self.need.1), way) {
            (None, _) => (0, 1),
            (Some(_), Way::Weight) => (s.outputs * s.patch(), s.geometry.groups),
            (Some(r), Way::Patches) => (s.patch() * r.size(), 1),
        };
        let mut total = vec![T::zero(); partial * places];
        let input = if self.need.0 { s.image() } else { 0 };
        let mut dx = vec![T::zero(); s.units() * input];
        let mut sums = vec![T::zero(); partial * WAVE.min(s.units())];
        for start in (0..s.units()).step_by(WAVE) {
            let count = WAVE.min(s.units() - start);
            let many = count >= rayon::current_num_threads();
            let mut each: Vec<(&mut [T], &mut [T])> = pieces(&mut dx[start * input..], input)
                .zip(pieces(&mut sums, partial))
                .take(count)
                .collect();
            let unit = |(i, (dx, sums)): (usize, &mut (&mut [T], &mut [T]))| {
                let x = x.map(|x| &x[(start + i) * s.image()..][..s.image()]);
                self.unit(start + i, acting, way, (x, dy), (dx, sums), many)
            };
            match many {
                true => each.par_iter_mut().enumerate().try_for_each(unit)?,
                false => each.iter_mut().enumerate().try_for_each(unit)?,
            }
            for (i, (_, sums)) in each.into_iter().enumerate() {
                let to = &mut total[(start + i) % places * partial..][..partial];
                to.iter_mut().zip(sums).for_each(|(to, sum)| *to += *sum);
            }
        }
        let dr = match (self.need.1, self.rotation) {
            (true, Some(r)) => self.rotation_gradient(weight, way, r, total)?,
            _ => Vec::new(),
        };
        Ok((dx, dr))
    }

    /// One image and group: adds to `dx`, and writes the sum that its way takes.
    fn unit(
        &self,
        index: usize,
        weight: &Weight,
        way: Way,
        (x, dy): (Option<&[T]>, &[T]),
        (dx, sums): (&mut [T], &mut [T]),
        many: bool,
    ) -> Result<()> {
        let s = &self.s;
        let (patch, positions, group) = (s.patch(), s.positions(), index % s.geometry.groups);
        let rows = group * s.outputs..(group + 1) * s.outputs;
        let dy = &dy[index * s.outputs * positions..][..s.outputs * positions];
        let product = if many { multiply } else { multiply_wide };
        let panel = s.panel();
        let mut scaled = vec![T::zero(); s.outputs * panel];
        let mut h = vec![T::zero(); patch * panel];
        let mut columns = vec![T::zero(); x.map_or(0, |_| patch * panel)];
        sums.fill(T::zero());
        for (start, count) in s.panels() {
            let scaled = &mut scaled[..s.outputs * count];
            let scale = self.scale.map(|scale| &scale[rows.clone()]);
            scaled_rows(&dy[start..], positions, scale, count, scaled);
            let scaled = Mat::row_major(scaled, s.outputs, count);
            let columns = &mut columns[..x.map_or(0, |_| patch * count)];
            if let Some(x) = x {
                patches(x, s, (start, count), columns);
            }
            if way == Way::Weight && !columns.is_empty() {
                let columns = Mat::row_major(columns, patch, count);
                let to = MatMut::new(sums, (s.outputs, patch), patch);
                product(to, scaled, columns.t(), true);
            }
            if way == Way::Weight && dx.is_empty() {
                continue;
            }
            let h = &mut h[..patch * count];
            weight.panels::<T>(rows.clone(), |first, w| {
                let scaled = scaled.part((first - rows.start, w.rows()), (0, count));
                let h = MatMut::new(h, (patch, count), count);
                product(h, w.t(), scaled, first > rows.start);
            })?;
            if let (Way::Patches, Some(r)) = (way, self.rotation) {
                self.turn(r, (columns, h), sums, count);
            }
            if !dx.is_empty() {
                scatter(h, s, (start, count), dx);
            }
        }
        Ok(())
    }

    /// `dR_d += X_d H_d^T`, then `H = R H`, block by block while it is in cache.
    fn turn(&self, r: Blocks<T>, (columns, h): (&[T], &mut [T]), sums: &mut [T], count: usize) {
        let (b, size) = (r.size(), r.size() * count);
        let turn = |(d, h): (usize, &mut [T])| {
            let copy = h.to_vec();
            let to = MatMut::new(h, (b, count), count);
            multiply(to, r.get(d), Mat::row_major(&copy, b, count), false);
            copy
        };
        if !self.need.1 {
            h.par_chunks_mut(size)
                .enumerate()
                .for_each(|block| drop(turn(block)));
            return;
        }
        let blocks = h.par_chunks_mut(size).zip(sums.par_chunks_mut(b * b));
        blocks.enumerate().for_each(|(d, (h, sum))| {
            let x = Mat::row_major(&columns[d * size..][..size], b, count);
            let copy = match self.need.0 {
                true => turn((d, h)),
                false => h.to_vec(),
            };
            let h = Mat::row_major(&copy, b, count);
            multiply(MatMut::new(sum, (b, b), b), x, h.t(), true);
        });
    }

    /// From the sums to `dR`: `G_d^T W_d` for the weight's way; over all blocks when one is shared.
    fn rotation_gradient(
        &self,
        weight: &Weight,
        way: Way,
        r: Blocks<T>,
        total: Vec<T>,
    ) -> Result<Vec<T>> {
        let (b, patch) = (r.size(), self.s.patch());
        let blocks = match way {
            Way::Patches => total,
            Way::Weight => {
                let rows = weight.out_dim();
                let mut blocks = vec![T::zero(); patch * b];
                weight.panels::<T>(0..rows, |first, w| {
                    let grad = Mat::row_major(&total, rows, patch);
                    let each = blocks.par_chunks_mut(b * b).enumerate();
                    each.for_each(|(d, block)| {
                        let columns = (d * b, b);
                        let grad = grad.part((first, w.rows()), columns).t();
                        let w = w.part((0, w.rows()), columns);
                        multiply(MatMut::new(block, (b, b), b), grad, w, true);
                    });
                })?;
                blocks
            }
        };
        Ok(shared(blocks, r))
    }
}

/// Pieces of `size` elements, one after the other; empty ones without end where `size` is 0.
fn pieces<T>(mut all: &mut [T], size: usize) -> impl Iterator<Item = &mut [T]> {
    std::iter::from_fn(move || all.split_off_mut(..size))
}

/// `count` positions of the gradients of a group's outputs, `stride` apart, each times its scale.
fn scaled_rows<T: Real>(dy: &[T], stride: usize, scale: Option<&[T]>, count: usize, to: &mut [T]) {
    to.par_chunks_mut(count).enumerate().for_each(|(o, to)| {
        let dy = &dy[o * stride..][..count];
        match scale {
            None => to.copy_from_slice(dy),
            Some(scale) => to
                .iter_mut()
                .zip(dy)
                .for_each(|(to, dy)| *to = *dy * scale[o]),
        }
    });
}
