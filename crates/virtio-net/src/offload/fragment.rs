//! UDP fragmentation (gso_type UDP): a datagram of up to 64 KiB becomes IP fragments.
//!
//! The UDP checksum is that of the whole datagram. Each fragment carries `gso_size` bytes of it,
//! UDP header included, rounded down to a multiple of 8 (RFC 791 §3.2, RFC 8200 §4.5). In IPv4 all
//! have the datagram's own identification, and DF is cleared, as Linux does. In IPv6 a fragment
//! header goes behind all extension headers, so that every fragment repeats them.

use std::hash::{BuildHasher, RandomState};

use super::batch::Batch;
use super::headers::{self, Layout, UDP, Version, put_len, put_word};
use super::{CsumField, OffloadFault, checksum, requested_size};
use crate::header::VnetHeader;
use crate::port::TxFrame;

const HEADER_LEN: usize = 8;
const CHECKSUM: usize = 6;
const FRAGMENT: u8 = 44;
/// Bytes of IPv6's fragment header.
const FRAGMENT_LEN: usize = 8;

/// A datagram that can be fragmented: everything about it has been checked.
#[derive(Debug)]
pub(super) struct Plan {
    layout: Layout,
    field: CsumField,
    /// Bytes of each fragment behind its headers: a multiple of 8.
    size: usize,
}

impl Plan {
    pub(super) fn new(
        frame: &[u8],
        request: &VnetHeader,
        field: CsumField,
    ) -> Result<Self, OffloadFault> {
        let layout = Layout::parse(frame, UDP)?;
        if layout.transport + HEADER_LEN > frame.len() {
            return Err(OffloadFault::HeaderCut);
        }
        if layout.transport + HEADER_LEN + FRAGMENT_LEN > headers::MAX_HEADERS {
            return Err(OffloadFault::HeadersTooLong);
        }
        let expected = CsumField {
            start: layout.transport,
            offset: CHECKSUM,
        };
        let size = requested_size(request, field, expected)?;
        // What the fragments make when they are put together again must be a packet.
        headers::packet_len(frame.len(), &layout)?;
        Ok(Self {
            layout,
            field,
            size: size / 8 * 8,
        })
    }
}

/// Completes the datagram's checksum and cuts it up. `identification` is for IPv6.
pub(super) fn run(
    plan: &Plan,
    frame: &mut [u8],
    identification: u32,
    batch: &mut Batch,
    emit: &mut impl FnMut(&[TxFrame<'_>]),
) {
    checksum::fill(frame, plan.field);
    let (headers, datagram) = frame.split_at(plan.layout.transport);
    let is_whole = datagram.len() <= plan.size;
    let count = datagram.len().div_ceil(plan.size);
    for (n, piece) in datagram.chunks(plan.size).enumerate() {
        let place = Place {
            at: u16::try_from(n * plan.size).unwrap_or(u16::MAX),
            is_last: n + 1 == count,
        };
        match plan.layout.version {
            _ if is_whole => write_whole(batch.add(&[headers, piece], emit), plan),
            Version::V4 => write_ipv4(batch.add(&[headers, piece], emit), plan, place),
            Version::V6 => {
                let extension = place.fragment_header(identification);
                let fragment = batch.add(&[headers, &extension, piece], emit);
                put_len(fragment, &plan.layout);
                if let Some(next) = fragment.get_mut(plan.layout.next_header) {
                    *next = FRAGMENT;
                }
            }
        }
    }
}

/// Which fragment.
#[derive(Clone, Copy)]
struct Place {
    /// First byte of the datagram; a multiple of 8.
    at: u16,
    is_last: bool,
}

impl Place {
    fn fragment_header(self, identification: u32) -> [u8; FRAGMENT_LEN] {
        let [high, low] = (self.at | u16::from(!self.is_last)).to_be_bytes();
        let [a, b, c, d] = identification.to_be_bytes();
        [UDP, 0, high, low, a, b, c, d]
    }
}

/// A datagram that needs no fragments: the length may still have lied.
fn write_whole(frame: &mut [u8], plan: &Plan) {
    put_len(frame, &plan.layout);
    if let Some(ip) = frame.get_mut(plan.layout.network..plan.layout.transport)
        && plan.layout.version == Version::V4
    {
        checksum::fill_ipv4(ip);
    }
}

fn write_ipv4(fragment: &mut [u8], plan: &Plan, place: Place) {
    put_len(fragment, &plan.layout);
    let Some(ip) = fragment.get_mut(plan.layout.network..plan.layout.transport) else {
        return;
    };
    let more = u16::from(!place.is_last) << 13;
    put_word(ip, 6, place.at >> 3 | more);
    checksum::fill_ipv4(ip);
}

/// Identifications of IPv6 fragments: each value once in 2^32, from a start and in steps that
/// nobody can guess (RFC 7739).
#[derive(Debug)]
pub(super) struct Identifications {
    last: u32,
    /// Odd, so that every value comes.
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
    fn identifications_do_not_repeat_soon() {
        let mut identifications = Identifications::default();
        let mut seen: Vec<u32> = (0..10_000).map(|_| identifications.next()).collect();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), 10_000);
    }
}
