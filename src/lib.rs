#![doc = include_str!("../README.md")]
#![warn(clippy::unwrap_used, clippy::expect_used)]

pub mod adapter;
#[doc = include_str!("architecture.md")]
pub mod architecture {}
pub mod config;
pub mod error;
pub mod file;
pub mod frozen;
pub mod layer;
pub mod merge;
mod ops;
pub mod params;
pub mod rng;
pub mod rotation;
pub mod train;

pub use adapter::Adapter;
pub use config::{DoftConfig, Magnitude, Map, Pattern, Targets};
pub use error::{Error, Result};
pub use layer::{DoftConv1d, DoftConv2d, DoftEmbedding, DoftLinear};
