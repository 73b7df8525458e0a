//! Why the program cannot start, or had to end.

use std::io;

use virtionet_base::unix_socket::UnixSocketError;
use virtionet_control::server::ControlError;
use virtionet_net_device::host_cpus::HostCpusError;
use virtionet_placement::PlacementError;
use virtionet_process::sandbox::ConfineError;
use virtionet_vhost_user::listen::ListenError;

use crate::device_failure::DeviceFailure;
use crate::take_over::TakeOverError;
use crate::uplinks::OpenUplinkError;

/// Why the program cannot start, or had to end.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The vhost-user socket of a device cannot be opened.
    #[error("{device}: {source}")]
    Socket {
        /// The device's name.
        device: String,
        /// The cause.
        source: ListenError,
    },
    /// A device's uplink cannot be opened.
    #[error("{device}: {source}")]
    Uplink {
        /// The device's name.
        device: String,
        /// The cause.
        source: OpenUplinkError,
    },
    /// A device's placement is not possible, because the command line is wrong.
    #[error("{device}: {source}")]
    Usage {
        /// The device's name.
        device: String,
        /// The cause.
        source: PlacementError,
    },
    /// The CPUs of the shared workers cannot be used.
    #[error("the workers cannot run as --workers says: {0}")]
    Workers(PlacementError),
    /// The control socket cannot be created.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The socket for the next daemon cannot be created.
    #[error("{0} (--handover-socket)")]
    HandoverSocket(#[source] UnixSocketError),
    /// The host lacks a resource that every process needs.
    #[error("cannot {operation}: {source}; check the limits of this process")]
    Host {
        /// The operation that failed, with its object.
        operation: &'static str,
        /// The kernel's error.
        source: io::Error,
    },
    /// The limit of open files is too low for the configuration.
    #[error(
        "the configured queue pairs need {needed} open files, and the limit is {limit}; raise it (ulimit -n, or LimitNOFILE= of the service) or lower --queues"
    )]
    TooFewDescriptors {
        /// The number that is needed at least.
        needed: u64,
        /// The limit.
        limit: u64,
    },
    /// The CPUs of this process cannot be read.
    #[error(transparent)]
    Cpus(#[from] HostCpusError),
    /// The helper cannot be started.
    #[error("the helper cannot be started ({0}); mount /proc, or start with --helper=off")]
    Helper(#[source] io::Error),
    /// The process cannot give up its rights.
    #[error(transparent)]
    Confine(#[from] ConfineError),
    /// The devices of the daemon before this one cannot be taken over.
    #[error(transparent)]
    TakeOver(#[from] TakeOverError),
    /// A device cannot continue.
    #[error("{device}: {source}")]
    DeviceFailed {
        /// The device's name.
        device: String,
        /// The cause.
        source: DeviceFailure,
    },
    /// Threads did not end in time.
    #[error("ended without waiting any longer for {threads}; something outside holds them up")]
    Stuck {
        /// Their names, with commas in between.
        threads: String,
    },
    /// A thread panicked.
    #[error("{name}: its thread ended by a panic; please report this as a bug")]
    Panic {
        /// The thread's name.
        name: String,
    },
}

impl RunError {
    /// A stable name of the error, for programs.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Socket { source, .. } => source.code(),
            Self::Uplink { source, .. } => source.code(),
            Self::Usage { .. } | Self::Workers(_) => "placement-impossible",
            Self::Control(error) => error.code(),
            Self::HandoverSocket(_) => "handover-socket-unavailable",
            Self::Host { .. } => "host-resources",
            Self::TooFewDescriptors { .. } => "open-files-limit",
            Self::Cpus(error) => error.code(),
            Self::Helper(_) => "helper-not-started",
            Self::Confine(error) => error.code(),
            Self::TakeOver(error) => error.code(),
            Self::DeviceFailed { source, .. } => source.code(),
            Self::Stuck { .. } => "thread-stuck",
            Self::Panic { .. } => "thread-panicked",
        }
    }
}
