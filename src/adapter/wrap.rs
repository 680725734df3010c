//! What an [`AdapterBuilder`](super::AdapterBuilder) takes: finished layers, and sources of weights.

use crate::error::Result;
use crate::frozen::{self, QuantizedVarBuilder};
use crate::layer::Adaptable;
use candle_core::quantized::QMatMul;
use candle_nn::VarBuilder;

/// A finished layer that [`AdapterBuilder::wrap`](super::AdapterBuilder::wrap) takes: candle's `Linear`,
/// `Conv1d`, `Conv2d`, `Embedding` and `QMatMul`, and those of [`frozen`](crate::frozen). Sealed.
pub trait Wrap: sealed::Wrap {}

/// Where linear layers and embeddings come from: a candle `VarBuilder` or a
/// [`QuantizedVarBuilder`](crate::frozen::QuantizedVarBuilder). Sealed.
pub trait WeightSource: sealed::WeightSource {}

mod sealed {
    use super::{Adaptable, Result, frozen};

    pub trait Wrap {
        type Frozen: Adaptable;
        fn freeze(self) -> Result<Self::Frozen>;
    }

    pub trait WeightSource {
        fn path(&self) -> String;
        fn linear(self, in_dim: usize, out_dim: usize, bias: bool) -> Result<frozen::Linear>;
        fn embedding(self, rows: usize, width: usize) -> Result<frozen::Embedding>;
    }
}

macro_rules! wrap {
    ($($layer:ident),*) => {$(
        impl Wrap for candle_nn::$layer {}
        impl sealed::Wrap for candle_nn::$layer {
            type Frozen = frozen::$layer;
            fn freeze(self) -> Result<frozen::$layer> {
                Ok(self.into())
            }
        }

        impl Wrap for frozen::$layer {}
        impl sealed::Wrap for frozen::$layer {
            type Frozen = Self;
            fn freeze(self) -> Result<Self> {
                Ok(self)
            }
        }
    )*};
}

wrap!(Linear, Conv1d, Conv2d, Embedding);

impl Wrap for QMatMul {}
impl sealed::Wrap for QMatMul {
    type Frozen = frozen::Linear;
    fn freeze(self) -> Result<frozen::Linear> {
        frozen::Linear::from_qmatmul(self, None)
    }
}

impl WeightSource for VarBuilder<'_> {}
impl sealed::WeightSource for VarBuilder<'_> {
    fn path(&self) -> String {
        self.prefix()
    }

    fn linear(self, in_dim: usize, out_dim: usize, bias: bool) -> Result<frozen::Linear> {
        Ok(candle_nn::linear_b(in_dim, out_dim, bias, self)?.into())
    }

    fn embedding(self, rows: usize, width: usize) -> Result<frozen::Embedding> {
        Ok(candle_nn::embedding(rows, width, self)?.into())
    }
}

impl WeightSource for QuantizedVarBuilder {}
impl sealed::WeightSource for QuantizedVarBuilder {
    fn path(&self) -> String {
        self.prefix()
    }

    fn linear(self, in_dim: usize, out_dim: usize, bias: bool) -> Result<frozen::Linear> {
        Ok(if bias {
            frozen::quantized_linear(in_dim, out_dim, self)?
        } else {
            frozen::quantized_linear_no_bias(in_dim, out_dim, self)?
        })
    }

    fn embedding(self, rows: usize, width: usize) -> Result<frozen::Embedding> {
        Ok(frozen::quantized_embedding(rows, width, self)?)
    }
}
