//! The rules of virtio that a guest can break, one variant for each.
//!
//! A [`ChainFault`] affects only that chain: it is completed with length 0 and the virtqueue
//! continues. A [`VirtqueueFault`] means that the driver's indices cannot be relied on any more:
//! the virtqueue is quarantined until it is configured again.

/// How a chain breaks the rules of virtio 1.3 §2.7.5 (split) or §2.8 (packed).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChainFault {
    /// The chain has more descriptors than the ring or table, so it is a loop.
    #[error("descriptor chain loops")]
    Loop,
    /// The chain has more than [`crate::MAX_CHAIN_SEGMENTS`] descriptors or segments.
    #[error(
        "descriptor chain has more than {} segments",
        crate::config::MAX_CHAIN_SEGMENTS
    )]
    TooLong,
    /// The chain has more than 2^32 - 1 bytes.
    #[error("descriptor chain has more than 4 GiB")]
    TooBig,
    /// The chain has fewer bytes than [`crate::VirtqueueConfig::min_len`].
    #[error("descriptor chain is too short")]
    TooShort,
    /// `next` is outside the ring or table.
    #[error("descriptor's next is out of range")]
    NextOutOfRange,
    /// A buffer is not entirely in guest memory.
    #[error("descriptor's address is outside guest memory")]
    AddressInvalid,
    /// A buffer is writable in a TX virtqueue or readable in an RX virtqueue.
    #[error("descriptor has the wrong direction")]
    DirectionWrong,
    /// A descriptor in an indirect table has VIRTQ_DESC_F_INDIRECT.
    #[error("indirect descriptor inside an indirect table")]
    IndirectNested,
    /// A descriptor has both VIRTQ_DESC_F_INDIRECT and VIRTQ_DESC_F_NEXT.
    #[error("descriptor is indirect and has a next")]
    IndirectWithNext,
    /// The length of an indirect table in bytes is 0, not a multiple of 16, or that of more than
    /// 65,535 descriptors.
    #[error("indirect table has a bad length")]
    IndirectBadLength,
    /// An indirect table does not lie in one memory region.
    #[error("indirect table is outside guest memory")]
    IndirectUnmapped,
    /// A descriptor has VIRTQ_DESC_F_INDIRECT, but VIRTIO_F_INDIRECT_DESC is not negotiated.
    #[error("indirect descriptor without the feature")]
    IndirectNotNegotiated,
}

/// Why the indices of a virtqueue cannot be relied on any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum VirtqueueFault {
    /// The available index is ahead of the device's by more than the size. An index that moved
    /// backwards looks the same.
    #[error("available index {avail} is more than {size} ahead of {next}")]
    AvailIndexJump {
        /// The driver's index.
        avail: u16,
        /// The device's index.
        next: u16,
        /// The size of the virtqueue in descriptors.
        size: u16,
    },
    /// A chain continues through the whole packed ring, so that the start of the next chain is not
    /// known.
    #[error("a descriptor chain continues through a whole ring of {size}")]
    ChainWithoutEnd {
        /// The size of the virtqueue in descriptors.
        size: u16,
    },
    /// The head of a chain is outside the descriptor table, so the chain cannot even be completed.
    #[error("available head {head} is outside a ring of {size}")]
    HeadOutOfRange {
        /// The head in the available ring.
        head: u16,
        /// The size of the virtqueue in descriptors.
        size: u16,
    },
}
