//! Means and medians with their 95 % intervals.

use serde::{Deserialize, Serialize};

/// A mean over seeds and its 95 % interval by Student's t.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    pub mean: f64,
    pub low: f64,
    pub high: f64,
    pub n: usize,
}

/// The mean of at least two finite values; nothing otherwise.
pub fn interval(values: &[f64]) -> Option<Interval> {
    let n = values.len();
    if n < 2 || values.iter().any(|v| !v.is_finite()) {
        return None;
    }
    let mean = mean(values);
    let square = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1) as f64;
    let half = student(n - 1) * (square / n as f64).sqrt();
    Some(Interval {
        mean,
        low: mean - half,
        high: mean + half,
        n,
    })
}

/// The geometric mean of positive values, its interval by t on the logarithms.
pub fn geometric(values: &[f64]) -> Option<Interval> {
    let logs: Vec<f64> = values.iter().map(|v| v.ln()).collect();
    let of_logs = interval(&logs)?;
    Some(Interval {
        mean: of_logs.mean.exp(),
        low: of_logs.low.exp(),
        high: of_logs.high.exp(),
        n: of_logs.n,
    })
}

pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// NaN of no values.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n => (sorted[(n - 1) / 2] + sorted[n / 2]) / 2.,
    }
}

/// A median and the ends of its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct MedianInterval {
    pub median: f64,
    pub low: f64,
    pub high: f64,
}

/// Fewer values than this give no interval of 95 %, but one from the least to the largest.
pub const VALUES: usize = 6;

/// The median and the order statistics that hold it with 95 % (a sign test turned round).
pub fn median_interval(values: &[f64]) -> MedianInterval {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let n = sorted.len();
    let half = 0.98 * (n as f64).sqrt();
    let low = (n as f64 / 2. - half).floor().max(0.) as usize;
    let high = ((n as f64 / 2. + half).ceil() as usize).min(n - 1);
    MedianInterval {
        median: median(values),
        low: sorted[low],
        high: sorted[high],
    }
}

/// The 97.5 % quantile of Student's t; from 11 degrees on by its expansion around the normal one
/// (Abramowitz and Stegun, 26.7.5), good to 2e-4 there.
pub fn student(degrees: usize) -> f64 {
    const FIRST: [f64; 10] = [
        12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    ];
    if let Some(quantile) = FIRST.get(degrees.saturating_sub(1)) {
        return *quantile;
    }
    let (z, v) = (1.959_964_f64, degrees as f64);
    let first = (z.powi(3) + z) / 4.;
    let second = (5. * z.powi(5) + 16. * z.powi(3) + 3. * z) / 96.;
    let third = (3. * z.powi(7) + 19. * z.powi(5) + 17. * z.powi(3) - 15. * z) / 384.;
    z + first / v + second / v.powi(2) + third / v.powi(3)
}
