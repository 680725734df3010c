//! Training in several processes: here ranks are threads of one, and processes of `mpirun` where the feature
//! `mpi` is built in.

#[path = "../support/mod.rs"]
mod common;

mod bits;
mod failures;
#[cfg(feature = "mpi")]
mod mpi;
mod run;
mod sharded;
mod talk;
mod threads;
