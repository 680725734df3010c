//! [`Adapter`]: all adapted layers of one fine-tune, by module path.

mod asked;
mod build;
mod extra;
mod fingerprint;
mod matching;
mod report;
mod scope;
mod select;
mod source;
mod stored;

pub(crate) use asked::Asked;
pub(crate) use fingerprint::{differs, fingerprint};
pub(crate) use matching::{PEFT_PREFIX, flat};
pub use report::{LayerReport, Report};
pub use stored::Warning;
pub(crate) use stored::{NORMS_DIFFER, Stored, StoredLayer};

use crate::config::DoftConfig;
use crate::error::{Error, GradientReport, Result};
use crate::layer::Adaptation;
use crate::params::names;
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

/// All adapted layers of one fine-tune.
///
/// Build a model through it, and every layer that the configuration targets is adapted; the others
/// are plain frozen layers. Clones share everything, so a model's parts can each hold one.
///
/// * Make one: [`Adapter::new`], [`Adapter::load`].
/// * Layers: [`Adapter::linear`] and its siblings build them, [`Adapter::wrap_linear`] and its siblings
///   wrap those that exist, [`Adapter::extra_vb`] is for new ones, such as a head.
/// * Train: [`Adapter::vars`], [`Adapter::check_gradients`], [`Adapter::report`].
/// * Use: [`Adapter::inference`], [`Adapter::save`], [`Adapter::merged`].
///
/// # Examples
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_doft::{Adapter, DoftConfig};
/// use candle_nn::{AdamW, Module, Optimizer, VarBuilder};
///
/// let device = Device::Cpu;
/// let vb = VarBuilder::zeros(DType::F32, &device); // a checkpoint, in earnest
/// let adapter = Adapter::new(DoftConfig::default().with_targets(["q_proj"]), &device)?;
/// let q_proj = adapter.linear_no_bias(64, 64, vb.pp("layers.0.q_proj"))?;
/// let k_proj = adapter.linear_no_bias(64, 64, vb.pp("layers.0.k_proj"))?;
/// assert!(q_proj.is_adapted() && !k_proj.is_adapted());
///
/// let mut optimizer = AdamW::new_lr(adapter.vars()?, 1e-3)?;
/// let x = Tensor::ones((2, 64), DType::F32, &device)?;
/// let loss = q_proj.forward(&x)?.sqr()?.mean_all()?;
/// optimizer.backward_step(&loss)?;
/// # Ok::<(), candle_doft::Error>(())
/// ```
#[derive(Clone)]
pub struct Adapter {
    inner: Arc<Inner>,
}

struct Inner {
    config: DoftConfig,
    device: Device,
    varmap: VarMap,
    layers: Mutex<BTreeMap<String, Entry>>,
    extras: Mutex<BTreeMap<String, Var>>,
    /// Whether the model was complete once. Layers are added and never go, so it stays that.
    complete: AtomicBool,
    /// The file that layers take their parameters from, of a loaded adapter.
    source: Option<source::Source>,
}

/// A layer that was built through the adapter.
struct Entry {
    adaptation: Option<Arc<Adaptation>>,
    /// Frozen parameters, weight and bias.
    frozen: usize,
}

impl std::fmt::Debug for Adapter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let paths: Vec<String> = self.inner.layers().keys().cloned().collect();
        f.debug_struct("Adapter")
            .field("config", &self.inner.config)
            .field("layers", &paths)
            .finish_non_exhaustive()
    }
}

impl Adapter {
    /// An adapter without layers. Layers are built with [`Adapter::linear`] and its siblings, or
    /// wrapped with [`Adapter::wrap_linear`].
    ///
    /// # Errors
    ///
    /// Those of [`DoftConfig::validate`].
    pub fn new(config: DoftConfig, device: &Device) -> Result<Self> {
        config.validate()?;
        Ok(Self::with_source(config, device, None))
    }

    fn with_source(config: DoftConfig, device: &Device, source: Option<source::Source>) -> Self {
        Self {
            inner: Arc::new(Inner {
                config,
                device: device.clone(),
                varmap: VarMap::new(),
                layers: Mutex::default(),
                extras: Mutex::default(),
                complete: AtomicBool::new(false),
                source,
            }),
        }
    }

    /// The configuration.
    pub fn config(&self) -> &DoftConfig {
        &self.inner.config
    }

    /// The device of the parameters.
    pub fn device(&self) -> &Device {
        &self.inner.device
    }

    /// A `VarBuilder` for extra trainable tensors that are saved with the adapter, such as a new
    /// head: `candle_nn::linear(hidden, classes, adapter.extra_vb(dtype).pp("classifier"))`. Tensors are
    /// made when asked for the first time, from the configuration's seed and their name.
    ///
    /// # Examples
    ///
    /// ```
    /// use candle_core::{DType, Device};
    /// use candle_doft::{Adapter, DoftConfig};
    ///
    /// let adapter = Adapter::new(DoftConfig::default(), &Device::Cpu)?;
    /// let head = candle_nn::linear(64, 3, adapter.extra_vb(DType::F32).pp("classifier"))?;
    /// assert_eq!(adapter.vars()?.len(), 2); // its weight and bias train
    /// # Ok::<(), candle_doft::Error>(())
    /// ```
    pub fn extra_vb(&self, dtype: DType) -> VarBuilder<'static> {
        let backend = extra::ExtraBackend {
            inner: self.inner.clone(),
        };
        VarBuilder::from_backend(Box::new(backend), dtype, self.inner.device.clone())
    }

    /// Makes `value` an extra trainable tensor, or answers the one of that name: that there is, or that
    /// the adapter was loaded with.
    ///
    /// # Errors
    ///
    /// When an extra of that name has another shape.
    pub fn extra(&self, name: &str, value: &Tensor) -> Result<Var> {
        let fresh = || Ok(value.to_device(&self.inner.device)?.detach());
        let var = self.inner.extra(name, value.dtype(), fresh)?;
        match var.dims() == value.dims() {
            true => Ok(var),
            false => {
                let expected = format!("{:?}, as it was first made", var.dims());
                Err(Error::shape(
                    name,
                    "the extra tensor",
                    value.dims(),
                    expected,
                ))
            }
        }
    }

    /// Checks that the model is complete: at least one layer or extra tensor, no pattern that matches
    /// nothing, and nothing of a loaded file left over. [`Adapter::vars`] and all that follows from it, and
    /// [`Adapter::inference`], check this first.
    ///
    /// # Errors
    ///
    /// [`Error::NoLayers`]; [`Error::NoMatch`] or [`Error::FileUnused`] with the nearest names.
    pub fn check_complete(&self) -> Result<()> {
        // Patterns are matched with every path, too much for each token of a sample.
        if self.inner.complete.load(Ordering::Relaxed) {
            return Ok(());
        }
        let layers = self.inner.layers();
        let paths = layers.keys().map(String::as_str);
        if layers.is_empty() && self.inner.extras().is_empty() {
            return Err(Error::NoLayers);
        }
        match &self.inner.source {
            None => select::check_patterns(&self.inner.config, paths)?,
            Some(source) => source.check_used(paths)?,
        }
        let adapted = layers.values().any(|layer| layer.adaptation.is_some());
        if !adapted && self.inner.extras().is_empty() {
            return Err(Error::NoLayers);
        }
        self.inner.complete.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// The trainable tensors with their names: rotation before magnitude, layers by path, then the
    /// extra tensors by name. The order depends on names alone.
    ///
    /// # Errors
    ///
    /// Those of [`Adapter::check_complete`].
    pub fn named_vars(&self) -> Result<Vec<(String, Var)>> {
        let vars = self.role_vars()?.into_iter();
        Ok(vars.map(|(_, name, var)| (name, var)).collect())
    }

    /// The trainable tensors for an optimizer, in the order of [`Adapter::named_vars`]: those of the
    /// layers built so far, so build the whole model first.
    ///
    /// # Errors
    ///
    /// Those of [`Adapter::check_complete`].
    pub fn vars(&self) -> Result<Vec<Var>> {
        let vars = self.role_vars()?.into_iter();
        Ok(vars.map(|(_, _, var)| var).collect())
    }

    /// The packed rotations alone.
    ///
    /// # Errors
    ///
    /// Those of [`Adapter::check_complete`].
    pub fn rotation_vars(&self) -> Result<Vec<Var>> {
        self.vars_of(Role::Rotation)
    }

    /// The magnitudes alone.
    ///
    /// # Errors
    ///
    /// Those of [`Adapter::check_complete`].
    pub fn magnitude_vars(&self) -> Result<Vec<Var>> {
        self.vars_of(Role::Magnitude)
    }

    /// What is adapted, as data; `Display` prints a table.
    ///
    /// # Errors
    ///
    /// Those of [`Adapter::check_complete`].
    ///
    /// # Examples
    ///
    /// ```
    /// # use candle_core::{DType, Device};
    /// # use candle_doft::{Adapter, DoftConfig};
    /// # let vb = candle_nn::VarBuilder::zeros(DType::F32, &Device::Cpu);
    /// let adapter = Adapter::new(DoftConfig::default().with_targets("q_proj"), &Device::Cpu)?;
    /// adapter.linear_no_bias(64, 8, vb.pp("q_proj"))?;
    /// adapter.linear_no_bias(64, 8, vb.pp("k_proj"))?;
    /// let report = adapter.report()?;
    /// assert_eq!((report.layers.len(), report.frozen_layers), (1, 1));
    /// assert_eq!(report.trainable, 2 * 32 * 31 / 2 + 8); // two blocks, and a magnitude a row
    /// println!("{report}");
    /// # Ok::<(), candle_doft::Error>(())
    /// ```
    pub fn report(&self) -> Result<Report> {
        self.check_complete()?;
        let extras: usize = self.inner.extras().values().map(|v| v.elem_count()).sum();
        let mut report = Report {
            layers: Vec::new(),
            frozen_layers: 0,
            trainable: extras,
            total: extras,
        };
        for (path, entry) in self.inner.layers().iter() {
            report.total += entry.frozen;
            let Some(layer) = &entry.adaptation else {
                report.frozen_layers += 1;
                continue;
            };
            let params = layer.params();
            let magnitude = params.magnitude_parameter().map_or(0, Tensor::elem_count);
            let parameters = params.rotation().elem_count() + magnitude;
            report.trainable += parameters;
            report.total += parameters;
            report.layers.push(LayerReport {
                path: path.clone(),
                kind: layer.kind(),
                shape: layer.shape().to_vec(),
                block_size: layer.layout().block_size,
                asked: layer.asked(),
                blocks: layer.layout().blocks,
                parameters,
            });
        }
        Ok(report)
    }

    /// Looks at the gradient of every trainable tensor. Call it after the first backward pass: a
    /// parameter that is not reached trains as if frozen while the loss still falls.
    ///
    /// The answer names zero gradients, which may be right; see [`GradientReport`] for what can and
    /// cannot be told.
    ///
    /// # Errors
    ///
    /// [`Error::Gradients`] when a gradient is missing or not finite; [`Adapter::check_complete`]'s.
    ///
    /// # Examples
    ///
    /// candle's `softmax_last_dim` cuts the graph, that of [`frozen`](crate::frozen) does not:
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_doft::{Adapter, DoftConfig, Error, frozen};
    /// use candle_nn::Module;
    ///
    /// let adapter = Adapter::new(DoftConfig::default(), &Device::Cpu)?;
    /// let weight = Tensor::randn(0f32, 1., (8, 64), &Device::Cpu)?;
    /// let layer = adapter.wrap_linear("layer", candle_nn::Linear::new(weight, None))?;
    /// let y = layer.forward(&Tensor::ones((2, 64), DType::F32, &Device::Cpu)?)?;
    ///
    /// let cut = candle_nn::ops::softmax_last_dim(&y)?.sqr()?.sum_all()?.backward()?;
    /// assert!(matches!(adapter.check_gradients(&cut), Err(Error::Gradients(_))));
    /// let whole = frozen::softmax_last_dim(&y)?.sqr()?.sum_all()?.backward()?;
    /// assert!(adapter.check_gradients(&whole)?.missing.is_empty());
    /// # Ok::<(), candle_doft::Error>(())
    /// ```
    pub fn check_gradients(&self, grads: &GradStore) -> Result<GradientReport> {
        let report = GradientReport::new(&self.named_vars()?, grads)?;
        match report.is_sound() {
            true => Ok(report),
            false => Err(Error::Gradients(Box::new(report))),
        }
    }

    /// Says which training step comes next, so that dropout masks depend on seed, layer, step and
    /// pass alone, and a resumed run draws the masks of the first.
    pub fn set_step(&self, step: u64) {
        for layer in self.inner.adapted() {
            layer.set_step(step);
        }
    }

    fn vars_of(&self, wanted: Role) -> Result<Vec<Var>> {
        let vars = self.role_vars()?.into_iter();
        let vars = vars.filter_map(|(role, _, var)| (role == wanted).then_some(var));
        Ok(vars.collect())
    }

    /// Everything that trains, in the order of [`Adapter::named_vars`].
    fn role_vars(&self) -> Result<Vec<(Role, String, Var)>> {
        self.check_complete()?;
        let mut vars = Vec::new();
        for layer in self.inner.adapted() {
            let params = layer.params();
            let rotation = (names::rotation(layer.kind()), params.rotation());
            let magnitude = names::magnitude(params.kind()).zip(params.magnitude_parameter());
            let roles = [
                (Role::Rotation, Some(rotation)),
                (Role::Magnitude, magnitude),
            ];
            for (role, named) in roles {
                if let Some((name, tensor)) = named {
                    let name = format!("{}.{name}", layer.path());
                    vars.push((role, name, Var::from_tensor(tensor)?));
                }
            }
        }
        for (name, var) in self.inner.extras().iter() {
            vars.push((Role::Extra, name.clone(), var.clone()));
        }
        Ok(vars)
    }
}

/// What a trainable tensor is for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Rotation,
    Magnitude,
    Extra,
}

/// What a lock guards. A panic elsewhere leaves these maps and sets whole, so a poisoned lock is still
/// good.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl Inner {
    fn layers(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        locked(&self.layers)
    }

    fn extras(&self) -> MutexGuard<'_, BTreeMap<String, Var>> {
        locked(&self.extras)
    }

    fn adapted(&self) -> Vec<Arc<Adaptation>> {
        let layers = self.layers();
        let adapted = layers.values().filter_map(|layer| layer.adaptation.clone());
        adapted.collect()
    }

    /// The extra tensor of that name: the one that there is, that of the loaded file, or a fresh one.
    fn extra(
        &self,
        name: &str,
        dtype: DType,
        fresh: impl FnOnce() -> candle_core::Result<Tensor>,
    ) -> candle_core::Result<Var> {
        let mut extras = self.extras();
        if let Some(var) = extras.get(name) {
            return Ok(var.clone());
        }
        let stored = self.source.as_ref().and_then(|source| source.extra(name));
        let value = match stored {
            Some(stored) => stored.to_dtype(dtype)?.to_device(&self.device)?,
            None => fresh()?,
        };
        let var = Var::from_tensor(&value)?;
        extras.insert(name.to_string(), var.clone());
        Ok(var)
    }
}
