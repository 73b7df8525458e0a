//! Descriptors that a front-end sent and of which nothing is known yet.
//!
//! Closing one may block: a socket with SO_LINGER waits for its peer, a file on FUSE for the file
//! system's process. So a descriptor that is not kept is closed by a thread of its own, for which
//! neither a session nor the end of the process waits.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread;

use rustix::net::sockopt;

/// Number of descriptors that may wait to be closed. Beyond it a session closes its own, and it
/// alone waits.
const MAX_WAITING: usize = 256;

/// The thread `closer`; `None` when the kernel refused it.
static CLOSER: OnceLock<Option<SyncSender<OwnedFd>>> = OnceLock::new();

/// Starts the thread that closes descriptors, unless it runs. It calls `on_start` first. Without
/// this call it starts with the first descriptor that is to be closed.
pub fn start_closer(on_start: impl FnOnce() + Send + 'static) {
    closer(on_start);
}

fn closer(on_start: impl FnOnce() + Send + 'static) -> Option<&'static SyncSender<OwnedFd>> {
    let start = || {
        let (queue, fds) = sync_channel(MAX_WAITING);
        let close_all = move || {
            on_start();
            fds.into_iter().for_each(drop);
        };
        let thread = thread::Builder::new()
            .name("closer".into())
            .spawn(close_all);
        thread.ok().map(|_| queue)
    };
    CLOSER.get_or_init(start).as_ref()
}

/// A descriptor from a front-end. Dropping it never blocks.
#[derive(Debug)]
pub struct ForeignFd(Option<OwnedFd>);

impl ForeignFd {
    /// Takes `fd`, which a front-end sent.
    #[must_use]
    pub fn new(fd: OwnedFd) -> Self {
        Self(Some(fd))
    }

    /// The descriptor itself, for a caller that has found out what it is and that closing it does
    /// not block. `None` is never returned: only a dropped value has none.
    #[must_use]
    pub fn into_known(mut self) -> Option<OwnedFd> {
        self.0.take()
    }

    /// The descriptor, to find out what it is.
    #[must_use]
    pub fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        self.0.as_ref().map(AsFd::as_fd)
    }
}

impl Drop for ForeignFd {
    fn drop(&mut self) {
        let Some(fd) = self.0.take() else { return };
        // Fails for what is no socket. The front-end may set it again, hence the thread.
        let _ = sockopt::set_socket_linger(&fd, None);
        if let Some(closer) = closer(|| ()) {
            // A descriptor that does not fit in the queue comes back in the error and is closed.
            let _ = closer.try_send(fd);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};
    use virtionet_guest::hostile::slow_closing_socket;

    #[test]
    fn dropping_a_socket_that_lingers_does_not_block() {
        let (socket, _peer) = slow_closing_socket(Duration::from_secs(20)).unwrap();
        let begin = Instant::now();
        drop(ForeignFd::new(socket));
        assert!(begin.elapsed() < Duration::from_secs(2));
    }
}
