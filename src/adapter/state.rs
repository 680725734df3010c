//! [`State`] and [`Average`]: the parameters of an adapter at one moment, in memory.

use super::Adapter;
use crate::error::{Error, Result};
use candle_core::{DType, Tensor, Var};
use std::collections::BTreeMap;

/// The values of an adapter's trainable tensors at one moment: the best so far, for example. Made by
/// [`Adapter::state`], put back by [`Adapter::restore`].
#[derive(Clone, Debug)]
pub struct State {
    values: BTreeMap<String, Tensor>,
}

impl Adapter {
    /// A copy of all trainable tensors as they are now.
    ///
    /// # Errors
    ///
    /// Those of candle's copies.
    ///
    /// # Examples
    ///
    /// ```
    /// # use candle_core::{DType, Device};
    /// # use candle_doft::{Adapter, DoftConfig};
    /// # let vb = candle_nn::VarBuilder::zeros(DType::F32, &Device::Cpu);
    /// # let builder = Adapter::builder(DoftConfig::default(), &Device::Cpu)?;
    /// # builder.linear(64, 8, vb.pp("layer"))?;
    /// # let adapter = builder.finish()?;
    /// let best = adapter.state()?;
    /// // .. training goes on, and validation gets worse
    /// adapter.restore(&best)?;
    /// # Ok::<(), candle_doft::Error>(())
    /// ```
    pub fn state(&self) -> Result<State> {
        let mut values = BTreeMap::new();
        for (name, var) in self.named_vars() {
            values.insert(name, var.as_tensor().copy()?.detach());
        }
        Ok(State { values })
    }

    /// Sets all trainable tensors to the values of a state. An optimizer keeps its moments.
    ///
    /// # Errors
    ///
    /// [`Error::State`] for a state of other names or shapes; nothing has changed then.
    pub fn restore(&self, state: &State) -> Result<()> {
        let vars = self.named_vars();
        let pairs = state.matched(&vars)?;
        for ((_, var), value) in vars.iter().zip(pairs) {
            var.set(&value.to_dtype(var.dtype())?.to_device(var.device())?)?;
        }
        Ok(())
    }
}

impl State {
    /// The values by name, in the order of their names.
    pub fn values(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.values
            .iter()
            .map(|(name, value)| (name.as_str(), value))
    }

    /// The value of each variable.
    fn matched(&self, vars: &[(String, Var)]) -> Result<Vec<&Tensor>> {
        let refuse = |name: &str, found: String, expected: String| {
            Err(Error::State {
                name: name.to_string(),
                found,
                expected,
            })
        };
        let mut matched = Vec::with_capacity(vars.len());
        for (name, var) in vars {
            match self.values.get(name) {
                Some(value) if value.shape() == var.shape() => matched.push(value),
                Some(value) => {
                    let (found, expected) = (value.dims(), var.dims());
                    return refuse(name, format!("{found:?}"), format!("{expected:?}"));
                }
                None => return refuse(name, "nothing".into(), "a value".into()),
            }
        }
        let known = |name: &String| vars.iter().any(|(known, _)| known == name);
        match self.values.keys().find(|name| !known(name)) {
            Some(name) => refuse(
                name,
                "a value".into(),
                "nothing: it is of another adapter".into(),
            ),
            None => Ok(matched),
        }
    }
}

/// An exponential moving average of an adapter's trainable tensors: `a <- d a + (1 - d) x` at each update, summed in
/// f32 or wider. It begins with the values of the adapter, so it needs no correction.
///
/// # Examples
///
/// ```
/// # use candle_core::{DType, Device};
/// # use candle_doft::{Adapter, DoftConfig, adapter::Average};
/// # let vb = candle_nn::VarBuilder::zeros(DType::F32, &Device::Cpu);
/// # let builder = Adapter::builder(DoftConfig::default(), &Device::Cpu)?;
/// # builder.linear(64, 8, vb.pp("layer"))?;
/// # let adapter = builder.finish()?;
/// let mut average = Average::new(&adapter, 0.999)?;
/// // after each step of the optimizer
/// average.update(&adapter)?;
/// // to validate or save the average
/// let trained = adapter.state()?;
/// adapter.restore(average.state())?;
/// adapter.restore(&trained)?;
/// # Ok::<(), candle_doft::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Average {
    decay: f64,
    state: State,
}

impl Average {
    /// Begins at the values that the adapter has now; `decay` is from 0 to below 1.
    ///
    /// # Errors
    ///
    /// [`Error::Argument`] for another decay.
    pub fn new(adapter: &Adapter, decay: f64) -> Result<Self> {
        if !(0. ..1.).contains(&decay) {
            let expected = "from 0 to below 1";
            return Err(Error::argument(
                "Average",
                "the decay",
                decay.to_string(),
                expected,
            ));
        }
        let mut state = adapter.state()?;
        for value in state.values.values_mut() {
            *value = wide(value)?;
        }
        Ok(Self { decay, state })
    }

    /// Takes in the values that the adapter has now.
    ///
    /// # Errors
    ///
    /// [`Error::State`] if it is another adapter.
    pub fn update(&mut self, adapter: &Adapter) -> Result<()> {
        let vars = adapter.named_vars();
        self.state.matched(&vars)?;
        for (name, var) in vars {
            let now = wide(&var.as_tensor().detach())?;
            if let Some(mean) = self.state.values.get_mut(&name) {
                let now = now.to_device(mean.device())?;
                *mean = ((&*mean * self.decay)? + (now * (1. - self.decay))?)?;
            }
        }
        Ok(())
    }

    /// The average so far.
    pub fn state(&self) -> &State {
        &self.state
    }
}

/// In f32 or wider.
fn wide(value: &Tensor) -> candle_core::Result<Tensor> {
    match value.dtype() {
        DType::F16 | DType::BF16 => value.to_dtype(DType::F32),
        _ => Ok(value.clone()),
    }
}
