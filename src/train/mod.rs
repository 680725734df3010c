//! What candle lacks for a real run: gradients summed over micro-batches and clipped together, AdamW
//! with groups and a state that can be saved, schedules, checkpoints, and activations that are made again
//! instead of kept. [`parallel`] shares the micro-batches of a step among several processes.
//!
//! # Examples
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use candle_doft::train::{AdamW, Checkpoint, Schedule};
//! use candle_doft::{Adapter, DoftConfig};
//! use candle_nn::{Module, ParamsAdamW, VarBuilder};
//!
//! # let device = Device::Cpu;
//! # let folder = tempfile::tempdir().unwrap();
//! # let path = folder.path().join("checkpoint.safetensors");
//! # let vb = VarBuilder::zeros(DType::F64, &device); // your checkpoint
//! # let batches = vec![Tensor::ones((2, 64), DType::F64, &device)?; 2];
//! let builder = Adapter::builder(DoftConfig::default(), &device)?;
//! let layer = builder.linear(64, 8, vb.pp("layer"))?;
//! let adapter = builder.finish()?;
//! # let start = layer.forward(&batches[0])?;
//! let params = ParamsAdamW { lr: 1e-3, weight_decay: 0., ..Default::default() };
//! let mut optimizer = AdamW::for_adapter(&adapter, params)?;
//! let schedule = Schedule::cosine(10, 100);
//! for step in 0..3 {
//!     adapter.set_step(step);
//!     let mut gradients = optimizer.gradients();
//!     for x in &batches {
//!         let loss = (layer.forward(x)? - 1.)?.sqr()?.mean_all()?;
//!         gradients.backward(&loss, 1. / batches.len() as f64)?;
//!     }
//!     gradients.clip(1.)?;
//!     optimizer.set_rate(schedule.rate(1e-3, step));
//!     optimizer.step(&gradients)?;
//!     Checkpoint::save(&path, &optimizer, adapter.config(), &("position", step))?;
//! }
//! Checkpoint::load(&path)?.restore(&mut optimizer)?; // in a new process, on a new model
//! assert_eq!(optimizer.steps(), 3);
//! # Ok::<(), candle_doft::Error>(())
//! ```

mod checkpoint;
mod gradients;
mod optimizer;
pub mod parallel;
mod recomputed;
mod schedule;

pub use checkpoint::Checkpoint;
pub use gradients::Gradients;
pub use optimizer::{AdamW, Group};
pub use recomputed::recomputed;
pub use schedule::{Decay, Schedule};
