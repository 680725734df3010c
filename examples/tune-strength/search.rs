//! The search: a grid for all layers that becomes finer around the best, then passes over layers or blocks.

use crate::measure::{Bench, Limit, Losses, Measured};
use crate::support::progress;
use anyhow::{Context, Result};
use candle_doft::Error;
use candle_doft::config::Strengths;

/// Strengths are whole multiples of `1 / STEPS`, so that none is tried twice.
const STEPS: f64 = 40.;

/// The largest strength, 1.2, and what the file means, 1.
const MOST: i32 = 48;
const WHOLE: i32 = 40;

/// The distance of the first grid, 0.2; each finer one has half of it.
const COARSE: i32 = 8;

/// A strength of all layers, and what came of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tried {
    steps: i32,
    pub(crate) measured: Measured,
}

impl Tried {
    pub(crate) fn strength(&self) -> f64 {
        strength(self.steps)
    }
}

pub(crate) fn strength(steps: i32) -> f64 {
    f64::from(steps) / STEPS
}

/// Whether the second text is as good as it has to be.
fn allowed(losses: Losses, limit: Option<Limit>) -> bool {
    match (losses.general, limit) {
        (Some(general), Some(limit)) => general <= limit.loss(),
        _ => true,
    }
}

/// The strength of the lowest loss that is allowed. The base always is.
pub(crate) fn best(tried: &[Tried], limit: Option<Limit>) -> Result<Tried> {
    let allowed = tried
        .iter()
        .filter(|t| allowed(t.measured.choose, limit))
        .copied();
    let loss = |tried: &Tried| tried.measured.choose.target;
    let best = allowed.min_by(|a, b| loss(a).total_cmp(&loss(b)));
    best.context("no strength is allowed")
}

/// Tries one strength for all layers; in the order of the strengths.
pub(crate) fn uniform(bench: &Bench) -> Result<Vec<Tried>> {
    let mut tried: Vec<Tried> = Vec::new();
    let bar = progress::bar((MOST / COARSE + 1 + 6) as usize, "strengths");
    let add = |tried: &mut Vec<Tried>, steps: i32| -> Result<()> {
        bar.inc(1);
        let known = tried.iter().any(|t| t.steps == steps);
        if known || !(0..=MOST).contains(&steps) {
            return Ok(());
        }
        let strengths = Strengths::from(strength(steps));
        if let Some(measured) = unless_too_far(steps, bench.measured(&strengths))? {
            tried.push(Tried { steps, measured });
        }
        Ok(())
    };
    for steps in (0..=MOST).step_by(COARSE as usize) {
        add(&mut tried, steps)?;
    }
    for distance in [COARSE / 2, COARSE / 4, COARSE / 8] {
        let around = best(&tried, bench.limit)?.steps;
        add(&mut tried, around - distance)?;
        add(&mut tried, around + distance)?;
    }
    bar.finish_and_clear();
    tried.sort_by_key(|t| t.steps);
    Ok(tried)
}

/// None for a strength above 1 that turns a plane by 180 degrees; other errors stay errors.
fn unless_too_far<T>(steps: i32, result: Result<T>) -> Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error)
            if steps > WHOLE && matches!(error.downcast_ref(), Some(Error::Strength { .. })) =>
        {
            eprintln!("note: strength {} is left out: {error}", strength(steps));
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Layers that have one strength together, by name.
pub(crate) struct Groups(Vec<(String, Vec<String>)>);

impl Groups {
    /// Each layer alone, or all of a block of the model, which is what stands before and with the first number of
    /// a path.
    pub(crate) fn new(paths: &[String], blocks: bool) -> Self {
        let mut groups: Vec<(String, Vec<String>)> = Vec::new();
        for path in paths {
            let name = match blocks {
                true => block(path),
                false => path.clone(),
            };
            match groups.iter_mut().find(|(known, _)| *known == name) {
                Some((_, layers)) => layers.push(path.clone()),
                None => groups.push((name, vec![path.clone()])),
            }
        }
        Self(groups)
    }
}

fn block(path: &str) -> String {
    let parts: Vec<&str> = path.split('.').collect();
    let number = parts.iter().position(|part| part.parse::<usize>().is_ok());
    parts[..number.map_or(parts.len(), |place| place + 1)].join(".")
}

/// The strengths that were chosen.
pub(crate) struct Search {
    /// Of the groups; empty where all layers have one strength.
    groups: Vec<(String, Vec<String>, i32)>,
    steps: i32,
    pub(crate) measured: Measured,
}

impl Search {
    /// One strength for all layers.
    pub(crate) fn of_all(best: Tried) -> Self {
        Self {
            groups: Vec::new(),
            steps: best.steps,
            measured: best.measured,
        }
    }

    /// Goes through the groups, from one strength for all, and moves each while the target gets better and the
    /// second text stays allowed. The part that is reported is measured once, at the end.
    pub(crate) fn by_group(
        bench: &Bench,
        groups: Groups,
        start: Tried,
        passes: u8,
    ) -> Result<Self> {
        let groups = groups.0.into_iter();
        let groups = groups.map(|(name, paths)| (name, paths, start.steps));
        let mut search = Self::of_all(start);
        search.groups = groups.collect();
        let mut lowest = start.measured.choose.target;
        let all = search.groups.len() * usize::from(passes);
        let bar = progress::bar(all, "groups");
        for pass in 0..passes {
            let distance = COARSE >> pass;
            for group in 0..search.groups.len() {
                search.step(bench, group, distance, &mut lowest)?;
                bar.inc(1);
            }
        }
        bar.finish_and_clear();
        search.measured = bench.measured(&search.strengths())?;
        Ok(search)
    }

    /// Tries one group a distance below and above.
    fn step(&mut self, bench: &Bench, group: usize, distance: i32, lowest: &mut f64) -> Result<()> {
        let before = self.groups[group].2;
        let mut kept = before;
        for steps in [before - distance, before + distance] {
            if !(0..=MOST).contains(&steps) {
                continue;
            }
            self.groups[group].2 = steps;
            let losses = unless_too_far(steps, bench.to_choose(&self.strengths()))?;
            if let Some(losses) = losses
                && losses.target < *lowest
                && allowed(losses, bench.limit)
            {
                *lowest = losses.target;
                kept = steps;
            }
        }
        self.groups[group].2 = kept;
        Ok(())
    }

    pub(crate) fn strengths(&self) -> Strengths {
        let mut strengths = Strengths::from(strength(self.steps));
        for (_, paths, steps) in &self.groups {
            for path in paths {
                strengths = strengths.with_rule(path.as_str(), strength(*steps));
            }
        }
        strengths
    }

    /// Names and strengths of the groups.
    pub(crate) fn groups(&self) -> impl Iterator<Item = (&str, f64)> {
        let groups = self.groups.iter();
        groups.map(|(name, _, steps)| (name.as_str(), strength(*steps)))
    }

    /// The one strength of all layers.
    pub(crate) fn one(&self) -> Option<f64> {
        self.groups.is_empty().then(|| strength(self.steps))
    }
}
