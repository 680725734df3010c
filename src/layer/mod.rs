//! The adapted layers: a frozen base, its [`Params`](crate::params::Params), and a `forward`.

mod adaptation;
mod linear;

pub(crate) use adaptation::{Adaptation, check_weight};
pub use linear::DoftLinear;
