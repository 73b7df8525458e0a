//! Eventfds: the driver's kick and the device's call.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// An eventfd that can be waited for with a time limit.
#[derive(Debug)]
pub struct WaitableEventFd {
    event: EventFd,
    epoll: Epoll,
}

impl WaitableEventFd {
    /// A new eventfd that is not signalled.
    ///
    /// # Errors
    /// When the process has no file descriptor left.
    pub fn new() -> io::Result<Self> {
        Self::from_eventfd(EventFd::new(EFD_NONBLOCK)?)
    }

    /// Another descriptor of the same eventfd.
    ///
    /// # Errors
    /// When the process has no file descriptor left.
    pub fn try_clone(&self) -> io::Result<Self> {
        Self::from_eventfd(self.event.try_clone()?)
    }

    fn from_eventfd(event: EventFd) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        epoll.ctl(
            ControlOperation::Add,
            event.as_raw_fd(),
            EpollEvent::new(EventSet::IN, 0),
        )?;
        Ok(Self { event, epoll })
    }

    /// Adds `count` to the eventfd's counter.
    ///
    /// # Errors
    /// When the kernel refuses the write.
    pub fn add(&self, count: u64) -> io::Result<()> {
        self.event.write(count)
    }

    /// Signals the eventfd.
    ///
    /// # Errors
    /// When the kernel refuses the write.
    pub fn signal(&self) -> io::Result<()> {
        self.event.write(1)
    }

    /// How often the eventfd was signalled since the last read. It does not wait.
    #[must_use]
    pub fn try_read(&self) -> u64 {
        self.event.read().unwrap_or(0)
    }

    /// Waits until the eventfd is signalled or `limit` has passed. Returns how often it was
    /// signalled.
    ///
    /// # Errors
    /// When the kernel refuses to wait.
    pub fn wait(&self, limit: Duration) -> io::Result<u64> {
        let end = Instant::now() + limit;
        loop {
            let count = self.try_read();
            let left = end.saturating_duration_since(Instant::now());
            if count != 0 || left.is_zero() {
                return Ok(count);
            }
            let millis = i32::try_from(left.as_millis().max(1)).unwrap_or(i32::MAX);
            match self.epoll.wait(millis, &mut [EpollEvent::default()]) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
        }
    }
}

impl AsRawFd for WaitableEventFd {
    fn as_raw_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eventfd_signalled_by_a_thread_ends_the_wait() {
        let notifier = WaitableEventFd::new().unwrap();
        assert_eq!(notifier.wait(Duration::from_millis(5)).unwrap(), 0);
        let other = notifier.try_clone().unwrap();
        let signaller = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(10));
            other.signal().unwrap();
        });
        assert_eq!(notifier.wait(Duration::from_secs(10)).unwrap(), 1);
        signaller.join().unwrap();
        assert_eq!(notifier.try_read(), 0);
    }
}
