//! How a packed virtqueue continues whose device was killed, and how it sees that it cannot.

use super::position::RingPosition;
use super::{EVENT_FLAGS, EVENT_OFF_WRAP, PackedVirtqueue, low_half};
use crate::config::VirtqueueLayout;
use crate::constants::{
    VIRTQ_DESC_F_AVAIL, VIRTQ_DESC_F_USED, VRING_DESC_F_NEXT, VRING_PACKED_EVENT_F_WRAP_CTR,
};
use crate::crash_record::{CompletedChain, CrashRecord, Progress, RecordOwner, Recorded};
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
            && let Some(Recorded {
                first_base,
                progress,
            }) = record.of(&owner)
            && let Some(start) = RingPosition::from_word(progress.start, self.size)
            && let Some(chains) = self.checked_chains(&record, progress)
        {
            let base = self.avail;
            self.used = start;
            self.finish_publish(&chains);
            if first_base != record.first_base()
                && let Some(first) = RingPosition::from_word(low_half(first_base), self.size)
            {
                self.continue_behind_the_frontend(first, base, &mut record, &owner);
            }
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

    /// Finishes the publish of `chains` at the position `used`, as far as it is not done, and moves on.
    /// A descriptor that is still available was not published, and no other part of the ring has
    /// one with these flags.
    fn finish_publish(&mut self, chains: &[CompletedChain]) {
        let mut position = self.used;
        for (n, chain) in chains.iter().enumerate() {
            if n > 0 {
                self.finish_chain(position, *chain);
            }
            position = position.after(chain.slots, self.size);
        }
        if let Some(first) = chains.first() {
            self.finish_chain(self.used, *first);
        }
        self.used = position;
    }

    fn finish_chain(&mut self, position: RingPosition, chain: CompletedChain) {
        if self.available(position).is_some() {
            self.write_used(position, chain);
            self.has_finished_a_publish = true;
        }
    }

    /// Lets the virtqueue continue at `base`, behind the chains that the front-end itself has used
    /// since the last device was killed: those from `first` on, where it believed the device to be.
    /// QEMU does so with what a driver transmits while the link is down.
    ///
    /// Chains between the device's position and `first` are still available, and the driver waits
    /// for them before it looks at those behind. They are given back unprocessed, so that the order
    /// stays.
    fn continue_behind_the_frontend(
        &mut self,
        first: RingPosition,
        base: RingPosition,
        record: &mut CrashRecord,
        owner: &RecordOwner,
    ) {
        if !self.is_used(first) {
            return;
        }
        if self.is_between(first, base) {
            self.used = base;
            return;
        }
        let Some(chains) = self.pending_chains_before(first) else {
            // What the front-end used is not what the driver waits for, or the device was further.
            return;
        };
        record.advance(owner, self.used.to_word());
        record.record(self.used.to_word(), &chains);
        self.finish_publish(&chains);
        self.used = base;
        self.given_back = u16::try_from(chains.len()).unwrap_or(u16::MAX);
    }

    /// Whether the position `used` is one of those from `first` to `last`.
    fn is_between(&self, first: RingPosition, last: RingPosition) -> bool {
        (0..=last.since(first, self.size)).any(|n| first.after(n, self.size) == self.used)
    }

    /// The available chains from the position `used` up to `end`; `None` when there are others than
    /// those that end there.
    fn pending_chains_before(&self, end: RingPosition) -> Option<Vec<CompletedChain>> {
        let mut chains = Vec::new();
        let mut remaining = self.size;
        let mut position = self.used;
        while position != end {
            let chain = self.pending_chain(position, remaining)?;
            remaining -= chain.slots;
            position = position.after(chain.slots, self.size);
            chains.push(chain);
        }
        Some(chains)
    }

    /// The available chain at `position`, if it has at most `remaining` descriptors.
    fn pending_chain(&self, position: RingPosition, remaining: u16) -> Option<CompletedChain> {
        let mut last = self.available(position)?;
        for slots in 1..=remaining {
            if last.packed_flags() & VRING_DESC_F_NEXT == 0 {
                return Some(CompletedChain {
                    id: last.packed_id(),
                    slots,
                    written: 0,
                });
            }
            last = self
                .desc
                .descriptor(position.after(slots, self.size).index)?;
        }
        None
    }

    /// Whether the descriptor at `position` is used.
    fn is_used(&self, position: RingPosition) -> bool {
        let both = VIRTQ_DESC_F_AVAIL | VIRTQ_DESC_F_USED;
        let flags = self.desc.descriptor(position.index);
        let flags = flags.map(|descriptor| descriptor.packed_flags() & both);
        flags == Some(if position.wrap { both } else { 0 })
    }

    /// The number of chains that were given back unprocessed when the virtqueue was started.
    pub(crate) fn given_back(&self) -> u16 {
        self.given_back
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
