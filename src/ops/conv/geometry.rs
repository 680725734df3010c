//! The sizes of a convolution, and the way from an image to its patches and back.

use crate::ops::real::Real;
use candle_core::{Result, Shape};
use rayon::prelude::*;

/// Elements of a panel of patches: 1 MiB of f32.
const PANEL: usize = 1 << 18;

/// What a convolution is beside its weight. One dimension is a kernel of height 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub(crate) kernel: (usize, usize),
    pub(crate) stride: (usize, usize),
    pub(crate) padding: (usize, usize),
    pub(crate) dilation: (usize, usize),
    pub(crate) groups: usize,
    pub(crate) one_dimensional: bool,
}

impl Geometry {
    /// Height and width of the answer, if the kernel fits. None as well where a size leaves the range.
    pub(crate) fn output(&self, height: usize, width: usize) -> Option<(usize, usize)> {
        let along = |size: usize, kernel: usize, stride: usize, padding: usize, dilation: usize| {
            let span = dilation
                .checked_mul(kernel.checked_sub(1)?)?
                .checked_add(1)?;
            let padded = size.checked_add(padding.checked_mul(2)?)?;
            padded
                .checked_sub(span)?
                .checked_div(stride)?
                .checked_add(1)
        };
        let (k, s, p, d) = (self.kernel, self.stride, self.padding, self.dilation);
        Some((
            along(height, k.0, s.0, p.0, d.0)?,
            along(width, k.1, s.1, p.1, d.1)?,
        ))
    }
}

impl Geometry {
    /// Whether the answer to an input, and its patches, have as many bytes as a vector can have.
    pub(crate) fn fits(&self, x: &[usize], outputs: usize) -> bool {
        let &[images, channels, height, width] = x else {
            return false;
        };
        let product = |sizes: &[usize]| sizes.iter().try_fold(1usize, |all, n| all.checked_mul(*n));
        let bytes = || {
            let (rows, columns) = self.output(height, width)?;
            let patch = product(&[channels, self.kernel.0, self.kernel.1])?;
            product(&[8, images.max(1), rows, columns, patch.max(outputs)])
        };
        bytes().is_some_and(|bytes| bytes <= isize::MAX as usize)
    }
}

/// All sizes of one convolution of one input.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub(super) geometry: Geometry,
    pub(super) images: usize,
    pub(super) channels: usize,
    pub(super) input: (usize, usize),
    pub(super) outputs: usize,
    pub(super) output: (usize, usize),
}

impl Sizes {
    pub(super) fn new(geometry: Geometry, x: &[usize], outputs: usize) -> Result<Self> {
        let &[images, channels, height, width] = x else {
            return Err(message(format!("expected an input of rank 4, got {x:?}")));
        };
        let Some(output) = geometry.output(height, width) else {
            let kernel = geometry.kernel;
            return Err(message(format!(
                "a kernel of {kernel:?} is larger than {x:?}"
            )));
        };
        Ok(Self {
            geometry,
            images,
            channels: channels / geometry.groups,
            input: (height, width),
            outputs: outputs / geometry.groups,
            output,
        })
    }

    /// Elements of a patch.
    pub(super) fn patch(&self) -> usize {
        self.channels * self.geometry.kernel.0 * self.geometry.kernel.1
    }

    /// Positions of the answer.
    pub(super) fn positions(&self) -> usize {
        self.output.0 * self.output.1
    }

    pub(super) fn plane(&self) -> usize {
        self.input.0 * self.input.1
    }

    /// Elements of one image and group of the input.
    pub(super) fn image(&self) -> usize {
        self.channels * self.plane()
    }

    /// Images and groups, each a product of its own.
    pub(super) fn units(&self) -> usize {
        self.images * self.geometry.groups
    }

    /// Positions whose patches are in one panel.
    pub(super) fn panel(&self) -> usize {
        (PANEL / self.patch()).max(64).min(self.positions().max(1))
    }

    pub(super) fn answer(&self) -> Shape {
        let (height, width) = self.output;
        let channels = self.outputs * self.geometry.groups;
        Shape::from((self.images, channels, height, width))
    }

    pub(super) fn panels(&self) -> impl Iterator<Item = (usize, usize)> {
        let (all, step) = (self.positions(), self.panel());
        (0..all)
            .step_by(step)
            .map(move |start| (start, step.min(all - start)))
    }

    /// Where tap `(i, j)` of output row `oy` reads, and which output columns of that row it serves.
    fn row(&self, (i, j): (usize, usize), oy: usize) -> Option<(usize, std::ops::Range<usize>)> {
        let g = &self.geometry;
        let y = (oy * g.stride.0 + i * g.dilation.0).checked_sub(g.padding.0)?;
        if y >= self.input.0 {
            return None;
        }
        let shift = j * g.dilation.1;
        let first = g.padding.1.saturating_sub(shift).div_ceil(g.stride.1);
        let end = (self.input.1 + g.padding.1).saturating_sub(shift);
        let end = end.div_ceil(g.stride.1).min(self.output.1);
        Some((y, first..end.max(first)))
    }

    /// The input column of output column `ox` under tap column `j`, which [`Sizes::row`] allowed.
    fn column(&self, j: usize, ox: usize) -> usize {
        let g = &self.geometry;
        ox * g.stride.1 + j * g.dilation.1 - g.padding.1
    }

    fn tap(&self, k: usize) -> (usize, (usize, usize)) {
        let (height, width) = self.geometry.kernel;
        (k / (height * width), (k / width % height, k % width))
    }

    /// For each stretch of one output row in a panel: where it lies in the panel, and its row and
    /// columns of the answer.
    fn stretches(
        &self,
        start: usize,
        count: usize,
    ) -> impl Iterator<Item = (usize, usize, usize, usize)> {
        let width = self.output.1;
        let rows = start / width..(start + count).div_ceil(width);
        rows.map(move |oy| {
            let from = start.max(oy * width);
            let to = (start + count).min((oy + 1) * width);
            (from - start, oy, from - oy * width, to - oy * width)
        })
    }
}

pub(super) fn message(text: String) -> candle_core::Error {
    candle_core::Error::Msg(text)
}

/// The patches at `count` positions from `start` on as columns: `(K, count)`.
pub(super) fn patches<T: Real>(x: &[T], s: &Sizes, (start, count): (usize, usize), to: &mut [T]) {
    to.par_chunks_mut(count).enumerate().for_each(|(k, to)| {
        let (channel, tap) = s.tap(k);
        let plane = &x[channel * s.plane()..][..s.plane()];
        for (at, oy, from, end) in s.stretches(start, count) {
            let to = &mut to[at..at + end - from];
            let Some((y, columns)) = s.row(tap, oy) else {
                to.fill(T::zero());
                continue;
            };
            let (first, last) = (columns.start.clamp(from, end), columns.end.clamp(from, end));
            to[..first - from].fill(T::zero());
            to[last - from..].fill(T::zero());
            if first < last {
                let row = &plane[y * s.input.1..][..s.input.1];
                let row = &row[s.column(tap.1, first)..];
                let to = &mut to[first - from..last - from];
                match s.geometry.stride.1 {
                    1 => to.copy_from_slice(&row[..last - first]),
                    stride => to
                        .iter_mut()
                        .zip(row.iter().step_by(stride))
                        .for_each(|(to, from)| *to = *from),
                }
            }
        }
    });
}

/// Adds columns of patches back to where they came from: the transpose of [`patches`].
pub(super) fn scatter<T: Real>(
    columns: &[T],
    s: &Sizes,
    (start, count): (usize, usize),
    dx: &mut [T],
) {
    let taps = s.geometry.kernel.0 * s.geometry.kernel.1;
    let planes = dx.par_chunks_mut(s.plane()).enumerate();
    planes.for_each(|(channel, plane)| {
        for k in channel * taps..(channel + 1) * taps {
            let (_, tap) = s.tap(k);
            let columns = &columns[k * count..][..count];
            for (at, oy, from, end) in s.stretches(start, count) {
                let Some((y, range)) = s.row(tap, oy) else {
                    continue;
                };
                let (first, last) = (range.start.clamp(from, end), range.end.clamp(from, end));
                if first < last {
                    let values = &columns[at + first - from..at + last - from];
                    let row = &mut plane[y * s.input.1 + s.column(tap.1, first)..];
                    let row = row.iter_mut().step_by(s.geometry.stride.1);
                    row.zip(values).for_each(|(to, from)| *to += *from);
                }
            }
        }
    });
}
