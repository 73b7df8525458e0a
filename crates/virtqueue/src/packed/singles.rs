//! The fast path of a packed virtqueue.

use super::position::RingPosition;
use super::publish::next_lap;
use super::{DESCRIPTORS_PER_LINE, PREFETCH_DISTANCE, PackedVirtqueue, available_flags};
use crate::config::Direction;
use crate::constants::{VIRTQ_DESC_F_AVAIL, VIRTQ_DESC_F_USED};
use crate::memory::Descriptor;
use crate::singles::{FoundSingles, SinglesRequest};

/// The flags that say who owns a descriptor.
const OWNER: u16 = VIRTQ_DESC_F_AVAIL | VIRTQ_DESC_F_USED;

impl PackedVirtqueue {
    /// See [`crate::Virtqueue::find_singles`]. Faults are left to `dequeue`.
    #[inline(always)]
    pub(crate) fn find_singles(
        &self,
        direction: Direction,
        request: SinglesRequest<'_, impl Iterator<Item = usize>>,
    ) -> FoundSingles {
        let SinglesRequest {
            ids,
            slices,
            mut translator,
            min_lens,
            max_len,
        } = request;
        let Some(rules) = self.rules.for_singles(direction, max_len) else {
            return FoundSingles::NONE;
        };
        let (descriptors, size) = (self.desc.table(), self.size);
        let limit = ids.len().min(self.max_available().into());
        let mut rules = rules.with_flags(OWNER, available_flags(self.avail.wrap));
        let mut index = self.avail.index;
        let mut count = 0;
        for ((id, slot), min_len) in ids[..limit].iter_mut().zip(slices).zip(min_lens) {
            let accepts = |raw: Descriptor| rules.accepts(raw.packed_flags(), raw.len(), min_len);
            let Some(raw) = descriptors.descriptor_if(index, accepts) else {
                break;
            };
            let Some(slice) = translator.translate(raw.addr(), raw.len()) else {
                break;
            };
            slice.prefetch(direction);
            *slot = slice;
            *id = raw.packed_id();
            count += 1;
            index += 1;
            if index.is_multiple_of(DESCRIPTORS_PER_LINE) {
                // The device will overwrite it. A prefetch past the end of the ring has no effect.
                descriptors.prefetch_to_write(index.wrapping_add(PREFETCH_DISTANCE));
            }
            if index == size {
                (index, rules.flags) = next_lap(0, rules.flags);
            }
        }
        let wrap = self.avail.wrap != (index < self.avail.index);
        let next = RingPosition { index, wrap };
        FoundSingles {
            count,
            has_other: count < limit && self.available(next).is_some(),
        }
    }

    /// Dequeues the next `count` chains of one descriptor each, which were found before.
    #[inline(always)]
    pub(crate) fn skip_available(&mut self, count: u16) {
        self.avail = self.avail.after(count, self.size);
    }
}
