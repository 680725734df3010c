//! The Karcher mean of rotations.

use super::Same;
use super::layers::Blocks;
use crate::adapter::{StoredLayer, Warning};
use crate::error::Result;
use crate::rotation::{self, Planes};
use candle_core::{DType, Device, Tensor};

/// Steps of the iteration. Rotations less than 90 degrees apart take about ten.
const STEPS: usize = 200;

/// Rotations further apart than this have no mean, or several.
const APART: f64 = 180. - 1e-4;

/// How far the rotations of the adapters are apart, over all layers.
#[derive(Default)]
pub(super) struct Turns {
    /// Layers with a relative turn of 90 degrees and more.
    wide: usize,
    /// The widest of all, and its layer.
    widest: (f64, String),
}

impl Turns {
    fn add(&mut self, path: &str, degrees: f64) {
        self.wide += usize::from(degrees >= 90.);
        if degrees > self.widest.0 {
            self.widest = (degrees, path.to_string());
        }
    }

    pub(super) fn warning(&self) -> Option<Warning> {
        let (degrees, path) = &self.widest;
        let message = format!(
            "two adapters turn a plane {degrees:.1} degrees apart here; of {} layers with 90 degrees or more a \
             mean says little",
            self.wide
        );
        (self.wide > 0).then(|| Warning::new(path, message))
    }
}

impl Same<'_> {
    /// The mean of the adapters. One that lacks the layer counts as the identity.
    pub(super) fn mean(&self, weights: &[f64], turns: &mut Turns) -> Result<StoredLayer> {
        let factors = self
            .layers
            .iter()
            .flatten()
            .map(|layer| layer.kernel_factor);
        let first = factors.clone().next();
        let known = self
            .layers
            .iter()
            .flatten()
            .any(|layer| layer.kind.is_some());
        if !known && factors.clone().any(|factor| Some(factor) != first) {
            return self.refuse(
                0,
                "may be a kernel, which the adapters turn in different ways; give the base, to tell",
            );
        }
        let Blocks { size, each } = self.blocks()?;
        let Some(one) = each.iter().flatten().next() else {
            return self.layer(1, None, weights);
        };
        let eye = Tensor::eye(size, DType::F64, &Device::Cpu)?;
        let eye = eye.broadcast_as(one.shape())?.contiguous()?;
        let each: Vec<Tensor> = each
            .into_iter()
            .map(|r| r.unwrap_or_else(|| eye.clone()))
            .collect();
        turns.add(self.path, self.furthest(&each)?);
        match karcher(&each, weights)? {
            Some(r) => self.layer(size, Some(r), weights),
            None => self.refuse(
                0,
                "has rotations in the adapters so far apart that their mean was not found",
            ),
        }
    }

    /// The widest turn between two of the rotations, in degrees.
    fn furthest(&self, each: &[Tensor]) -> Result<f64> {
        let mut widest = 0f64;
        for (at, r) in each.iter().enumerate() {
            for other in &each[..at] {
                let between = other.transpose(1, 2)?.matmul(r)?;
                let angles = rotation::angles(&between)?;
                let found = angles.iter().flatten().fold(0f64, |most, a| most.max(*a));
                widest = widest.max(found.to_degrees());
            }
            if widest >= APART {
                let reason = format!(
                    "turns a plane by {widest:.2} degrees against an adapter before it, and between half turns \
                     there is no mean"
                );
                return self.refuse(at, reason);
            }
        }
        Ok(widest)
    }
}

/// The `R` with `sum_i w_i log(R^T R_i) = 0`, from the rotation nearest to the arithmetic mean; none where
/// the steps do not end.
fn karcher(each: &[Tensor], weights: &[f64]) -> Result<Option<Tensor>> {
    let weighted = |of_each: &dyn Fn(&Tensor) -> Result<Tensor>| -> Result<Option<Tensor>> {
        let mut sum: Option<Tensor> = None;
        for (r, weight) in each.iter().zip(weights) {
            let part = (of_each(r)? * *weight)?;
            sum = Some(match sum {
                Some(sum) => (sum + part)?,
                None => part,
            });
        }
        Ok(sum)
    };
    let Some(arithmetic) = weighted(&|r| Ok(r.clone()))? else {
        return Ok(None);
    };
    let mut mean = rotation::nearest_rotation(&arithmetic, 1e-13)?;
    let mut last = f64::INFINITY;
    for _ in 0..STEPS {
        let back = mean.transpose(1, 2)?;
        let step = weighted(&|r| {
            let q = rotation::inverse_cayley(&back.matmul(r)?)?;
            Planes::of(&q)?.odd(|l| 2. * l.atan())
        });
        // A half turn away from the mean there is no logarithm.
        let Ok(Some(step)) = step else {
            return Ok(None);
        };
        let size = step.abs()?.flatten_all()?.max(0)?.to_scalar::<f64>()?;
        mean = mean.matmul(&rotation::exponential(&step)?)?;
        // At the end of the digits steps get no smaller.
        if size < 1e-15 || size < 1e-12 && size >= last / 2. {
            return Ok(Some(mean));
        }
        last = size;
    }
    Ok((last < 1e-9).then_some(mean))
}
