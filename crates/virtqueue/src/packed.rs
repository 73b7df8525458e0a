//! The packed virtqueue (virtio 1.3 §2.8).
//!
//! ```text
//! descriptor ring, read by us and written back    driver's events      device's events (ours)
//! [addr len id flags]                             off_wrap flags       off_wrap flags
//! ```
//!
//! One ring for both directions: the driver makes descriptors available in order, the device
//! overwrites them with used ones in order. Two bits of `flags`, AVAIL and USED, say whose a
//! descriptor is; what they mean turns over each time the ring wraps, which each side follows with
//! a wrap counter.

use crate::burst::{Burst, Chain, Reservation};
use crate::fault::{ChainFault, VirtqueueFault};
use crate::memory::{Descriptor, GuestArray, GuestMemory, SegmentWriter, full_fence};
use crate::walk::{
    ChainRules, MAX_CHAINS_PER_DEQUEUE, MAX_DESCRIPTORS_PER_DEQUEUE, TableOrder,
    VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, Walk,
};
use crate::{VirtqueueConfig, VirtqueueError, needs_event, to_used_len};

const VIRTQ_DESC_F_AVAIL: u16 = 1 << 7;
const VIRTQ_DESC_F_USED: u16 = 1 << 15;
/// The wrap counter's bit beside an index.
const WRAP_COUNTER_BIT: u16 = 1 << 15;

/// Places in an event suppression area, in 16-bit words.
const EVENT_OFF_WRAP: u16 = 0;
const EVENT_FLAGS: u16 = 1;
/// What `flags` of such an area say: always, never, or at the descriptor of `off_wrap`.
const VRING_PACKED_EVENT_FLAG_ENABLE: u16 = 0;
const VRING_PACKED_EVENT_FLAG_DISABLE: u16 = 1;
const VRING_PACKED_EVENT_FLAG_DESC: u16 = 2;

/// Descriptors fetched ahead of the one looked at: two cache lines.
const PREFETCH_DISTANCE: u16 = 8;

/// A position in the ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct RingPosition {
    index: u16,
    wrap: bool,
}

impl RingPosition {
    /// From the form that SET_VRING_BASE and event areas have.
    fn from_word(word: u16, size: u16) -> Option<Self> {
        let index = word & !WRAP_COUNTER_BIT;
        (index < size).then_some(Self {
            index,
            wrap: word & WRAP_COUNTER_BIT != 0,
        })
    }

    fn to_word(self) -> u16 {
        self.index | if self.wrap { WRAP_COUNTER_BIT } else { 0 }
    }

    /// `n` descriptors further (`n` at most the ring's size, which is at most 32,768).
    #[inline(always)]
    fn after(self, n: u16, size: u16) -> Self {
        let index = self.index + n;
        if index < size {
            Self { index, ..self }
        } else {
            Self {
                index: index - size,
                wrap: !self.wrap,
            }
        }
    }

    /// Descriptors from `earlier` to here, a lap at most.
    #[inline(always)]
    fn since(self, earlier: Self, size: u16) -> u16 {
        if self.wrap == earlier.wrap {
            self.index.saturating_sub(earlier.index)
        } else {
            size - earlier.index.saturating_sub(self.index)
        }
    }

    /// `n` descriptors back.
    fn before(self, n: u16, size: u16) -> Self {
        if n <= self.index {
            Self {
                index: self.index - n,
                ..self
            }
        } else {
            Self {
                index: self.index + (size - n),
                wrap: !self.wrap,
            }
        }
    }
}

/// A chain that is done with and not yet shown to the driver.
#[derive(Debug, Clone, Copy)]
struct CompletedChain {
    id: u16,
    slots: u16,
    written: u32,
}

/// The device's half of a packed ring.
#[derive(Debug)]
pub(crate) struct PackedVirtqueue {
    size: u16,
    event_idx: bool,
    rules: ChainRules,
    /// Next descriptor to take.
    avail: RingPosition,
    /// Next descriptor to overwrite.
    used: RingPosition,
    desc: GuestArray<Descriptor>,
    driver_event: GuestArray<u16>,
    device_event: GuestArray<u16>,
    completed: Vec<CompletedChain>,
}

impl PackedVirtqueue {
    pub(crate) fn new(
        config: &VirtqueueConfig,
        memory: &GuestMemory,
    ) -> Result<Self, VirtqueueError> {
        let layout = config.layout;
        let size = layout.size;
        if size == 0 || size > crate::MAX_QUEUE_SIZE {
            return Err(VirtqueueError::Size(size));
        }
        // The used half of the base is not filled by every front-end; since chains are completed
        // in order and none is taken when a ring stops, it equals the available half.
        let low = u16::try_from(config.base & 0xffff).unwrap_or(0);
        let position =
            RingPosition::from_word(low, size).ok_or(VirtqueueError::Base(config.base))?;
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
        })
    }

    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    pub(crate) fn base(&self) -> u32 {
        u32::from(self.avail.to_word()) | u32::from(self.used.to_word()) << 16
    }

    /// Descriptors that the driver may have made available: those that we did not take, or gave
    /// back. The flags of the others are not to be believed, or a driver that rewrites them makes us
    /// take more than the ring has.
    #[inline(always)]
    fn max_available(&self) -> u16 {
        self.size - self.avail.since(self.used, self.size)
    }

    /// Takes chain after chain for as long as the next descriptor is the device's.
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
        // Work of chains that are not single ones; those are bounded by their number.
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
            let Some(raw) = self.available(position) else {
                break;
            };
            let desc = raw.to_split_layout(raw.packed_flags());
            let walk_result = match self.walk_fast(position, desc, remaining, &mut segments) {
                Some(walked) => Ok(walked),
                None => self.walk_slow(position, desc, remaining, &mut segments),
            };
            match walk_result {
                Ok((any, read)) => {
                    remaining -= any.slots;
                    position = position.after(any.slots, self.size);
                    descriptors_read += read;
                    *chain = any;
                    taken += 1;
                }
                Err(found) => {
                    fault = Err(found);
                    break;
                }
            }
        }
        drop(segments);
        burst.commit(taken, taken + descriptors_read);
        self.avail = position;
        match taken {
            0 => fault.map(|()| 0),
            // Chains before the fault are whole: they go on, and the next call meets it again.
            _ => Ok(taken),
        }
    }

    /// Takes chains of one buffer each from `position` on, until there is another or the ring's end;
    /// says how many.
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
            // It will be written back. Past the end there is nothing, and no harm in asking.
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

    /// Follows the chain at `position` if nothing in it is out of the ordinary.
    #[inline(always)]
    fn walk_fast(
        &self,
        mut position: RingPosition,
        desc: Descriptor,
        remaining: u16,
        segments: &mut SegmentWriter<'_>,
    ) -> Option<(Chain, usize)> {
        let mut slots = 1;
        // The chain's id stands in its last descriptor.
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

    /// Follows the chain at `position`, whose first descriptor has been read, for `remaining` descriptors at
    /// most; the chain and the descriptors read for it.
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
            // Past a fault only the chain's end is looked for: where the next one begins.
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
                // No position is outside the ring.
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

    /// Gives the most recently taken `slots` descriptors back untouched.
    pub(crate) fn rewind(&mut self, slots: u16) {
        self.avail = self.avail.before(slots, self.size);
    }

    /// Notes chains to be shown with the others, each with the number of bytes written to it.
    #[inline(always)]
    pub(crate) fn complete_each(&mut self, completions: impl Iterator<Item = (u16, u16, u32)>) {
        self.completed
            .extend(completions.map(|(id, slots, written)| CompletedChain { id, slots, written }));
    }

    /// Notes the chains that `len` bytes fill, one after the other; says how many those are.
    #[inline(always)]
    pub(crate) fn complete_filled(&mut self, chains: &[Chain], len: usize) -> usize {
        let mut rest = len;
        let mut used = 0;
        for chain in chains {
            if rest == 0 {
                break;
            }
            let here = rest.min(chain.len());
            rest -= here;
            self.complete_each(std::iter::once((chain.id, chain.slots, to_used_len(here))));
            used += 1;
        }
        used
    }

    /// Overwrites descriptors with used ones, the first of them last: the driver reads them in
    /// order, so it sees all or none. True when it wants an interrupt.
    #[inline(always)]
    pub(crate) fn publish(&mut self) -> bool {
        let Some(first) = self.completed.first().copied() else {
            return false;
        };
        let start = self.used;
        let mut moved = first.slots;
        let mut position = start.after(first.slots, self.size);
        for completed in &self.completed[1..] {
            self.write_used(position, *completed);
            position = position.after(completed.slots, self.size);
            moved = moved.wrapping_add(completed.slots);
        }
        self.write_used(start, first);
        self.used = position;
        self.completed.clear();
        full_fence();
        self.should_call(moved)
    }

    #[inline(always)]
    fn write_used(&self, position: RingPosition, completed: CompletedChain) {
        let mut flags = if position.wrap {
            VIRTQ_DESC_F_AVAIL | VIRTQ_DESC_F_USED
        } else {
            0
        };
        if completed.written != 0 {
            flags |= VRING_DESC_F_WRITE;
        }
        self.desc
            .release_used(position.index, completed.id, completed.written, flags);
    }

    /// Whether the driver wants an interrupt for the last `moved` descriptors.
    #[inline(always)]
    fn should_call(&self, moved: u16) -> bool {
        match self.driver_event.acquire(EVENT_FLAGS) & 3 {
            VRING_PACKED_EVENT_FLAG_DISABLE => false,
            VRING_PACKED_EVENT_FLAG_DESC if self.event_idx => {
                let word = self.driver_event.acquire(EVENT_OFF_WRAP);
                let mut event = word & !WRAP_COUNTER_BIT;
                if (word & WRAP_COUNTER_BIT != 0) != self.used.wrap {
                    event = event.wrapping_sub(self.size);
                }
                let new = self.used.index;
                needs_event(event, new, new.wrapping_sub(moved))
            }
            _ => true,
        }
    }

    pub(crate) fn has_unpublished(&self) -> bool {
        !self.completed.is_empty()
    }

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
        self.has_more()
    }

    pub(crate) fn disable_kicks(&mut self) {
        self.device_event
            .release(EVENT_FLAGS, VRING_PACKED_EVENT_FLAG_DISABLE);
    }

    #[inline(always)]
    pub(crate) fn has_more(&self) -> bool {
        self.available(self.avail).is_some() && self.max_available() > 0
    }
}

/// Whether a descriptor with these flags is the device's (virtio 1.3 §2.8.1).
#[inline(always)]
fn is_available(flags: u16, wrap: bool) -> bool {
    flags & (VIRTQ_DESC_F_AVAIL | VIRTQ_DESC_F_USED)
        == if wrap {
            VIRTQ_DESC_F_AVAIL
        } else {
            VIRTQ_DESC_F_USED
        }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_go_round_both_ways() {
        for size in [1, 3, 256, 32_768] {
            let mut position = RingPosition {
                index: 0,
                wrap: true,
            };
            for n in [1, size, size / 2 + 1] {
                let there = position.after(n, size);
                assert_eq!(there.before(n, size), position, "{n} of {size}");
                assert_eq!(there.since(position, size), n, "{n} of {size}");
                assert_eq!(there.since(there, size), 0);
                position = there;
            }
        }
        assert_eq!(
            RingPosition::from_word(0x8003, 4),
            Some(RingPosition {
                index: 3,
                wrap: true
            })
        );
        assert_eq!(RingPosition::from_word(4, 4), None);
    }
}
