//! Constants of the virtqueue formats (virtio 1.3 §2.7 and §2.8), in the types of the fields that
//! they belong to.
#![allow(
    clippy::cast_possible_truncation,
    reason = "each value is a constant that fits the 16 bits of its field"
)]

use virtio_bindings::virtio_ring as ring;

/// Descriptor `flags`: the chain continues with another descriptor (§2.7.5, §2.8.8).
pub const VRING_DESC_F_NEXT: u16 = ring::VRING_DESC_F_NEXT as u16;
/// Descriptor `flags`: the device writes the buffer; without it, the device reads the buffer.
pub const VRING_DESC_F_WRITE: u16 = ring::VRING_DESC_F_WRITE as u16;
/// Descriptor `flags`: the buffer is a table of descriptors (§2.7.5.3, §2.8.7).
pub const VRING_DESC_F_INDIRECT: u16 = ring::VRING_DESC_F_INDIRECT as u16;

/// `flags` of the available ring: the driver wants no interrupts (§2.7.6).
pub const VRING_AVAIL_F_NO_INTERRUPT: u16 = ring::VRING_AVAIL_F_NO_INTERRUPT as u16;
/// `flags` of the used ring: the device wants no kicks (§2.7.8).
pub const VRING_USED_F_NO_NOTIFY: u16 = ring::VRING_USED_F_NO_NOTIFY as u16;

/// `flags` of a packed descriptor: the driver's wrap counter when it made the descriptor available
/// (§2.8.1).
pub const VIRTQ_DESC_F_AVAIL: u16 = 1 << ring::VRING_PACKED_DESC_F_AVAIL;
/// `flags` of a packed descriptor: the device's wrap counter when it used the descriptor. It
/// differs from [`VIRTQ_DESC_F_AVAIL`] for as long as the descriptor is available.
pub const VIRTQ_DESC_F_USED: u16 = 1 << ring::VRING_PACKED_DESC_F_USED;

/// `flags` of an event suppression area: notify always (§2.8.10).
pub const VRING_PACKED_EVENT_FLAG_ENABLE: u16 = ring::VRING_PACKED_EVENT_FLAG_ENABLE as u16;
/// `flags` of an event suppression area: never notify.
pub const VRING_PACKED_EVENT_FLAG_DISABLE: u16 = ring::VRING_PACKED_EVENT_FLAG_DISABLE as u16;
/// `flags` of an event suppression area: notify when the descriptor that `off_wrap` names is passed
/// (needs VIRTIO_F_EVENT_IDX).
pub const VRING_PACKED_EVENT_FLAG_DESC: u16 = ring::VRING_PACKED_EVENT_FLAG_DESC as u16;
/// The wrap counter's bit in `off_wrap` of an event suppression area. The base of a packed
/// virtqueue in SET_VRING_BASE has the same form.
pub const VRING_PACKED_EVENT_F_WRAP_CTR: u16 = 1 << ring::VRING_PACKED_EVENT_F_WRAP_CTR;
