//! Why a vring is quarantined.

use virtionet_virtio_net::stats::VringStats;
use virtionet_virtqueue::VirtqueueFault;

use crate::panic_policy::Panicked;

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
    /// A bug of this program.
    #[error("{0}")]
    Panic(#[from] Panicked),
}

impl QuarantineCause {
    /// Counts a quarantine for this cause. The caller holds the vring's lock.
    pub(crate) fn count(self, stats: &VringStats) {
        stats.quarantines.add(1);
        let counter = match self {
            Self::Guest(VirtqueueFault::AvailIndexJump { .. }) => &stats.avail_index_jump,
            Self::Guest(VirtqueueFault::HeadOutOfRange { .. }) => &stats.head_out_of_range,
            Self::Guest(VirtqueueFault::ChainWithoutEnd { .. }) => &stats.chain_without_end,
            Self::MemoryLost => &stats.memory_lost,
            Self::Panic(Panicked) => &stats.panics,
        };
        counter.add(1);
    }
}
