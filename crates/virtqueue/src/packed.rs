//! The device side of a packed virtqueue (virtio 1.3 §2.8).
//!
//! ```text
//! descriptor ring                      driver event area   device event area
//! (driver writes, device overwrites)   (driver writes)     (device writes)
//! [addr len id flags]                  off_wrap flags      off_wrap flags
//! ```
//!
//! One ring serves both directions: the driver makes descriptors available in order, and the device
//! overwrites them with used ones in order. Two bits of `flags`, AVAIL and USED, say who owns a
//! descriptor. Their meaning is inverted each time the ring wraps, so each side keeps a wrap
//! counter for each of its positions:
//!
//! | wrap counter | available | used |
//! |---|---|---|
//! | 1 | AVAIL, not USED | AVAIL and USED |
//! | 0 | USED, not AVAIL | neither |
//!
//! ```text
//!                      used           avail
//!                        v              v
//! ring  ... used         | dequeued     | available, or unused ...
//! ```
//!
//! Completed chains are recorded in private memory. `publish` writes them to the ring, beginning
//! with the second one, and makes all of them visible by writing the first one last. Before that it
//! writes them to the [`CrashRecord`], if there is one, from which a virtqueue continues whose
//! device was killed.
//!
//! The device event area is never zero in both words while a virtqueue has a crash record. A driver
//! that sets up its ring again clears it, which tells its ring from that of before.

mod position;
mod publish;
mod recovery;
mod singles;

use std::mem;

use crate::burst::{Burst, Reservation};
use crate::chain::Chain;
use crate::config::{MAX_QUEUE_SIZE, VirtqueueConfig, VirtqueueError};
use crate::constants::{
    VIRTQ_DESC_F_AVAIL, VIRTQ_DESC_F_USED, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT,
    VRING_PACKED_EVENT_FLAG_DESC, VRING_PACKED_EVENT_FLAG_DISABLE, VRING_PACKED_EVENT_FLAG_ENABLE,
};
use crate::crash_record::{CompletedChain, CrashRecord};
use crate::fault::{ChainFault, VirtqueueFault};
use crate::memory::{Descriptor, GuestArray, GuestMemory, SegmentWriter, full_fence};
use crate::ring_log::PackedRingLog;
use crate::walk::{
    ChainRules, MAX_CHAINS_PER_DEQUEUE, MAX_DESCRIPTORS_PER_DEQUEUE, TableOrder, Walk,
    count_translated,
};
use position::RingPosition;

// Positions of the fields of an event suppression area (virtio 1.3 §2.8.14), in 16-bit words.
const EVENT_OFF_WRAP: u16 = 0;
const EVENT_FLAGS: u16 = 1;

/// The number of descriptors in a cache line, in which the ring begins.
const DESCRIPTORS_PER_LINE: u16 = 4;
/// Number of descriptors between the one that is read and the one that is prefetched: two cache
/// lines.
const PREFETCH_DISTANCE: u16 = 8;

/// The device side of a packed virtqueue.
#[derive(Debug)]
pub(crate) struct PackedVirtqueue {
    size: u16,
    event_idx: bool,
    rules: ChainRules,
    /// Next descriptor to dequeue.
    avail: RingPosition,
    /// Next descriptor to overwrite with a used one.
    used: RingPosition,
    desc: GuestArray<Descriptor>,
    driver_event: GuestArray<u16>,
    device_event: GuestArray<u16>,
    /// Completed chains that the driver cannot see yet.
    completed: Vec<CompletedChain>,
    record: Option<CrashRecord>,
    /// The virtqueue was written to before it could have a log.
    has_finished_a_publish: bool,
    /// See [`PackedVirtqueue::given_back`].
    given_back: u16,
    /// Where writes to the virtqueue are logged, if they are.
    log: Option<PackedRingLog>,
}

impl PackedVirtqueue {
    pub(crate) fn new(
        config: &VirtqueueConfig,
        memory: &GuestMemory,
    ) -> Result<Self, VirtqueueError> {
        let layout = config.layout;
        let size = layout.size;
        if size == 0 || size > MAX_QUEUE_SIZE {
            return Err(VirtqueueError::Size(size));
        }
        // Not every front-end fills the upper (used) half of the base. It equals the lower half,
        // because chains are completed in order and none is in use when a virtqueue stops.
        let position = RingPosition::from_word(low_half(config.base), size)
            .ok_or(VirtqueueError::Base(config.base))?;
        Ok(Self {
            size,
            event_idx: config.event_idx,
            rules: ChainRules::new(config),
            avail: position,
            used: position,
            desc: memory
                .user_array(layout.desc, size)
                .ok_or(VirtqueueError::unmapped("descriptor ring", layout.desc))?,
            driver_event: memory
                .user_array(layout.avail, 2)
                .ok_or(VirtqueueError::unmapped("driver event area", layout.avail))?,
            device_event: memory
                .user_array(layout.used, 2)
                .ok_or(VirtqueueError::unmapped("device event area", layout.used))?,
            completed: Vec::new(),
            record: None,
            has_finished_a_publish: false,
            given_back: 0,
            log: None,
        })
    }

    /// The record of this virtqueue, for one that continues it.
    pub(crate) fn record(&self) -> Option<&CrashRecord> {
        self.record.as_ref()
    }

    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    /// The device event area.
    pub(crate) fn used_area(&self) -> &GuestArray<u16> {
        &self.device_event
    }

    /// The descriptor ring.
    pub(crate) fn descriptors(&self) -> &GuestArray<Descriptor> {
        &self.desc
    }

    /// Logs writes to the virtqueue from now on, or with `None` no longer.
    pub(crate) fn set_log(&mut self, log: Option<PackedRingLog>) {
        if let Some(log) = &log
            && mem::take(&mut self.has_finished_a_publish)
        {
            log.log_published(0, self.size);
        }
        self.log = log;
    }

    pub(crate) fn base(&self) -> u32 {
        u32::from(self.avail.to_word()) | u32::from(self.used.to_word()) << 16
    }

    /// Number of descriptors that the driver can have made available: those that are not dequeued.
    /// The flags of dequeued ones must not be trusted; a driver that rewrites them could make the
    /// device dequeue more descriptors than the ring has.
    #[inline(always)]
    fn max_available(&self) -> u16 {
        self.size - self.avail.since(self.used, self.size)
    }

    /// Dequeues chains for as long as the next descriptor is available.
    #[inline]
    pub(crate) fn dequeue(
        &mut self,
        burst: &mut Burst,
        max: usize,
    ) -> Result<usize, VirtqueueFault> {
        let Reservation {
            chains,
            mut segments,
        } = burst.reserve(max.min(MAX_CHAINS_PER_DEQUEUE));
        let mut remaining = self.max_available();
        let mut position = self.avail;
        // Work of the chains with several descriptors. The others are bounded by their number.
        let mut descriptors_read = 0;
        let mut taken = 0;
        let mut fault = Ok(());
        while taken < chains.len()
            && remaining > 0
            && descriptors_read < MAX_DESCRIPTORS_PER_DEQUEUE
        {
            let singles =
                self.dequeue_singles(position, remaining, &mut chains[taken..], &mut segments);
            taken += usize::from(singles);
            remaining -= singles;
            position = position.after(singles, self.size);
            let Some(chain) = chains.get_mut(taken).filter(|_| remaining > 0) else {
                break;
            };
            let Some(walked) = self.walk_at(position, remaining, &mut segments) else {
                break;
            };
            match walked {
                Ok((walked, read)) => {
                    remaining -= walked.slots;
                    position = position.after(walked.slots, self.size);
                    descriptors_read += read;
                    *chain = walked;
                    taken += 1;
                }
                Err(error) => {
                    fault = Err(error);
                    break;
                }
            }
        }
        if let Some(missing) = segments.end_dequeue() {
            taken = count_translated(&chains[..taken], missing);
            let slots = chains[..taken].iter().map(|chain| chain.slots).sum();
            position = self.avail.after(slots, self.size);
            // It is found again behind the missing translation.
            fault = Ok(());
        }
        drop(segments);
        burst.commit(taken, taken + descriptors_read);
        self.avail = position;
        match taken {
            0 => fault.map(|()| 0),
            // The valid chains in front of a fault are returned; the next call reports the fault.
            _ => Ok(taken),
        }
    }

    /// Walks the chain at `position`, if one is available there.
    #[inline(always)]
    fn walk_at(
        &self,
        position: RingPosition,
        remaining: u16,
        segments: &mut SegmentWriter<'_>,
    ) -> Option<Result<(Chain, usize), VirtqueueFault>> {
        let raw = self.available(position)?;
        let desc = raw.to_split_layout(raw.packed_flags());
        Some(match self.walk_fast(position, desc, remaining, segments) {
            Some(walked) => Ok(walked),
            None => self.walk_slow(position, desc, remaining, segments),
        })
    }

    /// Dequeues chains of one buffer each from `position` on, up to the first other chain or the
    /// end of the ring. Returns how many.
    #[inline(always)]
    fn dequeue_singles(
        &self,
        position: RingPosition,
        remaining: u16,
        chains: &mut [Chain],
        segments: &mut SegmentWriter<'_>,
    ) -> u16 {
        let end = self.size.min(position.index + remaining);
        let mut at = position.index;
        for (chain, index) in chains.iter_mut().zip(position.index..end) {
            let Some(raw) = self.available(RingPosition { index, ..position }) else {
                break;
            };
            // The device will overwrite it. A prefetch past the end of the ring has no effect.
            self.desc
                .prefetch_to_write(index.wrapping_add(PREFETCH_DISTANCE));
            let buffer = (raw.addr(), raw.len());
            let flags = raw.packed_flags();
            let Some(single) = self
                .rules
                .walk_single(raw.packed_id(), buffer, flags, segments)
            else {
                break;
            };
            *chain = single;
            at = index + 1;
        }
        at - position.index
    }

    /// The descriptor at `position`, if it is available.
    #[inline(always)]
    fn available(&self, position: RingPosition) -> Option<Descriptor> {
        self.desc
            .descriptor_if(position.index, |flags| is_available(flags, position.wrap))
    }

    /// Follows the chain at `position` if it is direct and in the memory region translated last.
    #[inline(always)]
    fn walk_fast(
        &self,
        mut position: RingPosition,
        desc: Descriptor,
        remaining: u16,
        segments: &mut SegmentWriter<'_>,
    ) -> Option<(Chain, usize)> {
        let mut slots = 1;
        // The id of a chain is that of its last descriptor (virtio 1.3 §2.8.6).
        let mut last = desc;
        let walked = self.rules.walk_fast(desc, segments, |_| {
            slots += 1;
            position = position.after(1, self.size);
            let raw = self
                .desc
                .descriptor(position.index)
                .filter(|_| slots <= remaining)?;
            last = raw.to_split_layout(raw.packed_flags());
            Some(last)
        })?;
        let read = walked.descriptors_read;
        Some((Chain::new(last.next(), slots, walked), read))
    }

    /// Follows any chain at `position`, whose first descriptor is `desc`, for at most `remaining`
    /// descriptors. Returns the chain and the number of descriptors read.
    #[inline(never)]
    fn walk_slow(
        &self,
        mut position: RingPosition,
        mut desc: Descriptor,
        remaining: u16,
        segments: &mut SegmentWriter<'_>,
    ) -> Result<(Chain, usize), VirtqueueFault> {
        let mut walk = Walk::new(self.rules, segments);
        let mut slots = 0;
        let mut skipped = 0;
        let mut walk_result = Ok(());
        loop {
            slots += 1;
            // Behind a fault only the end of the chain matters: the next chain begins there.
            if walk_result.is_ok() {
                walk_result = self.add_to_walk(desc, &mut walk);
            } else {
                skipped += 1;
            }
            if !desc.has(VRING_DESC_F_NEXT) {
                let walked = walk.finish(walk_result);
                let read = walked.descriptors_read + skipped;
                return Ok((Chain::new(desc.next(), slots, walked), read));
            }
            if slots == remaining {
                walk.abandon();
                return Err(VirtqueueFault::ChainWithoutEnd { size: self.size });
            }
            position = position.after(1, self.size);
            let Some(raw) = self.desc.descriptor(position.index) else {
                // This cannot happen: no position is outside the ring.
                walk.abandon();
                return Err(VirtqueueFault::ChainWithoutEnd { size: self.size });
            };
            desc = raw.to_split_layout(raw.packed_flags());
        }
    }

    #[inline(always)]
    fn add_to_walk(&self, desc: Descriptor, walk: &mut Walk<'_, '_>) -> Result<(), ChainFault> {
        if desc.has(VRING_DESC_F_INDIRECT) {
            walk.add_indirect_table(desc, TableOrder::Sequential)
        } else {
            walk.add_descriptor(desc, usize::from(self.size))
        }
    }

    /// Gives back the `slots` descriptors that were dequeued last.
    pub(crate) fn rewind(&mut self, slots: u16) {
        self.avail = self.avail.before(slots, self.size);
    }

    /// Records chains for the next `publish`, each given as id, slots and number of bytes written.
    #[inline(always)]
    pub(crate) fn complete_each(&mut self, completions: impl Iterator<Item = (u16, u16, u32)>) {
        self.completed
            .extend(completions.map(|(id, slots, written)| CompletedChain { id, slots, written }));
    }

    pub(crate) fn has_unpublished(&self) -> bool {
        !self.completed.is_empty()
    }

    /// Asks for kicks. Returns whether chains became available in the meantime.
    pub(crate) fn enable_kicks(&mut self) -> bool {
        if self.event_idx {
            self.device_event
                .release(EVENT_OFF_WRAP, self.avail.to_word());
            self.device_event
                .release(EVENT_FLAGS, VRING_PACKED_EVENT_FLAG_DESC);
        } else {
            self.device_event
                .release(EVENT_FLAGS, VRING_PACKED_EVENT_FLAG_ENABLE);
        }
        full_fence();
        self.log_suppression();
        self.has_more()
    }

    /// Asks for no kicks.
    pub(crate) fn disable_kicks(&mut self) {
        self.device_event
            .release(EVENT_FLAGS, VRING_PACKED_EVENT_FLAG_DISABLE);
        self.log_suppression();
    }

    fn log_suppression(&self) {
        if let Some(log) = &self.log {
            log.log_suppression();
        }
    }

    #[inline(always)]
    pub(crate) fn has_more(&self) -> bool {
        self.available(self.avail).is_some() && self.max_available() > 0
    }
}

/// The lower half of a base: the next available descriptor and its wrap counter.
fn low_half(base: u32) -> u16 {
    u16::try_from(base & 0xffff).unwrap_or(0)
}

/// Whether a descriptor with these flags is available to the device (virtio 1.3 §2.8.1).
#[inline(always)]
fn is_available(flags: u16, wrap: bool) -> bool {
    flags & (VIRTQ_DESC_F_AVAIL | VIRTQ_DESC_F_USED) == available_flags(wrap)
}

/// The flags of an available descriptor that say so.
#[inline(always)]
fn available_flags(wrap: bool) -> u16 {
    match wrap {
        true => VIRTQ_DESC_F_AVAIL,
        false => VIRTQ_DESC_F_USED,
    }
}
