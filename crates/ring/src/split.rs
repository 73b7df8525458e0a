//! The split virtqueue (virtio 1.3 §2.7).
//!
//! ```text
//! descriptor table      available ring (driver's)        used ring (ours)
//! [addr len flags next] flags idx ring[size] used_event  flags idx {id len}[size] avail_event
//! ```
//!
//! `idx` values run freely through 16 bits; an entry's place is `idx` modulo the size.

use crate::burst::{Burst, Chain};
use crate::fault::{ChainFault, RingFault};
use crate::memory::{GuestArray, GuestMemory, full_fence};
use crate::{Direction, MAX_CHAIN, RingConfig, RingError};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// `used.flags`: no kicks wanted.
const NO_NOTIFY: u16 = 1;
/// `avail.flags`: no interrupts wanted.
const NO_INTERRUPT: u16 = 1;

/// Places of the fields of both rings, in 16-bit words.
const FLAGS: u16 = 0;
const IDX: u16 = 1;
const RING: u16 = 2;

/// Most heads looked up ahead of their descriptors.
const LOOK_AHEAD: usize = 64;

/// A descriptor as it lies in memory: little-endian fields.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

/// A used element as it lies in memory.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
struct UsedElement {
    id: u32,
    len: u32,
}

crate::memory::plain_data!(Descriptor, UsedElement);
const _: () = assert!(size_of::<Descriptor>() == 16 && size_of::<UsedElement>() == 8);

impl Descriptor {
    #[inline(always)]
    fn has(self, flag: u16) -> bool {
        u16::from_le(self.flags) & flag != 0
    }
}

/// The device's half of a split ring.
#[derive(Debug)]
pub(crate) struct SplitRing {
    size: u16,
    direction: Direction,
    event_idx: bool,
    indirect: bool,
    min_len: u32,
    /// Next entry of the available ring to take.
    next_avail: u16,
    /// Next entry of the used ring to fill. Elements from `published` up to here are written but
    /// not yet seen by the driver: the shadow part of the used ring.
    next_used: u16,
    /// `used.idx` as the driver sees it.
    published: u16,
    desc: GuestArray<Descriptor>,
    avail: GuestArray<u16>,
    /// `flags` and `idx` of the used ring.
    used_head: GuestArray<u16>,
    used: GuestArray<UsedElement>,
    /// `avail_event`, behind the used elements.
    avail_event: GuestArray<u16>,
}

impl SplitRing {
    pub(crate) fn new(config: &RingConfig, memory: &GuestMemory) -> Result<Self, RingError> {
        let layout = config.layout;
        let size = layout.size;
        if !size.is_power_of_two() || size > crate::MAX_SIZE {
            return Err(RingError::Size(size));
        }
        let base = u16::try_from(config.base).map_err(|_| RingError::Base(config.base))?;
        let used_at = |bytes: u64| layout.used.checked_add(bytes);
        let used = |addr: Option<u64>, len| memory.user_array(addr?, len);
        let no_used = RingError::unmapped("used ring", layout.used);
        let ring = Self {
            size,
            direction: config.direction,
            event_idx: config.event_idx,
            indirect: config.indirect,
            min_len: config.min_len,
            next_avail: base,
            next_used: 0,
            published: 0,
            desc: memory
                .user_array(layout.desc, size)
                .ok_or(RingError::unmapped("descriptor table", layout.desc))?,
            // flags, idx, ring, used_event: no overflow, the size is at most 32,768.
            avail: memory
                .user_array(layout.avail, size + 3)
                .ok_or(RingError::unmapped("available ring", layout.avail))?,
            used_head: memory.user_array(layout.used, 2).ok_or(no_used)?,
            used: used_at(4)
                .and_then(|addr| memory.user_array(addr, size))
                .ok_or(no_used)?,
            avail_event: used(used_at(4 + 8 * u64::from(size)), 1).ok_or(no_used)?,
        };
        // What the driver last saw published; a back-end that takes over goes on from there.
        let idx = ring.used_head.acquire(IDX);
        Ok(Self {
            next_used: idx,
            published: idx,
            ..ring
        })
    }

    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    pub(crate) fn base(&self) -> u32 {
        u32::from(self.next_avail)
    }

    /// One read of the available index; then heads and descriptors are fetched ahead of their use.
    #[inline]
    pub(crate) fn take(&mut self, burst: &mut Burst, max: usize) -> Result<usize, RingFault> {
        let avail = self.avail.acquire(IDX);
        let pending = avail.wrapping_sub(self.next_avail);
        if pending > self.size {
            return Err(RingFault::AvailIndexJump {
                avail,
                next: self.next_avail,
                size: self.size,
            });
        }
        let count = usize::from(pending).min(max).min(LOOK_AHEAD);
        let mut heads = [0u16; LOOK_AHEAD];
        let mut at = self.next_avail;
        for head in &mut heads[..count] {
            *head = u16::from_le(self.avail.get(RING + (at & (self.size - 1))));
            self.desc.prefetch(*head);
            at = at.wrapping_add(1);
        }
        let mut budget = Budget::new();
        for (taken, head) in heads[..count].iter().copied().enumerate() {
            if head >= self.size {
                // Chains before it are whole: they go on, and the next call meets the fault.
                return match taken {
                    0 => Err(RingFault::HeadOutOfRange {
                        head,
                        size: self.size,
                    }),
                    _ => Ok(taken),
                };
            }
            if budget.is_spent() {
                return Ok(taken);
            }
            let chain = self.walk(head, burst, &mut budget);
            burst.chains.push(chain);
            self.next_avail = self.next_avail.wrapping_add(1);
        }
        Ok(count)
    }

    /// Follows one chain and translates its buffers.
    #[inline(always)]
    fn walk(&self, head: u16, burst: &mut Burst, budget: &mut Budget) -> Chain {
        let from = burst.pieces.len();
        let mut walk = Walk {
            len: 0,
            steps: 0,
            from,
        };
        let fault = match self.follow(head, burst, &mut walk) {
            Ok(()) if walk.len < self.min_len => Some(ChainFault::TooShort),
            Ok(()) => None,
            Err(fault) => Some(fault),
        };
        // The head counts even when it is refused at sight, as an indirect descriptor may be.
        let work = walk.steps + 1;
        budget.spend(work);
        burst.work += work;
        if fault.is_some() {
            burst.pieces.truncate(from);
            walk.len = 0;
        }
        Chain {
            id: head,
            slots: 1,
            fault,
            from: small(from),
            to: small(burst.pieces.len()),
            len: walk.len,
        }
    }

    #[inline(always)]
    fn follow(&self, head: u16, burst: &mut Burst, walk: &mut Walk) -> Result<(), ChainFault> {
        let mut index = head;
        loop {
            let desc = self.desc.get(index);
            if desc.has(INDIRECT) {
                return self.follow_table(desc, burst, walk);
            }
            walk.step(desc, self.direction, usize::from(self.size), burst)?;
            if !desc.has(NEXT) {
                return Ok(());
            }
            index = u16::from_le(desc.next);
            if index >= self.size {
                return Err(ChainFault::NextOutOfRange);
            }
        }
    }

    /// Follows an indirect table (virtio 1.3 §2.7.5.3). WRITE on the descriptor that refers to it
    /// is ignored, as §2.7.5.3.2 asks.
    fn follow_table(
        &self,
        outer: Descriptor,
        burst: &mut Burst,
        walk: &mut Walk,
    ) -> Result<(), ChainFault> {
        if !self.indirect {
            return Err(ChainFault::IndirectNotNegotiated);
        }
        if outer.has(NEXT) {
            return Err(ChainFault::IndirectWithNext);
        }
        let bytes = u32::from_le(outer.len);
        let entries = u16::try_from(bytes / 16).map_err(|_| ChainFault::IndirectBadLength)?;
        if entries == 0 || !bytes.is_multiple_of(16) {
            return Err(ChainFault::IndirectBadLength);
        }
        let memory = std::sync::Arc::clone(burst.pieces.memory());
        let table = memory
            .guest_array::<Descriptor>(u64::from_le(outer.addr), entries)
            .ok_or(ChainFault::IndirectUnmapped)?;
        let before = walk.steps;
        let mut index = 0;
        loop {
            let desc = table.get(index);
            if desc.has(INDIRECT) {
                return Err(ChainFault::IndirectNested);
            }
            let limit = before + usize::from(entries);
            walk.step(desc, self.direction, limit, burst)?;
            if !desc.has(NEXT) {
                return Ok(());
            }
            index = u16::from_le(desc.next);
            if index >= entries {
                return Err(ChainFault::NextOutOfRange);
            }
        }
    }

    /// Gives the most recently taken `slots` entries back untouched.
    pub(crate) fn untake(&mut self, slots: u16) {
        self.next_avail = self.next_avail.wrapping_sub(slots);
    }

    /// Writes a used element behind the published ones.
    #[inline(always)]
    pub(crate) fn complete(&mut self, chain: &Chain, written: u32) {
        let element = UsedElement {
            id: u32::from(chain.id).to_le(),
            len: written.to_le(),
        };
        self.used.set(self.next_used & (self.size - 1), element);
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Shows the driver every completed chain at once; true when it wants an interrupt for them.
    #[inline(always)]
    pub(crate) fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.next_used);
        if old == new {
            return false;
        }
        self.used_head.release(IDX, new);
        self.published = new;
        full_fence();
        if self.event_idx {
            // used_event stands behind the ring's entries.
            let event = self.avail.acquire(RING + self.size);
            needs_event(event, new, old)
        } else {
            self.avail.acquire(FLAGS) & NO_INTERRUPT == 0
        }
    }

    pub(crate) fn is_unpublished(&self) -> bool {
        self.published != self.next_used
    }

    /// Asks for kicks; true when chains came meanwhile, so that no kick may come for them.
    pub(crate) fn enable_kicks(&mut self) -> bool {
        if self.event_idx {
            self.avail_event.release(0, self.next_avail);
        } else {
            self.used_head.release(FLAGS, 0);
        }
        full_fence();
        self.has_more()
    }

    /// Asks for no kicks. With EVENT_IDX nothing is to be done: the driver kicks only when it
    /// passes `avail_event`, which stays behind.
    pub(crate) fn disable_kicks(&mut self) {
        if !self.event_idx {
            self.used_head.release(FLAGS, NO_NOTIFY);
        }
    }

    #[inline(always)]
    pub(crate) fn has_more(&self) -> bool {
        self.avail.acquire(IDX) != self.next_avail
    }
}

/// Whether moving the index from `old` to `new` passes `event` (virtio 1.3 §2.7.7.2).
#[inline(always)]
fn needs_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// What has been gathered of one chain.
struct Walk {
    len: u32,
    steps: usize,
    /// Pieces in the burst before this chain.
    from: usize,
}

impl Walk {
    /// Takes in one buffer descriptor. `limit`: how many steps the ring or table allows.
    #[inline(always)]
    fn step(
        &mut self,
        desc: Descriptor,
        direction: Direction,
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
        if desc.has(WRITE) != (direction == Direction::Writable) {
            return Err(ChainFault::DirectionWrong);
        }
        let len = u32::from_le(desc.len);
        self.len = self.len.checked_add(len).ok_or(ChainFault::TooBig)?;
        burst
            .pieces
            .push(u64::from_le(desc.addr), len)
            .map_err(|_| ChainFault::AddressInvalid)?;
        if burst.pieces.len() - self.from > MAX_CHAIN {
            return Err(ChainFault::TooLong);
        }
        Ok(())
    }
}

/// Descriptors that one call of `take` may still read: whatever the guest wrote, a call ends in
/// some tens of microseconds.
struct Budget(usize);

impl Budget {
    fn new() -> Self {
        Self(4 * MAX_CHAIN)
    }

    #[inline(always)]
    fn spend(&mut self, steps: usize) {
        self.0 = self.0.saturating_sub(steps);
    }

    #[inline(always)]
    fn is_spent(&self) -> bool {
        self.0 == 0
    }
}

/// Piece counts are bounded far below 2^32 by the size of a ring and [`MAX_CHAIN`].
#[inline(always)]
fn small(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}
