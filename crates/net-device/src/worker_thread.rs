//! The thread of a worker, from its start until it is joined.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread::JoinHandle;

/// The life of a worker's thread.
#[derive(Debug)]
pub(crate) enum ThreadState {
    /// There is none.
    Ended,
    /// It runs until `stop` is set and it is woken.
    Running {
        /// Whether it must end.
        stop: Arc<AtomicBool>,
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
