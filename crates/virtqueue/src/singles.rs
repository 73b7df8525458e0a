//! The fast path for chains of one buffer each, as drivers of network devices make nearly all of
//! them.
//!
//! Such a chain needs no [`Chain`](crate::Chain): its slice and its id are all there is to know.
//! The path has three steps. [`Virtqueue::find_singles`] reads the next available chains for as long
//! as they are of that kind, without dequeuing them. The caller looks at their slices and copies.
//! [`Virtqueue::complete_singles`] dequeues and completes them. What is found and not completed stays
//! available, so a caller that cannot use it calls [`Virtqueue::dequeue`] instead.
//!
//! [`Virtqueue::find_singles`]: crate::Virtqueue::find_singles
//! [`Virtqueue::complete_singles`]: crate::Virtqueue::complete_singles
//! [`Virtqueue::dequeue`]: crate::Virtqueue::dequeue

use crate::memory::{GuestSlice, SingleTranslator};

/// The outcome of [`Virtqueue::find_singles`](crate::Virtqueue::find_singles).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FoundSingles {
    /// The number of chains of one buffer that were found.
    pub count: usize,
    /// There is something else behind them that [`crate::Virtqueue::dequeue`] must look at: another
    /// chain, or a fault. It is false if the virtqueue has no more chains, or if enough were found.
    pub has_other: bool,
}

impl FoundSingles {
    /// The fast path cannot be used.
    pub(crate) const NONE: Self = Self {
        count: 0,
        has_other: true,
    };
}

/// The ids of found chains, in their order.
#[derive(Debug, Clone, Copy)]
pub struct SingleIds<'b>(pub(crate) &'b [u16]);

/// What the formats need to find chains.
pub(crate) struct SinglesRequest<'b, L> {
    /// Where the ids go. Its length is the largest number of chains to find.
    pub(crate) ids: &'b mut [u16],
    /// Where the slices go. It has the same length.
    pub(crate) slices: &'b mut [GuestSlice<'static>],
    pub(crate) translator: SingleTranslator<'b>,
    /// The least length of each chain in bytes.
    pub(crate) min_lens: L,
    /// The greatest length of any chain in bytes.
    pub(crate) max_len: u32,
}
