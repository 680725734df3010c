//! What the tests share: seeded numbers, slopes, and comparisons that name the entry that is off.

#![allow(dead_code, reason = "each test file uses a part")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

pub mod golden;
pub mod naive;
pub mod programs;
pub mod slopes;
pub mod tensors;
pub mod tolerance;

use candle_core::{DType, Tensor};
use candle_doft::Map;

/// Every map: what holds for all of them is checked for these.
pub const MAPS: [Map; 3] = [Map::Cayley, Map::SERIES, Map::Exponential];

/// The maps whose every `R` has to be orthogonal: all but the series.
pub fn orthogonal_maps() -> impl Iterator<Item = Map> {
    MAPS.into_iter().filter(|map| *map != Map::SERIES)
}

/// `n` numbers between -1 and 1 without symmetry, the same ones each time.
pub fn uneven(n: usize) -> Vec<f64> {
    let value = |i: usize| (1.7 * i as f64 + 0.3).sin() * (0.4 + ((i * 7) % 5) as f64 / 8.);
    (0..n).map(value).collect()
}

/// The sum of products.
pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The slope of `f` at `at`, by central differences of step `h`.
pub fn central_difference(f: impl Fn(&[f64]) -> f64, at: &[f64], h: f64) -> Vec<f64> {
    let mut point = at.to_vec();
    let mut slope = Vec::with_capacity(at.len());
    for i in 0..at.len() {
        point[i] = at[i] + h;
        let above = f(&point);
        point[i] = at[i] - h;
        let below = f(&point);
        point[i] = at[i];
        slope.push((above - below) / (2. * h));
    }
    slope
}

/// Each entry within `abs + rel * |expected|`; a NaN never is.
pub fn assert_close(name: &str, found: &Tensor, expected: &[f64], abs: f64, rel: f64) {
    let found = found
        .to_dtype(DType::F64)
        .and_then(|t| t.flatten_all())
        .unwrap();
    let found = found.to_vec1::<f64>().unwrap();
    assert_eq!(found.len(), expected.len(), "{name}: number of entries");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let off = (found - expected).abs();
        assert!(
            off <= abs + rel * expected.abs(),
            "{name}: entry {i} is {found:e}, expected {expected:e}, off by {off:e}"
        );
    }
}
