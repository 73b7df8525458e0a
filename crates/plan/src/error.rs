//! The errors of a plan. Each one has a stable code, and a message of one sentence that says what
//! to do.

use std::io;
use std::path::PathBuf;

use virtionet_base::key_value::KeyValueError;
use virtionet_config::ConfigError;
use virtionet_placement::{
    AffinityError, CpuListError, CpuSet, PlacementError, PlacementParseError,
};
use virtionet_sizing::{MAX_QUEUE_PAIRS, QueuesError, ThroughputParseError};

/// Why a guest cannot be planned, or why its plan cannot be printed.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// The name of the guest, which the variant holds, cannot be used in identifiers of QEMU.
    #[error(
        "--name {0:?} cannot be used: write a letter and up to 31 letters, digits, '.', '_' or '-'"
    )]
    GuestName(String),
    /// The guest has more vCPUs than QEMU can run.
    #[error("--vcpus {vcpus} is more than QEMU can run: write 1 to {max}")]
    TooManyVcpus {
        /// The requested number of vCPUs.
        vcpus: u32,
        /// The largest number.
        max: u32,
    },
    /// The size of the memory, which the variant holds, is no size in MiB, or out of range.
    #[error("--memory {0} is no size: write MiB, or a number with M, G or T, such as 4G")]
    Memory(String),
    /// QEMU has no virtqueues of this size.
    #[error("{flag} {size} is no size that QEMU takes: write 256, 512 or 1024")]
    RingSize {
        /// The flag with its dashes.
        flag: &'static str,
        /// The requested number of descriptors.
        size: u16,
    },
    /// The directory of the sockets is not absolute, or is not text that XML and TOML can hold.
    #[error(
        "--socket-dir {} cannot be used: write an absolute path of printable characters",
        .0.display()
    )]
    SocketDir(PathBuf),
    /// The list of host CPUs for the vCPUs is empty.
    #[error("--cpus names no CPU: write a list such as 2-5, auto or none")]
    NoCpus,
    /// The list of host CPUs for the vCPUs has CPUs on which virtionetd may not run.
    #[error(
        "--cpus {list} names {}, but virtionetd may run on {} only: choose among those, or say \
         with --host-cpus what the host has",
        outside.describe(),
        host.describe()
    )]
    CpusNotAllowed {
        /// The list as it is written.
        list: String,
        /// The CPUs of the list that are not allowed.
        outside: CpuSet,
        /// The CPUs that are allowed.
        host: CpuSet,
    },
    /// The guest has no network device, or more than QEMU has slots for.
    #[error(
        "a guest cannot have {count} network devices: ask for 1 to {max}, for which its PCI root \
         bus has slots"
    )]
    NetDeviceCount {
        /// The requested number of network devices.
        count: usize,
        /// The largest number.
        max: usize,
    },
    /// Two network devices have the same name, which the variant holds.
    #[error("two network devices are called {0}: give each a name of its own")]
    NetDeviceNameRepeated(String),
    /// Two network devices have the same Ethernet address.
    #[error(
        "network devices {first} and {second} both have the address {mac}: give each one of its \
         own with mac="
    )]
    MacRepeated {
        /// The name of the first network device.
        first: String,
        /// The name of the second network device.
        second: String,
        /// The address.
        mac: String,
    },
    /// A `--nic` cannot be used.
    #[error("--nic {text}: {error}")]
    Nic {
        /// The value of the `--nic`.
        text: String,
        /// The cause.
        #[source]
        error: NicError,
    },
    /// virtionetd would refuse the configuration of the plan.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// virtionetd would take a value, which the variant holds, for a command of virtionetctl.
    #[error("virtionetd takes {0:?} for a command: choose other values")]
    ValueIsCommand(String),
    /// virtionetd would take a value for a flag. The variant holds the reason that it would report.
    #[error("virtionetd refuses a value: {0}; write values that begin with no dash")]
    ValueIsFlag(String),
    /// The request contradicts itself, or exceeds the budget of interrupt vectors.
    #[error(transparent)]
    Queues(#[from] QueuesError),
    /// A text is not a list of CPUs.
    #[error(transparent)]
    CpuList(#[from] CpuListError),
    /// A text is not a placement.
    #[error(transparent)]
    PlacementParse(#[from] PlacementParseError),
    /// The placement is impossible on this host.
    #[error(transparent)]
    Placement(#[from] PlacementError),
    /// The CPUs of this process cannot be read.
    #[error(transparent)]
    Affinity(#[from] AffinityError),
    /// The plan cannot be written.
    #[error("the plan cannot be written: {0}; check where standard output goes")]
    Write(#[from] io::Error),
}

impl PlanError {
    /// A stable name of the cause, for programs.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::GuestName(_) => "guest-name-invalid",
            Self::TooManyVcpus { .. } => "vcpus-too-many",
            Self::Memory(_) => "memory-invalid",
            Self::RingSize { .. } => "ring-size-invalid",
            Self::SocketDir(_) => "socket-dir-invalid",
            Self::NoCpus => "cpus-empty",
            Self::CpusNotAllowed { .. } => "cpus-not-allowed",
            Self::NetDeviceCount { .. } => "net-device-count-invalid",
            Self::NetDeviceNameRepeated(_) => "net-device-name-repeated",
            Self::MacRepeated { .. } => "mac-repeated",
            Self::Nic { error, .. } => error.code(),
            Self::Config(_) => "config-invalid",
            Self::ValueIsCommand(_) => "value-is-command",
            Self::ValueIsFlag(_) => "value-is-flag",
            Self::Queues(_) => "queues-impossible",
            Self::CpuList(_) => "cpu-list-invalid",
            Self::PlacementParse(_) => "placement-invalid",
            Self::Placement(_) => "placement-impossible",
            Self::Affinity(_) => "affinity-unreadable",
            Self::Write(_) => "output-failed",
        }
    }

    /// The exit status: 2 for a request that cannot be used, 1 for a failure.
    #[must_use]
    pub fn status(&self) -> u8 {
        match self {
            Self::Write(_) | Self::Affinity(_) => 1,
            _ => 2,
        }
    }
}

/// Why the value of a `--nic` cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NicError {
    /// An item is not `KEY=VALUE`.
    #[error(transparent)]
    Item(#[from] KeyValueError),
    /// A key does not exist.
    #[error("the key {key:?} is not known: use {known}")]
    UnknownKey {
        /// The key.
        key: String,
        /// The keys that exist, in words.
        known: &'static str,
    },
    /// A key, which the variant holds, is given twice.
    #[error("{0} is given twice: keep one of them")]
    KeyRepeated(String),
    /// Two keys are given of which only one may be.
    #[error(
        "{} and {} are both given: keep one of them",
        item(first),
        item(second)
    )]
    KeysConflict {
        /// The first key and its value.
        first: (&'static str, String),
        /// The second key and its value.
        second: (&'static str, String),
    },
    /// A bridge is given beside an uplink.
    #[error("bridge={bridge} and uplink={uplink} are both given: write the bridge into the uplink")]
    BridgeBesideUplink {
        /// The bridge.
        bridge: String,
        /// The uplink.
        uplink: String,
    },
    /// The name of the network device, which the variant holds, cannot be used in identifiers of
    /// QEMU.
    #[error(
        "name={0} cannot be used: write a letter and up to 31 letters, digits, '.', '_' or '-'"
    )]
    Name(String),
    /// The value of `queues`, which the variant holds, is not a number.
    #[error("queues={0} is no number of queue pairs: write 1 to {MAX_QUEUE_PAIRS}")]
    Queues(String),
    /// The value of `throughput` is not known.
    #[error(transparent)]
    Throughput(#[from] ThroughputParseError),
    /// The value of `mac`, which the variant holds, is not the Ethernet address of one device.
    #[error("mac={0} is no address of a network device: write one such as 52:54:00:12:34:56")]
    Mac(String),
}

impl NicError {
    /// A stable name of the cause, for programs.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Item(_) => "nic-item-invalid",
            Self::UnknownKey { .. } => "nic-key-unknown",
            Self::KeyRepeated(_) => "nic-key-repeated",
            Self::KeysConflict { .. } => "nic-keys-conflict",
            Self::BridgeBesideUplink { .. } => "nic-bridge-beside-uplink",
            Self::Name(_) => "nic-name-invalid",
            Self::Queues(_) => "nic-queues-invalid",
            Self::Throughput(error) => error.code(),
            Self::Mac(_) => "nic-mac-invalid",
        }
    }
}

/// A key and its value as a user writes them.
fn item((key, value): &(&'static str, String)) -> String {
    format!("{key}={value}")
}
