//! Following one chain: what split and packed rings share.
//!
//! A walk takes in one buffer descriptor after the other, checks it and translates its address. How
//! the next descriptor is found is the format's own affair.

use crate::burst::Chain;
use crate::fault::ChainFault;
use crate::memory::{Descriptor, SegmentWriter};
use crate::{Direction, MAX_CHAIN_SEGMENTS, VirtqueueConfig};

/// `flags`: another descriptor follows.
pub(crate) const VRING_DESC_F_NEXT: u16 = 1;
/// `flags`: the device writes the buffer.
pub(crate) const VRING_DESC_F_WRITE: u16 = 2;
/// `flags`: the buffer is a table of descriptors.
pub(crate) const VRING_DESC_F_INDIRECT: u16 = 4;

/// What holds for every chain of a ring.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ChainRules {
    direction: Direction,
    indirect: bool,
    min_len: u32,
}

impl ChainRules {
    /// A chain of one buffer in the region met last, as most chains of most drivers are; `None`,
    /// and nothing done, for any other. `id` is what gives it back.
    #[inline(always)]
    pub(crate) fn walk_single(
        self,
        id: u16,
        (addr, len): (u64, u32),
        flags: u16,
        segments: &mut SegmentWriter<'_>,
    ) -> Option<Chain> {
        let at = segments.len();
        let fits = flags & (VRING_DESC_F_NEXT | VRING_DESC_F_WRITE | VRING_DESC_F_INDIRECT)
            == self.expected_flags();
        if !fits || len < self.min_len || len == 0 {
            return None;
        }
        segments.push_cached(addr, len)?.prefetch(self.direction);
        Some(Chain::single_slot(id, to_u32(at), 1, len))
    }

    /// The same of two buffers, a header's and a frame's.
    #[inline(always)]
    pub(crate) fn walk_double(
        self,
        id: u16,
        first: Descriptor,
        second: Descriptor,
        segments: &mut SegmentWriter<'_>,
    ) -> Option<Chain> {
        const ALL: u16 = VRING_DESC_F_NEXT | VRING_DESC_F_WRITE | VRING_DESC_F_INDIRECT;
        let at = segments.len();
        let len = first.len().checked_add(second.len())?;
        let fits = first.flags() & ALL == self.expected_flags() | VRING_DESC_F_NEXT
            && second.flags() & ALL == self.expected_flags()
            && len >= self.min_len
            && first.len() != 0
            && second.len() != 0;
        if !fits {
            return None;
        }
        segments.push_cached(first.addr(), first.len())?;
        let Some(start) = segments.push_cached(second.addr(), second.len()) else {
            segments.truncate(at);
            return None;
        };
        start.prefetch(self.direction);
        Some(Chain::single_slot(id, to_u32(at), 2, len))
    }

    /// What a buffer's flags are, NEXT aside, where nothing is out of the ordinary.
    #[inline(always)]
    fn expected_flags(self) -> u16 {
        match self.direction {
            Direction::Readable => 0,
            Direction::Writable => VRING_DESC_F_WRITE,
        }
    }

    /// A chain with nothing out of the ordinary, as most chains of most guests are: few
    /// descriptors, none indirect, all in the region met last. `None`, and nothing done, for any
    /// other. `next` finds the descriptor that one of them goes on with.
    #[inline(always)]
    pub(crate) fn walk_fast(
        self,
        head: Descriptor,
        segments: &mut SegmentWriter<'_>,
        mut next: impl FnMut(Descriptor) -> Option<Descriptor>,
    ) -> Option<WalkedChain> {
        let flags = self.expected_flags();
        let from = segments.len();
        let mut desc = head;
        let mut len = 0;
        for descriptors_read in 1..=MAX_FAST_PATH_DESCRIPTORS {
            if desc.flags() & (VRING_DESC_F_WRITE | VRING_DESC_F_INDIRECT) != flags
                || desc.len() == 0
                || segments.push_cached(desc.addr(), desc.len()).is_none()
            {
                break;
            }
            // No overflow: a few lengths of 32 bits.
            len += u64::from(desc.len());
            if !desc.has(VRING_DESC_F_NEXT) {
                let len = u32::try_from(len).ok().filter(|len| *len >= self.min_len);
                let Some(len) = len else { break };
                return Some(WalkedChain {
                    fault: None,
                    from: to_u32(from),
                    segments: to_u16(segments.len() - from),
                    len,
                    descriptors_read,
                });
            }
            let Some(found) = next(desc) else { break };
            desc = found;
        }
        segments.truncate(from);
        None
    }

    pub(crate) fn new(config: &VirtqueueConfig) -> Self {
        Self {
            direction: config.direction,
            indirect: config.indirect,
            min_len: config.min_len,
        }
    }
}

/// Most descriptors of a chain that [`ChainRules::walk_fast`] takes.
const MAX_FAST_PATH_DESCRIPTORS: usize = 18;

/// How the descriptors of an indirect table follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TableOrder {
    /// By `next` (virtio 1.3 §2.7.5.3).
    Linked,
    /// One after the other to the end (§2.8.7).
    Sequential,
}

impl TableOrder {
    /// A table's descriptor has its fields in the order of the ring's format.
    #[inline(always)]
    fn descriptor(self, raw: Descriptor) -> Descriptor {
        match self {
            Self::Linked => raw,
            Self::Sequential => raw.to_split_layout(raw.packed_flags()),
        }
    }
}

/// What has been gathered of one chain.
pub(crate) struct Walk<'w, 'p> {
    rules: ChainRules,
    segments: &'w mut SegmentWriter<'p>,
    len: u64,
    descriptors: usize,
    /// Segments in the burst before this chain.
    from: usize,
}

impl<'w, 'p> Walk<'w, 'p> {
    /// A walk whose segments go to the end of `segments`.
    #[inline(always)]
    pub(crate) fn new(rules: ChainRules, segments: &'w mut SegmentWriter<'p>) -> Self {
        Self {
            rules,
            len: 0,
            descriptors: 0,
            from: segments.len(),
            segments,
        }
    }

    /// Takes in one buffer descriptor. `limit`: how many steps the ring or table allows.
    #[inline(always)]
    pub(crate) fn add_descriptor(
        &mut self,
        desc: Descriptor,
        limit: usize,
    ) -> Result<(), ChainFault> {
        self.descriptors += 1;
        if self.descriptors > limit.min(MAX_CHAIN_SEGMENTS) {
            return Err(match self.descriptors > limit {
                true => ChainFault::Loop,
                false => ChainFault::TooLong,
            });
        }
        if desc.has(VRING_DESC_F_WRITE) != (self.rules.direction == Direction::Writable) {
            return Err(ChainFault::DirectionWrong);
        }
        // No overflow: 1,024 lengths of 32 bits.
        self.len += u64::from(desc.len());
        self.segments
            .push(desc.addr(), desc.len())
            .map_err(|_| ChainFault::AddressInvalid)
    }

    /// Takes in an indirect table. WRITE on the descriptor that refers to it is ignored, as
    /// virtio 1.3 §2.7.5.3.2 asks.
    #[inline(always)]
    pub(crate) fn add_indirect_table(
        &mut self,
        outer: Descriptor,
        order: TableOrder,
    ) -> Result<(), ChainFault> {
        if !self.rules.indirect {
            return Err(ChainFault::IndirectNotNegotiated);
        }
        if outer.has(VRING_DESC_F_NEXT) {
            return Err(ChainFault::IndirectWithNext);
        }
        let entries = u16::try_from(outer.len() / 16).map_err(|_| ChainFault::IndirectBadLength)?;
        if entries == 0 || !outer.len().is_multiple_of(16) {
            return Err(ChainFault::IndirectBadLength);
        }
        let limit = self.descriptors + usize::from(entries);
        let mut index = 0;
        loop {
            let table = self
                .segments
                .table::<Descriptor>(outer.addr(), entries)
                .ok_or(ChainFault::IndirectUnmapped)?;
            let mut desc = order.descriptor(table.get(index));
            if order == TableOrder::Sequential && self.rules.direction == Direction::Readable {
                // DPDK's driver leaves WRITE on the header in such a table, and on a segment whose
                // number is that of the ring's descriptor (seen with 22.11). What is only read loses
                // nothing by that, and its guests would lose their frames.
                desc = desc.without_flag(VRING_DESC_F_WRITE);
            }
            if desc.has(VRING_DESC_F_INDIRECT) {
                return Err(ChainFault::IndirectNested);
            }
            self.add_descriptor(desc, limit)?;
            index = match order {
                TableOrder::Linked if !desc.has(VRING_DESC_F_NEXT) => return Ok(()),
                TableOrder::Linked => desc.next(),
                TableOrder::Sequential => index + 1,
            };
            if index >= entries {
                return match order {
                    TableOrder::Linked => Err(ChainFault::NextOutOfRange),
                    TableOrder::Sequential => Ok(()),
                };
            }
        }
    }

    /// Ends the walk. A chain at fault, or too short for this ring, has no segments. The result is
    /// the fault, the chain's bytes and where its segments lie.
    #[inline(always)]
    pub(crate) fn finish(self, walk_result: Result<(), ChainFault>) -> WalkedChain {
        let count = self.segments.len() - self.from;
        let len = u32::try_from(self.len);
        let fault = match (walk_result, len) {
            (Err(fault), _) => Some(fault),
            (Ok(()), Err(_)) => Some(ChainFault::TooBig),
            // A buffer that crosses regions has several segments.
            (Ok(()), Ok(_)) if count > MAX_CHAIN_SEGMENTS => Some(ChainFault::TooLong),
            (Ok(()), Ok(len)) if len < self.rules.min_len => Some(ChainFault::TooShort),
            (Ok(()), Ok(_)) => None,
        };
        if fault.is_some() {
            self.segments.truncate(self.from);
        }
        WalkedChain {
            fault,
            from: to_u32(self.from),
            segments: to_u16(self.segments.len() - self.from),
            len: len.ok().filter(|_| fault.is_none()).unwrap_or(0),
            // A chain that was refused at its first descriptor was read all the same.
            descriptors_read: self.descriptors.max(1),
        }
    }

    /// Forgets the chain.
    pub(crate) fn abandon(self) {
        self.segments.truncate(self.from);
    }
}

/// A chain followed to its end.
pub(crate) struct WalkedChain {
    pub(crate) fault: Option<ChainFault>,
    pub(crate) from: u32,
    pub(crate) segments: u16,
    pub(crate) len: u32,
    /// Descriptors read for it.
    pub(crate) descriptors_read: usize,
}

/// Chains that one call of `dequeue` may take.
pub(crate) const MAX_CHAINS_PER_DEQUEUE: usize = 64;

/// Descriptors that one call of `dequeue` may read: whatever the guest wrote, a call ends in some tens
/// of microseconds.
pub(crate) const MAX_DESCRIPTORS_PER_DEQUEUE: usize = 4 * MAX_CHAIN_SEGMENTS;

/// At most [`MAX_CHAIN_SEGMENTS`].
#[inline(always)]
fn to_u16(n: usize) -> u16 {
    u16::try_from(n).unwrap_or(u16::MAX)
}

/// Segment counts are bounded far below 2^32 by the size of a ring and [`MAX_CHAIN_SEGMENTS`].
#[inline(always)]
fn to_u32(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}
