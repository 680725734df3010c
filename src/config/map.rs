//! [`Map`]: the ways from a skew matrix to a rotation.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};

/// How a skew-symmetric block becomes a rotation. [`rotation`](crate::rotation) has the formulas.
///
/// # Examples
///
/// ```
/// use candle_doft::Map;
///
/// assert_eq!("neumann:5".parse::<Map>()?, Map::SERIES); // as command lines name it
/// assert!(Map::Cayley.is_orthogonal() && !Map::SERIES.is_orthogonal());
/// # Ok::<(), candle_doft::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Map {
    /// `(I + Q)(I - Q)^-1`, exactly orthogonal.
    #[default]
    Cayley,
    /// The truncated series of the Cayley transform that OneTrainer and PEFT train. Not orthogonal;
    /// here so that files trained with it mean what they meant.
    CayleyNeumann {
        /// Number of terms, 0 to 64. OneTrainer and PEFT use 5.
        terms: usize,
        /// Coefficient of the highest power, 1 or 2. Files written before PEFT 0.18 mean 2.
        last_coefficient: u8,
    },
    /// `exp(Q)`, exactly orthogonal.
    Exponential,
}

impl Map {
    /// The series as OneTrainer and PEFT (0.18 and newer) train it: five terms, last coefficient 1.
    pub const SERIES: Self = Self::CayleyNeumann {
        terms: 5,
        last_coefficient: 1,
    };

    /// Whether every `Q` gives an orthogonal `R`.
    pub fn is_orthogonal(&self) -> bool {
        match self {
            Self::Cayley | Self::Exponential => true,
            Self::CayleyNeumann { .. } => false,
        }
    }

    /// Refuses a series that there is none of.
    pub(crate) fn check(&self) -> Result<()> {
        match *self {
            Self::Cayley | Self::Exponential => Ok(()),
            Self::CayleyNeumann { terms, .. } if terms > 64 => {
                Err(Error::config("map.terms", terms, "at most 64"))
            }
            Self::CayleyNeumann {
                last_coefficient: 1 | 2,
                ..
            } => Ok(()),
            Self::CayleyNeumann {
                last_coefficient, ..
            } => Err(Error::config(
                "map.last_coefficient",
                last_coefficient,
                "1 or 2",
            )),
        }
    }

    /// The divisor `c` of scaled OFT: `2 sqrt(b - 1)` for the Cayley maps, `sqrt(b - 1)` for the
    /// exponential, 1 where there is nothing to rotate (`block_size` up to 1).
    ///
    /// A row of `R - I` is about `2Q` for the Cayley maps and `Q` for the exponential. Adam moves
    /// each of its `b - 1` entries by about `lr`, so after division by `c` a unit row turns by `lr`.
    pub fn divisor(&self, block_size: usize) -> f64 {
        if block_size <= 1 {
            return 1.;
        }
        let root = ((block_size - 1) as f64).sqrt();
        match self {
            Self::Exponential => root,
            Self::Cayley | Self::CayleyNeumann { .. } => 2. * root,
        }
    }
}

/// The name that it is read from.
impl std::fmt::Display for Map {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cayley => f.write_str("cayley"),
            Self::CayleyNeumann {
                terms,
                last_coefficient: 1,
            } => write!(f, "neumann:{terms}"),
            Self::CayleyNeumann {
                terms,
                last_coefficient,
            } => write!(f, "neumann:{terms}:{last_coefficient}"),
            Self::Exponential => f.write_str("exponential"),
        }
    }
}

/// `cayley`, `exponential`, `neumann:T` or `neumann:T:2` for a series of `T` terms.
impl std::str::FromStr for Map {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut parts = text.split(':');
        let series = |terms: &str, last: &str| {
            Some(Self::CayleyNeumann {
                terms: terms.parse().ok()?,
                last_coefficient: last.parse().ok()?,
            })
        };
        let found = match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some("cayley"), None, ..) => Some(Self::Cayley),
            (Some("exponential"), None, ..) => Some(Self::Exponential),
            (Some("neumann"), Some(terms), last, None) => series(terms, last.unwrap_or("1")),
            _ => None,
        };
        let expected = "cayley, exponential, neumann:T or neumann:T:2";
        found
            .filter(|map| map.check().is_ok())
            .ok_or_else(|| Error::config("map", format!("`{text}`"), expected))
    }
}
