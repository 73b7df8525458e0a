//! Why the program cannot start, or had to end.

use std::io;

use virtionet_control::server::ControlError;
use virtionet_placement::PlacementError;
use virtionet_vhost_user::SessionError;
use virtionet_vhost_user::listen::ListenError;

use crate::host_cpus::HostCpusError;
use crate::uplinks::OpenUplinkError;

/// Why the program cannot start, or had to end.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A device has no vhost-user socket.
    #[error("{device}: {source}")]
    Socket {
        /// The device's name.
        device: String,
        /// Why not.
        source: ListenError,
    },
    /// A device's uplink cannot be opened.
    #[error("{device}: {source}")]
    Uplink {
        /// The device's name.
        device: String,
        /// Why not.
        source: OpenUplinkError,
    },
    /// A device's placement is impossible: the command line is wrong.
    #[error("{device}: {source}")]
    Usage {
        /// The device's name.
        device: String,
        /// What is wrong with it.
        source: PlacementError,
    },
    /// The control socket cannot be made.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The host lacks something that every process needs.
    #[error("cannot {operation}: {source}; check the limits of this process")]
    Host {
        /// What was tried.
        operation: &'static str,
        /// The kernel's error.
        source: io::Error,
    },
    /// The CPUs of this process cannot be read.
    #[error(transparent)]
    Cpus(#[from] HostCpusError),
    /// A device cannot go on.
    #[error("{device}: {source}")]
    DeviceFailed {
        /// The device's name.
        device: String,
        /// Why not.
        source: DeviceFailure,
    },
    /// A thread panicked.
    #[error("{name}: its thread ended by a panic; please report this as a bug")]
    Panic {
        /// The thread's name.
        name: String,
    },
}

/// Why a device cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum DeviceFailure {
    /// No front-end can connect any more.
    #[error(transparent)]
    Socket(#[from] ListenError),
    /// The session failed in a way that no other front-end would mend.
    #[error(transparent)]
    Session(#[from] SessionError),
}

impl RunError {
    /// A name of the error for programs. It does not change.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Socket { source, .. } => source.code(),
            Self::Uplink { source, .. } => source.code(),
            Self::Usage { .. } => "placement-impossible",
            Self::Control(error) => error.code(),
            Self::Host { .. } => "host-resources",
            Self::Cpus(error) => error.code(),
            Self::DeviceFailed { source, .. } => source.code(),
            Self::Panic { .. } => "thread-panicked",
        }
    }
}

impl DeviceFailure {
    /// A name of the error for programs. It does not change.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Socket(error) => error.code(),
            Self::Session(error) => error.code(),
        }
    }
}
