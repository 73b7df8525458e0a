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
use tracing::{info, warn};
pub use virtionet_base::unix_socket::Access as SocketPermissions;
use virtionet_base::unix_socket::{
    SocketFile, UnixSocketError, address as to_socket_address, connect_once, listen_at,
};

use crate::sys::TakeFdError;

/// The pause between two attempts to connect.
const RETRY_INTERVAL: Duration = Duration::from_millis(500);
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
}

impl Listener {
    /// Listens at `path`. The socket file of a process that has ended is replaced. Mode and group
    /// are set before the first client can connect.
    ///
    /// # Errors
    /// When the path is in use or a socket cannot be created there.
    pub fn bind(path: &Path, access: &SocketPermissions) -> Result<Self, ListenError> {
        let (socket, file) = listen_at(path, access)?;
        Ok(Self {
            socket,
            file: Some(file),
        })
    }

    fn new(socket: OwnedFd, file: Option<SocketFile>) -> io::Result<Self> {
        let socket = UnixListener::from(socket);
        socket.set_nonblocking(true)?;
        Ok(Self { socket, file })
    }

    /// The path of the socket file, if this process made it.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.file.as_ref().map(SocketFile::path)
    }

    /// Waits for a front-end. Returns `None` once `stop` is readable. If the process runs out of
    /// descriptors or memory, it waits and tries again.
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
                Ok((stream, _)) => return Ok(Some(stream)),
                Err(error) if is_exhausted(&error) => {
                    warn!("cannot accept a front-end: {error}; virtionetd tries again");
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

/// Connects to a front-end that listens at `path`, with an attempt every 500 ms until one succeeds.
/// Returns `None` once `stop` is readable.
///
/// # Errors
/// When another attempt cannot succeed.
// syscalls: socket connect poll
pub fn connect(path: &Path, stop: BorrowedFd<'_>) -> Result<Option<UnixStream>, ListenError> {
    let address = to_socket_address(path)?;
    let mut waiting = false;
    loop {
        match connect_once(&address) {
            Ok(stream) => return Ok(Some(stream)),
            Err(error) if !is_absent(error) => return Err(refused("connect to", path, error)),
            Err(error) if !waiting => {
                waiting = true;
                info!(
                    "waiting for a front-end to listen on {} ({error})",
                    path.display()
                );
            }
            Err(_) => {}
        }
        if wait(stop, None, Some(RETRY_INTERVAL))
            .map_err(|error| refused("wait for", path, error))?
        {
            return Ok(None);
        }
    }
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

/// Whether `connect` failed because no process listens yet, or because the backlog is full.
fn is_absent(error: Errno) -> bool {
    matches!(
        error,
        Errno::NOENT | Errno::CONNREFUSED | Errno::AGAIN | Errno::INTR
    )
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
