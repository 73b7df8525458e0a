//! Following one chain: what split and packed rings share.
//!
//! A walk takes in one buffer descriptor after the other, checks it and translates its address. How
//! the next descriptor is found is the format's own affair.

use std::sync::Arc;

use crate::burst::Burst;
use crate::fault::ChainFault;
use crate::memory::Descriptor;
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
    pub(crate) fn new(config: &RingConfig) -> Self {
        Self {
            direction: config.direction,
            indirect: config.indirect,
            min_len: config.min_len,
        }
    }
}

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
pub(crate) struct Walk {
    rules: Rules,
    len: u32,
    steps: usize,
    /// Pieces in the burst before this chain.
    from: usize,
}

impl Walk {
    /// A walk whose pieces go to the end of `burst`.
    #[inline(always)]
    pub(crate) fn new(rules: Rules, burst: &Burst) -> Self {
        Self {
            rules,
            len: 0,
            steps: 0,
            from: burst.pieces.len(),
        }
    }

    /// Takes in one buffer descriptor. `limit`: how many steps the ring or table allows.
    #[inline(always)]
    pub(crate) fn step(
        &mut self,
        desc: Descriptor,
        limit: usize,
        burst: &mut Burst,
    ) -> Result<(), ChainFault> {
        self.steps += 1;
        if self.steps > limit {
            return Err(ChainFault::Loop);
        }
        if self.steps > MAX_CHAIN {
            return Err(ChainFault::TooLong);
        }
        if desc.has(WRITE) != (self.rules.direction == Direction::Writable) {
            return Err(ChainFault::DirectionWrong);
        }
        self.len = self.len.checked_add(desc.len()).ok_or(ChainFault::TooBig)?;
        burst
            .pieces
            .push(desc.addr(), desc.len())
            .map_err(|_| ChainFault::AddressInvalid)?;
        if burst.pieces.len() - self.from > MAX_CHAIN {
            return Err(ChainFault::TooLong);
        }
        Ok(())
    }

    /// Takes in an indirect table. WRITE on the descriptor that refers to it is ignored, as
    /// virtio 1.3 §2.7.5.3.2 asks.
    pub(crate) fn table(
        &mut self,
        outer: Descriptor,
        order: Table,
        burst: &mut Burst,
    ) -> Result<(), ChainFault> {
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
        let memory = Arc::clone(burst.pieces.memory());
        let table = memory
            .guest_array::<Descriptor>(outer.addr(), entries)
            .ok_or(ChainFault::IndirectUnmapped)?;
        let limit = self.steps + usize::from(entries);
        let mut index = 0;
        loop {
            let desc = order.descriptor(table.get(index));
            if desc.has(INDIRECT) {
                return Err(ChainFault::IndirectNested);
            }
            self.step(desc, limit, burst)?;
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
    /// the fault and the chain's bytes; its pieces are those from [`Walk::from`] to the burst's end.
    #[inline(always)]
    pub(crate) fn end(self, followed: Result<(), ChainFault>, burst: &mut Burst) -> Walked {
        let fault = match followed {
            Ok(()) if self.len < self.rules.min_len => Some(ChainFault::TooShort),
            Ok(()) => None,
            Err(fault) => Some(fault),
        };
        // A chain that was refused at its first descriptor was read all the same.
        burst.work += self.steps.max(1);
        if fault.is_some() {
            burst.pieces.truncate(self.from);
        }
        Walked {
            fault,
            from: small(self.from),
            to: small(burst.pieces.len()),
            len: if fault.is_some() { 0 } else { self.len },
        }
    }

    /// Pieces in the burst before this chain.
    pub(crate) fn from(&self) -> usize {
        self.from
    }
}

/// A chain followed to its end.
pub(crate) struct Walked {
    pub(crate) fault: Option<ChainFault>,
    pub(crate) from: u32,
    pub(crate) to: u32,
    pub(crate) len: u32,
}

/// Chains that one call of `take` may take.
pub(crate) const MAX_CHAINS: usize = 64;

/// Descriptors that one call of `take` may read: whatever the guest wrote, a call ends in some tens
/// of microseconds.
pub(crate) const MAX_STEPS: usize = 4 * MAX_CHAIN;

/// Piece counts are bounded far below 2^32 by the size of a ring and [`MAX_CHAIN`].
#[inline(always)]
fn small(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}
