//! Switches that hold for as long as a closure runs.

use super::Adapter;
use crate::error::Result;
use crate::layer::Adaptation;
use std::sync::Arc;

impl Adapter {
    /// Switches all layers that were built so far: off, each answers what its base answers.
    pub fn set_enabled(&self, enabled: bool) {
        for layer in self.inner.adapted() {
            layer.set_enabled(enabled);
        }
    }

    /// Runs `f` with all layers switched off, for every thread. Scopes may be nested, and run in several
    /// threads.
    ///
    /// # Examples
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::{Module, VarBuilder};
    /// # let vb = VarBuilder::zeros(DType::F32, &Device::Cpu);
    /// # let adapter = candle_doft::Adapter::new(Default::default(), &Device::Cpu)?;
    /// # let layer = adapter.linear(32, 8, vb.pp("layer"))?;
    /// # let x = Tensor::zeros((1, 32), DType::F32, &Device::Cpu)?;
    /// let of_the_base = adapter.disabled(|| layer.forward(&x))?;
    /// # Ok::<(), candle_doft::Error>(())
    /// ```
    pub fn disabled<T>(&self, f: impl FnOnce() -> T) -> T {
        let mut scope = Scope::new(Adaptation::resume);
        for layer in self.inner.adapted() {
            layer.suspend();
            scope.layers.push(layer);
        }
        f()
    }

    /// Runs `f` with rotations and ratios held as constants, for every thread: no graph is built, no
    /// rotation is rebuilt for each call, and dropout is off, also in `forward_t(x, true)`. For
    /// validation and sampling; a step of the optimizer inside `f` is not seen until it ends. Scopes may
    /// be nested, and run in several threads.
    ///
    /// # Errors
    ///
    /// Those of [`Adapter::check_complete`], for a file whose layers the model never asked for would go
    /// unnoticed, and of building the rotations.
    ///
    /// # Examples
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::{Module, VarBuilder};
    /// # let vb = VarBuilder::zeros(DType::F32, &Device::Cpu);
    /// # let adapter = candle_doft::Adapter::new(Default::default(), &Device::Cpu)?;
    /// # let layer = adapter.linear(32, 8, vb.pp("layer"))?;
    /// # let x = Tensor::zeros((1, 32), DType::F32, &Device::Cpu)?;
    /// let y = adapter.inference(|| layer.forward(&x))??;
    /// assert!(!y.track_op());
    /// # Ok::<(), candle_doft::Error>(())
    /// ```
    pub fn inference<T>(&self, f: impl FnOnce() -> T) -> Result<T> {
        self.check_complete()?;
        let mut scope = Scope::new(Adaptation::release);
        for layer in self.inner.adapted() {
            layer.hold()?;
            scope.layers.push(layer);
        }
        Ok(f())
    }
}

/// Layers that leave a state when it ends, also when the closure panics or a layer could not enter.
struct Scope {
    layers: Vec<Arc<Adaptation>>,
    leave: fn(&Adaptation),
}

impl Scope {
    fn new(leave: fn(&Adaptation)) -> Self {
        let layers = Vec::new();
        Self { layers, leave }
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        for layer in &self.layers {
            (self.leave)(layer);
        }
    }
}
