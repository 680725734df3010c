//! [`Merge`]: base weights with one or more adapters in them, for models that know no adapter and for
//! checkpoints on disk.
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
//!
//! # Files that leave something open
//!
//! OneTrainer's marker `scaled_oft` meant three divisors in four weeks of 2026; an early adapter that
//! was exported later cannot be told from a recent one. [`LoadOptions::with_divisor`] decides, and a
//! warning says so where `dora_scale` shows the age. PEFT's series had another last coefficient before
//! 0.18, told by the version in its configuration. A cap on the spectral norm is applied with the true
//! norm, where OneTrainer iterates from random vectors.

mod backend;
mod checkpoint;
mod header;
mod inspect;
mod untie;

pub use checkpoint::{CheckpointOptions, MergeReport};
pub use inspect::{Inspection, LayerInspection, inspect, weight_shapes};

use crate::adapter::{Adapter, NORMS_DIFFER, Stored, StoredLayer, Warning, differs, fingerprint};
use crate::config::{LayerKind, Magnitude};
use crate::error::{Error, Result};
use crate::file::{self, LoadOptions};
use crate::params::row_norms;
use crate::rotation;
use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex};

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
}

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
/// # let adapter = Adapter::new(DoftConfig::default(), &device)?;
/// # adapter.linear_no_bias(64, 8, vb.pp("head"))?;
///
/// let merge = Merge::new().with_adapter(&adapter, Strength::linear(0.5))?;
/// let vb = merge.var_builder(vb); // for any model, of candle-transformers too
/// let head = candle_nn::linear_no_bias(64, 8, vb.pp("head"))?;
/// merge.check_used()?;
/// # Ok::<(), candle_doft::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Merge {
    parts: Arc<Vec<Part>>,
}

/// One adapter, and which of its modules were asked for.
#[derive(Debug)]
struct Part {
    stored: Stored,
    strength: Strength,
    used: Mutex<BTreeSet<String>>,
    /// What came up when it met its weights.
    met: Mutex<BTreeSet<Warning>>,
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
    /// Those of [`Adapter::load`], and [`Error::Strength`] for a strength that it cannot have.
    pub fn with_file(
        self,
        path: impl AsRef<Path>,
        options: &LoadOptions,
        strength: Strength,
    ) -> Result<Self> {
        let (_, stored) = file::read_stored(path.as_ref(), options)?;
        self.with_stored(stored, strength)
    }

    /// Adds an adapter as it is now.
    ///
    /// # Errors
    ///
    /// Those of [`Adapter::check_complete`], and [`Error::Strength`] for a strength that it cannot
    /// have.
    pub fn with_adapter(self, adapter: &Adapter, strength: Strength) -> Result<Self> {
        self.with_stored(adapter.to_stored("the adapter".into())?, strength)
    }

    fn with_stored(self, stored: Stored, strength: Strength) -> Result<Self> {
        check_strength(&stored, strength)?;
        let mut parts: Vec<Part> = match Arc::try_unwrap(self.parts) {
            Ok(parts) => parts,
            Err(shared) => shared.iter().map(Part::fresh).collect(),
        };
        parts.push(Part {
            stored,
            strength,
            used: Mutex::default(),
            met: Mutex::default(),
        });
        Ok(Self {
            parts: Arc::new(parts),
        })
    }

    /// What is worth knowing about the files; after a merge also which modules of a partial one went
    /// unused.
    pub fn warnings(&self) -> Vec<Warning> {
        let mut warnings = Vec::new();
        for part in self.parts.iter() {
            warnings.extend(part.stored.warnings.iter().cloned());
            warnings.extend(
                part.met
                    .lock()
                    .unwrap_or_else(|e| e.into_inner())
                    .iter()
                    .cloned(),
            );
            let used = part.used.lock().unwrap_or_else(|e| e.into_inner());
            let unused = part
                .stored
                .layers
                .keys()
                .filter(|name| !used.contains(*name));
            if part.stored.allow_partial && !used.is_empty() {
                warnings.extend(unused.map(|name| Warning {
                    subject: name.clone(),
                    message: "it matches no weight and was not merged".into(),
                }));
            }
        }
        warnings
    }

    /// A `VarBuilder` that answers merged weights where an adapter has the path, and what `base`
    /// answers elsewhere. Each weight is computed once per get, at the cost of `b / in` of a product
    /// with itself, and nothing is kept.
    ///
    /// A base that is not the one an adapter was trained on, by its row norms, is an error of the get.
    pub fn var_builder<'a>(&self, base: VarBuilder<'a>) -> VarBuilder<'a> {
        let (dtype, device) = (base.dtype, base.device().clone());
        let backend = backend::Merged::new(self.clone(), base);
        VarBuilder::from_backend(Box::new(backend), dtype, device)
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
            let Some((module, layer)) = part.stored.find(path)? else {
                continue;
            };
            let norms = match &norms {
                Some(norms) => norms,
                None => norms.insert(row_norms(weight)?),
            };
            part.check(module, layer, path, weight, norms, allow_changed_base)?;
            found.push((part, module, layer));
        }
        if found.is_empty() {
            return Ok(None);
        }
        let mut merged = weight.clone();
        for (part, module, layer) in found {
            merged = part.merge(path, layer, &merged, norms.as_ref())?;
            part.used
                .lock()
                .unwrap_or_else(|e| e.into_inner())
                .insert(module.clone());
        }
        Ok(Some(merged))
    }

    /// Refuses when a module of an adapter was asked for by no weight.
    ///
    /// # Errors
    ///
    /// [`Error::FileUnused`] with the first of them.
    pub fn check_used(&self) -> Result<()> {
        self.parts.iter().try_for_each(|part| {
            let used = part.used.lock().unwrap_or_else(|e| e.into_inner());
            let extras = part
                .stored
                .extras
                .keys()
                .filter(|_| part.strength.value != 0.);
            let all = part.stored.layers.keys().chain(extras);
            let unused: Vec<&String> = all.filter(|name| !used.contains(*name)).collect();
            match unused.first() {
                Some(first) if !part.stored.allow_partial || used.is_empty() => {
                    Err(Error::FileUnused {
                        file: part.stored.file.clone(),
                        count: unused.len(),
                        total: part.stored.layers.len() + part.stored.extras.len(),
                        first: first.to_string(),
                        nearest: Vec::new(),
                    })
                }
                _ => Ok(()),
            }
        })
    }

    /// The tensor that replaces the whole tensor of that name, of the last adapter that has one.
    fn extra(&self, name: &str) -> Option<Tensor> {
        self.parts
            .iter()
            .rev()
            .filter(|part| part.strength.value != 0.)
            .find_map(|part| {
                let extra = part.stored.extras.get(name)?;
                let mut used = part.used.lock().unwrap_or_else(|e| e.into_inner());
                used.insert(name.to_string());
                Some(extra.clone())
            })
    }
}

impl Part {
    fn fresh(&self) -> Self {
        Self {
            stored: self.stored.clone(),
            strength: self.strength,
            used: Mutex::default(),
            met: Mutex::default(),
        }
    }

    fn warn(&self, path: &str, message: &str) {
        self.met
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .insert(Warning {
                subject: path.to_string(),
                message: message.into(),
            });
    }

    fn check(
        &self,
        module: &str,
        layer: &StoredLayer,
        path: &str,
        weight: &Tensor,
        norms: &Tensor,
        allow_changed_base: bool,
    ) -> Result<()> {
        let kind = self.kind(layer, path, weight)?;
        layer.check_shape(&self.stored.file, module, path, weight.dims())?;
        let patch: usize = weight.dims().iter().skip(2).product();
        if kind.is_kernel() && layer.kernel_factor == 1. && patch > 1 {
            self.warn(
                path,
                "PEFT's own forward of such a kernel differs from its merged weight",
            );
        }
        if layer.norms_differ(norms)? {
            self.warn(path, NORMS_DIFFER);
        }
        let (Some(stored), Some(found)) = (layer.base, fingerprint(norms)?) else {
            return Ok(());
        };
        if differs(&stored, &found) && !allow_changed_base {
            return self.refuse(&format!(
                "`{path}` is not the base weight it was trained on, by its row norms; allow a \
                 changed base to merge it all the same"
            ));
        }
        Ok(())
    }

    fn kind(&self, layer: &StoredLayer, path: &str, weight: &Tensor) -> Result<LayerKind> {
        let kind = match (layer.kind, weight.rank()) {
            (Some(LayerKind::Embedding), 2) => LayerKind::Embedding,
            (_, 2) => LayerKind::Linear,
            (_, 3) => LayerKind::Conv1d,
            (_, 4) => LayerKind::Conv2d,
            (_, rank) => return self.refuse(&format!("`{path}` has {rank} axes, expected 2 to 4")),
        };
        match layer.kind {
            Some(stored) if stored != kind => self.refuse(&format!(
                "`{path}` is a {kind:?} layer, trained was a {stored:?} layer"
            )),
            _ => Ok(kind),
        }
    }

    fn merge(
        &self,
        path: &str,
        layer: &StoredLayer,
        weight: &Tensor,
        norms: Option<&Tensor>,
    ) -> Result<Tensor> {
        let Strength { value: s, mode } = self.strength;
        if s == 0. {
            return Ok(weight.clone());
        }
        let kind = self.kind(layer, path, weight)?;
        let geodesic = mode == StrengthMode::Geodesic;
        let wide = if weight.dtype() == DType::F64 {
            DType::F64
        } else {
            DType::F32
        };
        let power = if geodesic { s } else { 1. };
        let ratio = layer.ratio(norms, wide)?;
        let ratio = match ratio {
            Some(ratio) if power != 1. => Some(ratio.powf(power)?),
            ratio => ratio,
        };
        let ratio = ratio
            .map(|ratio| ratio.to_device(weight.device()))
            .transpose()?;
        let mut merged = match layer.layout(weight.dims())? {
            None => scaled(weight, ratio.as_ref(), wide)?,
            Some(layout) => {
                let theta = layer.theta(kind)?.to_dtype(wide)?;
                let r = match geodesic {
                    true => rotation::geodesic(&theta, &layout, s)?.to_dtype(wide)?,
                    false => rotation::rotation(&theta, &layout)?,
                };
                // A row of an embedding turns by R, that of a weight by its transpose.
                let r = match kind {
                    LayerKind::Embedding => r.transpose(1, 2)?.contiguous()?,
                    _ => r,
                };
                let r = r.to_device(weight.device())?;
                rotation::effective_weight(weight, &r, ratio.as_ref())?
            }
        };
        if !geodesic && s != 1. {
            let (from, to) = (weight.to_dtype(wide)?, merged.to_dtype(wide)?);
            merged = (&from + ((to - &from)? * s)?)?.to_dtype(weight.dtype())?;
        }
        let sum = merged
            .abs()?
            .to_dtype(DType::F64)?
            .sum_all()?
            .to_scalar::<f64>()?;
        match sum.is_finite() {
            true => Ok(merged),
            false => self.refuse(&format!("the merged `{path}` is not finite")),
        }
    }

    fn refuse<T>(&self, reason: &str) -> Result<T> {
        Err(Error::File {
            file: self.stored.file.clone(),
            reason: reason.to_string(),
        })
    }
}

fn scaled(weight: &Tensor, ratio: Option<&Tensor>, wide: DType) -> Result<Tensor> {
    let Some(ratio) = ratio else {
        return Ok(weight.clone());
    };
    let mut shape = vec![1; weight.rank()];
    shape[0] = weight.dim(0)?;
    let product = weight
        .to_dtype(wide)?
        .broadcast_mul(&ratio.reshape(shape)?)?;
    Ok(product.to_dtype(weight.dtype())?)
}

fn check_strength(stored: &Stored, strength: Strength) -> Result<()> {
    let refuse = |reason: String| {
        Err(Error::Strength {
            strength: strength.value,
            reason,
        })
    };
    if !strength.value.is_finite() {
        return refuse("it is not a finite number".into());
    }
    if strength.mode == StrengthMode::Linear {
        return Ok(());
    }
    for (module, layer) in &stored.layers {
        if !layer.map.is_orthogonal() && layer.block_size > 1 {
            return refuse(format!(
                "layer `{module}` has the series for its map, which is not orthogonal; take the \
                 linear strength"
            ));
        }
        // A logarithm is of a factor above 0; `m / n0` and `f` may be anything.
        let positive = match (&layer.value, layer.magnitude) {
            (Some(value), Magnitude::Factor | Magnitude::Absolute) => {
                let least = value.flatten_all()?.min(0)?.to_dtype(DType::F64)?;
                let dead = layer.magnitude == Magnitude::Absolute;
                let least = least.to_scalar::<f64>()?;
                least > 0. || dead && least == 0.
            }
            _ => true,
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

impl Adapter {
    /// A `VarBuilder` for a model that knows no adapter: merged weights where this adapter has the
    /// path, and what `base` answers elsewhere. See [`Merge`] for strength, several adapters and
    /// checkpoints on disk.
    ///
    /// # Errors
    ///
    /// Those of [`Adapter::check_complete`] for an adapter that was not loaded.
    pub fn merged<'a>(&self, base: VarBuilder<'a>) -> Result<VarBuilder<'a>> {
        let merge = match self.source() {
            Some(stored) => Merge::new().with_stored(stored.clone(), Strength::default())?,
            None => Merge::new().with_adapter(self, Strength::default())?,
        };
        Ok(merge.var_builder(base))
    }
}
