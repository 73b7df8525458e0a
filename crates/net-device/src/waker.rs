//! Waking a worker from other threads.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use parking_lot::Mutex;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// A handle that wakes a worker, which then checks everything that it serves once. Clones wake the
/// same worker. It has an eventfd only while a front-end is connected; without one there is nothing
/// to wake.
#[derive(Debug, Clone, Default)]
pub struct Waker(Arc<Mutex<Option<WakeEvent>>>);

/// The eventfd of a [`Waker`], for the worker itself.
#[derive(Debug, Clone)]
pub struct WakeEvent(Arc<EventFd>);

impl Waker {
    /// Creates the eventfd, on which no worker waits yet.
    ///
    /// # Errors
    /// When the kernel has no descriptors left.
    pub(crate) fn open(&self) -> io::Result<WakeEvent> {
        let event = WakeEvent(Arc::new(EventFd::new(EFD_NONBLOCK)?));
        *self.0.lock() = Some(event.clone());
        Ok(event)
    }

    /// Closes the eventfd. The worker must have ended.
    pub(crate) fn close(&self) {
        *self.0.lock() = None;
    }

    /// Wakes the worker.
    pub fn wake(&self) {
        if let Some(event) = &*self.0.lock() {
            // The write fails only when 2^64 wake-ups are pending.
            let _ = event.0.write(1);
        }
    }
}

impl WakeEvent {
    /// Forgets the wake-ups so far. The worker calls this before it checks what changed.
    pub(crate) fn clear(&self) {
        // The read fails only when no wake-up is pending.
        let _ = self.0.read();
    }
}

/// The descriptor that is readable while a wake-up is pending.
impl AsRawFd for WakeEvent {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
