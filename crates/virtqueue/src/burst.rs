//! Chains taken from a ring and not yet given back, with the guest memory they point to.

use std::sync::Arc;

use crate::fault::ChainFault;
use crate::memory::{GuestMemory, GuestSlice, SegmentList, SegmentWriter};
use crate::walk::WalkedChain;

/// One chain. Which of its ring's formats it came from does not show.
#[derive(Debug, Clone, Copy, Default)]
pub struct Chain {
    /// What gives it back: the head (split) or the buffer id (packed).
    pub(crate) id: u16,
    /// Places that it takes in the ring: 1 entry of an available ring, or its number of
    /// descriptors in a packed ring.
    pub(crate) slots: u16,
    /// Its number of segments, [`crate::MAX_CHAIN_SEGMENTS`] at most, and where the first one is.
    pub(crate) segments: u16,
    pub(crate) fault: Option<ChainFault>,
    pub(crate) from: u32,
    pub(crate) len: u32,
}

// Bursts are read from end to end again and again: four chains to a cache line.
const _: () = assert!(size_of::<Chain>() == 16);

impl Chain {
    /// One slot and so many segments from number `at` on, and nothing wrong with it.
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

    /// Bytes in all its segments; 0 for a faulty chain.
    #[inline(always)]
    #[must_use]
    pub fn len(&self) -> usize {
        // A u32 fits usize on 64-bit machines, the only ones with guests of this kind.
        usize::try_from(self.len).unwrap_or(usize::MAX)
    }

    /// Whether it has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What is wrong with it. A faulty chain has no segments and is only to be given back.
    #[inline(always)]
    #[must_use]
    pub fn fault(&self) -> Option<ChainFault> {
        self.fault
    }
}

/// Chains in the order in which the driver made them available. Those that are done with leave at
/// the front ([`Burst::retire`]); new ones come at the back ([`crate::Virtqueue::dequeue`]).
#[derive(Debug)]
pub struct Burst {
    /// Those up to `end` count; the rest is room.
    store: Vec<Chain>,
    end: usize,
    segments: SegmentList,
    /// Chains at the front that have been retired; they are dropped in batches.
    retired: usize,
    /// Descriptors read for this burst since [`Burst::reset_descriptors_read`].
    descriptors_read: usize,
}

/// What a ring puts chains into: places for as many as it asked for, and the segments.
pub(crate) struct Reservation<'b> {
    pub(crate) chains: &'b mut [Chain],
    pub(crate) segments: SegmentWriter<'b>,
}

/// Retired chains are moved out when so many have gathered.
const COMPACT_THRESHOLD: usize = 256;

impl Burst {
    /// No chains yet, over `memory`.
    #[must_use]
    pub fn new(memory: Arc<GuestMemory>) -> Self {
        Self {
            store: Vec::new(),
            end: 0,
            segments: SegmentList::new(memory),
            retired: 0,
            descriptors_read: 0,
        }
    }

    /// Descriptors read since the last [`Burst::reset_descriptors_read`]: what a guest made us do, however
    /// little came of it.
    #[inline(always)]
    #[must_use]
    pub fn descriptors_read(&self) -> usize {
        self.descriptors_read
    }

    /// Starts counting [`Burst::descriptors_read`] anew.
    pub fn reset_descriptors_read(&mut self) {
        self.descriptors_read = 0;
    }

    /// The chains not yet retired.
    #[inline(always)]
    #[must_use]
    pub fn chains(&self) -> &[Chain] {
        self.store.get(self.retired..self.end).unwrap_or_default()
    }

    /// Room for `count` more chains. [`Burst::commit`] then says how many there are.
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

    /// So many of the intake's places have been filled, for which so many descriptors were read.
    #[inline(always)]
    pub(crate) fn commit(&mut self, chains: usize, descriptors_read: usize) {
        self.end = (self.end + chains).min(self.store.len());
        self.descriptors_read += descriptors_read;
    }

    /// A chain's segments, in order, none of them empty.
    #[inline(always)]
    #[must_use]
    pub fn slices(&self, chain: &Chain) -> &[GuestSlice<'_>] {
        let from = to_usize(chain.from);
        self.segments
            .slices(from, from + usize::from(chain.segments))
    }

    /// The segments of the first `n` chains not yet retired, as one list.
    #[inline(always)]
    #[must_use]
    pub fn front_slices(&self, n: usize) -> &[GuestSlice<'_>] {
        let chains = self.chains();
        self.slices_of(&chains[..n.min(chains.len())])
    }

    /// The segments of chains that follow each other, as one list.
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

    /// The first `N` bytes of every chain, which are taken off the chains, so that they are read
    /// once and never again: into `out`, one after the other, as many as it gives. A chain with
    /// fewer bytes (a faulty one has none) is left as it is, its place in `out` too.
    #[inline(always)]
    pub fn strip_all<'o, const N: usize>(&mut self, out: impl Iterator<Item = &'o mut [u8; N]>) {
        let Ok(bytes) = u32::try_from(N) else { return };
        let chains = self
            .store
            .get_mut(self.retired..self.end)
            .unwrap_or_default();
        for (chain, out) in chains.iter_mut().zip(out) {
            let Some(rest) = chain.len.checked_sub(bytes) else {
                continue;
            };
            chain.len = rest;
            let from = to_usize(chain.from);
            if !self.segments.strip_from(from, out) {
                let gone = self.segments.strip_across(from, out);
                chain.from += u32::from(gone);
                chain.segments = chain.segments.saturating_sub(gone);
            }
        }
    }

    /// Forgets the first `n` chains: they have been given back.
    #[inline]
    pub fn retire(&mut self, n: usize) {
        self.retired = (self.retired + n).min(self.end);
        if self.retired == self.end {
            self.clear();
        } else if self.retired >= COMPACT_THRESHOLD {
            self.compact();
        }
    }

    /// Forgets every chain.
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
        let gone = chains.first().map_or(0, |chain| chain.from);
        self.segments.discard_front(to_usize(gone));
        for chain in chains {
            chain.from -= gone;
        }
    }
}

#[inline(always)]
fn to_usize(n: u32) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}
