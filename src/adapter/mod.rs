//! [`Adapter`]: all adapted layers of one fine-tune, by module path; [`AdapterBuilder`], through which
//! its model is built.
//!
//! Building has an end, because layers that are built later would never reach the optimizer, and a file
//! whose names do not fit would leave the frozen base running unnoticed. It is a builder, and not a
//! closure, because models are built as with candle's `VarBuilder`: passed by reference from constructor
//! to constructor. [`AdapterBuilder::finish`] takes the builder by value, so the compiler refuses a layer
//! that comes later. This compiles, and with one line more it does not:
//!
//! ```
//! # use candle_core::{DType, Device};
//! # let vb = candle_nn::VarBuilder::zeros(DType::F32, &Device::Cpu);
//! let builder = candle_doft::Adapter::builder(Default::default(), &Device::Cpu)?;
//! builder.linear(64, 64, vb.pp("first"))?;
//! let adapter = builder.finish()?;
//! # Ok::<(), candle_doft::Error>(())
//! ```
//!
//! ```compile_fail,E0382
//! # use candle_core::{DType, Device};
//! # let vb = candle_nn::VarBuilder::zeros(DType::F32, &Device::Cpu);
//! let builder = candle_doft::Adapter::builder(Default::default(), &Device::Cpu)?;
//! builder.linear(64, 64, vb.pp("first"))?;
//! let adapter = builder.finish()?;
//! builder.linear(64, 64, vb.pp("later"))?; // the builder was moved
//! # Ok::<(), candle_doft::Error>(())
//! ```

mod asked;
mod build;
mod extra;
mod fingerprint;
mod matching;
mod report;
mod scope;
mod select;
mod set;
mod settings;
mod source;
mod state;
mod stored;
mod wrap;

pub(crate) use asked::Asked;
pub use build::AdapterBuilder;
pub(crate) use fingerprint::{differs, fingerprint};
pub(crate) use matching::{PEFT_PREFIX, TRANSLATED, component_named, flat, keys, translated};
pub use report::{LayerReport, Report};
pub(crate) use select::{check_patterns, selects};
pub use set::{Adapters, Pinned};
pub(crate) use settings::Settings;
pub use state::{Average, State};
pub use stored::Warning;
pub(crate) use stored::{NORMS_DIFFER, OTHER_BASE, Stored, StoredLayer, StoredLowRank};
pub use wrap::{WeightSource, Wrap};

use crate::config::{DoftConfig, LayerKind};
use crate::error::{Error, GradientReport, Result};
use crate::frozen::Frozen;
use crate::layer::{Adaptation, Control, Form};
use candle_core::backprop::GradStore;
use candle_core::{Device, Var};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

/// All adapted layers of one fine-tune, complete.
///
/// A model is built through an [`AdapterBuilder`], and [`AdapterBuilder::finish`] returns the adapter:
/// from then on it has all its trainable tensors, and no layer can be added. Clones share everything.
///
/// * Start: [`Adapter::builder`] for a fresh adapter, [`Adapter::load`] for one from a file.
/// * Train: [`Adapter::vars`], [`Adapter::check_gradients`], [`Adapter::report`].
/// * Use: [`Adapter::with_mode`], [`Adapter::save`], [`Adapter::merged`].
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
/// let builder = Adapter::builder(DoftConfig::default().with_targets("q_proj"), &device)?;
/// let q_proj = builder.linear_no_bias(64, 64, vb.pp("layers.0.q_proj"))?;
/// let k_proj = builder.linear_no_bias(64, 64, vb.pp("layers.0.k_proj"))?;
/// let adapter = builder.finish()?;
/// assert!(q_proj.is_adapted() && !k_proj.is_adapted());
///
/// let mut optimizer = AdamW::new_lr(adapter.vars(), 1e-3)?;
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
    /// Tells the adapters of a model apart.
    id: u64,
    /// Whether the model was built with it, so that its layers hold it themselves.
    first: bool,
    config: DoftConfig,
    device: Device,
    layers: BTreeMap<String, Entry>,
    extras: BTreeMap<String, Var>,
    /// Everything that trains, in the order of [`Adapter::named_vars`].
    trained: Vec<Trained>,
    /// The file that the layers took their parameters from, of a loaded adapter.
    source: Option<Arc<source::Source>>,
    control: Arc<Control>,
}

/// A layer that was built through the adapter.
struct Entry {
    adaptation: Option<Arc<Adaptation>>,
    site: Arc<Site>,
}

/// The frozen layer itself, for adapters that come later.
struct Site {
    id: u64,
    kind: LayerKind,
    base: Arc<dyn Frozen + Send + Sync>,
}

/// One tensor that trains.
struct Trained {
    role: Role,
    name: String,
    var: Var,
}

impl std::fmt::Debug for Adapter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let paths: Vec<&String> = self.inner.layers.keys().collect();
        f.debug_struct("Adapter")
            .field("config", &self.inner.config)
            .field("layers", &paths)
            .finish_non_exhaustive()
    }
}

impl Adapter {
    /// The configuration.
    pub fn config(&self) -> &DoftConfig {
        &self.inner.config
    }

    /// The device of the parameters.
    pub fn device(&self) -> &Device {
        &self.inner.device
    }

    /// The trainable tensors with their names: rotation before magnitude, layers by path, then the
    /// extra tensors by name. The order depends on names alone.
    pub fn named_vars(&self) -> Vec<(String, Var)> {
        let trained = self.inner.trained.iter();
        trained.map(|t| (t.name.clone(), t.var.clone())).collect()
    }

    /// The trainable tensors for an optimizer, in the order of [`Adapter::named_vars`].
    pub fn vars(&self) -> Vec<Var> {
        self.vars_where(|_| true)
    }

    /// The packed rotations alone, and low-rank matrices.
    pub fn rotation_vars(&self) -> Vec<Var> {
        self.vars_where(|role| role == Role::Rotation)
    }

    /// The magnitudes alone.
    pub fn magnitude_vars(&self) -> Vec<Var> {
        self.vars_where(|role| role == Role::Magnitude)
    }

    /// What is adapted, as data; `Display` prints a table.
    ///
    /// # Examples
    ///
    /// ```
    /// # use candle_core::{DType, Device};
    /// # use candle_doft::{Adapter, DoftConfig};
    /// # let vb = candle_nn::VarBuilder::zeros(DType::F32, &Device::Cpu);
    /// let builder = Adapter::builder(DoftConfig::default().with_targets("q_proj"), &Device::Cpu)?;
    /// builder.linear_no_bias(64, 8, vb.pp("q_proj"))?;
    /// builder.linear_no_bias(64, 8, vb.pp("k_proj"))?;
    /// let report = builder.finish()?.report();
    /// assert_eq!((report.layers.len(), report.frozen_layers), (1, 1));
    /// assert_eq!(report.trainable, 2 * 32 * 31 / 2 + 8); // two blocks, and a magnitude a row
    /// println!("{report}");
    /// # Ok::<(), candle_doft::Error>(())
    /// ```
    pub fn report(&self) -> Report {
        let extras: usize = self.inner.extras.values().map(|v| v.elem_count()).sum();
        let mut report = Report {
            layers: Vec::new(),
            frozen_layers: 0,
            trainable: extras,
            total: extras,
        };
        for (path, entry) in &self.inner.layers {
            report.total += entry.site.base.as_base().elements();
            let Some(layer) = &entry.adaptation else {
                report.frozen_layers += 1;
                continue;
            };
            let tensors = layer.tensors().into_iter();
            let parameters = tensors.map(|(_, tensor, _)| tensor.elem_count()).sum();
            let (block_size, asked, blocks, rank) = match layer.form() {
                Form::Rotation {
                    layout,
                    requested_block_size,
                    ..
                } => (
                    layout.block_size,
                    *requested_block_size,
                    layout.blocks,
                    None,
                ),
                Form::LowRank(params) => (0, 0, 0, Some(params.spec().rank)),
            };
            report.trainable += parameters;
            report.total += parameters;
            report.layers.push(LayerReport {
                path: path.clone(),
                kind: layer.kind(),
                shape: layer.shape().to_vec(),
                block_size,
                asked,
                blocks,
                rank,
                parameters,
            });
        }
        report
    }

    /// Looks at the gradient of every trainable tensor. Call it after the first backward pass: a
    /// parameter that is not reached trains as if frozen while the loss still falls.
    ///
    /// The report names zero gradients, which may be right; see [`GradientReport`] for what can and
    /// cannot be told.
    ///
    /// # Errors
    ///
    /// [`Error::Gradients`] if a gradient is missing or not finite.
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
    /// let builder = Adapter::builder(DoftConfig::default(), &Device::Cpu)?;
    /// let weight = Tensor::randn(0f32, 1., (8, 64), &Device::Cpu)?;
    /// let layer = builder.wrap("layer", candle_nn::Linear::new(weight, None))?;
    /// let adapter = builder.finish()?;
    /// let y = layer.forward(&Tensor::ones((2, 64), DType::F32, &Device::Cpu)?)?;
    ///
    /// let cut = candle_nn::ops::softmax_last_dim(&y)?.sqr()?.sum_all()?.backward()?;
    /// assert!(matches!(adapter.check_gradients(&cut), Err(Error::Gradients(_))));
    /// let whole = frozen::softmax_last_dim(&y)?.sqr()?.sum_all()?.backward()?;
    /// assert!(adapter.check_gradients(&whole)?.missing.is_empty());
    /// # Ok::<(), candle_doft::Error>(())
    /// ```
    pub fn check_gradients(&self, grads: &GradStore) -> Result<GradientReport> {
        let report = GradientReport::new(&self.named_vars(), grads)?;
        if report.is_sound() {
            Ok(report)
        } else {
            Err(Error::Gradients(Box::new(report)))
        }
    }

    /// Says which training step comes next, so that dropout masks depend on seed, layer, step and
    /// pass alone, and a resumed run draws the masks of the first.
    pub fn set_step(&self, step: u64) {
        for layer in self.adapted() {
            layer.set_step(step);
        }
    }

    fn adapted(&self) -> impl Iterator<Item = &Arc<Adaptation>> {
        let layers = self.inner.layers.values();
        layers.filter_map(|layer| layer.adaptation.as_ref())
    }

    fn vars_where(&self, wanted: impl Fn(Role) -> bool) -> Vec<Var> {
        let trained = self.inner.trained.iter().filter(|t| wanted(t.role));
        trained.map(|t| t.var.clone()).collect()
    }
}

/// What a trainable tensor is for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Rotation,
    Magnitude,
    Extra,
}

/// Everything that trains, in the order of [`Adapter::named_vars`].
fn trained<'a>(
    layers: impl Iterator<Item = &'a Arc<Adaptation>>,
    extras: &BTreeMap<String, Var>,
) -> Result<Vec<Trained>> {
    let mut trained = Vec::new();
    for layer in layers {
        for (name, tensor, magnitude) in layer.tensors() {
            let role = match magnitude {
                true => Role::Magnitude,
                false => Role::Rotation,
            };
            let name = format!("{}.{name}", layer.path());
            let var = Var::from_tensor(tensor)?;
            trained.push(Trained { role, name, var });
        }
    }
    for (name, var) in extras {
        trained.push(Trained {
            role: Role::Extra,
            name: name.clone(),
            var: var.clone(),
        });
    }
    Ok(trained)
}

/// What a lock guards. A panic elsewhere leaves these maps and sets whole, so a poisoned lock is still
/// good.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
