//! Following one descriptor chain: the part that split and packed virtqueues share.
//!
//! There are four ways through a chain, from the fastest to the most general. Each of the first
//! three either takes the whole chain or leaves everything as it was, so that a slower one can
//! start over:
//!
//! | function | chains |
//! |---|---|
//! | [`ChainRules::walk_single`] | one buffer in the memory region that was translated last |
//! | [`ChainRules::walk_double`] | two such buffers, typically header and frame |
//! | [`ChainRules::walk_fast`] | up to [`MAX_FAST_PATH_DESCRIPTORS`] such buffers |
//! | [`Walk`] | any chain: indirect tables, other regions, buffers across regions, faults |
//!
//! The format finds the next descriptor of a chain; this module checks each descriptor and
//! translates its address.

use crate::chain::{Chain, WalkedChain};
use crate::config::{Direction, MAX_CHAIN_SEGMENTS, VirtqueueConfig};
use crate::constants::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use crate::fault::ChainFault;
use crate::memory::{Descriptor, MAX_SINGLE_LEN, MissingTranslation, SegmentWriter};

/// The rules for every chain of a virtqueue.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ChainRules {
    direction: Direction,
    indirect: bool,
    min_len: u32,
}

impl ChainRules {
    /// Takes a chain of one buffer in the memory region that was translated last, as most chains
    /// are. Returns `None`, without any effect, for every other chain. `id` completes the chain.
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

    /// The rules for chains of one buffer of at most `max_len` bytes, if `direction` is that of the
    /// virtqueue. Both are constants in all calls, so that the compiler knows the results.
    #[inline(always)]
    pub(crate) fn for_singles(self, direction: Direction, max_len: u32) -> Option<SingleRules> {
        let rules = Self { direction, ..self };
        (self.direction == direction).then_some(SingleRules {
            mask: VRING_DESC_F_NEXT | VRING_DESC_F_WRITE | VRING_DESC_F_INDIRECT,
            flags: rules.expected_flags(),
            // An empty buffer has no address that could be checked.
            min_len: self.min_len.max(1),
            max_len: max_len.min(MAX_SINGLE_LEN),
        })
    }

    /// The same as [`ChainRules::walk_single`] for a chain of two buffers, typically those of the header and of the frame.
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

    /// The flags of a buffer in a valid direct chain, except for VIRTQ_DESC_F_NEXT.
    #[inline(always)]
    fn expected_flags(self) -> u16 {
        match self.direction {
            Direction::Readable => 0,
            Direction::Writable => VRING_DESC_F_WRITE,
        }
    }

    /// Takes a chain of few descriptors, none of them indirect, with all buffers in the memory
    /// region that was translated last. Returns `None`, without any effect, for every other chain.
    /// `next` finds the descriptor that follows a given one.
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
            // The sum of at most 18 lengths of 32 bits fits 64 bits.
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

/// The rules for chains of one buffer each, on the path of [`crate::Virtqueue::find_singles`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct SingleRules {
    mask: u16,
    /// The flags that a descriptor must have, of those in `mask`.
    pub(crate) flags: u16,
    min_len: u32,
    max_len: u32,
}

impl SingleRules {
    /// The same rules, and a descriptor must also have exactly the flags `flags` of those in `mask`.
    #[inline(always)]
    pub(crate) fn with_flags(self, mask: u16, flags: u16) -> Self {
        Self {
            mask: self.mask | mask,
            flags: self.flags | flags,
            ..self
        }
    }

    /// Whether a descriptor is such a chain, of at least `min_len` bytes.
    #[inline(always)]
    pub(crate) fn accepts(self, flags: u16, len: u32, min_len: usize) -> bool {
        flags & self.mask == self.flags
            && len >= self.min_len
            && len <= self.max_len
            && usize::try_from(len).is_ok_and(|len| len >= min_len)
    }
}

/// The largest number of descriptors of a chain that [`ChainRules::walk_fast`] takes.
const MAX_FAST_PATH_DESCRIPTORS: usize = 18;

/// The order of the descriptors in an indirect table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TableOrder {
    /// Each `next` leads to the following one (virtio 1.3 §2.7.5.3).
    Linked,
    /// In the order of the table, to its end (virtio 1.3 §2.8.7).
    Sequential,
}

impl TableOrder {
    /// A descriptor of a table, whose fields have the order of the virtqueue's format.
    #[inline(always)]
    fn descriptor(self, raw: Descriptor) -> Descriptor {
        match self {
            Self::Linked => raw,
            Self::Sequential => raw.to_split_layout(raw.packed_flags()),
        }
    }
}

/// A general walk through one chain, and its result so far.
pub(crate) struct Walk<'w, 'p> {
    rules: ChainRules,
    segments: &'w mut SegmentWriter<'p>,
    len: u64,
    descriptors: usize,
    /// The number of segments in the burst in front of this chain.
    from: usize,
}

impl<'w, 'p> Walk<'w, 'p> {
    /// A walk that appends the chain's segments to `segments`.
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

    /// Adds the buffer of one descriptor. `limit` is the number of descriptors that the chain can
    /// have at most without a loop.
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
        // The sum of at most 1,024 lengths of 32 bits fits 64 bits.
        self.len += u64::from(desc.len());
        self.segments
            .push(desc.addr(), desc.len())
            .map_err(|_| ChainFault::AddressInvalid)
    }

    /// Adds the buffers of an indirect table. VIRTQ_DESC_F_WRITE in `outer`, which refers to the
    /// table, is ignored, as virtio 1.3 §2.7.5.3.2 requires.
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
        let table = self
            .segments
            .table::<Descriptor>(outer.addr(), entries)
            .ok_or(ChainFault::IndirectUnmapped)?;
        let limit = self.descriptors + usize::from(entries);
        let mut index = 0;
        loop {
            let mut desc = order.descriptor(table.get(index));
            if order == TableOrder::Sequential && self.rules.direction == Direction::Readable {
                // DPDK's driver (seen with 22.11) leaves VIRTQ_DESC_F_WRITE set on the header in
                // such a table, and on a segment whose index is that of the ring's descriptor.
                // Ignoring the flag is harmless, because the device only reads the buffer; refusing
                // the chain would stop all TX of such a guest.
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

    /// Ends the walk, with `walk_result` as the first fault found. A faulty chain, which includes
    /// one shorter than the minimum, gets no segments.
    #[inline(always)]
    pub(crate) fn finish(self, walk_result: Result<(), ChainFault>) -> WalkedChain {
        let count = self.segments.len() - self.from;
        let len = u32::try_from(self.len);
        let fault = match (walk_result, len) {
            (Err(fault), _) => Some(fault),
            (Ok(()), Err(_)) => Some(ChainFault::TooBig),
            // A buffer that crosses memory regions has several segments.
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
            // A chain that is refused at its first descriptor costs one read as well.
            descriptors_read: self.descriptors.max(1),
        }
    }

    /// Ends the walk without a chain.
    pub(crate) fn abandon(self) {
        self.segments.truncate(self.from);
    }
}

/// The number of the first `chains` that can be used although translations were missing in their
/// dequeue. An indirect table that could not be found may be what they were missing for.
#[cold]
pub(crate) fn count_translated(chains: &[Chain], missing: MissingTranslation) -> usize {
    let is_usable = |chain: &&Chain| {
        let end = usize::try_from(chain.from).unwrap_or(usize::MAX) + usize::from(chain.segments);
        end <= missing.first_segment && chain.fault != Some(ChainFault::IndirectUnmapped)
    };
    chains.iter().take_while(is_usable).count()
}

/// The largest number of chains that one call of `dequeue` takes.
pub(crate) const MAX_CHAINS_PER_DEQUEUE: usize = 64;

/// The number of descriptors after which one call of `dequeue` starts no further chain. Whatever
/// the guest wrote, a call thus reads at most half as many more, which takes some tens of
/// microseconds.
pub(crate) const MAX_DESCRIPTORS_PER_DEQUEUE: usize = 2 * MAX_CHAIN_SEGMENTS;

/// Converts a segment count, at most [`MAX_CHAIN_SEGMENTS`].
#[inline(always)]
fn to_u16(n: usize) -> u16 {
    u16::try_from(n).unwrap_or(u16::MAX)
}

/// Converts a segment index. The size of a virtqueue and [`MAX_CHAIN_SEGMENTS`] keep it far below
/// 2^32.
#[inline(always)]
fn to_u32(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}
