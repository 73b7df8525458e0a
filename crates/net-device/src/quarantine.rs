//! Why a vring is quarantined.

use virtionet_virtio_net::stats::VringStats;
use virtionet_virtqueue::VirtqueueFault;
use virtionet_virtqueue::memory::GuestMemory;

use virtionet_process::panic_policy::Panicked;

/// Why a vring is quarantined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum QuarantineCause {
    /// The guest's fault.
    #[error("the guest broke the ring: {0}")]
    Guest(#[from] VirtqueueFault),
    /// The front-end's fault, or its host's.
    #[error(
        "pages of the guest's memory have vanished, because its file shrank or its file system is full"
    )]
    MemoryLost,
    /// The front-end's fault, or its host's.
    #[error(
        "the front-end disconnected during a migration by postcopy, so pages of the guest's memory are missing for good"
    )]
    PagesMissing,
    /// The front-end's fault, or its host's.
    #[error(
        "the log of written pages has vanished, because its file shrank or its file system is full, so the guest cannot be migrated"
    )]
    LogLost,
    /// A bug of this program.
    #[error("{0}")]
    Panic(#[from] Panicked),
}

impl QuarantineCause {
    /// The cause if something of `memory` was lost.
    pub(crate) fn of_lost(memory: &GuestMemory) -> Option<Self> {
        match (memory.is_lost(), memory.is_in_postcopy()) {
            (true, true) => Some(Self::PagesMissing),
            (true, false) => Some(Self::MemoryLost),
            (false, _) => memory.is_log_lost().then_some(Self::LogLost),
        }
    }

    /// Counts a quarantine for this cause. The caller holds the vring's lock.
    pub(crate) fn count(self, stats: &VringStats) {
        stats.quarantines.add(1);
        let counter = match self {
            Self::Guest(VirtqueueFault::AvailIndexJump { .. }) => &stats.avail_index_jump,
            Self::Guest(VirtqueueFault::HeadOutOfRange { .. }) => &stats.head_out_of_range,
            Self::Guest(VirtqueueFault::ChainWithoutEnd { .. }) => &stats.chain_without_end,
            Self::MemoryLost | Self::PagesMissing => &stats.memory_lost,
            Self::LogLost => &stats.log_lost,
            Self::Panic(Panicked) => &stats.panics,
        };
        counter.add(1);
    }
}
