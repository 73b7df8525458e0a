//! Following one chain: what split and packed rings share.
//!
//! A walk takes in one buffer descriptor after the other, checks it and translates its address. How
//! the next descriptor is found is the format's own affair.

use crate::burst::Chain;
use crate::fault::ChainFault;
use crate::memory::{Descriptor, PieceWriter};
use crate::{Direction, MAX_CHAIN, RingConfig};

/// `flags`: another descriptor follows.
pub(crate) const NEXT: u16 = 1;
/// `flags`: the device writes the buffer.
pub(crate) const WRITE: u16 = 2;
/// `flags`: the buffer is a table of descriptors.
pub(crate) const INDIRECT: u16 = 4;

/// What holds for every chain of a ring.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rules {
    direction: Direction,
    indirect: bool,
    min_len: u32,
}

impl Rules {
    /// A chain of one buffer in the region met last, as most chains of most drivers are; `None`,
    /// and nothing done, for any other. `id` is what gives it back.
    #[inline(always)]
    pub(crate) fn single(
        self,
        id: u16,
        (addr, len): (u64, u32),
        flags: u16,
        pieces: &mut PieceWriter<'_>,
    ) -> Option<Chain> {
        let at = pieces.len();
        let fits = flags & (NEXT | WRITE | INDIRECT) == self.flags();
        if !fits || len < self.min_len || len == 0 {
            return None;
        }
        pieces.push_near(addr, len)?.prefetch(self.direction);
        Some(Chain::of(id, small(at), 1, len))
    }

    /// The same of two buffers, a header's and a frame's.
    #[inline(always)]
    pub(crate) fn double(
        self,
        id: u16,
        first: Descriptor,
        second: Descriptor,
        pieces: &mut PieceWriter<'_>,
    ) -> Option<Chain> {
        const ALL: u16 = NEXT | WRITE | INDIRECT;
        let at = pieces.len();
        let len = first.len().checked_add(second.len())?;
        let fits = first.flags() & ALL == self.flags() | NEXT
            && second.flags() & ALL == self.flags()
            && len >= self.min_len
            && first.len() != 0
            && second.len() != 0;
        if !fits {
            return None;
        }
        pieces.push_near(first.addr(), first.len())?;
        let Some(near) = pieces.push_near(second.addr(), second.len()) else {
            pieces.truncate(at);
            return None;
        };
        near.prefetch(self.direction);
        Some(Chain::of(id, small(at), 2, len))
    }

    /// What a buffer's flags are, NEXT aside, where nothing is out of the ordinary.
    #[inline(always)]
    fn flags(self) -> u16 {
        match self.direction {
            Direction::Readable => 0,
            Direction::Writable => WRITE,
        }
    }

    /// A chain with nothing out of the ordinary, as most chains of most guests are: few
    /// descriptors, none indirect, all in the region met last. `None`, and nothing done, for any
    /// other. `next` finds the descriptor that one of them goes on with.
    #[inline(always)]
    pub(crate) fn plain(
        self,
        head: Descriptor,
        pieces: &mut PieceWriter<'_>,
        mut next: impl FnMut(Descriptor) -> Option<Descriptor>,
    ) -> Option<Walked> {
        let flags = self.flags();
        let from = pieces.len();
        let mut desc = head;
        let mut len = 0;
        for work in 1..=MAX_PLAIN {
            if desc.flags() & (WRITE | INDIRECT) != flags
                || desc.len() == 0
                || pieces.push_near(desc.addr(), desc.len()).is_none()
            {
                break;
            }
            // No overflow: a few lengths of 32 bits.
            len += u64::from(desc.len());
            if !desc.has(NEXT) {
                let len = u32::try_from(len).ok().filter(|len| *len >= self.min_len);
                let Some(len) = len else { break };
                return Some(Walked {
                    fault: None,
                    from: small(from),
                    pieces: few(pieces.len() - from),
                    len,
                    work,
                });
            }
            let Some(found) = next(desc) else { break };
            desc = found;
        }
        pieces.truncate(from);
        None
    }

    pub(crate) fn new(config: &RingConfig) -> Self {
        Self {
            direction: config.direction,
            indirect: config.indirect,
            min_len: config.min_len,
        }
    }
}

/// Most descriptors of a chain that [`Rules::plain`] takes.
const MAX_PLAIN: usize = 18;

/// How the descriptors of an indirect table follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Table {
    /// By `next` (virtio 1.3 §2.7.5.3).
    Linked,
    /// One after the other to the end (§2.8.7).
    Sequential,
}

impl Table {
    /// A table's descriptor has its fields in the order of the ring's format.
    #[inline(always)]
    fn descriptor(self, raw: Descriptor) -> Descriptor {
        match self {
            Self::Linked => raw,
            Self::Sequential => raw.unpacked(raw.packed_flags()),
        }
    }
}

/// What has been gathered of one chain.
pub(crate) struct Walk<'w, 'p> {
    rules: Rules,
    pieces: &'w mut PieceWriter<'p>,
    len: u64,
    steps: usize,
    /// Pieces in the burst before this chain.
    from: usize,
}

impl<'w, 'p> Walk<'w, 'p> {
    /// A walk whose pieces go to the end of `pieces`.
    #[inline(always)]
    pub(crate) fn new(rules: Rules, pieces: &'w mut PieceWriter<'p>) -> Self {
        Self {
            rules,
            len: 0,
            steps: 0,
            from: pieces.len(),
            pieces,
        }
    }

    /// Takes in one buffer descriptor. `limit`: how many steps the ring or table allows.
    #[inline(always)]
    pub(crate) fn step(&mut self, desc: Descriptor, limit: usize) -> Result<(), ChainFault> {
        self.steps += 1;
        if self.steps > limit.min(MAX_CHAIN) {
            return Err(match self.steps > limit {
                true => ChainFault::Loop,
                false => ChainFault::TooLong,
            });
        }
        if desc.has(WRITE) != (self.rules.direction == Direction::Writable) {
            return Err(ChainFault::DirectionWrong);
        }
        // No overflow: 1,024 lengths of 32 bits.
        self.len += u64::from(desc.len());
        self.pieces
            .push(desc.addr(), desc.len())
            .map_err(|_| ChainFault::AddressInvalid)
    }

    /// Takes in an indirect table. WRITE on the descriptor that refers to it is ignored, as
    /// virtio 1.3 §2.7.5.3.2 asks.
    #[inline(always)]
    pub(crate) fn table(&mut self, outer: Descriptor, order: Table) -> Result<(), ChainFault> {
        if !self.rules.indirect {
            return Err(ChainFault::IndirectNotNegotiated);
        }
        if outer.has(NEXT) {
            return Err(ChainFault::IndirectWithNext);
        }
        let entries = u16::try_from(outer.len() / 16).map_err(|_| ChainFault::IndirectBadLength)?;
        if entries == 0 || !outer.len().is_multiple_of(16) {
            return Err(ChainFault::IndirectBadLength);
        }
        let limit = self.steps + usize::from(entries);
        let mut index = 0;
        loop {
            let table = self
                .pieces
                .table::<Descriptor>(outer.addr(), entries)
                .ok_or(ChainFault::IndirectUnmapped)?;
            let mut desc = order.descriptor(table.get(index));
            if order == Table::Sequential && self.rules.direction == Direction::Readable {
                // DPDK's driver leaves WRITE on the header in such a table, and on a piece whose
                // number is that of the ring's descriptor (seen with 22.11). What is only read loses
                // nothing by that, and its guests would lose their frames.
                desc = desc.without(WRITE);
            }
            if desc.has(INDIRECT) {
                return Err(ChainFault::IndirectNested);
            }
            self.step(desc, limit)?;
            index = match order {
                Table::Linked if !desc.has(NEXT) => return Ok(()),
                Table::Linked => desc.next(),
                Table::Sequential => index + 1,
            };
            if index >= entries {
                return match order {
                    Table::Linked => Err(ChainFault::NextOutOfRange),
                    Table::Sequential => Ok(()),
                };
            }
        }
    }

    /// Ends the walk. A chain at fault, or too short for this ring, has no pieces. The result is
    /// the fault, the chain's bytes and where its pieces lie.
    #[inline(always)]
    pub(crate) fn end(self, followed: Result<(), ChainFault>) -> Walked {
        let count = self.pieces.len() - self.from;
        let len = u32::try_from(self.len);
        let fault = match (followed, len) {
            (Err(fault), _) => Some(fault),
            (Ok(()), Err(_)) => Some(ChainFault::TooBig),
            // A buffer that crosses regions has several pieces.
            (Ok(()), Ok(_)) if count > MAX_CHAIN => Some(ChainFault::TooLong),
            (Ok(()), Ok(len)) if len < self.rules.min_len => Some(ChainFault::TooShort),
            (Ok(()), Ok(_)) => None,
        };
        if fault.is_some() {
            self.pieces.truncate(self.from);
        }
        Walked {
            fault,
            from: small(self.from),
            pieces: few(self.pieces.len() - self.from),
            len: len.ok().filter(|_| fault.is_none()).unwrap_or(0),
            // A chain that was refused at its first descriptor was read all the same.
            work: self.steps.max(1),
        }
    }

    /// Forgets the chain.
    pub(crate) fn abandon(self) {
        self.pieces.truncate(self.from);
    }
}

/// A chain followed to its end.
pub(crate) struct Walked {
    pub(crate) fault: Option<ChainFault>,
    pub(crate) from: u32,
    pub(crate) pieces: u16,
    pub(crate) len: u32,
    /// Descriptors read for it.
    pub(crate) work: usize,
}

/// Chains that one call of `take` may take.
pub(crate) const MAX_CHAINS: usize = 64;

/// Descriptors that one call of `take` may read: whatever the guest wrote, a call ends in some tens
/// of microseconds.
pub(crate) const MAX_STEPS: usize = 4 * MAX_CHAIN;

/// At most [`MAX_CHAIN`].
#[inline(always)]
fn few(n: usize) -> u16 {
    u16::try_from(n).unwrap_or(u16::MAX)
}

/// Piece counts are bounded far below 2^32 by the size of a ring and [`MAX_CHAIN`].
#[inline(always)]
fn small(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}
