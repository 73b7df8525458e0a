//! What the device writes to a virtqueue itself, in the dirty log: used elements or descriptors, and
//! the fields that ask the driver for kicks. The buffers of chains are logged by those who write
//! them.

use crate::memory::{AreaLog, full_fence};

// Sizes of the parts of a split virtqueue's used ring, in bytes (virtio 1.3 §2.7.8).
const USED_HEADER_LEN: u64 = 4;
const USED_ELEMENT_LEN: u64 = 8;
const AVAIL_EVENT_LEN: u64 = 2;

// Sizes of a packed virtqueue's descriptors and device event area, in bytes (virtio 1.3 §2.8.13,
// §2.8.14).
const DESCRIPTOR_LEN: u64 = 16;
const EVENT_AREA_LEN: u64 = 4;

/// Logs writes to the used ring of a split virtqueue.
#[derive(Debug)]
pub(crate) struct UsedRingLog {
    size: u16,
    ring: AreaLog,
}

impl UsedRingLog {
    pub(crate) fn new(size: u16, ring: AreaLog) -> Self {
        Self { size, ring }
    }

    /// Logs the elements from index `from` up to `to`, and the header. The caller has published
    /// them with a full fence.
    #[cold]
    pub(crate) fn log_published(&self, from: u16, to: u16) {
        for (start, count) in parts(from & (self.size - 1), to.wrapping_sub(from), self.size) {
            let at = USED_HEADER_LEN + USED_ELEMENT_LEN * u64::from(start);
            self.ring.mark(at, USED_ELEMENT_LEN * u64::from(count));
        }
        self.ring.mark(0, USED_HEADER_LEN);
    }

    /// Logs `flags` and `avail_event`, one of which was just written.
    #[cold]
    pub(crate) fn log_suppression(&self) {
        full_fence();
        let avail_event = USED_HEADER_LEN + USED_ELEMENT_LEN * u64::from(self.size);
        self.ring.mark(avail_event, AVAIL_EVENT_LEN);
        self.ring.mark(0, USED_HEADER_LEN);
    }
}

/// Logs writes to a packed virtqueue.
#[derive(Debug)]
pub(crate) struct PackedRingLog {
    size: u16,
    descriptors: AreaLog,
    device_event: AreaLog,
}

impl PackedRingLog {
    pub(crate) fn new(size: u16, descriptors: AreaLog, device_event: AreaLog) -> Self {
        Self {
            size,
            descriptors,
            device_event,
        }
    }

    /// Logs the `count` descriptors at index `start`, of which used chains took all and some were
    /// overwritten. The caller has written them with a full fence behind.
    #[cold]
    pub(crate) fn log_published(&self, start: u16, count: u16) {
        for (start, count) in parts(start, count, self.size) {
            let at = DESCRIPTOR_LEN * u64::from(start);
            self.descriptors.mark(at, DESCRIPTOR_LEN * u64::from(count));
        }
    }

    /// Logs the device event area, which was just written.
    #[cold]
    pub(crate) fn log_suppression(&self) {
        full_fence();
        self.device_event.mark(0, EVENT_AREA_LEN);
    }
}

/// The parts (start, count) of `count` entries from `start` on in a ring of `size` entries, which
/// may wrap.
fn parts(start: u16, count: u16, size: u16) -> [(u16, u16); 2] {
    let first = count.min(size - start);
    [(start, first), (0, (count - first).min(start))]
}
