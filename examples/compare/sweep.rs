//! Every method at every rate, until its best rate lies inside the range; then more seeds at that one.

use crate::method::Entry;
use crate::pool;
use crate::record::{Job, Run, Store};
use crate::support::progress;
use crate::support::stats::mean;
use crate::task::Task;
use anyhow::Result;

/// How wide to look.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Learning rates that every method is tried at, ascending.
    pub rates: Vec<f64>,
    /// Rates that may be added at either end, each half or twice the one before.
    pub extensions: usize,
    /// Seeds of the sweep.
    pub seeds: u64,
    /// Seeds at the best rate, those of the sweep among them.
    pub final_seeds: u64,
    /// Runs side by side.
    pub workers: usize,
}

/// A task, what is known of it, and how wide to look.
pub struct Bench<'a> {
    pub task: &'a dyn Task,
    pub store: Store,
    pub plan: &'a Plan,
}

/// What became of one method.
#[derive(Clone, Debug)]
pub struct Swept {
    pub entry: Entry,
    /// Rates that were tried, ascending, with the runs of each by seed.
    pub tried: Vec<(f64, Vec<Run>)>,
    /// Place of the rate with the best mean on the validation split.
    pub best: usize,
    /// The runs at that rate, by seed.
    pub finals: Vec<Run>,
}

impl Swept {
    pub fn best_rate(&self) -> f64 {
        self.tried[self.best].0
    }

    /// Whether the range ended before the method did.
    pub fn at_edge(&self) -> bool {
        self.best == 0 || self.best + 1 == self.tried.len()
    }
}

impl Bench<'_> {
    /// Makes the runs that are not known yet; answers all in the order of the jobs.
    pub fn runs(&self, what: &'static str, jobs: &[Job]) -> Result<Vec<Run>> {
        let mut open: Vec<Job> = Vec::new();
        for job in jobs {
            if self.store.find(job).is_none() && !open.contains(job) {
                open.push(*job);
            }
        }
        let mut seeds: Vec<u64> = open.iter().map(|job| job.seed).collect();
        seeds.sort_unstable();
        seeds.dedup();
        let bar = progress::bar(seeds.len(), "networks");
        let prepare = |seed: &u64| self.task.prepare(*seed);
        pool::each(&seeds, self.plan.workers, &bar, prepare)?;
        bar.finish_and_clear();
        let bar = progress::bar(open.len(), what);
        bar.set_message(self.task.name());
        let run = |job: &Job| self.store.add(self.task.run(job)?);
        pool::each(&open, self.plan.workers, &bar, run)?;
        bar.finish_and_clear();
        let found = jobs.iter().filter_map(|job| {
            let run = self.store.find(job)?;
            Some(Run { job: *job, ..run })
        });
        Ok(found.collect())
    }

    /// The sweep, and more seeds at each best rate.
    pub fn sweep(&self, what: &'static str, entries: &[Entry]) -> Result<Vec<Swept>> {
        self.finals(self.sweep_only(what, entries)?)
    }

    pub fn sweep_only(&self, what: &'static str, entries: &[Entry]) -> Result<Vec<Swept>> {
        let mut rates = vec![self.plan.rates.clone(); entries.len()];
        let mut left = vec![[self.plan.extensions; 2]; entries.len()];
        loop {
            let mut jobs = Vec::new();
            for seed in 0..self.plan.seeds {
                for (entry, rates) in entries.iter().zip(&rates) {
                    jobs.extend(rates.iter().map(|rate| Job::new(*entry, *rate, seed)));
                }
            }
            let runs = self.runs(what, &jobs)?;
            let all: Vec<Swept> = entries
                .iter()
                .zip(&rates)
                .map(|(entry, rates)| self.collect(*entry, rates, &runs))
                .collect();
            let mut extended = false;
            for ((swept, rates), left) in all.iter().zip(&mut rates).zip(&mut left) {
                let [low, high] = self.open_ends(swept);
                if low && left[0] > 0 {
                    rates.insert(0, rates[0] / 2.);
                    left[0] -= 1;
                    extended = true;
                }
                if high && left[1] > 0 {
                    rates.push(rates[rates.len() - 1] * 2.);
                    left[1] -= 1;
                    extended = true;
                }
            }
            if !extended {
                return Ok(all);
            }
        }
    }

    fn collect(&self, entry: Entry, rates: &[f64], runs: &[Run]) -> Swept {
        let of = |rate: f64| {
            let at = |run: &&Run| run.job.same(&Job::new(entry, rate, run.job.seed));
            runs.iter().filter(at).cloned().collect::<Vec<_>>()
        };
        let tried: Vec<(f64, Vec<Run>)> = rates.iter().map(|rate| (*rate, of(*rate))).collect();
        let scores: Vec<f64> = tried
            .iter()
            .map(|(_, runs)| self.validation(runs))
            .collect();
        Swept {
            entry,
            best: first_largest(&scores),
            tried,
            finals: Vec::new(),
        }
    }

    /// The rates of the plan, and others at which a method was run in a sweep; ascending.
    pub fn rates(&self, entry: Entry) -> Vec<f64> {
        let mut rates = self.plan.rates.clone();
        for run in self.store.runs() {
            let Job { lr, seed, .. } = run.job;
            let swept = Job::new(entry, lr, seed).same(&run.job);
            let known = |rate: &f64| (rate - lr).abs() <= 1e-12 * lr;
            if swept && !rates.iter().any(known) {
                rates.push(lr);
            }
        }
        rates.sort_by(f64::total_cmp);
        rates
    }

    /// The next rates at the ends of these, whose runs are all there, where an end is as good as the best.
    pub fn beyond(&self, entry: Entry, rates: &[f64]) -> Vec<f64> {
        let runs: Vec<Run> = self.store.runs();
        let swept = |run: &&Run| run.job.seed < self.plan.seeds;
        let runs: Vec<Run> = runs.iter().filter(swept).cloned().collect();
        let ends = self.open_ends(&self.collect(entry, rates, &runs));
        let next = [rates[0] / 2., rates[rates.len() - 1] * 2.];
        let open = next.into_iter().zip(ends).filter(|(_, open)| *open);
        open.map(|(rate, _)| rate).collect()
    }

    /// The mean validation score.
    pub fn validation(&self, runs: &[Run]) -> f64 {
        let scores = runs
            .iter()
            .map(|run| self.task.score(run.quality.validation));
        mean(&scores.collect::<Vec<_>>())
    }

    /// Whether the lowest and the highest rate are still as good as the best.
    fn open_ends(&self, swept: &Swept) -> [bool; 2] {
        let score = |place: usize| self.validation(&swept.tried[place].1);
        let best = score(swept.best);
        let last = swept.tried.len() - 1;
        [0, last].map(|end| swept.best == end || score(end) >= best - self.task.margin())
    }

    fn finals(&self, mut all: Vec<Swept>) -> Result<Vec<Swept>> {
        let mut jobs = Vec::new();
        for seed in 0..self.plan.final_seeds {
            let job = |swept: &Swept| Job::new(swept.entry, swept.best_rate(), seed);
            jobs.extend(all.iter().map(job));
        }
        let runs = self.runs("more seeds", &jobs)?;
        for swept in &mut all {
            let mine = |run: &&Run| run.job.entry == swept.entry;
            swept.finals = runs.iter().filter(mine).cloned().collect();
        }
        Ok(all)
    }
}

/// The place of the largest number, the first of equal ones.
pub fn first_largest(values: &[f64]) -> usize {
    let mut best = 0;
    for (place, value) in values.iter().enumerate() {
        if *value > values[best] {
            best = place;
        }
    }
    best
}
