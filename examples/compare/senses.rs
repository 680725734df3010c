//! The task on an encoder: to which of WordNet's 26 noun files a gloss belongs.
//!
//! The head is the mean vector of each file's training glosses under the frozen encoder and does not train, so that a
//! method is all that differs. General ability is the mean reciprocal rank of a verb's gloss for its words.

use crate::record::{Job, Quality, Run};
use crate::support::encoder::{Encoder, Files, Tokens, unit};
use crate::support::methods::{Method, Tuner, TunerBuilder};
use crate::support::network::accuracy;
use crate::task::Task;
use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor};
use candle_doft::Error;
use candle_doft::rng::SplitMix64;
use candle_doft::train::{AdamW, Schedule};
use candle_nn::{ParamsAdamW, loss};
use flate2::read::GzDecoder;
use serde_json::{Value, json};
use std::cmp::Ordering;
use std::path::Path;
use std::time::Instant;

const DATA: &[u8] = include_bytes!("../data/senses.jsonl.gz");

const FILES: usize = 26;
const BATCH: usize = 16;
const LENGTH: usize = 32;

/// Glosses that go through the encoder at once where nothing trains.
const TOGETHER: usize = 32;

/// Cosines are multiplied by this before the softmax.
const SCALE: f64 = 20.;

/// Looks at the held-out glosses along a run.
const LOOKS: usize = 4;

#[derive(serde::Deserialize)]
struct Line {
    split: String,
    file: Option<u32>,
    words: String,
    gloss: String,
}

/// Glosses with their files, tokenized in parts.
struct Held {
    parts: Vec<Tokens>,
    labels: Tensor,
}

pub struct SensesTask {
    files: Files,
    name: String,
    train: Vec<(String, u32)>,
    validation: Held,
    test: Held,
    /// Words of verbs, and their glosses.
    verbs: [Vec<Tokens>; 2],
    head: Tensor,
    frozen: Quality,
    steps: usize,
    /// Every so many held-out glosses are looked at.
    every: usize,
}

/// An encoder under a method.
struct Adapted {
    tuner: Tuner,
    encoder: Encoder,
}

impl Adapted {
    fn new(files: &Files, method: Method, seed: u64) -> Result<Self> {
        let builder = TunerBuilder::new(method, seed, &Device::Cpu)?;
        let encoder = Encoder::new(files, &builder)?;
        Ok(Self {
            encoder,
            tuner: builder.finish()?,
        })
    }

    /// The vectors of all parts, no graph kept.
    fn vectors(&self, parts: &[Tokens]) -> Result<Tensor> {
        let rows = self.tuner.eval(|| -> Result<Vec<Tensor>, Error> {
            let of = |tokens| Ok(self.encoder.forward(tokens)?.detach());
            parts.iter().map(of).collect()
        })?;
        Ok(Tensor::cat(&rows, 0)?)
    }
}

fn in_parts(files: &Files, texts: &[&str]) -> Result<Vec<Tokens>> {
    texts.chunks(TOGETHER).map(|t| files.tokens(t)).collect()
}

fn lines() -> Result<Vec<Line>> {
    let text = std::io::read_to_string(GzDecoder::new(DATA)).context("senses.jsonl.gz")?;
    let lines = text.lines().map(serde_json::from_str);
    lines
        .collect::<Result<_, _>>()
        .context("a line of senses.jsonl.gz")
}

impl SensesTask {
    pub fn new(model: &str, steps: usize, every: usize) -> Result<Self> {
        let files = Files::open(Path::new(model), LENGTH)?;
        let lines = lines()?;
        let of = |split: &'static str| lines.iter().filter(move |line| line.split == split);
        let held = |split| -> Result<Held> {
            let chosen: Vec<&Line> = of(split).step_by(every).collect();
            let texts: Vec<&str> = chosen.iter().map(|line| line.gloss.as_str()).collect();
            let labels: Option<Vec<u32>> = chosen.iter().map(|line| line.file).collect();
            Ok(Held {
                parts: in_parts(&files, &texts)?,
                labels: Tensor::new(labels.context("a noun without its file")?, &Device::Cpu)?,
            })
        };
        let verbs = |text: fn(&Line) -> &str| {
            let texts: Vec<&str> = of("verb").step_by(every).map(text).collect();
            in_parts(&files, &texts)
        };
        let train = of("train").map(|line| Some((line.gloss.clone(), line.file?)));
        let train: Option<Vec<_>> = train.collect();
        let name = Path::new(model).file_name();
        let mut task = Self {
            name: name.map_or(String::new(), |name| name.to_string_lossy().into()),
            train: train.context("a noun without its file")?,
            validation: held("validation")?,
            test: held("test")?,
            verbs: [verbs(|line| &line.words)?, verbs(|line| &line.gloss)?],
            files,
            head: Tensor::zeros(1, candle_core::DType::F32, &Device::Cpu)?,
            frozen: Quality {
                validation: 0.,
                test: 0.,
                original_task: 0.,
            },
            steps,
            every,
        };
        let base = Adapted::new(&task.files, Method::Frozen, 0)?;
        task.head = task.centres(&base)?;
        task.frozen = task.quality(&base)?;
        Ok(task)
    }

    /// The mean vector of each file's training glosses, brought to length 1.
    fn centres(&self, base: &Adapted) -> Result<Tensor> {
        let texts: Vec<&str> = self.train.iter().map(|(gloss, _)| gloss.as_str()).collect();
        let vectors = base.vectors(&in_parts(&self.files, &texts)?)?;
        let mut rows = vec![vec![0f32; texts.len()]; FILES];
        for (i, (_, file)) in self.train.iter().enumerate() {
            rows[*file as usize][i] = 1.;
        }
        Ok(unit(&Tensor::new(rows, &Device::Cpu)?.matmul(&vectors)?)?)
    }

    fn logits(&self, vectors: &Tensor) -> candle_core::Result<Tensor> {
        vectors.matmul(&self.head.t()?)? * SCALE
    }

    fn accuracy(&self, adapted: &Adapted, held: &Held) -> Result<f64> {
        accuracy(&self.logits(&adapted.vectors(&held.parts)?)?, &held.labels)
    }

    fn quality(&self, adapted: &Adapted) -> Result<Quality> {
        let [words, glosses] = &self.verbs;
        let (words, glosses) = (adapted.vectors(words)?, adapted.vectors(glosses)?);
        Ok(Quality {
            validation: self.accuracy(adapted, &self.validation)?,
            test: self.accuracy(adapted, &self.test)?,
            original_task: reciprocal_rank(&words.matmul(&glosses.t()?)?.to_vec2()?),
        })
    }

    fn batch_of(&self, rng: &mut SplitMix64) -> Result<(Tokens, Tensor)> {
        let chosen = (0..BATCH).map(|_| &self.train[rng.below(self.train.len())]);
        let (texts, labels): (Vec<&str>, Vec<u32>) =
            chosen.map(|(text, file)| (text.as_str(), *file)).unzip();
        let labels = Tensor::new(labels, &Device::Cpu)?;
        Ok((self.files.tokens(&texts)?, labels))
    }
}

/// Row `i` looks for column `i`: the mean of one over its place. A value that is no number comes last.
fn reciprocal_rank(cosines: &[Vec<f32>]) -> f64 {
    let of = |(i, row): (usize, &Vec<f32>)| {
        let worse = |c: &&f32| (*c).partial_cmp(&row[i]) == Some(Ordering::Less);
        let better = row.len() - row.iter().filter(worse).count();
        1. / better.max(1) as f64
    };
    cosines.iter().enumerate().map(of).sum::<f64>() / cosines.len() as f64
}

impl Task for SensesTask {
    fn name(&self) -> &'static str {
        "senses"
    }

    fn settings(&self) -> Value {
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "task": self.name(),
            "model": self.name,
            "steps": self.steps,
            "batch": BATCH,
            "length": LENGTH,
            "every": self.every,
        })
    }

    fn prepare(&self, _seed: u64) -> Result<()> {
        Ok(())
    }

    fn run(&self, job: &Job) -> Result<Run> {
        ensure!(!job.traced, "senses knows no studies of the rotation");
        let adapted = Adapted::new(&self.files, job.entry.method(job.seed), job.seed)?;
        let params = ParamsAdamW {
            weight_decay: 0.,
            ..Default::default()
        };
        let mut optimizer = adapted.tuner.optimizer(params)?;
        if adapted.tuner.adapter().is_some() {
            optimizer.set_group_rate(AdamW::MAGNITUDES, job.magnitude_rate)?;
        }
        let schedule = Schedule::cosine(self.steps as u64 / 20, self.steps as u64);
        let mut rng = SplitMix64::new(job.seed);
        let mut curve = vec![(0, self.frozen.validation, self.frozen.test)];
        let (mut made, mut seconds) = (0, 0.);
        while made < self.steps {
            let start = Instant::now();
            let (tokens, labels) = self.batch_of(&mut rng)?;
            let logits = self.logits(&adapted.encoder.forward(&tokens)?)?;
            let loss = loss::cross_entropy(&logits, &labels)?;
            let mut gradients = optimizer.gradients();
            optimizer.set_rate(schedule.rate(job.lr, made as u64));
            let stepped = gradients
                .backward(&loss, 1.)
                .and_then(|_| optimizer.step(&gradients));
            match stepped {
                Ok(()) => made += 1,
                Err(Error::Diverged { .. }) => break,
                Err(error) => return Err(error.into()),
            }
            seconds += start.elapsed().as_secs_f64();
            if made.is_multiple_of((self.steps / LOOKS).max(1)) && made < self.steps {
                let validation = self.accuracy(&adapted, &self.validation)?;
                curve.push((made, validation, self.accuracy(&adapted, &self.test)?));
            }
        }
        let quality = self.quality(&adapted)?;
        curve.push((made, quality.validation, quality.test));
        let reached = |at: fn(&(usize, f64, f64)) -> f64| {
            let hit = curve.iter().find(|point| at(point) >= self.target());
            hit.map(|point| point.0)
        };
        Ok(Run {
            task: self.name().into(),
            job: *job,
            trainable_parameters: adapted.tuner.trainable(),
            steps_to_target: reached(|point| point.2),
            validation_steps_to_target: reached(|point| point.1),
            quality,
            frozen: self.frozen,
            seconds_per_step: seconds / made.max(1) as f64,
            diverged: made < self.steps || quality.validation <= self.frozen.validation,
            weight_change: None,
            curve,
            trace: Vec::new(),
        })
    }

    fn score(&self, quality: f64) -> f64 {
        quality
    }

    /// A tenth of the frozen encoder's mistakes less.
    fn target(&self) -> f64 {
        1. - 0.9 * (1. - self.frozen.test)
    }

    fn batch(&self) -> usize {
        BATCH
    }
}
