//! Building and wrapping layers by module path.

use super::{Adapter, Entry, select};
use crate::config::LayerKind;
use crate::error::{Error, Result};
use crate::frozen;
use crate::layer::DoftLinear;
use candle_core::{Device, Tensor};
use candle_nn::VarBuilder;
use std::collections::btree_map;

impl Adapter {
    /// A linear layer with bias, as [`candle_nn::linear`] makes it; its path is the prefix of `vb`.
    ///
    /// # Errors
    ///
    /// Those of [`candle_nn::linear`] and [`Adapter::wrap_linear`].
    pub fn linear(&self, in_dim: usize, out_dim: usize, vb: VarBuilder) -> Result<DoftLinear> {
        self.linear_b(in_dim, out_dim, true, vb)
    }

    /// A linear layer without bias, as [`candle_nn::linear_no_bias`] makes it.
    ///
    /// # Errors
    ///
    /// Those of [`candle_nn::linear_no_bias`] and [`Adapter::wrap_linear`].
    pub fn linear_no_bias(
        &self,
        in_dim: usize,
        out_dim: usize,
        vb: VarBuilder,
    ) -> Result<DoftLinear> {
        self.linear_b(in_dim, out_dim, false, vb)
    }

    /// A linear layer with or without bias, as [`candle_nn::linear_b`] makes it.
    ///
    /// # Errors
    ///
    /// Those of [`candle_nn::linear_b`] and [`Adapter::wrap_linear`].
    pub fn linear_b(
        &self,
        in_dim: usize,
        out_dim: usize,
        bias: bool,
        vb: VarBuilder,
    ) -> Result<DoftLinear> {
        let path = vb.prefix();
        self.wrap_linear(&path, candle_nn::linear_b(in_dim, out_dim, bias, vb)?)
    }

    /// Wraps a linear layer that exists already. The weight is shared, not copied.
    ///
    /// # Errors
    ///
    /// [`Error::LayerExists`] when the path is taken, [`Error::Device`] when the layer lives
    /// elsewhere, and those of [`DoftLinear::new`].
    pub fn wrap_linear(&self, path: &str, base: candle_nn::Linear) -> Result<DoftLinear> {
        let base = frozen::Linear::from(base);
        let layer = if self.wants(path, LayerKind::Linear, base.weight())? {
            let vb = self.vb(path);
            DoftLinear::adapted(base, &self.inner.config, vb)?
        } else {
            DoftLinear::plain(path, base)
        };
        self.register(path, layer.base().weight().elem_count(), layer.adaptation())?;
        Ok(layer)
    }

    /// Whether the layer is to be adapted, after the checks that hold for every layer.
    fn wants(&self, path: &str, kind: LayerKind, weight: &Tensor) -> Result<bool> {
        if self.inner.layers().contains_key(path) {
            return Err(exists(path));
        }
        if !select::selects(&self.inner.config, path, kind)? {
            return Ok(false);
        }
        let (found, expected) = (weight.device(), &self.inner.device);
        if !found.same_device(expected) {
            return Err(Error::Device {
                layer: path.to_string(),
                found: name(found),
                expected: name(expected),
            });
        }
        Ok(true)
    }

    fn vb(&self, path: &str) -> VarBuilder<'_> {
        // Params choose the dtype after the weight.
        let dtype = candle_core::DType::F32;
        VarBuilder::from_varmap(&self.inner.varmap, dtype, &self.inner.device).pp(path)
    }

    fn register(
        &self,
        path: &str,
        parameters: usize,
        adaptation: Option<&std::sync::Arc<crate::layer::Adaptation>>,
    ) -> Result<()> {
        let entry = match adaptation {
            Some(adaptation) => Entry::Adapted(adaptation.clone()),
            None => Entry::Frozen { parameters },
        };
        match self.inner.layers().entry(path.to_string()) {
            btree_map::Entry::Occupied(_) => Err(exists(path)),
            btree_map::Entry::Vacant(place) => {
                place.insert(entry);
                Ok(())
            }
        }
    }
}

fn exists(path: &str) -> Error {
    Error::LayerExists {
        layer: path.to_string(),
    }
}

fn name(device: &Device) -> String {
    format!("{:?}", device.location()).to_lowercase()
}
