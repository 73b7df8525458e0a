//! The ways in which a front-end and this back-end connect: the back-end listens, it connects, or
//! it inherits a socket.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType, sockopt};
use tracing::warn;
use virtionet_base::RateLimiter;
pub use virtionet_base::unix_socket::Access as SocketPermissions;
use virtionet_base::unix_socket::{
    SocketFile, UnixSocketError, address as to_socket_address, connect as connect_to, listen_at,
};

use crate::foreign_fd::ForeignFd;
use crate::sys::{TakeFdError, peer_pid, peer_uid};
use crate::wire::PendingConnections;

/// The pause before the second attempt to connect. Later pauses are longer.
const MIN_RETRY_INTERVAL: Duration = Duration::from_millis(500);
/// The longest pause between two attempts to connect.
const MAX_RETRY_INTERVAL: Duration = Duration::from_secs(5);
/// The pause after the process has run out of a resource that accepting a connection needs.
const EXHAUSTED_PAUSE: Duration = Duration::from_secs(1);

/// Why a connection with a front-end cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The socket cannot be bound or connected to.
    #[error(transparent)]
    Socket(#[from] UnixSocketError),
    /// An inherited descriptor cannot be used.
    #[error("the inherited descriptor is {0}; pass a unix stream socket, connected or listening")]
    WrongKind(#[source] WrongDescriptor),
    /// The listening socket failed.
    #[error("accepting a front-end failed: {0}; start virtionetd again")]
    Accept(#[source] io::Error),
}

/// What an inherited descriptor is instead of a usable socket.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WrongDescriptor {
    /// The descriptor cannot be taken over.
    #[error("{0}")]
    NotTaken(#[from] TakeFdError),
    /// It is not a socket.
    #[error("no socket")]
    NoSocket,
    /// It is a socket of another domain or type.
    #[error("another kind of socket")]
    OtherSocket,
    /// It is a socket that is neither connected nor listening.
    #[error("a socket that is neither connected nor listening")]
    Unconnected,
}

impl ListenError {
    /// A stable name of the error, for programs.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Socket(_) => "vhost-user-socket-unavailable",
            Self::WrongKind(_) => "inherited-descriptor-invalid",
            Self::Accept(_) => "accept-failed",
        }
    }
}

/// A listening socket. Dropping it removes the socket file that it created.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    file: Option<SocketFile>,
    /// The only user whose front-end is served; `None` for all that can connect.
    peer_uid: Option<u32>,
    /// The limit of log lines about second front-ends.
    refusals: RateLimiter,
    /// The limit of log lines about front-ends of other users.
    foreign_users: RateLimiter,
    /// The limit of log lines about a lack of descriptors or memory.
    exhaustions: RateLimiter,
}

impl Listener {
    /// Listens at `path`. The socket file of a process that has ended is replaced. Mode and group
    /// are set before the first client can connect.
    ///
    /// # Errors
    /// When the path is in use or a socket cannot be created there.
    pub fn bind(path: &Path, access: &SocketPermissions) -> Result<Self, ListenError> {
        let (socket, file) = listen_at(path, access)?;
        Self::new(socket.into(), Some(file)).map_err(ListenError::Accept)
    }

    fn new(socket: OwnedFd, file: Option<SocketFile>) -> io::Result<Self> {
        let socket = UnixListener::from(socket);
        socket.set_nonblocking(true)?;
        Ok(Self {
            socket,
            file,
            peer_uid: None,
            refusals: RateLimiter::new(),
            foreign_users: RateLimiter::new(),
            exhaustions: RateLimiter::new(),
        })
    }

    /// The listener on a socket that another process of this program created.
    ///
    /// # Errors
    /// When it is no socket.
    pub fn inherited(socket: OwnedFd) -> Result<Self, ListenError> {
        Self::new(socket, None).map_err(ListenError::Accept)
    }

    /// The same listener, which from now on removes `file` when it is dropped.
    #[must_use]
    pub fn owning(mut self, file: Option<SocketFile>) -> Self {
        self.file = file;
        self
    }

    /// The socket file, if this process removes it.
    #[must_use]
    pub fn file(&self) -> Option<&SocketFile> {
        self.file.as_ref()
    }

    /// The same listener, which serves only front-ends of user `uid`, or of all users.
    #[must_use]
    pub fn with_peer_uid(mut self, uid: Option<u32>) -> Self {
        self.peer_uid = uid;
        self
    }

    /// The path of the socket file, if this process made it.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.file.as_ref().map(SocketFile::path)
    }

    /// Waits for a front-end. Returns `None` once `stop` is readable. If the process runs out of
    /// descriptors or memory, it waits and tries again. Front-ends of users that are not served are
    /// refused.
    ///
    /// # Errors
    /// When the socket itself fails.
    // syscalls: poll accept4
    pub fn accept(&self, stop: BorrowedFd<'_>) -> Result<Option<UnixStream>, ListenError> {
        loop {
            if wait(stop, Some(self.socket.as_fd()), None).map_err(ListenError::Accept)? {
                return Ok(None);
            }
            match self.socket.accept() {
                Ok((stream, _)) if self.is_served(&stream) => return Ok(Some(stream)),
                // Closing it also closes the descriptors that it has sent, which may block.
                Ok((stream, _)) => drop(ForeignFd::new(stream.into())),
                Err(error) if is_exhausted(&error) => {
                    if let Some(suppressed) = self.exhaustions.allow() {
                        warn!(
                            suppressed,
                            "cannot accept a front-end: {error}; will try again"
                        );
                    }
                    if wait(stop, None, Some(EXHAUSTED_PAUSE)).map_err(ListenError::Accept)? {
                        return Ok(None);
                    }
                }
                Err(error) if is_transient(&error) => {}
                Err(error) => return Err(ListenError::Accept(error)),
            }
        }
    }
}

impl Listener {
    /// Waits for a front-end for at most `limit`, and closes its connection at once if `is_refused` still
    /// holds then.
    // syscalls: poll accept4
    pub fn refuse_next(&self, limit: Duration, is_refused: impl Fn() -> bool) {
        let mut fds = [PollFd::new(&self.socket, PollFlags::IN)];
        let timeout = Timespec::try_from(limit).ok();
        // An interrupted wait is a short one.
        if matches!(poll(&mut fds, timeout.as_ref()), Ok(ready) if ready > 0) && is_refused() {
            match self.socket.accept() {
                // Closing it also closes the descriptors that it has sent, which may block.
                Ok((stream, _)) => drop(ForeignFd::new(stream.into())),
                Err(_) => std::thread::sleep(limit),
            }
        }
    }

    /// Whether the front-end at the other end of `stream` belongs to a user that is served. If it
    /// does not, the log says so.
    fn is_served(&self, stream: &UnixStream) -> bool {
        let Some(expected) = self.peer_uid else {
            return true;
        };
        let uid = peer_uid(stream);
        if uid == Some(expected) {
            return true;
        }
        if let Some(suppressed) = self.foreign_users.allow() {
            let user = uid.map_or_else(|| "unknown user".into(), |uid| format!("user {uid}"));
            warn!(
                suppressed,
                "a front-end of {user} was refused, because only user {expected} is served (--peer-uid)"
            );
        }
        false
    }
}

impl PendingConnections for Listener {
    fn poll_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn refuse(&self) {
        let Ok((stream, _)) = self.socket.accept() else {
            return;
        };
        if let Some(suppressed) = self.refusals.allow() {
            let process = peer_pid(&stream)
                .map_or_else(|| "another process".into(), |pid| format!("process {pid}"));
            warn!(
                suppressed,
                "{process} connected while a front-end is being served and was refused; a device serves one front-end at a time"
            );
        }
        // Closing it also closes the descriptors that it has sent, which may block.
        drop(ForeignFd::new(stream.into()));
    }
}

/// A socket that the process inherited from its parent, as QEMU's conventions for back-ends
/// describe (`--fd`).
#[derive(Debug)]
pub enum InheritedSocket {
    /// A listening socket, from which front-ends are accepted one after the other.
    Listening(Listener),
    /// A socket that is connected to its only front-end.
    Connected(UnixStream),
}

impl InheritedSocket {
    /// Determines the kind of socket that `fd` is (see [`crate::take_fd`]).
    ///
    /// # Errors
    /// When it is not a unix stream socket, or is neither connected nor listening.
    // syscalls: getsockopt getpeername
    pub fn new(fd: OwnedFd) -> Result<Self, ListenError> {
        let domain = sockopt::socket_domain(&fd).map_err(|_| WrongDescriptor::NoSocket)?;
        let kind = sockopt::socket_type(&fd).map_err(|_| WrongDescriptor::NoSocket)?;
        if domain != AddressFamily::UNIX || kind != SocketType::STREAM {
            return Err(WrongDescriptor::OtherSocket.into());
        }
        if sockopt::socket_acceptconn(&fd).is_ok_and(|listening| listening) {
            return Listener::new(fd, None)
                .map(Self::Listening)
                .map_err(ListenError::Accept);
        }
        let stream = UnixStream::from(fd);
        if stream.peer_addr().is_err() {
            return Err(WrongDescriptor::Unconnected.into());
        }
        Ok(Self::Connected(stream))
    }
}

/// Connects to a front-end that listens at `path`, and tries again until it succeeds: every 500 ms
/// while no process listens, and after any other error with pauses that grow to 5 s. Returns `None`
/// once `stop` is readable. It calls `report` with the reason each time that the reason changes.
///
/// No error of the kernel is final: the socket may be created, get its mode or be labelled
/// (SELinux) after this process has started, and descriptors may become available.
///
/// # Errors
/// When `path` cannot be that of a unix socket.
// syscalls: socket connect ppoll
pub fn connect(
    path: &Path,
    stop: BorrowedFd<'_>,
    mut report: impl FnMut(&str),
) -> Result<Option<UnixStream>, ListenError> {
    to_socket_address(path)?;
    let mut reported = None;
    let mut pause = MIN_RETRY_INTERVAL;
    loop {
        match connect_to(path).map_err(to_errno) {
            Ok(stream) => return Ok(Some(stream)),
            Err(Errno::INTR) => continue,
            Err(error) => {
                if reported.replace(error) != Some(error) {
                    report(&explain_failed_connect(path, error));
                }
                pause = next_pause(pause, error);
            }
        }
        if wait(stop, None, Some(pause)).map_err(|error| refused("wait for", path, error))? {
            return Ok(None);
        }
    }
}

fn to_errno(error: io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

/// The pause after an attempt to connect that failed with `error`. `last` is the pause before that
/// attempt.
fn next_pause(last: Duration, error: Errno) -> Duration {
    match error {
        Errno::NOENT | Errno::CONNREFUSED => MIN_RETRY_INTERVAL,
        _ => (last * 3 / 2).min(MAX_RETRY_INTERVAL),
    }
}

/// One sentence that says why a connection failed and what to do.
fn explain_failed_connect(path: &Path, error: Errno) -> String {
    let cause = match error {
        Errno::NOENT => "the socket does not exist yet; start the front-end, or correct the path",
        Errno::CONNREFUSED => "no front-end listens on it; start the front-end",
        Errno::AGAIN => "its front-end does not accept connections; see whether it is stopped",
        Errno::ACCESS | Errno::PERM => {
            "this user may not connect to it; correct its mode, owner or security label"
        }
        Errno::PROTOTYPE => "it is no stream socket; correct the path",
        Errno::MFILE | Errno::NFILE => "there are too many open files; raise the limit (ulimit -n)",
        _ => "see whether the front-end runs",
    };
    format!("cannot connect to {} ({error}): {cause}", path.display())
}

/// Sleeps until `stop` or `other` is readable or `timeout` has passed. Returns true for `stop`.
fn wait(
    stop: BorrowedFd<'_>,
    other: Option<BorrowedFd<'_>>,
    timeout: Option<Duration>,
) -> io::Result<bool> {
    let mut fds: Vec<PollFd<'_>> = std::iter::once(stop)
        .chain(other)
        .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
        .collect();
    let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
    loop {
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) => return Ok(!fds[0].revents().is_empty()),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Whether `accept` failed for lack of a resource that may become available again.
fn is_exhausted(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM)
    )
}

/// Whether `accept` failed because this client has already disconnected.
fn is_transient(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED)
    )
}

fn refused(operation: &'static str, path: &Path, error: impl Into<io::Error>) -> ListenError {
    UnixSocketError::refused(operation, path, error).into()
}

impl From<WrongDescriptor> for ListenError {
    fn from(error: WrongDescriptor) -> Self {
        Self::WrongKind(error)
    }
}

#[cfg(test)]
mod tests;
