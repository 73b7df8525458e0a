//! The parts of a packed virtqueue: descriptors and positions in the ring.

use virtionet_virtqueue::constants::{
    VIRTQ_DESC_F_AVAIL, VIRTQ_DESC_F_USED, VRING_PACKED_EVENT_F_WRAP_CTR,
};
#[cfg(doc)]
use virtionet_virtqueue::constants::{
    VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};

use crate::memory::Area;

/// The size of a descriptor in bytes.
pub(super) const DESCRIPTOR_SIZE: usize = 16;
// Offsets of the fields of a descriptor in bytes; `addr` has offset 0.
pub(super) const LEN_OFFSET: usize = 8;
pub(super) const ID_OFFSET: usize = 12;
pub(super) const FLAGS_OFFSET: usize = 14;

/// A position in the ring: a descriptor and the wrap counter that is valid there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingPosition {
    /// The index of the descriptor.
    pub index: u16,
    /// The wrap counter.
    pub wrap: bool,
}

impl RingPosition {
    /// The position in a ring of `size` descriptors that is `n` descriptors behind its beginning.
    #[must_use]
    pub fn nth(n: u16, size: u16) -> Self {
        Self {
            index: n % size,
            wrap: (n / size).is_multiple_of(2),
        }
    }

    /// The position `n` descriptors later. `n` is at most `size`.
    #[inline(always)]
    #[must_use]
    pub fn after(self, n: u16, size: u16) -> Self {
        let left = size - self.index;
        if n < left {
            Self {
                index: self.index + n,
                ..self
            }
        } else {
            Self {
                index: n - left,
                wrap: !self.wrap,
            }
        }
    }

    /// The form of `off_wrap` and of SET_VRING_BASE, with the wrap counter in bit 15.
    #[inline(always)]
    #[must_use]
    pub fn word(self) -> u16 {
        self.index
            | if self.wrap {
                VRING_PACKED_EVENT_F_WRAP_CTR
            } else {
                0
            }
    }

    /// The AVAIL and USED flags of an available descriptor at this position.
    #[inline(always)]
    #[must_use]
    pub fn available(self) -> u16 {
        if self.wrap {
            VIRTQ_DESC_F_AVAIL
        } else {
            VIRTQ_DESC_F_USED
        }
    }

    /// The AVAIL and USED flags of a used descriptor at this position.
    #[inline(always)]
    #[must_use]
    pub fn used(self) -> u16 {
        if self.wrap {
            VIRTQ_DESC_F_AVAIL | VIRTQ_DESC_F_USED
        } else {
            0
        }
    }
}

/// A packed descriptor (virtio 1.3 §2.8.13).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PackedDescriptor {
    /// The guest physical address; without meaning in a used descriptor.
    pub addr: u64,
    /// The length in bytes; in a used descriptor the number of bytes written.
    pub len: u32,
    /// The buffer id.
    pub id: u16,
    /// [`VRING_DESC_F_NEXT`], [`VRING_DESC_F_WRITE`], [`VRING_DESC_F_INDIRECT`],
    /// [`VIRTQ_DESC_F_AVAIL`], [`VIRTQ_DESC_F_USED`].
    pub flags: u16,
}

impl PackedDescriptor {
    /// A descriptor of these values.
    #[must_use]
    pub fn new(addr: u64, len: u32, id: u16, flags: u16) -> Self {
        Self {
            addr,
            len,
            id,
            flags,
        }
    }

    /// Writes the descriptor at byte `offset` of a ring or table with two stores.
    #[inline(always)]
    pub fn store(self, table: &Area, offset: usize) {
        let rest = u64::from(self.len) | u64::from(self.id) << 32 | u64::from(self.flags) << 48;
        table.store(offset, self.addr.to_le());
        table.store(offset + LEN_OFFSET, rest.to_le());
    }

    /// Reads the descriptor at byte `offset` of a ring or table.
    #[inline(always)]
    #[must_use]
    pub fn load(table: &Area, offset: usize) -> Self {
        Self {
            addr: u64::from_le(table.load(offset)),
            len: u32::from_le(table.load(offset + LEN_OFFSET)),
            id: u16::from_le(table.load(offset + ID_OFFSET)),
            flags: u16::from_le(table.load(offset + FLAGS_OFFSET)),
        }
    }
}
