//! [`Doft`]: what every adapted layer has in common, written once.

use super::Adaptation;
use super::mode::{Control, Pass};
use crate::config::{BlockLayout, DoftConfig, LayerKind};
use crate::error::{Error, Result};
use crate::frozen::Frozen;
use crate::rotation;
use candle_core::Tensor;
use candle_nn::{Module, VarBuilder};
use std::sync::Arc;

/// A frozen layer that can be adapted: what it computes, and nothing else. Sealed; users meet the
/// layers by their names, such as [`DoftLinear`](crate::DoftLinear).
pub trait Adaptable: Frozen + Clone {
    /// The kind, by which files and configurations know the layer.
    const KIND: LayerKind;

    /// candle's layer of the same kind.
    type Candle;

    /// Runs the layer with a rotation and a ratio.
    fn adapted(&self, path: &str, x: &Tensor, pass: Pass) -> candle_core::Result<Tensor>;

    /// candle's layer over `weight`, with the bias and settings of this one.
    fn with_weight(&self, weight: Tensor) -> Self::Candle;
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
    path: Arc<str>,
    base: F,
    control: Arc<Control>,
    adaptation: Option<Arc<Adaptation>>,
}

impl<F: Adaptable> Doft<F> {
    /// Wraps `base`. Parameters are taken from `vb` under the names of adapter files
    /// (`oft_R.weight`, `dora_log_multiplier`, ..); the prefix of `vb` is the layer's path.
    ///
    /// # Errors
    ///
    /// If the weight of the base is not a float tensor of the rank that the layer takes, its bias does
    /// not have one value per output, the configuration does not fit its rows (see
    /// [`DoftConfig::layout`]), or `vb` holds a parameter of another shape.
    pub fn new(base: impl Into<F>, config: &DoftConfig, vb: VarBuilder) -> Result<Self> {
        let base = base.into();
        base.check_base(&vb.prefix())?;
        Self::with_control(base, config, None, vb, Control::complete())
    }

    /// The layer with an adapter around `base`, which was checked; parameters come from `vb`. `norms`
    /// are the row norms of the weight, where they are known already.
    pub(crate) fn with_control(
        base: F,
        config: &DoftConfig,
        norms: Option<Tensor>,
        vb: VarBuilder,
        control: Arc<Control>,
    ) -> Result<Self> {
        let of_base = base.as_base();
        let adaptation = Adaptation::new(F::KIND, &of_base, config, norms, vb, control.clone())?;
        Ok(Self {
            path: adaptation.path().into(),
            base,
            control,
            adaptation: Some(Arc::new(adaptation)),
        })
    }

    /// The plain frozen layer.
    pub(crate) fn plain(path: &str, base: F, control: Arc<Control>) -> Self {
        Self {
            path: path.into(),
            base,
            control,
            adaptation: None,
        }
    }

    pub(crate) fn adaptation(&self) -> Option<&Arc<Adaptation>> {
        self.adaptation.as_ref()
    }

    fn required(&self) -> Result<&Adaptation> {
        self.adaptation.as_deref().ok_or_else(|| Error::NotAdapted {
            layer: self.path.to_string(),
        })
    }

    /// Whether the layer has an adapter at all, whatever the mode.
    pub fn is_adapted(&self) -> bool {
        self.adaptation.is_some()
    }

    /// The frozen layer. It runs without the adapter.
    pub fn base(&self) -> &F {
        &self.base
    }

    /// The blocks of the rotation; none for a plain frozen layer.
    pub fn layout(&self) -> Option<&BlockLayout> {
        self.adaptation.as_deref().map(Adaptation::layout)
    }

    /// The rotation blocks `R`, `(D, b, b)`, or `(1, b, b)` when shared, from the parameters as they are
    /// now.
    ///
    /// # Errors
    ///
    /// [`Error::NotAdapted`] for a plain frozen layer.
    pub fn rotation(&self) -> Result<Tensor> {
        self.required()?.rotation()
    }

    /// The rotation angles of each block in radians, the largest first.
    ///
    /// # Errors
    ///
    /// [`Error::NotAdapted`] for a plain frozen layer.
    pub fn angles(&self) -> Result<Vec<Vec<f64>>> {
        rotation::angles(&self.rotation()?)
    }

    /// The magnitude `m` of each row of the weight, shape `(out)`, in units of norm, whatever its
    /// parametrisation.
    ///
    /// # Errors
    ///
    /// [`Error::NotAdapted`] for a plain frozen layer.
    pub fn magnitude(&self) -> Result<Tensor> {
        self.required()?.params().magnitude()
    }

    /// The weight with the adapter in it, in the shape and dtype of the base; computed in f32 or wider.
    /// The mode has no effect on it. A plain frozen layer returns its own weight.
    ///
    /// # Errors
    ///
    /// Those of candle's operations.
    pub fn effective_weight(&self) -> Result<Tensor> {
        let weight = self.base.as_base().tensor()?;
        match &self.adaptation {
            Some(adaptation) => adaptation.effective_weight(&weight),
            None => Ok(weight),
        }
    }

    /// candle's layer over [`Doft::effective_weight`], for inference without this crate.
    ///
    /// # Errors
    ///
    /// Those of candle's operations.
    pub fn merge(&self) -> Result<F::Candle> {
        Ok(self.base.with_weight(self.effective_weight()?))
    }
}

impl<F: Adaptable> Module for Doft<F> {
    /// Runs the layer in the [`Mode`](crate::Mode) of its adapter.
    ///
    /// # Errors
    ///
    /// * If the input does not have the shape, dtype or device that the layer takes.
    /// * [`Error::Unfinished`] before [`AdapterBuilder::finish`](crate::AdapterBuilder::finish).
    /// * [`Error::BaseChanged`] if the base is a variable that was set after the layer was built.
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.control.check_complete(&self.path)?;
        let pass = match &self.adaptation {
            Some(adaptation) => {
                adaptation.check_unchanged(&self.base.as_base())?;
                adaptation.pass()?
            }
            None => None,
        };
        match pass {
            Some(pass) => self.base.adapted(&self.path, x, pass),
            None => self.base.run(&self.path, x),
        }
    }
}
