//! The adapted layers: a frozen base, its [`Params`](crate::params::Params), and a `forward`.

mod adaptation;
mod common;
mod conv;
mod embedding;
mod linear;

pub(crate) use adaptation::{Adaptation, Base, check_weight};
pub(crate) use common::Layer;
pub use conv::{DoftConv1d, DoftConv2d};
pub use embedding::DoftEmbedding;
pub use linear::DoftLinear;
