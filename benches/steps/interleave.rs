//! Sides timed in turns, so that a drift of the machine meets all of them.

use super::{Run, Timed};
use candle_core::Result;
use std::time::Instant;

/// A run that is timed from its first to its last instruction.
pub fn timed(run: Run) -> Timed {
    Box::new(move || {
        let start = Instant::now();
        run()?;
        Ok(start.elapsed().as_secs_f64())
    })
}

/// How long a comparison goes on.
#[derive(Clone, Copy)]
pub struct Budget {
    pub seconds: f64,
    /// Rounds that there are at least.
    pub rounds: usize,
}

/// Seconds of each side in each round. The first round is left out: it fills caches and pools.
pub fn rounds(sides: &[Timed], budget: Budget) -> Result<Vec<Vec<f64>>> {
    let mut found = Vec::new();
    let start = Instant::now();
    while found.len() <= budget.rounds || start.elapsed().as_secs_f64() < budget.seconds {
        let round = sides
            .iter()
            .map(|side| side())
            .collect::<Result<Vec<_>>>()?;
        found.push(round);
    }
    found.remove(0);
    Ok(found)
}
