//! Chains that were dequeued and not yet completed, with the guest memory that they refer to.
//!
//! ```text
//! store     [ retired | chains: dequeued, not retired | unused capacity ]
//!                     ^ retired                       ^ end
//! segments  [ ............ one run per chain, in the same order ........ ]
//! ```
//!
//! Retiring a chain only moves an index. The storage in front of it is reclaimed when the burst is
//! empty or when [`COMPACT_THRESHOLD`] chains have been retired.

use std::sync::Arc;

use crate::chain::Chain;
use crate::config::Direction;
use crate::memory::{
    Access, GuestMemory, GuestSlice, SegmentList, SegmentWriter, SingleTranslator,
};
use crate::singles::SingleIds;
use crate::walk::MAX_CHAINS_PER_DEQUEUE;

/// Dequeued chains in the order in which the driver made them available.
/// [`crate::Virtqueue::dequeue`] adds chains at the back, and [`Burst::retire`] removes completed
/// ones at the front.
#[derive(Debug)]
pub struct Burst {
    /// The elements up to `end` are chains; the rest is unused capacity.
    store: Vec<Chain>,
    end: usize,
    segments: SegmentList,
    /// The number of retired chains at the front. They are removed in batches.
    retired: usize,
    /// The number of descriptors read since [`Burst::reset_descriptors_read`].
    descriptors_read: usize,
    /// The ids of the chains that [`Virtqueue::find_singles`](crate::Virtqueue::find_singles) found
    /// last. They are not in the burst.
    single_ids: [u16; MAX_CHAINS_PER_DEQUEUE],
}

/// The capacity for new chains and a writer for their segments. [`Burst::commit`] adds them to
/// the burst.
pub(crate) struct Reservation<'b> {
    pub(crate) chains: &'b mut [Chain],
    pub(crate) segments: SegmentWriter<'b>,
}

/// The number of retired chains at which the chains behind them are moved to the front.
const COMPACT_THRESHOLD: usize = 256;

impl Burst {
    /// An empty burst whose chains refer to `memory`. An IOMMU must permit the device to read and to
    /// write their buffers.
    #[must_use]
    pub fn new(memory: Arc<GuestMemory>) -> Self {
        Self::with_access(memory, Access::ReadWrite)
    }

    /// The same for chains of a virtqueue with this direction: an IOMMU must permit only what the
    /// direction needs.
    #[must_use]
    pub fn with_direction(memory: Arc<GuestMemory>, direction: Direction) -> Self {
        let access = match direction {
            Direction::Readable => Access::Read,
            Direction::Writable => Access::Write,
        };
        Self::with_access(memory, access)
    }

    fn with_access(memory: Arc<GuestMemory>, access: Access) -> Self {
        Self {
            store: Vec::new(),
            end: 0,
            segments: SegmentList::with_access(memory, access),
            retired: 0,
            descriptors_read: 0,
            single_ids: [0; MAX_CHAINS_PER_DEQUEUE],
        }
    }

    /// The memory that the chains refer to.
    #[must_use]
    pub fn memory(&self) -> &Arc<GuestMemory> {
        self.segments.memory()
    }

    /// Whether the last dequeue took fewer chains than are available because the translation of an
    /// address is missing. It is worth another try when the front-end has sent it.
    #[must_use]
    pub fn waits_for_translation(&self) -> bool {
        self.segments.waits_for_translation()
    }

    /// Drops all copies of translations. The burst must be empty, because its segments are such
    /// copies as well.
    pub fn forget_translations(&mut self) {
        self.clear();
        self.segments.forget_translations();
    }

    /// The number of descriptors read since the last [`Burst::reset_descriptors_read`], those of
    /// faulty chains included. It measures the work that the guest caused.
    #[inline(always)]
    #[must_use]
    pub fn descriptors_read(&self) -> usize {
        self.descriptors_read
    }

    /// Sets [`Burst::descriptors_read`] to 0.
    pub fn reset_descriptors_read(&mut self) {
        self.descriptors_read = 0;
    }

    /// The chains that are not retired.
    #[inline(always)]
    #[must_use]
    pub fn chains(&self) -> &[Chain] {
        self.store.get(self.retired..self.end).unwrap_or_default()
    }

    /// The capacity for `count` more chains. Call [`Burst::commit`] afterwards.
    #[inline(always)]
    pub(crate) fn reserve(&mut self, count: usize) -> Reservation<'_> {
        let needed = self.end + count;
        if self.store.len() < needed {
            self.store.resize(needed, Chain::default());
        }
        Reservation {
            chains: &mut self.store[self.end..needed],
            segments: self.segments.writer(),
        }
    }

    /// Adds the first `chains` chains of the last reservation, for which `descriptors_read`
    /// descriptors were read.
    #[inline(always)]
    pub(crate) fn commit(&mut self, chains: usize, descriptors_read: usize) {
        self.end = (self.end + chains).min(self.store.len());
        self.descriptors_read += descriptors_read;
    }

    /// The segments of `chain` in order. None of them is empty.
    #[inline(always)]
    #[must_use]
    pub fn slices(&self, chain: &Chain) -> &[GuestSlice<'_>] {
        let from = to_usize(chain.from);
        self.segments
            .slices(from, from + usize::from(chain.segments))
    }

    /// The segments of the first `n` chains that are not retired, as one list.
    #[inline(always)]
    #[must_use]
    pub fn front_slices(&self, n: usize) -> &[GuestSlice<'_>] {
        let chains = self.chains();
        self.slices_of(&chains[..n.min(chains.len())])
    }

    /// The segments of `chains`, which must follow each other in this burst, as one list.
    #[inline(always)]
    #[must_use]
    pub fn slices_of(&self, chains: &[Chain]) -> &[GuestSlice<'_>] {
        match (chains.first(), chains.last()) {
            (Some(first), Some(last)) => self.segments.slices(
                to_usize(first.from),
                to_usize(last.from) + usize::from(last.segments),
            ),
            _ => &[],
        }
    }

    /// Copies the first `N` bytes of each chain to the element of `out` at the same position, and
    /// removes them from the chain, so that they are read only once. A chain with fewer bytes (a
    /// faulty one has none) and its element of `out` stay unchanged. It ends with the shorter of
    /// both sequences.
    #[inline(always)]
    pub fn strip_all<'o, const N: usize>(&mut self, out: impl Iterator<Item = &'o mut [u8; N]>) {
        let Ok(bytes) = u32::try_from(N) else { return };
        let chains = self
            .store
            .get_mut(self.retired..self.end)
            .unwrap_or_default();
        for (chain, out) in chains.iter_mut().zip(out) {
            let Some(remaining) = chain.len.checked_sub(bytes) else {
                continue;
            };
            chain.len = remaining;
            let from = to_usize(chain.from);
            if !self.segments.strip_from(from, out) {
                let emptied = self.segments.strip_across(from, out);
                chain.from += u32::from(emptied);
                chain.segments = chain.segments.saturating_sub(emptied);
            }
        }
    }

    /// Where up to `count` found chains are stored, at most 64: their ids and slices. The burst must
    /// be empty.
    #[inline(always)]
    pub(crate) fn singles_storage(
        &mut self,
        count: usize,
    ) -> (&mut [u16], &mut [GuestSlice<'static>], SingleTranslator<'_>) {
        let count = count.min(MAX_CHAINS_PER_DEQUEUE);
        let (slices, translator) = self.segments.singles(count);
        (&mut self.single_ids[..count], slices, translator)
    }

    /// The first `count` chains that were found last: their ids, and the slice of each.
    #[inline(always)]
    #[must_use]
    pub fn singles(&self, count: usize) -> (SingleIds<'_>, &[GuestSlice<'_>]) {
        let ids = self.single_ids.get(..count).unwrap_or_default();
        (SingleIds(ids), self.segments.singles_found(count))
    }

    /// Removes the first `N` bytes of the first `count` chains that were found last, so that they are
    /// read only once. Returns the ids, and for each chain these bytes and the rest of its slice. None
    /// may have fewer bytes.
    #[inline(always)]
    pub fn strip_singles<'a, const N: usize>(
        &'a mut self,
        count: usize,
    ) -> (
        SingleIds<'a>,
        impl Iterator<Item = ([u8; N], &'a GuestSlice<'a>)>,
    ) {
        let ids = self.single_ids.get(..count).unwrap_or_default();
        (SingleIds(ids), self.segments.strip_singles(count))
    }

    /// Counts the descriptors of found chains that were completed.
    #[inline(always)]
    pub fn count_singles(&mut self, count: usize) {
        self.descriptors_read += count;
    }

    /// Removes the first `n` chains, which have been completed.
    #[inline]
    pub fn retire(&mut self, n: usize) {
        self.retired = (self.retired + n).min(self.end);
        if self.retired == self.end {
            self.clear();
        } else if self.retired >= COMPACT_THRESHOLD {
            self.compact();
        }
    }

    /// Removes every chain.
    #[inline]
    pub fn clear(&mut self) {
        self.end = 0;
        self.segments.truncate(0);
        self.retired = 0;
    }

    fn compact(&mut self) {
        self.store.copy_within(self.retired..self.end, 0);
        self.end -= self.retired;
        self.retired = 0;
        let chains = &mut self.store[..self.end];
        let discarded = chains.first().map_or(0, |chain| chain.from);
        self.segments.discard_front(to_usize(discarded));
        for chain in chains {
            chain.from -= discarded;
        }
    }
}

#[inline(always)]
fn to_usize(n: u32) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}
