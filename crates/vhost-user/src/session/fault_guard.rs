//! The thread that releases threads which wait for a page of a front-end that has gone.
//!
//! In a postcopy migration a worker, and the session's own thread when it starts a vring, may wait
//! for a page of guest memory ([`MissingPages`]). The session's thread also waits for the lock of a
//! vring whose worker waits. If the front-end is killed meanwhile, no page comes any more, and the
//! session's thread does not get to see the end of the connection. So this thread waits for that.
//!
//! It exists from POSTCOPY_ADVISE to POSTCOPY_END, is not limited further than the session's thread,
//! and reads nothing.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use vhost::vhost_user::message::FrontendReq;
use virtionet_virtqueue::memory::MissingPages;

use super::Session;
use crate::error::{ProtocolError, RequestError, SessionError};
use crate::wire::Channel;

/// The thread, which ends when this is dropped.
#[derive(Debug)]
pub(super) struct FaultGuard {
    pages: Arc<MissingPages>,
    /// Readable when the thread must end.
    end: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl FaultGuard {
    /// Makes `guard` that of the present state of `session`, whose connection is that of `channel`.
    ///
    /// # Errors
    /// When the host has no thread or no descriptors left.
    pub(super) fn update(
        guard: &mut Option<Self>,
        session: &Session<'_>,
        channel: &Channel<'_>,
    ) -> Result<(), SessionError> {
        let pages = session.missing_pages();
        match (&*guard, pages) {
            (None, None) => {}
            (Some(guard), Some(pages)) if Arc::ptr_eq(&guard.pages, pages) => {}
            (_, None) => *guard = None,
            (_, Some(pages)) => {
                let started = Self::start(Arc::clone(pages), channel);
                *guard = Some(started.map_err(|error| ProtocolError::Unanswerable {
                    request: FrontendReq::POSTCOPY_ADVISE,
                    refusal: RequestError::PostcopyGuard(error),
                })?);
            }
        }
        Ok(())
    }

    // syscalls: eventfd2 fcntl(F_DUPFD_CLOEXEC) clone
    fn start(pages: Arc<MissingPages>, channel: &Channel<'_>) -> io::Result<Self> {
        let connection = channel.copy_of_stream()?;
        let end = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let (watched, ended) = (Arc::clone(&pages), Arc::clone(&end));
        let watch = move || {
            if let Some(connection) = connection.as_fd()
                && waits_for_hang_up(connection, &ended)
                && watched.abandon()
            {
                tracing::warn!(
                    "the front-end disconnected during a postcopy migration; what was left of its guest's memory is abandoned"
                );
            }
        };
        let thread = thread::Builder::new()
            .name("postcopy".into())
            .spawn(watch)?;
        Ok(Self {
            pages,
            end,
            thread: Some(thread),
        })
    }
}

impl Drop for FaultGuard {
    fn drop(&mut self) {
        // syscalls: write
        let _ = rustix::io::write(&self.end, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            // It waits for nothing else, and has no code that panics.
            let _ = thread.join();
        }
    }
}

/// Waits until the front-end closes `connection`, or `end` is readable, and returns false then.
// syscalls: ppoll
fn waits_for_hang_up(connection: BorrowedFd<'_>, end: &OwnedFd) -> bool {
    loop {
        let mut fds = [
            PollFd::new(end, PollFlags::IN),
            PollFd::from_borrowed_fd(connection, PollFlags::RDHUP),
        ];
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            // Cannot happen to open descriptors.
            Err(_) => return false,
        }
        if !fds[0].revents().is_empty() {
            return false;
        }
        if !fds[1].revents().is_empty() {
            return true;
        }
    }
}
