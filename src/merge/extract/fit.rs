//! Rotation and ratios of one layer, in turns: each is the best for the other.

use super::pair::{Pair, Scan};
use crate::error::Result;
use crate::rotation;
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

/// Turns of the alternation. From the ratios of the norms a merged adapter is found in one.
const TURNS: usize = 50;

/// What `|T - W_eff|^2` may still fall by, in parts of `|T - W|^2`, when the turns end.
const SETTLED: f64 = 1e-9;

/// The least ratio: a row that should vanish, or turn its sign, cannot.
const LEAST_RATIO: f64 = 1e-6;

/// `T` is near `diag(m) W blockdiag(X)`.
pub(super) struct Fit {
    /// `(D, b, b)`, or `(1, b, b)` when shared.
    pub(super) x: Tensor,
    pub(super) ratio: Option<Vec<f64>>,
    /// `|T - W|^2`.
    pub(super) change: f64,
    /// `|T - W_eff|^2`.
    pub(super) rest: f64,
    /// The least of it without a magnitude.
    pub(super) rest_of_rotation: f64,
    /// Blocks with a plane of nearly 180 degrees.
    pub(super) half_turns: usize,
}

/// A weight pair cut into blocks.
pub(super) struct Fitting<'a> {
    pub(super) pair: &'a Pair<'a>,
    pub(super) scan: &'a Scan,
    pub(super) block_size: usize,
    pub(super) shared: bool,
    pub(super) magnitude: bool,
}

impl Fitting<'_> {
    pub(super) fn run(&self) -> Result<Fit> {
        let sums = self.scan;
        let total: f64 = sums.after.iter().sum();
        // The ratios of the norms are those of a merged adapter.
        let of_norms = sums.before.iter().zip(&sums.after);
        let of_norms = of_norms.map(|(before, after)| match *before > 0. {
            true => (after / before).sqrt().max(LEAST_RATIO),
            false => 1.,
        });
        let of_norms: Vec<f64> = of_norms.collect();
        let scaled = self.magnitude.then_some(of_norms.as_slice());
        let (cross, scaled) = self.cross(true, scaled)?;
        let x = self.nearest(&cross)?;
        let along = (&x * &cross)?.sum_all()?.to_scalar::<f64>()?;
        let rest_of_rotation = (sums.before.iter().sum::<f64>() + total - 2. * along).max(0.);
        let mut fit = Fit {
            x,
            ratio: None,
            change: sums.change,
            rest: rest_of_rotation,
            rest_of_rotation,
            half_turns: 0,
        };
        if self.magnitude {
            self.alternate(sums, total, &scaled, &mut fit)?;
        }
        let (x, half_turns) = rotation::short_of_half_turns(&fit.x)?;
        if half_turns > 0 {
            fit.half_turns = half_turns;
            fit.x = x;
            let along = self.along(&fit.x)?;
            let ratio = match self.magnitude {
                true => ratios(&along, sums),
                false => vec![1.; along.len()],
            };
            fit.rest = rest(&along, &ratio, sums);
            fit.ratio = self.magnitude.then_some(ratio);
        }
        Ok(fit)
    }

    /// From `scaled`, the products with the ratios of the norms; where these are worse than no magnitude,
    /// from the best rotation without one.
    fn alternate(&self, sums: &Scan, total: f64, scaled: &Tensor, fit: &mut Fit) -> Result<()> {
        let mut x = self.nearest(scaled)?;
        let mut along = self.along(&x)?;
        let mut ratio = ratios(&along, sums);
        if rest(&along, &ratio, sums) > fit.rest {
            x = fit.x.clone();
            along = self.along(&x)?;
            ratio = ratios(&along, sums);
        }
        let mut least = rest(&along, &ratio, sums);
        // Below this there is the rounding of the fine-tune's dtype alone.
        let rounding = epsilon(self.pair.dtype_after).powi(2) * total;
        for _ in 0..TURNS {
            if least <= rounding {
                break;
            }
            let next = self.nearest(&self.cross(false, Some(&ratio))?.1)?;
            let along = self.along(&next)?;
            let of_next = ratios(&along, sums);
            let found = rest(&along, &of_next, sums);
            let fell = least - found;
            if fell > 0. {
                (x, ratio, least) = (next, of_next, found);
            }
            if fell <= SETTLED * sums.change {
                break;
            }
        }
        if least <= fit.rest || fit.rest <= rounding {
            (fit.x, fit.ratio, fit.rest) = (x, Some(ratio), least);
        } else {
            fit.ratio = Some(vec![1.; sums.before.len()]);
        }
        Ok(())
    }

    fn nearest(&self, cross: &Tensor) -> Result<Tensor> {
        // Directions that the rows have only in the rounding of the fine-tune say nothing.
        let tolerance = epsilon(self.pair.dtype_after).powi(2).max(1e-13);
        rotation::nearest_rotation(cross, tolerance)
    }

    /// `W^T T` and `W^T diag(m) T` of each block, as far as they are asked for; the sums over all blocks when
    /// one is shared.
    fn cross(&self, plain: bool, ratio: Option<&[f64]>) -> Result<(Tensor, Tensor)> {
        let (blocks, b) = (self.pair.dims().1 / self.block_size, self.block_size);
        let zeros = Tensor::zeros((blocks, b, b), DType::F64, &Device::Cpu)?;
        let (mut of_plain, mut of_ratio) = (zeros.clone(), zeros);
        self.rows(|start, before, after| {
            let rows = before.dim(0)?;
            let product = |before: &Tensor| -> Result<Tensor> {
                let before = self.cut(before)?.transpose(1, 2)?;
                Ok(before.matmul(&self.cut(&after)?)?)
            };
            if plain {
                of_plain = (&of_plain + product(&before)?)?;
            }
            if let Some(ratio) = ratio {
                let ratio =
                    Tensor::from_slice(&ratio[start..start + rows], (rows, 1), &Device::Cpu)?;
                of_ratio = (&of_ratio + product(&before.broadcast_mul(&ratio)?)?)?;
            }
            Ok(())
        })?;
        match self.shared {
            true => Ok((of_plain.sum_keepdim(0)?, of_ratio.sum_keepdim(0)?)),
            false => Ok((of_plain, of_ratio)),
        }
    }

    /// `<T_o, (W X)_o>` of each row.
    fn along(&self, x: &Tensor) -> Result<Vec<f64>> {
        let b = self.block_size;
        let blocks = self.pair.dims().1 / b;
        let x = x.broadcast_as((blocks, b, b))?.contiguous()?;
        let mut along = Vec::new();
        self.rows(|_, before, after| {
            let (rows, width) = before.dims2()?;
            let turned = on_host(&self.cut(&before)?.matmul(&x)?)?;
            let after = on_host(&after)?;
            let of_row = after.par_chunks_exact(width).enumerate().map(|(o, after)| {
                let blocks = after.chunks_exact(b).enumerate();
                let of_block = |(d, after): (usize, &[f64])| -> f64 {
                    let turned = &turned[(d * rows + o) * b..][..b];
                    turned.iter().zip(after).map(|(x, y)| x * y).sum()
                };
                blocks.map(of_block).sum::<f64>()
            });
            along.par_extend(of_row);
            Ok(())
        })?;
        Ok(along)
    }

    /// Rows `(rows, width)` as blocks `(D, rows, b)`, a view.
    fn cut(&self, x: &Tensor) -> Result<Tensor> {
        let (rows, width) = x.dims2()?;
        let b = self.block_size;
        Ok(x.reshape((rows, width / b, b))?.transpose(0, 1)?)
    }

    /// Some rows at a time of both weights, `(rows, width)` in f64, with the number of the first.
    fn rows(&self, mut of_rows: impl FnMut(usize, Tensor, Tensor) -> Result<()>) -> Result<()> {
        self.pair.rows(|start, before, after| {
            of_rows(
                start,
                before.to_dtype(DType::F64)?,
                after.to_dtype(DType::F64)?,
            )
        })
    }
}

fn on_host(x: &Tensor) -> Result<Vec<f64>> {
    Ok(x.flatten_all()?.to_vec1()?)
}

/// The best ratio of each row for a rotation.
fn ratios(along: &[f64], sums: &Scan) -> Vec<f64> {
    let rows = along.iter().zip(&sums.before);
    rows.map(|(along, before)| match *before > 0. {
        true => (along / before).max(LEAST_RATIO),
        false => 1.,
    })
    .collect()
}

/// `|T - diag(m) W X|^2`.
fn rest(along: &[f64], ratio: &[f64], sums: &Scan) -> f64 {
    let rows = along
        .iter()
        .zip(ratio)
        .zip(sums.before.iter().zip(&sums.after));
    let rest = rows.map(|((along, m), (before, after))| after - 2. * m * along + m * m * before);
    rest.sum::<f64>().max(0.)
}

/// Half the distance from 1 to the next number.
fn epsilon(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => f64::EPSILON / 2.,
        DType::F16 => 0.5f64.powi(11),
        DType::BF16 => 0.5f64.powi(8),
        _ => f64::from(f32::EPSILON) / 2.,
    }
}
