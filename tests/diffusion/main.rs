//! Adapters with the names of diffusers on checkpoints in one file, which have other names and weights in
//! which several layers stand one below the other.
//!
//! The models are built twice, by rules that share nothing with those of the library: under the names of
//! diffusers, and converted to those of the original. An adapter that is merged into both has to give the same.

#[path = "../support/mod.rs"]
mod support;

mod families;
mod golden;
mod listed;
mod merged;
mod refusals;
mod spelling;
mod tables;
mod trained;
