//! The device side of a split virtqueue (virtio 1.3 §2.7).
//!
//! ```text
//! descriptor table       available ring                   used ring
//! (driver writes)        (driver writes)                  (device writes)
//! [addr len flags next]  flags idx ring[size] used_event  flags idx {id len}[size] avail_event
//! ```
//!
//! Both `idx` fields count through all 16 bits and wrap at 65,536. The entry of an index is the
//! index modulo the size.
//!
//! ```text
//!                                published      next_used
//!                                    v              v
//! used ring  ... visible to driver   | completed    | unused ...
//! ```
//!
//! `complete` writes used elements behind `published`, where the driver does not read. `publish`
//! makes all of them visible with one store of `idx`.

mod singles;

use crate::burst::{Burst, Reservation};
use crate::chain::{Chain, WalkedChain};
use crate::config::{MAX_QUEUE_SIZE, VirtqueueConfig, VirtqueueError};
use crate::constants::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_USED_F_NO_NOTIFY,
};
use crate::event::needs_event;
use crate::fault::{ChainFault, VirtqueueFault};
use crate::memory::{Descriptor, GuestArray, GuestMemory, SegmentWriter, full_fence};
use crate::ring_log::UsedRingLog;
use crate::walk::{
    ChainRules, MAX_CHAINS_PER_DEQUEUE, MAX_DESCRIPTORS_PER_DEQUEUE, TableOrder, Walk,
    count_translated,
};

// Positions of the fields of both rings, in 16-bit words.
const FLAGS: u16 = 0;
const IDX: u16 = 1;
const RING_ENTRIES: u16 = 2;

/// An element of the used ring (virtio 1.3 §2.7.8) as it lies in memory.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
struct UsedElement {
    id: u32,
    len: u32,
}

crate::memory::impl_byte_valued!(UsedElement);
const _: () = assert!(size_of::<UsedElement>() == 8);

/// The device side of a split virtqueue.
#[derive(Debug)]
pub(crate) struct SplitVirtqueue {
    size: u16,
    event_idx: bool,
    rules: ChainRules,
    /// Index of the next entry of the available ring to dequeue.
    next_avail: u16,
    /// Index of the next entry of the used ring to write. The elements from `published` up to here
    /// are written, but the driver cannot see them yet.
    next_used: u16,
    /// `used.idx` as the driver sees it.
    published: u16,
    desc: GuestArray<Descriptor>,
    avail: GuestArray<u16>,
    /// `flags` and `idx` of the used ring.
    used_header: GuestArray<u16>,
    used: GuestArray<UsedElement>,
    /// `avail_event`, which follows the used elements.
    avail_event: GuestArray<u16>,
    /// Where writes to the used ring are logged, if they are.
    log: Option<UsedRingLog>,
}

impl SplitVirtqueue {
    pub(crate) fn new(
        config: &VirtqueueConfig,
        memory: &GuestMemory,
    ) -> Result<Self, VirtqueueError> {
        let layout = config.layout;
        let size = layout.size;
        if !size.is_power_of_two() || size > MAX_QUEUE_SIZE {
            return Err(VirtqueueError::Size(size));
        }
        let base = u16::try_from(config.base).map_err(|_| VirtqueueError::Base(config.base))?;
        let no_used = VirtqueueError::unmapped("used ring", layout.used);
        // `flags`, `idx`, the elements and `avail_event`.
        let used_elements_len = 8 * u64::from(size);
        let used = memory
            .area(layout.used, 4 + used_elements_len + 2)
            .ok_or(no_used)?;
        let ring = Self {
            size,
            event_idx: config.event_idx,
            rules: ChainRules::new(config),
            next_avail: base,
            next_used: 0,
            published: 0,
            desc: memory
                .user_array(layout.desc, size)
                .ok_or(VirtqueueError::unmapped("descriptor table", layout.desc))?,
            // `flags`, `idx`, the entries and `used_event`. The size is at most 32,768, so the sum
            // fits.
            avail: memory
                .user_array(layout.avail, size + 3)
                .ok_or(VirtqueueError::unmapped("available ring", layout.avail))?,
            used_header: used.array(0, 2).ok_or(no_used)?,
            used: used.array(4, size).ok_or(no_used)?,
            avail_event: used.array(4 + used_elements_len, 1).ok_or(no_used)?,
            log: None,
        };
        // The driver has seen everything up to this index. A back-end that takes over continues
        // there.
        let idx = ring.used_header.acquire(IDX);
        Ok(Self {
            next_avail: ring.corrected_base(base, idx),
            next_used: idx,
            published: idx,
            ..ring
        })
    }

    /// The base where this virtqueue really continues if the front-end's is `base` and the used
    /// index `used`. Chains are completed in order and none is in use when a virtqueue stops, so
    /// the two are equal, unless a front-end does not keep the base over a restart of the back-end
    /// (DPDK's virtio-user in server mode sends 0). The used index is then believed, as long as the
    /// available index is at most one ring ahead of it.
    fn corrected_base(&self, base: u16, used: u16) -> u16 {
        let is_plausible = self.avail.acquire(IDX).wrapping_sub(used) <= self.size;
        if is_plausible { used } else { base }
    }

    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    /// The start of the used ring.
    pub(crate) fn used_area(&self) -> &GuestArray<u16> {
        &self.used_header
    }

    /// Logs writes to the used ring from now on, or with `None` no longer.
    pub(crate) fn set_log(&mut self, log: Option<UsedRingLog>) {
        self.log = log;
    }

    pub(crate) fn base(&self) -> u32 {
        u32::from(self.next_avail)
    }

    /// Reads the available index once, prefetches heads and descriptors, and then follows the
    /// chains.
    #[inline]
    pub(crate) fn dequeue(
        &mut self,
        burst: &mut Burst,
        max: usize,
    ) -> Result<usize, VirtqueueFault> {
        let count = self.pending()?.min(max).min(MAX_CHAINS_PER_DEQUEUE);
        let mut heads = [0u16; MAX_CHAINS_PER_DEQUEUE];
        self.prefetch_heads(&mut heads[..count]);
        let Reservation {
            chains,
            mut segments,
        } = burst.reserve(count);
        // Work of the chains with more than two descriptors. The others are bounded by their
        // number.
        let mut descriptors_read = 0;
        let mut taken = 0;
        for (head, slot) in heads.iter().copied().zip(chains.iter_mut()) {
            // The valid chains in front of an invalid head are returned; the next call reports the
            // fault.
            let Some(desc) = self.desc.descriptor(head) else {
                break;
            };
            if let Some(chain) = self.walk_short(head, desc, &mut segments) {
                *slot = chain;
                taken += 1;
                continue;
            }
            if descriptors_read >= MAX_DESCRIPTORS_PER_DEQUEUE {
                break;
            }
            let walked = match self.walk_fast(desc, &mut segments) {
                Some(walked) => walked,
                None => {
                    let (walked, writer) = self.walk_slow(desc, segments);
                    segments = writer;
                    walked
                }
            };
            descriptors_read += walked.descriptors_read;
            *slot = Chain::new(head, 1, walked);
            taken += 1;
        }
        if let Some(missing) = segments.end_dequeue() {
            taken = count_translated(&chains[..taken], missing);
            drop(segments);
            burst.commit(taken, taken + descriptors_read);
            self.next_avail = self.next_avail.wrapping_add(to_u16(taken));
            return Ok(taken);
        }
        drop(segments);
        burst.commit(taken, taken + descriptors_read);
        self.next_avail = self.next_avail.wrapping_add(to_u16(taken));
        match heads[..count].first() {
            Some(&head) if taken == 0 => Err(VirtqueueFault::HeadOutOfRange {
                head,
                size: self.size,
            }),
            _ => Ok(taken),
        }
    }

    /// Reads the available index. Returns how many chains are available.
    #[inline(always)]
    fn pending(&self) -> Result<usize, VirtqueueFault> {
        let avail = self.avail.acquire(IDX);
        let pending = avail.wrapping_sub(self.next_avail);
        if pending > self.size {
            return Err(VirtqueueFault::AvailIndexJump {
                avail,
                next: self.next_avail,
                size: self.size,
            });
        }
        Ok(usize::from(pending))
    }

    /// Reads the next heads and prefetches their descriptors and the used elements to come.
    #[inline(always)]
    fn prefetch_heads(&self, heads: &mut [u16]) {
        let at = self.next_avail & (self.size - 1);
        let (first, rest) = heads.split_at_mut(heads.len().min(usize::from(self.size - at)));
        // Both parts lie in the ring, because `at` is below the size.
        self.avail.get_range(RING_ENTRIES + at, first);
        self.avail.get_range(RING_ENTRIES, rest);
        let mut used = self.next_used;
        for head in heads {
            self.desc.prefetch(*head);
            // A cache line holds eight used elements.
            if used & 7 == 0 {
                self.used.prefetch_to_write(used & (self.size - 1));
            }
            used = used.wrapping_add(1);
        }
    }

    /// Follows a direct chain of one or two descriptors in the memory region that was translated
    /// last.
    #[inline(always)]
    fn walk_short(
        &self,
        head: u16,
        desc: Descriptor,
        segments: &mut SegmentWriter<'_>,
    ) -> Option<Chain> {
        if desc.has(VRING_DESC_F_NEXT) {
            let second = self.desc.descriptor(desc.next())?;
            self.rules.walk_double(head, desc, second, segments)
        } else {
            let buffer = (desc.addr(), desc.len());
            self.rules.walk_single(head, buffer, desc.flags(), segments)
        }
    }

    /// Follows a direct chain in the memory region that was translated last.
    #[inline(always)]
    fn walk_fast(&self, head: Descriptor, segments: &mut SegmentWriter<'_>) -> Option<WalkedChain> {
        self.rules
            .walk_fast(head, segments, |desc| self.desc.descriptor(desc.next()))
    }

    /// Follows any chain from its start. The writer is passed and returned by value, so that the
    /// fast path can keep it in registers.
    #[inline(never)]
    fn walk_slow<'p>(
        &self,
        head: Descriptor,
        mut segments: SegmentWriter<'p>,
    ) -> (WalkedChain, SegmentWriter<'p>) {
        let mut walk = Walk::new(self.rules, &mut segments);
        let walk_result = self.walk_chain(head, &mut walk);
        (walk.finish(walk_result), segments)
    }

    #[inline(always)]
    fn walk_chain(&self, head: Descriptor, walk: &mut Walk<'_, '_>) -> Result<(), ChainFault> {
        let mut desc = head;
        loop {
            if desc.has(VRING_DESC_F_INDIRECT) {
                return walk.add_indirect_table(desc, TableOrder::Linked);
            }
            walk.add_descriptor(desc, usize::from(self.size))?;
            if !desc.has(VRING_DESC_F_NEXT) {
                return Ok(());
            }
            desc = self
                .desc
                .descriptor(desc.next())
                .ok_or(ChainFault::NextOutOfRange)?;
        }
    }

    /// Gives back the `slots` entries that were dequeued last.
    pub(crate) fn rewind(&mut self, slots: u16) {
        self.next_avail = self.next_avail.wrapping_sub(slots);
    }

    /// Completes chains, each given as head, slots and number of bytes written.
    #[inline(always)]
    pub(crate) fn complete_each(&mut self, completions: impl Iterator<Item = (u16, u16, u32)>) {
        // A local copy stays in a register; updating the field each time would cost more than the
        // rest.
        let mut at = self.next_used;
        let mut elements = completions.map(|(id, _, written)| UsedElement {
            id: u32::from(id).to_le(),
            len: written.to_le(),
        });
        // Up to the end of the ring, and then from its beginning.
        loop {
            let index = at & (self.size - 1);
            let written = self.used.set_from(index, &mut elements);
            at = at.wrapping_add(written);
            if index + written < self.size {
                break;
            }
        }
        self.next_used = at;
    }

    /// Makes all completed chains visible at once. Returns whether the driver wants an interrupt.
    #[inline(always)]
    pub(crate) fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.next_used);
        if old == new {
            return false;
        }
        self.used_header.release(IDX, new);
        self.published = new;
        full_fence();
        if let Some(log) = &self.log {
            log.log_published(old, new);
        }
        if self.event_idx {
            // `used_event` follows the entries of the available ring.
            let event = self.avail.acquire(RING_ENTRIES + self.size);
            needs_event(event, new, old)
        } else {
            self.avail.acquire(FLAGS) & VRING_AVAIL_F_NO_INTERRUPT == 0
        }
    }

    pub(crate) fn has_unpublished(&self) -> bool {
        self.published != self.next_used
    }

    /// Asks for kicks. Returns whether chains became available in the meantime.
    pub(crate) fn enable_kicks(&mut self) -> bool {
        if self.event_idx {
            self.avail_event.release(0, self.next_avail);
        } else {
            self.used_header.release(FLAGS, 0);
        }
        full_fence();
        self.log_suppression();
        self.has_more()
    }

    /// Asks for no kicks. With VIRTIO_F_EVENT_IDX there is nothing to do: the driver kicks only
    /// when its index passes `avail_event`, which is not moved any more.
    pub(crate) fn disable_kicks(&mut self) {
        if !self.event_idx {
            self.used_header.release(FLAGS, VRING_USED_F_NO_NOTIFY);
            self.log_suppression();
        }
    }

    fn log_suppression(&self) {
        if let Some(log) = &self.log {
            log.log_suppression();
        }
    }

    #[inline(always)]
    pub(crate) fn has_more(&self) -> bool {
        self.avail.acquire(IDX) != self.next_avail
    }
}

/// Converts a number of chains, at most [`MAX_CHAINS_PER_DEQUEUE`].
#[inline(always)]
fn to_u16(n: usize) -> u16 {
    u16::try_from(n).unwrap_or(u16::MAX)
}
