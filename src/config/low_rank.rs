//! [`LowRank`]: low-rank matrices in place of rotations.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};

/// LoRA, or DoRA, in place of a rotation: `W + s B A` with `A` `(r, in)` and `B` `(out, r)`, both trained. `B` starts
/// at 0, so a fresh layer changes nothing; `A` is uniform in `+-1/sqrt(in)`, as in PEFT.
///
/// With [`LowRank::dora`] each row of `V = W + s B A` is scaled to a trained magnitude `m`, which starts at the norms of
/// `W`: `m V / ||V||`. The norm is taken anew in each pass, as a constant of the backward pass.
///
/// # Examples
///
/// ```
/// use candle_doft::{DoftConfig, config::LowRank};
///
/// let config = DoftConfig::lora(8, 16.).with_targets("q_proj");
/// assert_eq!(config.low_rank.unwrap().scale(), 2.);
/// let config = DoftConfig::default().with_low_rank(LowRank::new(16, 16.).with_rslora(true));
/// assert_eq!(config.low_rank.unwrap().scale(), 4.);
/// ```
///
/// # References
///
/// LoRA: arXiv:2106.09685, section 4.1. Rank-stabilised scale: arXiv:2312.03732, equation 4. DoRA: arXiv:2402.09353,
/// equations 5 and 11.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct LowRank {
    /// Rows of `A`, at least 1.
    pub rank: usize,
    /// The scale is `alpha / rank`.
    pub alpha: f64,
    /// Whether the scale is `alpha / sqrt(rank)` instead.
    #[serde(default)]
    pub rslora: bool,
    /// Whether rows have a magnitude of their own (linear layers alone).
    #[serde(default)]
    pub dora: bool,
}

impl LowRank {
    /// LoRA of that rank and scale `alpha / rank`.
    pub fn new(rank: usize, alpha: f64) -> Self {
        Self {
            rank,
            alpha,
            rslora: false,
            dora: false,
        }
    }

    /// Sets whether the scale is `alpha / sqrt(rank)`.
    pub fn with_rslora(mut self, rslora: bool) -> Self {
        self.rslora = rslora;
        self
    }

    /// Sets whether rows have a magnitude of their own.
    pub fn with_dora(mut self, dora: bool) -> Self {
        self.dora = dora;
        self
    }

    /// What `B A` is multiplied by.
    pub fn scale(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha / if self.rslora { rank.sqrt() } else { rank }
    }

    pub(super) fn check(&self) -> Result<()> {
        if self.rank == 0 {
            return Err(Error::config("rank", 0., "at least 1"));
        }
        if !self.alpha.is_finite() {
            return Err(Error::config("alpha", self.alpha, "a finite number"));
        }
        Ok(())
    }
}
