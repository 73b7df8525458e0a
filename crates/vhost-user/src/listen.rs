//! How a front-end and this back-end come together: we listen, we connect, or we are started with
//! a socket.

use std::fs::{self, Permissions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ioctl_fionbio};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect as connect_to, listen,
    socket_with, sockopt,
};
use tracing::{info, warn};

use crate::sys::group_id;

/// Front-ends that may wait while one is served.
const BACKLOG: i32 = 16;
/// Pause between two attempts to connect.
const RETRY: Duration = Duration::from_millis(500);
/// Pause after the process ran out of something that accepting needs.
const EXHAUSTED: Duration = Duration::from_secs(1);

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Somebody answers on the path.
    #[error(
        "socket {} is in use by another process; stop that or choose another path", .0.display()
    )]
    InUse(PathBuf),
    /// The path is taken by something that is no socket.
    #[error("{} exists and is not a socket; remove it or choose another path", .0.display())]
    NotASocket(PathBuf),
    /// The path does not fit a unix socket's address.
    #[error("socket path {} is too long; a unix socket's path has 107 bytes at most", .0.display())]
    TooLong(PathBuf),
    /// No group of that name.
    #[error("group {0} does not exist; create it or name another")]
    NoGroup(String),
    /// The host refused.
    #[error("cannot {what} socket {}: {error}; check the path and its permissions", path.display())]
    Refused {
        /// What was tried.
        what: &'static str,
        /// The socket's path.
        path: PathBuf,
        /// What the kernel said.
        error: io::Error,
    },
    /// An inherited descriptor of the wrong kind.
    #[error("the inherited descriptor is {0}; pass a unix stream socket, connected or listening")]
    WrongKind(String),
    /// The listening socket failed.
    #[error("accepting a front-end failed: {0}; start virtionetd again")]
    Accept(io::Error),
}

/// Who may connect to a socket that we make. What is not set stays as the umask and the process
/// have it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Access {
    /// Permission bits, e.g. 0o660.
    pub mode: Option<u32>,
    /// A group's name or number.
    pub group: Option<String>,
}

/// A listening socket. The socket file that we made is removed with it.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    file: Option<SocketFile>,
}

impl Listener {
    /// Listens at `path`. A socket file left behind by a process that is gone is replaced. Mode and
    /// group are set before the first client can connect.
    ///
    /// # Errors
    /// When the path is in use or cannot be made a socket.
    // syscalls: socket bind listen connect unlink chmod chown
    pub fn bind(path: &Path, access: &Access) -> Result<Self, ListenError> {
        let address = address(path)?;
        let group = access.group.as_deref().map(group_number).transpose()?;
        remove_stale(path, &address)?;
        let refused = |what| move |error: io::Error| refused(what, path, error);
        let socket =
            unix_socket(SocketFlags::CLOEXEC).map_err(|error| refused("make")(error.into()))?;
        bind(&socket, &address).map_err(|error| match error {
            Errno::ADDRINUSE => ListenError::InUse(path.into()),
            error => refused("bind")(error.into()),
        })?;
        let file = SocketFile::of(path).map_err(refused("examine"))?;
        if let Some(mode) = access.mode {
            fs::set_permissions(path, Permissions::from_mode(mode))
                .map_err(refused("set the mode of"))?;
        }
        if group.is_some() {
            chown(path, None, group).map_err(refused("set the group of"))?;
        }
        listen(&socket, BACKLOG).map_err(|error| refused("listen on")(error.into()))?;
        Self::new(socket, Some(file)).map_err(refused("use"))
    }

    fn new(socket: OwnedFd, file: Option<SocketFile>) -> io::Result<Self> {
        let socket = UnixListener::from(socket);
        socket.set_nonblocking(true)?;
        Ok(Self { socket, file })
    }

    /// The path of the socket file, when we made it.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.file.as_ref().map(|file| file.path.as_path())
    }

    /// Waits for a front-end; `None` once `stop` is readable. A process short of descriptors or
    /// memory waits and tries again.
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
                Err(error) if exhausted(&error) => {
                    warn!("cannot accept a front-end: {error}; will try again");
                    if wait(stop, None, Some(EXHAUSTED)).map_err(ListenError::Accept)? {
                        return Ok(None);
                    }
                }
                Err(error) if passing(&error) => {}
                Err(error) => return Err(ListenError::Accept(error)),
            }
        }
    }
}

/// A descriptor that the process was started with, as QEMU's back-end conventions have it
/// (`--fd`).
#[derive(Debug)]
pub enum Inherited {
    /// A socket that listens: front-ends are accepted from it, one after the other.
    Listening(Listener),
    /// A socket that is connected to its only front-end.
    Connected(UnixStream),
}

impl Inherited {
    /// Finds out what `fd` is (see [`crate::take_fd`]).
    ///
    /// # Errors
    /// When it is no unix stream socket, or one that is neither connected nor listening.
    // syscalls: getsockopt getpeername
    pub fn new(fd: OwnedFd) -> Result<Self, ListenError> {
        let domain = sockopt::socket_domain(&fd).map_err(|_| wrong_kind("no socket"))?;
        let kind = sockopt::socket_type(&fd).map_err(|_| wrong_kind("no socket"))?;
        if domain != AddressFamily::UNIX || kind != SocketType::STREAM {
            return Err(wrong_kind("another kind of socket"));
        }
        if sockopt::socket_acceptconn(&fd).is_ok_and(|listening| listening) {
            return Listener::new(fd, None)
                .map(Self::Listening)
                .map_err(ListenError::Accept);
        }
        let stream = UnixStream::from(fd);
        if stream.peer_addr().is_err() {
            return Err(wrong_kind(
                "a socket that is neither connected nor listening",
            ));
        }
        Ok(Self::Connected(stream))
    }
}

/// Connects to a front-end that listens at `path`, trying again every 500 ms while nobody does;
/// `None` once `stop` is readable.
///
/// # Errors
/// When trying again cannot help.
// syscalls: socket connect poll
pub fn connect(path: &Path, stop: BorrowedFd<'_>) -> Result<Option<UnixStream>, ListenError> {
    let address = address(path)?;
    let mut waiting = false;
    loop {
        match connect_once(&address) {
            Ok(stream) => return Ok(Some(stream)),
            Err(error) if !absent(error) => return Err(refused("connect to", path, error.into())),
            Err(error) if !waiting => {
                waiting = true;
                info!(
                    "waiting for a front-end to listen on {} ({error})",
                    path.display()
                );
            }
            Err(_) => {}
        }
        if wait(stop, None, Some(RETRY)).map_err(|error| refused("wait for", path, error))? {
            return Ok(None);
        }
    }
}

/// A socket file that we made; it is removed with this value, if it is still the same file.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl SocketFile {
    fn of(path: &Path) -> io::Result<Self> {
        Ok(Self {
            path: path.into(),
            identity: identity(path)?,
        })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|now| now == self.identity) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Device and inode of what lies at `path`.
fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// Makes room at `path`: removes a socket file that nobody listens on.
fn remove_stale(path: &Path, address: &SocketAddrUnix) -> Result<(), ListenError> {
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(refused("examine", path, error)),
    };
    if !metadata.file_type().is_socket() {
        return Err(ListenError::NotASocket(path.into()));
    }
    match connect_once(address) {
        Err(Errno::CONNREFUSED) => {
            fs::remove_file(path).map_err(|error| refused("remove the stale", path, error))
        }
        Err(Errno::NOENT) => Ok(()),
        // A full backlog is somebody's, too.
        Ok(_) | Err(Errno::AGAIN) => Err(ListenError::InUse(path.into())),
        Err(error) => Err(refused("examine", path, error.into())),
    }
}

/// Connects without waiting for room in the other side's backlog.
fn connect_once(address: &SocketAddrUnix) -> Result<UnixStream, Errno> {
    let socket = unix_socket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
    connect_to(&socket, address)?;
    ioctl_fionbio(&socket, false)?;
    Ok(UnixStream::from(socket))
}

fn unix_socket(flags: SocketFlags) -> Result<OwnedFd, Errno> {
    socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

fn address(path: &Path) -> Result<SocketAddrUnix, ListenError> {
    SocketAddrUnix::new(path).map_err(|error| match error {
        Errno::NAMETOOLONG => ListenError::TooLong(path.into()),
        error => refused("name", path, error.into()),
    })
}

fn group_number(group: &str) -> Result<u32, ListenError> {
    if let Ok(number) = group.parse() {
        return Ok(number);
    }
    group_id(group)
        .ok()
        .flatten()
        .ok_or_else(|| ListenError::NoGroup(group.into()))
}

/// Sleeps until `stop` or `other` is readable or `timeout` has passed; true for `stop`.
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

/// Errors of connect that say that nobody listens yet, or that the backlog is full.
fn absent(error: Errno) -> bool {
    matches!(
        error,
        Errno::NOENT | Errno::CONNREFUSED | Errno::AGAIN | Errno::INTR
    )
}

/// Errors of accept that pass when something has been freed.
fn exhausted(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM)
    )
}

/// Errors of accept that mean that this client is gone.
fn passing(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED)
    )
}

fn refused(what: &'static str, path: &Path, error: io::Error) -> ListenError {
    ListenError::Refused {
        what,
        path: path.into(),
        error,
    }
}

fn wrong_kind(what: &str) -> ListenError {
    ListenError::WrongKind(what.into())
}

#[cfg(test)]
mod tests;
