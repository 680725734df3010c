//! [`Mode`]: how the layers of an adapter run, for all threads or inside a scope of one.

use super::Adaptation;
use super::low_rank::LowRankPass;
use super::mixed::Rows;
use super::replay;
use crate::error::{Error, Result};
use crate::params::Params;
use candle_core::Tensor;
use std::cell::RefCell;
use std::collections::HashMap;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

/// How the layers of an [`Adapter`](crate::Adapter) run. It is the only switch: candle's
/// [`Module::forward`](candle_nn::Module::forward) and
/// [`ModuleT::forward_t`](candle_nn::ModuleT::forward_t) both obey it, and the `train` flag of
/// `forward_t` has no effect, because candle's blanket implementation drops it.
///
/// Extra tensors, such as a new head, are not affected: they stay in the graph and keep their trained values
/// in every mode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Rotations and magnitudes are part of the graph, and dropout acts. The mode of a new adapter,
    /// and of one that was loaded.
    #[default]
    Train,
    /// Rotations and ratios are constants: there is no dropout, and no graph of the layers. Entering the mode makes
    /// every rotation once, so put a whole loop inside, or keep a [`Scope`]. A step of an optimizer is
    /// not seen until the mode is entered again.
    Eval,
    /// Each layer returns what its frozen base returns.
    Off,
}

/// What acts in one layer, outside any graph.
#[derive(Clone, Debug)]
pub(crate) enum Factors {
    Rotation { r: Tensor, ratio: Option<Tensor> },
    LowRank(LowRankPass),
}

/// What acts in one pass of a layer.
#[derive(Debug)]
pub enum Acts<'a> {
    Rotation(Pass<'a>),
    LowRank(LowRankPass),
}

impl<'a> Acts<'a> {
    /// What is held.
    pub(super) fn held(factors: &'a Factors) -> Self {
        match factors {
            Factors::Rotation { r, ratio } => Self::Rotation(Pass::held(r, ratio.as_ref())),
            Factors::LowRank(pass) => Self::LowRank(pass.clone()),
        }
    }
}

/// The factors of the layers of one adapter at one moment, by the id of the layer.
#[derive(Debug)]
pub(crate) struct Pin {
    /// Which adapter.
    pub(crate) adapter: u64,
    pub(crate) layers: HashMap<u64, Factors>,
}

/// An adapter that is not the one its model was built with, by the id of the layer.
#[derive(Debug)]
pub(crate) struct Beside {
    /// Which adapter.
    pub(crate) adapter: u64,
    pub(crate) layers: HashMap<u64, Arc<Adaptation>>,
}

/// What the layers of a model run under.
#[derive(Clone, Debug, Default)]
pub(crate) enum Active {
    /// In training, the adapter that the model was built with, which its layers hold themselves.
    #[default]
    Train,
    /// In training, another one.
    Beside(Arc<Beside>),
    Eval(Arc<Pin>),
    Rows(Arc<Rows>),
    Off,
}

/// What all layers of one model share: whether it is complete, and what threads run under that are in no
/// scope.
#[derive(Debug, Default)]
pub(crate) struct Control {
    complete: AtomicBool,
    active: RwLock<Active>,
}

thread_local! {
    /// The scopes that this thread is in, the innermost last.
    static SCOPES: RefCell<Vec<Scope>> = const { RefCell::new(Vec::new()) };
}

impl Control {
    /// That of a layer that stands alone.
    pub(crate) fn complete() -> Arc<Self> {
        let control = Self::default();
        control.set_complete();
        Arc::new(control)
    }

    pub(crate) fn set_complete(&self) {
        self.complete.store(true, Ordering::Release);
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.complete.load(Ordering::Acquire)
    }

    /// Returns an error while the model of the adapter is still being built.
    pub(crate) fn check_complete(&self, layer: &str) -> Result<()> {
        if self.is_complete() {
            return Ok(());
        }
        Err(Error::Unfinished {
            layer: layer.to_string(),
        })
    }

    /// What acts in this thread.
    pub(crate) fn active(self: &Arc<Self>) -> Active {
        replay::active(self, || self.active_now())
    }

    fn active_now(self: &Arc<Self>) -> Active {
        let scoped = SCOPES.with_borrow(|scopes| {
            let mut inner = scopes.iter().rev();
            let scope = inner.find(|scope| Arc::ptr_eq(&scope.control, self));
            scope.map(|scope| scope.active.clone())
        });
        // A panic elsewhere leaves the mode whole, so a poisoned lock is still good.
        scoped.unwrap_or_else(|| self.of_all())
    }

    /// What acts in threads that are in no scope.
    pub(crate) fn of_all(&self) -> Active {
        let active = self.active.read().unwrap_or_else(PoisonError::into_inner);
        active.clone()
    }

    pub(crate) fn set(&self, active: Active) {
        *self.active.write().unwrap_or_else(PoisonError::into_inner) = active;
    }
}

/// What the layers of a model run under, ready to be entered by any thread: an adapter in a [`Mode`]
/// ([`Adapter::scope`](crate::Adapter::scope)), or one for each row of a batch
/// ([`Adapters::rows`](crate::Adapters::rows)). Outside training it keeps the values that the adapters had when
/// it was made, however long that is.
#[derive(Clone, Debug)]
pub struct Scope {
    control: Arc<Control>,
    active: Active,
}

impl Scope {
    pub(crate) fn new(control: Arc<Control>, active: Active) -> Self {
        Self { control, active }
    }

    /// Runs `f` in the scope, for this thread alone. Scopes can be nested: the innermost one of a model
    /// acts. Threads that `f` starts are not in the scope; give each a clone.
    ///
    /// # Errors
    ///
    /// Returns what `f` returns.
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
    /// let eval = adapter.scope(Mode::Eval)?;
    /// std::thread::scope(|threads| {
    ///     let run = || eval.run(|| layer.forward(&x));
    ///     let (a, b) = (threads.spawn(run), threads.spawn(run));
    ///     assert!(a.join().is_ok() && b.join().is_ok());
    /// });
    /// # Ok::<(), candle_doft::Error>(())
    /// ```
    pub fn run<T>(&self, f: impl FnOnce() -> T) -> T {
        let _entered = Entered::new(self.clone());
        f()
    }
}

/// Leaves a scope when it is dropped, also after a panic. It belongs to its thread.
struct Entered(PhantomData<*const ()>);

impl Entered {
    fn new(scope: Scope) -> Self {
        SCOPES.with_borrow_mut(|scopes| scopes.push(scope));
        Self(PhantomData)
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        // Dropped outside the borrow: the last snapshot of an adapter may go with it.
        let left = SCOPES.with_borrow_mut(Vec::pop);
        drop(left);
    }
}

/// Rotation and ratio in one pass.
#[derive(Debug)]
pub struct Pass<'a> {
    /// The blocks `R`, (1 or `D`, b, b).
    pub(crate) r: Tensor,
    ratio: Ratio<'a>,
}

/// `m / n0`, made from the parameters or held.
#[derive(Debug)]
enum Ratio<'a> {
    Made(&'a Params),
    Held(Option<&'a Tensor>),
}

impl<'a> Pass<'a> {
    /// A pass whose ratio is made of the parameters.
    pub(super) fn made(r: Tensor, params: &'a Params) -> Self {
        let ratio = Ratio::Made(params);
        Self { r, ratio }
    }

    /// A pass of a rotation and a ratio that are held.
    fn held(r: &Tensor, ratio: Option<&'a Tensor>) -> Self {
        Self {
            r: r.clone(),
            ratio: Ratio::Held(ratio),
        }
    }

    /// `m / n0` for each row of the weight; none for plain OFT.
    pub(crate) fn ratio(&self) -> Result<Option<Tensor>> {
        match &self.ratio {
            Ratio::Made(params) => params.ratio(),
            Ratio::Held(ratio) => Ok(ratio.cloned()),
        }
    }

    /// The same for the rows that `ids` `(n)` (u32) name.
    pub(crate) fn ratio_at(&self, ids: &Tensor) -> Result<Option<Tensor>> {
        match &self.ratio {
            Ratio::Made(params) => params.ratio_at(ids),
            Ratio::Held(None) => Ok(None),
            Ratio::Held(Some(ratio)) => Ok(Some(ratio.index_select(ids, 0)?)),
        }
    }
}
