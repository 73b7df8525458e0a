//! The eventfds by which the device notifies a front-end: call and err.
//!
//! They are the front-end's, so a write to one may block until the watchdog interrupts it (see
//! [`call_watchdog`]). Such a descriptor is cut off: nothing is written to it any more. No write is
//! made while a vring is locked. A thread that processes a vring may push frames to other vrings on
//! the way; their calls wait until it has unlocked its own ([`deferring`]).

use std::cell::{Cell, RefCell};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::Errno;
use virtionet_virtio_net::stats::VringStats;

use crate::call_watchdog;

thread_local! {
    static IS_DEFERRING: Cell<bool> = const { Cell::new(false) };
    static DEFERRED: RefCell<Vec<Arc<Notifier>>> = const { RefCell::new(Vec::new()) };
}

/// An eventfd of a front-end, with the counters of its vring.
#[derive(Debug)]
pub struct Notifier {
    fd: Arc<OwnedFd>,
    stats: Arc<VringStats>,
    /// A write blocked, so there will be no other.
    is_cut_off: AtomicBool,
}

impl Notifier {
    /// Notifications through `fd`, counted in `stats`.
    #[must_use]
    pub fn new(fd: Arc<OwnedFd>, stats: Arc<VringStats>) -> Self {
        Self {
            fd,
            stats,
            is_cut_off: AtomicBool::new(false),
        }
    }

    /// Interrupts the driver: adds 1 to the eventfd. The caller must hold no vring's lock.
    #[inline]
    pub fn call(&self) {
        if self.is_cut_off.load(Ordering::Relaxed) {
            return self.stats.calls_failed.add(1);
        }
        match self.write() {
            Ok(_) => self.stats.calls.add(1),
            Err(error) => self.note_failed_call(error),
        }
    }

    /// Calls now, or at the end of the turn in which the calling thread is.
    #[inline]
    pub fn call_after_turn(self: &Arc<Self>) {
        if IS_DEFERRING.get() {
            DEFERRED.with_borrow_mut(|deferred| deferred.push(Arc::clone(self)));
        } else {
            self.call();
        }
    }

    /// Tells the front-end that its vring was quarantined. If it does not listen, the counters and
    /// the log still report it. The caller must hold no vring's lock.
    pub fn signal_error(&self) {
        let _ = self.write();
    }

    #[inline]
    fn write(&self) -> Result<usize, Errno> {
        call_watchdog::bounded(|| rustix::io::write(&*self.fd, &1u64.to_ne_bytes()))
    }

    #[cold]
    fn note_failed_call(&self, error: Errno) {
        self.stats.calls_failed.add(1);
        if error == Errno::INTR {
            self.is_cut_off.store(true, Ordering::Relaxed);
            self.stats.calls_cut_off.add(1);
            tracing::warn!(
                "a write to a call eventfd blocked, because the front-end made it blocking and filled it; it is not signalled again until the front-end sets another one"
            );
        }
    }
}

/// Runs `turn`, which locks a vring, and then makes the calls that it caused in other vrings.
#[inline]
pub fn deferring<T>(turn: impl FnOnce() -> T) -> T {
    let was_deferring = IS_DEFERRING.replace(true);
    let done = turn();
    IS_DEFERRING.set(was_deferring);
    if !was_deferring {
        // Not borrowed while the calls are made.
        let mut deferred = DEFERRED.take();
        deferred.drain(..).for_each(|notifier| notifier.call());
        // Keeps the memory for the next turn.
        DEFERRED.set(deferred);
    }
    done
}
