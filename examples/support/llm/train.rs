//! A model under a method: its loss, its steps, and how well it reads held-out text.

use super::super::methods::{Method, Tuner, TunerBuilder};
use super::data::{Batch, Sequence};
use super::model::Model;
use super::weights::Weights;
use anyhow::{Result, ensure};
use candle_core::{Device, Tensor, Var};
use candle_doft::Pattern;
use candle_doft::train::AdamW;
use candle_nn::ParamsAdamW;

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

    /// One step over micro-batches; the mean loss of a token before it. An adapter's first step
    /// checks that every parameter got a gradient.
    pub fn step(&mut self, batches: &[Batch], options: StepOptions) -> Result<f64> {
        let learned: usize = batches.iter().map(|batch| batch.tokens).sum();
        if let Some(adapter) = self.tuner.adapter() {
            adapter.set_step(options.step);
        }
        let mut gradients = self.optimizer.as_ref().map(AdamW::gradients);
        let mut total = 0.;
        for batch in batches {
            let mut embedded = self.model.embed(&batch.ids)?;
            if self.optimizer.is_none() {
                embedded = Var::from_tensor(&embedded)?.as_tensor().clone();
            }
            let loss = self.loss(batch, &embedded, options.again)?;
            let share = batch.tokens as f64 / learned as f64;
            total += share * f64::from(loss.to_scalar::<f32>()?);
            match &mut gradients {
                Some(gradients) => {
                    let grads = gradients.backward(&loss, share)?;
                    if let (Some(adapter), 0) = (self.tuner.adapter(), options.step) {
                        let report = adapter.check_gradients(&grads)?;
                        if !report.zero.is_empty() {
                            eprintln!("note: {report}");
                        }
                    }
                }
                None => {
                    let grads = loss.backward()?;
                    ensure!(
                        grads.get(&embedded).is_some(),
                        "no gradient reached the tokens"
                    );
                }
            }
        }
        ensure!(
            total.is_finite(),
            "step {}: the loss is {total}",
            options.step + 1
        );
        if let (Some(optimizer), Some(mut gradients)) = (&mut self.optimizer, gradients) {
            gradients.clip(options.clip)?;
            optimizer.set_rate(options.rate);
            optimizer.step(&gradients)?;
        }
        Ok(total)
    }

    /// The mean loss of a token of some sequences, `batch` of them at a time.
    pub fn held_out(&self, sequences: &[Sequence], batch: usize) -> Result<f64> {
        self.tuner.eval(|| {
            let (mut total, mut tokens) = (0., 0);
            let sequences: Vec<&Sequence> = sequences.iter().collect();
            for chunk in sequences.chunks(batch) {
                let batch = Batch::new(chunk, &self.device)?;
                let loss = self.loss(&batch, &self.model.embed(&batch.ids)?, false)?;
                total += f64::from(loss.to_scalar::<f32>()?) * batch.tokens as f64;
                tokens += batch.tokens;
            }
            Ok(total / tokens as f64)
        })
    }
}
