//! Operations for which this process may lack the rights.
//!
//! A confined process has given up its capabilities. What it still needs them for is carried out by
//! a helper process, which kept them and reads nothing that a guest or a front-end wrote. This
//! module is the seam between the two: the crates that need a right make the call themselves, and
//! where the kernel answers that this thread may not, [`with_help`] asks the helper. A process has
//! at most one.

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::OnceLock;

/// A change to a network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkChange {
    /// It is brought up.
    Up,
    /// Its MTU becomes this number of bytes.
    Mtu(u32),
    /// It becomes a port of the bridge of this name.
    Port(String),
}

impl fmt::Display for LinkChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Up => f.write_str("bring it up"),
            Self::Mtu(mtu) => write!(f, "set its MTU to {mtu}"),
            Self::Port(bridge) => write!(f, "make it a port of {bridge}"),
        }
    }
}

/// Which file it is, whatever its path is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileIdentity {
    /// The number of the file system's device.
    pub device: u64,
    /// The number of the inode on it.
    pub inode: u64,
}

/// The helper, as the crates see it that need a right. Every function returns the kernel's error,
/// EPERM where the configuration does not allow the operation, and `None` when there is no helper
/// any more.
pub trait Helper: fmt::Debug + Send + Sync {
    /// Makes `tun`, an open `/dev/net/tun`, an attached queue of the TAP `name`, which is created
    /// if it does not exist. Returns the interface's name, which the kernel chooses where `name`
    /// contains `%d`.
    fn attach_tap(&self, tun: BorrowedFd<'_>, name: &str) -> Option<io::Result<String>>;

    /// Changes the TAP `name`.
    fn change_link(&self, name: &str, change: &LinkChange) -> Option<io::Result<()>>;

    /// Writes a CPU mask or list to a file of an interrupt or of a queue of a network interface.
    fn write_affinity(&self, file: &Path, text: &str) -> Option<io::Result<()>>;

    /// Connects to the unix socket at `path` without waiting. The returned socket blocks.
    fn connect(&self, path: &Path) -> Option<io::Result<UnixStream>>;

    /// Makes a non-blocking socket at `path` that listens, with this mode. The socket file of a
    /// process that has ended is replaced.
    fn listen(&self, path: &Path, mode: u32) -> Option<io::Result<(UnixListener, FileIdentity)>>;

    /// Removes the socket file at `path`, if it is still the one that `identity` says.
    fn remove_socket(&self, path: &Path, identity: FileIdentity) -> Option<io::Result<()>>;
}

static HELPER: OnceLock<Box<dyn Helper>> = OnceLock::new();

/// Leaves the operations of this process to `helper` from now on. Only the first call has an
/// effect.
pub fn delegate_to(helper: Box<dyn Helper>) {
    HELPER.get_or_init(|| helper);
}

/// Does `own`, and if this thread lacks the right for it, lets the helper of this process do it.
/// When there is no helper, the result is that of `own`.
///
/// # Errors
/// Those of `own`, or where that is EPERM or EACCES, those of the helper.
pub fn with_help<T>(
    own: impl FnOnce() -> io::Result<T>,
    help: impl FnOnce(&dyn Helper) -> Option<io::Result<T>>,
) -> io::Result<T> {
    match own() {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => HELPER
            .get()
            .and_then(|helper| help(&**helper))
            .unwrap_or(Err(error)),
        done => done,
    }
}
