//! UDP fragmentation (gso_type UDP): a datagram of up to 64 KiB becomes IP fragments.
//!
//! The UDP checksum is that of the whole datagram. Each fragment carries `gso_size` bytes of it,
//! UDP header included, rounded down to a multiple of 8 (RFC 791 §3.2, RFC 8200 §4.5). In IPv4 all
//! fragments have the datagram's identification, and DF is cleared, as in Linux. In IPv6 the
//! fragment header follows all extension headers, so that every fragment repeats them.

use std::hash::{BuildHasher, RandomState};

use super::batch::Batch;
use super::headers::{self, PacketLayout, write_be16, write_ip_len};
use super::{CsumField, OffloadFault, checksum, validate_gso_size};
use crate::header::VnetHeader;
use crate::packet::{IPPROTO_FRAGMENT, IPPROTO_UDP, IpVersion};
use crate::uplink::TxFrame;

const UDP_HEADER_LEN: usize = 8;
const UDP_CHECKSUM_OFFSET: usize = 6;
/// The number of bytes of the fragment header of IPv6.
const IPV6_FRAGMENT_HEADER_LEN: usize = 8;

/// A datagram that has passed all checks and can be fragmented.
#[derive(Debug)]
pub(super) struct UdpFragmentation {
    layout: PacketLayout,
    field: CsumField,
    /// The number of payload bytes of each fragment: a multiple of 8.
    size: usize,
}

impl UdpFragmentation {
    pub(super) fn new(
        frame: &[u8],
        request: &VnetHeader,
        field: CsumField,
    ) -> Result<Self, OffloadFault> {
        let layout = PacketLayout::parse(frame, IPPROTO_UDP)?;
        if layout.transport + UDP_HEADER_LEN > frame.len() {
            return Err(OffloadFault::HeaderTruncated);
        }
        if layout.transport + UDP_HEADER_LEN + IPV6_FRAGMENT_HEADER_LEN > headers::MAX_HEADERS_LEN {
            return Err(OffloadFault::HeadersTooLong);
        }
        let expected = CsumField {
            start: layout.transport,
            offset: UDP_CHECKSUM_OFFSET,
        };
        let size = validate_gso_size(request, field, expected)?;
        // The reassembled fragments must be a packet of a valid length.
        headers::ip_len_field(frame.len(), &layout)?;
        Ok(Self {
            layout,
            field,
            size: size / 8 * 8,
        })
    }
}

/// Completes the datagram's checksum and emits its fragments. `identification` is for IPv6.
pub(super) fn fragment_datagram(
    fragmentation: &UdpFragmentation,
    frame: &mut [u8],
    identification: u32,
    batch: &mut Batch,
    emit: &mut impl FnMut(&[TxFrame<'_>]),
) {
    checksum::write_checksum(frame, fragmentation.field);
    let (headers, datagram) = frame.split_at(fragmentation.layout.transport);
    let is_whole = datagram.len() <= fragmentation.size;
    let count = datagram.len().div_ceil(fragmentation.size);
    for (n, chunk) in datagram.chunks(fragmentation.size).enumerate() {
        let position = FragmentPosition {
            at: u16::try_from(n * fragmentation.size).unwrap_or(u16::MAX),
            is_last: n + 1 == count,
        };
        match fragmentation.layout.version {
            _ if is_whole => write_whole(batch.add(&[headers, chunk], emit), fragmentation),
            IpVersion::V4 => {
                write_ipv4(batch.add(&[headers, chunk], emit), fragmentation, position)
            }
            IpVersion::V6 => {
                let extension = position.fragment_header(identification);
                let fragment = batch.add(&[headers, &extension, chunk], emit);
                write_ip_len(fragment, &fragmentation.layout);
                if let Some(next) = fragment.get_mut(fragmentation.layout.next_header) {
                    *next = IPPROTO_FRAGMENT;
                }
            }
        }
    }
}

/// The position of a fragment in its datagram.
#[derive(Clone, Copy)]
struct FragmentPosition {
    /// The offset of the fragment's first byte; a multiple of 8.
    at: u16,
    is_last: bool,
}

impl FragmentPosition {
    fn fragment_header(self, identification: u32) -> [u8; IPV6_FRAGMENT_HEADER_LEN] {
        let [high, low] = (self.at | u16::from(!self.is_last)).to_be_bytes();
        let [a, b, c, d] = identification.to_be_bytes();
        [IPPROTO_UDP, 0, high, low, a, b, c, d]
    }
}

/// Completes a datagram that needs no fragments. Its length field may still have been wrong.
fn write_whole(frame: &mut [u8], fragmentation: &UdpFragmentation) {
    write_ip_len(frame, &fragmentation.layout);
    if let Some(ip) = frame.get_mut(fragmentation.layout.network..fragmentation.layout.transport)
        && fragmentation.layout.version == IpVersion::V4
    {
        checksum::write_ipv4_checksum(ip);
    }
}

fn write_ipv4(fragment: &mut [u8], fragmentation: &UdpFragmentation, position: FragmentPosition) {
    write_ip_len(fragment, &fragmentation.layout);
    let Some(ip) = fragment.get_mut(fragmentation.layout.network..fragmentation.layout.transport)
    else {
        return;
    };
    let more = u16::from(!position.is_last) << 13;
    write_be16(ip, 6, position.at >> 3 | more);
    checksum::write_ipv4_checksum(ip);
}

/// Generates the identifications of IPv6 fragments: each value once in 2^32, with a random start
/// and a random step, which an attacker cannot guess (RFC 7739).
#[derive(Debug)]
pub(super) struct Identifications {
    last: u32,
    /// Odd, so that every value is generated.
    step: u32,
}

impl Default for Identifications {
    fn default() -> Self {
        let [a, b, c, d, e, f, g, h] = RandomState::new().hash_one(0).to_ne_bytes();
        Self {
            last: u32::from_ne_bytes([a, b, c, d]),
            step: u32::from_ne_bytes([e, f, g, h]) | 1,
        }
    }
}

impl Identifications {
    pub(super) fn next(&mut self) -> u32 {
        self.last = self.last.wrapping_add(self.step);
        self.last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_thousand_identifications_are_all_different() {
        let mut identifications = Identifications::default();
        let mut seen: Vec<u32> = (0..10_000).map(|_| identifications.next()).collect();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), 10_000);
    }
}
