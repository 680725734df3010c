//! Medians and the intervals that hold them.

/// A median and the ends of its 95 % interval.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Interval {
    pub median: f64,
    pub low: f64,
    pub high: f64,
}

/// Fewer values than this give no interval of 95 %, but one from the least to the largest.
pub const VALUES: usize = 6;

pub fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let n = values.len();
    (values[(n - 1) / 2] + values[n / 2]) / 2.
}

/// The median and the order statistics that hold it with 95 % (a sign test turned round).
pub fn interval(values: &[f64]) -> Interval {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let n = values.len();
    let half = 0.98 * (n as f64).sqrt();
    let low = (n as f64 / 2. - half).floor().max(0.) as usize;
    let high = ((n as f64 / 2. + half).ceil() as usize).min(n - 1);
    Interval {
        median: median(&values),
        low: values[low],
        high: values[high],
    }
}
