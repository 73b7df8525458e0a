//! The virtio-net header (virtio 1.3 §5.1.6) as a driver writes and reads it.

/// `flags`: the device is to finish the checksum.
pub const VIRTIO_NET_HDR_F_NEEDS_CSUM: u8 = 1;
/// `flags`: the device has checked the checksum.
pub const VIRTIO_NET_HDR_F_DATA_VALID: u8 = 2;
/// `gso_type`: no segmentation.
pub const VIRTIO_NET_HDR_GSO_NONE: u8 = 0;
/// `gso_type`: TCP over IPv4.
pub const VIRTIO_NET_HDR_GSO_TCPV4: u8 = 1;
/// `gso_type`: UDP fragmentation.
pub const VIRTIO_NET_HDR_GSO_UDP: u8 = 3;
/// `gso_type`: TCP over IPv6.
pub const VIRTIO_NET_HDR_GSO_TCPV6: u8 = 4;
/// `gso_type`, added to a TCP type: with ECN.
pub const VIRTIO_NET_HDR_GSO_ECN: u8 = 0x80;

/// Bytes of the header with `num_buffers`.
pub const HEADER_LEN: usize = 12;
/// Bytes of the header of a legacy driver without mergeable buffers.
pub const LEGACY_HEADER_LEN: usize = 10;

/// A header, field by field, in the machine's byte order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct NetHeader {
    /// [`VIRTIO_NET_HDR_F_NEEDS_CSUM`], [`VIRTIO_NET_HDR_F_DATA_VALID`].
    pub flags: u8,
    /// One of the `GSO_` types.
    pub gso_type: u8,
    /// Bytes of all packet headers.
    pub hdr_len: u16,
    /// Payload bytes of each segment.
    pub gso_size: u16,
    /// Where the checksum begins.
    pub csum_start: u16,
    /// Where after that it is stored.
    pub csum_offset: u16,
    /// Buffers that a received frame lies in.
    pub num_buffers: u16,
}

impl NetHeader {
    /// As it lies in memory. A legacy header is the first [`LEGACY_HEADER_LEN`] bytes.
    #[must_use]
    pub fn to_bytes(self) -> [u8; HEADER_LEN] {
        let [a, b] = self.hdr_len.to_le_bytes();
        let [c, d] = self.gso_size.to_le_bytes();
        let [e, f] = self.csum_start.to_le_bytes();
        let [g, h] = self.csum_offset.to_le_bytes();
        let [i, j] = self.num_buffers.to_le_bytes();
        [self.flags, self.gso_type, a, b, c, d, e, f, g, h, i, j]
    }

    /// From memory.
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

/// Bytes of the header under these feature bits.
#[must_use]
pub fn header_len(features: u64) -> usize {
    let long = virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
    let merged = virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
    if features >> long & 1 == 1 || features >> merged & 1 == 1 {
        HEADER_LEN
    } else {
        LEGACY_HEADER_LEN
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_lie_where_the_specification_puts_them() {
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
    fn only_a_legacy_driver_without_merging_has_the_short_header() {
        assert_eq!(header_len(0), 10);
        assert_eq!(header_len(1 << 15), 12);
        assert_eq!(header_len(1 << 32), 12);
    }
}
