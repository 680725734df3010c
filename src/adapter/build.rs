//! Building and wrapping layers by module path.

use super::{Adapter, Entry, select};
use crate::config::LayerKind;
use crate::error::{Error, Result};
use crate::frozen::{self, Frozen, QuantizedVarBuilder};
use crate::layer::{DoftConv1d, DoftConv2d, DoftEmbedding, DoftLinear, Layer};
use candle_core::Device;
use candle_core::quantized::QMatMul;
use candle_nn::{Conv1dConfig, Conv2dConfig, VarBuilder};
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
    /// [`Error::Device`] when the layer lives elsewhere, and those of [`DoftLinear::new`]. Of a plain
    /// layer only the path is checked.
    pub fn wrap_linear(&self, path: &str, base: impl Into<frozen::Linear>) -> Result<DoftLinear> {
        self.wrap(path, base.into())
    }

    /// Wraps the weight of a `QMatMul`, quantized or dense. A fresh layer over a quantized one does not
    /// answer bit for bit what it did: see [`frozen::Linear::from_qmatmul`].
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
        // Its parameters could not be told from those of the next one, nor read from a file.
        if path.is_empty() {
            return Err(Error::argument(
                "Adapter",
                "the path of a layer",
                "empty",
                "a name: give the `VarBuilder` a prefix, as in `vb.pp(\"fc1\")`",
            ));
        }
        if self.inner.layers().contains_key(path) {
            return Err(exists(path));
        }
        let frozen = base.as_base().elements();
        let layer = match self.selects(path, L::KIND)? {
            false => L::plain(path, base),
            true => {
                self.check(path, &base)?;
                let (config, norms) = match &self.inner.source {
                    None => (self.inner.config.clone(), None),
                    Some(source) => source.setting(path, L::KIND, &base.as_base())?,
                };
                L::adapted(base, &config, norms, self.vb(path))?
            }
        };
        let adaptation = layer.adaptation().cloned();
        self.register(path, Entry { adaptation, frozen })?;
        Ok(layer)
    }

    /// Whether the layer is to be adapted: by the configuration, or by what a loaded file holds.
    fn selects(&self, path: &str, kind: LayerKind) -> Result<bool> {
        match &self.inner.source {
            None => select::selects(&self.inner.config, path, kind),
            Some(source) => source.holds(path),
        }
    }

    /// Refuses what cannot be adapted.
    fn check(&self, path: &str, base: &impl Frozen) -> Result<()> {
        let (found, expected) = (&base.as_base().weight.device(), &self.inner.device);
        if !found.same_device(expected) {
            return Err(Error::Device {
                layer: path.to_string(),
                found: name(found),
                expected: name(expected),
            });
        }
        base.check_base(path)
    }

    fn vb(&self, path: &str) -> VarBuilder<'_> {
        // Params choose the dtype after the weight.
        let dtype = candle_core::DType::F32;
        VarBuilder::from_varmap(&self.inner.varmap, dtype, &self.inner.device).pp(path)
    }

    fn register(&self, path: &str, entry: Entry) -> Result<()> {
        if let (Some(source), Some(adaptation)) = (&self.inner.source, &entry.adaptation) {
            source.fill(adaptation)?;
        }
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
