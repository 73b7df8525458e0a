//! What happened to a setting.

use std::fmt;
use std::io;

use super::setting::{AffinitySetting, SettingKind};

/// What happened to a setting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SettingOutcome {
    /// The setting.
    pub setting: AffinitySetting,
    /// The content of the file before this process changed it; `None` where it cannot be read.
    pub original: Option<String>,
    /// Whether this process has set the file.
    pub applied: bool,
    /// Why this process has not set the file, if it should have.
    pub why: Option<SettingRefusal>,
}

/// Why a file is not set.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SettingRefusal {
    /// Another device has set it.
    #[error("device {0} has already set it")]
    OwnedByDevice(String),
    /// The driver of the NIC manages the affinity of the interrupt.
    #[error("the NIC's driver manages this interrupt, so its affinity cannot be changed")]
    Managed,
    /// The kernel does not accept the value.
    #[error(
        "the kernel does not accept these CPUs: they are offline, or isolated, which RPS does not accept"
    )]
    InvalidCpus,
    /// This process may not write the file.
    #[error("it cannot be written ({0})")]
    Denied(#[source] OsError),
    /// The file does not exist, as when the queue was removed meanwhile.
    #[error("it no longer exists")]
    Gone,
}

/// An I/O error that can be copied and compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OsError {
    errno: Option<i32>,
    kind: io::ErrorKind,
}

impl SettingRefusal {
    pub(super) fn of(error: &io::Error, kind: SettingKind) -> Self {
        match (error.raw_os_error(), kind) {
            (Some(libc::EIO | libc::EPERM), SettingKind::Irq(_)) => Self::Managed,
            (Some(libc::ENOENT), _) => Self::Gone,
            (Some(libc::EINVAL), _) => Self::InvalidCpus,
            _ => Self::Denied(OsError::from(error)),
        }
    }

    /// A stable name of the cause, for programs.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::OwnedByDevice(_) => "setting-owned-by-device",
            Self::Managed => "interrupt-managed-by-driver",
            Self::InvalidCpus => "setting-cpus-not-accepted",
            Self::Denied(_) => "setting-not-writable",
            Self::Gone => "setting-file-missing",
        }
    }
}

impl From<&io::Error> for OsError {
    fn from(error: &io::Error) -> Self {
        Self {
            errno: error.raw_os_error(),
            kind: error.kind(),
        }
    }
}

impl fmt::Display for OsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.errno {
            Some(errno) => io::Error::from_raw_os_error(errno).fmt(f),
            None => self.kind.fmt(f),
        }
    }
}

impl std::error::Error for OsError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_error_of_the_kernel_gives_its_refusal() {
        let io = io::Error::from_raw_os_error;
        let denied = |errno| SettingRefusal::Denied(OsError::from(&io(errno)));
        for (errno, kind, refusal) in [
            (libc::EIO, SettingKind::Irq(1), SettingRefusal::Managed),
            (libc::EPERM, SettingKind::Irq(1), SettingRefusal::Managed),
            (libc::ENOENT, SettingKind::Xps, SettingRefusal::Gone),
            (libc::EINVAL, SettingKind::Rps, SettingRefusal::InvalidCpus),
            (libc::EACCES, SettingKind::Irq(1), denied(libc::EACCES)),
            (libc::EROFS, SettingKind::Rps, denied(libc::EROFS)),
            (libc::EPERM, SettingKind::Xps, denied(libc::EPERM)),
        ] {
            assert_eq!(SettingRefusal::of(&io(errno), kind), refusal);
        }
        assert_eq!(
            denied(libc::EACCES).to_string(),
            "it cannot be written (Permission denied (os error 13))"
        );
    }
}
