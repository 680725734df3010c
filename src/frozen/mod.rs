//! What stands around an adapter in a frozen model: it passes gradients on and makes none of its own.

mod linear;

pub use linear::{Linear, linear, linear_no_bias};
