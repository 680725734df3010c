//! [`Adapters`]: several adapters on one model, by name.

use super::{Adapter, AdapterBuilder, Stored};
use crate::config::DoftConfig;
use crate::error::{Error, Result};
use crate::layer::{Active, Mode, Pin, Rows, Scope};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Several adapters on one model, by name, over one copy of its frozen weights.
///
/// The model is built with a first adapter, which may adapt nothing
/// ([`Targets::None`](crate::Targets::None)). Others are added, loaded, replaced and removed while the
/// program runs; block sizes, maps, magnitudes and targets may differ. One acts at a time
/// ([`Adapters::activate`]), or each row of a batch runs under its own ([`Adapters::rows`]). Each is an
/// [`Adapter`] like any other: it is trained, checked, saved and merged by the methods that it has. Methods of a layer,
/// such as [`Doft::merge`](crate::layer::Doft::merge) and `is_adapted`, are about the first one alone;
/// [`Adapter::merged`] merges any.
///
/// Clones share everything.
///
/// # Examples
///
/// ```
/// # use candle_core::{DType, Device, Tensor};
/// # use candle_nn::{Module, VarBuilder};
/// use candle_doft::{Adapter, Adapters, DoftConfig, Mode};
///
/// # let vb = VarBuilder::zeros(DType::F32, &Device::Cpu);
/// # let folder = tempfile::tempdir().unwrap();
/// # let file = folder.path().join("fr.safetensors");
/// let builder = Adapter::builder(DoftConfig::default(), &Device::Cpu)?;
/// let layer = builder.linear(64, 8, vb.pp("layer"))?; // the model
/// let adapters = Adapters::new("de", builder.finish()?);
/// # adapters.get("de")?.save(&file)?;
///
/// adapters.load("fr", &file)?;
/// adapters.add("fresh", DoftConfig::oft().with_block_size(16))?;
/// adapters.activate("fr", Mode::Eval)?; // for all rows, in all threads
///
/// // Each row of a batch under its own; none is the base.
/// let rows = adapters.rows(&[Some("fr"), Some("de"), None, Some("fr")])?;
/// let x = Tensor::ones((4, 64), DType::F32, &Device::Cpu)?;
/// let y = rows.run(|| layer.forward(&x))?;
/// # Ok::<(), candle_doft::Error>(())
/// ```
///
#[doc = include_str!("../serving.md")]
#[derive(Clone, Debug)]
pub struct Adapters {
    first: Adapter,
    named: Arc<Mutex<BTreeMap<String, Adapter>>>,
}

/// The rotations and magnitudes of an adapter at one moment: see [`Adapter::pin`].
#[derive(Clone, Debug)]
pub struct Pinned {
    pin: Arc<Pin>,
}

impl Adapter {
    /// Holds rotations and ratios as they are now, to run many batches under them without making them anew:
    /// see [`Adapters::rows_of`].
    ///
    /// # Errors
    ///
    /// Those of candle's operations, and [`Error::BaseChanged`].
    pub fn pin(&self) -> Result<Pinned> {
        let pin = self.pinned()?;
        Ok(Pinned { pin })
    }
}

impl Adapters {
    /// The adapter that a model was built with, under a name.
    pub fn new(name: impl Into<String>, adapter: Adapter) -> Self {
        let named = BTreeMap::from([(name.into(), adapter.clone())]);
        Self {
            first: adapter,
            named: Arc::new(Mutex::new(named)),
        }
    }

    fn named(&self) -> MutexGuard<'_, BTreeMap<String, Adapter>> {
        // A panic elsewhere leaves the map whole, so a poisoned lock is still good.
        self.named.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The names, sorted.
    pub fn names(&self) -> Vec<String> {
        self.named().keys().cloned().collect()
    }

    /// The adapter of a name.
    ///
    /// # Errors
    ///
    /// [`Error::NoAdapter`] with the names that there are.
    pub fn get(&self, name: &str) -> Result<Adapter> {
        let named = self.named();
        named.get(name).cloned().ok_or_else(|| Error::NoAdapter {
            name: name.to_string(),
            known: named.keys().cloned().collect(),
        })
    }

    /// Adds a fresh adapter, which changes nothing until it is trained. It does not act yet.
    ///
    /// # Errors
    ///
    /// [`Error::AdapterExists`] if the name is taken, and those of [`AdapterBuilder::finish`].
    pub fn add(&self, name: &str, config: DoftConfig) -> Result<Adapter> {
        self.check_free(name)?;
        let builder = Adapter::builder(config, self.first.device())?;
        let adapter = builder.beside(&self.first)?;
        self.check_free(name)?;
        self.named().insert(name.to_string(), adapter.clone());
        Ok(adapter)
    }

    fn check_free(&self, name: &str) -> Result<()> {
        match self.named().contains_key(name) {
            false => Ok(()),
            true => Err(Error::AdapterExists {
                name: name.to_string(),
            }),
        }
    }

    /// Puts an adapter on the model that was read from a file.
    pub(crate) fn put(&self, name: &str, stored: Stored) -> Result<Adapter> {
        let builder = AdapterBuilder::from_stored(stored, self.first.device())?;
        let adapter = builder.beside(&self.first)?;
        let mut named = self.named();
        if let Some(old) = named.get(name) {
            let control = &self.first.inner.control;
            match old.mode_in(&control.of_all()) {
                Mode::Off => {}
                mode => control.set(adapter.active(mode)?),
            }
        }
        named.insert(name.to_string(), adapter.clone());
        Ok(adapter)
    }

    /// Removes an adapter and returns it. Scopes that hold it go on with it. The parameters of the first one
    /// stay in the layers.
    ///
    /// # Errors
    ///
    /// [`Error::NoAdapter`], and [`Error::AdapterActs`] if it acts for all threads: activate another first, or
    /// none.
    pub fn remove(&self, name: &str) -> Result<Adapter> {
        let adapter = self.get(name)?;
        if adapter.mode_in(&self.first.inner.control.of_all()) != Mode::Off {
            return Err(Error::AdapterActs {
                name: name.to_string(),
            });
        }
        self.named().remove(name);
        Ok(adapter)
    }

    /// Makes an adapter act for all rows, in every thread that is in no scope: [`Adapter::set_mode`] by name.
    ///
    /// # Errors
    ///
    /// [`Error::NoAdapter`], and those of candle's operations.
    pub fn activate(&self, name: &str, mode: Mode) -> Result<()> {
        self.get(name)?.set_mode(mode)
    }

    /// Makes the frozen base act, in every thread that is in no scope.
    pub fn deactivate(&self) {
        self.first.inner.control.set(Active::Off);
    }

    /// The name of the adapter that acts in this thread; none where the base does, or rows have their own.
    pub fn active(&self) -> Option<String> {
        let active = self.first.inner.control.active();
        let named = self.named();
        let mut named = named.iter();
        let acts = named.find(|(_, adapter)| adapter.mode_in(&active) != Mode::Off);
        acts.map(|(name, _)| name.clone())
    }

    /// Runs `f` under what acts in this thread now; swaps by other threads wait for the next pass.
    ///
    /// # Errors
    ///
    /// Returns what `f` returns.
    pub fn pass<T>(&self, f: impl FnOnce() -> T) -> T {
        let control = &self.first.inner.control;
        Scope::new(control.clone(), control.active()).run(f)
    }

    /// A scope in which index `i` of axis 0 of every layer's input runs under the adapter `names[i]`, none
    /// being the base; for inference, without a graph. It holds the values that the adapters have now, so
    /// it serves many passes.
    ///
    /// In the scope a layer returns [`Error::Rows`] for an input of another number of rows on axis 0 (keep the
    /// batch there: `(B, T, hidden)`, not `(B * T, hidden)`), and for one that is a part of a graph.
    ///
    /// # Errors
    ///
    /// [`Error::NoAdapter`], and those of candle's operations.
    pub fn rows(&self, names: &[Option<&str>]) -> Result<Scope> {
        let mut pins: BTreeMap<&str, Pinned> = BTreeMap::new();
        for name in names.iter().copied().flatten() {
            if !pins.contains_key(name) {
                pins.insert(name, self.get(name)?.pin()?);
            }
        }
        let rows: Vec<Option<&Pinned>> = names
            .iter()
            .map(|name| name.and_then(|name| pins.get(name)))
            .collect();
        Ok(self.rows_of(&rows))
    }

    /// The same under adapters that are held already, for programs that serve many batches.
    pub fn rows_of(&self, rows: &[Option<&Pinned>]) -> Scope {
        let mut pins: Vec<Arc<Pin>> = Vec::new();
        let mut place = |pinned: &Pinned| {
            let known = pins.iter().position(|pin| Arc::ptr_eq(pin, &pinned.pin));
            known.unwrap_or_else(|| {
                pins.push(pinned.pin.clone());
                pins.len() - 1
            })
        };
        let of = rows.iter().map(|row| row.map(&mut place)).collect();
        let active = Active::Rows(Arc::new(Rows::new(pins, of)));
        Scope::new(self.first.inner.control.clone(), active)
    }
}
