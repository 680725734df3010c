//! The engine on MPI.

use super::Processes;
use super::agree::rank;
use crate::error::{Error, Result};
use ferrompi::{Communicator, ThreadLevel};
use std::time::Duration;

/// How long the launcher has for what was printed before all are ended.
const LAST_WORDS: Duration = Duration::from_millis(300);

/// All processes of an `mpirun`.
pub(super) struct Mpi {
    // Before the handle of the library, whose drop ends it.
    world: Communicator,
    library: Option<ferrompi::Mpi>,
}

impl Mpi {
    pub(super) fn new() -> Result<Self> {
        // Products run on other threads, but only this one talks to other ranks.
        let library = ferrompi::Mpi::init_thread(ThreadLevel::Funneled).map_err(|error| {
            let expected = "a start by `mpirun`, once";
            Error::argument("parallel::open", "MPI", error.to_string(), expected)
        })?;
        Ok(Self {
            world: library.world(),
            library: Some(library),
        })
    }

    fn said(&self) -> impl Fn(ferrompi::Error) -> Error {
        let at = self.rank();
        move |error| rank(at, format!("MPI: {error}"))
    }
}

impl Processes for Mpi {
    fn rank(&self) -> usize {
        self.world.rank() as usize
    }

    fn size(&self) -> usize {
        self.world.size() as usize
    }

    fn all_to_all(&self, send: &[u8], received: &mut [u8]) -> Result<()> {
        self.world.alltoall(send, received).map_err(self.said())
    }

    fn all_gather(&self, send: &[u8], received: &mut [u8]) -> Result<()> {
        self.world.allgather(send, received).map_err(self.said())
    }

    fn abort(&self, code: i32) -> ! {
        self.world.abort(code)
    }

    fn finish(mut self: Box<Self>) -> Result<()> {
        self.world.barrier().map_err(self.said())?;
        self.library = None;
        Ok(())
    }
}

impl Drop for Mpi {
    /// Not finished: this rank comes to no exchange any more, and the others would wait in theirs for ever.
    fn drop(&mut self) {
        if self.library.is_some() {
            let code = if std::thread::panicking() { 101 } else { 1 };
            // MPICH's launcher loses what was printed just before, and other ranks may be about to tell more.
            std::thread::sleep(LAST_WORDS);
            self.world.abort(code);
        }
    }
}
