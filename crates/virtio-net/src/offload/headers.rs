//! The layout of a frame's packet headers, read from the private copy.

use super::OffloadFault;
use crate::packet::{
    IPPROTO_DSTOPTS, IPPROTO_FRAGMENT, IPPROTO_HOPOPTS, IPPROTO_ROUTING, IPV6_HEADER_LEN, IpHeader,
    IpVersion, PacketFault,
};

/// The most bytes of all headers together, which every segment repeats: Ethernet, two VLAN tags,
/// and the longest IPv4 and TCP headers or an ordinary set of IPv6 extension headers.
pub(super) const MAX_HEADERS_LEN: usize = 256;

/// Where in its frame the headers of an IP packet are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PacketLayout {
    pub(super) version: IpVersion,
    /// The first byte of the IP header.
    pub(super) network: usize,
    /// The first byte behind the IP header and its extension headers.
    pub(super) transport: usize,
    /// The byte that names the protocol at `transport`.
    pub(super) next_header: usize,
}

impl PacketLayout {
    /// Finds the headers of a packet of `protocol`.
    pub(super) fn parse(frame: &[u8], protocol: u8) -> Result<Self, OffloadFault> {
        let ip = IpHeader::parse(frame)?;
        let layout = match ip.version {
            IpVersion::V4 => Self::ipv4(frame, &ip)?,
            IpVersion::V6 => Self::ipv6(frame, &ip)?,
        };
        match frame.get(layout.next_header).copied() {
            Some(found) if found == protocol => Ok(layout),
            Some(IPPROTO_FRAGMENT) if layout.version == IpVersion::V6 => {
                Err(OffloadFault::AlreadyFragmented)
            }
            _ => Err(OffloadFault::WrongProtocol),
        }
    }

    fn ipv4(frame: &[u8], ip: &IpHeader) -> Result<Self, OffloadFault> {
        if ip.offset + ip.len > frame.len() {
            return Err(OffloadFault::HeaderTruncated);
        }
        if ip.is_fragment {
            return Err(OffloadFault::AlreadyFragmented);
        }
        Ok(Self {
            version: IpVersion::V4,
            network: ip.offset,
            transport: ip.offset + ip.len,
            next_header: ip.protocol_offset(),
        })
    }

    fn ipv6(frame: &[u8], ip: &IpHeader) -> Result<Self, OffloadFault> {
        let (mut at, mut next_header) = (ip.offset + ip.len, ip.protocol_offset());
        // Each extension header has at least 8 bytes, so the limit ends the loop.
        while let IPPROTO_HOPOPTS | IPPROTO_ROUTING | IPPROTO_DSTOPTS = read_u8(frame, next_header)?
        {
            next_header = at;
            at += (usize::from(read_u8(frame, at + 1)?) + 1) * 8;
            if at > MAX_HEADERS_LEN {
                return Err(OffloadFault::HeadersTooLong);
            }
        }
        match at > frame.len() {
            true => Err(OffloadFault::HeaderTruncated),
            false => Ok(Self {
                version: IpVersion::V6,
                network: ip.offset,
                transport: at,
                next_header,
            }),
        }
    }
}

impl From<PacketFault> for OffloadFault {
    fn from(fault: PacketFault) -> Self {
        match fault {
            PacketFault::Truncated => Self::HeaderTruncated,
            PacketFault::NotIp => Self::WrongProtocol,
        }
    }
}

/// The length of the TCP header at `at`.
pub(super) fn tcp_header_len(frame: &[u8], at: usize) -> Result<usize, OffloadFault> {
    let len = usize::from(read_u8(frame, at + 12)? >> 4) * 4;
    match len < 20 || at + len > frame.len() {
        true => Err(OffloadFault::HeaderTruncated),
        false => Ok(len),
    }
}

fn read_u8(bytes: &[u8], at: usize) -> Result<u8, OffloadFault> {
    bytes.get(at).copied().ok_or(OffloadFault::HeaderTruncated)
}

/// Writes a 16-bit field that the parser found; does nothing where it is not within `bytes`.
pub(super) fn write_be16(bytes: &mut [u8], at: usize, word: u16) {
    if let Some(field) = bytes.get_mut(at..).and_then(|rest| rest.first_chunk_mut()) {
        *field = word.to_be_bytes();
    }
}

/// Writes the length field of the IP header at `layout.network` for a packet that extends to the
/// end of `frame`. [`ip_len_field`] has accepted that length.
pub(super) fn write_ip_len(frame: &mut [u8], layout: &PacketLayout) {
    let at = match layout.version {
        IpVersion::V4 => layout.network + 2,
        IpVersion::V6 => layout.network + 4,
    };
    let len = ip_len_field(frame.len(), layout).unwrap_or(u16::MAX);
    write_be16(frame, at, len);
}

/// The value of the IP header's length field in a frame of `len` bytes.
pub(super) fn ip_len_field(len: usize, layout: &PacketLayout) -> Result<u16, OffloadFault> {
    let counted_from = match layout.version {
        IpVersion::V4 => layout.network,
        IpVersion::V6 => layout.network + IPV6_HEADER_LEN,
    };
    u16::try_from(len.saturating_sub(counted_from)).map_err(|_| OffloadFault::FrameTooLong)
}
