// A picture's path in the repository leads nowhere on docs.rs. Of two definitions of its name the first
// counts, and that is its path among the sources of the package there.
#![doc = concat!(
    "[quickstart]: /crate/candle-doft/", env!("CARGO_PKG_VERSION"),
    "/source/examples/data/quickstart.svg\n",
    "[curves]: /crate/candle-doft/", env!("CARGO_PKG_VERSION"),
    "/source/examples/data/compare-curves.svg\n"
)]
#![doc = include_str!("../README.md")]
#![warn(clippy::unwrap_used, clippy::expect_used)]

/// As above, for other pages.
macro_rules! picture {
    ($name:literal, $file:literal) => {
        concat!(
            "[",
            $name,
            "]: /crate/candle-doft/",
            env!("CARGO_PKG_VERSION"),
            "/source/examples/data/",
            $file,
            "\n"
        )
    };
}

pub mod adapter;
#[doc = include_str!("architecture.md")]
pub mod architecture {}
pub mod config;
pub mod error;
pub mod file;
pub mod frozen;
pub mod layer;
#[doc = picture!("curves", "compare-curves.svg")]
#[doc = picture!("rates", "compare-rates.svg")]
#[doc = picture!("loss", "finetune-loss.svg")]
#[doc = picture!("growth", "growth.svg")]
#[doc = include_str!("measurements.md")]
pub mod measurements {}
pub mod merge;
mod ops;
pub mod params;
pub mod rng;
pub mod rotation;
pub mod train;

#[doc(inline)]
pub use adapter::{Adapter, AdapterBuilder, Adapters};
#[doc(inline)]
pub use config::{DoftConfig, Magnitude, Map, Pattern, Targets};
#[doc(inline)]
pub use error::{Error, Result};
#[doc(inline)]
pub use layer::{DoftConv1d, DoftConv2d, DoftEmbedding, DoftLinear, Mode};
