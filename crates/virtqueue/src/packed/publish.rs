//! Completed chains become used descriptors.

use super::position::RingPosition;
use super::{DESCRIPTORS_PER_LINE, EVENT_FLAGS, EVENT_OFF_WRAP, PackedVirtqueue};
use crate::constants::{
    VIRTQ_DESC_F_AVAIL, VIRTQ_DESC_F_USED, VRING_DESC_F_WRITE, VRING_PACKED_EVENT_F_WRAP_CTR,
    VRING_PACKED_EVENT_FLAG_DESC, VRING_PACKED_EVENT_FLAG_DISABLE,
};
use crate::crash_record::CompletedChain;
use crate::event::needs_event;
use crate::memory::full_fence;

impl PackedVirtqueue {
    /// Writes the used descriptors of all completed chains, the first one last: the driver reads
    /// them in order, so it sees either all or none. Those in the cache line of the first one are
    /// written shortly before it, because a driver that polls takes that line away again and again.
    /// Returns whether the driver wants an interrupt.
    #[inline(always)]
    pub(crate) fn publish(&mut self) -> bool {
        let Some((first, others)) = self.completed.split_first() else {
            return false;
        };
        let start = self.used;
        if let Some(record) = &mut self.record {
            record.record(start.to_word(), &self.completed);
        }
        let second = start.after(first.slots, self.size);
        let (mut position, mut beside) = (second, 0);
        for chain in others.iter().take(DESCRIPTORS_PER_LINE.into()) {
            if position.index / DESCRIPTORS_PER_LINE != start.index / DESCRIPTORS_PER_LINE {
                break;
            }
            position = position.after(chain.slots, self.size);
            beside += 1;
        }
        let (beside, others) = others.split_at(beside);
        let end = self.write_all_used(position, others);
        self.write_all_used(second, beside);
        self.write_used(start, *first);
        self.used = end;
        self.completed.clear();
        full_fence();
        let moved = end.since(start, self.size);
        if let Some(log) = &self.log {
            log.log_published(start.index, moved);
        }
        self.should_call(moved)
    }

    /// Writes the used descriptors of `chains`, which follow each other in the ring. Returns the
    /// position behind them.
    #[inline(always)]
    fn write_all_used(&self, from: RingPosition, chains: &[CompletedChain]) -> RingPosition {
        let (descriptors, size) = (self.desc.table(), self.size);
        let RingPosition { mut index, wrap } = from;
        let mut owner = used_flags(wrap);
        for chain in chains {
            let written = u16::from(chain.written != 0) * VRING_DESC_F_WRITE;
            descriptors.release_used(index, chain.id, chain.written, owner | written);
            index += chain.slots;
            if index >= size {
                (index, owner) = next_lap(index - size, owner);
            }
        }
        let wrap = owner == used_flags(true);
        RingPosition { index, wrap }
    }

    #[inline(always)]
    pub(super) fn write_used(&self, position: RingPosition, completed: CompletedChain) {
        self.write_all_used(position, &[completed]);
    }

    /// Whether the driver wants an interrupt for the last `moved` descriptors (virtio 1.3 §2.8.10).
    #[inline(always)]
    fn should_call(&self, moved: u16) -> bool {
        match self.driver_event.acquire(EVENT_FLAGS) & 3 {
            VRING_PACKED_EVENT_FLAG_DISABLE => false,
            VRING_PACKED_EVENT_FLAG_DESC if self.event_idx => {
                let word = self.driver_event.acquire(EVENT_OFF_WRAP);
                let mut event = word & !VRING_PACKED_EVENT_F_WRAP_CTR;
                if (word & VRING_PACKED_EVENT_F_WRAP_CTR != 0) != self.used.wrap {
                    event = event.wrapping_sub(self.size);
                }
                let new = self.used.index;
                needs_event(event, new, new.wrapping_sub(moved))
            }
            _ => true,
        }
    }
}

/// Inverts the flags that say who owns a descriptor, because the ring wraps. It is a function of its own
/// so that the compiler makes a branch of it, which costs nothing for the other descriptors.
#[cold]
#[inline(never)]
pub(super) fn next_lap(index: u16, flags: u16) -> (u16, u16) {
    (index, flags ^ (VIRTQ_DESC_F_AVAIL | VIRTQ_DESC_F_USED))
}

/// The flags of a used descriptor that say so (virtio 1.3 §2.8.1).
#[inline(always)]
fn used_flags(wrap: bool) -> u16 {
    match wrap {
        true => VIRTQ_DESC_F_AVAIL | VIRTQ_DESC_F_USED,
        false => 0,
    }
}
