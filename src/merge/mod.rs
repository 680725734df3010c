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

//!
//! # Names
//!
//! Adapters of diffusion models mostly have the names of diffusers. A checkpoint in one file has others, and
//! q, k and v in one weight. [`NameTable`] says which rows of which tensor a layer is; it is found by the
//! names of the checkpoint, or given with [`Merge::with_names`]. Each part of a fused weight is turned in its
//! own rows, with its own rotation and magnitude, and checked against its own norms; rows that no adapter has
//! stay as they are, bit for bit, as do biases. Where Flux and Stable Diffusion 3 keep shift and scale the
//! other way round, the halves are swapped back.
//!
//! It stands behind the rules that match names without it: an adapter that has the names of the checkpoint
//! needs no table. Where one is used, a weight of the checkpoint that it does not name is an error. Extra
//! tensors are not translated.

mod added;
mod backend;
mod checkpoint;
mod extract;
mod header;
mod inspect;
mod names;
mod part;
mod strength;
mod target;

pub use checkpoint::{CheckpointOptions, MergeReport};
pub use extract::{ExtractOptions, Extraction, LayerExtraction, LeftTensor, extract};
pub use inspect::{Inspection, LayerInspection, inspect, inspect_with, weight_shapes};
pub use names::{NameTable, NamedRows};
pub use strength::{Strength, StrengthMode};

use crate::adapter::{Adapter, Stored, Warning, locked};
use crate::config::Strengths;
use crate::error::{Error, Result, shown};
use crate::file::{self, LoadOptions};
use crate::params::row_norms;
use candle_core::{DType, Tensor};
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
    names: Option<Arc<NameTable>>,
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
        let names = self.names.clone();
        let mut parts = self.into_parts();
        parts.push(Part::new(stored, strength, strengths.rules));
        Ok(Self {
            parts: Arc::new(parts),
            names,
        })
    }

    /// Sets where a checkpoint keeps the layers that adapters call by other names. Without it the names of
    /// the checkpoint decide, by [`NameTable::detect`]; [`Merge::build`] asks the `VarBuilder` for them, and
    /// finds none in one that does not know which tensors it has.
    ///
    /// # Examples
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_doft::{Adapter, DoftConfig};
    /// # use candle_nn::{Linear, VarBuilder};
    /// # let device = Device::Cpu;
    /// # let vb = VarBuilder::zeros(DType::F32, &device);
    /// # let builder = Adapter::builder(DoftConfig::default(), &device)?;
    /// # builder.linear_no_bias(64, 8, vb.pp("to_k"))?;
    /// # let adapter = builder.finish()?;
    /// use candle_doft::merge::{Merge, NameTable, Strength};
    ///
    /// // The adapter has `to_k`; the model has it in rows 8 to 15 of `qkv`.
    /// let table = r#"{"layers": {"to_k": {"tensor": "qkv.weight", "rows": [[8, 16]]}}}"#;
    /// let merge = Merge::new()
    ///     .with_adapter(&adapter, Strength::default())?
    ///     .with_names(NameTable::from_json(table)?);
    /// let merged = merge.weight("qkv", &Tensor::ones((24, 64), DType::F32, &device)?, true)?;
    /// assert_eq!(merged.map(|weight| weight.dims().to_vec()), Some(vec![24, 64]));
    /// # Ok::<(), candle_doft::Error>(())
    /// ```
    pub fn with_names(mut self, table: NameTable) -> Self {
        self.names = Some(Arc::new(table));
        self
    }

    /// The same merge with the table that was set, else one that is found.
    fn named(&self, find: impl FnOnce() -> Option<NameTable>) -> Self {
        let names = self.names.clone();
        Self {
            parts: Arc::clone(&self.parts),
            names: names.or_else(|| find().map(Arc::new)),
        }
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
    /// * [`Error::Unnamed`] if layers were found by a table of names that lacks one of the model.
    /// * From a get: if the base weight is not the one that the adapter was trained on
    ///   ([`LoadOptions::allow_changed_base`] allows it), does not fit, or the result is not finite.
    pub fn build<'a, M, E: From<Error>>(
        &self,
        base: VarBuilder<'a>,
        model: impl FnOnce(VarBuilder<'a>) -> Result<M, E>,
    ) -> Result<M, E> {
        // What was asked for is counted for this model alone, also when others are built at the same time.
        let plan = self.fresh();
        let (dtype, device, prefix) = (base.dtype(), base.device().clone(), base.prefix());
        let root = base.root();
        let plan = plan.named(|| NameTable::probe(|name| root.contains_tensor(name)));
        let (names, unnamed) = (Arc::default(), Arc::default());
        let seen = (Arc::clone(&names), Arc::clone(&unnamed));
        let backend = backend::Merged::new(plan.clone(), root, seen);
        let merged = VarBuilder::from_backend(Box::new(backend), dtype, device);
        let merged = if prefix.is_empty() {
            merged
        } else {
            merged.pp(prefix)
        };
        let built = model(merged)?;
        let names: Vec<String> = locked(&names).iter().cloned().collect();
        plan.check_used_by(names.iter().map(String::as_str))?;
        plan.check_named(locked(&unnamed).iter().map(String::as_str))?;
        self.publish(&plan);
        Ok(built)
    }

    /// The same adapters, of which nothing was asked for yet.
    fn fresh(&self) -> Self {
        Self {
            parts: Arc::new(self.parts.iter().map(Part::fresh).collect()),
            names: self.names.clone(),
        }
    }

    /// Takes over what a finished merge met, for [`Merge::warnings`].
    fn publish(&self, plan: &Self) {
        for (part, other) in self.parts.iter().zip(plan.parts.iter()) {
            part.take_over(other);
        }
    }

    /// Lets modules of the adapters added so far match no weight, with a warning: for adapters in memory, whose
    /// file options do not apply.
    pub fn with_allow_partial(self, allow: bool) -> Self {
        self.changed(|stored| stored.allow_partial = allow)
    }

    /// Lets the adapters added so far be merged into another base than they were trained on.
    pub fn with_allow_changed_base(self, allow: bool) -> Self {
        self.changed(|stored| stored.allow_changed_base = allow)
    }

    fn changed(self, change: impl Fn(&mut Stored)) -> Self {
        let names = self.names.clone();
        let mut parts = self.into_parts();
        parts.iter_mut().for_each(|part| change(&mut part.stored));
        Self {
            parts: Arc::new(parts),
            names,
        }
    }

    fn into_parts(self) -> Vec<Part> {
        match Arc::try_unwrap(self.parts) {
            Ok(parts) => parts,
            Err(shared) => shared.iter().map(Part::fresh).collect(),
        }
    }

    /// The merged weight of the layer at `path`, in the dtype of `weight`; none when no adapter has it. With
    /// [`Merge::with_names`] also where an adapter has layers that the table names in `path.weight`.
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
        self.layers(&format!("{path}.weight"), weight, allow_changed_base)
    }

    /// The same for a tensor by its whole name.
    fn layers(
        &self,
        name: &str,
        tensor: &Tensor,
        allow_changed_base: bool,
    ) -> Result<Option<Tensor>> {
        // Every adapter is checked against the base, before the first is merged.
        let mut found = Vec::new();
        for part in self.parts.iter() {
            for target in part.targets(name, tensor.dims(), self.names.as_deref())? {
                let weight = target.take(tensor)?;
                let norms = row_norms(&weight)?;
                let (module, layer, path) = (target.module, target.layer, &target.path);
                part.check(module, layer, path, &weight, &norms, allow_changed_base)?;
                found.push((part, target, norms));
            }
        }
        if found.is_empty() {
            return Ok(None);
        }
        // Several steps over a half weight are made in f32, and rounded once.
        let mut steps = 0;
        for (part, target, _) in &found {
            steps += part.strength_of(&target.path)?.steps();
        }
        let half = matches!(tensor.dtype(), DType::F16 | DType::BF16);
        let mut merged = match half && steps > 1 {
            true => tensor.to_dtype(DType::F32)?,
            false => tensor.clone(),
        };
        let mut last = None;
        for (part, target, norms) in found {
            let weight = target.take(&merged)?;
            let weight = part.merge(&target.path, target.layer, &weight, Some(&norms))?;
            merged = target.put(&merged, weight)?;
            part.enter(&target)?;
            last = Some(part);
        }
        match last.filter(|_| merged.dtype() != tensor.dtype()) {
            None => Ok(Some(merged)),
            Some(last) => {
                let rounded = merged.to_dtype(tensor.dtype())?;
                last.check_range(name.strip_suffix(".weight").unwrap_or(name), &rounded)?;
                Ok(Some(rounded))
            }
        }
    }

    /// What becomes of a tensor of the base: the extra tensor of that name that an adapter has, in the dtype of
    /// `base`, or the weight with the layers merged that adapters have in it; none when no adapter has any.
    ///
    /// # Errors
    ///
    /// Those of [`Merge::weight`], and [`Error::FileTensor`] for an extra tensor of another shape.
    pub fn tensor(
        &self,
        name: &str,
        base: &Tensor,
        allow_changed_base: bool,
    ) -> Result<Option<Tensor>> {
        self.mark_extra(name);
        let replaced = match self.extra(name) {
            None => None,
            Some((file, extra)) if extra.dims() != base.dims() => {
                return Err(Error::FileTensor {
                    file: file.to_path_buf(),
                    tensor: shown(name),
                    found: format!("shape {:?}", extra.dims()),
                    expected: format!("{:?}, that of the base", base.dims()),
                    fix: "is this the model it was trained on?",
                });
            }
            Some((_, extra)) => Some(extra.to_dtype(base.dtype())?.to_device(base.device())?),
        };
        let tensor = replaced.as_ref().unwrap_or(base);
        if tensor.rank() < 2 {
            return Ok(replaced);
        }
        let merged = self.layers(name, tensor, allow_changed_base)?;
        Ok(merged.or(replaced))
    }

    /// Whether no adapter has a layer in a tensor, and the table should name one there and does not.
    fn is_unnamed(&self, tensor: &str, shape: &[usize]) -> Result<bool> {
        let Some(table) = self.names.as_deref() else {
            return Ok(false);
        };
        let native = |part: &Part| Ok(!part.targets(tensor, shape, None)?.is_empty());
        let found: Result<Vec<bool>> = self.parts.iter().map(native).collect();
        Ok(table.lacks(tensor, shape)? && !found?.contains(&true))
    }

    /// Returns an error for tensors that the table does not name, where a layer was found by it: what an
    /// adapter calls them is not known then.
    fn check_named<'a>(&self, unnamed: impl IntoIterator<Item = &'a str>) -> Result<()> {
        let used = self.parts.iter().any(Part::is_translated);
        let (Some(table), Some(first), true) = (&self.names, unnamed.into_iter().next(), used)
        else {
            return Ok(());
        };
        Err(Error::Unnamed {
            tensor: shown(first),
            family: table.family().to_string(),
        })
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

    /// The tensor that replaces the whole tensor of that name, of the last adapter that has one, and the file
    /// of that adapter.
    fn extra(&self, name: &str) -> Option<(&Path, &Tensor)> {
        let mut parts = self.parts.iter().rev();
        parts.find_map(|part| Some((part.stored.file.as_path(), part.extra(name)?)))
    }

    /// Counts the extra tensor of that name as asked for, of every adapter that has it.
    fn mark_extra(&self, name: &str) {
        for part in self.parts.iter() {
            part.mark_extra(name);
        }
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
