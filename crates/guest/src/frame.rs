//! Ethernet frames for tests: made with right (or partial, or wrong) checksums, and read back.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Range;

use crate::header::{
    NetHeader, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4,
    VIRTIO_NET_HDR_GSO_TCPV6, VIRTIO_NET_HDR_GSO_UDP,
};

/// Bytes of an Ethernet header.
pub const ETHERNET_LEN: usize = 14;
const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERTYPE_VLAN: u16 = 0x8100;
const IPV4_LEN: usize = 20;
const IPV6_LEN: usize = 40;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// Why a frame cannot be made or read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// More than an IP packet can hold.
    #[error("{0} bytes of payload do not fit an IP packet; take at most 65,000")]
    TooLong(usize),
    /// Source and target of different families.
    #[error("{0} and {1} are of different address families; take two of one")]
    Families(IpAddr, IpAddr),
    /// The frame ends within its headers, or its lengths contradict each other.
    #[error("a frame of {len} bytes ends before its {header}; look at its bytes")]
    Short {
        /// Bytes of the frame.
        len: usize,
        /// The header that does not fit.
        header: &'static str,
    },
    /// Not IPv4 or IPv6 with TCP or UDP.
    #[error("frame with {0} is not TCP or UDP over IP; compare its bytes instead")]
    Unknown(String),
    /// A checksum that does not add up.
    #[error("the frame's {0} checksum is wrong; it was damaged on its way")]
    Checksum(&'static str),
}

/// How a transport checksum is filled in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checksum {
    /// Right and whole.
    Full,
    /// Only the pseudo header's sum; the header asks the device for the rest.
    Partial,
    /// Whole, but wrong.
    Wrong,
}

/// The transport of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// TCP, with ACK and PSH set.
    Tcp,
    /// UDP.
    Udp,
}

impl Transport {
    fn protocol(self) -> u8 {
        match self {
            Self::Tcp => TCP,
            Self::Udp => UDP,
        }
    }

    fn header_len(self) -> usize {
        match self {
            Self::Tcp => 20,
            Self::Udp => 8,
        }
    }

    /// Where in the transport header its checksum lies.
    fn checksum_offset(self) -> u16 {
        match self {
            Self::Tcp => 16,
            Self::Udp => 6,
        }
    }
}

/// A frame with its virtio-net header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// The header.
    pub header: NetHeader,
    /// From the Ethernet header on.
    pub bytes: Vec<u8>,
}

/// What a frame is to look like. Every field may be changed before [`FrameSpec::build`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FrameSpec {
    /// Ethernet source.
    pub source_mac: [u8; 6],
    /// Ethernet destination.
    pub target_mac: [u8; 6],
    /// VLAN tag (802.1Q), the whole 16 bits.
    pub vlan: Option<u16>,
    /// IP source.
    pub source: IpAddr,
    /// IP destination.
    pub target: IpAddr,
    /// TCP or UDP.
    pub transport: Transport,
    /// Source port.
    pub source_port: u16,
    /// Destination port.
    pub target_port: u16,
    /// TCP sequence number; IPv4 identification takes its low bits.
    pub sequence: u32,
    /// The transport checksum.
    pub checksum: Checksum,
    /// Ask for segments of this many payload bytes; needs [`Checksum::Partial`].
    pub gso_size: Option<u16>,
}

impl FrameSpec {
    /// Over IPv4, from 10.0.0.1:1000 to 10.0.0.2:2000.
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

    /// Over IPv6, from fd00::1 to fd00::2, the same ports.
    #[must_use]
    pub fn v6(transport: Transport) -> Self {
        Self {
            source: Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1).into(),
            target: Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2).into(),
            ..Self::v4(transport)
        }
    }

    /// The frame around `payload`.
    ///
    /// # Errors
    /// When the payload does not fit an IP packet or the addresses are of two families.
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
                // Don't fragment, 64 hops, no checksum yet.
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
                // Acknowledges 1; header of 5 words; ACK and PSH; window 65,535.
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
        let pseudo = pseudo_sum(self.source, self.target, self.transport, segment_len);
        let whole = !fold(pseudo + sum(segment));
        match self.checksum {
            Checksum::Partial => fold(pseudo),
            // UDP has no 0: it means "none" (RFC 768).
            Checksum::Full if whole == 0 => 0xffff,
            Checksum::Full => whole,
            Checksum::Wrong => whole ^ 0x5555,
        }
    }

    fn header(&self, start: usize) -> Result<NetHeader, FrameError> {
        let short = |at: usize| u16::try_from(at).map_err(|_| FrameError::TooLong(at));
        let mut header = NetHeader::default();
        if self.checksum == Checksum::Partial {
            header.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM;
            header.csum_start = short(start)?;
            header.csum_offset = self.transport.checksum_offset();
        }
        if let Some(size) = self.gso_size {
            header.gso_size = size;
            header.hdr_len = short(start + self.transport.header_len())?;
            header.gso_type = match (self.transport, self.source) {
                (Transport::Udp, _) => VIRTIO_NET_HDR_GSO_UDP,
                (Transport::Tcp, IpAddr::V4(_)) => VIRTIO_NET_HDR_GSO_TCPV4,
                (Transport::Tcp, IpAddr::V6(_)) => VIRTIO_NET_HDR_GSO_TCPV6,
            };
        }
        Ok(header)
    }
}

/// A frame of another protocol: an Ethernet header and `payload`, padded to 60 bytes.
#[must_use]
pub fn ethernet(target: [u8; 6], source: [u8; 6], ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = [&target[..], &source, &ethertype.to_be_bytes(), payload].concat();
    bytes.resize(bytes.len().max(60), 0);
    bytes
}

/// A TCP or UDP frame, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParsedFrame {
    /// VLAN tag.
    pub vlan: Option<u16>,
    /// IP source.
    pub source: IpAddr,
    /// IP destination.
    pub target: IpAddr,
    /// TCP or UDP.
    pub transport: Transport,
    /// Source port.
    pub source_port: u16,
    /// Destination port.
    pub target_port: u16,
    /// Where the IP header begins.
    ip_start: usize,
    /// The transport header and payload in the frame.
    pub segment: Range<usize>,
    /// The payload in the frame, without Ethernet padding.
    pub payload: Range<usize>,
}

impl ParsedFrame {
    /// Takes `bytes` apart.
    ///
    /// # Errors
    /// When they are not a whole TCP or UDP frame.
    pub fn new(bytes: &[u8]) -> Result<Self, FrameError> {
        let short = |header| FrameError::Short {
            len: bytes.len(),
            header,
        };
        let word = |at: usize| word(bytes, at).ok_or_else(|| short("headers"));
        let vlan = match word(12)? {
            ETHERTYPE_VLAN => Some(word(14)?),
            _ => None,
        };
        let ip = ETHERNET_LEN + if vlan.is_some() { 4 } else { 0 };
        let (ip_len, total, protocol) = match word(ip - 2)? {
            ETHERTYPE_IPV4 => {
                let len = usize::from(word(ip)? >> 8 & 0xf) * 4;
                (len, usize::from(word(ip + 2)?), word(ip + 8)? & 0xff)
            }
            ETHERTYPE_IPV6 => (
                IPV6_LEN,
                IPV6_LEN + usize::from(word(ip + 4)?),
                word(ip + 6)? >> 8,
            ),
            other => return Err(FrameError::Unknown(format!("EtherType {other:#06x}"))),
        };
        let transport = match u8::try_from(protocol) {
            Ok(TCP) => Transport::Tcp,
            Ok(UDP) => Transport::Udp,
            _ => return Err(FrameError::Unknown(format!("IP protocol {protocol}"))),
        };
        let segment = ip + ip_len..ip + total;
        let header = match transport {
            Transport::Tcp => usize::from(word(segment.start + 12)? >> 12) * 4,
            Transport::Udp => 8,
        };
        if segment.end > bytes.len() || segment.start + header > segment.end {
            return Err(short("IP length"));
        }
        let (source, target) = addresses(bytes, ip, ip_len).ok_or_else(|| short("IP addresses"))?;
        Ok(Self {
            vlan,
            source,
            target,
            transport,
            source_port: word(segment.start)?,
            target_port: word(segment.start + 2)?,
            ip_start: ip,
            payload: segment.start + header..segment.end,
            segment,
        })
    }
}

/// Checks the IP and transport checksums of a frame against what its header says: whole without
/// VIRTIO_NET_HDR_F_NEEDS_CSUM, the pseudo header's alone (where csum_start and csum_offset point) with it.
///
/// # Errors
/// When the frame cannot be read or a checksum is wrong.
pub fn check(frame: &Frame) -> Result<ParsedFrame, FrameError> {
    let bytes = &frame.bytes;
    let parsed = ParsedFrame::new(bytes)?;
    let ip = parsed.ip_start..parsed.segment.start;
    if parsed.source.is_ipv4() && fold(sum(&bytes[ip])) != 0xffff {
        return Err(FrameError::Checksum("IPv4"));
    }
    let segment = &bytes[parsed.segment.clone()];
    let offset = usize::from(parsed.transport.checksum_offset());
    let field = word(segment, offset).ok_or(FrameError::Checksum("transport"))?;
    let pseudo = pseudo_sum(
        parsed.source,
        parsed.target,
        parsed.transport,
        segment.len(),
    );
    let right = if frame.header.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM != 0 {
        let start = usize::from(frame.header.csum_start);
        let at = usize::from(frame.header.csum_offset);
        start == parsed.segment.start && at == offset && field == fold(pseudo)
    } else {
        fold(pseudo + sum(segment)) == 0xffff && frame.header.gso_type == VIRTIO_NET_HDR_GSO_NONE
    };
    if right {
        Ok(parsed)
    } else {
        Err(FrameError::Checksum("transport"))
    }
}

fn addresses(bytes: &[u8], ip: usize, ip_len: usize) -> Option<(IpAddr, IpAddr)> {
    if ip_len == IPV6_LEN && bytes.get(ip)? >> 4 == 6 {
        let source: [u8; 16] = bytes.get(ip + 8..ip + 24)?.try_into().ok()?;
        let target: [u8; 16] = bytes.get(ip + 24..ip + 40)?.try_into().ok()?;
        return Some((IpAddr::from(source), IpAddr::from(target)));
    }
    let source: [u8; 4] = bytes.get(ip + 12..ip + 16)?.try_into().ok()?;
    let target: [u8; 4] = bytes.get(ip + 16..ip + 20)?.try_into().ok()?;
    Some((IpAddr::from(source), IpAddr::from(target)))
}

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    let pair = bytes.get(at..at + 2)?;
    Some(u16::from_be_bytes([pair[0], pair[1]]))
}

/// The sum over the pseudo header (RFC 9293 §3.1, RFC 8200 §8.1).
fn pseudo_sum(source: IpAddr, target: IpAddr, transport: Transport, segment_len: usize) -> u64 {
    let addresses = match (source, target) {
        (IpAddr::V4(source), IpAddr::V4(target)) => sum(&source.octets()) + sum(&target.octets()),
        (IpAddr::V6(source), IpAddr::V6(target)) => sum(&source.octets()) + sum(&target.octets()),
        _ => 0,
    };
    addresses + u64::from(transport.protocol()) + crate::memory::to_u64(segment_len)
}

/// The sum of 16-bit words, an odd byte padded with 0.
fn sum(bytes: &[u8]) -> u64 {
    bytes
        .chunks(2)
        .map(|pair| u64::from(pair[0]) << 8 | pair.get(1).map_or(0, |&low| u64::from(low)))
        .sum()
}

/// Folds carries into 16 bits (RFC 1071).
fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    u16::try_from(sum).unwrap_or(u16::MAX)
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
    fn the_ipv4_checksum_is_that_of_a_known_packet() {
        // The header of RFC 1071 practice: 45 00 00 73 00 00 40 00 40 11 [b861] c0a80001 c0a800c7.
        let header = [
            0x45, 0, 0, 0x73, 0, 0, 0x40, 0, 0x40, 0x11, 0, 0, 192, 168, 0, 1, 192, 168, 0, 199,
        ];
        assert_eq!(!fold(sum(&header)), 0xb861);
    }

    #[test]
    fn frames_read_back_as_they_were_made() {
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
    fn any_changed_byte_is_noticed() {
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
    fn a_gso_header_says_what_the_frame_is() {
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
    fn what_cannot_be_is_refused() {
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
