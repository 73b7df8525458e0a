//! Parsing a frame and verifying its checksums.

use std::net::IpAddr;
use std::ops::Range;

use super::checksum::{fold, pseudo_header_sum, sum};
use super::transport::{
    ETHERNET_LEN, ETHERTYPE_IPV4, ETHERTYPE_IPV6, ETHERTYPE_VLAN, Frame, FrameError, IPV6_LEN, TCP,
    Transport, UDP,
};
use crate::header::{VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_NONE};

/// The fields of a TCP or UDP frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParsedFrame {
    /// The tag control information, if the frame has a VLAN tag.
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
    /// The offset of the IP header in bytes.
    ip_start: usize,
    /// The position of the transport header and payload in the frame.
    pub segment: Range<usize>,
    /// The position of the payload in the frame, without Ethernet padding.
    pub payload: Range<usize>,
}

impl ParsedFrame {
    /// Parses `bytes`, from the Ethernet header on.
    ///
    /// # Errors
    /// When they are not a complete TCP or UDP frame.
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

/// Parses a frame and verifies its IP and transport checksums. The transport checksum must be
/// complete without VIRTIO_NET_HDR_F_NEEDS_CSUM. With it, it must be that of the pseudo header, and
/// `csum_start` and `csum_offset` must point to it (virtio 1.3 §5.1.6.2).
///
/// # Errors
/// When the frame cannot be parsed or a checksum is wrong.
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
    let pseudo = pseudo_header_sum(
        parsed.source,
        parsed.target,
        parsed.transport,
        segment.len(),
    );
    let is_correct = if frame.header.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM != 0 {
        let start = usize::from(frame.header.csum_start);
        let at = usize::from(frame.header.csum_offset);
        start == parsed.segment.start && at == offset && field == fold(pseudo)
    } else {
        fold(pseudo + sum(segment)) == 0xffff && frame.header.gso_type == VIRTIO_NET_HDR_GSO_NONE
    };
    if is_correct {
        Ok(parsed)
    } else {
        Err(FrameError::Checksum("transport"))
    }
}

/// The source and destination address of an IP header of `ip_len` bytes at offset `ip`.
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

/// The big-endian 16-bit number at offset `at`.
fn word(bytes: &[u8], at: usize) -> Option<u16> {
    let pair = bytes.get(at..at + 2)?;
    Some(u16::from_be_bytes([pair[0], pair[1]]))
}
