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
use candle_core::{Device, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

/// All adapted layers of one fine-tune.
///
/// Build a model through it, and every layer that the configuration targets is adapted; the others
/// are plain frozen layers. Clones share everything, so a model's parts can each hold one.
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
    /// The file that layers take their parameters from, of a loaded adapter.
    source: Option<source::Source>,
}

/// A layer that was built through the adapter.
enum Entry {
    Adapted(Arc<Adaptation>),
    Frozen { parameters: usize },
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
    pub fn extra_vb(&self, dtype: candle_core::DType) -> VarBuilder<'static> {
        let backend = extra::ExtraBackend {
            inner: self.inner.clone(),
        };
        VarBuilder::from_backend(Box::new(backend), dtype, self.inner.device.clone())
    }

    /// Makes `value` an extra trainable tensor, or answers the one of that name.
    ///
    /// # Errors
    ///
    /// When an extra of that name has another shape.
    pub fn extra(&self, name: &str, value: &Tensor) -> Result<Var> {
        let var = self
            .inner
            .extra(name, || match self.inner.stored_extra(name) {
                Some(stored) => Var::from_tensor(&stored.to_device(&self.inner.device)?),
                None => Var::from_tensor(&value.copy()?),
            })?;
        if var.dims() != value.dims() {
            return Err(Error::Shape {
                layer: name.to_string(),
                what: "the extra tensor",
                found: value.dims().to_vec(),
                expected: format!("{:?}, as it was first made", var.dims()),
            });
        }
        Ok(var)
    }

    /// Checks that the model is complete: at least one layer or extra tensor, no pattern that matches
    /// nothing, and nothing of a loaded file left over. [`Adapter::vars`] and all that follows from it
    /// check this first.
    ///
    /// # Errors
    ///
    /// [`Error::NoLayers`]; [`Error::NoMatch`] or [`Error::FileUnused`] with the nearest names.
    pub fn check_complete(&self) -> Result<()> {
        let layers = self.inner.layers();
        let paths = layers.keys().map(String::as_str);
        match &self.inner.source {
            None => select::check_patterns(&self.inner.config, paths)?,
            Some(source) => source.check_used(paths)?,
        }
        let adapted = layers.values().any(|l| matches!(l, Entry::Adapted(_)));
        if !adapted && self.inner.extras().is_empty() {
            return Err(Error::NoLayers);
        }
        Ok(())
    }

    /// The trainable tensors with their names: rotation before magnitude, layers by path, then the
    /// extra tensors by name. The order depends on names alone.
    ///
    /// # Errors
    ///
    /// Those of [`Adapter::check_complete`].
    pub fn named_vars(&self) -> Result<Vec<(String, Var)>> {
        let mut vars = Vec::new();
        for (rotation, magnitude) in self.layer_vars()? {
            vars.push(rotation);
            vars.extend(magnitude);
        }
        for (name, var) in self.inner.extras().iter() {
            vars.push((name.clone(), var.clone()));
        }
        Ok(vars)
    }

    /// The trainable tensors for an optimizer, in the order of [`Adapter::named_vars`].
    ///
    /// # Errors
    ///
    /// Those of [`Adapter::check_complete`].
    pub fn vars(&self) -> Result<Vec<Var>> {
        Ok(unnamed(self.named_vars()?))
    }

    /// The packed rotations alone.
    ///
    /// # Errors
    ///
    /// Those of [`Adapter::check_complete`].
    pub fn rotation_vars(&self) -> Result<Vec<Var>> {
        let vars = self.layer_vars()?;
        Ok(unnamed(vars.into_iter().map(|(rotation, _)| rotation)))
    }

    /// The magnitudes alone.
    ///
    /// # Errors
    ///
    /// Those of [`Adapter::check_complete`].
    pub fn magnitude_vars(&self) -> Result<Vec<Var>> {
        let vars = self.layer_vars()?;
        Ok(unnamed(
            vars.into_iter().filter_map(|(_, magnitude)| magnitude),
        ))
    }

    /// What is adapted, as data; `Display` prints a table.
    ///
    /// # Errors
    ///
    /// Those of [`Adapter::check_complete`].
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
            match entry {
                Entry::Frozen { parameters } => {
                    report.frozen_layers += 1;
                    report.total += parameters;
                }
                Entry::Adapted(layer) => {
                    let params = layer.params();
                    let magnitude = params.magnitude_parameter().map_or(0, Tensor::elem_count);
                    let parameters = params.rotation().elem_count() + magnitude;
                    report.trainable += parameters;
                    report.total += parameters + layer.shape().iter().product::<usize>();
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
            }
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

    #[allow(
        clippy::type_complexity,
        reason = "a pair of named variables, used here alone"
    )]
    fn layer_vars(&self) -> Result<Vec<((String, Var), Option<(String, Var)>)>> {
        self.check_complete()?;
        let named = |layer: &Adaptation, name: &str, tensor: &Tensor| {
            let name = format!("{}.{name}", layer.path());
            Ok::<_, Error>((name, Var::from_tensor(tensor)?))
        };
        let mut vars = Vec::new();
        for layer in self.inner.adapted() {
            let params = layer.params();
            let rotation = named(&layer, names::rotation(layer.kind()), params.rotation())?;
            let magnitude = match (
                names::magnitude(params.kind()),
                params.magnitude_parameter(),
            ) {
                (Some(name), Some(tensor)) => Some(named(&layer, name, tensor)?),
                _ => None,
            };
            vars.push((rotation, magnitude));
        }
        Ok(vars)
    }
}

fn unnamed(vars: impl IntoIterator<Item = (String, Var)>) -> Vec<Var> {
    vars.into_iter().map(|(_, var)| var).collect()
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
        let adapted = layers.values().filter_map(|entry| match entry {
            Entry::Adapted(layer) => Some(layer.clone()),
            Entry::Frozen { .. } => None,
        });
        adapted.collect()
    }

    fn extra(
        &self,
        name: &str,
        fresh: impl FnOnce() -> candle_core::Result<Var>,
    ) -> candle_core::Result<Var> {
        let mut extras = self.extras();
        if let Some(var) = extras.get(name) {
            return Ok(var.clone());
        }
        let var = fresh()?;
        extras.insert(name.to_string(), var.clone());
        Ok(var)
    }
}
