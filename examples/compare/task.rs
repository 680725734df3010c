//! What is adapted to what: digits turned, and pairs of digits turned, mirrored, noisy and covered.

use crate::record::{Job, Quality, Run};
use crate::support::device::DeviceName;
use crate::support::digits::{Digits, Examples, SIDE, Split};
use crate::support::network::{BATCH, Net, accuracy};
use anyhow::Result;
use candle_core::{Device, Tensor};
use candle_doft::rng::SplitMix64;
use candle_nn::Linear;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

/// Something to adapt to, whose runs are told apart by their jobs.
pub trait Task: Sync {
    fn name(&self) -> &'static str;

    /// What the result of a run depends on beside its job.
    fn settings(&self) -> Value;

    /// Makes ready what the runs of a seed share.
    fn prepare(&self, seed: u64) -> Result<()>;

    fn run(&self, job: &Job) -> Result<Run>;

    /// Quality as a number that grows: an accuracy, or the negative logarithm of a perplexity.
    fn score(&self, quality: f64) -> f64;

    /// Scores this close to the best count as equally good.
    fn margin(&self) -> f64 {
        0.02
    }

    /// The quality that `steps_to_target` counts to.
    fn target(&self) -> f64;

    fn batch(&self) -> usize;
}

/// Settings with the device, for runs of two are not the same to the bit. Those on a CPU are told by none:
/// folders of runs were written before there was a choice.
pub fn with_device(mut settings: Value, place: DeviceName) -> Value {
    if place != DeviceName::Cpu {
        settings["device"] = json!(place.to_string());
    }
    settings
}

/// The two tasks on digits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// One digit, turned by 90 degrees; 10 classes.
    Turned,
    /// Two digits side by side, each turned, mirrored, noisy and partly covered; 100 classes.
    Pairs,
}

/// How long a run is.
#[derive(Clone, Copy, Debug)]
pub struct Length {
    pub steps: usize,
    pub warmup: u64,
    pub base_steps: usize,
}

/// A frozen network and its data, all of one seed.
pub struct Prepared {
    pub base: Net<Linear>,
    pub train: Examples,
    pub validation: Examples,
    pub test: Examples,
    original: Examples,
    pub frozen: Quality,
}

type Slot = Arc<Mutex<Option<Arc<Prepared>>>>;

/// A task on digits; the frozen networks are trained once for each seed.
pub struct DigitsTask {
    pub kind: Kind,
    pub length: Length,
    pub place: DeviceName,
    pub device: Device,
    prepared: Mutex<BTreeMap<u64, Slot>>,
}

/// Noise on pairs, and the side of the square that is covered of each digit.
const NOISE: f64 = 0.15;
const COVERED: usize = 2;

/// Pairs to train the network on, to adapt it, to validate and to test.
const BASE_PAIRS: usize = 8192;
const TRAIN_PAIRS: usize = 4096;
const HELD_PAIRS: usize = 400;

impl DigitsTask {
    pub fn new(kind: Kind, length: Length, place: DeviceName) -> Result<Self> {
        Ok(Self {
            kind,
            length,
            place,
            device: place.open()?,
            prepared: Mutex::default(),
        })
    }

    pub fn widths(&self) -> [usize; 4] {
        match self.kind {
            Kind::Turned => [64, 256, 256, 10],
            Kind::Pairs => [128, 256, 256, 100],
        }
    }

    /// The frozen network and the data of a seed.
    pub fn prepared(&self, seed: u64) -> Result<Arc<Prepared>> {
        let slot = {
            let mut all = self.prepared.lock().unwrap_or_else(|e| e.into_inner());
            all.entry(seed).or_default().clone()
        };
        let mut slot = slot.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(prepared) = &*slot {
            return Ok(prepared.clone());
        }
        let prepared = Arc::new(self.make(seed)?);
        *slot = Some(prepared.clone());
        Ok(prepared)
    }

    fn make(&self, seed: u64) -> Result<Prepared> {
        let split = Digits::load()?.split(seed);
        let (upright, original, data) = match self.kind {
            Kind::Turned => turned(&split, &self.device)?,
            Kind::Pairs => pairs(&split, seed, &self.device)?,
        };
        let [train, validation, test] = data;
        let steps = self.length.base_steps;
        let base = Net::trained(self.widths(), &upright, seed, steps, || {})?;
        let mut prepared = Prepared {
            base,
            train,
            validation,
            test,
            original,
            frozen: Quality {
                validation: 0.,
                test: 0.,
                original_task: 0.,
            },
        };
        prepared.frozen = prepared.quality(&|images| prepared.base.forward(images))?;
        Ok(prepared)
    }
}

impl Task for DigitsTask {
    fn name(&self) -> &'static str {
        match self.kind {
            Kind::Turned => "turned",
            Kind::Pairs => "pairs",
        }
    }

    fn settings(&self) -> Value {
        let settings = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "task": self.name(),
            "steps": self.length.steps,
            "warmup": self.length.warmup,
            "base_steps": self.length.base_steps,
            "batch": BATCH,
            "target": self.target(),
        });
        with_device(settings, self.place)
    }

    fn prepare(&self, seed: u64) -> Result<()> {
        self.prepared(seed).map(|_| ())
    }

    fn run(&self, job: &Job) -> Result<Run> {
        crate::run::adapt(self, job)
    }

    fn score(&self, quality: f64) -> f64 {
        quality
    }

    // What every method of about 10,000 parameters reached in a trial.
    fn target(&self) -> f64 {
        match self.kind {
            Kind::Turned => 0.9,
            Kind::Pairs => 0.2,
        }
    }

    fn batch(&self) -> usize {
        BATCH
    }
}

type Forward<'a> = &'a dyn Fn(&Tensor) -> candle_core::Result<Tensor>;

impl Prepared {
    pub fn validation_and_test(&self, forward: Forward) -> Result<(f64, f64)> {
        let of = |examples: &Examples| accuracy(&forward(&examples.images)?, &examples.labels);
        Ok((of(&self.validation)?, of(&self.test)?))
    }

    pub fn quality(&self, forward: Forward) -> Result<Quality> {
        let (validation, test) = self.validation_and_test(forward)?;
        let original = accuracy(&forward(&self.original.images)?, &self.original.labels)?;
        Ok(Quality {
            validation,
            test,
            original_task: original,
        })
    }
}

/// What the network learns first, the test of that, and the splits to adapt to.
type Parts = (Examples, Examples, [Examples; 3]);

fn turned(split: &Split, device: &Device) -> Result<Parts> {
    let of = |digits: &Digits| digits.examples(device);
    let to = split.turned();
    Ok((
        of(&split.train)?,
        of(&split.test)?,
        [of(&to.train)?, of(&to.validation)?, of(&to.test)?],
    ))
}

fn pairs(split: &Split, seed: u64, device: &Device) -> Result<Parts> {
    let draw = |digits: &Digits, count: usize, stream: u64, shifted: bool| {
        pair_up(
            digits,
            count,
            seed.wrapping_mul(16).wrapping_add(stream),
            shifted,
            device,
        )
    };
    Ok((
        draw(&split.train, BASE_PAIRS, 1, false)?,
        draw(&split.test, HELD_PAIRS, 2, false)?,
        [
            draw(&split.train, TRAIN_PAIRS, 3, true)?,
            draw(&split.validation, HELD_PAIRS, 4, true)?,
            draw(&split.test, HELD_PAIRS, 5, true)?,
        ],
    ))
}

/// `count` images of two digits of one split, side by side.
fn pair_up(
    digits: &Digits,
    count: usize,
    seed: u64,
    shifted: bool,
    device: &Device,
) -> Result<Examples> {
    let mut rng = SplitMix64::new(seed ^ 0x70_6169_7273);
    let seen = if shifted {
        digits.turned()
    } else {
        digits.clone()
    };
    let (mut pixels, mut labels) = (Vec::new(), Vec::new());
    for _ in 0..count {
        let two = [rng.below(digits.len()), rng.below(digits.len())];
        let mut image = [0f32; 2 * SIDE * SIDE];
        for (side, i) in two.into_iter().enumerate() {
            let corner = [rng.below(SIDE - COVERED + 1), rng.below(SIDE - COVERED + 1)];
            for row in 0..SIDE {
                for column in 0..SIDE {
                    let at = row * 2 * SIDE + side * SIDE + column;
                    image[at] = match shifted {
                        false => seen.images[i][row * SIDE + column],
                        true => {
                            let noise = NOISE * rng.normal();
                            let within =
                                |at: usize, from: usize| (from..from + COVERED).contains(&at);
                            let covered = within(row, corner[0]) && within(column, corner[1]);
                            // Mirrored: columns from the right.
                            let ink = seen.images[i][row * SIDE + SIDE - 1 - column];
                            (if covered { 0. } else { ink }) + noise as f32
                        }
                    };
                }
            }
        }
        pixels.extend(image);
        labels.push(digits.labels[two[0]] * 10 + digits.labels[two[1]]);
    }
    Ok(Examples::new(pixels, labels, device)?)
}
