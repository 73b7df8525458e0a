//! A dequeued descriptor chain, and the result of the walk from which it is made.

use crate::fault::ChainFault;

/// A descriptor chain that was dequeued. It does not show which format its virtqueue has.
#[derive(Debug, Clone, Copy, Default)]
pub struct Chain {
    /// The value that completes the chain: its head (split) or its buffer id (packed).
    pub(crate) id: u16,
    /// The number of slots that the chain takes in the virtqueue: 1 entry of the available ring
    /// (split) or its number of descriptors (packed).
    pub(crate) slots: u16,
    /// The number of segments, at most [`crate::MAX_CHAIN_SEGMENTS`].
    pub(crate) segments: u16,
    pub(crate) fault: Option<ChainFault>,
    /// The index of the first segment in the burst's segment list.
    pub(crate) from: u32,
    /// The number of bytes in all segments.
    pub(crate) len: u32,
}

// A burst is read from end to end several times, so four chains share a cache line.
const _: () = assert!(size_of::<Chain>() == 16);

impl Chain {
    /// A chain of one slot and `segments` segments from index `at` on, without a fault.
    #[inline(always)]
    pub(crate) fn single_slot(id: u16, at: u32, segments: u16, len: u32) -> Self {
        Self {
            id,
            slots: 1,
            segments,
            fault: None,
            from: at,
            len,
        }
    }

    #[inline(always)]
    pub(crate) fn new(id: u16, slots: u16, walked: WalkedChain) -> Self {
        Self {
            id,
            slots,
            fault: walked.fault,
            segments: walked.segments,
            from: walked.from,
            len: walked.len,
        }
    }

    /// The number of bytes in all segments; 0 for a faulty chain.
    #[inline(always)]
    #[must_use]
    pub fn len(&self) -> usize {
        // A u32 fits usize on 64-bit machines, and vhost-user needs one.
        usize::try_from(self.len).unwrap_or(usize::MAX)
    }

    /// Whether the chain has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The rule that the chain breaks. A faulty chain has no segments; it can only be completed.
    #[inline(always)]
    #[must_use]
    pub fn fault(&self) -> Option<ChainFault> {
        self.fault
    }
}

/// A chain that was followed to its end, before it has an id and a number of slots.
pub(crate) struct WalkedChain {
    pub(crate) fault: Option<ChainFault>,
    /// The index of the first segment in the burst's segment list.
    pub(crate) from: u32,
    /// The number of segments.
    pub(crate) segments: u16,
    /// The number of bytes in all segments.
    pub(crate) len: u32,
    /// The number of descriptors read for the chain.
    pub(crate) descriptors_read: usize,
}

/// Converts the number of bytes written to a chain, whose length has 32 bits.
#[inline(always)]
pub(crate) fn to_used_len(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}
