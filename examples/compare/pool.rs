//! Runs side by side, each on one thread.

use anyhow::{Context, Result};
use indicatif::ProgressBar;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Calls `f` for every item, `workers` at a time; the first error ends it.
///
/// Each worker is the one thread of a rayon pool of its own, so that no parallel loop inside `f` leaves
/// it: what `f` computes does not depend on the number of workers, and workers do not wait for another.
pub fn each<T: Sync>(
    items: &[T],
    workers: usize,
    bar: &ProgressBar,
    f: impl Fn(&T) -> Result<()> + Sync,
) -> Result<()> {
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(None);
    let work = || {
        while let Some(item) = items.get(next.fetch_add(1, Ordering::SeqCst)) {
            if let Err(error) = f(item) {
                next.store(items.len(), Ordering::SeqCst);
                let mut failed = failed.lock().unwrap_or_else(|e| e.into_inner());
                failed.get_or_insert(error);
            }
            bar.inc(1);
        }
    };
    let mut pools = Vec::new();
    for _ in 0..workers.min(items.len()) {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build();
        pools.push(pool.context("cannot start a thread")?);
    }
    std::thread::scope(|scope| {
        for pool in &pools {
            scope.spawn(|| pool.install(work));
        }
    });
    match failed.into_inner().unwrap_or_else(|e| e.into_inner()) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}
