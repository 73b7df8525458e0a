//! What a virtqueue is made of: its place in memory, its format and its limits.

use crate::memory::IovaRange;

/// The largest number of descriptors, and of memory segments, in one chain.
pub const MAX_CHAIN_SEGMENTS: usize = 1024;
/// The largest size of a virtqueue in descriptors (virtio 1.3 §2.7 and §2.8.10.1).
pub const MAX_QUEUE_SIZE: u16 = 32_768;

/// The direction in which the buffers of a virtqueue are used. A chain with a buffer of the other
/// direction is a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// The device reads the buffers (TX).
    Readable,
    /// The device writes the buffers (RX).
    Writable,
}

/// Where a virtqueue lies: its size in descriptors and the addresses of its three areas in the
/// front-end's address space, as SET_VRING_NUM and SET_VRING_ADDR carry them. Behind an IOMMU they
/// are I/O virtual addresses. The second and third area of a packed virtqueue are the event
/// suppression areas of the driver and of the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VirtqueueLayout {
    /// The number of descriptors.
    pub size: u16,
    /// The front-end address of the descriptor table (split) or descriptor ring (packed).
    pub desc: u64,
    /// The front-end address of the available ring (split) or of the driver's event suppression
    /// area (packed).
    pub avail: u64,
    /// The front-end address of the used ring (split) or of the device's event suppression area
    /// (packed).
    pub used: u64,
}

impl VirtqueueLayout {
    /// The ranges of the three areas of a virtqueue, packed or split, without those that wrap.
    #[must_use]
    pub fn areas(&self, packed: bool) -> Vec<IovaRange> {
        let size = u64::from(self.size);
        // virtio 1.3 §2.7 (with the event fields) and §2.8.
        let [avail_len, used_len] = match packed {
            false => [6 + 2 * size, 6 + 8 * size],
            true => [4, 4],
        };
        let ranges = [
            (self.desc, 16 * size),
            (self.avail, avail_len),
            (self.used, used_len),
        ];
        let ranges = ranges.into_iter();
        ranges
            .filter_map(|(addr, len)| IovaRange::new(addr, len))
            .collect()
    }
}

/// Everything that a virtqueue needs to start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VirtqueueConfig {
    /// Where the virtqueue lies.
    pub layout: VirtqueueLayout,
    /// Where the device continues, in the form of SET_VRING_BASE. Split: the next index of the
    /// available ring. Packed: the next available descriptor and its wrap counter (bit 15) in the
    /// lower half, and the next used descriptor and its wrap counter in the upper half.
    pub base: u32,
    /// The direction in which the buffers are used.
    pub direction: Direction,
    /// Whether VIRTIO_F_RING_PACKED is negotiated.
    pub packed: bool,
    /// Whether VIRTIO_F_EVENT_IDX is negotiated.
    pub event_idx: bool,
    /// Whether VIRTIO_F_INDIRECT_DESC is negotiated.
    pub indirect: bool,
    /// The smallest useful chain in bytes. A shorter one is a fault.
    pub min_len: u32,
}

/// Why a virtqueue cannot start. The front-end's request is at fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum VirtqueueError {
    /// The size is 0, too large, or (split) not a power of two.
    #[error(
        "ring size {0} is not allowed; it must be at most {MAX_QUEUE_SIZE}, and a power of two in a split ring"
    )]
    Size(u16),
    /// The base does not lie in the ring.
    #[error("ring base {0:#x} is outside the ring")]
    Base(u32),
    /// An area is misaligned or does not lie in one memory region.
    #[error("the ring's {what} at {addr:#x} is misaligned or not in the guest's shared memory")]
    Unmapped {
        /// The name of the area.
        what: &'static str,
        /// The front-end address of the area.
        addr: u64,
    },
}

impl VirtqueueError {
    pub(crate) fn unmapped(what: &'static str, addr: u64) -> Self {
        Self::Unmapped { what, addr }
    }
}
