//! Ethernet frames for tests: built with correct, partial or wrong checksums, and parsed.
//!
//! [`FrameSpec::build`] makes a [`Frame`]; [`check`] parses one and verifies its checksums.

mod checksum;
mod parse;
mod transport;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::header::{
    NetHeader, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
    VIRTIO_NET_HDR_GSO_UDP,
};
use checksum::{fold, pseudo_header_sum, sum};
pub use parse::{ParsedFrame, check};
pub use transport::{ETHERNET_LEN, Frame, FrameError, Transport};
use transport::{ETHERTYPE_IPV4, ETHERTYPE_IPV6, ETHERTYPE_VLAN, IPV4_LEN};

/// How the transport checksum of a frame is filled in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checksum {
    /// Correct and complete.
    Full,
    /// The sum of the pseudo header only. The virtio-net header asks the device to complete it.
    Partial,
    /// Complete and wrong.
    Wrong,
}

/// The description of a frame to build.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FrameSpec {
    /// The Ethernet source.
    pub source_mac: [u8; 6],
    /// The Ethernet destination.
    pub target_mac: [u8; 6],
    /// All 16 bits of the tag control information (802.1Q), for a tagged frame.
    pub vlan: Option<u16>,
    /// The IP source.
    pub source: IpAddr,
    /// The IP destination.
    pub target: IpAddr,
    /// TCP or UDP.
    pub transport: Transport,
    /// The source port.
    pub source_port: u16,
    /// The destination port.
    pub target_port: u16,
    /// TCP sequence number. Its lower 16 bits are the IPv4 identification, too.
    pub sequence: u32,
    /// How the transport checksum is filled in.
    pub checksum: Checksum,
    /// Asks for segmentation into this many payload bytes each. It needs [`Checksum::Partial`].
    pub gso_size: Option<u16>,
}

impl FrameSpec {
    /// A frame over IPv4 from 10.0.0.1:1000 to 10.0.0.2:2000.
    #[must_use]
    pub fn v4(transport: Transport) -> Self {
        Self {
            source_mac: [2, 0, 0, 0, 0, 1],
            target_mac: [2, 0, 0, 0, 0, 2],
            vlan: None,
            source: Ipv4Addr::new(10, 0, 0, 1).into(),
            target: Ipv4Addr::new(10, 0, 0, 2).into(),
            transport,
            source_port: 1000,
            target_port: 2000,
            sequence: 1,
            checksum: Checksum::Full,
            gso_size: None,
        }
    }

    /// A frame over IPv6 from port 1000 of fd00::1 to port 2000 of fd00::2.
    #[must_use]
    pub fn v6(transport: Transport) -> Self {
        Self {
            source: Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1).into(),
            target: Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2).into(),
            ..Self::v4(transport)
        }
    }

    /// Builds the frame with `payload`.
    ///
    /// # Errors
    /// When the payload does not fit an IP packet, or the addresses are of two families.
    pub fn build(&self, payload: &[u8]) -> Result<Frame, FrameError> {
        let segment_len = self.transport.header_len() + payload.len();
        let mut bytes = self.ethernet();
        self.push_ip(&mut bytes, segment_len)?;
        let start = bytes.len();
        self.push_transport(&mut bytes, segment_len)?;
        bytes.extend_from_slice(payload);
        let field = start + usize::from(self.transport.checksum_offset());
        let sum = self.transport_checksum(&bytes[start..], segment_len);
        bytes[field..field + 2].copy_from_slice(&sum.to_be_bytes());
        let header = self.header(start)?;
        Ok(Frame { header, bytes })
    }

    fn ethernet(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&self.target_mac);
        bytes.extend_from_slice(&self.source_mac);
        if let Some(tag) = self.vlan {
            bytes.extend_from_slice(&ETHERTYPE_VLAN.to_be_bytes());
            bytes.extend_from_slice(&tag.to_be_bytes());
        }
        bytes
    }

    fn push_ip(&self, bytes: &mut Vec<u8>, segment_len: usize) -> Result<(), FrameError> {
        let too_long = || FrameError::TooLong(segment_len);
        match (self.source, self.target) {
            (IpAddr::V4(source), IpAddr::V4(target)) => {
                let total = u16::try_from(IPV4_LEN + segment_len).map_err(|_| too_long())?;
                bytes.extend_from_slice(&ETHERTYPE_IPV4.to_be_bytes());
                let at = bytes.len();
                bytes.extend_from_slice(&[0x45, 0]);
                bytes.extend_from_slice(&total.to_be_bytes());
                let [_, _, high, low] = self.sequence.to_be_bytes();
                // The flag "don't fragment", 64 hops, and a checksum of 0 for now.
                bytes.extend_from_slice(&[high, low, 0x40, 0, 64, self.transport.protocol(), 0, 0]);
                bytes.extend_from_slice(&source.octets());
                bytes.extend_from_slice(&target.octets());
                let sum = !fold(sum(&bytes[at..]));
                bytes[at + 10..at + 12].copy_from_slice(&sum.to_be_bytes());
            }
            (IpAddr::V6(source), IpAddr::V6(target)) => {
                let len = u16::try_from(segment_len).map_err(|_| too_long())?;
                bytes.extend_from_slice(&ETHERTYPE_IPV6.to_be_bytes());
                bytes.extend_from_slice(&[0x60, 0, 0, 0]);
                bytes.extend_from_slice(&len.to_be_bytes());
                bytes.extend_from_slice(&[self.transport.protocol(), 64]);
                bytes.extend_from_slice(&source.octets());
                bytes.extend_from_slice(&target.octets());
            }
            (source, target) => return Err(FrameError::Families(source, target)),
        }
        Ok(())
    }

    fn push_transport(&self, bytes: &mut Vec<u8>, segment_len: usize) -> Result<(), FrameError> {
        bytes.extend_from_slice(&self.source_port.to_be_bytes());
        bytes.extend_from_slice(&self.target_port.to_be_bytes());
        match self.transport {
            Transport::Tcp => {
                bytes.extend_from_slice(&self.sequence.to_be_bytes());
                // Acknowledgement number 1, header of 5 words, flags ACK and PSH, window 65,535.
                bytes.extend_from_slice(&[0, 0, 0, 1, 0x50, 0x18, 0xff, 0xff, 0, 0, 0, 0]);
            }
            Transport::Udp => {
                let len =
                    u16::try_from(segment_len).map_err(|_| FrameError::TooLong(segment_len))?;
                bytes.extend_from_slice(&len.to_be_bytes());
                bytes.extend_from_slice(&[0, 0]);
            }
        }
        Ok(())
    }

    fn transport_checksum(&self, segment: &[u8], segment_len: usize) -> u16 {
        let pseudo = pseudo_header_sum(self.source, self.target, self.transport, segment_len);
        let complete = !fold(pseudo + sum(segment));
        match self.checksum {
            Checksum::Partial => fold(pseudo),
            // A UDP checksum of 0 means that there is none (RFC 768).
            Checksum::Full if complete == 0 => 0xffff,
            Checksum::Full => complete,
            Checksum::Wrong => complete ^ 0x5555,
        }
    }

    fn header(&self, start: usize) -> Result<NetHeader, FrameError> {
        let offset = |at: usize| u16::try_from(at).map_err(|_| FrameError::TooLong(at));
        let mut header = NetHeader::default();
        if self.checksum == Checksum::Partial {
            header.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM;
            header.csum_start = offset(start)?;
            header.csum_offset = self.transport.checksum_offset();
        }
        if let Some(size) = self.gso_size {
            header.gso_size = size;
            header.hdr_len = offset(start + self.transport.header_len())?;
            header.gso_type = match (self.transport, self.source) {
                (Transport::Udp, _) => VIRTIO_NET_HDR_GSO_UDP,
                (Transport::Tcp, IpAddr::V4(_)) => VIRTIO_NET_HDR_GSO_TCPV4,
                (Transport::Tcp, IpAddr::V6(_)) => VIRTIO_NET_HDR_GSO_TCPV6,
            };
        }
        Ok(header)
    }
}

/// A frame of any protocol: an Ethernet header and `payload`, padded to the minimum of 60 bytes.
#[must_use]
pub fn ethernet(target: [u8; 6], source: [u8; 6], ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = [&target[..], &source, &ethertype.to_be_bytes(), payload].concat();
    bytes.resize(bytes.len().max(60), 0);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn specs() -> Vec<FrameSpec> {
        let mut tagged = FrameSpec::v4(Transport::Udp);
        tagged.vlan = Some(7);
        vec![
            FrameSpec::v4(Transport::Tcp),
            FrameSpec::v4(Transport::Udp),
            FrameSpec::v6(Transport::Tcp),
            FrameSpec::v6(Transport::Udp),
            tagged,
        ]
    }

    #[test]
    fn checksum_of_a_known_ipv4_header_is_correct() {
        // A well-known example: 45 00 00 73 00 00 40 00 40 11 [b861] c0a80001 c0a800c7.
        let header = [
            0x45, 0, 0, 0x73, 0, 0, 0x40, 0, 0x40, 0x11, 0, 0, 192, 168, 0, 1, 192, 168, 0, 199,
        ];
        assert_eq!(!fold(sum(&header)), 0xb861);
    }

    #[test]
    fn frame_of_each_kind_is_parsed_as_it_was_built() {
        for mut spec in specs() {
            for len in [0, 1, 6, 1000, 1457] {
                let payload: Vec<u8> = (0..=250).cycle().take(len).collect();
                for checksum in [Checksum::Full, Checksum::Partial] {
                    spec.checksum = checksum;
                    let frame = spec.build(&payload).unwrap();
                    let parsed = check(&frame).unwrap();
                    assert_eq!(frame.bytes[parsed.payload.clone()], payload);
                    assert_eq!(parsed.source, spec.source);
                    assert_eq!(parsed.target_port, 2000);
                    assert_eq!(parsed.vlan, spec.vlan);
                }
            }
        }
    }

    #[test]
    fn frame_with_any_changed_byte_fails_the_check() {
        for spec in specs() {
            let frame = spec.build(b"some payload").unwrap();
            let parsed = check(&frame).unwrap();
            for at in parsed.segment {
                let mut damaged = frame.clone();
                damaged.bytes[at] ^= 0x10;
                assert!(check(&damaged).is_err(), "byte {at} of {spec:?}");
            }
        }
        let mut spec = FrameSpec::v4(Transport::Tcp);
        spec.checksum = Checksum::Wrong;
        let frame = spec.build(b"x").unwrap();
        assert_eq!(check(&frame), Err(FrameError::Checksum("transport")));
    }

    #[test]
    fn frame_with_gso_has_a_matching_virtio_net_header() {
        let mut spec = FrameSpec::v6(Transport::Tcp);
        spec.checksum = Checksum::Partial;
        spec.gso_size = Some(1428);
        let frame = spec.build(&[0; 60_000]).unwrap();
        let want = NetHeader {
            flags: VIRTIO_NET_HDR_F_NEEDS_CSUM,
            gso_type: VIRTIO_NET_HDR_GSO_TCPV6,
            hdr_len: 14 + 40 + 20,
            gso_size: 1428,
            csum_start: 54,
            csum_offset: 16,
            num_buffers: 0,
        };
        assert_eq!(frame.header, want);
        check(&frame).unwrap();
    }

    #[test]
    fn frame_too_long_short_or_of_mixed_families_is_refused() {
        let spec = FrameSpec::v4(Transport::Udp);
        assert!(matches!(
            spec.build(&[0; 65_508]),
            Err(FrameError::TooLong(_))
        ));
        spec.build(&[0; 65_507]).unwrap();
        let mixed = FrameSpec {
            target: Ipv6Addr::LOCALHOST.into(),
            ..spec
        };
        assert!(matches!(mixed.build(&[]), Err(FrameError::Families(..))));
        let arp = ethernet([0xff; 6], [2; 6], 0x0806, &[1, 2]);
        assert_eq!(arp.len(), 60);
        assert!(matches!(
            ParsedFrame::new(&arp),
            Err(FrameError::Unknown(_))
        ));
        for len in 0..54 {
            let frame = FrameSpec::v4(Transport::Tcp).build(b"").unwrap();
            assert!(ParsedFrame::new(&frame.bytes[..len]).is_err(), "{len}");
        }
    }
}
