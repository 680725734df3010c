//! Runs, and the file that keeps them for the next call.

use crate::method::Entry;
use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// What says which run it is; the settings of the task say the rest.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Job {
    #[serde(flatten)]
    pub entry: Entry,
    pub lr: f64,
    pub seed: u64,
    /// Factor of the rate of DOFT's magnitudes.
    pub magnitude_rate: f64,
    /// Looks at the rotations along the way.
    pub traced: bool,
}

impl Job {
    pub fn new(entry: Entry, lr: f64, seed: u64) -> Self {
        Self {
            entry,
            lr,
            seed,
            magnitude_rate: 1.,
            traced: false,
        }
    }

    /// Rates that went through a file may have lost their last bit.
    pub fn same(&self, other: &Self) -> bool {
        let close = |a: f64, b: f64| (a - b).abs() <= 1e-12 * a.abs();
        close(self.lr, other.lr)
            && close(self.magnitude_rate, other.magnitude_rate)
            && (self.entry, self.seed, self.traced) == (other.entry, other.seed, other.traced)
    }
}

/// A measure of task quality on three sets: accuracy, or the perplexity of a text.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Quality {
    pub validation: f64,
    pub test: f64,
    /// What the frozen network was made for.
    pub original_task: f64,
}

/// A look at the rotations of a run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Look {
    pub step: usize,
    /// `max |R R^T - I|` over all blocks.
    pub orthogonality_error: f64,
    /// `| ||row of W_eff|| / m - 1 |`: the mean and the largest over all rows.
    pub norm_drift_mean: f64,
    pub norm_drift_max: f64,
}

/// A run that ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Run {
    pub task: String,
    #[serde(flatten)]
    pub job: Job,
    pub trainable_parameters: usize,
    /// Steps until the test split reached the target; none if it never did.
    pub steps_to_target: Option<usize>,
    /// The same on the validation split.
    pub validation_steps_to_target: Option<usize>,
    #[serde(flatten)]
    pub quality: Quality,
    /// The same before the first step.
    pub frozen: Quality,
    /// With whatever ran beside it; `summary` has the one to compare.
    pub seconds_per_step: f64,
    pub diverged: bool,
    /// `||W_eff - W|| / ||W||` over all layers; nothing for a language model.
    pub weight_change: Option<f64>,
    /// Step, validation, test.
    pub curve: Vec<(usize, f64, f64)>,
    pub trace: Vec<Look>,
}

/// Runs of one task under one set of settings, kept line by line.
pub struct Store {
    path: PathBuf,
    inner: Mutex<(File, Vec<Run>)>,
}

impl Store {
    /// Opens what an earlier call left, or begins.
    pub fn open(folder: &Path, task: &str, settings: &Value) -> Result<Self> {
        let path = file(folder, task);
        let name = path.display().to_string();
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(error).context(name),
        };
        let (whole, runs) = read(&name, &text, settings)?;
        let kept = match runs.is_empty() {
            true => format!("{settings}\n"),
            false => whole.to_string(),
        };
        crate::support::files::replace(&path, kept.as_bytes())?;
        let file = std::fs::OpenOptions::new().append(true).open(&path);
        let file = file.with_context(|| name)?;
        Ok(Self {
            path,
            inner: Mutex::new((file, runs)),
        })
    }

    pub fn add(&self, run: Run) -> Result<()> {
        let line = serde_json::to_string(&run)? + "\n";
        let mut inner = self.inner.lock().unwrap_or_else(|e| e.into_inner());
        let written = inner.0.write_all(line.as_bytes());
        written.with_context(|| self.path.display().to_string())?;
        inner.1.push(run);
        Ok(())
    }

    /// Adds the runs that another folder has beside these; answers how many.
    pub fn take(&self, folder: &Path, task: &str, settings: &Value) -> Result<usize> {
        let name = file(folder, task).display().to_string();
        let text = std::fs::read_to_string(&name).with_context(|| name.clone())?;
        let (_, runs) = read(&name, &text, settings)?;
        let mut taken = 0;
        for run in runs {
            if self.find(&run.job).is_none() {
                self.add(run)?;
                taken += 1;
            }
        }
        Ok(taken)
    }

    /// All runs, those of earlier calls first.
    pub fn runs(&self) -> Vec<Run> {
        let inner = self.inner.lock().unwrap_or_else(|e| e.into_inner());
        inner.1.clone()
    }

    pub fn find(&self, job: &Job) -> Option<Run> {
        let inner = self.inner.lock().unwrap_or_else(|e| e.into_inner());
        inner.1.iter().find(|run| run.job.same(job)).cloned()
    }
}

fn file(folder: &Path, task: &str) -> PathBuf {
    folder.join(format!("runs-{task}.jsonl"))
}

/// The whole lines of a file, and the runs in them.
fn read<'a>(name: &str, text: &'a str, settings: &Value) -> Result<(&'a str, Vec<Run>)> {
    // A line that a killed call did not finish is dropped.
    let whole = &text[..text.rfind('\n').map_or(0, |end| end + 1)];
    let mut lines = whole.lines();
    let mut runs = Vec::new();
    if let Some(first) = lines.next() {
        let found: Value = serde_json::from_str(first).with_context(|| name.to_string())?;
        same(name, &found, settings)?;
        for (number, line) in lines.enumerate() {
            let run = serde_json::from_str(line);
            runs.push(run.with_context(|| format!("{name}, line {}", number + 2))?);
        }
    }
    Ok((whole, runs))
}

fn same(name: &str, found: &Value, settings: &Value) -> Result<()> {
    let (Some(found), Some(settings)) = (found.as_object(), settings.as_object()) else {
        bail!(
            "{name} does not begin with the settings of its runs; delete it or choose another --out"
        );
    };
    for key in settings.keys().chain(found.keys()) {
        let of = |side: &serde_json::Map<String, Value>| {
            side.get(key).map_or("absent".into(), Value::to_string)
        };
        ensure!(
            found.get(key) == settings.get(key),
            "{name}: its runs were made with `{key}` {}, now it is {}; delete it or choose another --out",
            of(found),
            of(settings)
        );
    }
    Ok(())
}
