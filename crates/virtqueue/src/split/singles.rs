//! The fast path of a split virtqueue.

use super::{RING_ENTRIES, SplitVirtqueue};
use crate::config::Direction;
use crate::singles::{FoundSingles, SinglesRequest};

impl SplitVirtqueue {
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
        let Ok(pending) = self.pending() else {
            return FoundSingles::NONE;
        };
        let available = pending.min(ids.len());
        let heads = &mut ids[..available];
        self.read_heads(heads);
        let descriptors = self.desc.table();
        let mut count = 0;
        for ((head, slot), min_len) in heads.iter().zip(slices).zip(min_lens) {
            let Some(desc) = descriptors.descriptor(*head) else {
                break;
            };
            if !rules.accepts(desc.flags(), desc.len(), min_len) {
                break;
            }
            let Some(slice) = translator.translate(desc.addr(), desc.len()) else {
                break;
            };
            slice.prefetch(direction);
            *slot = slice;
            count += 1;
        }
        FoundSingles {
            count,
            has_other: count < available,
        }
    }

    /// Reads the next heads, and prefetches their descriptors and the used elements to come.
    #[inline(always)]
    fn read_heads(&self, heads: &mut [u16]) {
        let at = self.next_avail & (self.size - 1);
        let (first, rest) = heads.split_at_mut(heads.len().min(usize::from(self.size - at)));
        // Both parts lie in the ring, because `at` is below the size.
        self.avail.get_range(RING_ENTRIES + at, first);
        self.avail.get_range(RING_ENTRIES, rest);
        for head in &*heads {
            self.desc.prefetch(*head);
        }
        // A cache line holds eight used elements.
        let mut used = self.next_used;
        for _ in heads.chunks(8) {
            self.used.prefetch_to_write(used & (self.size - 1));
            used = used.wrapping_add(8);
        }
    }

    /// Dequeues the next `count` chains, which were found before.
    #[inline(always)]
    pub(crate) fn skip_available(&mut self, count: u16) {
        self.next_avail = self.next_avail.wrapping_add(count);
    }
}
