//! How a packed virtqueue continues whose device was killed, and how it sees that it cannot.

use super::position::RingPosition;
use super::{EVENT_FLAGS, EVENT_OFF_WRAP, PackedVirtqueue};
use crate::config::VirtqueueLayout;
use crate::constants::{VIRTQ_DESC_F_USED, VRING_PACKED_EVENT_F_WRAP_CTR};
use crate::crash_record::{CompletedChain, CrashRecord, Progress, RecordOwner};
use crate::memory::{Descriptor, GuestMemory};

impl PackedVirtqueue {
    /// Continues at the position of `record`, if that is the record of this virtqueue, and records
    /// its progress there from now on.
    pub(crate) fn with_record(
        mut self,
        mut record: CrashRecord,
        layout: VirtqueueLayout,
        memory: &GuestMemory,
    ) -> Self {
        let Some(file) = memory.file_place(layout.desc) else {
            return self;
        };
        let owner = RecordOwner { layout, file };
        let is_same_ring =
            self.device_event.get(EVENT_FLAGS) != 0 || self.device_event.get(EVENT_OFF_WRAP) != 0;
        if is_same_ring
            && let Some(progress) = record.progress_of(&owner)
            && let Some(start) = RingPosition::from_word(progress.start, self.size)
            && let Some(chains) = self.checked_chains(&record, progress)
        {
            self.used = start;
            self.finish_publish(&chains);
            self.avail = self.used;
        }
        record.begin(&owner, self.avail.to_word());
        if !self.event_idx {
            // No driver reads this field without VIRTIO_F_EVENT_IDX. It must not be 0.
            self.device_event
                .release(EVENT_OFF_WRAP, VRING_PACKED_EVENT_F_WRAP_CTR);
        }
        self.record = Some(record);
        self
    }

    /// The chains of a recorded publish; `None` when the record is damaged.
    fn checked_chains(
        &self,
        record: &CrashRecord,
        progress: Progress,
    ) -> Option<Vec<CompletedChain>> {
        let chains = record.chains(progress)?;
        let slots = chains.iter().try_fold(0u16, |sum, chain| {
            let sum = sum.checked_add(chain.slots)?;
            (chain.slots > 0 && sum <= self.size).then_some(sum)
        });
        slots.map(|_| chains)
    }

    /// Finishes the publish of `chains` at the position `used`, if it was interrupted, and moves on.
    fn finish_publish(&mut self, chains: &[CompletedChain]) {
        let is_interrupted = self.available(self.used).is_some();
        let mut position = self.used;
        for (n, chain) in chains.iter().enumerate() {
            if is_interrupted && n > 0 {
                self.write_used(position, *chain);
            }
            position = position.after(chain.slots, self.size);
        }
        if let Some(first) = chains.first().filter(|_| is_interrupted) {
            self.write_used(self.used, *first);
            self.has_finished_a_publish = true;
        }
        self.used = position;
    }

    /// Whether the ring shows that the device cannot be at its position: the descriptor there is
    /// used already, or available in another lap.
    pub(crate) fn is_position_implausible(&self) -> bool {
        let flags = self
            .desc
            .descriptor(self.avail.index)
            .map_or(0, Descriptor::packed_flags);
        (flags & VIRTQ_DESC_F_USED != 0) == self.avail.wrap
    }
}
