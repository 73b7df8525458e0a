//! Chains taken from a ring and not yet given back, with the guest memory they point to.

use std::sync::Arc;

use crate::fault::ChainFault;
use crate::memory::{GuestMemory, GuestSlice, Pieces};
use crate::walk::Walked;

/// One chain. Which of its ring's formats it came from does not show.
#[derive(Debug, Clone, Copy)]
pub struct Chain {
    /// What gives it back: the head (split) or the buffer id (packed).
    pub(crate) id: u16,
    /// Places that it takes in the ring: 1 entry of an available ring, or its number of
    /// descriptors in a packed ring.
    pub(crate) slots: u16,
    pub(crate) fault: Option<ChainFault>,
    pub(crate) from: u32,
    pub(crate) to: u32,
    pub(crate) len: u32,
}

impl Chain {
    #[inline(always)]
    pub(crate) fn new(id: u16, slots: u16, walked: Walked) -> Self {
        Self {
            id,
            slots,
            fault: walked.fault,
            from: walked.from,
            to: walked.to,
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
    pub(crate) chains: Vec<Chain>,
    pub(crate) pieces: Pieces,
    /// Chains at the front that have been retired; they are dropped in batches.
    retired: usize,
    /// Descriptors read for this burst since [`Burst::reset_work`].
    pub(crate) work: usize,
}

/// Retired chains are moved out when so many have gathered.
const COMPACT_AT: usize = 256;

impl Burst {
    /// No chains yet, over `memory`.
    #[must_use]
    pub fn new(memory: Arc<GuestMemory>) -> Self {
        Self {
            chains: Vec::new(),
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
        &self.chains[self.retired..]
    }

    /// A chain's pieces, in order, none of them empty.
    #[inline(always)]
    #[must_use]
    pub fn slices(&self, chain: &Chain) -> &[GuestSlice<'_>] {
        self.pieces.slices(index(chain.from), index(chain.to))
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
            (Some(first), Some(last)) => self.pieces.slices(index(first.from), index(last.to)),
            _ => &[],
        }
    }

    /// Copies the first bytes of chain `n` (counted among those not yet retired) to `out` and takes
    /// them off the chain, so that they are read once and never again. False, and the chain
    /// unchanged, when it has fewer bytes.
    #[inline]
    pub fn strip(&mut self, n: usize, out: &mut [u8]) -> bool {
        let Some(chain) = self.chains.get_mut(self.retired + n) else {
            return false;
        };
        let Some(rest) = u32::try_from(out.len())
            .ok()
            .and_then(|bytes| chain.len.checked_sub(bytes))
        else {
            return false;
        };
        let mut done = 0;
        let mut at = index(chain.from);
        while done < out.len() {
            let copied = self.pieces.strip(at, &mut out[done..]);
            done += copied.bytes;
            at += usize::from(copied.whole);
            if copied.bytes == 0 {
                break;
            }
        }
        chain.from = u32::try_from(at).unwrap_or(chain.to);
        chain.len = rest;
        true
    }

    /// Forgets the first `n` chains: they have been given back.
    #[inline]
    pub fn retire(&mut self, n: usize) {
        self.retired = (self.retired + n).min(self.chains.len());
        if self.retired == self.chains.len() {
            self.clear();
        } else if self.retired >= COMPACT_AT {
            self.compact();
        }
    }

    /// Forgets every chain.
    #[inline]
    pub fn clear(&mut self) {
        self.chains.clear();
        self.pieces.truncate(0);
        self.retired = 0;
    }

    fn compact(&mut self) {
        self.chains.drain(..self.retired);
        self.retired = 0;
        let gone = self.chains.first().map_or(0, |chain| chain.from);
        self.pieces.discard_front(index(gone));
        for chain in &mut self.chains {
            chain.from -= gone;
            chain.to -= gone;
        }
    }
}

#[inline(always)]
fn index(n: u32) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}
