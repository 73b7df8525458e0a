//! The virtio features that the device offers and the driver accepts (virtio 1.3 §5.1.3, §6).

use virtio_bindings::virtio_config as config;
use virtio_bindings::virtio_net as net;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::frame_format::{FrameFormat, LEGACY_VNET_HEADER_LEN, VNET_HEADER_LEN};

/// A set of virtio feature bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Features(pub u64);

/// The bit numbers of the features that this device offers, and their names without prefix.
const OFFERED: &[(u32, &str)] = &[
    (net::VIRTIO_NET_F_CSUM, "CSUM"),
    (net::VIRTIO_NET_F_GUEST_CSUM, "GUEST_CSUM"),
    (net::VIRTIO_NET_F_MTU, "MTU"),
    (net::VIRTIO_NET_F_GUEST_TSO4, "GUEST_TSO4"),
    (net::VIRTIO_NET_F_GUEST_TSO6, "GUEST_TSO6"),
    (net::VIRTIO_NET_F_GUEST_ECN, "GUEST_ECN"),
    (net::VIRTIO_NET_F_GUEST_UFO, "GUEST_UFO"),
    (net::VIRTIO_NET_F_HOST_TSO4, "HOST_TSO4"),
    (net::VIRTIO_NET_F_HOST_TSO6, "HOST_TSO6"),
    (net::VIRTIO_NET_F_HOST_ECN, "HOST_ECN"),
    (net::VIRTIO_NET_F_HOST_UFO, "HOST_UFO"),
    (net::VIRTIO_NET_F_MRG_RXBUF, "MRG_RXBUF"),
    (net::VIRTIO_NET_F_GUEST_ANNOUNCE, "GUEST_ANNOUNCE"),
    (net::VIRTIO_NET_F_MQ, "MQ"),
    (VIRTIO_RING_F_INDIRECT_DESC, "INDIRECT_DESC"),
    (VIRTIO_RING_F_EVENT_IDX, "EVENT_IDX"),
    (config::VIRTIO_F_ANY_LAYOUT, "ANY_LAYOUT"),
    (config::VIRTIO_F_VERSION_1, "VERSION_1"),
    (config::VIRTIO_F_ACCESS_PLATFORM, "ACCESS_PLATFORM"),
    (config::VIRTIO_F_RING_PACKED, "RING_PACKED"),
    (config::VIRTIO_F_IN_ORDER, "IN_ORDER"),
];

impl Features {
    /// All features of this device. It leaves out the features that QEMU itself provides (CTRL_VQ,
    /// STATUS, MAC) and those that cannot work through vhost-user (RSS, HASH_REPORT, RING_RESET).
    #[must_use]
    pub fn offered() -> Self {
        Self(OFFERED.iter().fold(0, |all, (bit, _)| all | 1 << bit))
    }

    /// Whether feature bit number `bit` is in the set.
    #[inline(always)]
    #[must_use]
    pub fn has(self, bit: u32) -> bool {
        self.0 >> bit & 1 == 1
    }

    /// Whether a received frame may span several buffers (VIRTIO_NET_F_MRG_RXBUF).
    #[must_use]
    pub fn has_mergeable_buffers(self) -> bool {
        self.has(net::VIRTIO_NET_F_MRG_RXBUF)
    }

    /// Whether the virtqueues are packed (VIRTIO_F_RING_PACKED).
    #[must_use]
    pub fn has_packed_virtqueues(self) -> bool {
        self.has(config::VIRTIO_F_RING_PACKED)
    }

    /// The names of those features in the set that this device offers.
    #[must_use]
    pub fn names(self) -> Vec<&'static str> {
        OFFERED
            .iter()
            .filter(|(bit, _)| self.has(*bit))
            .map(|(_, name)| *name)
            .collect()
    }

    /// The number of bytes of the virtio-net header under these features (virtio 1.3 §5.1.6.1).
    #[must_use]
    pub fn header_len(self) -> usize {
        if self.has_mergeable_buffers() || self.has(config::VIRTIO_F_VERSION_1) {
            VNET_HEADER_LEN
        } else {
            LEGACY_VNET_HEADER_LEN
        }
    }

    /// The form of received frames under these features.
    #[must_use]
    pub fn format(self) -> FrameFormat {
        let csum = self.has(net::VIRTIO_NET_F_GUEST_CSUM);
        FrameFormat {
            header_len: self.header_len(),
            csum,
            tso4: csum && self.has(net::VIRTIO_NET_F_GUEST_TSO4),
            tso6: csum && self.has(net::VIRTIO_NET_F_GUEST_TSO6),
            ecn: csum && self.has(net::VIRTIO_NET_F_GUEST_ECN),
            ufo: csum && self.has(net::VIRTIO_NET_F_GUEST_UFO),
        }
    }
}
