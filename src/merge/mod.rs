//! [`Merge`]: base weights with one or more adapters in them, for models that know no adapter and for
//! checkpoints on disk; and back, the adapter that is closest to a finished fine-tune.
//!
//! Several adapters run in sequence: the second turns what the first one made of a weight, and so on.
//! Rotations do not commute, so their order matters.
//!
//! # Strength
//!
//! `s = 1` is what a file means, `s = 0` the base bit for bit.
//!
//! * [`StrengthMode::Linear`]: `W + s (W_eff - W)`, what every reader of these files does. It leaves
//!   the orthogonal group between 0 and 1: rows get shorter.
//! * [`StrengthMode::Geodesic`]: `ratio^s`, and every plane turned by `s` times its angle; rows keep
//!   their norm, and `s = -1` undoes the adapter. Not for the series, which is not orthogonal, nor for
//!   a ratio of 0 or below.
//!
//! Extra tensors are not scaled: they are there in full for every strength but 0.
//! [`Merge::with_file_by_layer`] gives layers strengths of their own.
//!
//! # Files that leave something open
//!
//! OneTrainer's marker `scaled_oft` meant three divisors in four weeks of 2026; an early adapter that
//! was exported later cannot be told from a recent one. [`LoadOptions::with_divisor`] decides, and a
//! warning says so where `dora_scale` shows the age. PEFT's series had another last coefficient before
//! 0.18, told by the version in its configuration. A cap on the spectral norm is applied with the true
//! norm, where OneTrainer iterates from random vectors.

mod added;
mod backend;
mod checkpoint;
mod extract;
mod header;
mod inspect;
mod part;
mod strength;

pub use checkpoint::{CheckpointOptions, MergeReport};
pub use extract::{ExtractOptions, Extraction, LayerExtraction, LeftTensor, extract};
pub use inspect::{Inspection, LayerInspection, inspect, weight_shapes};
pub use strength::{Strength, StrengthMode};

use crate::adapter::{Adapter, Stored, Warning, locked};
use crate::config::Strengths;
use crate::error::{Error, Result};
use crate::file::{self, LoadOptions};
use crate::params::row_norms;
use candle_core::Tensor;
use candle_nn::VarBuilder;
use part::Part;
use std::path::Path;
use std::sync::Arc;

/// Adapters to be merged into a base, one after the other.
///
/// # Examples
///
/// ```
/// # use candle_core::{DType, Device, Tensor};
/// # use candle_doft::{Adapter, DoftConfig};
/// use candle_doft::merge::{Merge, Strength};
/// use candle_nn::{Linear, VarBuilder};
/// # let device = Device::Cpu;
/// # let vb = VarBuilder::zeros(DType::F32, &device);
/// # let builder = Adapter::builder(DoftConfig::default(), &device)?;
/// # builder.linear_no_bias(64, 8, vb.pp("head"))?;
/// # let adapter = builder.finish()?;
///
/// let merge = Merge::new().with_adapter(&adapter, Strength::linear(0.5))?;
/// // Any model, of candle-transformers too.
/// let head = merge.build(vb, |vb| candle_nn::linear_no_bias(64, 8, vb.pp("head")))?;
/// # Ok::<(), candle_doft::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
#[must_use = "each `with_` answers the merge with one adapter more"]
pub struct Merge {
    parts: Arc<Vec<Part>>,
}

impl Merge {
    /// Nothing to merge yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an adapter file or folder.
    ///
    /// # Errors
    ///
    /// Those of [`Adapter::load`], and [`Error::Strength`] for a strength that
    /// it cannot have.
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
    /// use candle_doft::file::LoadOptions;
    /// use candle_doft::merge::{Merge, Strength};
    ///
    /// let options = LoadOptions::default();
    /// let merge = Merge::new().with_file(&path, &options, Strength::geodesic(0.5))?;
    /// let merged = merge.weight("head", &weight, false)?;
    /// assert_eq!(merged.map(|weight| weight.dims().to_vec()), Some(vec![8, 64]));
    /// # Ok::<(), candle_doft::Error>(())
    /// ```
    pub fn with_file(
        self,
        path: impl AsRef<Path>,
        options: &LoadOptions,
        strength: Strength,
    ) -> Result<Self> {
        let (_, stored) = file::read_stored(path.as_ref(), options)?;
        self.with_stored(stored, strength)
    }

    /// [`Merge::with_file`] with strengths by layer. A pattern matches the path of a layer in the model;
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

    /// Adds an adapter as it is now, whatever its mode.
    ///
    /// # Errors
    ///
    /// [`Error::Strength`] for a strength that it cannot have.
    pub fn with_adapter(self, adapter: &Adapter, strength: Strength) -> Result<Self> {
        self.with_stored(adapter.to_stored("the adapter".into())?, strength)
    }

    fn with_stored(self, stored: Stored, strength: Strength) -> Result<Self> {
        self.with_part(stored, strength.mode, Strengths::from(strength.value))
    }

    fn with_part(self, stored: Stored, mode: StrengthMode, strengths: Strengths) -> Result<Self> {
        strengths.check_values()?;
        let value = strengths.value;
        let strength = Strength { value, mode };
        strength.check(&stored)?;
        let mut parts: Vec<Part> = match Arc::try_unwrap(self.parts) {
            Ok(parts) => parts,
            Err(shared) => shared.iter().map(Part::fresh).collect(),
        };
        parts.push(Part::new(stored, strength, strengths.rules));
        Ok(Self {
            parts: Arc::new(parts),
        })
    }

    /// What is worth knowing about the files; after a merge also which modules of a partial one went
    /// unused.
    pub fn warnings(&self) -> Vec<Warning> {
        self.parts.iter().flat_map(Part::warnings).collect()
    }

    /// Builds a model on merged weights. `model` gets a `VarBuilder` that returns merged weights where an
    /// adapter has the path, and those of `base` elsewhere; a path is the whole prefix, as when the
    /// adapter was trained. When `model` returns, every layer and extra tensor of every adapter must
    /// have been asked for. Each weight is computed once per get, at the cost of `b / in` of a product
    /// with itself, and nothing is kept.
    ///
    /// Merging twice is not detected: norms stay the same, and the base is rotated twice.
    ///
    /// # Errors
    ///
    /// * Returns the error of `model`.
    /// * [`Error::FileUnused`] if a part of an adapter was not asked for, with
    ///   the nearest paths; [`LoadOptions::allow_partial`] allows it.
    /// * From a get: if the base weight is not the one that the adapter was trained on
    ///   ([`LoadOptions::allow_changed_base`] allows it), does not fit, or the result is not finite.
    pub fn build<'a, M, E: From<Error>>(
        &self,
        base: VarBuilder<'a>,
        model: impl FnOnce(VarBuilder<'a>) -> Result<M, E>,
    ) -> Result<M, E> {
        // What was asked for is counted for this model alone.
        for part in self.parts.iter() {
            part.asked.clear();
        }
        let (dtype, device, prefix) = (base.dtype(), base.device().clone(), base.prefix());
        let names = Arc::default();
        let backend = backend::Merged::new(self.clone(), base.root(), Arc::clone(&names));
        let merged = VarBuilder::from_backend(Box::new(backend), dtype, device);
        let merged = if prefix.is_empty() {
            merged
        } else {
            merged.pp(prefix)
        };
        let built = model(merged)?;
        let names: Vec<String> = locked(&names).iter().cloned().collect();
        self.check_used_by(names.iter().map(String::as_str))?;
        Ok(built)
    }

    /// The merged weight of the layer at `path`, in the dtype of `weight`; none when no adapter has it.
    ///
    /// # Errors
    ///
    /// When the weight does not fit, is not the one the adapter was trained on (unless that is
    /// allowed), or the result is not finite.
    pub fn weight(
        &self,
        path: &str,
        weight: &Tensor,
        allow_changed_base: bool,
    ) -> Result<Option<Tensor>> {
        // Every adapter is checked against the base, before the first is merged.
        let mut found = Vec::new();
        let mut norms = None;
        for part in self.parts.iter() {
            let Some((module, layer)) = part.asked.find(&part.stored, path)? else {
                continue;
            };
            let norms = match &norms {
                Some(norms) => norms,
                None => norms.insert(row_norms(weight)?),
            };
            part.check(module, layer, path, weight, norms, allow_changed_base)?;
            found.push((part, layer));
        }
        if found.is_empty() {
            return Ok(None);
        }
        let mut merged = weight.clone();
        for (part, layer) in found {
            merged = part.merge(path, layer, &merged, norms.as_ref())?;
            part.asked.insert(&part.stored, path)?;
        }
        Ok(Some(merged))
    }

    /// Checks that every layer and extra tensor of every adapter was asked for: by [`Merge::weight`] since
    /// it was made.
    ///
    /// # Errors
    ///
    /// [`Error::FileUnused`] with the first that was not.
    pub fn check_used(&self) -> Result<()> {
        self.check_used_by(std::iter::empty())
    }

    /// The same; `names` are those that there were, for the error.
    fn check_used_by<'a>(&self, names: impl Iterator<Item = &'a str> + Clone) -> Result<()> {
        let mut parts = self.parts.iter();
        parts.try_for_each(|part| part.check_used(names.clone()))
    }

    /// The tensor that replaces the whole tensor of that name, of the last adapter that has one.
    fn extra(&self, name: &str) -> Option<&Tensor> {
        let mut found = None;
        for part in self.parts.iter() {
            if let Some(extra) = part.extra(name) {
                if found.is_some() {
                    part.warn(
                        name,
                        "several adapters have this extra tensor; the last one's counts",
                    );
                }
                found = Some(extra);
            }
        }
        found
    }
}

impl Adapter {
    /// Builds a model without adapter support on merged weights: those of this adapter as it is now,
    /// whatever its mode. See [`Merge`] for strength, several adapters, files and checkpoints on disk.
    ///
    /// # Errors
    ///
    /// As [`Merge::build`].
    ///
    /// # Examples
    ///
    /// ```
    /// # use candle_core::{DType, Device};
    /// # use candle_doft::{Adapter, DoftConfig};
    /// # use candle_nn::VarBuilder;
    /// # let vb = VarBuilder::zeros(DType::F32, &Device::Cpu);
    /// # let builder = Adapter::builder(DoftConfig::default(), &Device::Cpu)?;
    /// # builder.linear_no_bias(64, 8, vb.pp("head"))?;
    /// # let adapter = builder.finish()?;
    /// let head = adapter.merged(vb, |vb| candle_nn::linear_no_bias(64, 8, vb.pp("head")))?;
    /// # Ok::<(), candle_doft::Error>(())
    /// ```
    pub fn merged<'a, M, E: From<Error>>(
        &self,
        base: VarBuilder<'a>,
        model: impl FnOnce(VarBuilder<'a>) -> Result<M, E>,
    ) -> Result<M, E> {
        let merge = Merge::new().with_adapter(self, Strength::default())?;
        merge.build(base, model)
    }
}
