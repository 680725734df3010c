//! An engine whose ranks are threads.

use candle_doft::Result;
use candle_doft::train::parallel::Processes;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

/// Longer than any exchange of a test; a rank that waits for this was left alone.
const PATIENCE: Duration = Duration::from_secs(60);

struct Board {
    said: Vec<Option<Vec<u8>>>,
    read: usize,
    round: u64,
}

/// What ranks share.
pub struct Shared {
    board: Mutex<Board>,
    changed: Condvar,
    /// Bytes that went from one rank to another.
    pub bytes: AtomicU64,
    /// Exchanges of the first rank.
    pub rounds: AtomicU64,
}

#[derive(Clone)]
pub struct Rank {
    rank: usize,
    size: usize,
    shared: Arc<Shared>,
}

impl Rank {
    /// Hands `send` to all and `take` what all have handed out.
    fn exchange(&self, send: &[u8], mut take: impl FnMut(usize, &[u8])) {
        let shared = &self.shared;
        let mut board = shared.board.lock().unwrap();
        if self.rank == 0 {
            shared.rounds.fetch_add(1, Ordering::Relaxed);
        }
        let round = board.round;
        board.said[self.rank] = Some(send.to_vec());
        shared.changed.notify_all();
        while board.said.iter().any(Option::is_none) {
            let (next, late) = shared.changed.wait_timeout(board, PATIENCE).unwrap();
            board = next;
            assert!(!late.timed_out(), "rank {} waits for ever", self.rank);
        }
        for (rank, said) in board.said.iter().enumerate() {
            take(rank, said.as_ref().unwrap());
        }
        board.read += 1;
        if board.read == self.size {
            board.said.fill(None);
            board.read = 0;
            board.round += 1;
            shared.changed.notify_all();
        }
        while board.round == round {
            let (next, late) = shared.changed.wait_timeout(board, PATIENCE).unwrap();
            board = next;
            assert!(!late.timed_out(), "rank {} waits for ever", self.rank);
        }
    }
}

impl Processes for Rank {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn all_to_all(&self, send: &[u8], received: &mut [u8]) -> Result<()> {
        assert_eq!(send.len(), received.len());
        assert_eq!(send.len() % self.size, 0);
        let part = send.len() / self.size;
        self.exchange(send, |rank, said| {
            assert_eq!(said.len(), send.len(), "ranks send buffers of two lengths");
            received[rank * part..(rank + 1) * part]
                .copy_from_slice(&said[self.rank * part..(self.rank + 1) * part]);
        });
        let sent = part * (self.size - 1);
        self.shared.bytes.fetch_add(sent as u64, Ordering::Relaxed);
        Ok(())
    }

    fn all_gather(&self, send: &[u8], received: &mut [u8]) -> Result<()> {
        assert_eq!(send.len() * self.size, received.len());
        self.exchange(send, |rank, said| {
            assert_eq!(said.len(), send.len(), "ranks send buffers of two lengths");
            received[rank * said.len()..(rank + 1) * said.len()].copy_from_slice(said);
        });
        let sent = send.len() * (self.size - 1);
        self.shared.bytes.fetch_add(sent as u64, Ordering::Relaxed);
        Ok(())
    }

    fn abort(&self, code: i32) -> ! {
        panic!("aborted with {code}")
    }

    fn finish(self: Box<Self>) -> Result<()> {
        Ok(())
    }
}

/// What `work` answers on each of `size` ranks, and what they shared.
pub fn on<T: Send>(
    size: usize,
    work: impl Fn(&dyn Processes) -> T + Sync,
) -> (Vec<T>, Arc<Shared>) {
    on_ranks(size, |rank| work(rank))
}

/// The same for work that keeps its rank.
pub fn on_ranks<T: Send>(size: usize, work: impl Fn(&Rank) -> T + Sync) -> (Vec<T>, Arc<Shared>) {
    let shared = Arc::new(Shared {
        board: Mutex::new(Board {
            said: vec![None; size],
            read: 0,
            round: 0,
        }),
        changed: Condvar::new(),
        bytes: AtomicU64::new(0),
        rounds: AtomicU64::new(0),
    });
    let (work, held) = (&work, &shared);
    let answers = std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..size)
            .map(|rank| {
                let shared = held.clone();
                scope.spawn(move || work(&Rank { rank, size, shared }))
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    (answers, shared)
}
