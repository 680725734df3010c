//! [`LoadOptions`]: what a reader may decide where a file leaves it open.

use crate::config::Map;
use crate::error::{Error, Result};
use std::sync::Arc;

/// What packed values are divided by before they become `Q`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Divisor {
    /// 1: unscaled.
    None,
    /// `2 sqrt(b - 1)`.
    TwoSqrt,
    /// `sqrt(b - 1)`.
    Sqrt,
    /// `sqrt(b (b - 1) / 2)`, of OneTrainer's first weeks.
    SqrtEntries,
}

impl Divisor {
    /// The number for a block size; 1 where there is nothing to rotate.
    pub fn value(self, block_size: usize) -> f64 {
        if block_size <= 1 {
            return 1.;
        }
        let b = block_size as f64;
        match self {
            Self::None => 1.,
            Self::TwoSqrt => 2. * (b - 1.).sqrt(),
            Self::Sqrt => (b - 1.).sqrt(),
            Self::SqrtEntries => (b * (b - 1.) / 2.).sqrt(),
        }
    }
}

impl std::str::FromStr for Divisor {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "none" => Ok(Self::None),
            "2sqrt" => Ok(Self::TwoSqrt),
            "sqrt" => Ok(Self::Sqrt),
            "sqrtn" => Ok(Self::SqrtEntries),
            other => Err(Error::config(
                "divisor",
                format!("`{other}`"),
                "none, 2sqrt, sqrt or sqrtn",
            )),
        }
    }
}

/// The path of a model that a module of a file means, where the rules do not find it. For a layer that is a
/// part of a weight: [`NameTable`](crate::merge::NameTable).
pub type Rename = Arc<dyn Fn(&str) -> Option<String> + Send + Sync>;

/// What a reader decides where a file leaves it open. The first two are for files of other tools.
///
/// | field | default | purpose |
/// |---|---|---|
/// | `divisor` | from the file | replaces the divisor of every layer |
/// | `map` | from the file | replaces the map of every layer |
/// | `component` | all | reads one component, such as `text_encoder`, and skips the others |
/// | `rename` | none | from module to path, before the rules for names |
/// | `allow_partial` | false | modules that match no layer warn instead of failing |
/// | `allow_unknown` | false | keys of no known role warn instead of failing |
/// | `allow_changed_base` | false | layers over another base weight than in training warn instead of failing |
/// | `dropout` | from the file | dropout in training |
///
/// # Examples
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_doft::Adapter;
/// use candle_doft::file::{Divisor, LoadOptions};
/// # let folder = tempfile::tempdir().unwrap();
/// # let path = folder.path().join("adapter.safetensors");
/// # let theta = Tensor::zeros((2, 496), DType::F32, &Device::Cpu)?;
/// # let names = ["lora_te_q_proj.oft_R.weight", "lora_unet_q_proj.oft_R.weight"];
/// # let tensors = names.map(|name| (name.to_string(), theta.clone()));
/// # candle_core::safetensors::save(&tensors.into_iter().collect(), &path)?;
/// # let base = candle_nn::Linear::new(Tensor::ones((8, 64), DType::F32, &Device::Cpu)?, None);
///
/// // A file of two models, written in OneTrainer's first weeks.
/// let options = LoadOptions::default()
///     .with_divisor(Divisor::SqrtEntries)
///     .with_component("text_encoder");
/// let builder = Adapter::load_with(&path, &Device::Cpu, &options)?;
/// assert!(builder.wrap("q_proj", base)?.is_adapted());
/// let adapter = builder.finish()?;
/// # Ok::<(), candle_doft::Error>(())
/// ```
#[derive(Clone, Default)]
#[non_exhaustive]
#[must_use = "each `with_` answers the changed options"]
pub struct LoadOptions {
    /// Replaces the divisor of every layer.
    pub divisor: Option<Divisor>,
    /// Replaces the map of every layer.
    pub map: Option<Map>,
    /// Reads one component and skips the others.
    pub component: Option<String>,
    /// From module to path.
    pub rename: Option<Rename>,
    /// Lets modules match no layer.
    pub allow_partial: bool,
    /// Lets keys have no known role.
    pub allow_unknown: bool,
    /// Whether layers may be built over another base weight than the adapter was trained on, told by
    /// the row norms. Off by default: such a layer is refused.
    pub allow_changed_base: bool,
    /// Dropout in training, instead of that in the file: 0 to below 1.
    pub dropout: Option<f64>,
}

impl LoadOptions {
    /// Sets the divisor of every layer.
    pub fn with_divisor(mut self, divisor: Divisor) -> Self {
        self.divisor = Some(divisor);
        self
    }

    /// Sets the map of every layer.
    pub fn with_map(mut self, map: Map) -> Self {
        self.map = Some(map);
        self
    }

    /// Reads one component and skips the others. A component goes by its own name (`denoiser`,
    /// `text_encoder`, `text_encoder_2` ..), by that in adapter files (`unet`, `te1`, `te2` ..) or by that of
    /// its folder (`transformer`); [`components`](super::components) are those of a file.
    pub fn with_component(mut self, component: impl Into<String>) -> Self {
        self.component = Some(component.into());
        self
    }

    /// Sets a function from module to path; it answers none to leave a module to the rules.
    ///
    /// # Examples
    ///
    /// ```
    /// use candle_doft::file::LoadOptions;
    ///
    /// let options = LoadOptions::default()
    ///     .with_rename(|module| Some(module.replace("blk.", "model.layers.")));
    /// ```
    pub fn with_rename(
        mut self,
        rename: impl Fn(&str) -> Option<String> + Send + Sync + 'static,
    ) -> Self {
        self.rename = Some(Arc::new(rename));
        self
    }

    /// Lets modules match no layer, with a warning.
    pub fn with_allow_partial(mut self, allow: bool) -> Self {
        self.allow_partial = allow;
        self
    }

    /// Lets keys have no known role, with a warning.
    pub fn with_allow_unknown(mut self, allow: bool) -> Self {
        self.allow_unknown = allow;
        self
    }

    /// Sets [`LoadOptions::allow_changed_base`].
    pub fn with_allow_changed_base(mut self, allow: bool) -> Self {
        self.allow_changed_base = allow;
        self
    }

    /// Sets [`LoadOptions::dropout`].
    pub fn with_dropout(mut self, dropout: f64) -> Self {
        self.dropout = Some(dropout);
        self
    }
}

impl std::fmt::Debug for LoadOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LoadOptions")
            .field("divisor", &self.divisor)
            .field("map", &self.map)
            .field("component", &self.component)
            .field("rename", &self.rename.is_some())
            .field("allow_partial", &self.allow_partial)
            .field("allow_unknown", &self.allow_unknown)
            .field("allow_changed_base", &self.allow_changed_base)
            .field("dropout", &self.dropout)
            .finish()
    }
}
