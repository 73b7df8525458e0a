//! The split virtqueue (virtio 1.3 §2.7).
//!
//! ```text
//! descriptor table      available ring (driver's)        used ring (ours)
//! [addr len flags next] flags idx ring[size] used_event  flags idx {id len}[size] avail_event
//! ```
//!
//! `idx` values run freely through 16 bits; an entry's place is `idx` modulo the size.

use crate::burst::{Burst, Chain, Intake};
use crate::fault::{ChainFault, RingFault};
use crate::memory::{Descriptor, GuestArray, GuestMemory, PieceWriter, full_fence};
use crate::walk::{INDIRECT, MAX_STEPS, NEXT, Rules, Table, Walk, Walked};
use crate::{RingConfig, RingError, needs_event, written};

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

/// A used element as it lies in memory.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
struct UsedElement {
    id: u32,
    len: u32,
}

crate::memory::plain_data!(UsedElement);
const _: () = assert!(size_of::<UsedElement>() == 8);

/// The device's half of a split ring.
#[derive(Debug)]
pub(crate) struct SplitRing {
    size: u16,
    event_idx: bool,
    rules: Rules,
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
            event_idx: config.event_idx,
            rules: Rules::new(config),
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
        self.look_ahead(&mut heads[..count]);
        let Intake { places, mut pieces } = burst.intake(count);
        // Work of chains that are not short ones; those are bounded by their number.
        let mut work = 0;
        let mut taken = 0;
        for (head, place) in heads.iter().copied().zip(places) {
            // Chains before it are whole: they go on, and the next call meets the fault.
            let Some(desc) = self.desc.descriptor(head) else {
                break;
            };
            let buffer = (desc.addr(), desc.len());
            let short = match desc.has(NEXT) {
                false => self.rules.single(head, buffer, desc.flags(), &mut pieces),
                true => self
                    .desc
                    .descriptor(desc.next())
                    .and_then(|second| self.rules.double(head, desc, second, &mut pieces)),
            };
            if let Some(chain) = short {
                *place = chain;
                taken += 1;
                continue;
            }
            if work >= MAX_STEPS {
                break;
            }
            let walked = match self.walk_plain(desc, &mut pieces) {
                Some(walked) => walked,
                None => {
                    let any = self.walk_any(desc, pieces);
                    pieces = any.1;
                    any.0
                }
            };
            work += walked.work;
            *place = Chain::new(head, 1, walked);
            taken += 1;
        }
        drop(pieces);
        burst.took(taken, taken + work);
        self.next_avail = self.next_avail.wrapping_add(small(taken));
        match heads[..count].first() {
            Some(&head) if taken == 0 => Err(RingFault::HeadOutOfRange {
                head,
                size: self.size,
            }),
            _ => Ok(taken),
        }
    }

    /// Reads the next heads and asks for their descriptors.
    #[inline(always)]
    fn look_ahead(&self, heads: &mut [u16]) {
        let at = self.next_avail & (self.size - 1);
        let (first, rest) = heads.split_at_mut(heads.len().min(usize::from(self.size - at)));
        // Both lie in the ring, by the line above.
        self.avail.get_run(RING + at, first);
        self.avail.get_run(RING, rest);
        let mut used = self.next_used;
        for head in heads {
            self.desc.prefetch(*head);
            // Eight used elements to a line.
            if used & 7 == 0 {
                self.used.prefetch_to_write(used & (self.size - 1));
            }
            used = used.wrapping_add(1);
        }
    }

    /// Follows a chain in which nothing is out of the ordinary.
    #[inline(always)]
    fn walk_plain(&self, head: Descriptor, pieces: &mut PieceWriter<'_>) -> Option<Walked> {
        self.rules
            .plain(head, pieces, |desc| self.desc.descriptor(desc.next()))
    }

    /// Follows any chain. What the short way may have read of it before is forgotten. The writer
    /// goes in and out by value, so that the short way can keep it in registers.
    #[inline(never)]
    fn walk_any<'p>(
        &self,
        head: Descriptor,
        mut pieces: PieceWriter<'p>,
    ) -> (Walked, PieceWriter<'p>) {
        let mut walk = Walk::new(self.rules, &mut pieces);
        let followed = self.follow(head, &mut walk);
        (walk.end(followed), pieces)
    }

    #[inline(always)]
    fn follow(&self, head: Descriptor, walk: &mut Walk<'_, '_>) -> Result<(), ChainFault> {
        let mut desc = head;
        loop {
            if desc.has(INDIRECT) {
                return walk.table(desc, Table::Linked);
            }
            walk.step(desc, usize::from(self.size))?;
            if !desc.has(NEXT) {
                return Ok(());
            }
            desc = self
                .desc
                .descriptor(desc.next())
                .ok_or(ChainFault::NextOutOfRange)?;
        }
    }

    /// Gives the most recently taken `slots` entries back untouched.
    pub(crate) fn untake(&mut self, slots: u16) {
        self.next_avail = self.next_avail.wrapping_sub(slots);
    }

    /// Gives back the chains that `len` bytes fill, one after the other; says how many those are.
    #[inline(always)]
    pub(crate) fn complete_filled(&mut self, chains: &[Chain], len: usize) -> usize {
        let mut at = self.next_used;
        let mut rest = len;
        let mut used = 0;
        for chain in chains {
            if rest == 0 {
                break;
            }
            let here = rest.min(chain.len());
            rest -= here;
            let element = UsedElement {
                id: u32::from(chain.id).to_le(),
                len: written(here).to_le(),
            };
            self.used.set(at & (self.size - 1), element);
            at = at.wrapping_add(1);
            used += 1;
        }
        self.next_used = at;
        used
    }

    /// Gives chains back, each with the number of bytes written to it.
    #[inline(always)]
    pub(crate) fn complete_each(&mut self, each: impl Iterator<Item = (u16, u16, u32)>) {
        // Kept in a register: through memory it would cost more than the rest.
        let mut at = self.next_used;
        for (id, _, written) in each {
            let element = UsedElement {
                id: u32::from(id).to_le(),
                len: written.to_le(),
            };
            self.used.set(at & (self.size - 1), element);
            at = at.wrapping_add(1);
        }
        self.next_used = at;
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

/// At most [`LOOK_AHEAD`].
#[inline(always)]
fn small(n: usize) -> u16 {
    u16::try_from(n).unwrap_or(u16::MAX)
}
