//! What a guest can get wrong, by name.
//!
//! A [`ChainFault`] costs the guest that chain: it is given back with length 0 and the ring goes
//! on. A [`VirtqueueFault`] means that the ring's indices can no longer be believed: the ring is
//! quarantined until it is configured anew.

/// A chain that breaks the rules of virtio 1.3 §2.7.5 (split) or §2.8 (packed).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChainFault {
    /// More descriptors than the ring or table has: a loop.
    #[error("descriptor chain loops")]
    Loop,
    /// More than [`crate::MAX_CHAIN_SEGMENTS`] descriptors or pieces.
    #[error("descriptor chain has more than {} pieces", crate::MAX_CHAIN_SEGMENTS)]
    TooLong,
    /// More than 2^32 - 1 bytes.
    #[error("descriptor chain has more than 4 GiB")]
    TooBig,
    /// Fewer bytes than [`crate::VirtqueueConfig::min_len`].
    #[error("descriptor chain is too short")]
    TooShort,
    /// `next` leads outside the ring or table.
    #[error("descriptor's next is out of range")]
    NextOutOfRange,
    /// An address range outside guest memory.
    #[error("descriptor's address is outside guest memory")]
    AddressInvalid,
    /// A writable descriptor on TX, a readable one on RX.
    #[error("descriptor has the wrong direction")]
    DirectionWrong,
    /// INDIRECT inside an indirect table.
    #[error("indirect descriptor inside an indirect table")]
    IndirectNested,
    /// INDIRECT and NEXT together.
    #[error("descriptor is indirect and has a next")]
    IndirectWithNext,
    /// An indirect table of a length that is 0, no multiple of 16, or over 65,535 entries.
    #[error("indirect table has a bad length")]
    IndirectBadLength,
    /// An indirect table outside guest memory.
    #[error("indirect table is outside guest memory")]
    IndirectUnmapped,
    /// INDIRECT without VIRTIO_F_INDIRECT_DESC.
    #[error("indirect descriptor without the feature")]
    IndirectNotNegotiated,
}

/// Indices that cannot be believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum VirtqueueFault {
    /// The available index is ahead by more than the ring's size (or went backwards, which is the
    /// same).
    #[error("available index {avail} is more than {size} ahead of {next}")]
    AvailIndexJump {
        /// The driver's index.
        avail: u16,
        /// Ours.
        next: u16,
        /// Virtqueue size in descriptors.
        size: u16,
    },
    /// A packed ring's chain that goes on through the whole ring: where the next begins cannot be
    /// known.
    #[error("a descriptor chain goes on through a whole ring of {size}")]
    ChainWithoutEnd {
        /// Virtqueue size in descriptors.
        size: u16,
    },
    /// A head outside the descriptor table: it cannot even be given back.
    #[error("available head {head} is outside a ring of {size}")]
    HeadOutOfRange {
        /// What the available ring holds.
        head: u16,
        /// Virtqueue size in descriptors.
        size: u16,
    },
}
