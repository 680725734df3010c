//! Sides timed in turns, so that a drift of the machine meets all of them.

use super::Run;
use super::stats::VALUES;
use candle_core::Result;
use std::time::Instant;

/// Seconds of each side in each round, for about `budget` seconds. The first round is left out: it
/// fills caches and pools.
pub fn rounds(sides: &[Run], budget: f64) -> Result<Vec<Vec<f64>>> {
    let mut found = Vec::new();
    let start = Instant::now();
    while found.len() <= VALUES || start.elapsed().as_secs_f64() < budget {
        let round = sides.iter().map(seconds).collect::<Result<Vec<_>>>()?;
        found.push(round);
    }
    found.remove(0);
    Ok(found)
}

fn seconds(run: &Run) -> Result<f64> {
    let start = Instant::now();
    run()?;
    Ok(start.elapsed().as_secs_f64())
}
