//! The mode of an adapter: for all threads, or for one inside a scope.

use super::Adapter;
use crate::error::{Error, Result};
use crate::layer::{Active, Mode, Scope};
use std::collections::HashMap;
use std::sync::Arc;

impl Adapter {
    /// The mode in which its layers run in this thread.
    pub fn mode(&self) -> Mode {
        self.inner.control.active().mode()
    }

    /// Sets the mode for every thread that is in no scope.
    ///
    /// # Errors
    ///
    /// For [`Mode::Eval`] those of candle's operations that make the rotations.
    pub fn set_mode(&self, mode: Mode) -> Result<()> {
        self.inner.control.set(self.active(mode)?);
        Ok(())
    }

    /// Runs `f` in a mode, for this thread alone: sampling in one thread leaves training in another as
    /// it is. Scopes can be nested; a panic leaves them.
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
    /// the adapter has now.
    ///
    /// # Errors
    ///
    /// For [`Mode::Eval`] those of candle's operations that make the rotations.
    pub fn scope(&self, mode: Mode) -> Result<Scope> {
        let active = self.active(mode)?;
        Ok(Scope::new(self.inner.control.clone(), active))
    }

    fn active(&self, mode: Mode) -> Result<Active> {
        Ok(match mode {
            Mode::Train => Active::Train,
            Mode::Off => Active::Off,
            Mode::Eval => {
                let mut snapshot = HashMap::new();
                for layer in self.adapted() {
                    snapshot.insert(layer.id(), layer.factors()?);
                }
                Active::Eval(Arc::new(snapshot))
            }
        })
    }
}
