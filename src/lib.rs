#![doc = include_str!("../README.md")]

pub mod config;
pub mod error;
pub mod rng;

pub use config::{DoftConfig, Magnitude, Map, Pattern, Targets};
pub use error::{Error, Result};
