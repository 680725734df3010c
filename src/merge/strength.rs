//! [`Strength`]: how much of an adapter is merged, of all its layers or by layer.

use super::Merge;
use crate::adapter::Stored;
use crate::config::Strengths;
use crate::error::{Error, Result};
use crate::file::{self, LoadOptions};
use candle_core::{DType, Tensor};
use std::path::Path;

/// How a strength other than 1 is meant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum StrengthMode {
    /// `W + s (W_eff - W)`.
    #[default]
    Linear,
    /// Angles times `s`, ratio to the power of `s`.
    Geodesic,
}

/// How much of an adapter is merged.
///
/// # Examples
///
/// ```
/// use candle_doft::merge::{Strength, StrengthMode};
///
/// assert_eq!(Strength::default(), Strength::linear(1.)); // what the file means
/// assert_eq!(Strength::geodesic(-1.).mode, StrengthMode::Geodesic); // undoes the adapter
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Strength {
    /// The strength `s`: 1 for what the file means.
    pub value: f64,
    /// How it is meant.
    pub mode: StrengthMode,
}

impl Default for Strength {
    fn default() -> Self {
        Self::linear(1.)
    }
}

impl Strength {
    /// `W + s (W_eff - W)`.
    pub fn linear(value: f64) -> Self {
        Self {
            value,
            mode: StrengthMode::Linear,
        }
    }

    /// Angles times `s`, ratio to the power of `s`.
    pub fn geodesic(value: f64) -> Self {
        Self {
            value,
            mode: StrengthMode::Geodesic,
        }
    }

    /// How many steps a merge takes that each would round: to the whole adapter, and a part of the way.
    pub(super) fn steps(self) -> usize {
        match (self.value, self.mode) {
            (0., _) => 0,
            (1., _) | (_, StrengthMode::Geodesic) => 1,
            (_, StrengthMode::Linear) => 2,
        }
    }

    /// Refuses a strength that the adapter cannot have.
    pub(super) fn check(self, stored: &Stored) -> Result<()> {
        let refuse = |reason: String| {
            Err(Error::Strength {
                strength: self.value,
                reason,
            })
        };
        if !self.value.is_finite() {
            return refuse("it is not a finite number".into());
        }
        if self.mode == StrengthMode::Linear {
            return Ok(());
        }
        for (module, layer) in &stored.layers {
            if layer.low_rank.is_some() {
                return refuse(format!(
                    "layer `{module}` is of low-rank matrices, which turn nothing; take the linear strength"
                ));
            }
            if !layer.map.is_orthogonal() && layer.block_size > 1 {
                return refuse(format!(
                    "layer `{module}` has the series for its map, which is not orthogonal; take the \
                 linear strength"
                ));
            }
            // Without norms of its own, a magnitude of 0 may be that of a dead row.
            let positive = match (layer.ratio(None, DType::F64)?, &layer.value) {
                (Some(ratio), _) => least(&ratio)? > 0.,
                (None, Some(value)) => least(value)? >= 0.,
                (None, None) => true,
            };
            if !positive {
                return refuse(format!(
                    "layer `{module}` has a factor of 0 or below, which has no such power; take the \
                 linear strength"
                ));
            }
        }
        Ok(())
    }
}

impl Merge {
    /// [`Merge::with_file`] with strengths by layer. A pattern matches the path of a layer in the model, or its name in a [`NameTable`](super::NameTable);
    /// extra tensors go by [`Strengths::value`].
    ///
    /// # Errors
    ///
    /// Those of [`Merge::with_file`]. A pattern that matches no layer is an error of [`Merge::build`],
    /// [`Merge::checkpoint`] and [`Merge::check_used`], [`Error::NoMatch`].
    ///
    /// # Examples
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_doft::{Adapter, DoftConfig};
    /// # let folder = tempfile::tempdir().unwrap();
    /// # let path = folder.path().join("adapter.safetensors");
    /// # let weight = Tensor::ones((8, 64), DType::F32, &Device::Cpu)?;
    /// # let builder = Adapter::builder(DoftConfig::default(), &Device::Cpu)?;
    /// # builder.wrap("head", candle_nn::Linear::new(weight.clone(), None))?;
    /// # builder.finish()?.save(&path)?;
    /// use candle_doft::config::Strengths;
    /// use candle_doft::file::LoadOptions;
    /// use candle_doft::merge::{Merge, StrengthMode};
    ///
    /// let strengths = Strengths::from(1.).with_rule("head", 0.);
    /// let options = LoadOptions::default();
    /// let merge =
    ///     Merge::new().with_file_by_layer(&path, &options, StrengthMode::Geodesic, &strengths)?;
    /// assert!(merge.weight("head", &weight, false)?.is_some());
    /// # Ok::<(), candle_doft::Error>(())
    /// ```
    pub fn with_file_by_layer(
        self,
        path: impl AsRef<Path>,
        options: &LoadOptions,
        mode: StrengthMode,
        strengths: &Strengths,
    ) -> Result<Self> {
        let (_, stored) = file::read_stored(path.as_ref(), options)?;
        self.with_part(stored, mode, strengths.clone())
    }
}

fn least(values: &Tensor) -> Result<f64> {
    Ok(values.min(0)?.to_dtype(DType::F64)?.to_scalar()?)
}
