//! What a packed ring is made of: flags, places and descriptors.

use crate::memory::Area;
#[cfg(doc)]
use crate::split::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

/// Descriptor flag: the driver's wrap counter when it made the descriptor available.
pub const VIRTQ_DESC_F_AVAIL: u16 = 1 << 7;
/// Descriptor flag: the device's wrap counter when it used the descriptor; the opposite of
/// [`AVAIL`] while it has not.
pub const VIRTQ_DESC_F_USED: u16 = 1 << 15;

/// Event suppression flag: always signal.
pub const VRING_PACKED_EVENT_FLAG_ENABLE: u16 = 0;
/// Event suppression flag: never signal.
pub const VRING_PACKED_EVENT_FLAG_DISABLE: u16 = 1;
/// Event suppression flag: signal when the descriptor of `off_wrap` is passed.
pub const VRING_PACKED_EVENT_FLAG_DESC: u16 = 2;

/// Byte offsets in a descriptor.
pub(super) const LEN_OFFSET: usize = 8;
pub(super) const ID_OFFSET: usize = 12;
pub(super) const FLAGS_OFFSET: usize = 14;

/// A place in the ring: a descriptor and the wrap counter that holds there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingPosition {
    /// Descriptor.
    pub index: u16,
    /// Wrap counter.
    pub wrap: bool,
}

impl RingPosition {
    /// Where a ring of `size` descriptors is after `n` of them, counted from its beginning.
    #[must_use]
    pub fn nth(n: u16, size: u16) -> Self {
        Self {
            index: n % size,
            wrap: (n / size).is_multiple_of(2),
        }
    }

    /// `n` descriptors further on; `n` is at most `size`.
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

    /// As event suppression areas and SET_VRING_BASE have it: the wrap counter in bit 15.
    #[inline(always)]
    #[must_use]
    pub fn word(self) -> u16 {
        self.index | if self.wrap { 1 << 15 } else { 0 }
    }

    /// The flags of an available descriptor here.
    #[inline(always)]
    #[must_use]
    pub fn available(self) -> u16 {
        if self.wrap {
            VIRTQ_DESC_F_AVAIL
        } else {
            VIRTQ_DESC_F_USED
        }
    }

    /// The flags of a used descriptor here.
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

/// A descriptor (virtio 1.3 §2.8.13).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PackedDescriptor {
    /// Guest physical address; of no meaning once it is used.
    pub addr: u64,
    /// Length in bytes, or bytes written.
    pub len: u32,
    /// Buffer id.
    pub id: u16,
    /// [`NEXT`], [`WRITE`], [`VRING_DESC_F_INDIRECT`], [`AVAIL`], [`USED`].
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

    /// Writes it at byte `offset` of a ring or table, as two words.
    #[inline(always)]
    pub fn store(self, table: &Area, offset: usize) {
        let rest = u64::from(self.len) | u64::from(self.id) << 32 | u64::from(self.flags) << 48;
        table.store(offset, self.addr.to_le());
        table.store(offset + LEN_OFFSET, rest.to_le());
    }

    /// Reads it from byte `offset` of a ring or table.
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
