//! What every adapted layer has in common, written once.

use super::Adaptation;
use crate::config::{DoftConfig, LayerKind};
use crate::error::Result;
use crate::frozen::Frozen;
use candle_core::Tensor;
use candle_nn::VarBuilder;
use std::sync::Arc;

/// How an [`Adapter`](crate::Adapter) makes a layer of any kind.
pub(crate) trait Layer: Sized {
    const KIND: LayerKind;

    /// The layer without an adapter.
    type Frozen: Frozen;

    /// The layer with an adapter around `base`, which was checked; parameters come from `vb`. `norms`
    /// are the row norms of the weight, where they are known already.
    fn adapted(
        base: Self::Frozen,
        config: &DoftConfig,
        norms: Option<Tensor>,
        vb: VarBuilder,
    ) -> Result<Self>;

    /// The plain frozen layer.
    fn plain(path: &str, base: Self::Frozen) -> Self;

    fn adaptation(&self) -> Option<&Arc<Adaptation>>;
}

/// The methods that do not depend on what the layer computes. Expects the fields `path`, `base` and
/// `adaptation`, and a method `run` that answers for an input and what acts on it.
macro_rules! layer_methods {
    ($layer:ident, $base:ty, $kind:ident) => {
        impl crate::layer::Layer for $layer {
            const KIND: crate::config::LayerKind = crate::config::LayerKind::$kind;

            type Frozen = $base;

            fn adapted(
                base: $base,
                config: &crate::config::DoftConfig,
                norms: Option<candle_core::Tensor>,
                vb: candle_nn::VarBuilder,
            ) -> crate::Result<Self> {
                let frozen = crate::frozen::Frozen::as_base(&base);
                let adaptation =
                    crate::layer::Adaptation::new(Self::KIND, &frozen, config, norms, vb)?;
                Ok(Self {
                    path: adaptation.path().into(),
                    base,
                    adaptation: Some(std::sync::Arc::new(adaptation)),
                })
            }

            fn plain(path: &str, base: $base) -> Self {
                Self {
                    path: path.into(),
                    base,
                    adaptation: None,
                }
            }

            fn adaptation(&self) -> Option<&std::sync::Arc<crate::layer::Adaptation>> {
                self.adaptation.as_ref()
            }
        }

        impl $layer {
            /// Wraps `base`. Parameters are taken from `vb` under the names of adapter files
            /// (`oft_R.weight`, `dora_log_multiplier`, ..); the prefix of `vb` is the layer's path.
            ///
            /// # Errors
            ///
            /// When the base cannot run (its weight is not a float tensor of the rank that the layer
            /// takes, its bias does not fit), the configuration does not fit its rows (see
            /// [`DoftConfig::layout`](crate::DoftConfig::layout)), or `vb` holds a parameter of
            /// another shape.
            pub fn new(
                base: impl Into<$base>,
                config: &crate::config::DoftConfig,
                vb: candle_nn::VarBuilder,
            ) -> crate::Result<Self> {
                let base = base.into();
                crate::frozen::Frozen::check_base(&base, &vb.prefix())?;
                crate::layer::Layer::adapted(base, config, None, vb)
            }

            /// The weight that acts, in the shape and dtype of the base; computed in f32 or wider. The
            /// base's own when disabled or not adapted.
            ///
            /// # Errors
            ///
            /// Those of candle's operations.
            pub fn effective_weight(&self) -> crate::Result<candle_core::Tensor> {
                let weight = crate::frozen::Frozen::as_base(&self.base).tensor()?;
                match &self.adaptation {
                    Some(adaptation) => adaptation.effective_weight(&weight),
                    None => Ok(weight),
                }
            }

            fn required(&self) -> crate::Result<&crate::layer::Adaptation> {
                self.adaptation
                    .as_deref()
                    .ok_or_else(|| crate::Error::NotAdapted {
                        layer: self.path.to_string(),
                    })
            }

            /// Whether the layer has an adapter at all, enabled or not.
            pub fn is_adapted(&self) -> bool {
                self.adaptation.is_some()
            }

            /// The frozen layer.
            pub fn base(&self) -> &$base {
                &self.base
            }

            /// How the width that is rotated is cut into blocks; none for a plain frozen layer.
            pub fn layout(&self) -> Option<&crate::config::BlockLayout> {
                self.adaptation
                    .as_deref()
                    .map(crate::layer::Adaptation::layout)
            }

            /// Switches the adapter on again.
            pub fn enable(&self) {
                self.switch(true);
            }

            /// Makes the layer answer what its base answers, for all its clones.
            pub fn disable(&self) {
                self.switch(false);
            }

            fn switch(&self, enabled: bool) {
                if let Some(adaptation) = &self.adaptation {
                    adaptation.set_enabled(enabled);
                }
            }

            /// The rotation blocks `R`, `(D, b, b)`, or `(1, b, b)` when shared.
            ///
            /// # Errors
            ///
            /// [`Error::NotAdapted`](crate::Error::NotAdapted) for a plain frozen layer.
            pub fn rotation(&self) -> crate::Result<candle_core::Tensor> {
                self.required()?.rotation()
            }

            /// The rotation angles of each block in radians, the largest first.
            ///
            /// # Errors
            ///
            /// [`Error::NotAdapted`](crate::Error::NotAdapted) for a plain frozen layer.
            pub fn angles(&self) -> crate::Result<Vec<Vec<f64>>> {
                crate::rotation::angles(&self.rotation()?)
            }

            /// The magnitude `m` of each row of the weight, shape `(out)`, in units of norm, whatever
            /// its parametrisation.
            ///
            /// # Errors
            ///
            /// [`Error::NotAdapted`](crate::Error::NotAdapted) for a plain frozen layer.
            pub fn magnitude(&self) -> crate::Result<candle_core::Tensor> {
                self.required()?.magnitude()
            }

            /// A copy for inference: `R` and `m / n0` are constants, taken now. It builds no graph,
            /// drops no block, costs no rotation to rebuild for each call, and does not see later
            /// training.
            ///
            /// # Errors
            ///
            /// Those of candle's operations.
            pub fn inference(&self) -> crate::Result<Self> {
                let adaptation = match &self.adaptation {
                    Some(adaptation) => Some(std::sync::Arc::new(adaptation.inference()?)),
                    None => None,
                };
                Ok(Self {
                    path: self.path.clone(),
                    base: self.base.clone(),
                    adaptation,
                })
            }

            /// Runs the layer, with dropout when `train` is true and the adapter is not held constant.
            ///
            /// # Errors
            ///
            /// When the input has not the shape, dtype or device that the layer takes.
            pub fn forward_t(
                &self,
                x: &candle_core::Tensor,
                train: bool,
            ) -> candle_core::Result<candle_core::Tensor> {
                let adaptation = self.adaptation.as_deref();
                match adaptation.map(|a| a.pass(train)).transpose()?.flatten() {
                    Some(pass) => self.run(x, pass),
                    None => crate::frozen::Frozen::run(&self.base, &self.path, x),
                }
            }
        }

        impl candle_nn::Module for $layer {
            fn forward(&self, x: &candle_core::Tensor) -> candle_core::Result<candle_core::Tensor> {
                // It cannot say whether it trains.
                if let Some(adaptation) = &self.adaptation {
                    adaptation.check_mode()?;
                }
                self.forward_t(x, false)
            }
        }
    };
}
pub(super) use layer_methods;
