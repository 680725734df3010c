//! What layers ran under and drew while a function ran, so that it can run again just so.

use super::mode::{Active, Control};
use std::cell::RefCell;
use std::marker::PhantomData;

/// What the layers asked for, in order.
#[derive(Clone, Debug, Default)]
pub(crate) struct Log {
    events: Vec<Event>,
}

#[derive(Clone, Debug)]
enum Event {
    /// What acted in the model of a control, which is known by its address: the function holds its layers.
    Acted(usize, Active),
    /// Training step and pass that the dropout of a layer was drawn for.
    Drew(u64, [u64; 2]),
}

enum Frame {
    Record(Log),
    Replay { log: Log, at: usize, same: bool },
}

thread_local! {
    /// The functions that this thread is in, the innermost last.
    static FRAMES: RefCell<Vec<Frame>> = const { RefCell::new(Vec::new()) };
}

/// Runs `f` and notes what layers ask for, in this thread.
pub(crate) fn recorded<T>(f: impl FnOnce() -> T) -> (T, Log) {
    let entered = Entered::new(Frame::Record(Log::default()));
    let answer = f();
    match entered.leave() {
        Some(Frame::Record(log)) => (answer, log),
        _ => (answer, Log::default()),
    }
}

/// Runs `f`, whose layers get what the log says. Whether they asked for the same in the same order.
pub(crate) fn replayed<T>(log: &Log, f: impl FnOnce() -> T) -> (T, bool) {
    let entered = Entered::new(Frame::Replay {
        log: log.clone(),
        at: 0,
        same: true,
    });
    let answer = f();
    match entered.leave() {
        Some(Frame::Replay { log, at, same }) => (answer, same && at == log.events.len()),
        _ => (answer, false),
    }
}

/// What acts in a model: `now`, unless this thread runs something again.
pub(super) fn active(control: &Control, now: impl FnOnce() -> Active) -> Active {
    let control = std::ptr::from_ref(control) as usize;
    let known = |event: &Event| match event {
        Event::Acted(of, active) if *of == control => Some(active.clone()),
        _ => None,
    };
    asked(known, now, |active| Event::Acted(control, active.clone()))
}

/// Training step and pass that a layer draws for: `now`, unless this thread runs something again.
pub(super) fn drawn(layer: u64, now: impl FnOnce() -> [u64; 2]) -> [u64; 2] {
    let known = |event: &Event| match event {
        Event::Drew(of, at) if *of == layer => Some(*at),
        _ => None,
    };
    asked(known, now, |at| Event::Drew(layer, *at))
}

/// The answer of the innermost log that is run again, or what is `now`; those that are written inside it
/// get the answer too.
fn asked<T>(
    known: impl Fn(&Event) -> Option<T>,
    now: impl FnOnce() -> T,
    event: impl Fn(&T) -> Event,
) -> T {
    let replay = FRAMES.with_borrow_mut(|frames| {
        let mut inner = frames.iter_mut().rev();
        inner.find_map(|frame| match frame {
            Frame::Record(_) => None,
            Frame::Replay { log, at, same } => {
                let found = log.events.get(*at).and_then(&known);
                *at += 1;
                *same &= found.is_some();
                Some(found)
            }
        })
    });
    // Outside the borrow, as it may be anything.
    let answer = replay.flatten().unwrap_or_else(now);
    FRAMES.with_borrow_mut(|frames| {
        for frame in frames.iter_mut().rev() {
            match frame {
                Frame::Record(log) => log.events.push(event(&answer)),
                Frame::Replay { .. } => break,
            }
        }
    });
    answer
}

/// Leaves a frame when it is dropped, also after a panic. It belongs to its thread.
struct Entered(PhantomData<*const ()>);

impl Entered {
    fn new(frame: Frame) -> Self {
        FRAMES.with_borrow_mut(|frames| frames.push(frame));
        Self(PhantomData)
    }

    fn leave(self) -> Option<Frame> {
        std::mem::forget(self);
        FRAMES.with_borrow_mut(Vec::pop)
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        // Dropped outside the borrow: what acted may go with it.
        let left = FRAMES.with_borrow_mut(Vec::pop);
        drop(left);
    }
}
