//! Chains taken from a ring and not yet given back, with the guest memory they point to.

use std::sync::Arc;

use crate::fault::ChainFault;
use crate::memory::{GuestMemory, GuestSlice, PieceWriter, Pieces};
use crate::walk::Walked;

/// One chain. Which of its ring's formats it came from does not show.
#[derive(Debug, Clone, Copy, Default)]
pub struct Chain {
    /// What gives it back: the head (split) or the buffer id (packed).
    pub(crate) id: u16,
    /// Places that it takes in the ring: 1 entry of an available ring, or its number of
    /// descriptors in a packed ring.
    pub(crate) slots: u16,
    /// Its number of pieces, [`crate::MAX_CHAIN`] at most, and where the first one is.
    pub(crate) pieces: u16,
    pub(crate) fault: Option<ChainFault>,
    pub(crate) from: u32,
    pub(crate) len: u32,
}

// Bursts are read from end to end again and again: four chains to a cache line.
const _: () = assert!(size_of::<Chain>() == 16);

impl Chain {
    /// One slot and so many pieces from number `at` on, and nothing wrong with it.
    #[inline(always)]
    pub(crate) fn of(id: u16, at: u32, pieces: u16, len: u32) -> Self {
        Self {
            id,
            slots: 1,
            pieces,
            fault: None,
            from: at,
            len,
        }
    }

    #[inline(always)]
    pub(crate) fn new(id: u16, slots: u16, walked: Walked) -> Self {
        Self {
            id,
            slots,
            fault: walked.fault,
            pieces: walked.pieces,
            from: walked.from,
            len: walked.len,
        }
    }

    /// Bytes in all its pieces; 0 for a faulty chain.
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

    /// What is wrong with it. A faulty chain has no pieces and is only to be given back.
    #[inline(always)]
    #[must_use]
    pub fn fault(&self) -> Option<ChainFault> {
        self.fault
    }
}

/// Chains in the order in which the driver made them available. Those that are done with leave at
/// the front ([`Burst::retire`]); new ones come at the back ([`crate::Ring::take`]).
#[derive(Debug)]
pub struct Burst {
    /// Those up to `end` count; the rest is room.
    store: Vec<Chain>,
    end: usize,
    pieces: Pieces,
    /// Chains at the front that have been retired; they are dropped in batches.
    retired: usize,
    /// Descriptors read for this burst since [`Burst::reset_work`].
    work: usize,
}

/// What a ring puts chains into: places for as many as it asked for, and the pieces.
pub(crate) struct Intake<'b> {
    pub(crate) places: &'b mut [Chain],
    pub(crate) pieces: PieceWriter<'b>,
}

/// Retired chains are moved out when so many have gathered.
const COMPACT_AT: usize = 256;

impl Burst {
    /// No chains yet, over `memory`.
    #[must_use]
    pub fn new(memory: Arc<GuestMemory>) -> Self {
        Self {
            store: Vec::new(),
            end: 0,
            pieces: Pieces::new(memory),
            retired: 0,
            work: 0,
        }
    }

    /// Descriptors read since the last [`Burst::reset_work`]: what a guest made us do, however
    /// little came of it.
    #[inline(always)]
    #[must_use]
    pub fn work(&self) -> usize {
        self.work
    }

    /// Starts counting [`Burst::work`] anew.
    pub fn reset_work(&mut self) {
        self.work = 0;
    }

    /// The chains not yet retired.
    #[inline(always)]
    #[must_use]
    pub fn chains(&self) -> &[Chain] {
        self.store.get(self.retired..self.end).unwrap_or_default()
    }

    /// Room for `count` more chains. [`Burst::took`] then says how many there are.
    #[inline(always)]
    pub(crate) fn intake(&mut self, count: usize) -> Intake<'_> {
        let room = self.end + count;
        if self.store.len() < room {
            self.store.resize(room, Chain::default());
        }
        Intake {
            places: &mut self.store[self.end..room],
            pieces: self.pieces.writer(),
        }
    }

    /// So many of the intake's places have been filled, for which so many descriptors were read.
    #[inline(always)]
    pub(crate) fn took(&mut self, chains: usize, work: usize) {
        self.end = (self.end + chains).min(self.store.len());
        self.work += work;
    }

    /// A chain's pieces, in order, none of them empty.
    #[inline(always)]
    #[must_use]
    pub fn slices(&self, chain: &Chain) -> &[GuestSlice<'_>] {
        let from = index(chain.from);
        self.pieces.slices(from, from + usize::from(chain.pieces))
    }

    /// The pieces of the first `n` chains not yet retired, as one list.
    #[inline(always)]
    #[must_use]
    pub fn front_slices(&self, n: usize) -> &[GuestSlice<'_>] {
        let chains = self.chains();
        self.slices_of(&chains[..n.min(chains.len())])
    }

    /// The pieces of chains that follow each other, as one list.
    #[inline(always)]
    #[must_use]
    pub fn slices_of(&self, chains: &[Chain]) -> &[GuestSlice<'_>] {
        match (chains.first(), chains.last()) {
            (Some(first), Some(last)) => self.pieces.slices(
                index(first.from),
                index(last.from) + usize::from(last.pieces),
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
            let from = index(chain.from);
            if !self.pieces.strip_from(from, out) {
                let gone = self.pieces.strip_across(from, out);
                chain.from += u32::from(gone);
                chain.pieces = chain.pieces.saturating_sub(gone);
            }
        }
    }

    /// Forgets the first `n` chains: they have been given back.
    #[inline]
    pub fn retire(&mut self, n: usize) {
        self.retired = (self.retired + n).min(self.end);
        if self.retired == self.end {
            self.clear();
        } else if self.retired >= COMPACT_AT {
            self.compact();
        }
    }

    /// Forgets every chain.
    #[inline]
    pub fn clear(&mut self) {
        self.end = 0;
        self.pieces.truncate(0);
        self.retired = 0;
    }

    fn compact(&mut self) {
        self.store.copy_within(self.retired..self.end, 0);
        self.end -= self.retired;
        self.retired = 0;
        let chains = &mut self.store[..self.end];
        let gone = chains.first().map_or(0, |chain| chain.from);
        self.pieces.discard_front(index(gone));
        for chain in chains {
            chain.from -= gone;
        }
    }
}

#[inline(always)]
fn index(n: u32) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}
