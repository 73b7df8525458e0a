//! The virtio-net header (virtio 1.3 §5.1.6) as a driver writes and reads it.
#![allow(
    clippy::cast_possible_truncation,
    reason = "each constant fits the 8 bits of its field"
)]

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net as net;

/// `flags`: the receiver of the header is to complete the checksum.
pub const VIRTIO_NET_HDR_F_NEEDS_CSUM: u8 = net::VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
/// `flags`: the device has verified the checksum.
pub const VIRTIO_NET_HDR_F_DATA_VALID: u8 = net::VIRTIO_NET_HDR_F_DATA_VALID as u8;
/// `gso_type`: no segmentation.
pub const VIRTIO_NET_HDR_GSO_NONE: u8 = net::VIRTIO_NET_HDR_GSO_NONE as u8;
/// `gso_type`: TCP segmentation over IPv4.
pub const VIRTIO_NET_HDR_GSO_TCPV4: u8 = net::VIRTIO_NET_HDR_GSO_TCPV4 as u8;
/// `gso_type`: UDP fragmentation.
pub const VIRTIO_NET_HDR_GSO_UDP: u8 = net::VIRTIO_NET_HDR_GSO_UDP as u8;
/// `gso_type`: TCP segmentation over IPv6.
pub const VIRTIO_NET_HDR_GSO_TCPV6: u8 = net::VIRTIO_NET_HDR_GSO_TCPV6 as u8;
/// `gso_type`, added to a TCP type: the TCP header has the CWR flag.
pub const VIRTIO_NET_HDR_GSO_ECN: u8 = net::VIRTIO_NET_HDR_GSO_ECN as u8;

/// The size of the header with `num_buffers` in bytes.
pub const HEADER_LEN: usize = 12;
/// The size in bytes of the header of a legacy driver without mergeable buffers, which ends before
/// `num_buffers`.
pub const LEGACY_HEADER_LEN: usize = 10;

/// The fields of a header in the byte order of this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct NetHeader {
    /// [`VIRTIO_NET_HDR_F_NEEDS_CSUM`], [`VIRTIO_NET_HDR_F_DATA_VALID`].
    pub flags: u8,
    /// One of the `VIRTIO_NET_HDR_GSO_` types.
    pub gso_type: u8,
    /// The size of all packet headers in bytes.
    pub hdr_len: u16,
    /// The payload of each segment in bytes.
    pub gso_size: u16,
    /// The offset in the frame in bytes from which the checksum is computed.
    pub csum_start: u16,
    /// The offset from `csum_start` in bytes at which the checksum is stored.
    pub csum_offset: u16,
    /// The number of buffers of a received frame.
    pub num_buffers: u16,
}

impl NetHeader {
    /// The header as it lies in memory. A legacy header is the first [`LEGACY_HEADER_LEN`] bytes.
    #[must_use]
    pub fn to_bytes(self) -> [u8; HEADER_LEN] {
        let [a, b] = self.hdr_len.to_le_bytes();
        let [c, d] = self.gso_size.to_le_bytes();
        let [e, f] = self.csum_start.to_le_bytes();
        let [g, h] = self.csum_offset.to_le_bytes();
        let [i, j] = self.num_buffers.to_le_bytes();
        [self.flags, self.gso_type, a, b, c, d, e, f, g, h, i, j]
    }

    /// The header from its bytes in memory.
    #[must_use]
    pub fn from_bytes(raw: [u8; HEADER_LEN]) -> Self {
        let word = |at: usize| u16::from_le_bytes([raw[at], raw[at + 1]]);
        Self {
            flags: raw[0],
            gso_type: raw[1],
            hdr_len: word(2),
            gso_size: word(4),
            csum_start: word(6),
            csum_offset: word(8),
            num_buffers: word(10),
        }
    }
}

/// The size of the header in bytes with the given feature bits.
#[must_use]
pub fn header_len(features: u64) -> usize {
    let has_feature = |bit: u32| features >> bit & 1 == 1;
    if has_feature(VIRTIO_F_VERSION_1) || has_feature(net::VIRTIO_NET_F_MRG_RXBUF) {
        HEADER_LEN
    } else {
        LEGACY_HEADER_LEN
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_fields_are_at_the_offsets_of_the_specification() {
        let raw = [1, 4, 0x36, 0, 0xb4, 5, 0x22, 0, 0x10, 0, 3, 0];
        let header = NetHeader::from_bytes(raw);
        let want = NetHeader {
            flags: VIRTIO_NET_HDR_F_NEEDS_CSUM,
            gso_type: VIRTIO_NET_HDR_GSO_TCPV6,
            hdr_len: 54,
            gso_size: 1460,
            csum_start: 34,
            csum_offset: 16,
            num_buffers: 3,
        };
        assert_eq!(header, want);
        assert_eq!(header.to_bytes(), raw);
    }

    #[test]
    fn header_is_short_only_without_version_1_and_mergeable_buffers() {
        assert_eq!(header_len(0), 10);
        assert_eq!(header_len(1 << net::VIRTIO_NET_F_MRG_RXBUF), 12);
        assert_eq!(header_len(1 << VIRTIO_F_VERSION_1), 12);
    }
}
