//! What wake-ups cost on this machine while it does something else: a chain of threads, each of which
//! waits for an eventfd by epoll and then signals that of the next one. It is the least time that
//! anything takes which as many threads do one after the other. They ask for the same slice as the
//! daemon's threads.

use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::buffer::spare_capacity;
use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::io::{read, write};
use virtionet_placement::slice::{SHORTEST_SLICE, set_slice};

/// The longest time for all of them.
const TIMEOUT: Duration = Duration::from_secs(5);

/// The threads.
#[derive(Debug)]
pub struct WakeChain {
    first: OwnedFd,
    ends: Receiver<Instant>,
    threads: Vec<JoinHandle<()>>,
}

impl WakeChain {
    /// Starts `links` threads.
    ///
    /// # Errors
    /// When there is no link, or the kernel has no threads or descriptors left.
    pub fn start(links: usize) -> Result<Self> {
        ensure!(links > 0, "a chain has a link");
        let (sender, ends) = channel();
        let mut events = (0..links).map(|_| eventfd(0, EventfdFlags::CLOEXEC));
        let first = events.next().context("there is no event")??;
        let mut own = first.try_clone()?;
        let mut threads = Vec::new();
        for next in events {
            let next = next?;
            let waits = std::mem::replace(&mut own, next.try_clone()?);
            threads.push(thread::spawn(move || serve(&waits, &Then::Signal(next))));
        }
        threads.push(thread::spawn(move || serve(&own, &Then::Report(sender))));
        Ok(Self {
            first,
            ends,
            threads,
        })
    }

    /// Signals the first thread, and calls `meanwhile` until the last one has run. Returns how long that
    /// took.
    ///
    /// # Errors
    /// When it takes too long, or `meanwhile` fails.
    pub fn measure(&self, mut meanwhile: impl FnMut() -> Result<()>) -> Result<Duration> {
        let started_at = Instant::now();
        write(&self.first, &1u64.to_ne_bytes())?;
        loop {
            if let Ok(ended_at) = self.ends.try_recv() {
                return Ok(ended_at.saturating_duration_since(started_at));
            }
            ensure!(started_at.elapsed() < TIMEOUT, "the threads do not wake up");
            meanwhile()?;
        }
    }
}

/// The value that ends a thread, which it passes on.
const END: u64 = 1 << 32;

impl Drop for WakeChain {
    fn drop(&mut self) {
        _ = write(&self.first, &END.to_ne_bytes());
        for thread in self.threads.drain(..) {
            _ = thread.join();
        }
    }
}

/// What a thread does when it is woken.
enum Then {
    Signal(OwnedFd),
    Report(Sender<Instant>),
}

fn serve(own: &OwnedFd, then: &Then) {
    // Where the kernel has no slices, the daemon's threads have none, either.
    _ = set_slice(None, SHORTEST_SLICE);
    let Ok(poll) = epoll_for(own) else { return };
    while let Ok(value) = wait(&poll, own) {
        match then {
            Then::Signal(next) => _ = write(next, &value.to_ne_bytes()),
            Then::Report(sender) => _ = sender.send(Instant::now()),
        }
        if value >= END {
            return;
        }
    }
}

fn epoll_for(event: &OwnedFd) -> rustix::io::Result<OwnedFd> {
    let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    epoll::add(
        &poll,
        event,
        epoll::EventData::new_u64(0),
        epoll::EventFlags::IN,
    )?;
    Ok(poll)
}

/// Waits until `event` is signalled. Returns its value.
fn wait(poll: &OwnedFd, event: &OwnedFd) -> rustix::io::Result<u64> {
    let mut events = Vec::with_capacity(1);
    epoll::wait(poll, spare_capacity(&mut events), None)?;
    let mut value = [0; 8];
    read(event, &mut value)?;
    Ok(u64::from_ne_bytes(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_link_is_passed() {
        assert!(WakeChain::start(0).is_err());
        for links in [1, 2, 5] {
            let chain = WakeChain::start(links).unwrap();
            assert_eq!(chain.threads.len(), links);
            for _ in 0..3 {
                let time = chain.measure(|| {
                    thread::yield_now();
                    Ok(())
                });
                assert!(time.unwrap() > Duration::ZERO);
            }
        }
    }
}
