//! The mode of an adapter: for all threads, or for one inside a scope.

use super::Adapter;
use crate::error::{Error, Result};
use crate::layer::{Active, Beside, Mode, Pin, Scope};
use std::collections::HashMap;
use std::sync::Arc;

impl Adapter {
    /// The mode in which its layers run in this thread: [`Mode::Off`] where another adapter of the model
    /// acts, or rows of a batch have adapters of their own.
    pub fn mode(&self) -> Mode {
        self.mode_in(&self.inner.control.active())
    }

    pub(super) fn mode_in(&self, active: &Active) -> Mode {
        match active {
            Active::Train if self.inner.first => Mode::Train,
            Active::Beside(beside) if beside.adapter == self.inner.id => Mode::Train,
            Active::Eval(pin) if pin.adapter == self.inner.id => Mode::Eval,
            _ => Mode::Off,
        }
    }

    /// Sets the mode for every thread that is in no scope. Of several adapters on one model the one whose
    /// mode is set last acts.
    ///
    /// # Errors
    ///
    /// For [`Mode::Eval`] those of candle's operations that make the rotations.
    pub fn set_mode(&self, mode: Mode) -> Result<()> {
        self.inner.control.set(self.active(mode)?);
        Ok(())
    }

    /// Runs `f` in a mode, for this thread alone: sampling in one thread leaves training in another as
    /// it is. Scopes can be nested; a panic leaves them. Closures that other threads run, rayon's too, are not in
    /// it: give each a [`Scope`], or use [`Adapter::set_mode`].
    ///
    /// # Errors
    ///
    /// Returns the error of `f`; for [`Mode::Eval`] also those of candle's operations that make the
    /// rotations.
    ///
    /// # Examples
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::{Module, VarBuilder};
    /// # let vb = VarBuilder::zeros(DType::F32, &Device::Cpu);
    /// # let builder = candle_doft::Adapter::builder(Default::default(), &Device::Cpu)?;
    /// # let layer = builder.linear(32, 8, vb.pp("layer"))?;
    /// # let adapter = builder.finish()?;
    /// # let x = Tensor::zeros((1, 32), DType::F32, &Device::Cpu)?;
    /// use candle_doft::Mode;
    ///
    /// let y = adapter.with_mode(Mode::Eval, || layer.forward(&x))?;
    /// assert!(!y.track_op());
    /// let of_the_base = adapter.with_mode(Mode::Off, || layer.forward(&x))?;
    /// # Ok::<(), candle_doft::Error>(())
    /// ```
    pub fn with_mode<T, E: From<Error>>(
        &self,
        mode: Mode,
        f: impl FnOnce() -> Result<T, E>,
    ) -> Result<T, E> {
        self.scope(mode)?.run(f)
    }

    /// A mode that several threads can enter: see [`Scope::run`]. [`Mode::Eval`] keeps the values that
    /// the adapter has now. Make it in the thread that steps the optimizer: made during a step, it may mix two
    /// steps.
    ///
    /// # Errors
    ///
    /// For [`Mode::Eval`] those of candle's operations that make the rotations.
    pub fn scope(&self, mode: Mode) -> Result<Scope> {
        let active = self.active(mode)?;
        Ok(Scope::new(self.inner.control.clone(), active))
    }

    pub(super) fn active(&self, mode: Mode) -> Result<Active> {
        Ok(match mode {
            Mode::Off => Active::Off,
            Mode::Eval => Active::Eval(self.pinned()?),
            Mode::Train if self.inner.first => Active::Train,
            Mode::Train => {
                let layers = self.adapted().map(|layer| (layer.id(), layer.clone()));
                Active::Beside(Arc::new(Beside {
                    adapter: self.inner.id,
                    layers: layers.collect(),
                }))
            }
        })
    }

    /// Rotations and ratios as they are now.
    pub(super) fn pinned(&self) -> Result<Arc<Pin>> {
        let mut layers = HashMap::new();
        for entry in self.inner.layers.values() {
            if let Some(layer) = &entry.adaptation {
                layer.check_unchanged(&entry.site.base.as_base())?;
                layers.insert(layer.id(), layer.factors()?);
            }
        }
        let adapter = self.inner.id;
        Ok(Arc::new(Pin { adapter, layers }))
    }
}
