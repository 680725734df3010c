//! The task on a language model: *The Devil's Dictionary*, through the code of `finetune`.

use crate::record::{Job, Quality, Run};
use crate::support::device::DeviceName;
use crate::support::llm::data::{Batch, Data, Order, Sequence};
use crate::support::llm::open;
use crate::support::llm::tokenizer::Text;
use crate::support::llm::train::{StepOptions, Team, Trainer};
use crate::support::llm::weights::Weights;
use crate::task::{Task, with_device};
use anyhow::{Result, ensure};
use candle_core::Device;
use candle_doft::train::Schedule;
use candle_doft::train::parallel::Alone;
use serde_json::{Value, json};
use std::sync::atomic::AtomicBool;
use std::time::Instant;

/// Sequences of a step, and tokens of a sequence at most.
const BATCH: usize = 4;
const LENGTH: usize = 128;

/// Largest norm of a gradient, as in `finetune`.
const CLIP: f64 = 1.;

/// Looks at the held-out text along a run.
const LOOKS: usize = 6;

/// Perplexities are cut off here; JSON knows no infinity.
const WORST: f64 = 1e6;

/// What the model knew by heart before, the text of the MIT licence.
const KNOWN: &str = include_str!("../../LICENSE");

pub struct TextTask {
    weights: Weights,
    name: String,
    train: Vec<Sequence>,
    validation: Vec<Sequence>,
    test: Vec<Sequence>,
    known: Vec<Sequence>,
    frozen: Quality,
    steps: usize,
    held_out: usize,
    place: DeviceName,
    device: Device,
}

impl TextTask {
    /// Half of the held-out text chooses, the other half reports; `held_out` sequences of each.
    pub fn new(model: &str, steps: usize, held_out: usize, place: DeviceName) -> Result<Self> {
        let device = place.open()?;
        let weights = Weights::open(&open::locate(model)?, false, &device)?;
        ensure!(
            LENGTH <= weights.config.context,
            "the model's context of {} is less than {LENGTH} tokens; choose another --model",
            weights.config.context
        );
        let text = Text::open(&weights)?;
        // The same split for all seeds; seeds differ in order and initialisation.
        let data = Data::open(None, &text, LENGTH, 0)?;
        let mut validation = data.validation;
        let mut test = validation.split_off(validation.len() / 2);
        validation.truncate(held_out);
        test.truncate(held_out);
        let known = text.encode(KNOWN)?;
        let known = known.chunks(LENGTH).filter(|ids| ids.len() > 1);
        let name = weights.path.file_name();
        let mut task = Self {
            name: name.map_or(String::new(), |name| name.to_string_lossy().into()),
            weights,
            train: data.train,
            validation,
            test,
            known: known
                .map(|ids| Sequence {
                    learned: (0..ids.len()).map(|i| i > 0).collect(),
                    ids: ids.to_vec(),
                })
                .collect(),
            frozen: Quality {
                validation: 0.,
                test: 0.,
                original_task: 0.,
            },
            steps,
            held_out,
            place,
            device,
        };
        let nothing = crate::support::methods::Method::Frozen;
        let frozen = Trainer::new(&task.weights, nothing, 0, &[], &task.device)?;
        task.frozen = task.quality(&frozen)?;
        Ok(task)
    }

    fn quality(&self, trainer: &Trainer) -> Result<Quality> {
        Ok(Quality {
            validation: perplexity(trainer, &self.validation)?,
            test: perplexity(trainer, &self.test)?,
            original_task: perplexity(trainer, &self.known)?,
        })
    }
}

fn perplexity(trainer: &Trainer, sequences: &[Sequence]) -> Result<f64> {
    let perplexity = trainer.held_out(&Alone, sequences, BATCH)?.exp();
    Ok(if perplexity < WORST {
        perplexity
    } else {
        WORST
    })
}

impl Task for TextTask {
    fn name(&self) -> &'static str {
        "text"
    }

    fn settings(&self) -> Value {
        let settings = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "task": self.name(),
            "model": self.name,
            "model_bytes": self.weights.bytes(),
            "steps": self.steps,
            "batch": BATCH,
            "length": LENGTH,
            "held_out": self.held_out,
        });
        with_device(settings, self.place)
    }

    fn prepare(&self, _seed: u64) -> Result<()> {
        Ok(())
    }

    fn run(&self, job: &Job) -> Result<Run> {
        ensure!(
            job.magnitude_rate == 1. && !job.traced,
            "text knows no studies of the rotation"
        );
        let method = job.entry.method(job.seed);
        let mut trainer = Trainer::new(&self.weights, method, job.seed, &[], &self.device)?;
        let schedule = Schedule::cosine(self.steps as u64 / 20, self.steps as u64);
        let mut order = Order::new(job.seed, self.train.len());
        let mut curve = vec![(0, self.frozen.validation, self.frozen.test)];
        let (mut made, mut seconds) = (0, 0.);
        let team = Team {
            group: &Alone,
            stop: &AtomicBool::new(false),
        };
        for step in 0..self.steps as u64 {
            let start = Instant::now();
            let positions = step * BATCH as u64..(step + 1) * BATCH as u64;
            let chosen: Vec<&Sequence> = positions
                .map(|position| &self.train[order.at(position)])
                .collect();
            let options = StepOptions {
                step,
                rate: schedule.rate(job.lr, step),
                clip: CLIP,
                again: false,
            };
            let batch = Batch::new(&chosen, &self.device)?;
            match trainer.step(team, &[batch], options) {
                Ok(_) => made += 1,
                Err(error) if is_divergence(&error) => break,
                Err(error) => return Err(error),
            }
            seconds += start.elapsed().as_secs_f64();
            let next = step as usize + 1;
            if next.is_multiple_of((self.steps / LOOKS).max(1)) && next < self.steps {
                let validation = perplexity(&trainer, &self.validation)?;
                curve.push((next, validation, perplexity(&trainer, &self.test)?));
            }
        }
        let quality = self.quality(&trainer)?;
        curve.push((made, quality.validation, quality.test));
        let target = self.target();
        let reached = |at: fn(&(usize, f64, f64)) -> f64| {
            let hit = curve.iter().find(|point| at(point) <= target);
            hit.map(|point| point.0)
        };
        Ok(Run {
            task: self.name().into(),
            job: *job,
            trainable_parameters: trainer.tuner.trainable(),
            steps_to_target: reached(|point| point.2),
            validation_steps_to_target: reached(|point| point.1),
            quality,
            frozen: self.frozen,
            seconds_per_step: seconds / made.max(1) as f64,
            diverged: made < self.steps || quality.validation >= self.frozen.validation,
            weight_change: None,
            curve,
            trace: Vec::new(),
        })
    }

    /// A margin in logarithms is a share of the perplexity.
    fn score(&self, quality: f64) -> f64 {
        -quality.ln()
    }

    /// Two thirds of the perplexity before.
    fn target(&self) -> f64 {
        self.frozen.test * 2. / 3.
    }

    fn batch(&self) -> usize {
        BATCH
    }
}

/// Whether a loss or gradient was not finite.
fn is_divergence(error: &anyhow::Error) -> bool {
    matches!(
        error.downcast_ref(),
        Some(candle_doft::Error::Diverged { .. })
    )
}
