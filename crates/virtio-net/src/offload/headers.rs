//! Where a frame's headers lie, as read from the private copy.

use super::OffloadFault;
use crate::header::MIN_FRAME;

/// Most bytes of all headers together, which every segment repeats: Ethernet, two tags, the longest
/// of IPv4 and TCP, or an ordinary set of IPv6 extension headers.
pub(super) const MAX_HEADERS: usize = 256;

/// Protocol numbers of IP.
pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION: u8 = 60;

const ETHERTYPE: usize = 12;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const TAGS: [u16; 3] = [0x8100, 0x88a8, 0x9100];
const MAX_TAGS: usize = 2;

/// A version of IP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Version {
    V4,
    V6,
}

/// Where the headers of an IP packet lie in its frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) version: Version,
    /// First byte of the IP header.
    pub(super) network: usize,
    /// First byte behind the IP header and its extensions.
    pub(super) transport: usize,
    /// The byte that names the protocol found there.
    pub(super) next_header: usize,
}

impl Layout {
    /// Finds the headers up to one of `protocol`.
    pub(super) fn parse(frame: &[u8], protocol: u8) -> Result<Self, OffloadFault> {
        let (ethertype, network) = skip_tags(frame)?;
        let layout = match ethertype {
            IPV4 => Self::ipv4(frame, network)?,
            IPV6 => Self::ipv6(frame, network)?,
            _ => return Err(OffloadFault::WrongProtocol),
        };
        match frame.get(layout.next_header).copied() {
            Some(found) if found == protocol => Ok(layout),
            Some(FRAGMENT) if layout.version == Version::V6 => Err(OffloadFault::Fragment),
            _ => Err(OffloadFault::WrongProtocol),
        }
    }

    fn ipv4(frame: &[u8], network: usize) -> Result<Self, OffloadFault> {
        let first = byte_at(frame, network)?;
        if first >> 4 != 4 {
            return Err(OffloadFault::WrongProtocol);
        }
        let len = usize::from(first & 0xf) * 4;
        if len < 20 || network + len > frame.len() {
            return Err(OffloadFault::HeaderCut);
        }
        // More fragments, or an offset: DF alone does not count.
        if word_at(frame, network + 6)? & 0x3fff != 0 {
            return Err(OffloadFault::Fragment);
        }
        Ok(Self {
            version: Version::V4,
            network,
            transport: network + len,
            next_header: network + 9,
        })
    }

    fn ipv6(frame: &[u8], network: usize) -> Result<Self, OffloadFault> {
        if byte_at(frame, network)? >> 4 != 6 {
            return Err(OffloadFault::WrongProtocol);
        }
        let (mut at, mut next_header) = (network + 40, network + 6);
        // Each extension header is at least 8 bytes: the bound ends the loop.
        while let HOP_BY_HOP | ROUTING | DESTINATION = byte_at(frame, next_header)? {
            next_header = at;
            at += (usize::from(byte_at(frame, at + 1)?) + 1) * 8;
            if at > MAX_HEADERS {
                return Err(OffloadFault::HeadersTooLong);
            }
        }
        match at > frame.len() {
            true => Err(OffloadFault::HeaderCut),
            false => Ok(Self {
                version: Version::V6,
                network,
                transport: at,
                next_header,
            }),
        }
    }
}

/// The EtherType behind the tags (802.1Q, 802.1ad), and where the packet begins.
fn skip_tags(frame: &[u8]) -> Result<(u16, usize), OffloadFault> {
    let mut at = ETHERTYPE;
    for _ in 0..MAX_TAGS {
        if !TAGS.contains(&word_at(frame, at)?) {
            break;
        }
        at += 4;
    }
    Ok((word_at(frame, at)?, at + MIN_FRAME - ETHERTYPE))
}

/// Length of the TCP header at `at`.
pub(super) fn tcp_len(frame: &[u8], at: usize) -> Result<usize, OffloadFault> {
    let len = usize::from(byte_at(frame, at + 12)? >> 4) * 4;
    match len < 20 || at + len > frame.len() {
        true => Err(OffloadFault::HeaderCut),
        false => Ok(len),
    }
}

pub(super) fn byte_at(bytes: &[u8], at: usize) -> Result<u8, OffloadFault> {
    bytes.get(at).copied().ok_or(OffloadFault::HeaderCut)
}

pub(super) fn word_at(bytes: &[u8], at: usize) -> Result<u16, OffloadFault> {
    let word = bytes.get(at..).and_then(|rest| rest.first_chunk());
    word.map(|word| u16::from_be_bytes(*word))
        .ok_or(OffloadFault::HeaderCut)
}

/// Writes a word where a parser saw that one is; nowhere else.
pub(super) fn put_word(bytes: &mut [u8], at: usize, word: u16) {
    if let Some(place) = bytes.get_mut(at..).and_then(|rest| rest.first_chunk_mut()) {
        *place = word.to_be_bytes();
    }
}

/// Writes the IP header's length of a packet that begins at `layout.network` and goes to the end of
/// `frame`, which [`packet_len`] has seen.
pub(super) fn put_len(frame: &mut [u8], layout: &Layout) {
    let at = match layout.version {
        Version::V4 => layout.network + 2,
        Version::V6 => layout.network + 4,
    };
    let len = packet_len(frame.len(), layout).unwrap_or(u16::MAX);
    put_word(frame, at, len);
}

/// What the IP header's length field says in a frame of `len` bytes.
pub(super) fn packet_len(len: usize, layout: &Layout) -> Result<u16, OffloadFault> {
    let counted_from = match layout.version {
        Version::V4 => layout.network,
        Version::V6 => layout.network + 40,
    };
    u16::try_from(len.saturating_sub(counted_from)).map_err(|_| OffloadFault::FrameTooLong)
}
