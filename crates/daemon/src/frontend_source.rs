//! The source of a device's front-ends.

use std::fmt;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use virtionet_base::rights::FileIdentity;
use virtionet_base::unix_socket::SocketFile;
use virtionet_config::Socket;
use virtionet_handover::{ListenerImage, SharedFd, SourceImage};
use virtionet_vhost_user::listen::{
    InheritedSocket, ListenError, Listener, SocketPermissions, WrongDescriptor, connect,
};
use virtionet_vhost_user::{PendingConnections, take_fd};

/// The source of a device's front-ends. Its `Display` is for the log and names what was opened.
#[derive(Debug)]
pub enum FrontendSource {
    /// Front-ends connect to a socket.
    Listener(Listener),
    /// The device connects to a front-end that listens.
    Connect(PathBuf),
    /// One connection that was made before the program started.
    Once(Option<UnixStream>),
}

impl FrontendSource {
    /// Opens the socket that `socket` describes.
    ///
    /// # Errors
    /// When the path cannot be listened on, or the inherited descriptor cannot be used.
    pub fn open(socket: &Socket) -> Result<Self, ListenError> {
        Ok(match socket {
            Socket::Listen {
                path,
                mode,
                group,
                peer_uid,
            } => {
                let access = SocketPermissions {
                    mode: Some(*mode),
                    group: group.clone(),
                };
                Self::Listener(Listener::bind(path, &access)?.with_peer_uid(*peer_uid))
            }
            Socket::Connect { path } => Self::Connect(path.clone()),
            Socket::Inherited(number) => {
                let fd = take_fd(*number).map_err(WrongDescriptor::from)?;
                match InheritedSocket::new(fd)? {
                    InheritedSocket::Listening(listener) => Self::Listener(listener),
                    InheritedSocket::Connected(stream) => Self::Once(Some(stream)),
                }
            }
        })
    }

    /// The source of the daemon before this one, whose listening socket `listener` is, if it has one.
    /// The socket file is not removed, until it is given to [`FrontendSource::own_file`].
    ///
    /// # Errors
    /// When `listener` is no socket.
    pub fn inherited(socket: &Socket, listener: Option<OwnedFd>) -> Result<Self, ListenError> {
        let peer_uid = match socket {
            Socket::Listen { peer_uid, .. } => *peer_uid,
            Socket::Connect { .. } | Socket::Inherited(_) => None,
        };
        Ok(match (socket, listener) {
            (_, Some(fd)) => Self::Listener(Listener::inherited(fd)?.with_peer_uid(peer_uid)),
            (Socket::Connect { path }, None) => Self::Connect(path.clone()),
            (Socket::Listen { .. } | Socket::Inherited(_), None) => Self::Once(None),
        })
    }

    /// The same source, which from now on removes its socket file at the end.
    #[must_use]
    pub fn own_file(self, file: Option<SocketFile>) -> Self {
        match self {
            Self::Listener(listener) => Self::Listener(listener.owning(file)),
            other => other,
        }
    }

    /// The image of this source, for the next daemon.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn to_image(&self) -> io::Result<SourceImage<SharedFd>> {
        Ok(match self {
            Self::Listener(listener) => SourceImage::Listener(ListenerImage {
                socket: Arc::new(listener.poll_fd().try_clone_to_owned()?),
                file: listener.file().map(|file| {
                    let FileIdentity { device, inode } = file.identity();
                    (device, inode)
                }),
            }),
            Self::Connect(_) => SourceImage::Connect,
            Self::Once(_) => SourceImage::Once,
        })
    }

    /// The next front-end; `None` when there will be none, or `stop` is readable. `report` is
    /// called with the reason why there is no connection yet, where that is known.
    ///
    /// # Errors
    /// When no front-end can connect any more.
    pub fn next(
        &mut self,
        stop: BorrowedFd<'_>,
        report: impl FnMut(&str),
    ) -> Result<Option<UnixStream>, ListenError> {
        match self {
            Self::Listener(listener) => listener.accept(stop),
            Self::Connect(path) => connect(path, stop, report),
            Self::Once(stream) => Ok(stream.take()),
        }
    }

    /// Waits for a front-end for at most `limit`, and closes its connection at once if `is_refused` still
    /// holds then. One that would be connected to is not.
    // syscalls: poll accept4
    pub fn refuse_next(&self, limit: Duration, is_refused: impl Fn() -> bool) {
        match self {
            Self::Listener(listener) => listener.refuse_next(limit, is_refused),
            Self::Connect(_) | Self::Once(_) => std::thread::sleep(limit),
        }
    }

    /// The front-ends that try to connect while another one is served.
    #[must_use]
    pub fn others(&self) -> Option<&dyn PendingConnections> {
        match self {
            Self::Listener(listener) => Some(listener),
            Self::Connect(_) | Self::Once(_) => None,
        }
    }

    /// Whether no other front-end can come.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        matches!(self, Self::Once(None))
    }
}

impl fmt::Display for FrontendSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Listener(listener) => match listener.path() {
                Some(path) => write!(f, "listening on {}", path.display()),
                None => f.write_str("listening on an inherited socket"),
            },
            Self::Connect(path) => write!(f, "connecting to {}", path.display()),
            Self::Once(_) => f.write_str("inherited connection"),
        }
    }
}
