//! [`Schedule`]: the learning rate as a function of the step alone, so that a resumed run needs no state.

use serde::{Deserialize, Serialize};

/// How the rate falls after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Decay {
    /// It stays.
    #[default]
    Constant,
    /// In a line.
    Linear,
    /// As half a cosine.
    Cosine,
}

/// A warm-up in a line from 0, then a decay.
///
/// With `p` the share of the steps after the warm-up that are done, the rate is `base` times
///
/// ```text
/// (step + 1) / warmup                              before the warm-up's end
/// 1                                                constant
/// 1 - (1 - floor) p                                linear
/// floor + (1 - floor) (1 + cos(pi p)) / 2          cosine
/// ```
///
/// # Examples
///
/// ```
/// use candle_doft::train::Schedule;
///
/// let schedule = Schedule::linear(2, 12);
/// assert_eq!(schedule.rate(1., 0), 0.5);
/// assert_eq!(schedule.rate(1., 2), 1.);
/// assert_eq!(schedule.rate(1., 7), 0.5);
/// assert_eq!(schedule.rate(1., 12), 0.);
/// ```
///
/// # References
///
/// The cosine: "SGDR: Stochastic Gradient Descent with Warm Restarts", arXiv:1608.03983, equation 5.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Schedule {
    /// How the rate falls.
    pub decay: Decay,
    /// Steps of the warm-up.
    pub warmup: u64,
    /// Steps of the whole run, the warm-up included.
    pub total: u64,
    /// Share of the rate that is left at the end, 0 to 1.
    pub floor: f64,
}

impl Default for Schedule {
    fn default() -> Self {
        Self {
            decay: Decay::Constant,
            warmup: 0,
            total: 0,
            floor: 0.,
        }
    }
}

impl Schedule {
    /// A rate that stays after `warmup` steps.
    pub fn constant(warmup: u64) -> Self {
        Self {
            warmup,
            ..Self::default()
        }
    }

    /// A rate that falls in a line to 0 at step `total`.
    pub fn linear(warmup: u64, total: u64) -> Self {
        Self {
            decay: Decay::Linear,
            warmup,
            total,
            floor: 0.,
        }
    }

    /// A rate that falls as half a cosine to 0 at step `total`.
    pub fn cosine(warmup: u64, total: u64) -> Self {
        Self {
            decay: Decay::Cosine,
            ..Self::linear(warmup, total)
        }
    }

    /// The rate of a step, counted from 0, for the rate `base` at its height.
    pub fn rate(&self, base: f64, step: u64) -> f64 {
        if step < self.warmup {
            return base * (step + 1) as f64 / self.warmup as f64;
        }
        let span = self.total.saturating_sub(self.warmup);
        let done = match span {
            0 => 1.,
            span => ((step - self.warmup) as f64 / span as f64).min(1.),
        };
        let falling = match self.decay {
            Decay::Constant => return base,
            Decay::Linear => 1. - done,
            Decay::Cosine => (1. + (std::f64::consts::PI * done).cos()) / 2.,
        };
        base * (self.floor + (1. - self.floor) * falling)
    }
}
