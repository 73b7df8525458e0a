//! Unix sockets in the file system: listening with a mode and a group, connecting, and removing the
//! socket file.
//!
//! Others may be able to write to the folder of a socket, and may replace the socket file by a link
//! while this process, which may be root, sets its mode and group. So neither is set by the path:
//!
//! 1. The mode of the socket's descriptor is set before the socket is bound. The kernel gives the
//!    file that mode, less the umask, when it creates it (`unix_bind_bsd`), so at no time does the
//!    file have more permissions. The umask, which all threads share, stays as it is.
//! 2. Group, and the part of the mode that the umask took, are set through a descriptor of the file
//!    itself. The kernel opens it by the socket, or where this process lacks CAP_NET_ADMIN by the
//!    path without following a link, and then it must be a socket of this user.
//! 3. Only after that does the socket listen, so no client can connect earlier.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::unistd::Group;
use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, Stat, chmod, chownat, fchmod, fstat, openat,
};
use rustix::io::{Errno, ioctl_fionbio};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect as connect_to, listen,
    socket_with,
};
use rustix::process::geteuid;

use crate::rights::{FileIdentity, with_help};
use crate::sys::open_file_of;

/// The bits of a file's mode that are permissions.
const PERMISSIONS: u32 = 0o777;

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
    /// Another file took the place of the socket file while it was made.
    #[error("{} was replaced while it was made; put the socket in a folder that nobody else may write to", .0.display())]
    Replaced(PathBuf),
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

/// For another process, which knows the path.
impl From<UnixSocketError> for io::Error {
    fn from(error: UnixSocketError) -> Self {
        match error {
            UnixSocketError::Refused { source, .. } => source,
            UnixSocketError::InUse(_) => Errno::ADDRINUSE.into(),
            UnixSocketError::NotASocket(_) | UnixSocketError::Replaced(_) => Errno::EXIST.into(),
            UnixSocketError::TooLong(_) => Errno::NAMETOOLONG.into(),
            UnixSocketError::NoGroup(_) => Errno::INVAL.into(),
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
/// replaced. Mode and group are set before the first client can connect. The helper of this process
/// does that where this thread may not, unless the socket is to have another group.
///
/// # Errors
/// When the path is in use or is not that of a socket, the group does not exist, or the kernel
/// refuses an operation.
pub fn listen_at(
    path: &Path,
    access: &Access,
) -> Result<(UnixListener, SocketFile), UnixSocketError> {
    let refused = match (listen_own(path, access), access) {
        (
            Err(UnixSocketError::Refused { source, .. }),
            Access {
                mode: Some(mode),
                group: None,
            },
        ) if source.kind() == io::ErrorKind::PermissionDenied => (source, *mode),
        (done, _) => return done,
    };
    let (source, mode) = refused;
    let listening = with_help(|| Err(source), |helper| helper.listen(path, mode));
    let (socket, identity) =
        listening.map_err(|error| UnixSocketError::refused("listen on", path, error))?;
    Ok((socket, SocketFile::inherited(path.into(), identity)))
}

/// The same with the rights of this thread only.
///
/// # Errors
/// The same.
// syscalls: socket fchmod bind ioctl openat fstat fchownat chmod listen connect unlink
pub fn listen_own(
    path: &Path,
    access: &Access,
) -> Result<(UnixListener, SocketFile), UnixSocketError> {
    let address = address(path)?;
    let group = access.group.as_deref().map(group_number).transpose()?;
    remove_stale(path, &address)?;
    let refused = |operation| move |error: Errno| UnixSocketError::refused(operation, path, error);
    let socket =
        stream_socket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK).map_err(refused("make"))?;
    if let Some(mode) = access.mode {
        fchmod(&socket, Mode::from_raw_mode(mode)).map_err(refused("set the mode of"))?;
    }
    bind(&socket, &address).map_err(|error| match error {
        Errno::ADDRINUSE => UnixSocketError::InUse(path.into()),
        error => refused("bind")(error),
    })?;
    let (handle, stat) = open_bound(&socket, path)?;
    let file = SocketFile {
        path: path.into(),
        identity: FileIdentity {
            device: stat.st_dev,
            inode: stat.st_ino,
        },
    };
    set_access(handle.as_fd(), &stat, path, access.mode, group)?;
    listen(&socket, BACKLOG).map_err(refused("listen on"))?;
    Ok((UnixListener::from(socket), file))
}

/// Opens the file of `socket`, which was just bound to `path`, as a path descriptor.
fn open_bound(socket: &OwnedFd, path: &Path) -> Result<(OwnedFd, Stat), UnixSocketError> {
    let refused = |error: Errno| UnixSocketError::refused("examine", path, error);
    if let Ok(handle) = open_file_of(socket.as_fd()) {
        let stat = fstat(&handle).map_err(refused)?;
        return Ok((handle, stat));
    }
    // Without CAP_NET_ADMIN the kernel does not open it by the socket.
    open_own_socket(path)
}

/// Opens the socket file at `path`, which must belong to this user, as a path descriptor. A link is
/// not followed.
fn open_own_socket(path: &Path) -> Result<(OwnedFd, Stat), UnixSocketError> {
    let refused = |error: Errno| UnixSocketError::refused("examine", path, error);
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let handle = openat(CWD, path, flags, Mode::empty()).map_err(refused)?;
    let stat = fstat(&handle).map_err(refused)?;
    let is_socket = FileType::from_raw_mode(stat.st_mode) == FileType::Socket;
    if is_socket && stat.st_uid == geteuid().as_raw() {
        return Ok((handle, stat));
    }
    Err(UnixSocketError::Replaced(path.into()))
}

/// Sets the mode and the group of the file that `handle` is, as far as it does not have them yet.
/// `stat` is its state, and `path` is for errors.
fn set_access(
    handle: BorrowedFd<'_>,
    stat: &Stat,
    path: &Path,
    mode: Option<u32>,
    group: Option<u32>,
) -> Result<(), UnixSocketError> {
    let refused = |operation| move |error: Errno| UnixSocketError::refused(operation, path, error);
    if let Some(group) = group.filter(|group| *group != stat.st_gid) {
        let group = Some(Gid::from_raw(group));
        chownat(handle, "", None, group, AtFlags::EMPTY_PATH)
            .map_err(refused("set the group of"))?;
    }
    if let Some(mode) = mode.filter(|mode| *mode != stat.st_mode & PERMISSIONS) {
        // chmod of a path descriptor itself exists only since Linux 6.6.
        let entry = format!("/proc/self/fd/{}", handle.as_raw_fd());
        chmod(entry, Mode::from_raw_mode(mode)).map_err(refused("set the mode of"))?;
    }
    Ok(())
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

/// Connects to the socket at `path` as [`connect_once`] does, by the helper of this process where
/// this thread may not.
///
/// # Errors
/// As [`connect_once`], and `InvalidInput` when `path` cannot be that of a socket.
pub fn connect(path: &Path) -> io::Result<UnixStream> {
    with_help(|| connect_own(path), |helper| helper.connect(path))
}

/// The same with the rights of this thread only.
///
/// # Errors
/// The same.
pub fn connect_own(path: &Path) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path).map_err(|_| io::ErrorKind::InvalidInput)?;
    Ok(connect_once(&address)?)
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
/// file has replaced it. The helper of this process does that where this thread may not, because
/// the process has become another user since.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    identity: FileIdentity,
}

impl SocketFile {
    /// The file at `path` that another process of this program created and gave to this one.
    #[must_use]
    pub fn inherited(path: PathBuf, identity: FileIdentity) -> Self {
        Self { path, identity }
    }

    /// What tells the file from another one at its path.
    #[must_use]
    pub fn identity(&self) -> FileIdentity {
        self.identity
    }

    /// What tells the file from another one, which is not removed by this value any more.
    #[must_use]
    pub fn into_identity(mut self) -> FileIdentity {
        // No file is at an empty path.
        self.path = PathBuf::new();
        self.identity
    }

    /// The path of the file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = with_help(
            || remove_own(&self.path, self.identity),
            |helper| helper.remove_socket(&self.path, self.identity),
        );
    }
}

/// Removes the socket file at `path` with the rights of this thread only.
///
/// # Errors
/// The kernel's error, or ENOENT when another file is there than `identity` says.
// syscalls: statx unlink
pub fn remove_own(path: &Path, identity: FileIdentity) -> io::Result<()> {
    let metadata = fs::symlink_metadata(path)?;
    let found = FileIdentity {
        device: metadata.dev(),
        inode: metadata.ino(),
    };
    match metadata.file_type().is_socket() && found == identity {
        true => fs::remove_file(path),
        false => Err(Errno::NOENT.into()),
    }
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
    fn file_is_made_with_its_mode_whatever_the_umask_is() {
        let dir = folder("mode");
        let path = dir.join("s");
        for mode in [0o600, 0o660, 0o620, 0o777, 0] {
            let access = Access {
                mode: Some(mode),
                group: None,
            };
            let (socket, file) = listen_at(&path, &access).unwrap();
            assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, mode);
            drop((socket, file));
        }
        fs::remove_dir_all(dir).unwrap();
    }

    /// What the mode of a socket's descriptor does to the file is no documented interface.
    #[test]
    fn mode_of_the_descriptor_is_that_of_the_file_that_bind_makes() {
        let dir = folder("bind");
        let path = dir.join("s");
        let socket = stream_socket(SocketFlags::CLOEXEC).unwrap();
        fchmod(&socket, Mode::from_raw_mode(0o600)).unwrap();
        bind(&socket, &address(&path).unwrap()).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        // Nobody can connect before the socket listens.
        assert_eq!(
            connect_once(&address(&path).unwrap()).unwrap_err(),
            Errno::CONNREFUSED
        );
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn link_in_the_place_of_the_socket_file_is_never_followed() {
        let dir = folder("link");
        let (path, victim) = (dir.join("s"), dir.join("victim"));
        let victim_socket = UnixListener::bind(&victim).unwrap();
        let before = fs::metadata(&victim).unwrap();
        let socket = stream_socket(SocketFlags::CLOEXEC).unwrap();
        bind(&socket, &address(&path).unwrap()).unwrap();
        let inode = fs::metadata(&path).unwrap().ino();
        // The socket file is replaced between bind and the change of its mode.
        fs::rename(&path, dir.join("moved")).unwrap();
        std::os::unix::fs::symlink(&victim, &path).unwrap();
        assert!(matches!(
            open_own_socket(&path),
            Err(UnixSocketError::Replaced(_))
        ));
        // With CAP_NET_ADMIN the kernel finds the bound file, wherever it is.
        if let Ok((handle, stat)) = open_bound(&socket, &path) {
            assert_eq!(stat.st_ino, inode);
            set_access(handle.as_fd(), &stat, &path, Some(0o641), None).unwrap();
            let moved = fs::metadata(dir.join("moved")).unwrap();
            assert_eq!(moved.mode() & 0o777, 0o641);
        }
        assert_eq!(fs::metadata(&victim).unwrap().mode(), before.mode());
        drop(victim_socket);
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn own_socket_file_is_opened_and_another_file_is_not() {
        let dir = folder("own");
        let (path, plain) = (dir.join("s"), dir.join("plain"));
        let _socket = UnixListener::bind(&path).unwrap();
        fs::write(&plain, "x").unwrap();
        let (handle, stat) = open_own_socket(&path).unwrap();
        set_access(handle.as_fd(), &stat, &path, Some(0o642), None).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o642);
        assert!(matches!(
            open_own_socket(&plain),
            Err(UnixSocketError::Replaced(_))
        ));
        if geteuid().is_root() {
            std::os::unix::fs::lchown(&path, Some(1), Some(1)).unwrap();
            assert!(matches!(
                open_own_socket(&path),
                Err(UnixSocketError::Replaced(_))
            ));
        }
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn group_is_set_where_this_user_may() {
        if !geteuid().is_root() {
            return;
        }
        let dir = folder("group");
        let path = dir.join("s");
        let access = Access {
            mode: Some(0o660),
            group: Some("7".into()),
        };
        let (_socket, _file) = listen_at(&path, &access).unwrap();
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!((metadata.gid(), metadata.mode() & 0o777), (7, 0o660));
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

    #[test]
    fn connecting_to_a_missing_or_too_long_path_fails() {
        let absent = connect(Path::new("/nonexistent/qmp.sock")).unwrap_err();
        assert_eq!(absent.kind(), io::ErrorKind::NotFound);
        let too_long = connect(Path::new(&"/".repeat(109))).unwrap_err();
        assert_eq!(too_long.kind(), io::ErrorKind::InvalidInput);
    }
}
