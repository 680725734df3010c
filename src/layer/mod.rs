//! The adapted layers: a frozen base, its [`Params`](crate::params::Params), and a `forward`.

mod adaptation;
mod linear;

pub(crate) use adaptation::Adaptation;
pub use linear::DoftLinear;
