//! What stands around an adapter in a frozen model: it passes gradients on and makes none of its own.

mod conv;
mod embedding;
mod gguf;
mod linear;

pub(crate) use conv::check;
pub use conv::{Conv1d, Conv2d};
pub use embedding::{Embedding, embedding, quantized_embedding};
pub use gguf::QuantizedVarBuilder;
pub use linear::{Linear, linear, linear_no_bias, quantized_linear, quantized_linear_no_bias};
