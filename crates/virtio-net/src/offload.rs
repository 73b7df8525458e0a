//! Offloads in software (virtio 1.3 §5.1.6.2): for frames that request a checksum or GSO and whose
//! receiver did not negotiate it.
//!
//! ```text
//!              negotiated? ── yes ────────────────────────▶ the frame as it is, never copied
//! TxFrame ─────┤
//!              no ─▶ one copy to private memory ─▶ Segmenter
//!                       NEEDS_CSUM alone   the checksum is filled in        checksum.rs
//!                       TCPV4, TCPV6       TCP segments                     segment.rs
//!                       UDP                IP fragments, as in Linux        fragment.rs
//! ```
//!
//! The sending guest can change its memory at any time, and its header can be wrong. So the frame
//! is copied once, everything is read from the copy, `hdr_len` is ignored and the packet headers
//! are parsed (headers.rs). The header's `csum_start` and `csum_offset` must name the checksum that
//! the parser found, so that sender and receiver interpret the packet in the same way. Where header
//! and packet contradict each other, the result is an [`OffloadFault`], before any frame has been
//! emitted.
//!
//! A receiver that accepts partial checksums but not TSO gets segments with a partial checksum
//! each. That saves a pass over the data here, and in the receiving guest, which does not verify
//! them.
//!
//! The length fields of the IP header are not read but written: the packet extends to the end of
//! the frame, as in the kernel. Checksums start from the pseudo header's sum that the guest left in
//! the checksum field (virtio 1.3 §5.1.6.2), so they are right even where a routing header hides
//! the final destination.

mod batch;
mod checksum;
mod fragment;
mod headers;
mod segment;

use crate::header::{
    FrameFormat, MAX_FRAME, MIN_FRAME, VIRTIO_NET_HDR_F_DATA_VALID, VIRTIO_NET_HDR_F_NEEDS_CSUM,
    VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4,
    VIRTIO_NET_HDR_GSO_TCPV6, VIRTIO_NET_HDR_GSO_UDP, VNET_HEADER_LEN, VnetHeader,
};
use crate::packet::IpVersion;
use crate::stats::VringStats;
use crate::uplink::TxFrame;
use batch::Batch;
use fragment::Identifications;

/// The smallest `gso_size` that is accepted: the payload of a TCP segment at the smallest MTU of
/// IPv4 (68 bytes, RFC 791). It limits the frames that are made of one: 1 + [`MAX_FRAME`] / 24.
pub const MIN_GSO_SIZE: usize = 28;

/// The cost of an emitted frame beside that of its bytes.
const SEGMENT_WORK: usize = 512;

/// Whether a guest that negotiated `format` accepts a frame with this header as it is.
#[inline(always)]
#[must_use]
pub fn can_pass_unmodified(header: &VnetHeader, format: &FrameFormat) -> bool {
    header.flags() | header.gso_type() == 0 || is_request_supported(header, format)
}

fn is_request_supported(header: &VnetHeader, format: &FrameFormat) -> bool {
    let flags = header.flags();
    let partial = flags & VIRTIO_NET_HDR_F_NEEDS_CSUM != 0;
    let unknown = flags & !(VIRTIO_NET_HDR_F_NEEDS_CSUM | VIRTIO_NET_HDR_F_DATA_VALID) != 0;
    let gso = match GsoType::from_header(header) {
        Ok(GsoType::None) => true,
        Ok(GsoType::Tcp(IpVersion::V4)) => partial && format.tso4,
        Ok(GsoType::Tcp(IpVersion::V6)) => partial && format.tso6,
        Ok(GsoType::Udp) => partial && format.ufo,
        Err(_) => false,
    };
    let ecn = header.gso_type() & VIRTIO_NET_HDR_GSO_ECN != 0;
    !unknown && gso && (format.csum || flags == 0) && (format.ecn || !ecn)
}

/// The segmentation that a header requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum GsoType {
    None,
    Tcp(IpVersion),
    Udp,
}

impl GsoType {
    fn from_header(header: &VnetHeader) -> Result<Self, OffloadFault> {
        let with_ecn = header.gso_type();
        match with_ecn & !VIRTIO_NET_HDR_GSO_ECN {
            _ if with_ecn == VIRTIO_NET_HDR_GSO_NONE => Ok(Self::None),
            VIRTIO_NET_HDR_GSO_TCPV4 => Ok(Self::Tcp(IpVersion::V4)),
            VIRTIO_NET_HDR_GSO_TCPV6 => Ok(Self::Tcp(IpVersion::V6)),
            _ if with_ecn == VIRTIO_NET_HDR_GSO_UDP => Ok(Self::Udp),
            _ => Err(OffloadFault::GsoUnknown),
        }
    }
}

/// A contradiction between a frame's virtio-net header and its content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OffloadFault {
    /// The frame has fewer than [`MIN_FRAME`] bytes.
    #[error("the frame is too short for Ethernet")]
    FrameTooShort,
    /// The frame has more than [`MAX_FRAME`] bytes, or more than a length field of IP can express.
    #[error("the frame is too long for IP")]
    FrameTooLong,
    /// `gso_type` has a value that does not exist.
    #[error("gso_type has a value that does not exist")]
    GsoUnknown,
    /// The header requests GSO without NEEDS_CSUM.
    #[error("the header requests GSO without NEEDS_CSUM")]
    GsoWithoutCsum,
    /// `gso_size` is under [`MIN_GSO_SIZE`].
    #[error("gso_size is under {MIN_GSO_SIZE}")]
    GsoSizeTooSmall,
    /// The checksum lies in the Ethernet header or beyond the frame.
    #[error("the checksum lies outside the packet")]
    CsumOutOfPacket,
    /// The checksum to fill in is not the one of the transport header in the frame.
    #[error("csum_start and csum_offset do not name the packet's checksum")]
    CsumMismatch,
    /// The frame does not carry the protocol that gso_type names.
    #[error("gso_type does not name the packet's protocol")]
    WrongProtocol,
    /// A packet header extends beyond the frame, or is shorter than its kind can be.
    #[error("a packet header is truncated")]
    HeaderTruncated,
    /// All headers together are longer than what is repeated in each segment.
    #[error("the packet headers are too long")]
    HeadersTooLong,
    /// The packet is a fragment already.
    #[error("the header requests GSO for a packet that is a fragment")]
    AlreadyFragmented,
}

impl OffloadFault {
    /// Adds the fault to the counter of the vring that transmitted the frame.
    pub fn count(self, stats: &VringStats) {
        stats.offload_invalid.add(1);
    }
}

/// Performs in software the offloads that a receiver did not negotiate. Its buffers grow to the
/// longest frame so far (about 80 KiB each) and are reused; a thread needs only one.
#[derive(Debug, Default)]
pub struct Segmenter {
    /// The private copy of the frame.
    copy: Vec<u8>,
    batch: Batch,
    identifications: Identifications,
}

impl Segmenter {
    /// Creates a segmenter without buffers.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Converts `frame` into frames that a guest that negotiated `format` accepts
    /// ([`can_pass_unmodified`]), and passes them to `emit` in order, at most
    /// [`crate::uplink::MAX_BURST`] at once. They are valid during that call only.
    ///
    /// Call this only for frames that cannot pass unmodified: a frame that requests nothing is
    /// emitted unchanged, but copied. The emitted headers never have a flag other than NEEDS_CSUM.
    ///
    /// # Errors
    /// When the header contradicts the content; no frame has been emitted then.
    pub fn convert(
        &mut self,
        frame: &TxFrame<'_>,
        format: &FrameFormat,
        mut emit: impl FnMut(&[TxFrame<'_>]),
    ) -> Result<(), OffloadFault> {
        let gso = GsoType::from_header(&frame.header)?;
        let len = self.copy_frame(frame)?;
        let copy = &mut self.copy[..len];
        let partial = frame.header.flags() & VIRTIO_NET_HDR_F_NEEDS_CSUM != 0;
        let field = match partial {
            true => Some(CsumField::from_header(&frame.header, len)?),
            false if gso == GsoType::None => None,
            false => return Err(OffloadFault::GsoWithoutCsum),
        };
        self.batch.clear();
        match (gso, field) {
            (GsoType::Tcp(version), Some(field)) => {
                let segmentation =
                    segment::TcpSegmentation::new(copy, version, &frame.header, field)?;
                segment::segment_frame(
                    &segmentation,
                    copy,
                    format.csum,
                    &mut self.batch,
                    &mut emit,
                );
            }
            (GsoType::Udp, Some(field)) => {
                let fragmentation = fragment::UdpFragmentation::new(copy, &frame.header, field)?;
                let identification = self.identifications.next();
                fragment::fragment_datagram(
                    &fragmentation,
                    copy,
                    identification,
                    &mut self.batch,
                    &mut emit,
                );
            }
            (_, Some(field)) if format.csum => {
                batch::emit_single(copy, field.to_partial_header(), &mut emit);
            }
            (_, field) => {
                if let Some(field) = field {
                    checksum::write_checksum(copy, field);
                }
                batch::emit_single(copy, VnetHeader::default(), &mut emit);
            }
        }
        self.batch.flush(&mut emit);
        Ok(())
    }

    /// Copies the frame, reading it once; returns its length.
    fn copy_frame(&mut self, frame: &TxFrame<'_>) -> Result<usize, OffloadFault> {
        if frame.len > MAX_FRAME {
            return Err(OffloadFault::FrameTooLong);
        }
        if self.copy.len() < frame.len {
            self.copy.resize(frame.len, 0);
        }
        let mut len = 0;
        for slice in frame.payload {
            let Some(free) = self.copy.get_mut(len..frame.len) else {
                break;
            };
            len += slice.copy_to(free);
        }
        match len < MIN_FRAME {
            true => Err(OffloadFault::FrameTooShort),
            false => Ok(len),
        }
    }
}

/// The most that [`Segmenter::convert`] can cost for `frame`, as a number of bytes that can be
/// copied in the same time.
#[must_use]
pub fn conversion_work(frame: &TxFrame<'_>) -> usize {
    let segments = match frame.header.gso_size() {
        0 => 1,
        size => 1 + frame.len / usize::from(size).max(MIN_GSO_SIZE),
    };
    frame.len + segments * SEGMENT_WORK
}

/// The payload bytes of each frame that `request` asks for. The checksum field that it names,
/// `field`, must be that of the protocol, `expected`.
fn validate_gso_size(
    request: &VnetHeader,
    field: CsumField,
    expected: CsumField,
) -> Result<usize, OffloadFault> {
    let size = usize::from(request.gso_size());
    match size {
        _ if field != expected => Err(OffloadFault::CsumMismatch),
        0..MIN_GSO_SIZE => Err(OffloadFault::GsoSizeTooSmall),
        _ => Ok(size),
    }
}

/// The checksum field to fill in. It lies within the frame and behind its Ethernet header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct CsumField {
    /// The first byte that the checksum covers.
    start: usize,
    /// Where the checksum is stored, counted from `start`.
    offset: usize,
}

impl CsumField {
    fn from_header(header: &VnetHeader, len: usize) -> Result<Self, OffloadFault> {
        let field = Self {
            start: header.csum_start().into(),
            offset: header.csum_offset().into(),
        };
        match field.start >= MIN_FRAME && field.position() + 2 <= len {
            true => Ok(field),
            false => Err(OffloadFault::CsumOutOfPacket),
        }
    }

    /// Where in the frame the checksum is stored. Both parts come from 16-bit fields, so the sum
    /// does not overflow.
    fn position(self) -> usize {
        self.start + self.offset
    }

    /// The header of a frame without GSO whose receiver completes this checksum.
    fn to_partial_header(self) -> VnetHeader {
        let mut header = [0; VNET_HEADER_LEN];
        header[0] = VIRTIO_NET_HDR_F_NEEDS_CSUM;
        let word = |n: usize| u16::try_from(n).unwrap_or(u16::MAX).to_le_bytes();
        header[6..8].copy_from_slice(&word(self.start));
        header[8..10].copy_from_slice(&word(self.offset));
        VnetHeader(header)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTHING: FrameFormat = FrameFormat {
        header_len: VNET_HEADER_LEN,
        csum: false,
        tso4: false,
        tso6: false,
        ecn: false,
        ufo: false,
    };
    #[test]
    fn frame_passes_unmodified_when_everything_it_requests_was_negotiated() {
        let csum = FrameFormat {
            csum: true,
            ..NOTHING
        };
        let without_ecn = FrameFormat {
            ecn: false,
            ..FrameFormat::ALL
        };
        let tso4 = FrameFormat { tso4: true, ..csum };
        let tso6 = FrameFormat { tso6: true, ..csum };
        let ufo = FrameFormat { ufo: true, ..csum };
        let formats = [
            NOTHING,
            csum,
            tso4,
            tso6,
            ufo,
            without_ecn,
            FrameFormat::ALL,
        ];
        // Flags, gso_type, and which of the formats accept them.
        for (flags, gso_type, accepting) in [
            (0, 0, [true; 7]),
            (1, 0, [false, true, true, true, true, true, true]),
            // DATA_VALID, on a frame from the host.
            (2, 0, [false, true, true, true, true, true, true]),
            (1, 1, [false, false, true, false, false, true, true]),
            (1, 4, [false, false, false, true, false, true, true]),
            (1, 3, [false, false, false, false, true, true, true]),
            (1, 0x81, [false, false, false, false, false, false, true]),
            (1, 0x84, [false, false, false, false, false, false, true]),
            // Values that do not exist.
            (1, 0x80, [false; 7]),
            (1, 0x83, [false; 7]),
            (1, 2, [false; 7]),
            (1, 5, [false; 7]),
            (0, 1, [false; 7]),
            (4, 0, [false; 7]),
        ] {
            let mut header = VnetHeader::default();
            header.0[..2].copy_from_slice(&[flags, gso_type]);
            let found = formats.map(|format| can_pass_unmodified(&header, &format));
            assert_eq!(found, accepting, "{flags} {gso_type:#x}");
        }
    }
}
