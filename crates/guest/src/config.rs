//! What a driver's virtqueue is made of.

use virtio_bindings::virtio_config::VIRTIO_F_RING_PACKED;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

/// How a virtqueue is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DriverVirtqueueConfig {
    /// The number of descriptors: a power of two from 2 to 32,768 for a split virtqueue, any number
    /// from 1 to 32,768 for a packed one.
    pub size: u16,
    /// Whether VIRTIO_F_EVENT_IDX is negotiated.
    pub event_idx: bool,
    /// Whether VIRTIO_F_RING_PACKED is negotiated.
    pub packed: bool,
    /// The position at which the virtqueue starts, so that a test can begin shortly before a wrap.
    /// Split: the first index. Packed: the number of descriptors after the beginning of the ring,
    /// counted through as many laps as needed.
    pub start: u16,
}

impl DriverVirtqueueConfig {
    /// A virtqueue of `size` descriptors with the given feature bits, starting at position 0.
    #[must_use]
    pub fn new(size: u16, features: u64) -> Self {
        Self {
            size,
            event_idx: features >> VIRTIO_RING_F_EVENT_IDX & 1 == 1,
            packed: features >> VIRTIO_F_RING_PACKED & 1 == 1,
            start: 0,
        }
    }
}

/// Guest physical addresses of the three parts of a virtqueue (virtio 1.3 §2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VirtqueueAddresses {
    /// The descriptor area: the descriptor table (split) or descriptor ring (packed).
    pub descriptors: u64,
    /// The driver area: the available ring (split) or the driver's event suppression area (packed).
    pub driver: u64,
    /// The device area: the used ring (split) or the device's event suppression area (packed).
    pub device: u64,
}
