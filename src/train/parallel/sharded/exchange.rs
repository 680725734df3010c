//! [`Exchange`]: the group of a run, within reach of layers.

use crate::error::{Error, Result};
use crate::train::parallel::Processes;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering};

// Operations of candle's graph must be `Send + Sync`; the handles of an engine need not be, and MPI that was
// opened for one thread must not be called by another. So a group stays in the thread that opened it, operations
// keep its number, and look it up where they run: in any other thread that finds nothing and is an error.
thread_local! {
    static GROUPS: RefCell<BTreeMap<u64, Box<dyn Processes>>> = const { RefCell::new(BTreeMap::new()) };
}

static NEXT: AtomicU64 = AtomicU64::new(0);

/// The group of a run for layers that communicate, such as [`DoftColumnParallel`](super::DoftColumnParallel). It is
/// [`Processes`] itself, so it serves for everything else as well.
///
/// It lives in the thread that made it: forward and backward passes of its layers run there. Layers keep no
/// hold of it: after [`Processes::finish`], or when it was dropped, they return an error.
///
/// # Examples
///
/// ```
/// use candle_doft::train::parallel::{Exchange, Processes, open};
///
/// let group = Exchange::new(open()?);
/// assert_eq!((group.rank(), group.size()), (0, 1));
/// Box::new(group).finish()?;
/// # Ok::<(), candle_doft::Error>(())
/// ```
#[derive(Debug)]
pub struct Exchange {
    link: Link,
    /// Neither sent to another thread nor shared with one.
    here: PhantomData<*const ()>,
}

/// How layers and operations find the group.
#[derive(Clone, Copy, Debug)]
pub(super) struct Link {
    id: u64,
    pub(super) rank: usize,
    pub(super) size: usize,
}

impl Exchange {
    /// Takes a group that was opened in this thread.
    pub fn new(group: Box<dyn Processes>) -> Self {
        let link = Link {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            rank: group.rank(),
            size: group.size(),
        };
        GROUPS.with(|groups| groups.borrow_mut().insert(link.id, group));
        Self {
            link,
            here: PhantomData,
        }
    }

    pub(super) fn link(&self) -> Link {
        self.link
    }

    fn take(&self) -> Option<Box<dyn Processes>> {
        // At the end of the thread the groups may be gone before this is dropped.
        let take = |groups: &RefCell<BTreeMap<_, _>>| groups.borrow_mut().remove(&self.link.id);
        GROUPS.try_with(take).ok().flatten()
    }
}

impl Link {
    pub(super) fn is(&self, other: Link) -> bool {
        self.id == other.id
    }

    pub(super) fn with<T>(&self, f: impl FnOnce(&dyn Processes) -> Result<T>) -> Result<T> {
        GROUPS.with(|groups| match groups.borrow().get(&self.id) {
            Some(group) => f(&**group),
            None => Err(Error::argument(
                "parallel::Exchange",
                "the thread of a pass",
                "one without the group of the layer",
                "the thread that made the `Exchange`, before it is finished or dropped",
            )),
        })
    }
}

impl Processes for Exchange {
    fn rank(&self) -> usize {
        self.link.rank
    }

    fn size(&self) -> usize {
        self.link.size
    }

    fn all_to_all(&self, send: &[u8], received: &mut [u8]) -> Result<()> {
        self.link.with(|group| group.all_to_all(send, received))
    }

    fn all_gather(&self, send: &[u8], received: &mut [u8]) -> Result<()> {
        self.link.with(|group| group.all_gather(send, received))
    }

    fn abort(&self, code: i32) -> ! {
        self.link
            .with(|group| -> Result<()> { group.abort(code) })
            .ok();
        std::process::exit(code)
    }

    fn finish(self: Box<Self>) -> Result<()> {
        match self.take() {
            Some(group) => group.finish(),
            None => Ok(()),
        }
    }
}

impl Drop for Exchange {
    /// Not finished: the group is dropped, which ends all processes.
    fn drop(&mut self) {
        drop(self.take());
    }
}
