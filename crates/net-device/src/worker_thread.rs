//! The thread of a worker, from its start until it is joined.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::thread::JoinHandle;

use crate::sys::read_cycles;

/// A request to the thread of a worker to serve nothing until it is withdrawn. It also holds for the
/// threads that follow.
#[derive(Debug, Default)]
pub(crate) struct StopRequest(AtomicU8);

// The states of a request.
const NONE: u8 = 0;
const REQUESTED: u8 = 1;
const OBEYED: u8 = 2;

impl StopRequest {
    /// Asks the thread to stop.
    pub(crate) fn request(&self) {
        self.change(NONE, REQUESTED);
    }

    /// Withdraws the request.
    pub(crate) fn withdraw(&self) {
        self.0.store(NONE, Ordering::Release);
    }

    /// Whether the thread is asked to stop. Once it has, it calls [`StopRequest::obey`].
    pub(crate) fn is_requested(&self) -> bool {
        self.0.load(Ordering::Acquire) != NONE
    }

    /// The thread serves nothing any more.
    pub(crate) fn obey(&self) {
        self.change(REQUESTED, OBEYED);
    }

    /// Whether the thread serves nothing any more.
    pub(crate) fn is_obeyed(&self) -> bool {
        self.0.load(Ordering::Acquire) == OBEYED
    }

    fn change(&self, from: u8, to: u8) {
        // It fails if the request is in another state, which then stays.
        let _ = self
            .0
            .compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire);
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
    /// It runs as long as it has a queue pair.
    Running(JoinHandle<()>),
    /// Another thread waits for its end.
    Joining,
}
