//! Bounds the time that a thread spends in one write to an eventfd of a front-end.
//!
//! The session makes every eventfd non-blocking, but the front-end shares its file description: it
//! can clear O_NONBLOCK again and fill the counter, and then a write blocks until a process reads
//! it. No flag of a system call helps (an eventfd refuses RWF_NOWAIT), so a thread looks after the
//! others:
//!
//! ```text
//! worker   enter ── write(2) ── leave           enter ── write(2) ........ EINTR ── cut off
//! watchdog   tick        tick        parked ...   tick        tick ── signal
//! ```
//!
//! While calls are made it ticks every 5 ms. A thread that two ticks find in the same write has
//! been there for 5 to 10 ms and is sent a signal, whose handler does nothing and which is not
//! restarted, so that the write fails with EINTR. Some ticks without a call later the watchdog
//! parks, and an idle process costs nothing.

use std::cell::{Cell, RefCell};
use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering, compiler_fence};
use std::thread::{self, Thread};
use std::time::Duration;

use parking_lot::Mutex;
use virtionet_process::sandbox;
use virtionet_sandbox::ThreadKind;

use crate::sys::{ProcessBarrier, install_interrupt_handler, interrupt_thread};

/// Time between two ticks.
const TICK: Duration = Duration::from_millis(5);
/// Number of ticks without any call after which the watchdog parks.
const IDLE_TICKS: u32 = 10;
/// How long it parks at most on a kernel without membarrier(2), where it could miss a call.
const MAX_PARK_TIME: Duration = Duration::from_millis(100);

static WATCHDOG: OnceLock<Watchdog> = OnceLock::new();
static IS_PARKED: AtomicBool = AtomicBool::new(false);

thread_local! {
    /// The entry of the calling thread, for the fast path.
    static WATCHED: Cell<Option<&'static WatchedThread>> = const { Cell::new(None) };
    /// Gives the entry back when the thread ends.
    static REGISTRATION: RefCell<Option<Registration>> = const { RefCell::new(None) };
}

#[derive(Debug)]
struct Watchdog {
    /// One entry for each thread that is watched, and those of threads that have ended: they live
    /// for ever and are used again.
    entries: Mutex<Vec<&'static WatchedThread>>,
    thread: Thread,
}

/// A thread that writes to eventfds of front-ends.
#[derive(Debug, Default)]
#[repr(align(128))]
struct WatchedThread {
    /// The thread's id; 0 while no thread has the entry.
    tid: AtomicI32,
    /// Goes up when a write begins and when it ends, so it is odd during a write.
    transitions: AtomicU64,
}

/// Keeps a thread watched until it ends.
struct Registration(&'static WatchedThread);

impl Drop for Registration {
    fn drop(&mut self) {
        if let Some(watchdog) = WATCHDOG.get() {
            // Under the lock, so that no signal goes to a thread that later has the same id.
            let _entries = watchdog.entries.lock();
            self.0.tid.store(0, Ordering::Relaxed);
        }
    }
}

/// Starts the watchdog of this process, unless it runs.
///
/// # Errors
/// When the kernel refuses the signal handler or the thread.
pub fn start() -> io::Result<()> {
    if WATCHDOG.get().is_some() {
        return Ok(());
    }
    install_interrupt_handler()?;
    let handle = thread::Builder::new().name("watchdog".into()).spawn(run)?;
    let watchdog = Watchdog {
        entries: Mutex::default(),
        thread: handle.thread().clone(),
    };
    // Of two that start at once, one loses; its thread then serves the other's state.
    let _ = WATCHDOG.set(watchdog);
    handle.thread().unpark();
    Ok(())
}

/// Calls `write`, which writes to an eventfd of a front-end, under the watchdog's eye: it fails
/// with EINTR if it takes longer than 5 to 10 ms. Without [`start`] it is not bounded.
#[inline]
pub fn bounded<T>(write: impl FnOnce() -> T) -> T {
    let Some(thread) = WATCHED.get().or_else(register) else {
        return write();
    };
    // This thread alone writes the counter. On its side a fence for the compiler is enough to order
    // the store before the load: the watchdog issues a barrier on all CPUs before it parks.
    let before = thread.transitions.load(Ordering::Relaxed);
    thread.transitions.store(before + 1, Ordering::Relaxed);
    compiler_fence(Ordering::SeqCst);
    if IS_PARKED.load(Ordering::Relaxed) {
        unpark();
    }
    let done = write();
    thread.transitions.store(before + 2, Ordering::Release);
    done
}

#[cold]
fn unpark() {
    if let Some(watchdog) = WATCHDOG.get() {
        watchdog.thread.unpark();
    }
}

#[cold]
fn register() -> Option<&'static WatchedThread> {
    let mut entries = WATCHDOG.get()?.entries.lock();
    let free = |entry: &&&'static WatchedThread| entry.tid.load(Ordering::Relaxed) == 0;
    let entry = match entries.iter().find(free) {
        Some(entry) => entry,
        None => {
            let entry: &'static WatchedThread = Box::leak(Box::default());
            entries.push(entry);
            entry
        }
    };
    let tid = rustix::thread::gettid().as_raw_nonzero().get();
    entry.tid.store(tid, Ordering::Relaxed);
    drop(entries);
    REGISTRATION.set(Some(Registration(entry)));
    WATCHED.set(Some(entry));
    Some(entry)
}

impl Watchdog {
    /// Interrupts the threads that are in the write in which the tick before found them. Returns
    /// whether any call was made or is being made since then.
    fn tick(&self, seen: &mut Vec<u64>) -> bool {
        let entries = self.entries.lock();
        // New entries count as changed: the first transition is to 1.
        seen.resize(entries.len(), 0);
        let mut is_active = false;
        for (entry, seen) in entries.iter().zip(seen) {
            let now = entry.transitions.load(Ordering::Acquire);
            let is_inside = now % 2 == 1;
            let is_unchanged = std::mem::replace(seen, now) == now;
            is_active |= is_inside || !is_unchanged;
            let tid = entry.tid.load(Ordering::Relaxed);
            if is_inside && is_unchanged && tid != 0 {
                interrupt_thread(tid);
            }
        }
        is_active
    }
}

/// The thread `watchdog`. It ends with the process.
fn run() {
    sandbox::confine_thread(ThreadKind::Watchdog);
    let watchdog = loop {
        match WATCHDOG.get() {
            Some(watchdog) => break watchdog,
            None => thread::park_timeout(TICK),
        }
    };
    let barrier = ProcessBarrier::new();
    let mut seen = Vec::new();
    let mut idle = 0;
    loop {
        idle = if watchdog.tick(&mut seen) {
            0
        } else {
            idle + 1
        };
        if idle < IDLE_TICKS {
            thread::sleep(TICK);
            continue;
        }
        IS_PARKED.store(true, Ordering::SeqCst);
        let is_ordered = barrier.as_ref().is_some_and(ProcessBarrier::issue);
        // A call whose thread did not see the store is seen here.
        if !watchdog.tick(&mut seen) {
            match is_ordered {
                true => thread::park(),
                false => thread::park_timeout(MAX_PARK_TIME),
            }
        }
        IS_PARKED.store(false, Ordering::SeqCst);
        idle = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};
    use rustix::io::{Errno, write};
    use std::time::Instant;

    #[test]
    fn write_to_a_full_blocking_eventfd_is_interrupted_within_milliseconds() {
        start().unwrap();
        let fd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        write(&fd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        // Also after the watchdog has parked.
        for pause in [0, 0, 200] {
            thread::sleep(Duration::from_millis(pause));
            let begin = Instant::now();
            let written = bounded(|| write(&fd, &1u64.to_ne_bytes()));
            assert_eq!(written, Err(Errno::INTR));
            let elapsed = begin.elapsed();
            assert!(elapsed > Duration::from_millis(3), "{elapsed:?}");
            // The bound is 10 ms; a machine that is busy with other tests may take longer.
            assert!(elapsed < Duration::from_secs(2), "{elapsed:?}");
        }
    }
}
