//! What every adapted layer answers about its adapter, written once.

/// The methods that do not depend on what the layer computes. Expects the fields `path`, `base` and
/// `adaptation`.
macro_rules! layer_methods {
    ($layer:ident, $base:ty) => {
        impl $layer {
            /// The plain frozen layer.
            pub(crate) fn plain(path: &str, base: $base) -> Self {
                Self {
                    path: path.into(),
                    base,
                    adaptation: None,
                }
            }

            pub(crate) fn adaptation(&self) -> Option<&std::sync::Arc<crate::layer::Adaptation>> {
                self.adaptation.as_ref()
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

            /// The magnitude `m` of each row of the weight in units of norm, whatever its
            /// parametrisation.
            ///
            /// # Errors
            ///
            /// [`Error::NotAdapted`](crate::Error::NotAdapted) for a plain frozen layer.
            pub fn magnitude(&self) -> crate::Result<candle_core::Tensor> {
                self.required()?.params().magnitude()
            }

            /// A copy for inference: `R` and `m / n0` are constants, taken now. It builds no graph,
            /// costs no rotation to rebuild for each call, and does not see later training.
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

            /// Runs the layer, with dropout when `train` is true.
            ///
            /// # Errors
            ///
            /// When the input has not the shape, dtype or device that the layer takes.
            pub fn forward_t(
                &self,
                x: &candle_core::Tensor,
                train: bool,
            ) -> candle_core::Result<candle_core::Tensor> {
                let factors = match &self.adaptation {
                    Some(adaptation) => adaptation.factors(train)?,
                    None => None,
                };
                self.run(x, factors)
            }
        }

        impl candle_nn::Module for $layer {
            fn forward(&self, x: &candle_core::Tensor) -> candle_core::Result<candle_core::Tensor> {
                let factors = match &self.adaptation {
                    Some(adaptation) => adaptation.factors_of_forward()?,
                    None => None,
                };
                self.run(x, factors)
            }
        }
    };
}
pub(super) use layer_methods;
