//! Waking a worker from other threads.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// A handle that wakes a worker, which then checks everything that it serves once. Clones wake the
/// same worker.
#[derive(Debug, Clone)]
pub struct Waker(Arc<EventFd>);

impl Waker {
    /// Creates a waker on which no worker waits yet.
    ///
    /// # Errors
    /// When the kernel has no descriptors left.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(EventFd::new(EFD_NONBLOCK)?)))
    }

    /// Wakes the worker.
    pub fn wake(&self) {
        // The write fails only when 2^64 wake-ups are pending.
        let _ = self.0.write(1);
    }

    /// Forgets the wake-ups so far. The worker calls this before it checks what changed.
    pub(crate) fn clear(&self) {
        // The read fails only when no wake-up is pending.
        let _ = self.0.read();
    }

    /// The descriptor that is readable while a wake-up is pending.
    pub(crate) fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
