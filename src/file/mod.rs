//! Adapter files: [`Adapter::save`] and [`Adapter::load`].
//!
//! The file is one safetensors file. Under each layer's path:
//!
//! | tensor | shape | when |
//! |---|---|---|
//! | `oft_R.weight`, or `oft_embedding_R.weight` | `(D, n)`, or `(1, n)` when shared | always; `theta` for linear layers and embeddings, `-theta` for kernels |
//! | `oft_R.scaled_oft` | `()` = 1 | step normalisation |
//! | `oft_R.cans_oft` | `()` = 1 | the Cayley map |
//! | `oft_R.cans_exp` | `(0)` | the exponential map |
//! | `oft_R.clipped_oft` | `()` | a cap on the spectral norm, its value |
//! | `dora_log_multiplier` | `(out)` | magnitude `Log`; `Factor` with all factors above 0, as `ln f` |
//! | `dora_multiplier` | `(out)` | magnitude `Factor` otherwise |
//! | `dora_scale`, `initial_norm` | `(out, 1 ..)` | magnitude `Absolute`: `m` and `n0` |
//!
//! and `doft_extra.<name>` for extra tensors. Metadata holds `format` = `doft`, `format_version`,
//! `crate_version`, `doft_config` and `doft_layers` (kind, shape and a fingerprint of each base
//! weight). Equal adapters give equal bytes.

mod canonical;
mod changes;
mod combine;
mod convert;
mod group;
mod keys;
mod layer;
mod lora;
mod lora_config;
mod lora_write;
mod metadata;
mod onetrainer;
mod options;
mod peft;
mod peft_write;
mod project;
mod read;
mod series;
mod strength;
mod tensors;
mod write;

pub use changes::{Cause, Changes, Conversion, LayerChange};
pub use combine::{Combination, combine};
pub use convert::{Target, convert, convert_with};
pub(crate) use metadata::CHECKPOINT;
pub use options::{Divisor, LoadOptions, Rename};
pub use read::Dialect;
pub(crate) use tensors::{Tensors, float, instead, twice};
pub(crate) use write::{
    Folder, filled, head, persist, raw_bytes, replace, safetensors as safetensors_bytes, temporary,
};
pub use write::{replace_with, save_tensors};

use crate::adapter::{Adapter, AdapterBuilder, Adapters, Stored, Warning, component_named};
use crate::error::{Error, Result};
use candle_core::Device;
use std::path::Path;

impl Adapter {
    /// Writes the adapter to one file, through a temporary one beside it: on any error the old file
    /// stays as it was. Answers what readers of the file should know, and what a partial use of a loaded
    /// one leaves out; mostly nothing.
    ///
    /// Magnitudes of kind `Log` and `Absolute` come back bit for bit, `Factor` to rounding.
    ///
    /// # Errors
    ///
    /// [`Error::NotFinite`] for a parameter that holds a NaN or an infinity,
    /// [`Error::Io`] if the file cannot be written, and
    /// [`Error::NoLayers`] if nothing trains.
    ///
    /// # Examples
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::{Linear, Module};
    /// # use candle_doft::{Adapter, DoftConfig};
    /// let device = Device::Cpu;
    /// let base = Linear::new(Tensor::ones((8, 64), DType::F32, &device)?, None);
    /// let builder = Adapter::builder(DoftConfig::default(), &device)?;
    /// let layer = builder.wrap("head", base.clone())?;
    /// let adapter = builder.finish()?;
    ///
    /// # let folder = tempfile::tempdir().unwrap();
    /// # let path = folder.path().join("adapter.safetensors");
    /// adapter.save(&path)?;
    /// let builder = Adapter::load(&path, &device)?;
    /// let again = builder.wrap("head", base)?;
    /// let loaded = builder.finish()?;
    /// assert!(again.is_adapted() && loaded.warnings().is_empty());
    /// # Ok::<(), candle_doft::Error>(())
    /// ```
    pub fn save(&self, path: impl AsRef<Path>) -> Result<Vec<Warning>> {
        let path = path.as_ref();
        if self.vars().is_empty() {
            return Err(Error::NoLayers);
        }
        let stored = self.to_stored(path.to_path_buf())?;
        let (bytes, warnings) = canonical::to_bytes(&stored)?;
        write::replace(path, &bytes)?;
        Ok([stored.warnings, warnings].concat())
    }

    /// Reads an adapter of this crate, of OneTrainer or of PEFT (a file or a folder). Layers built or
    /// wrapped through the builder take settings and parameters from the file, by path; a layer that the
    /// file does not hold stays frozen. What the file holds beyond the model is an error of
    /// [`AdapterBuilder::finish`]. A loaded adapter starts in [`Mode::Train`](crate::Mode::Train), as a
    /// fresh one.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if the file cannot be read; [`Error::File`] and
    /// [`Error::FileTensor`] if it is cut, contradicts itself, or means what
    /// this crate cannot express.
    pub fn load(path: impl AsRef<Path>, device: &Device) -> Result<AdapterBuilder> {
        Self::load_with(path, device, &LoadOptions::default())
    }

    /// [`Adapter::load`] with decisions for what a file leaves open.
    ///
    /// # Errors
    ///
    /// Those of [`Adapter::load`].
    pub fn load_with(
        path: impl AsRef<Path>,
        device: &Device,
        options: &LoadOptions,
    ) -> Result<AdapterBuilder> {
        let (_, stored) = read_stored(path.as_ref(), options)?;
        AdapterBuilder::from_stored(stored, device)
    }
}

/// Writes an adapter as a file of this crate; what its readers should know.
pub(crate) fn write_stored(stored: &Stored, path: &Path) -> Result<Vec<Warning>> {
    let (bytes, warnings) = canonical::to_bytes(stored)?;
    write::replace(path, &bytes)?;
    Ok(warnings)
}

impl Adapters {
    /// Loads an adapter of any dialect onto the model. An adapter of that name is replaced when the new one is
    /// whole; if it acts for all threads, the new one acts in its place and mode from then on.
    ///
    /// # Errors
    ///
    /// Those of [`Adapter::load`] and [`AdapterBuilder::finish`]; nothing has changed then. Extra tensors of
    /// a file, such as a head, are a part of the model and cannot be swapped: [`Error::FileUnused`].
    pub fn load(&self, name: &str, path: impl AsRef<Path>) -> Result<Adapter> {
        self.load_with(name, path, &LoadOptions::default())
    }

    /// [`Adapters::load`] with decisions for what a file leaves open.
    ///
    /// # Errors
    ///
    /// Those of [`Adapters::load`].
    pub fn load_with(
        &self,
        name: &str,
        path: impl AsRef<Path>,
        options: &LoadOptions,
    ) -> Result<Adapter> {
        let (_, stored) = read_stored(path.as_ref(), options)?;
        self.put(name, stored)
    }
}

/// The models of a pipeline that an adapter has layers for, by the prefixes of its modules: `denoiser`,
/// `text_encoder`, `text_encoder_2` .., sorted; none where modules have no such prefix.
///
/// # Errors
///
/// Those of [`Adapter::load`].
///
/// # Examples
///
/// ```
/// # use candle_core::{DType, Device, Tensor};
/// # let folder = tempfile::tempdir().unwrap();
/// # let path = folder.path().join("adapter.safetensors");
/// # let theta = Tensor::zeros((2, 496), DType::F32, &Device::Cpu)?;
/// # let names = ["lora_te1_q_proj.oft_R.weight", "lora_unet_q_proj.oft_R.weight"];
/// # let tensors = names.map(|name| (name.to_string(), theta.clone()));
/// # candle_core::safetensors::save(&tensors.into_iter().collect(), &path)?;
/// use candle_doft::file::{LoadOptions, components, is_component};
///
/// let found = components(&path, &LoadOptions::default())?;
/// assert_eq!(found, ["denoiser", "text_encoder"]);
/// assert!(is_component("unet", &found[0]));
/// # Ok::<(), candle_doft::Error>(())
/// ```
pub fn components(path: impl AsRef<Path>, options: &LoadOptions) -> Result<Vec<String>> {
    Ok(read_stored(path.as_ref(), options)?.1.components())
}

/// Whether a name, such as `te1`, `unet` or that of a pipeline's folder, means a component.
pub fn is_component(name: &str, component: &str) -> bool {
    component_named(name) == component
}

/// Any file or folder as data.
pub(crate) fn read_stored(path: &Path, options: &LoadOptions) -> Result<(Dialect, Stored)> {
    let (dialect, mut stored) = read::read(path, options)?;
    stored.choose(options.component.as_deref(), options.rename.as_deref())?;
    stored.allow_partial = options.allow_partial;
    stored.allow_changed_base = options.allow_changed_base;
    if let Some(dropout) = options.dropout {
        stored.config.dropout = dropout;
        for rule in &mut stored.config.rules {
            rule.dropout = None;
        }
        stored.config.validate()?;
    }
    Ok((dialect, stored))
}
