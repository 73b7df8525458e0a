//! The types of the configuration that all sources result in. It is complete and checked.

use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use virtionet_base::{MAX_QUEUE_PAIRS, Pattern};
use virtionet_placement::interrupts::IrqAffinity;
use virtionet_placement::{CpuSet, Placement};

use crate::uplink::UplinkConfig;

/// The configuration of the daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The network devices, at least one unless devices can be added later.
    pub devices: Vec<DeviceConfig>,
    /// The configuration file, where there is one.
    pub file: Option<PathBuf>,
    /// What devices that are added later may use; `None` where none can be added.
    pub allow_add: Option<AllowAdd>,
    /// The control socket; `None` for no control server.
    pub control: Option<ControlSocket>,
    /// The control socket that refuses changes; `None` for none.
    pub control_read_only: Option<ControlSocket>,
    /// The path of the socket on which the next daemon takes over; `None` for none.
    pub handover: Option<PathBuf>,
    /// Whether this daemon takes over from the one that listens there.
    pub take_over: bool,
    /// The folder for what must outlive the process; `None` for the default.
    pub state_folder: Option<PathBuf>,
    /// How queue pairs are distributed over workers.
    pub workers: WorkersConfig,
    /// Whether threads are confined.
    pub sandbox: SandboxMode,
    /// As whom the daemon runs after it has opened what it needs.
    pub identity: IdentityConfig,
    /// The helper that keeps the capabilities which the daemon gives up; `None` for no helper.
    pub helper: Option<HelperConfig>,
    /// The number of `-v` flags.
    pub verbosity: u8,
}

impl Config {
    /// The paths of the sockets that the daemon makes: those of devices that listen, that of the
    /// control server, and that of the handover. Those of devices that are added later are not among
    /// them.
    pub fn own_sockets(&self) -> impl Iterator<Item = &Path> {
        let devices = self
            .devices
            .iter()
            .filter_map(|device| match &device.socket {
                Socket::Listen { path, .. } => Some(path),
                Socket::Connect { .. } | Socket::Inherited(_) => None,
            });
        let control = self.control.as_ref().map(|control| &control.path);
        let read_only = self.control_read_only.as_ref().map(|control| &control.path);
        let paths = devices
            .chain(control)
            .chain(read_only)
            .chain(&self.handover);
        paths.map(PathBuf::as_path)
    }
}

impl Config {
    /// The keys of the whole process whose values differ from those of `other`.
    #[must_use]
    pub fn differing_process_keys(&self, other: &Self) -> Vec<&'static str> {
        let differs = [
            ("control", self.control != other.control),
            (
                "control-read-only",
                self.control_read_only != other.control_read_only,
            ),
            ("handover-socket", self.handover != other.handover),
            ("state-dir", self.state_folder != other.state_folder),
            ("workers", self.workers != other.workers),
            ("sandbox", self.sandbox != other.sandbox),
            ("user", self.identity != other.identity),
            ("helper", self.helper != other.helper),
            ("allow-add", self.allow_add != other.allow_add),
        ];
        let differing = differs.into_iter().filter(|(_, differs)| *differs);
        differing.map(|(key, _)| key).collect()
    }
}

/// A user and a group, each by name or number; `None` for those of the process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IdentityConfig {
    /// The user.
    pub user: Option<String>,
    /// The group.
    pub group: Option<String>,
}

/// How queue pairs are distributed over workers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum WorkersConfig {
    /// Each queue pair has a worker of its own.
    #[default]
    PerPair,
    /// There is a worker on each of these CPUs, at least one, and they serve the queue pairs of all
    /// devices.
    Shared(CpuSet),
}

/// What the helper may do beside what the configuration of the devices names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HelperConfig {
    /// Patterns of the names of TAPs.
    pub taps: Vec<Pattern>,
    /// Patterns of the names of bridges.
    pub bridges: Vec<Pattern>,
    /// Patterns of the paths of unix sockets.
    pub sockets: Vec<Pattern>,
}

/// What devices may use that are added while the daemon runs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AllowAdd {
    /// Patterns of the paths of sockets: of those that the daemon makes, and of those to which it
    /// connects.
    pub sockets: Vec<Pattern>,
    /// Patterns of the names of TAPs.
    pub taps: Vec<Pattern>,
    /// Patterns of the names of bridges.
    pub bridges: Vec<Pattern>,
    /// Patterns of the names of switches.
    pub switches: Vec<Pattern>,
}

/// The socket of the control server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlSocket {
    /// The path of the socket.
    pub path: PathBuf,
    /// The file mode of the socket, 0 to 0o777.
    pub mode: u32,
    /// The group of the socket, by name or number; `None` for the group of the process.
    pub group: Option<String>,
}

/// The configuration of one network device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceConfig {
    /// The name, which is unique among the devices: 1 to 64 letters, digits, `.`, `_` and `-`.
    pub name: String,
    /// The vhost-user socket.
    pub socket: Socket,
    /// The number of queue pairs that the front-end may ask for.
    pub queues: QueuePairCount,
    /// The uplink.
    pub uplink: UplinkConfig,
    /// The placement of the workers.
    pub placement: Placement,
    /// Whether interrupts and steering masks follow the workers.
    pub irq_affinity: IrqAffinity,
    /// The path of the front-end's QMP socket; `None` where only thread names identify the vCPUs.
    pub qmp: Option<PathBuf>,
    /// How the workers wait for frames.
    pub poll: PollMode,
    /// The version of virtionetd whose features are offered.
    pub features_compat: FeaturesVersion,
    /// Whether the front-end may migrate its guest by postcopy.
    pub postcopy: bool,
}

/// How a device gets its connection to the front-end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Socket {
    /// Create a socket and wait for the front-end.
    Listen {
        /// The path of the socket.
        path: PathBuf,
        /// The file mode of the socket, 0 to 0o777.
        mode: u32,
        /// The group of the socket, by name or number; `None` for the group of the process.
        group: Option<String>,
        /// The only user whose front-end is served; `None` for all that can connect.
        peer_uid: Option<u32>,
    },
    /// Connect to a front-end that listens, and retry until it does.
    Connect {
        /// The path of the socket.
        path: PathBuf,
    },
    /// Use the file descriptor of a socket, connected or listening, that the parent process passes
    /// on.
    Inherited(RawFd),
}

/// The number of queue pairs of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QueuePairCount {
    /// As many as the front-end asks for, up to [`MAX_QUEUE_PAIRS`].
    Auto,
    /// At most this many, 1 to [`MAX_QUEUE_PAIRS`].
    AtMost(u16),
}

impl QueuePairCount {
    /// The largest number of queue pairs that the front-end may ask for.
    #[must_use]
    pub fn max(self) -> u16 {
        match self {
            Self::Auto => MAX_QUEUE_PAIRS,
            Self::AtMost(pairs) => pairs,
        }
    }
}

/// How a worker waits for frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PollMode {
    /// It sleeps.
    Off,
    /// It polls for up to this time before it sleeps: 1 to 100,000 µs.
    Adaptive(Duration),
    /// It never sleeps.
    Always,
}

/// A version of virtionetd in which the features that a device offers changed: the value of
/// `--features-compat`. A version that is not here offers what the one before it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum FeaturesVersion {
    /// The first version.
    #[default]
    V0_1_0,
}

impl FeaturesVersion {
    /// All of them, the newest one last.
    pub const ALL: [Self; 1] = [Self::V0_1_0];

    /// The version's number.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::V0_1_0 => "0.1.0",
        }
    }

    /// The version of this number; `None` where there is none.
    #[must_use]
    pub fn find(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|version| version.name() == name)
    }
}

/// Whether each thread is confined to what it needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SandboxMode {
    /// It is.
    #[default]
    On,
    /// It is not.
    Off,
    /// It is not, but the kernel logs the system calls that would be refused.
    Log,
}

impl SandboxMode {
    const ALL: [Self; 3] = [Self::On, Self::Off, Self::Log];

    /// The value of `--sandbox`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::On => "on",
            Self::Off => "off",
            Self::Log => "log",
        }
    }

    /// The mode of this name; `None` where there is none.
    #[must_use]
    pub fn find(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|mode| mode.name() == name)
    }
}
