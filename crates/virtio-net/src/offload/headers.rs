//! Where a frame's headers lie, as read from the private copy.

use super::OffloadFault;
use crate::header::MIN_FRAME;

/// Most bytes of all headers together, which every segment repeats: Ethernet, two tags, the longest
/// of IPv4 and TCP, or an ordinary set of IPv6 extension headers.
pub(super) const MAX_HEADERS_LEN: usize = 256;

/// Protocol numbers of IP.
pub(super) const IPPROTO_TCP: u8 = 6;
pub(super) const IPPROTO_UDP: u8 = 17;
const IPPROTO_HOPOPTS: u8 = 0;
const IPPROTO_ROUTING: u8 = 43;
const IPPROTO_FRAGMENT: u8 = 44;
const IPPROTO_DSTOPTS: u8 = 60;

const ETHERTYPE_OFFSET: usize = 12;
const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;
const VLAN_ETHERTYPES: [u16; 3] = [0x8100, 0x88a8, 0x9100];
const MAX_VLAN_TAGS: usize = 2;

/// A version of IP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum IpVersion {
    V4,
    V6,
}

/// Where the headers of an IP packet lie in its frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PacketLayout {
    pub(super) version: IpVersion,
    /// First byte of the IP header.
    pub(super) network: usize,
    /// First byte behind the IP header and its extensions.
    pub(super) transport: usize,
    /// The byte that names the protocol found there.
    pub(super) next_header: usize,
}

impl PacketLayout {
    /// Finds the headers up to one of `protocol`.
    pub(super) fn parse(frame: &[u8], protocol: u8) -> Result<Self, OffloadFault> {
        let (ethertype, network) = skip_vlan_tags(frame)?;
        let layout = match ethertype {
            ETH_P_IP => Self::ipv4(frame, network)?,
            ETH_P_IPV6 => Self::ipv6(frame, network)?,
            _ => return Err(OffloadFault::WrongProtocol),
        };
        match frame.get(layout.next_header).copied() {
            Some(found) if found == protocol => Ok(layout),
            Some(IPPROTO_FRAGMENT) if layout.version == IpVersion::V6 => {
                Err(OffloadFault::AlreadyFragmented)
            }
            _ => Err(OffloadFault::WrongProtocol),
        }
    }

    fn ipv4(frame: &[u8], network: usize) -> Result<Self, OffloadFault> {
        let first = read_u8(frame, network)?;
        if first >> 4 != 4 {
            return Err(OffloadFault::WrongProtocol);
        }
        let len = usize::from(first & 0xf) * 4;
        if len < 20 || network + len > frame.len() {
            return Err(OffloadFault::HeaderTruncated);
        }
        // More fragments, or an offset: DF alone does not count.
        if read_be16(frame, network + 6)? & 0x3fff != 0 {
            return Err(OffloadFault::AlreadyFragmented);
        }
        Ok(Self {
            version: IpVersion::V4,
            network,
            transport: network + len,
            next_header: network + 9,
        })
    }

    fn ipv6(frame: &[u8], network: usize) -> Result<Self, OffloadFault> {
        if read_u8(frame, network)? >> 4 != 6 {
            return Err(OffloadFault::WrongProtocol);
        }
        let (mut at, mut next_header) = (network + 40, network + 6);
        // Each extension header is at least 8 bytes: the bound ends the loop.
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
                network,
                transport: at,
                next_header,
            }),
        }
    }
}

/// The EtherType behind the tags (802.1Q, 802.1ad), and where the packet begins.
fn skip_vlan_tags(frame: &[u8]) -> Result<(u16, usize), OffloadFault> {
    let mut at = ETHERTYPE_OFFSET;
    for _ in 0..MAX_VLAN_TAGS {
        if !VLAN_ETHERTYPES.contains(&read_be16(frame, at)?) {
            break;
        }
        at += 4;
    }
    Ok((read_be16(frame, at)?, at + MIN_FRAME - ETHERTYPE_OFFSET))
}

/// Length of the TCP header at `at`.
pub(super) fn tcp_header_len(frame: &[u8], at: usize) -> Result<usize, OffloadFault> {
    let len = usize::from(read_u8(frame, at + 12)? >> 4) * 4;
    match len < 20 || at + len > frame.len() {
        true => Err(OffloadFault::HeaderTruncated),
        false => Ok(len),
    }
}

pub(super) fn read_u8(bytes: &[u8], at: usize) -> Result<u8, OffloadFault> {
    bytes.get(at).copied().ok_or(OffloadFault::HeaderTruncated)
}

pub(super) fn read_be16(bytes: &[u8], at: usize) -> Result<u16, OffloadFault> {
    let word = bytes.get(at..).and_then(|rest| rest.first_chunk());
    word.map(|word| u16::from_be_bytes(*word))
        .ok_or(OffloadFault::HeaderTruncated)
}

/// Writes a word where a parser saw that one is; nowhere else.
pub(super) fn write_be16(bytes: &mut [u8], at: usize, word: u16) {
    if let Some(field) = bytes.get_mut(at..).and_then(|rest| rest.first_chunk_mut()) {
        *field = word.to_be_bytes();
    }
}

/// Writes the IP header's length of a packet that begins at `layout.network` and goes to the end of
/// `frame`, which [`ip_len_field`] has seen.
pub(super) fn write_ip_len(frame: &mut [u8], layout: &PacketLayout) {
    let at = match layout.version {
        IpVersion::V4 => layout.network + 2,
        IpVersion::V6 => layout.network + 4,
    };
    let len = ip_len_field(frame.len(), layout).unwrap_or(u16::MAX);
    write_be16(frame, at, len);
}

/// What the IP header's length field says in a frame of `len` bytes.
pub(super) fn ip_len_field(len: usize, layout: &PacketLayout) -> Result<u16, OffloadFault> {
    let counted_from = match layout.version {
        IpVersion::V4 => layout.network,
        IpVersion::V6 => layout.network + 40,
    };
    u16::try_from(len.saturating_sub(counted_from)).map_err(|_| OffloadFault::FrameTooLong)
}
