//! What ends or suspends the threads that carry frames or serve front-ends.
//!
//! Such a thread waits for a descriptor among others. When it is readable, the thread stops its work
//! and calls [`Stop::wait_while_suspended`], which says whether it must end or can continue.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustix::event::{EventfdFlags, eventfd};
use virtionet_vhost_user::stop::{StopDemand, StopSignal};

/// What the threads are to do.
#[derive(Debug)]
pub struct Stop {
    /// Readable while they must not work.
    event: OwnedFd,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    demand: StopDemand,
    /// Whether the threads are held: their work ends, but they do not.
    is_held: bool,
    /// The threads that take part.
    participants: usize,
    /// Those of them that have stopped their work.
    waiting: usize,
}

/// A thread that takes part, until it is dropped.
#[derive(Debug)]
pub struct Participant<'a>(&'a Stop);

impl Drop for Participant<'_> {
    fn drop(&mut self) {
        self.0.state.lock().participants -= 1;
        self.0.changed.notify_all();
    }
}

/// A thread that has stopped its work, until it is dropped.
#[derive(Debug)]
pub struct Stopped<'a>(&'a Stop);

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        self.0.state.lock().waiting -= 1;
    }
}

impl State {
    /// What a thread that works is to do.
    fn effective_demand(&self) -> StopDemand {
        match (self.demand, self.is_held) {
            (StopDemand::GoOn, true) => StopDemand::End,
            (demand, _) => demand,
        }
    }
}

impl Stop {
    /// Lets its threads work.
    ///
    /// # Errors
    /// When the kernel refuses an eventfd.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            event: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            state: Mutex::new(State {
                demand: StopDemand::GoOn,
                is_held: false,
                participants: 0,
                waiting: 0,
            }),
            changed: Condvar::new(),
        })
    }

    /// Adds the calling thread to those for which [`Stop::suspend`] waits.
    pub fn enter(&self) -> Participant<'_> {
        self.state.lock().participants += 1;
        Participant(self)
    }

    /// Lets all threads end.
    pub fn end(&self) {
        self.demand(StopDemand::End);
    }

    /// Stops the work of all threads. Returns false if one has not stopped within `limit`.
    pub fn suspend(&self, limit: Duration) -> bool {
        self.request_suspend();
        self.wait_until_suspended(Instant::now() + limit)
    }

    /// Asks all threads to stop their work so that they can continue.
    pub fn request_suspend(&self) {
        self.demand(StopDemand::Suspend);
    }

    /// Waits until all threads have stopped their work. Returns false if one has not at `deadline`.
    pub fn wait_until_suspended(&self, deadline: Instant) -> bool {
        let mut state = self.state.lock();
        while state.waiting < state.participants {
            if self.changed.wait_until(&mut state, deadline).timed_out() {
                return state.waiting >= state.participants;
            }
        }
        true
    }

    /// Lets all threads continue, unless they are held.
    pub fn resume(&self) {
        let mut state = self.state.lock();
        state.demand = StopDemand::GoOn;
        self.publish(&state);
    }

    /// Ends the work of all threads, such as their sessions, without ending the threads, or lets them
    /// work again.
    pub fn hold(&self, is_held: bool) {
        let mut state = self.state.lock();
        state.is_held = is_held;
        self.publish(&state);
    }

    /// Whether the threads are held and need not end.
    #[must_use]
    pub fn is_held(&self) -> bool {
        let state = self.state.lock();
        state.is_held && state.demand == StopDemand::GoOn
    }

    /// Notes that the calling thread has stopped its work, until the result is dropped.
    pub fn note_stopped(&self) -> Stopped<'_> {
        self.state.lock().waiting += 1;
        self.changed.notify_all();
        Stopped(self)
    }

    fn demand(&self, demand: StopDemand) {
        let mut state = self.state.lock();
        state.demand = demand;
        self.publish(&state);
    }

    /// Makes the descriptor readable exactly while threads must not work. They do not read it, so it
    /// stays readable for all of them.
    // syscalls: read write
    fn publish(&self, state: &State) {
        let mut value = [0; 8];
        let _ = match state.effective_demand() {
            StopDemand::GoOn => rustix::io::read(&self.event, &mut value),
            _ => rustix::io::write(&self.event, &1u64.to_ne_bytes()),
        };
        self.changed.notify_all();
    }

    /// For a thread that found the descriptor readable and has stopped its work: waits while threads
    /// are suspended. Returns whether it continues; otherwise it must end.
    pub fn wait_while_suspended(&self) -> bool {
        let mut state = self.state.lock();
        state.waiting += 1;
        self.changed.notify_all();
        while state.demand == StopDemand::Suspend {
            self.changed.wait(&mut state);
        }
        state.waiting -= 1;
        state.demand == StopDemand::GoOn
    }
}

impl AsFd for Stop {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

impl StopSignal for Stop {
    fn poll_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    fn demand(&self) -> StopDemand {
        self.state.lock().effective_demand()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, poll};
    use std::thread;

    /// A thread that stops whenever it must; returns how often it did.
    fn work(stop: &Stop) -> u32 {
        let _participant = stop.enter();
        let mut stops = 0;
        loop {
            poll(&mut [PollFd::new(stop, PollFlags::IN)], None).unwrap();
            stops += 1;
            if !stop.wait_while_suspended() {
                return stops;
            }
        }
    }

    #[test]
    fn threads_stop_continue_and_end() {
        let stop = Stop::new().unwrap();
        thread::scope(|scope| {
            let threads = [(); 3].map(|()| scope.spawn(|| work(&stop)));
            let limit = Duration::from_secs(20);
            while stop.state.lock().participants < 3 {
                thread::yield_now();
            }
            for _ in 0..100 {
                assert!(stop.suspend(limit));
                assert_eq!(stop.state.lock().waiting, 3);
                stop.resume();
            }
            stop.end();
            for thread in threads {
                // One that has not continued yet when it is to stop again has stopped once.
                assert!(thread.join().unwrap() >= 1);
            }
        });
    }

    #[test]
    fn held_threads_end_their_work_and_not_themselves() {
        let stop = Stop::new().unwrap();
        let demand = || StopSignal::demand(&stop);
        let is_readable = || {
            let now = rustix::event::Timespec::default();
            poll(&mut [PollFd::new(&stop, PollFlags::IN)], Some(&now)).unwrap() == 1
        };
        stop.hold(true);
        assert!(stop.is_held() && demand() == StopDemand::End && is_readable());
        stop.request_suspend();
        assert!(!stop.is_held() && demand() == StopDemand::Suspend && is_readable());
        stop.resume();
        assert!(stop.is_held() && is_readable());
        stop.hold(false);
        assert!(!stop.is_held() && demand() == StopDemand::GoOn && !is_readable());
        stop.hold(true);
        stop.end();
        assert!(!stop.is_held() && demand() == StopDemand::End && is_readable());
    }

    #[test]
    fn thread_that_does_not_stop_is_reported() {
        let stop = Stop::new().unwrap();
        let participant = stop.enter();
        assert!(!stop.suspend(Duration::from_millis(20)));
        drop(participant);
        assert!(stop.suspend(Duration::ZERO));
    }
}
