//! A model under a method: its loss, its steps, and how well it reads held-out text.

use super::super::methods::{Method, Tuner, TunerBuilder};
use super::data::{Batch, Sequence};
use super::model::Model;
use super::weights::Weights;
use anyhow::{Result, ensure};
use candle_core::{Device, Tensor, Var};
use candle_doft::Pattern;
use candle_doft::train::parallel::{Processes, each, reduce};
use candle_doft::train::{AdamW, Gradients};
use candle_nn::ParamsAdamW;
use std::sync::atomic::AtomicBool;

pub struct Trainer {
    pub tuner: Tuner,
    pub model: Model,
    /// None where nothing trains.
    pub optimizer: Option<AdamW>,
    device: Device,
}

/// How a step is made.
#[derive(Clone, Copy, Debug)]
pub struct StepOptions {
    /// Steps that were made before.
    pub step: u64,
    pub rate: f64,
    /// Largest norm of the gradient.
    pub clip: f64,
    /// Makes the activations of a block again in the backward pass.
    pub again: bool,
}

/// Who makes a step together, and whether this process was asked to stop.
#[derive(Clone, Copy)]
pub struct Team<'a> {
    pub group: &'a dyn Processes,
    pub stop: &'a AtomicBool,
}

/// What a step came to, on all processes.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// The mean loss of a token before it.
    pub loss: f64,
    /// Whether a process was asked to stop.
    pub stop: bool,
    /// Seconds of the reduction over processes: of the one that came last, which waited for no other.
    pub reduction: f64,
}

impl Trainer {
    /// The model over its weights. Weights do not decay.
    pub fn new(
        weights: &Weights,
        method: Method,
        seed: u64,
        targets: &[Pattern],
        device: &Device,
    ) -> Result<Self> {
        let nothing = matches!(method, Method::Frozen);
        let builder = TunerBuilder::new(method, seed, device)?.with_targets(targets)?;
        let model = Model::new(weights, &builder, device)?;
        let tuner = builder.finish()?;
        let params = ParamsAdamW {
            weight_decay: 0.,
            ..Default::default()
        };
        let optimizer = match nothing {
            true => None,
            false => Some(tuner.optimizer(params)?),
        };
        Ok(Self {
            tuner,
            model,
            optimizer,
            device: device.clone(),
        })
    }

    pub fn loss(&self, batch: &Batch, embedded: &Tensor, again: bool) -> Result<Tensor> {
        let hidden = self.model.hidden(embedded, again)?;
        let hidden = hidden.flatten_to(1)?.index_select(&batch.rows, 0)?;
        Ok(self.model.loss(&hidden, &batch.targets)?)
    }

    /// One step over micro-batches, of which each process makes its share. An adapter's first step checks
    /// that every parameter got a gradient.
    pub fn step(&mut self, team: Team, batches: &[Batch], options: StepOptions) -> Result<Step> {
        let learned: usize = batches.iter().map(|batch| batch.tokens).sum();
        let share = |batch: &Batch| batch.tokens as f64 / learned as f64;
        let Some(optimizer) = &self.optimizer else {
            return self.untrained(batches, share, options.again);
        };
        let micro_batch = |gradients: &mut Gradients, key: u64, batch: &Batch| -> Result<f64> {
            if let Some(adapter) = self.tuner.adapter() {
                adapter.set_step(key);
            }
            let loss = self.loss(batch, &self.model.embed(&batch.ids)?, options.again)?;
            let grads = gradients.backward(&loss, share(batch))?;
            if let (Some(adapter), 0) = (self.tuner.adapter(), options.step) {
                let report = adapter.check_gradients(&grads)?;
                if !report.zero.is_empty() && team.group.rank() == 0 {
                    eprintln!("note: {report}");
                }
            }
            Ok(share(batch) * f64::from(loss.to_scalar::<f32>()?))
        };
        let Team { group, stop } = team;
        let count = batches.len();
        let made = reduce(group, optimizer.gradients(), count, stop, |sums, micro| {
            micro_batch(sums, micro.key, &batches[micro.index])
        })?;
        let own = made.exchange.as_secs_f64();
        let reduction = each(group, group.size(), |_| anyhow::Ok(own))?;
        let reduction = reduction.into_iter().fold(f64::INFINITY, f64::min);
        let step = options.step + 1;
        ensure!(
            made.loss.is_finite(),
            "step {step}: the loss is {}",
            made.loss
        );
        let mut gradients = made.gradients;
        gradients.clip(options.clip)?;
        if let Some(optimizer) = &mut self.optimizer {
            optimizer.set_rate(options.rate);
            optimizer.step(&gradients)?;
        }
        Ok(Step {
            loss: made.loss,
            stop: made.stop,
            reduction,
        })
    }

    /// The passes of a step in which nothing moves, in this process alone.
    fn untrained(
        &self,
        batches: &[Batch],
        share: impl Fn(&Batch) -> f64,
        again: bool,
    ) -> Result<Step> {
        let mut total = 0.;
        for batch in batches {
            let embedded = Var::from_tensor(&self.model.embed(&batch.ids)?)?;
            let loss = self.loss(batch, embedded.as_tensor(), again)?;
            total += share(batch) * f64::from(loss.to_scalar::<f32>()?);
            let grads = loss.backward()?;
            ensure!(
                grads.get(&embedded).is_some(),
                "no gradient reached the tokens"
            );
        }
        Ok(Step {
            loss: total,
            stop: false,
            reduction: 0.,
        })
    }

    /// The mean loss of a token of some sequences, `batch` of them at a time, of which each process takes
    /// its share.
    pub fn held_out(
        &self,
        group: &dyn Processes,
        sequences: &[Sequence],
        batch: usize,
    ) -> Result<f64> {
        let learned = |s: &Sequence| s.learned.iter().skip(1).filter(|learned| **learned).count();
        let tokens: usize = sequences.iter().map(learned).sum();
        let sequences: Vec<&Sequence> = sequences.iter().collect();
        let chunks: Vec<&[&Sequence]> = sequences.chunks(batch).collect();
        self.tuner.eval(|| {
            let losses = each(group, chunks.len(), |chunk| -> Result<f64> {
                let batch = Batch::new(chunks[chunk], &self.device)?;
                let loss = self.loss(&batch, &self.model.embed(&batch.ids)?, false)?;
                Ok(f64::from(loss.to_scalar::<f32>()?) * batch.tokens as f64)
            })?;
            Ok(losses.iter().sum::<f64>() / tokens as f64)
        })
    }
}
