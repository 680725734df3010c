//! A small network whose run is shared among ranks.

use crate::common::tensors::{CPU, seeded};
use candle_core::{DType, Tensor, Var};
use candle_doft::train::parallel::{Micro, Processes, Reduced, check_replicas, lead, reduce};
use candle_doft::train::{AdamW, Checkpoint, Gradients, Schedule};
use candle_doft::{Adapter, DoftConfig, DoftLinear, Error, Result};
use candle_nn::{Linear, Module, ParamsAdamW};
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

/// What happens to one rank, at one step (from 0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Its data cannot be read.
    Data,
    /// Its loss is no number.
    Loss,
    /// One of its gradients is no number, which it does not see itself.
    Gradient,
    /// Somebody asks it to stop.
    Stop,
    /// A bug.
    #[cfg_attr(not(feature = "mpi"), allow(dead_code, reason = "it ends the process"))]
    Panic,
    /// It is gone without a word.
    #[cfg_attr(not(feature = "mpi"), allow(dead_code, reason = "it ends the process"))]
    Killed,
    /// It returns by itself, and comes to no exchange any more.
    #[cfg_attr(not(feature = "mpi"), allow(dead_code, reason = "it ends the process"))]
    Alone,
}

#[derive(Clone, Debug)]
pub struct Plan {
    pub micro_batches: usize,
    pub steps: u64,
    pub dropout: f64,
    pub dtype: DType,
    /// Every micro-batch has the same data.
    pub repeated: bool,
    pub fault: Option<(Fault, usize, u64)>,
    /// Prints a line when the fault is due.
    pub told: bool,
    /// Where a run begins, and where it leaves a checkpoint.
    pub from: Option<PathBuf>,
    pub to: Option<PathBuf>,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            micro_batches: 4,
            steps: 5,
            dropout: 0.25,
            dtype: DType::F32,
            repeated: false,
            fault: None,
            told: false,
            from: None,
            to: None,
        }
    }
}

/// What a run leaves on a rank.
#[derive(Debug)]
pub struct Left {
    pub steps: u64,
    pub losses: Vec<f64>,
    /// The bits of all that is trained.
    pub bits: Vec<u64>,
    pub stopped: bool,
    pub error: Option<Error>,
}

impl Left {
    /// FNV-1a of the bits.
    #[cfg(feature = "mpi")]
    pub fn hash(&self) -> u64 {
        let start = 0xcbf2_9ce4_8422_2325;
        let bits = self.bits.iter();
        bits.fold(start, |hash: u64, bits| {
            (hash ^ bits).wrapping_mul(0x0100_0000_01b3)
        })
    }
}

pub struct Run {
    plan: Plan,
    adapter: Adapter,
    layers: Vec<DoftLinear>,
    pub optimizer: AdamW,
}

impl Run {
    pub fn new(plan: &Plan) -> Result<Self> {
        let config = DoftConfig::default()
            .with_block_size(8)
            .with_dropout(plan.dropout);
        let builder = Adapter::builder(config, &CPU)?;
        let mut layers = Vec::new();
        for (i, [width, out]) in [[32, 48], [48, 40]].into_iter().enumerate() {
            let weight = (seeded((out, width), i as u64) / (width as f64).sqrt())?;
            let linear = Linear::new(weight.to_dtype(plan.dtype)?, None);
            layers.push(builder.wrap(&format!("layer{i}"), linear)?);
        }
        let adapter = builder.finish()?;
        let params = ParamsAdamW {
            lr: 1e-2,
            weight_decay: 0.,
            ..Default::default()
        };
        let mut optimizer = AdamW::for_adapter(&adapter, params)?;
        if let Some(file) = &plan.from {
            Checkpoint::load(file)?.restore(&mut optimizer)?;
        }
        Ok(Self {
            plan: plan.clone(),
            adapter,
            layers,
            optimizer,
        })
    }

    /// Micro-batches have different numbers of tokens.
    fn tokens(&self, index: usize) -> usize {
        1 + (index * 5) % 7
    }

    fn loss(&self, micro: Micro) -> Result<Tensor> {
        let key = if self.plan.repeated { 0 } else { micro.key };
        let x = seeded((self.tokens(micro.index), 32), 100 + key).to_dtype(self.plan.dtype)?;
        let hidden = self.layers[0].forward(&x)?.tanh()?;
        let y = self.layers[1].forward(&hidden)?;
        Ok((y - 0.3)?.sqr()?.mean_all()?)
    }

    /// The micro-batch, without faults.
    pub fn micro(&self, gradients: &mut Gradients, micro: Micro) -> Result<f64> {
        let all: usize = (0..self.plan.micro_batches).map(|i| self.tokens(i)).sum();
        let share = self.tokens(micro.index) as f64 / all as f64;
        self.adapter.set_step(micro.key);
        let loss = self.loss(micro)?;
        gradients.backward(&loss, share)?;
        Ok(share * loss.to_dtype(DType::F64)?.to_scalar::<f64>()?)
    }

    pub fn step(&mut self, group: &dyn Processes) -> Result<Reduced> {
        let step = self.optimizer.steps();
        let due = self
            .plan
            .fault
            .filter(|(_, rank, at)| *rank == group.rank() && *at == step);
        let fault = due.map(|(fault, ..)| fault);
        if self.plan.told && fault.is_some() {
            println!("FAULT");
        }
        match fault {
            Some(Fault::Panic) => panic!("a bug"),
            Some(Fault::Killed) => std::process::abort(),
            Some(Fault::Alone) => return Err(Error::NoLayers),
            _ => {}
        }
        let stop = AtomicBool::new(fault == Some(Fault::Stop));
        let (empty, count) = (self.optimizer.gradients(), self.plan.micro_batches);
        let made = reduce(group, empty, count, &stop, |gradients, micro| match fault {
            Some(Fault::Data) => Err(Error::Io {
                path: "words.txt".into(),
                error: std::io::Error::other("cannot be read"),
            }),
            Some(Fault::Loss) => {
                gradients.backward(&(self.loss(micro)? * f64::NAN)?, 1.)?;
                Ok(0.)
            }
            Some(Fault::Gradient) => {
                let loss = self.micro(gradients, micro)?;
                let var = &self.optimizer.named_vars()[1].1;
                gradients.add(&(var.as_tensor() * f64::NAN)?.sum_all()?.backward()?, 1.)?;
                Ok(loss)
            }
            _ => self.micro(gradients, micro),
        })?;
        Ok(made)
    }

    pub fn bits(&self) -> Vec<u64> {
        let bits = |(_, var): (String, Var)| {
            let host = var.to_dtype(DType::F64).and_then(|v| v.flatten_all());
            host.and_then(|v| v.to_vec1::<f64>()).unwrap()
        };
        let all = self.optimizer.named_vars().into_iter().flat_map(bits);
        all.map(f64::to_bits).collect()
    }

    /// The steps of the plan.
    pub fn go(&mut self, group: &dyn Processes) -> Left {
        let (mut losses, mut stopped) = (Vec::new(), false);
        let mut steps = || -> Result<()> {
            let schedule = Schedule::cosine(2, 10);
            while self.optimizer.steps() < self.plan.steps && !stopped {
                let made = self.step(group)?;
                let mut gradients = made.gradients;
                gradients.clip(0.05)?;
                self.optimizer
                    .set_rate(schedule.rate(1e-2, self.optimizer.steps()));
                self.optimizer.step(&gradients)?;
                losses.push(made.loss);
                stopped = made.stop;
            }
            check_replicas(group, &self.optimizer)?;
            lead(group, || match &self.plan.to {
                Some(file) => Checkpoint::save(file, &self.optimizer, &(), &()),
                None => Ok(()),
            })
        };
        let error = steps().err();
        Left {
            steps: self.optimizer.steps(),
            losses,
            bits: self.bits(),
            stopped,
            error,
        }
    }
}

/// The run of a plan in a group.
pub fn train(group: &dyn Processes, plan: &Plan) -> Left {
    Run::new(plan).unwrap().go(group)
}
