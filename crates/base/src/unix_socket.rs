//! Unix sockets in the file system: listening with a mode and a group, connecting, and removing the
//! socket file.

use std::fs::{self, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::unistd::Group;
use rustix::io::{Errno, ioctl_fionbio};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect as connect_to, listen,
    socket_with,
};

/// The number of clients that can wait to be accepted.
const BACKLOG: i32 = 16;

/// Why a socket cannot be bound or connected to.
#[derive(Debug, thiserror::Error)]
pub enum UnixSocketError {
    /// Another process listens on the socket.
    #[error("socket {} is in use by another process; stop that or choose another path", .0.display())]
    InUse(PathBuf),
    /// The path exists and is not a socket.
    #[error("{} exists and is not a socket; remove it or choose another path", .0.display())]
    NotASocket(PathBuf),
    /// The path does not fit the address of a unix socket.
    #[error("socket path {} is too long; a unix socket's path has 107 bytes at most", .0.display())]
    TooLong(PathBuf),
    /// There is no group with that name.
    #[error("group {0} does not exist; create it or name another")]
    NoGroup(String),
    /// The kernel refused an operation.
    #[error("cannot {operation} socket {}: {source}; check the path and its permissions", path.display())]
    Refused {
        /// The operation, as a verb in front of "socket".
        operation: &'static str,
        /// The path of the socket.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
}

impl UnixSocketError {
    /// The error of an `operation` on the socket at `path` that the kernel refused.
    pub fn refused(operation: &'static str, path: &Path, source: impl Into<io::Error>) -> Self {
        Self::Refused {
            operation,
            path: path.into(),
            source: source.into(),
        }
    }
}

/// Who may connect to a socket. Without a mode the umask decides; without a group the socket file
/// gets the group of the process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Access {
    /// Permission bits, for example 0o660.
    pub mode: Option<u32>,
    /// The name or number of a group.
    pub group: Option<String>,
}

/// Listens at `path` with a non-blocking socket. The socket file of a process that has ended is
/// replaced. Mode and group are set before the first client can connect.
///
/// # Errors
/// When the path is in use or is not that of a socket, the group does not exist, or the kernel
/// refuses an operation.
// syscalls: socket bind listen connect unlink chmod chown
pub fn listen_at(
    path: &Path,
    access: &Access,
) -> Result<(UnixListener, SocketFile), UnixSocketError> {
    let address = address(path)?;
    let group = access.group.as_deref().map(group_number).transpose()?;
    remove_stale(path, &address)?;
    let refused =
        |operation| move |error: io::Error| UnixSocketError::refused(operation, path, error);
    let socket = stream_socket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)
        .map_err(|error| refused("make")(error.into()))?;
    bind(&socket, &address).map_err(|error| match error {
        Errno::ADDRINUSE => UnixSocketError::InUse(path.into()),
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
    Ok((UnixListener::from(socket), file))
}

/// Connects to `address` without waiting if the backlog is full. The returned socket blocks.
///
/// # Errors
/// The kernel's error: `NOENT` or `CONNREFUSED` when nothing listens, `AGAIN` when the backlog is
/// full.
pub fn connect_once(address: &SocketAddrUnix) -> Result<UnixStream, Errno> {
    let socket = stream_socket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
    connect_to(&socket, address)?;
    ioctl_fionbio(&socket, false)?;
    Ok(UnixStream::from(socket))
}

/// The address of the socket at `path`.
///
/// # Errors
/// When the path is too long.
pub fn address(path: &Path) -> Result<SocketAddrUnix, UnixSocketError> {
    SocketAddrUnix::new(path).map_err(|error| match error {
        Errno::NAMETOOLONG => UnixSocketError::TooLong(path.into()),
        error => UnixSocketError::refused("name", path, error),
    })
}

/// A socket file that this process created. Dropping this value removes the file, unless another
/// file has replaced it.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// The device and inode of the file.
    identity: (u64, u64),
}

impl SocketFile {
    /// The socket file that is now at `path`.
    fn of(path: &Path) -> io::Result<Self> {
        Ok(Self {
            path: path.into(),
            identity: identity(path)?,
        })
    }

    /// The path of the file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|now| now == self.identity) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// The device and inode of the file at `path`.
fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// Removes a socket file on which no process listens.
fn remove_stale(path: &Path, address: &SocketAddrUnix) -> Result<(), UnixSocketError> {
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(UnixSocketError::refused("examine", path, error)),
    };
    if !metadata.file_type().is_socket() {
        return Err(UnixSocketError::NotASocket(path.into()));
    }
    match connect_once(address) {
        Err(Errno::CONNREFUSED) => fs::remove_file(path)
            .map_err(|error| UnixSocketError::refused("remove the stale", path, error)),
        Err(Errno::NOENT) => Ok(()),
        // A process with a full backlog listens, too.
        Ok(_) | Err(Errno::AGAIN) => Err(UnixSocketError::InUse(path.into())),
        Err(error) => Err(UnixSocketError::refused("examine", path, error)),
    }
}

fn stream_socket(flags: SocketFlags) -> Result<OwnedFd, Errno> {
    socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

/// The number of the group whose name or number `group` is.
fn group_number(group: &str) -> Result<u32, UnixSocketError> {
    if let Ok(number) = group.parse() {
        return Ok(number);
    }
    match Group::from_name(group) {
        Ok(Some(found)) => Ok(found.gid.as_raw()),
        _ => Err(UnixSocketError::NoGroup(group.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(name: &str) -> PathBuf {
        let dir =
            std::env::temp_dir().join(format!("virtionet-base-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        dir
    }

    #[test]
    fn stale_socket_file_is_replaced_and_removed_at_the_end() {
        let dir = folder("stale");
        let path = dir.join("s");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let access = Access {
            mode: Some(0o640),
            group: Some("0".into()),
        };
        let (socket, file) = listen_at(&path, &access).unwrap();
        assert_eq!(file.path(), path);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o640);
        assert!(matches!(
            listen_at(&path, &Access::default()),
            Err(UnixSocketError::InUse(_))
        ));
        drop((socket, file));
        assert!(!path.exists());
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn file_that_is_not_the_own_socket_is_not_removed() {
        let dir = folder("other");
        let path = dir.join("s");
        fs::write(&path, "x").unwrap();
        assert!(matches!(
            listen_at(&path, &Access::default()),
            Err(UnixSocketError::NotASocket(_))
        ));
        fs::remove_file(&path).unwrap();
        let (_socket, file) = listen_at(&path, &Access::default()).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "another").unwrap();
        drop(file);
        assert!(path.exists());
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn unknown_group_or_long_path_is_refused() {
        let access = Access {
            mode: None,
            group: Some("no-such-group".into()),
        };
        let error = listen_at(Path::new("/tmp/x"), &access).unwrap_err();
        assert!(error.to_string().contains("no-such-group"), "{error}");
        let long = PathBuf::from("/".to_owned() + &"x".repeat(200));
        assert!(matches!(
            listen_at(&long, &Access::default()),
            Err(UnixSocketError::TooLong(_))
        ));
    }
}
