//! Holds back all that carries frames until each vring runs again that a handover has stopped.
//!
//! The sessions continue in threads of their own. The worker of one device could otherwise send frames
//! to another one on its switch whose vrings do not run yet, and they would be lost.

use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

/// The longest time for which anything is held back, so that a session that fails costs the others no
/// more.
const LIMIT: Duration = Duration::from_millis(200);

/// The gate. It is open unless [`StartGate::hold_for`] has closed it.
#[derive(Debug, Default)]
pub struct StartGate {
    /// The sessions whose vrings do not run yet.
    stopped_sessions: Mutex<usize>,
    changed: Condvar,
}

impl StartGate {
    /// Closes the gate until as many sessions continue.
    pub fn hold_for(&self, sessions: usize) {
        *self.stopped_sessions.lock() = sessions;
    }

    /// The vrings of one more session run.
    pub fn session_continues(&self) {
        let mut stopped = self.stopped_sessions.lock();
        *stopped = stopped.saturating_sub(1);
        if *stopped == 0 {
            self.changed.notify_all();
        }
    }

    /// Waits until the gate is open, for at most 200 ms.
    pub fn wait(&self) {
        let deadline = Instant::now() + LIMIT;
        let mut stopped = self.stopped_sessions.lock();
        while *stopped > 0 {
            if self.changed.wait_until(&mut stopped, deadline).timed_out() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    #[test]
    fn gate_opens_when_the_last_session_continues() {
        let gate = StartGate::default();
        gate.wait();
        gate.session_continues();
        gate.hold_for(2);
        let is_last = AtomicBool::new(false);
        let started_at = Instant::now();
        thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                gate.wait();
                is_last.load(Ordering::Relaxed) || started_at.elapsed() >= LIMIT
            });
            gate.session_continues();
            is_last.store(true, Ordering::Relaxed);
            gate.session_continues();
            assert!(waiting.join().unwrap());
        });
        gate.wait();
    }

    #[test]
    fn session_that_does_not_continue_holds_the_others_up_for_a_limited_time() {
        let gate = StartGate::default();
        gate.hold_for(1);
        let started_at = Instant::now();
        gate.wait();
        assert!(started_at.elapsed() >= LIMIT);
    }
}
