//! The eventfds by which the device notifies a front-end: call and err.
//!
//! They are the front-end's, so a write to one may block until the watchdog interrupts it (see
//! [`call_watchdog`]). Such a descriptor is cut off: nothing is written to it any more. No write is
//! made while a vring is locked. A thread that processes a vring may push frames to other vrings
//! meanwhile; their notifications wait until it has unlocked its own ([`deferring`]).

use std::cell::{Cell, RefCell};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::Errno;

use crate::call_watchdog;
use crate::quarantine::QuarantineCause;
use crate::vring_log::VringLog;

thread_local! {
    static IS_DEFERRING: Cell<bool> = const { Cell::new(false) };
    static DEFERRED: RefCell<Vec<Notification>> = const { RefCell::new(Vec::new()) };
}

/// An eventfd of a front-end, for one vring.
#[derive(Debug)]
pub struct Notifier {
    fd: Arc<OwnedFd>,
    log: Arc<VringLog>,
    /// A write blocked, so there will be no other.
    is_cut_off: AtomicBool,
}

impl Notifier {
    /// Notifications through `fd`, counted and logged in `log`.
    #[must_use]
    pub fn new(fd: Arc<OwnedFd>, log: Arc<VringLog>) -> Self {
        Self {
            fd,
            log,
            is_cut_off: AtomicBool::new(false),
        }
    }

    /// Interrupts the driver: adds 1 to the eventfd. The caller must hold no vring's lock. Several
    /// threads may call at once, so the counters are shared ones.
    #[inline]
    pub fn call(&self) {
        let stats = self.log.stats();
        if self.is_cut_off.load(Ordering::Relaxed) {
            return stats.calls_failed.add_shared(1);
        }
        match self.write() {
            Ok(_) => stats.calls.add_shared(1),
            Err(error) => self.note_failed_call(error),
        }
    }

    /// Tells the front-end that its vring was quarantined. If it does not listen, the counters and
    /// the log still report it.
    fn signal_error(&self) {
        let _ = self.write();
    }

    #[inline]
    fn write(&self) -> Result<usize, Errno> {
        call_watchdog::bounded(|| rustix::io::write(&*self.fd, &1u64.to_ne_bytes()))
    }

    #[cold]
    fn note_failed_call(&self, error: Errno) {
        let stats = self.log.stats();
        stats.calls_failed.add_shared(1);
        // Of several threads that were interrupted, one cuts it off.
        if error == Errno::INTR && !self.is_cut_off.swap(true, Ordering::Relaxed) {
            stats.calls_cut_off.add_shared(1);
            self.log.cut_off();
        }
    }
}

/// What a turn leaves to do once the vring is unlocked.
#[derive(Debug)]
pub enum Notification {
    /// The driver is to be interrupted.
    Call(Arc<Notifier>),
    /// The vring was quarantined, which the log and the front-end are to learn.
    Quarantine {
        /// The vring's log.
        log: Arc<VringLog>,
        /// Why.
        cause: QuarantineCause,
        /// How the front-end learns of it, if it wants to.
        err: Option<Arc<Notifier>>,
    },
}

impl Notification {
    /// Notifies now, or at the end of the turn in which the calling thread is. The caller must hold
    /// no vring's lock but that of the turn.
    #[inline]
    pub fn deliver_after_turn(self) {
        if IS_DEFERRING.get() {
            DEFERRED.with_borrow_mut(|deferred| deferred.push(self));
        } else {
            self.deliver();
        }
    }

    #[inline]
    fn deliver(self) {
        match self {
            Self::Call(call) => call.call(),
            Self::Quarantine { log, cause, err } => {
                log.quarantined(cause);
                if let Some(err) = err {
                    err.signal_error();
                }
            }
        }
    }
}

/// Runs `turn`, which locks a vring, and then delivers the notifications that it caused in other
/// vrings.
#[inline]
pub fn deferring<T>(turn: impl FnOnce() -> T) -> T {
    let was_deferring = IS_DEFERRING.replace(true);
    let done = turn();
    IS_DEFERRING.set(was_deferring);
    if !was_deferring {
        // Not borrowed while they are delivered.
        let mut deferred = DEFERRED.take();
        deferred.drain(..).for_each(Notification::deliver);
        // Keeps the memory for the next turn.
        DEFERRED.set(deferred);
    }
    done
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};
    use rustix::io::read;
    use virtionet_process::panic_policy::Panicked;

    fn notifier(log: &Arc<VringLog>) -> (Arc<OwnedFd>, Arc<Notifier>) {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let fd = Arc::new(eventfd(0, flags).unwrap());
        let notifier = Arc::new(Notifier::new(Arc::clone(&fd), Arc::clone(log)));
        (fd, notifier)
    }

    fn count(fd: &OwnedFd) -> u64 {
        let mut bytes = [0; 8];
        read(fd, &mut bytes).map_or(0, |_| u64::from_ne_bytes(bytes))
    }

    #[test]
    fn calls_of_several_threads_are_all_counted() {
        const CALLS: u64 = 50_000;
        let log = Arc::new(VringLog::new("vring".into()));
        let (fd, notifier) = notifier(&log);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..CALLS).for_each(|_| notifier.call()));
            }
        });
        assert_eq!(count(&fd), 4 * CALLS);
        assert_eq!(log.stats().calls.get(), 4 * CALLS);
    }

    #[test]
    fn notifications_of_a_turn_are_delivered_after_it() {
        let log = Arc::new(VringLog::new("vring".into()));
        let (call_fd, call) = notifier(&log);
        let (err_fd, err) = notifier(&log);
        deferring(|| {
            Notification::Call(Arc::clone(&call)).deliver_after_turn();
            let quarantine = Notification::Quarantine {
                log: Arc::clone(&log),
                cause: QuarantineCause::Panic(Panicked),
                err: Some(err),
            };
            deferring(|| quarantine.deliver_after_turn());
            assert_eq!((count(&call_fd), count(&err_fd)), (0, 0));
        });
        assert_eq!((count(&call_fd), count(&err_fd)), (1, 1));
        Notification::Call(call).deliver_after_turn();
        assert_eq!(
            count(&call_fd),
            1,
            "outside of a turn it is delivered at once"
        );
    }
}
