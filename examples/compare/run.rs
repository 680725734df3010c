//! One run on digits: the frozen network, a method, a rate, and what came of it.

use crate::record::{Job, Look, Quality, Run};
use crate::support::digits::Batches;
use crate::support::methods::{Tuned, Tuner, TunerBuilder};
use crate::support::network::{BATCH, Net};
use crate::task::{DigitsTask, Prepared, Task};
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_doft::train::{AdamW, Schedule};
use candle_doft::{DoftLinear, Error, rotation};
use candle_nn::{Linear, ParamsAdamW, loss};
use std::time::Instant;

/// A network under a method, and its optimizer. Weights do not decay and gradients are not clipped.
pub struct Adapted {
    pub tuner: Tuner,
    pub net: Net<Tuned>,
    pub optimizer: AdamW,
}

impl Adapted {
    pub fn new(base: &Net<Linear>, job: &Job) -> Result<Self> {
        let method = job.entry.method(job.seed);
        let device = base
            .layers()
            .next()
            .map(|(_, layer)| layer.weight().device());
        let device = device.context("a network without layers")?;
        let builder = TunerBuilder::new(method, job.seed, device)?;
        let net = base.each(|name, layer| builder.wrap_linear(name, layer.clone()))?;
        let tuner = builder.finish()?;
        let params = ParamsAdamW {
            lr: job.lr,
            weight_decay: 0.,
            ..Default::default()
        };
        let mut optimizer = tuner.optimizer(params)?;
        if tuner.adapter().is_some() {
            optimizer.set_group_rate(AdamW::MAGNITUDES, job.magnitude_rate)?;
        }
        Ok(Self {
            tuner,
            net,
            optimizer,
        })
    }

    /// One step; the loss before it, or nothing where it or a gradient is not finite.
    pub fn step(&mut self, images: &Tensor, labels: &Tensor, rate: f64) -> Result<Option<f64>> {
        let loss = loss::cross_entropy(&self.net.forward(images)?, labels)?;
        let mut gradients = self.optimizer.gradients();
        self.optimizer.set_rate(rate);
        let stepped = gradients
            .backward(&loss, 1.)
            .and_then(|_| self.optimizer.step(&gradients));
        match stepped {
            Ok(()) => Ok(Some(f64::from(loss.to_scalar::<f32>()?))),
            Err(Error::Diverged { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// Looks often at the start, where the curves part, and every 10 steps later.
fn due(step: usize, steps: usize) -> bool {
    step.is_multiple_of(if step <= 60 { 5 } else { 10 }) || step == steps
}

pub fn adapt(task: &DigitsTask, job: &Job) -> Result<Run> {
    let prepared = task.prepared(job.seed)?;
    let mut adapted = Adapted::new(&prepared.base, job)?;
    let steps = task.length.steps;
    let schedule = Schedule::cosine(task.length.warmup, steps as u64);
    // All methods of a seed see the same batches.
    let mut batches = Batches::new(&prepared.train, BATCH, job.seed.wrapping_add(1));
    let mut curve = vec![(0, prepared.frozen.validation, prepared.frozen.test)];
    let mut trace = Vec::new();
    let mut losses = Vec::new();
    let mut seconds = 0.;
    for step in 0..steps {
        let start = Instant::now();
        let (images, labels) = batches.next_batch()?;
        let rate = schedule.rate(job.lr, step as u64);
        let Some(loss) = adapted.step(&images, &labels, rate)? else {
            break;
        };
        losses.push(loss);
        seconds += start.elapsed().as_secs_f64();
        if due(step + 1, steps) {
            let seen = adapted
                .tuner
                .eval(|| prepared.validation_and_test(&|images| adapted.net.forward(images)))?;
            curve.push((step + 1, seen.0, seen.1));
            if job.traced {
                trace.extend(look(&adapted.net, step + 1)?);
            }
        }
    }
    let quality = || prepared.quality(&|images| adapted.net.forward(images));
    let quality = adapted.tuner.eval(quality)?;
    let reached = |at: fn(&(usize, f64, f64)) -> f64| {
        let hit = curve.iter().find(|point| at(point) >= task.target());
        hit.map(|point| point.0)
    };
    Ok(Run {
        task: task.name().into(),
        job: *job,
        trainable_parameters: adapted.tuner.trainable(),
        steps_to_target: reached(|point| point.2),
        validation_steps_to_target: reached(|point| point.1),
        frozen: prepared.frozen,
        seconds_per_step: seconds / losses.len().max(1) as f64,
        diverged: diverged(&losses, steps, &quality, &prepared.frozen),
        weight_change: Some(weight_change(&prepared, &adapted.net)?),
        quality,
        curve,
        trace,
    })
}

/// A loss or gradient was not finite, or the run ends no better than the frozen network: its last
/// tenth of losses above the first one, or its validation accuracy below.
fn diverged(losses: &[f64], steps: usize, quality: &Quality, frozen: &Quality) -> bool {
    let last = &losses[losses.len() - losses.len().div_ceil(10)..];
    let last = last.iter().sum::<f64>() / last.len().max(1) as f64;
    losses.len() < steps
        || last.is_nan()
        || losses.first().is_some_and(|first| last > *first)
        || quality.validation <= frozen.validation
}

/// `||W_eff - W|| / ||W||` over all layers.
fn weight_change(prepared: &Prepared, net: &Net<Tuned>) -> Result<f64> {
    let square = |x: &Tensor| -> Result<f64> {
        // To the host first: Metal has no f64.
        let x = x.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
        let sum = x.sqr()?.sum_all()?;
        Ok(sum.to_scalar()?)
    };
    let (mut change, mut whole) = (0., 0.);
    for ((_, base), (_, layer)) in prepared.base.layers().zip(net.layers()) {
        change += square(&(layer.merge()?.weight() - base.weight())?)?;
        whole += square(base.weight())?;
    }
    Ok(finite((change / whole).sqrt()))
}

/// JSON knows no infinity.
fn finite(value: f64) -> f64 {
    if value.is_finite() { value } else { f64::MAX }
}

/// The state of the rotations; nothing where there are none.
pub fn look(net: &Net<Tuned>, step: usize) -> Result<Option<Look>> {
    let (mut orthogonality, mut drifts) = (0f64, Vec::new());
    for (_, layer) in net.layers() {
        let Tuned::Adapted(layer) = layer else {
            return Ok(None);
        };
        orthogonality = orthogonality.max(rotation::orthogonality_error(&layer.rotation()?)?);
        drifts.extend(norm_drifts(layer)?);
    }
    let largest = drifts.iter().copied().fold(0., f64::max);
    Ok(Some(Look {
        step,
        orthogonality_error: finite(orthogonality),
        norm_drift_mean: finite(drifts.iter().sum::<f64>() / drifts.len() as f64),
        norm_drift_max: finite(largest),
    }))
}

/// By how much the norm of each row of the weight that acts is off from the magnitude that says it.
fn norm_drifts(layer: &DoftLinear) -> Result<Vec<f64>> {
    let norms = candle_doft::params::row_norms(&layer.effective_weight()?)?;
    let said = layer.magnitude()?;
    let drift = (norms.div(&said)? - 1.)?
        .abs()?
        .to_device(&Device::Cpu)?
        .to_dtype(DType::F64)?;
    drift.to_vec1().context("the norms of the rows")
}
