//! [`AdapterBuilder`]: building and wrapping layers by module path, until the model is finished.

use super::source::Source;
use super::wrap::{WeightSource, Wrap};
use super::{Adapter, Entry, Inner, Site, extra, locked, select, trained};
use crate::config::{DoftConfig, LayerKind, Targets};
use crate::error::{Error, Result};
use crate::frozen::Frozen;
use crate::layer::{
    Adaptable, Adaptation, Control, Doft, DoftConv1d, DoftConv2d, DoftEmbedding, DoftLinear,
    next_id,
};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Conv1dConfig, Conv2dConfig, VarBuilder, VarMap};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

/// Builds the layers of one model: those that the configuration (or the loaded file) means are adapted,
/// the others are plain frozen layers. It stands beside candle's [`VarBuilder`] and its functions have
/// the names of `candle_nn`'s; the path of a layer is the whole prefix of its `VarBuilder`.
///
/// Made by [`Adapter::builder`] and [`Adapter::load`]. [`AdapterBuilder::finish`] checks that everything
/// fits and returns the [`Adapter`]; before that, a layer that is run returns [`Error::Unfinished`].
///
/// # Examples
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_doft::{Adapter, AdapterBuilder, DoftConfig, DoftLinear, Result};
/// use candle_nn::{Module, VarBuilder};
///
/// struct Mlp {
///     up: DoftLinear,
///     down: DoftLinear,
/// }
///
/// impl Mlp {
///     fn new(builder: &AdapterBuilder, vb: VarBuilder) -> Result<Self> {
///         Ok(Self {
///             up: builder.linear(64, 128, vb.pp("up"))?,
///             down: builder.linear_no_bias(128, 64, vb.pp("down"))?,
///         })
///     }
/// }
///
/// let vb = VarBuilder::zeros(DType::F32, &Device::Cpu);
/// let builder = Adapter::builder(DoftConfig::default(), &Device::Cpu)?;
/// let mlp = Mlp::new(&builder, vb.pp("mlp"))?;
/// let adapter = builder.finish()?;
/// assert_eq!(adapter.report().layers[0].path, "mlp.down");
/// let x = Tensor::zeros((1, 64), DType::F32, &Device::Cpu)?;
/// mlp.down.forward(&mlp.up.forward(&x)?.relu()?)?;
/// # Ok::<(), candle_doft::Error>(())
/// ```
#[must_use = "layers cannot be run before `finish`"]
pub struct AdapterBuilder {
    parts: Arc<Parts>,
}

/// What was built so far. Shared with the `VarBuilder`s of extra tensors.
pub(super) struct Parts {
    pub(super) config: DoftConfig,
    pub(super) device: Device,
    varmap: VarMap,
    layers: Mutex<BTreeMap<String, Entry>>,
    pub(super) extras: Mutex<BTreeMap<String, Var>>,
    pub(super) source: Option<Arc<Source>>,
    pub(super) control: Arc<Control>,
}

impl std::fmt::Debug for AdapterBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let paths: Vec<String> = locked(&self.parts.layers).keys().cloned().collect();
        f.debug_struct("AdapterBuilder")
            .field("config", &self.parts.config)
            .field("layers", &paths)
            .finish_non_exhaustive()
    }
}

impl Adapter {
    /// Starts a fresh adapter: its layers change nothing until they are trained.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] or [`Error::Pattern`] if a value of the configuration is out of its range.
    pub fn builder(config: DoftConfig, device: &Device) -> Result<AdapterBuilder> {
        config.validate()?;
        Ok(AdapterBuilder::new(config, device, None))
    }
}

impl AdapterBuilder {
    pub(super) fn new(config: DoftConfig, device: &Device, source: Option<Source>) -> Self {
        Self {
            parts: Arc::new(Parts {
                config,
                device: device.clone(),
                varmap: VarMap::new(),
                layers: Mutex::default(),
                extras: Mutex::default(),
                source: source.map(Arc::new),
                control: Arc::default(),
            }),
        }
    }

    /// The configuration.
    pub fn config(&self) -> &DoftConfig {
        &self.parts.config
    }

    /// The device of the parameters.
    pub fn device(&self) -> &Device {
        &self.parts.device
    }

    pub(super) fn source(&self) -> Option<&Source> {
        self.parts.source.as_deref()
    }

    /// Ends building: checks that the model is complete, and returns the adapter with all its trainable
    /// tensors. From here on the layers can be run.
    ///
    /// # Errors
    ///
    /// * [`Error::NoLayers`] if nothing was adapted and no extra tensor made, unless the targets are
    ///   [`Targets::None`].
    /// * [`Error::NoMatch`] if a pattern matches no layer, with the nearest paths.
    /// * [`Error::FileUnused`] if a layer or an extra tensor of the loaded file was not asked for, with
    ///   the nearest paths. [`LoadOptions::allow_partial`](crate::file::LoadOptions) allows it.
    ///
    /// The layers of a model that fails here cannot be run.
    pub fn finish(self) -> Result<Adapter> {
        let control = self.parts.control.clone();
        self.finish_as(control, true)
    }

    /// `first` is the adapter that the model is built with.
    fn finish_as(self, control: Arc<Control>, first: bool) -> Result<Adapter> {
        let parts = &self.parts;
        let layers = std::mem::take(&mut *locked(&parts.layers));
        let extras = std::mem::take(&mut *locked(&parts.extras));
        let adapted = || {
            layers
                .values()
                .filter_map(|layer| layer.adaptation.as_ref())
        };
        let paths = layers.keys().map(String::as_str);
        // Without any layer every pattern matches nothing, and the first would be blamed.
        let built = !(layers.is_empty() && extras.is_empty());
        match &parts.source {
            None if built => select::check_patterns(&parts.config, paths)?,
            None => {}
            Some(source) => source.check_used(paths)?,
        }
        let empty = adapted().next().is_none() && extras.is_empty();
        if empty && parts.config.targets != Targets::None {
            return Err(Error::NoLayers);
        }
        let trained = trained(adapted(), &extras)?;
        control.set_complete();
        Ok(Adapter {
            inner: Arc::new(Inner {
                id: next_id(),
                first,
                config: parts.config.clone(),
                device: parts.device.clone(),
                layers,
                extras,
                trained,
                source: parts.source.clone(),
                control,
            }),
        })
    }

    /// A linear layer with bias, as [`candle_nn::linear()`] makes it, over a [`VarBuilder`] or a
    /// [`QuantizedVarBuilder`](crate::frozen::QuantizedVarBuilder).
    ///
    /// # Errors
    ///
    /// If `vb` lacks the weight or the bias, or they have another shape; and as [`AdapterBuilder::wrap`].
    pub fn linear(
        &self,
        in_dim: usize,
        out_dim: usize,
        vb: impl WeightSource,
    ) -> Result<DoftLinear> {
        self.linear_b(in_dim, out_dim, true, vb)
    }

    /// A linear layer without bias, as [`candle_nn::linear_no_bias`] makes it.
    ///
    /// # Errors
    ///
    /// As [`AdapterBuilder::linear`].
    pub fn linear_no_bias(
        &self,
        in_dim: usize,
        out_dim: usize,
        vb: impl WeightSource,
    ) -> Result<DoftLinear> {
        self.linear_b(in_dim, out_dim, false, vb)
    }

    /// A linear layer with or without bias, as [`candle_nn::linear_b`] makes it.
    ///
    /// # Errors
    ///
    /// As [`AdapterBuilder::linear`].
    pub fn linear_b(
        &self,
        in_dim: usize,
        out_dim: usize,
        bias: bool,
        vb: impl WeightSource,
    ) -> Result<DoftLinear> {
        let path = vb.path();
        self.layer(&path, vb.linear(in_dim, out_dim, bias)?)
    }

    /// A two-dimensional convolution with bias and a square kernel, as [`candle_nn::conv2d()`] makes
    /// it.
    ///
    /// # Errors
    ///
    /// If `vb` lacks the kernel or the bias, or they have another shape; and as [`AdapterBuilder::wrap`].
    pub fn conv2d(
        &self,
        in_channels: usize,
        out_channels: usize,
        kernel_size: usize,
        config: Conv2dConfig,
        vb: VarBuilder,
    ) -> Result<DoftConv2d> {
        let path = vb.prefix();
        let base = candle_nn::conv2d(in_channels, out_channels, kernel_size, config, vb)?;
        self.wrap(&path, base)
    }

    /// A two-dimensional convolution without bias, as [`candle_nn::conv2d_no_bias`] makes it.
    ///
    /// # Errors
    ///
    /// As [`AdapterBuilder::conv2d`].
    pub fn conv2d_no_bias(
        &self,
        in_channels: usize,
        out_channels: usize,
        kernel_size: usize,
        config: Conv2dConfig,
        vb: VarBuilder,
    ) -> Result<DoftConv2d> {
        let path = vb.prefix();
        let base = candle_nn::conv2d_no_bias(in_channels, out_channels, kernel_size, config, vb)?;
        self.wrap(&path, base)
    }

    /// A one-dimensional convolution with bias, as [`candle_nn::conv1d()`] makes it.
    ///
    /// # Errors
    ///
    /// As [`AdapterBuilder::conv2d`].
    pub fn conv1d(
        &self,
        in_channels: usize,
        out_channels: usize,
        kernel_size: usize,
        config: Conv1dConfig,
        vb: VarBuilder,
    ) -> Result<DoftConv1d> {
        let path = vb.prefix();
        let base = candle_nn::conv1d(in_channels, out_channels, kernel_size, config, vb)?;
        self.wrap(&path, base)
    }

    /// A one-dimensional convolution without bias, as [`candle_nn::conv1d_no_bias`] makes it.
    ///
    /// # Errors
    ///
    /// As [`AdapterBuilder::conv2d`].
    pub fn conv1d_no_bias(
        &self,
        in_channels: usize,
        out_channels: usize,
        kernel_size: usize,
        config: Conv1dConfig,
        vb: VarBuilder,
    ) -> Result<DoftConv1d> {
        let path = vb.prefix();
        let base = candle_nn::conv1d_no_bias(in_channels, out_channels, kernel_size, config, vb)?;
        self.wrap(&path, base)
    }

    /// An embedding, as [`candle_nn::embedding()`] makes it, over a [`VarBuilder`] or a
    /// [`QuantizedVarBuilder`](crate::frozen::QuantizedVarBuilder).
    ///
    /// # Errors
    ///
    /// If `vb` lacks the table, or it has another shape; and as [`AdapterBuilder::wrap`].
    pub fn embedding(
        &self,
        in_size: usize,
        out_size: usize,
        vb: impl WeightSource,
    ) -> Result<DoftEmbedding> {
        let path = vb.path();
        self.layer(&path, vb.embedding(in_size, out_size)?)
    }

    /// Wraps a layer that exists already: candle's `Linear`, `Conv1d`, `Conv2d`, `Embedding` or
    /// `QMatMul`, or one of [`frozen`](crate::frozen), dense or quantized. The weight is shared, not
    /// copied. A fresh layer over a quantized `QMatMul` differs from it by candle's rounding of
    /// activations: see [`frozen::Linear::from_qmatmul`](crate::frozen::Linear::from_qmatmul).
    ///
    /// # Errors
    ///
    /// * [`Error::LayerExists`] if the path is taken, [`Error::Argument`] if it is empty.
    /// * [`Error::Device`] if the layer is on another device than the adapter.
    /// * If the layer is to be adapted and cannot be: its weight is not a float tensor of the rank of its
    ///   kind, its bias does not have one value per output, or the block size does not fit.
    /// * Of a loaded adapter: if the file means a layer of another kind or shape
    ///   ([`Error::FileTensor`], [`Error::File`]), or was trained on another base weight
    ///   ([`Error::File`]; `LoadOptions::allow_changed_base` allows it).
    ///
    /// Of a layer outside the targets only the path is checked.
    pub fn wrap<B: Wrap>(&self, path: &str, layer: B) -> Result<Doft<B::Frozen>> {
        self.layer(path, layer.freeze()?)
    }

    /// A `VarBuilder` for extra trainable tensors that are saved with the adapter, such as a new
    /// head: `candle_nn::linear(hidden, classes, builder.extra_vb(dtype).pp("classifier"))`. Tensors
    /// are made when asked for the first time, from the configuration's seed and their name, or come from
    /// the loaded file, as [`AdapterBuilder::extra`] says. After [`AdapterBuilder::finish`] it returns
    /// [`Error::Finished`].
    ///
    /// # Examples
    ///
    /// ```
    /// use candle_core::{DType, Device};
    /// use candle_doft::{Adapter, DoftConfig};
    ///
    /// let builder = Adapter::builder(DoftConfig::default(), &Device::Cpu)?;
    /// let head = candle_nn::linear(64, 3, builder.extra_vb(DType::F32).pp("classifier"))?;
    /// assert_eq!(builder.finish()?.vars().len(), 2); // its weight and bias train
    /// # Ok::<(), candle_doft::Error>(())
    /// ```
    pub fn extra_vb(&self, dtype: DType) -> VarBuilder<'static> {
        let backend = extra::ExtraBackend {
            parts: self.parts.clone(),
        };
        VarBuilder::from_backend(Box::new(backend), dtype, self.parts.device.clone())
    }

    /// Names of the extra tensors that the loaded file has and that nobody asked for yet, sorted: what a
    /// program has to look for in its model, such as norms or a head that were trained whole.
    pub fn unasked_extras(&self) -> Vec<String> {
        let Some(source) = &self.parts.source else {
            return Vec::new();
        };
        let made = locked(&self.parts.extras);
        let names = source.extras().filter(|name| !made.contains_key(*name));
        names.cloned().collect()
    }

    /// Makes `value` an extra trainable tensor, or returns the one of that name that exists already, or
    /// that the loaded file has; that of the file is converted to the dtype of `value`.
    ///
    /// # Errors
    ///
    /// * [`Error::Shape`] or [`Error::DType`] if an extra of that name has another shape or dtype.
    /// * [`Error::FileTensor`] if a value of the file is out of the range of the dtype.
    pub fn extra(&self, name: &str, value: &Tensor) -> Result<Var> {
        let fresh = || Ok(value.to_device(&self.parts.device)?.detach());
        let (shape, dtype) = (Some(value.shape()), value.dtype());
        self.parts.extra(name, shape, dtype, fresh)
    }

    /// A layer of any kind, adapted or plain, entered under its path.
    fn layer<F: Adaptable>(&self, path: &str, base: F) -> Result<Doft<F>> {
        // Its parameters could not be told from those of the next one, nor read from a file.
        if path.is_empty() {
            return Err(Error::argument(
                "AdapterBuilder",
                "the path of a layer",
                "empty",
                "a name: give the `VarBuilder` a prefix, as in `vb.pp(\"fc1\")`",
            ));
        }
        let parts = &self.parts;
        if locked(&parts.layers).contains_key(path) {
            return Err(exists(path));
        }
        let id = next_id();
        let adaptation = self.adaptation(id, path, F::KIND, &base)?.map(Arc::new);
        let site = Site {
            id,
            kind: F::KIND,
            base: Arc::new(base.clone()),
        };
        let entry = Entry {
            adaptation: adaptation.clone(),
            site: Arc::new(site),
        };
        self.register(path, entry)?;
        let control = parts.control.clone();
        Ok(Doft::from_parts(id, path, base, adaptation, control))
    }

    /// What this adapter makes of a layer; none where it does not mean it.
    fn adaptation(
        &self,
        id: u64,
        path: &str,
        kind: LayerKind,
        base: &dyn Frozen,
    ) -> Result<Option<Adaptation>> {
        if !self.selects(path, kind)? {
            return Ok(None);
        }
        self.check(path, base)?;
        let parts = &self.parts;
        let (config, norms) = match &parts.source {
            None => (parts.config.clone(), None),
            Some(source) => source.setting(path, kind, &base.as_base())?,
        };
        // Params choose the dtype after the weight.
        let vb = VarBuilder::from_varmap(&parts.varmap, DType::F32, &parts.device).pp(path);
        Adaptation::new(id, kind, &base.as_base(), &config, norms, vb).map(Some)
    }

    /// An adapter over the layers of a model that is complete.
    pub(super) fn beside(self, first: &Adapter) -> Result<Adapter> {
        for (path, Entry { site, .. }) in &first.inner.layers {
            let adaptation = self.adaptation(site.id, path, site.kind, &*site.base)?;
            let entry = Entry {
                adaptation: adaptation.map(Arc::new),
                site: site.clone(),
            };
            self.register(path, entry)?;
        }
        self.finish_as(first.inner.control.clone(), false)
    }

    /// Whether the layer is to be adapted: by the configuration, or by what a loaded file holds.
    fn selects(&self, path: &str, kind: LayerKind) -> Result<bool> {
        match &self.parts.source {
            None => select::selects(&self.parts.config, path, kind),
            Some(source) => source.holds(path),
        }
    }

    /// Returns an error for a base that cannot be adapted.
    fn check(&self, path: &str, base: &dyn Frozen) -> Result<()> {
        let (found, expected) = (&base.as_base().weight.device(), &self.parts.device);
        if !found.same_device(expected) {
            return Err(Error::Device {
                layer: path.to_string(),
                found: name(found),
                expected: name(expected),
            });
        }
        base.check_base(path)
    }

    fn register(&self, path: &str, entry: Entry) -> Result<()> {
        if let (Some(source), Some(adaptation)) = (&self.parts.source, &entry.adaptation) {
            source.fill(adaptation)?;
        }
        // Two threads may have built one path at the same time.
        match locked(&self.parts.layers).insert(path.to_string(), entry) {
            Some(_) => Err(exists(path)),
            None => Ok(()),
        }
    }
}

fn exists(path: &str) -> Error {
    Error::LayerExists {
        layer: path.to_string(),
    }
}

fn name(device: &Device) -> String {
    format!("{:?}", device.location()).to_lowercase()
}
