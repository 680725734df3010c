//! A sweep over many machines: each makes a part of the runs, and one joins them.

use crate::method::Entry;
use crate::record::Job;
use crate::sweep::{Bench, Plan};
use anyhow::Result;
use std::path::PathBuf;

/// One of equal parts of the runs at the given rates and seeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// From 1.
    pub part: usize,
    pub of: usize,
}

impl std::str::FromStr for Shard {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers = text.split_once('/').and_then(|(part, of)| {
            let (part, of) = (part.parse().ok()?, of.parse().ok()?);
            (1 <= part && part <= of).then_some(Self { part, of })
        });
        numbers.ok_or_else(|| "expected K/N with K from 1 to N, as in 2/8".to_string())
    }
}

impl std::fmt::Display for Shard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.part, self.of)
    }
}

/// Every method at every rate with every seed of the sweep.
fn grid(plan: &Plan, entries: &[Entry]) -> Vec<Job> {
    let mut jobs = Vec::new();
    for seed in 0..plan.seeds {
        for entry in entries {
            jobs.extend(plan.rates.iter().map(|rate| Job::new(*entry, *rate, seed)));
        }
    }
    jobs
}

impl Shard {
    /// The runs of this part: each is in one part, whatever was made before.
    fn jobs(self, plan: &Plan, entries: &[Entry]) -> Vec<Job> {
        let all = grid(plan, entries).into_iter();
        all.skip(self.part - 1).step_by(self.of).collect()
    }

    /// Makes them; says how many there are.
    pub fn make(self, bench: &Bench, entries: &[Entry]) -> Result<String> {
        let runs = bench.runs("shard", &self.jobs(bench.plan, entries))?;
        let name = bench.task.name();
        Ok(format!("{name}: runs of part {self}: {}", runs.len()))
    }
}

/// Takes in the runs of other folders, and says what the sweep still lacks, a line for each method: runs of
/// its grid, or rates beyond its ends, where the best one lies there.
pub fn merge(bench: &Bench, entries: &[Entry], folders: &[PathBuf]) -> Result<Vec<String>> {
    let name = bench.task.name();
    let mut taken = 0;
    for folder in folders {
        taken += bench.store.take(folder, name, &bench.task.settings())?;
    }
    let mut lines = vec![format!("{name}: runs taken in: {taken}")];
    for entry in entries {
        let method = entry.label();
        let rates = bench.rates(*entry);
        let lacking = |rate: &&f64| {
            let mut seeds = 0..bench.plan.seeds;
            seeds.any(|seed| bench.store.find(&Job::new(*entry, **rate, seed)).is_none())
        };
        let lacks: Vec<f64> = rates.iter().filter(lacking).copied().collect();
        if !lacks.is_empty() {
            let lacks = list(&lacks);
            lines.push(format!("{name}: {method} lacks runs: --lrs {lacks}"));
            continue;
        }
        let beyond = bench.beyond(*entry, &rates);
        if !beyond.is_empty() {
            let beyond = list(&beyond);
            lines.push(format!(
                "{name}: the best rate of {method} lies at an end: --lrs {beyond}"
            ));
        }
    }
    if lines.len() == 1 {
        lines.push(format!(
            "{name}: the sweep is whole; without --shard and --merge compare goes on from it"
        ));
    }
    Ok(lines)
}

fn list(rates: &[f64]) -> String {
    let rates: Vec<String> = rates.iter().map(f64::to_string).collect();
    rates.join(" ")
}
