//! Building and wrapping layers by module path.

use super::{Adapter, Entry, select};
use crate::config::{DoftConfig, LayerKind};
use crate::error::{Error, Result};
use crate::frozen::{self, QuantizedVarBuilder};
use crate::layer::{
    Adaptation, Base, DoftConv1d, DoftConv2d, DoftEmbedding, DoftLinear, Layer, check_weight,
};
use candle_core::quantized::QMatMul;
use candle_core::{Device, Tensor};
use candle_nn::{Conv1dConfig, Conv2dConfig, VarBuilder};
use std::collections::btree_map;
use std::sync::Arc;

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

    /// A linear layer with bias over quantized rows.
    ///
    /// # Errors
    ///
    /// Those of [`frozen::quantized_linear`] and [`Adapter::wrap_linear`].
    pub fn quantized_linear(
        &self,
        in_dim: usize,
        out_dim: usize,
        vb: QuantizedVarBuilder,
    ) -> Result<DoftLinear> {
        let path = vb.prefix();
        self.wrap_linear(&path, frozen::quantized_linear(in_dim, out_dim, vb)?)
    }

    /// A linear layer without bias over quantized rows.
    ///
    /// # Errors
    ///
    /// Those of [`frozen::quantized_linear_no_bias`] and [`Adapter::wrap_linear`].
    pub fn quantized_linear_no_bias(
        &self,
        in_dim: usize,
        out_dim: usize,
        vb: QuantizedVarBuilder,
    ) -> Result<DoftLinear> {
        let path = vb.prefix();
        let base = frozen::quantized_linear_no_bias(in_dim, out_dim, vb)?;
        self.wrap_linear(&path, base)
    }

    /// A two-dimensional convolution with bias and a square kernel, as [`candle_nn::conv2d()`] makes
    /// it.
    ///
    /// # Errors
    ///
    /// Those of [`candle_nn::conv2d()`] and [`Adapter::wrap_conv2d`].
    pub fn conv2d(
        &self,
        in_channels: usize,
        out_channels: usize,
        kernel_size: usize,
        config: Conv2dConfig,
        vb: VarBuilder,
    ) -> Result<DoftConv2d> {
        let path = vb.prefix();
        let base = candle_nn::conv2d(in_channels, out_channels, kernel_size, config, vb)?;
        self.wrap_conv2d(&path, base)
    }

    /// A two-dimensional convolution without bias, as [`candle_nn::conv2d_no_bias`] makes it.
    ///
    /// # Errors
    ///
    /// Those of [`candle_nn::conv2d_no_bias`] and [`Adapter::wrap_conv2d`].
    pub fn conv2d_no_bias(
        &self,
        in_channels: usize,
        out_channels: usize,
        kernel_size: usize,
        config: Conv2dConfig,
        vb: VarBuilder,
    ) -> Result<DoftConv2d> {
        let path = vb.prefix();
        let base = candle_nn::conv2d_no_bias(in_channels, out_channels, kernel_size, config, vb)?;
        self.wrap_conv2d(&path, base)
    }

    /// A one-dimensional convolution with bias, as [`candle_nn::conv1d()`] makes it.
    ///
    /// # Errors
    ///
    /// Those of [`candle_nn::conv1d()`] and [`Adapter::wrap_conv1d`].
    pub fn conv1d(
        &self,
        in_channels: usize,
        out_channels: usize,
        kernel_size: usize,
        config: Conv1dConfig,
        vb: VarBuilder,
    ) -> Result<DoftConv1d> {
        let path = vb.prefix();
        let base = candle_nn::conv1d(in_channels, out_channels, kernel_size, config, vb)?;
        self.wrap_conv1d(&path, base)
    }

    /// A one-dimensional convolution without bias, as [`candle_nn::conv1d_no_bias`] makes it.
    ///
    /// # Errors
    ///
    /// Those of [`candle_nn::conv1d_no_bias`] and [`Adapter::wrap_conv1d`].
    pub fn conv1d_no_bias(
        &self,
        in_channels: usize,
        out_channels: usize,
        kernel_size: usize,
        config: Conv1dConfig,
        vb: VarBuilder,
    ) -> Result<DoftConv1d> {
        let path = vb.prefix();
        let base = candle_nn::conv1d_no_bias(in_channels, out_channels, kernel_size, config, vb)?;
        self.wrap_conv1d(&path, base)
    }

    /// An embedding, as [`candle_nn::embedding()`] makes it.
    ///
    /// # Errors
    ///
    /// Those of [`candle_nn::embedding()`] and [`Adapter::wrap_embedding`].
    pub fn embedding(
        &self,
        in_size: usize,
        out_size: usize,
        vb: VarBuilder,
    ) -> Result<DoftEmbedding> {
        let path = vb.prefix();
        self.wrap_embedding(&path, candle_nn::embedding(in_size, out_size, vb)?)
    }

    /// An embedding over quantized rows.
    ///
    /// # Errors
    ///
    /// Those of [`frozen::quantized_embedding`] and [`Adapter::wrap_embedding`].
    pub fn quantized_embedding(
        &self,
        in_size: usize,
        out_size: usize,
        vb: QuantizedVarBuilder,
    ) -> Result<DoftEmbedding> {
        let path = vb.prefix();
        self.wrap_embedding(&path, frozen::quantized_embedding(in_size, out_size, vb)?)
    }

    /// Wraps a linear layer that exists already: candle's, or a frozen one, dense or quantized. The
    /// weight is shared, not copied.
    ///
    /// # Errors
    ///
    /// [`Error::LayerExists`] when the path is taken, [`Error::Argument`] when it is empty,
    /// [`Error::Device`] when the layer lives elsewhere, and those of [`DoftLinear::new`].
    pub fn wrap_linear(&self, path: &str, base: impl Into<frozen::Linear>) -> Result<DoftLinear> {
        self.wrap(path, base.into())
    }

    /// Wraps the weight of a `QMatMul`, quantized or dense.
    ///
    /// # Errors
    ///
    /// Those of [`frozen::Linear::from_qmatmul`] and [`Adapter::wrap_linear`].
    pub fn wrap_qmatmul(&self, path: &str, base: QMatMul) -> Result<DoftLinear> {
        self.wrap_linear(path, frozen::Linear::from_qmatmul(base, None)?)
    }

    /// Wraps a two-dimensional convolution that exists already. The kernel is shared, not copied.
    ///
    /// # Errors
    ///
    /// As [`Adapter::wrap_linear`], and those of [`DoftConv2d::new`].
    pub fn wrap_conv2d(&self, path: &str, base: impl Into<frozen::Conv2d>) -> Result<DoftConv2d> {
        self.wrap(path, base.into())
    }

    /// Wraps a one-dimensional convolution that exists already. The kernel is shared, not copied.
    ///
    /// # Errors
    ///
    /// As [`Adapter::wrap_linear`], and those of [`DoftConv1d::new`].
    pub fn wrap_conv1d(&self, path: &str, base: impl Into<frozen::Conv1d>) -> Result<DoftConv1d> {
        self.wrap(path, base.into())
    }

    /// Wraps an embedding that exists already: candle's, or a frozen one, dense or quantized.
    ///
    /// # Errors
    ///
    /// As [`Adapter::wrap_linear`], and those of [`DoftEmbedding::new`].
    pub fn wrap_embedding(
        &self,
        path: &str,
        base: impl Into<frozen::Embedding>,
    ) -> Result<DoftEmbedding> {
        self.wrap(path, base.into())
    }

    /// A layer of any kind, adapted or plain, entered under its path.
    fn wrap<L: Layer>(&self, path: &str, base: L::Frozen) -> Result<L> {
        let weight = L::weight(&base);
        let parameters = weight.shape.iter().product();
        let layer = match self.setting(path, L::KIND, &weight)? {
            Some(of) => L::adapted(base, &of.config, of.norms, self.vb(path))?,
            None => L::plain(path, base),
        };
        self.register(path, parameters, layer.adaptation())?;
        Ok(layer)
    }

    /// What a layer is made from: the adapter's configuration, or what a loaded file says of it.
    /// Nothing for a layer that stays frozen.
    fn setting(&self, path: &str, kind: LayerKind, base: &Base) -> Result<Option<Setting>> {
        if !self.wants(path, kind, base)? {
            return Ok(None);
        }
        let Some(source) = &self.inner.source else {
            return Ok(Some(Setting {
                config: self.inner.config.clone(),
                norms: None,
            }));
        };
        check_weight(path, kind, base.shape, base.weight.dtype())?;
        let norms = base.norms()?;
        let config = source.check(path, kind, base.shape, &norms)?;
        let stored = source.layer(path)?.and_then(|layer| layer.norms.as_ref());
        let norms = match stored {
            Some(stored) => stored.to_dtype(norms.dtype())?.to_device(norms.device())?,
            None => norms,
        };
        Ok(Some(Setting {
            config,
            norms: Some(norms),
        }))
    }

    /// Whether the layer is to be adapted, after the checks that hold for every layer.
    fn wants(&self, path: &str, kind: LayerKind, base: &Base) -> Result<bool> {
        // Its parameters could not be told from those of the next one, nor read from a file.
        if path.is_empty() {
            return Err(Error::Argument {
                function: "Adapter",
                what: "the path of a layer",
                found: "empty".into(),
                expected: "a name: give the `VarBuilder` a prefix, as in `vb.pp(\"fc1\")`".into(),
            });
        }
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
        let (found, expected) = (&base.weight.device(), &self.inner.device);
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
        adaptation: Option<&Arc<Adaptation>>,
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
