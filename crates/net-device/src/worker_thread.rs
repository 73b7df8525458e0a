//! The thread of a worker, from its start until it is joined.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::thread::JoinHandle;

use crate::sys::read_cycles;

/// A request to a thread to end, which can be withdrawn until the thread obeys it.
#[derive(Debug, Default)]
pub(crate) struct StopRequest(AtomicU8);

// The states of a request.
const NONE: u8 = 0;
const REQUESTED: u8 = 1;
const OBEYED: u8 = 2;

impl StopRequest {
    /// Asks the thread to end.
    pub(crate) fn request(&self) {
        self.change(NONE, REQUESTED);
    }

    /// Withdraws the request. Returns whether the thread goes on; otherwise it ends.
    pub(crate) fn withdraw(&self) -> bool {
        self.change(REQUESTED, NONE);
        self.0.load(Ordering::Relaxed) == NONE
    }

    /// Whether the thread is asked to end. Before it does, it calls [`StopRequest::obey`].
    pub(crate) fn is_requested(&self) -> bool {
        self.0.load(Ordering::Acquire) != NONE
    }

    /// Obeys the request. Returns whether the thread must end, since the request was not withdrawn.
    pub(crate) fn obey(&self) -> bool {
        self.change(REQUESTED, OBEYED)
    }

    fn change(&self, from: u8, to: u8) -> bool {
        let changed = self
            .0
            .compare_exchange(from, to, Ordering::AcqRel, Ordering::Relaxed);
        changed.is_ok()
    }
}

/// How long a worker's threads have run, in cycles of the time-stamp counter.
#[derive(Debug, Default)]
pub(crate) struct ThreadLifetime {
    /// Those that have ended.
    past: AtomicU64,
    /// When the present one started; 0 while there is none.
    started_at: AtomicU64,
}

impl ThreadLifetime {
    /// Counts from now on.
    pub(crate) fn begin(&self) {
        self.started_at.store(read_cycles(), Ordering::Relaxed);
    }

    /// Counts no longer.
    pub(crate) fn end(&self) {
        let cycles = self.cycles();
        self.started_at.store(0, Ordering::Relaxed);
        self.past.store(cycles, Ordering::Relaxed);
    }

    /// The cycles so far.
    pub(crate) fn cycles(&self) -> u64 {
        let past = self.past.load(Ordering::Relaxed);
        match self.started_at.load(Ordering::Relaxed) {
            0 => past,
            started_at => past + read_cycles().saturating_sub(started_at),
        }
    }
}

/// The life of a worker's thread.
#[derive(Debug)]
pub(crate) enum ThreadState {
    /// There is none.
    Ended,
    /// It runs until it is asked to end and is woken.
    Running {
        /// What asks it to end.
        stop: Arc<StopRequest>,
        /// What is joined.
        handle: JoinHandle<()>,
    },
    /// Another thread waits for its end.
    Joining,
}

impl ThreadState {
    /// Whether there is no thread, or one that needs only to be joined.
    pub(crate) fn has_ended(&self) -> bool {
        match self {
            Self::Ended => true,
            Self::Running { handle, .. } => handle.is_finished(),
            Self::Joining => false,
        }
    }
}
