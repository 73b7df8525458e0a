//! TCP segmentation: one long frame becomes a frame for each segment.
//!
//! Every segment gets the frame's headers with these changes: its length; in IPv4 the next
//! identification (RFC 6864 leaves the value free; Linux increments it) and the header's checksum;
//! the sequence number of its first byte; CWR in the first segment only, FIN and PSH in the last
//! segment only (RFC 3168 §6.1.2, RFC 9293).

use super::batch::Batch;
use super::headers::{self, PacketLayout, write_be16, write_ip_len};
use super::{CsumField, OffloadFault, checksum, validate_gso_size};
use crate::header::VnetHeader;
use crate::packet::{IPPROTO_TCP, IpVersion, read_be16};
use crate::uplink::TxFrame;

const TCP_CHECKSUM_OFFSET: usize = 16;
const TCP_SEQUENCE_OFFSET: usize = 4;
const TCP_FLAGS_OFFSET: usize = 13;
const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;

/// A frame that has passed all checks and can be segmented.
#[derive(Debug)]
pub(super) struct TcpSegmentation {
    layout: PacketLayout,
    field: CsumField,
    /// The number of bytes of all headers together.
    headers: usize,
    /// The number of payload bytes of each segment.
    size: usize,
    /// The number of bytes from the TCP header to the frame's end, as in the pseudo header.
    len: u16,
}

impl TcpSegmentation {
    pub(super) fn new(
        frame: &[u8],
        version: IpVersion,
        request: &VnetHeader,
        field: CsumField,
    ) -> Result<Self, OffloadFault> {
        let layout = PacketLayout::parse(frame, IPPROTO_TCP)?;
        if layout.version != version {
            return Err(OffloadFault::WrongProtocol);
        }
        let headers = layout.transport + headers::tcp_header_len(frame, layout.transport)?;
        if headers > headers::MAX_HEADERS_LEN {
            return Err(OffloadFault::HeadersTooLong);
        }
        let expected = CsumField {
            start: layout.transport,
            offset: TCP_CHECKSUM_OFFSET,
        };
        let size = validate_gso_size(request, field, expected)?;
        headers::ip_len_field(frame.len().min(headers + size), &layout)?;
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

/// Emits the segments of `frame`; with `partial` the receiver completes the checksums.
pub(super) fn segment_frame(
    segmentation: &TcpSegmentation,
    frame: &[u8],
    partial: bool,
    batch: &mut Batch,
    emit: &mut impl FnMut(&[TxFrame<'_>]),
) {
    if partial {
        batch.set_header(segmentation.field.to_partial_header());
    }
    let (headers, payload) = frame.split_at(segmentation.headers);
    let template = HeaderTemplate::from_headers(headers, segmentation);
    let mut at = 0;
    // A frame without payload is one segment as well.
    loop {
        let rest = payload.get(at..).unwrap_or_default();
        let chunk = &rest[..rest.len().min(segmentation.size)];
        let position = SegmentPosition {
            number: at / segmentation.size,
            at,
            is_last: chunk.len() == rest.len(),
        };
        let segment = batch.add(&[headers, chunk], emit);
        template.write(segment, segmentation, position, partial);
        at += chunk.len();
        if position.is_last {
            return;
        }
    }
}

/// The frame's values of those header fields that differ between segments.
struct HeaderTemplate {
    identification: u16,
    sequence: u32,
    flags: u8,
    /// The pseudo header's sum of the whole frame.
    pseudo_sum: u16,
}

/// The position of a segment in its frame.
#[derive(Clone, Copy)]
struct SegmentPosition {
    number: usize,
    /// The offset of the segment's first payload byte.
    at: usize,
    is_last: bool,
}

impl HeaderTemplate {
    fn from_headers(headers: &[u8], segmentation: &TcpSegmentation) -> Self {
        let tcp = segmentation.layout.transport;
        let word = |at| read_be16(headers, at).unwrap_or(0);
        let sequence = u32::from(word(tcp + TCP_SEQUENCE_OFFSET)) << 16
            | u32::from(word(tcp + TCP_SEQUENCE_OFFSET + 2));
        Self {
            identification: word(segmentation.layout.network + 4),
            sequence,
            flags: headers.get(tcp + TCP_FLAGS_OFFSET).copied().unwrap_or(0),
            pseudo_sum: checksum::read_pseudo_sum(headers, segmentation.field),
        }
    }

    /// Changes a copy of the frame's headers into those of a segment.
    fn write(
        &self,
        segment: &mut [u8],
        segmentation: &TcpSegmentation,
        position: SegmentPosition,
        partial: bool,
    ) {
        let layout = &segmentation.layout;
        write_ip_len(segment, layout);
        if let Some(ip) = segment.get_mut(layout.network..layout.transport)
            && layout.version == IpVersion::V4
        {
            let number = u16::try_from(position.number).unwrap_or(0);
            write_be16(ip, 4, self.identification.wrapping_add(number));
            checksum::write_ipv4_checksum(ip);
        }
        let Some(tcp) = segment.get_mut(layout.transport..) else {
            return;
        };
        let at = u32::try_from(position.at).unwrap_or(0);
        let sequence = self.sequence.wrapping_add(at).to_be_bytes();
        if let Some(field) = tcp.get_mut(TCP_SEQUENCE_OFFSET..TCP_SEQUENCE_OFFSET + 4) {
            field.copy_from_slice(&sequence);
        }
        if let Some(flags) = tcp.get_mut(TCP_FLAGS_OFFSET) {
            *flags = self.flags_for(position);
        }
        let len = u16::try_from(tcp.len()).unwrap_or(segmentation.len);
        let pseudo_sum = checksum::replace_length(self.pseudo_sum, segmentation.len, len);
        checksum::write_segment_checksum(tcp, TCP_CHECKSUM_OFFSET, pseudo_sum, partial);
    }

    fn flags_for(&self, position: SegmentPosition) -> u8 {
        let first = if position.at == 0 { 0xff } else { !CWR };
        let last = if position.is_last { 0xff } else { !(FIN | PSH) };
        self.flags & first & last
    }
}
