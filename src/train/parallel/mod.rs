#![doc = include_str!("scaling.md")]

mod agree;
#[cfg(feature = "mpi")]
mod mpi;
mod open;
mod reduce;
mod replicas;
mod sharded;
mod tree;

pub use agree::{agree, any, each, lead, same};
pub use open::open;
pub use reduce::{Micro, Reduced, reduce};
pub use replicas::check_replicas;
pub use sharded::{
    ColumnParallel, DoftColumnParallel, DoftRowParallel, Exchange, RowParallel, Sharded, save,
};

use crate::error::Result;
use std::ops::Range;

/// The processes of a run: what an engine has to give. Sums are made by the crate, for an engine's own
/// depend on how many processes there are, so an engine moves bytes alone.
///
/// Every function but `abort` is called by all ranks, in the same order and with buffers of the same length.
/// [`open`] returns the engine that the program was started under, or [`Alone`].
pub trait Processes {
    /// The number of this process, from 0.
    fn rank(&self) -> usize;

    /// How many there are.
    fn size(&self) -> usize;

    /// Sends an equal part of `send` to each rank, in their order, and receives one of each.
    ///
    /// # Errors
    ///
    /// [`Error::Rank`](crate::Error::Rank) with what the engine said.
    fn all_to_all(&self, send: &[u8], received: &mut [u8]) -> Result<()>;

    /// Sends all of `send` to each rank, and receives what they send, in their order.
    ///
    /// # Errors
    ///
    /// [`Error::Rank`](crate::Error::Rank) with what the engine said.
    fn all_gather(&self, send: &[u8], received: &mut [u8]) -> Result<()>;

    /// Ends all processes at once, with this exit code.
    fn abort(&self, code: i32) -> !;

    /// The end of a run that went well, when all ranks have come to it. A group that is dropped without,
    /// by an error that is returned or by a panic, ends all processes: the others would wait for this one.
    ///
    /// # Errors
    ///
    /// [`Error::Rank`](crate::Error::Rank) with what the engine said.
    fn finish(self: Box<Self>) -> Result<()>;
}

/// The group of one process: every exchange is a copy.
#[derive(Clone, Copy, Debug, Default)]
pub struct Alone;

impl Processes for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn all_to_all(&self, send: &[u8], received: &mut [u8]) -> Result<()> {
        received.copy_from_slice(send);
        Ok(())
    }

    fn all_gather(&self, send: &[u8], received: &mut [u8]) -> Result<()> {
        received.copy_from_slice(send);
        Ok(())
    }

    fn abort(&self, code: i32) -> ! {
        std::process::exit(code)
    }

    fn finish(self: Box<Self>) -> Result<()> {
        Ok(())
    }
}

/// Which of `count` pieces of work are this rank's: contiguous, and one more at most than another's.
pub fn share(group: &dyn Processes, count: usize) -> Range<usize> {
    let at = |rank: usize| count * rank / group.size();
    at(group.rank())..at(group.rank() + 1)
}

/// What every rank sends, in the order of ranks.
fn gather(group: &dyn Processes, send: &[u8]) -> Result<Vec<Vec<u8>>> {
    let mut received = vec![0; send.len() * group.size()];
    group.all_gather(send, &mut received)?;
    let rows = received.chunks_exact(send.len().max(1));
    Ok(rows.map(<[u8]>::to_vec).collect())
}
