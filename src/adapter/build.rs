//! Building and wrapping layers by module path.

use super::{Adapter, Entry, select};
use crate::config::{DoftConfig, LayerKind};
use crate::error::{Error, Result};
use crate::frozen;
use crate::layer::{DoftLinear, check_weight};
use crate::params::row_norms;
use candle_core::{Device, Tensor};
use candle_nn::VarBuilder;
use std::collections::btree_map;

impl Adapter {
    /// A linear layer with bias, as [`candle_nn::linear()`] makes it; its path is the prefix of `vb`.
    ///
    /// # Errors
    ///
    /// Those of [`candle_nn::linear()`] and [`Adapter::wrap_linear`].
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
            let setting = self.setting(path, LayerKind::Linear, base.weight())?;
            DoftLinear::adapted(base, &setting.config, setting.norms, self.vb(path))?
        } else {
            DoftLinear::plain(path, base)
        };
        self.register(path, layer.base().weight().elem_count(), layer.adaptation())?;
        Ok(layer)
    }

    /// What a layer is made from: the adapter's configuration, or what a loaded file says of it.
    fn setting(&self, path: &str, kind: LayerKind, weight: &Tensor) -> Result<Setting> {
        let Some(source) = &self.inner.source else {
            return Ok(Setting {
                config: self.inner.config.clone(),
                norms: None,
            });
        };
        check_weight(path, kind, weight.dims(), weight.dtype())?;
        let norms = row_norms(weight)?;
        let config = source.check(path, kind, weight.dims(), &norms)?;
        let stored = source.layer(path)?.and_then(|layer| layer.norms.as_ref());
        let norms = match stored {
            Some(stored) => stored.to_dtype(norms.dtype())?.to_device(norms.device())?,
            None => norms,
        };
        Ok(Setting {
            config,
            norms: Some(norms),
        })
    }

    /// Whether the layer is to be adapted, after the checks that hold for every layer.
    fn wants(&self, path: &str, kind: LayerKind, weight: &Tensor) -> Result<bool> {
        if self.inner.layers().contains_key(path) {
            return Err(exists(path));
        }
        let selected = match &self.inner.source {
            None => select::selects(&self.inner.config, path, kind)?,
            Some(source) => source.layer(path)?.is_some(),
        };
        if !selected {
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
        if let (Some(source), Some(adaptation)) = (&self.inner.source, adaptation) {
            source.fill(adaptation)?;
        }
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

/// Configuration of one layer, and the norms `n0` where they are known already.
struct Setting {
    config: DoftConfig,
    norms: Option<Tensor>,
}

fn exists(path: &str) -> Error {
    Error::LayerExists {
        layer: path.to_string(),
    }
}

fn name(device: &Device) -> String {
    format!("{:?}", device.location()).to_lowercase()
}
