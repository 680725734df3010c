//! The methods side by side, each at a size: a rank or a block size.

use crate::support::methods::Method;
use candle_doft::{DoftConfig, Map};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// Caps the spectral norm of `Q` in `doft_capped`: the series of five terms is then off from a rotation
/// by at most the fourth power of it, 6 %.
const CAP: f64 = 0.5;

#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
#[clap(rename_all = "snake_case")]
pub enum Name {
    /// `W + BA`
    Lora,
    /// LoRA with a trained norm of each output row, the paper's
    Dora,
    /// Rotations alone
    Oft,
    /// Rotations and magnitudes
    Doft,
    /// DOFT without step normalisation
    DoftUnscaled,
    /// DOFT over the series of five terms
    DoftSeries,
    /// The same with the norm of Q capped at 0.5
    DoftCapped,
    /// Every weight and bias
    Full,
}

/// A method at a size, such as `doft:32`; full fine-tuning has the size 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Entry {
    pub method: Name,
    pub size: usize,
}

pub const fn entry(method: Name, size: usize) -> Entry {
    Entry { method, size }
}

/// The methods that are shown side by side: each once, at about as many parameters.
pub const MAIN: [Entry; 6] = [
    entry(Name::Lora, 8),
    entry(Name::Dora, 8),
    entry(Name::Oft, 32),
    entry(Name::Doft, 32),
    entry(Name::DoftUnscaled, 32),
    entry(Name::Full, 0),
];

impl Name {
    /// The sizes that are compared: about 2,000 and about 10,000 parameters of the digits' networks,
    /// and a LoRA of four times as many.
    fn sizes(self) -> &'static [usize] {
        match self {
            Self::Lora => &[2, 8, 32],
            Self::Dora => &[2, 8],
            Self::Oft | Self::Doft => &[8, 32],
            Self::DoftUnscaled | Self::DoftSeries | Self::DoftCapped => &[32],
            Self::Full => &[0],
        }
    }

    pub fn is_doft(self) -> bool {
        matches!(
            self,
            Self::Doft | Self::DoftUnscaled | Self::DoftSeries | Self::DoftCapped
        )
    }

    pub fn label(self) -> &'static str {
        match self {
            Self::Lora => "LoRA",
            Self::Dora => "DoRA",
            Self::Oft => "OFT",
            Self::Doft => "DOFT",
            Self::DoftUnscaled => "DOFT, not normalised",
            Self::DoftSeries => "DOFT, series",
            Self::DoftCapped => "DOFT, capped series",
            Self::Full => "full",
        }
    }
}

impl Entry {
    pub fn label(&self) -> String {
        match self.method {
            Name::Full => "full fine-tuning".into(),
            Name::Lora | Name::Dora => format!("{} r{}", self.method.label(), self.size),
            _ => format!("{} b{}", self.method.label(), self.size),
        }
    }

    /// Whether it fits layers that are nowhere narrower than this.
    pub fn fits(&self, narrowest: usize) -> bool {
        !matches!(self.method, Name::Lora | Name::Dora) || self.size <= narrowest
    }

    /// LoRA and DoRA with `alpha = rank`, so that `BA` counts as it is.
    pub fn method(&self, seed: u64) -> Method {
        let doft = |config: DoftConfig| {
            let config = config.with_block_size(self.size).with_seed(seed);
            Method::Doft(Box::new(config))
        };
        let (rank, alpha) = (self.size, self.size as f64);
        let plain = DoftConfig::default();
        match self.method {
            Name::Lora => Method::Lora { rank, alpha },
            Name::Dora => Method::Dora { rank, alpha },
            Name::Oft => doft(DoftConfig::oft()),
            Name::Doft => doft(plain),
            Name::DoftUnscaled => doft(plain.with_scaled(false)),
            Name::DoftSeries => doft(plain.with_map(Map::SERIES)),
            Name::DoftCapped => doft(plain.with_map(Map::SERIES).with_max_norm(CAP)),
            Name::Full => Method::Full,
        }
    }
}

/// What a user may give: `doft`, at its usual sizes, or `doft:16`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Wanted {
    name: Name,
    size: Option<usize>,
}

impl Wanted {
    pub fn all() -> Vec<Self> {
        let names = Name::value_variants().iter();
        names
            .map(|name| Self {
                name: *name,
                size: None,
            })
            .collect()
    }

    pub fn entries(&self) -> Vec<Entry> {
        let sizes = match &self.size {
            Some(size) => std::slice::from_ref(size),
            None => self.name.sizes(),
        };
        sizes.iter().map(|size| entry(self.name, *size)).collect()
    }
}

impl std::str::FromStr for Wanted {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, size) = match text.split_once(':') {
            Some((name, size)) => (name, Some(size)),
            None => (text, None),
        };
        let known = Name::value_variants()
            .iter()
            .filter_map(|name| Some(name.to_possible_value()?.get_name().to_string()));
        let known = known.collect::<Vec<_>>().join(", ");
        let name = Name::from_str(name, false)
            .map_err(|_| format!("expected one of {known}, or such a name with `:SIZE`"))?;
        let size = match size {
            None => None,
            Some(size) => match size.parse() {
                Ok(size) if size >= 1 && name != Name::Full => Some(size),
                _ => return Err("expected a rank or block size from 1 after the colon".into()),
            },
        };
        Ok(Self { name, size })
    }
}
