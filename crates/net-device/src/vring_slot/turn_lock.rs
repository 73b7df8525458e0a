//! The lock of a slot: most of the time it is taken for one turn after the other, by the worker and by
//! those that push frames, and now and then by a thread that changes the vring.
//!
//! The latter gets it after the turn that runs, and sleeps until then. A lock that yields the CPU before
//! it sleeps would cost it milliseconds on a busy CPU: with each yield the kernel's scheduler lets another
//! thread run for its whole slice. So it does not wait for the mutex itself, but for the signal that a
//! turn has ended. Until it has the lock, no turn begins but those that wait for the mutex already.

use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicUsize, Ordering, fence};
use std::sync::{Condvar, PoisonError};
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};

/// How long a turn waits before it looks again whether it may begin.
const INTERVAL: Duration = Duration::from_secs(1);

/// The lock.
#[derive(Debug)]
pub(super) struct TurnLock<T> {
    value: Mutex<T>,
    /// The threads that wait in [`TurnLock::lock`]. Changed under `changes`.
    waiting: AtomicUsize,
    /// One of the standard library, which never yields.
    changes: std::sync::Mutex<()>,
    /// `waiting` has changed, or it is not 0 and the value was unlocked.
    changed: Condvar,
}

/// The value, while it is locked.
#[derive(Debug)]
pub(super) struct TurnGuard<'a, T> {
    // Dropped in this order.
    value: MutexGuard<'a, T>,
    unlocked: Unlocked<'a, T>,
}

/// Tells the threads that wait that the value was unlocked, when it is dropped.
#[derive(Debug)]
struct Unlocked<'a, T>(&'a TurnLock<T>);

impl<T> TurnLock<T> {
    pub(super) fn new(value: T) -> Self {
        Self {
            value: Mutex::new(value),
            waiting: AtomicUsize::new(0),
            changes: std::sync::Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// Locks the value between two turns.
    pub(super) fn lock(&self) -> TurnGuard<'_, T> {
        if let Some(value) = self.value.try_lock() {
            return self.guard(value);
        }
        let mut changes = self.lock_changes();
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let value = loop {
            // Either this thread finds the value unlocked, or the one that unlocks it then sees that it
            // is awaited: the other fence is behind the unlocking.
            fence(Ordering::SeqCst);
            if let Some(value) = self.value.try_lock() {
                break value;
            }
            changes = self
                .changed
                .wait(changes)
                .unwrap_or_else(PoisonError::into_inner);
        };
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        self.changed.notify_all();
        self.guard(value)
    }

    /// Locks the value for a turn.
    #[inline]
    pub(super) fn lock_for_turn(&self) -> TurnGuard<'_, T> {
        loop {
            if let Some(guard) = self.lock_for_turn_within(INTERVAL) {
                return guard;
            }
        }
    }

    /// Locks the value for a turn, unless others have it or wait for it for longer than `limit`.
    #[inline]
    pub(super) fn lock_for_turn_within(&self, limit: Duration) -> Option<TurnGuard<'_, T>> {
        if self.is_awaited() && !self.let_others_pass(limit) {
            return None;
        }
        Some(self.guard(self.value.try_lock_for(limit)?))
    }

    /// Waits until no thread waits in [`TurnLock::lock`]; false if one still does after `limit`.
    #[cold]
    fn let_others_pass(&self, limit: Duration) -> bool {
        let changes = self.lock_changes();
        let waited = self
            .changed
            .wait_timeout_while(changes, limit, |()| self.is_awaited());
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    fn is_awaited(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    fn lock_changes(&self) -> std::sync::MutexGuard<'_, ()> {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn guard<'a>(&'a self, value: MutexGuard<'a, T>) -> TurnGuard<'a, T> {
        TurnGuard {
            value,
            unlocked: Unlocked(self),
        }
    }
}

impl<T> TurnGuard<'_, T> {
    /// Ends a turn. Another one that waits begins before the next one of this thread.
    pub(super) fn end_turn(self) {
        let Self { value, unlocked } = self;
        MutexGuard::unlock_fair(value);
        drop(unlocked);
    }
}

impl<T> Drop for Unlocked<'_, T> {
    fn drop(&mut self) {
        fence(Ordering::SeqCst);
        if self.0.is_awaited() {
            let _changes = self.0.lock_changes();
            self.0.changed.notify_all();
        }
    }
}

impl<T> Deref for TurnGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T> DerefMut for TurnGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.value
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;
    use std::thread;

    #[test]
    fn each_thread_gets_the_value_again_and_again() {
        const ROUNDS: u64 = 2000;
        let lock = TurnLock::new(0u64);
        let is_over = AtomicBool::new(false);
        let turns = thread::scope(|scope| {
            let take_turns = || {
                let mut turns = 0;
                while !is_over.load(Ordering::Relaxed) {
                    let mut value = lock.lock_for_turn();
                    *value += 1;
                    turns += 1;
                    value.end_turn();
                }
                turns
            };
            let takers = [scope.spawn(take_turns), scope.spawn(take_turns)];
            let change = || (0..ROUNDS).for_each(|_| *lock.lock() += 1);
            let changers = [scope.spawn(change), scope.spawn(change)];
            for changer in changers {
                changer.join().unwrap();
            }
            is_over.store(true, Ordering::Relaxed);
            takers
                .map(|taker| taker.join().unwrap())
                .iter()
                .sum::<u64>()
        });
        assert_eq!(*lock.lock(), turns + 2 * ROUNDS);
        assert_eq!(lock.waiting.into_inner(), 0);
    }

    #[test]
    fn turn_waits_for_those_that_came_before_it() {
        let lock = TurnLock::new(Vec::new());
        let turn = lock.lock_for_turn();
        thread::scope(|scope| {
            scope.spawn(|| lock.lock().push("other"));
            while !lock.is_awaited() {
                thread::yield_now();
            }
            scope.spawn(|| lock.lock_for_turn().push("turn"));
            // It waits by then. If it did not wait for the other one, `end_turn` would give it the value.
            thread::sleep(Duration::from_millis(50));
            turn.end_turn();
        });
        assert_eq!(*lock.lock(), ["other", "turn"]);
    }

    #[test]
    fn turn_waits_for_a_limited_time() {
        let lock = TurnLock::new(());
        let limit = Duration::from_millis(20);
        let held = lock.lock();
        assert!(lock.lock_for_turn_within(limit).is_none());
        thread::scope(|scope| {
            scope.spawn(|| drop(lock.lock()));
            while !lock.is_awaited() {
                thread::yield_now();
            }
            assert!(lock.lock_for_turn_within(limit).is_none());
            drop(held);
        });
        assert!(lock.lock_for_turn_within(limit).is_some());
    }
}
