//! Switches that hold for as long as a closure runs.

use super::Adapter;
use crate::error::Result;
use crate::layer::Adaptation;
use std::sync::Arc;

impl Adapter {
    /// Switches all layers: off, each answers what its base answers.
    pub fn set_enabled(&self, enabled: bool) {
        for layer in self.inner.adapted() {
            layer.set_enabled(enabled);
        }
    }

    /// Runs `f` with all layers switched off, for every thread, and switches them back after it.
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
        let restore = |was: &Vec<(Arc<Adaptation>, bool)>| {
            for (layer, enabled) in was {
                layer.set_enabled(*enabled);
            }
        };
        let layers = self.inner.adapted().into_iter();
        let was = layers.map(|layer| (layer.clone(), layer.enabled()));
        let _guard = Guard(was.collect(), restore);
        self.set_enabled(false);
        f()
    }

    /// Runs `f` with rotations and ratios held as constants, for every thread: no graph is built, no
    /// rotation is rebuilt for each call, and dropout is off. For validation and sampling; a step of
    /// the optimizer inside `f` is not seen until it ends.
    ///
    /// # Errors
    ///
    /// Those of [`Adapter::check_complete`], for a file whose layers the model never asked for would go
    /// unnoticed, and of building the rotations.
    pub fn inference<T>(&self, f: impl FnOnce() -> T) -> Result<T> {
        self.check_complete()?;
        let layers = self.inner.adapted();
        let _guard = Guard(layers.clone(), |layers: &Vec<Arc<Adaptation>>| {
            for layer in layers {
                layer.clear_constants();
            }
        });
        for layer in &layers {
            layer.set_constants()?;
        }
        Ok(f())
    }
}

/// Runs its function when dropped, also when the closure panics.
struct Guard<T, F: Fn(&T)>(T, F);

impl<T, F: Fn(&T)> Drop for Guard<T, F> {
    fn drop(&mut self) {
        (self.1)(&self.0);
    }
}
