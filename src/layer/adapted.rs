//! [`Doft`]: what every adapted layer has in common, written once.

use super::Adaptation;
use super::adaptation::Form;
use super::low_rank::LowRankPass;
use super::mixed::{self, Group};
use super::mode::{Active, Acts, Control, Pass};
use crate::config::{BlockLayout, DoftConfig, LayerKind};
use crate::error::{Error, Result};
use crate::frozen::Frozen;
use crate::params::Params;
use crate::rotation;
use candle_core::Tensor;
use candle_nn::{Module, VarBuilder};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A frozen layer that can be adapted: what it computes, and nothing else. Sealed; users meet the
/// layers by their names, such as [`DoftLinear`](crate::DoftLinear).
pub trait Adaptable: Frozen + Clone + Send + Sync + 'static {
    /// The kind, by which files and configurations know the layer.
    const KIND: LayerKind;

    /// candle's layer of the same kind.
    type Candle;

    /// Runs the layer with a rotation and a ratio.
    fn adapted(&self, path: &str, x: &Tensor, pass: Pass) -> candle_core::Result<Tensor>;

    /// Runs the layer with low-rank matrices.
    fn low_rank(&self, path: &str, x: &Tensor, pass: &LowRankPass) -> candle_core::Result<Tensor>;

    /// Runs the layer with what acts.
    fn acting(&self, path: &str, x: &Tensor, acts: Acts) -> candle_core::Result<Tensor> {
        match acts {
            Acts::Rotation(pass) => self.adapted(path, x, pass),
            Acts::LowRank(pass) => self.low_rank(path, x, &pass),
        }
    }

    /// Runs the layer with factors for each group of rows. Once per group, unless a kind can do better.
    fn mixed(&self, path: &str, x: &Tensor, groups: &[Group]) -> candle_core::Result<Tensor> {
        mixed::each(x, groups, |x, factors| match factors {
            Some(factors) => self.acting(path, x, Acts::held(factors)),
            None => self.run(path, x),
        })
    }

    /// candle's layer over `weight`, with the bias and settings of this one.
    fn with_weight(&self, weight: Tensor) -> Self::Candle;
}

static NEXT_ID: AtomicU64 = AtomicU64::new(0);

/// An id that no layer has.
pub(crate) fn next_id() -> u64 {
    NEXT_ID.fetch_add(1, Ordering::Relaxed)
}

/// A frozen layer `F`, its rows rotated and scaled. Its names are [`DoftLinear`](crate::DoftLinear),
/// [`DoftConv2d`](crate::DoftConv2d), [`DoftConv1d`](crate::DoftConv1d) and
/// [`DoftEmbedding`](crate::DoftEmbedding).
///
/// Clones share parameters. A layer outside the targets of an [`Adapter`](crate::Adapter) is the plain
/// frozen layer: [`Doft::is_adapted`] is false. How it runs is decided by the
/// [`Mode`](crate::Mode) of its adapter. A layer that stands alone, made by [`Doft::new`], is always in
/// [`Mode::Train`](crate::Mode::Train).
#[derive(Clone, Debug)]
pub struct Doft<F> {
    /// Tells the layers of a model apart.
    id: u64,
    path: Arc<str>,
    base: F,
    control: Arc<Control>,
    adaptation: Option<Arc<Adaptation>>,
}

impl<F: Adaptable> Doft<F> {
    /// Wraps `base`, to stand alone: it is always in [`Mode::Train`](crate::Mode::Train), so with dropout it always
    /// drops blocks. Parameters are taken from `vb` under the names of adapter files
    /// (`oft_R.weight`, `dora_log_multiplier`, ..); the prefix of `vb` is the layer's path.
    ///
    /// # Errors
    ///
    /// If the weight of the base is not a float tensor of the rank that the layer takes, its bias does
    /// not have one value per output, the configuration does not fit its rows (see
    /// [`DoftConfig::layout`]), or `vb` holds a parameter of another shape.
    pub fn new(base: impl Into<F>, config: &DoftConfig, vb: VarBuilder) -> Result<Self> {
        let base = base.into();
        let path = vb.prefix();
        base.check_base(&path)?;
        let id = next_id();
        let adaptation = Adaptation::new(id, F::KIND, &base.as_base(), config, None, vb)?;
        Ok(Self::from_parts(
            id,
            &path,
            base,
            Some(Arc::new(adaptation)),
            Control::complete(),
        ))
    }

    /// The layer of a model, with the adapter that it is built with.
    pub(crate) fn from_parts(
        id: u64,
        path: &str,
        base: F,
        adaptation: Option<Arc<Adaptation>>,
        control: Arc<Control>,
    ) -> Self {
        Self {
            id,
            path: path.into(),
            base,
            control,
            adaptation,
        }
    }

    /// The layout and the parameters of the rotation that it has.
    fn rotated(&self) -> Result<(&BlockLayout, &Params)> {
        match self.adaptation.as_deref().map(Adaptation::form) {
            Some(Form::Rotation { layout, params, .. }) => Ok((layout, params)),
            _ => Err(Error::NotAdapted {
                layer: self.path.to_string(),
            }),
        }
    }

    /// Whether the layer has an adapter at all, whatever the mode.
    pub fn is_adapted(&self) -> bool {
        self.adaptation.is_some()
    }

    /// The frozen layer. It runs without the adapter.
    pub fn base(&self) -> &F {
        &self.base
    }

    /// The blocks of the rotation; none for a plain frozen layer, and for one of low-rank matrices.
    pub fn layout(&self) -> Option<&BlockLayout> {
        self.rotated().ok().map(|(layout, _)| layout)
    }

    /// The rotation blocks `R`, `(D, b, b)`, or `(1, b, b)` when shared, from the parameters as they are
    /// now.
    ///
    /// # Errors
    ///
    /// [`Error::NotAdapted`] for a plain frozen layer, and for one of low-rank matrices.
    pub fn rotation(&self) -> Result<Tensor> {
        let (layout, params) = self.rotated()?;
        rotation::rotation(params.rotation(), layout)
    }

    /// The rotation angles of each block in radians, the largest first.
    ///
    /// # Errors
    ///
    /// [`Error::NotAdapted`] for a plain frozen layer, and for one of low-rank matrices.
    pub fn angles(&self) -> Result<Vec<Vec<f64>>> {
        rotation::angles(&self.rotation()?)
    }

    /// The magnitude `m` of each row of the weight, shape `(out)`, in units of norm, whatever its
    /// parametrisation.
    ///
    /// # Errors
    ///
    /// [`Error::NotAdapted`] for a plain frozen layer, and for one of low-rank matrices.
    pub fn magnitude(&self) -> Result<Tensor> {
        self.rotated()?.1.magnitude()
    }

    /// The weight with the adapter in it, in the shape and dtype of the base; computed in f32 or wider.
    /// The adapter is the one that the model was built with, whatever acts: see
    /// [`Adapters`](crate::Adapters) for others. A plain frozen layer returns its own weight.
    ///
    /// # Errors
    ///
    /// Those of candle's operations.
    pub fn effective_weight(&self) -> Result<Tensor> {
        let base = self.base.as_base();
        let weight = base.tensor()?;
        match &self.adaptation {
            Some(adaptation) => {
                adaptation.check_unchanged(&base)?;
                adaptation.effective_weight(&base, &weight)
            }
            None => Ok(weight),
        }
    }

    /// candle's layer over [`Doft::effective_weight`], for inference without this crate. As there, the adapter is the
    /// one that the model was built with; another of the model is merged by
    /// [`Adapter::merged`](crate::Adapter::merged).
    ///
    /// # Errors
    ///
    /// Those of candle's operations.
    pub fn merge(&self) -> Result<F::Candle> {
        Ok(self.base.with_weight(self.effective_weight()?))
    }
}

impl<F: Adaptable> Module for Doft<F> {
    /// Runs the layer as the adapter that acts in this thread says.
    ///
    /// # Errors
    ///
    /// * If the input does not have the shape, dtype or device that the layer takes.
    /// * [`Error::Unfinished`] before [`AdapterBuilder::finish`](crate::AdapterBuilder::finish).
    /// * [`Error::BaseChanged`] if the base is a variable that was set between building and the first pass.
    /// * [`Error::Rows`] under [`Adapters::rows`](crate::Adapters::rows), for an input with another number of
    ///   rows or a graph.
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.control.check_complete(&self.path)?;
        let check = |adaptation: &Adaptation| adaptation.check_unchanged(&self.base.as_base());
        if let Some(own) = &self.adaptation {
            check(own)?;
        }
        match self.control.active() {
            Active::Train => match &self.adaptation {
                Some(own) => self
                    .base
                    .acting(&self.path, x, own.training(&self.base.as_base())?),
                None => self.base.run(&self.path, x),
            },
            Active::Beside(beside) => match beside.layers.get(&self.id) {
                Some(other) => {
                    check(other)?;
                    self.base
                        .acting(&self.path, x, other.training(&self.base.as_base())?)
                }
                None => self.base.run(&self.path, x),
            },
            Active::Eval(pin) => match pin.layers.get(&self.id) {
                Some(factors) => self.base.acting(&self.path, x, Acts::held(factors)),
                None => self.base.run(&self.path, x),
            },
            Active::Rows(rows) => {
                let groups = rows.groups(&self.path, self.id, x)?;
                mixed::run(&self.base, &self.path, x, &groups)
            }
            Active::Off => self.base.run(&self.path, x),
        }
    }
}
