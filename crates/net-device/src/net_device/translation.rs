//! The translations of addresses, for a guest whose device is behind an IOMMU.

use std::sync::Arc;

use virtionet_virtqueue::memory::{GuestMemory, IovaRange};

use super::NetDevice;

impl NetDevice {
    /// Makes every vring drop its copies of translations. One whose areas are in `range` continues
    /// in `memory` when their translations are known again. The lock of each slot is taken, so that
    /// no turn that used an old translation still runs when this returns.
    pub(super) fn forget_ring_translations(&self, range: IovaRange, memory: &Arc<GuestMemory>) {
        for served in self.pairs() {
            let pair = &served.pair;
            let waits = [
                pair.rx().forget_translations(range, memory),
                pair.tx().forget_translations(range, memory),
            ];
            // The worker asks for the translations that are needed next: those of the vrings
            // themselves, and of buffers to which frames are pushed.
            if waits.contains(&true) || pair.receives_pushed_frames() {
                pair.wake();
            }
        }
    }

    /// Wakes the workers, so that vrings that wait for a translation look again.
    pub(super) fn wake_for_translations(&self) {
        self.wake_all();
    }
}
