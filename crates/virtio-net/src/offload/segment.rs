//! TCP segmentation: a frame of many segments becomes one frame each.
//!
//! Every segment gets the frame's headers with: the length and, in IPv4, the next identification
//! (RFC 6864 leaves it free; Linux counts on) and the header checksum; the sequence number of its
//! first byte; CWR in the first only, FIN and PSH in the last only (RFC 3168 §6.1.2, RFC 9293).

use super::batch::Batch;
use super::headers::{self, Layout, TCP, Version, put_len, put_word, word_at};
use super::{CsumField, OffloadFault, checksum, requested_size};
use crate::header::VnetHeader;
use crate::port::TxFrame;

const CHECKSUM: usize = 16;
const SEQUENCE: usize = 4;
const FLAGS: usize = 13;
const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;

/// A frame that can be segmented: everything about it has been checked.
#[derive(Debug)]
pub(super) struct Plan {
    layout: Layout,
    field: CsumField,
    /// Bytes of all headers.
    headers: usize,
    /// Bytes of payload in each segment.
    size: usize,
    /// Bytes from the TCP header to the frame's end, as the pseudo header has it.
    len: u16,
}

impl Plan {
    pub(super) fn new(
        frame: &[u8],
        version: Version,
        request: &VnetHeader,
        field: CsumField,
    ) -> Result<Self, OffloadFault> {
        let layout = Layout::parse(frame, TCP)?;
        if layout.version != version {
            return Err(OffloadFault::WrongProtocol);
        }
        let headers = layout.transport + headers::tcp_len(frame, layout.transport)?;
        if headers > headers::MAX_HEADERS {
            return Err(OffloadFault::HeadersTooLong);
        }
        let expected = CsumField {
            start: layout.transport,
            offset: CHECKSUM,
        };
        let size = requested_size(request, field, expected)?;
        headers::packet_len(frame.len().min(headers + size), &layout)?;
        let len = u16::try_from(frame.len() - layout.transport)
            .map_err(|_| OffloadFault::FrameTooLong)?;
        Ok(Self {
            layout,
            field,
            headers,
            size,
            len,
        })
    }
}

/// Cuts `frame` up; with `partial` the checksums are left to the target.
pub(super) fn run(
    plan: &Plan,
    frame: &[u8],
    partial: bool,
    batch: &mut Batch,
    emit: &mut impl FnMut(&[TxFrame<'_>]),
) {
    if partial {
        batch.set_header(plan.field.partial());
    }
    let (headers, payload) = frame.split_at(plan.headers);
    let source = Source::of(headers, plan);
    let mut at = 0;
    // A frame without payload is one segment too.
    loop {
        let rest = payload.get(at..).unwrap_or_default();
        let piece = &rest[..rest.len().min(plan.size)];
        let place = Place {
            number: at / plan.size,
            at,
            is_last: piece.len() == rest.len(),
        };
        let segment = batch.add(&[headers, piece], emit);
        source.write(segment, plan, place, partial);
        at += piece.len();
        if place.is_last {
            return;
        }
    }
}

/// What the frame's headers hold that differs from segment to segment.
struct Source {
    identification: u16,
    sequence: u32,
    flags: u8,
    /// The pseudo header's sum for the whole frame.
    seed: u16,
}

/// Which segment.
#[derive(Clone, Copy)]
struct Place {
    number: usize,
    /// First byte of the payload.
    at: usize,
    is_last: bool,
}

impl Source {
    fn of(headers: &[u8], plan: &Plan) -> Self {
        let tcp = plan.layout.transport;
        let word = |at| word_at(headers, at).unwrap_or(0);
        let sequence = u32::from(word(tcp + SEQUENCE)) << 16 | u32::from(word(tcp + SEQUENCE + 2));
        Self {
            identification: word(plan.layout.network + 4),
            sequence,
            flags: headers.get(tcp + FLAGS).copied().unwrap_or(0),
            seed: checksum::seed(headers, plan.field),
        }
    }

    /// Makes a copy of the frame's headers those of a segment.
    fn write(&self, segment: &mut [u8], plan: &Plan, place: Place, partial: bool) {
        let layout = &plan.layout;
        put_len(segment, layout);
        if let Some(ip) = segment.get_mut(layout.network..layout.transport)
            && layout.version == Version::V4
        {
            let number = u16::try_from(place.number).unwrap_or(0);
            put_word(ip, 4, self.identification.wrapping_add(number));
            checksum::fill_ipv4(ip);
        }
        let Some(tcp) = segment.get_mut(layout.transport..) else {
            return;
        };
        let at = u32::try_from(place.at).unwrap_or(0);
        let sequence = self.sequence.wrapping_add(at).to_be_bytes();
        if let Some(field) = tcp.get_mut(SEQUENCE..SEQUENCE + 4) {
            field.copy_from_slice(&sequence);
        }
        if let Some(flags) = tcp.get_mut(FLAGS) {
            *flags = self.flags_at(place);
        }
        let len = u16::try_from(tcp.len()).unwrap_or(plan.len);
        let seed = checksum::with_length(self.seed, plan.len, len);
        checksum::fill_segment(tcp, CHECKSUM, seed, partial);
    }

    fn flags_at(&self, place: Place) -> u8 {
        let first = if place.at == 0 { 0xff } else { !CWR };
        let last = if place.is_last { 0xff } else { !(FIN | PSH) };
        self.flags & first & last
    }
}
