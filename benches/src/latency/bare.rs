//! The wake-ups of a round trip without any virtqueue: two threads that wake each other by eventfds.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use virtionet_guest::eventfd::WaitableEventFd;
use virtionet_tests::sched;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::distribution::Distribution;

/// The frame goes through the back-end twice in a round trip.
const WAKE_UPS: usize = 2;
const TIMEOUT: Duration = Duration::from_secs(5);

/// A thread that answers each kick with a call, as a worker without any work would.
#[derive(Debug)]
pub struct BareWakeUps {
    kick: WaitableEventFd,
    call: WaitableEventFd,
    is_ending: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl BareWakeUps {
    /// Starts the thread on `cpu`.
    ///
    /// # Errors
    /// When the eventfds, the epoll or the thread cannot be made.
    pub fn start(cpu: usize) -> Result<Self> {
        let (kick, call) = (WaitableEventFd::new()?, WaitableEventFd::new()?);
        let is_ending = Arc::<AtomicBool>::default();
        let worker = Worker {
            kick: kick.try_clone()?,
            call: call.try_clone()?,
            is_ending: Arc::clone(&is_ending),
        };
        let thread = std::thread::Builder::new()
            .name("bare".to_owned())
            .spawn(move || worker.run(cpu))
            .context("a thread cannot be started")?;
        Ok(Self {
            kick,
            call,
            is_ending,
            thread: Some(thread),
        })
    }

    /// Wakes the thread and waits for its call, as often as a round trip needs, for `interval`.
    ///
    /// # Errors
    /// When the thread has ended.
    pub fn measure(&mut self, interval: Duration) -> Result<Distribution> {
        let mut durations = Vec::new();
        let end = Instant::now() + interval;
        let mut started_at = Instant::now();
        while started_at < end {
            for _ in 0..WAKE_UPS {
                self.kick.signal()?;
                ensure!(self.call.wait(TIMEOUT)? != 0, "the thread does not answer");
            }
            let now = Instant::now();
            durations.push(now - started_at);
            started_at = now;
        }
        Distribution::new(durations).context("the interval is too short")
    }
}

impl Drop for BareWakeUps {
    fn drop(&mut self) {
        self.is_ending.store(true, Ordering::Release);
        let woken = self.kick.signal();
        let thread = self.thread.take().filter(|_| woken.is_ok());
        let outcome = thread.map(JoinHandle::join);
        if let Some(Ok(Err(error))) = outcome {
            crate::harness::progress(&format!(
                "the thread of the bare wake-ups failed: {error:#}"
            ));
        }
    }
}

struct Worker {
    kick: WaitableEventFd,
    call: WaitableEventFd,
    is_ending: Arc<AtomicBool>,
}

impl Worker {
    fn run(self, cpu: usize) -> Result<()> {
        sched::pin(0, cpu)?;
        let epoll = Epoll::new()?;
        let fd = self.kick.as_raw_fd();
        let event = EpollEvent::new(EventSet::IN, 0);
        epoll.ctl(ControlOperation::Add, fd, event)?;
        while !self.is_ending.load(Ordering::Acquire) {
            let timeout = i32::try_from(TIMEOUT.as_millis()).map_err(|error| anyhow!(error))?;
            epoll.wait(timeout, &mut [EpollEvent::default()])?;
            if self.kick.try_read() != 0 {
                self.call.signal()?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kick_is_answered_and_the_thread_ends() {
        let cpu = sched::allowed_cpus().unwrap()[0];
        let mut wake_ups = BareWakeUps::start(cpu).unwrap();
        let round_trips = wake_ups.measure(Duration::from_millis(20)).unwrap();
        assert!(round_trips.microseconds(500) > 0.0);
        drop(wake_ups);
    }
}
