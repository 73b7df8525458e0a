//! What ends or suspends the threads that carry frames or serve front-ends.
//!
//! Such a thread waits for a descriptor among others. When it is readable, the thread comes to rest
//! and calls [`Stop::rest`], which says whether it must end or, once that is decided, goes on.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustix::event::{EventfdFlags, eventfd};
use virtionet_vhost_user::stop::{StopDemand, StopSignal};

/// What the threads are to do.
#[derive(Debug)]
pub struct Stop {
    /// Readable while they must not go on.
    event: OwnedFd,
    crew: Mutex<Crew>,
    changed: Condvar,
}

#[derive(Debug)]
struct Crew {
    demand: StopDemand,
    /// The threads that have entered and not left.
    members: usize,
    /// Those of them that rest.
    resting: usize,
}

/// A thread that takes part, until it is dropped.
#[derive(Debug)]
pub struct Member<'a>(&'a Stop);

impl Drop for Member<'_> {
    fn drop(&mut self) {
        self.0.crew.lock().members -= 1;
        self.0.changed.notify_all();
    }
}

impl Stop {
    /// Lets its threads go on.
    ///
    /// # Errors
    /// When the kernel refuses an eventfd.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            event: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            crew: Mutex::new(Crew {
                demand: StopDemand::GoOn,
                members: 0,
                resting: 0,
            }),
            changed: Condvar::new(),
        })
    }

    /// Adds the calling thread to those for which [`Stop::suspend`] waits.
    pub fn enter(&self) -> Member<'_> {
        self.crew.lock().members += 1;
        Member(self)
    }

    /// Lets all threads end.
    pub fn end(&self) {
        self.demand(StopDemand::End);
    }

    /// Brings all threads to rest. Returns false if one has not come to rest within `limit`.
    pub fn suspend(&self, limit: Duration) -> bool {
        self.demand(StopDemand::Suspend);
        let deadline = Instant::now() + limit;
        let mut crew = self.crew.lock();
        while crew.resting < crew.members {
            if self.changed.wait_until(&mut crew, deadline).timed_out() {
                return crew.resting >= crew.members;
            }
        }
        true
    }

    /// Lets threads that rest, or are about to, go on.
    pub fn resume(&self) {
        let mut crew = self.crew.lock();
        let mut value = [0; 8];
        // syscalls: read
        let _ = rustix::io::read(&self.event, &mut value);
        crew.demand = StopDemand::GoOn;
        self.changed.notify_all();
    }

    fn demand(&self, demand: StopDemand) {
        let mut crew = self.crew.lock();
        crew.demand = demand;
        // It is read only when threads go on, so it stays readable for all of them.
        // syscalls: write
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
        self.changed.notify_all();
    }

    /// For a thread that found the descriptor readable: rests while threads are suspended. Returns
    /// whether it goes on; otherwise it must end.
    pub fn rest(&self) -> bool {
        let mut crew = self.crew.lock();
        crew.resting += 1;
        self.changed.notify_all();
        while crew.demand == StopDemand::Suspend {
            self.changed.wait(&mut crew);
        }
        crew.resting -= 1;
        crew.demand == StopDemand::GoOn
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
        self.crew.lock().demand
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, poll};
    use std::thread;

    /// A thread that comes to rest whenever it must; returns how often it did.
    fn work(stop: &Stop) -> u32 {
        let _member = stop.enter();
        let mut rests = 0;
        loop {
            poll(&mut [PollFd::new(stop, PollFlags::IN)], None).unwrap();
            rests += 1;
            if !stop.rest() {
                return rests;
            }
        }
    }

    #[test]
    fn threads_rest_go_on_and_end() {
        let stop = Stop::new().unwrap();
        thread::scope(|scope| {
            let threads = [(); 3].map(|()| scope.spawn(|| work(&stop)));
            let limit = Duration::from_secs(20);
            while stop.crew.lock().members < 3 {
                thread::yield_now();
            }
            for _ in 0..100 {
                assert!(stop.suspend(limit));
                assert_eq!(stop.crew.lock().resting, 3);
                stop.resume();
            }
            stop.end();
            for thread in threads {
                // One that has not gone on yet when it is to rest again has rested once.
                assert!(thread.join().unwrap() >= 1);
            }
        });
    }

    #[test]
    fn thread_that_does_not_come_to_rest_is_reported() {
        let stop = Stop::new().unwrap();
        let member = stop.enter();
        assert!(!stop.suspend(Duration::from_millis(20)));
        drop(member);
        assert!(stop.suspend(Duration::ZERO));
    }
}
