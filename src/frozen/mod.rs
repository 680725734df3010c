//! What stands around an adapter in a frozen model: it passes gradients on and makes none of its own.
//!
//! Constructors, names and results are those of `candle_nn`. On CPU each is one op with a parallel
//! forward and backward, in f32 and f64; half types are computed in f32 and rounded once. On other
//! devices they are composed of candle's operations, with the same results.
//!
//! | here | candle's | what candle's does |
//! |---|---|---|
//! | [`Linear`] | `Linear`, `QMatMul` | makes a gradient of the weight; `QMatMul` passes none on |
//! | [`Conv1d`], [`Conv2d`] | the same | as above, and fails on some rectangles |
//! | [`RmsNorm`], [`LayerNorm`], [`softmax_last_dim`], [`rope`], [`rope_i`] | the same | no backward on contiguous input: the graph is cut |
//! | [`Embedding`], [`silu_mul`], [`attention`], [`causal_attention`], [`cross_entropy`], [`linear_cross_entropy`] | several operations | keeps every step between |
//!
//! # Which layers of candle 0.11 pass gradients
//!
//! Tried on CPU on contiguous input; `tests/candle_layers.rs` holds each line.
//!
//! | candle's layer or function | its gradient |
//! |---|---|
//! | `softmax`, `log_softmax`, `silu`, `Dropout`, `PReLU` | right |
//! | `GroupNorm`, `BatchNorm` (evaluated), `ConvTranspose2d`, `LSTM`, `GRU` | right |
//! | `upsample_nearest2d`, `pixel_shuffle`, `pad_with_zeros`, `pad_with_same`, `avg_pool2d` | right |
//! | `max_pool2d` | **wrong, silently**: divided by the size of the window |
//! | `LayerNorm`, `RmsNorm`, `softmax_last_dim`, `rope`, `rope_i` | **none, silently**: the graph is cut; use those of this module |
//! | `upsample_bilinear2d`, pooling whose stride is not its kernel, `sdpa` | an error |

mod base;
mod conv;
mod embedding;
mod functions;
mod gguf;
mod linear;
mod loss;
mod norm;

pub(crate) use base::{Base, Frozen};
pub use conv::{Conv1d, Conv2d};
pub use embedding::{Embedding, embedding, quantized_embedding};
pub use functions::{
    attention, causal_attention, rope, rope_i, rotary_causal_attention, silu_mul, softmax_last_dim,
};
pub use gguf::QuantizedVarBuilder;
pub use linear::{Linear, linear, linear_no_bias, quantized_linear, quantized_linear_no_bias};
pub use loss::{cross_entropy, linear_cross_entropy};
pub use norm::{LayerNorm, RmsNorm, layer_norm, rms_norm};

use crate::error::Error;
use candle_core::{DType, Tensor};

/// What every function here takes.
const FLOATS: &[DType] = &[DType::F16, DType::BF16, DType::F32, DType::F64];

fn check_float(function: &'static str, x: &Tensor, dtypes: &[DType]) -> crate::Result<()> {
    match dtypes.contains(&x.dtype()) {
        true => Ok(()),
        false => Err(Error::argument(
            function,
            "the dtype of the input",
            format!("{:?}", x.dtype()),
            format!("one of {dtypes:?}"),
        )),
    }
}
