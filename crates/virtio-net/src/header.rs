//! The virtio-net header (virtio 1.3 §5.1.6): what TX frames carry in, checked, and what RX frames
//! carry out.

use virtio_bindings::virtio_net as net;

use crate::features::Features;
use crate::stats::VringStats;

/// Bytes of a header with `num_buffers` (VERSION_1 or MRG_RXBUF negotiated).
pub const VNET_HEADER_LEN: usize = 12;
/// Bytes of a legacy header without `num_buffers`.
pub const LEGACY_VNET_HEADER_LEN: usize = 10;
/// The shortest frame: an Ethernet header. A shorter one must never reach a TAP (CVE-2024-41090).
pub const MIN_FRAME: usize = 14;
/// The longest frame: 64 KiB - 1 of IP, an Ethernet header and a VLAN tag.
pub const MAX_FRAME: usize = 65_535 + 14 + 4;

const VIRTIO_NET_HDR_F_NEEDS_CSUM: u8 = 1;
const VIRTIO_NET_HDR_GSO_NONE: u8 = 0;
const VIRTIO_NET_HDR_GSO_TCPV4: u8 = 1;
const VIRTIO_NET_HDR_GSO_UDP: u8 = 3;
const VIRTIO_NET_HDR_GSO_TCPV6: u8 = 4;
const VIRTIO_NET_HDR_GSO_ECN: u8 = 0x80;

/// A header in private memory, little-endian as on the wire. It is read from guest memory once and
/// never again: what was checked is what is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(transparent)]
pub struct VnetHeader(pub [u8; VNET_HEADER_LEN]);

impl VnetHeader {
    /// `flags`: NEEDS_CSUM = 1, DATA_VALID = 2.
    #[must_use]
    pub fn flags(&self) -> u8 {
        self.0[0]
    }

    /// `gso_type`, with the ECN bit.
    #[must_use]
    pub fn gso_type(&self) -> u8 {
        self.0[1]
    }

    /// `hdr_len`: bytes of all packet headers, a hint.
    #[must_use]
    pub fn hdr_len(&self) -> u16 {
        self.read_le16(2)
    }

    /// `gso_size`: payload bytes of each segment.
    #[must_use]
    pub fn gso_size(&self) -> u16 {
        self.read_le16(4)
    }

    /// `csum_start`: where the checksum begins.
    #[must_use]
    pub fn csum_start(&self) -> u16 {
        self.read_le16(6)
    }

    /// `csum_offset`: where after that it is stored.
    #[must_use]
    pub fn csum_offset(&self) -> u16 {
        self.read_le16(8)
    }

    fn read_le16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.0[at], self.0[at + 1]])
    }

    /// Checks the header of a TX frame of `len` bytes against what was negotiated.
    ///
    /// # Errors
    /// The first rule that the guest broke.
    pub fn check(&self, len: usize, features: Features) -> Result<(), HeaderFault> {
        if len < MIN_FRAME {
            return Err(HeaderFault::FrameTooShort);
        }
        if len > MAX_FRAME {
            return Err(HeaderFault::FrameTooLong);
        }
        if self.flags() & !2 == 0 && self.gso_type() == VIRTIO_NET_HDR_GSO_NONE {
            return Ok(());
        }
        self.check_gso(len, features)?;
        self.check_csum(len, features)
    }

    fn check_gso(&self, len: usize, features: Features) -> Result<(), HeaderFault> {
        let feature = match self.gso_type() & !VIRTIO_NET_HDR_GSO_ECN {
            VIRTIO_NET_HDR_GSO_NONE if self.gso_type() == VIRTIO_NET_HDR_GSO_NONE => return Ok(()),
            VIRTIO_NET_HDR_GSO_TCPV4 => net::VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_HDR_GSO_TCPV6 => net::VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_HDR_GSO_UDP if self.gso_type() == VIRTIO_NET_HDR_GSO_UDP => {
                net::VIRTIO_NET_F_HOST_UFO
            }
            _ => return Err(HeaderFault::GsoUnknown),
        };
        let ecn = self.gso_type() & VIRTIO_NET_HDR_GSO_ECN != 0;
        if !features.has(feature) || (ecn && !features.has(net::VIRTIO_NET_F_HOST_ECN)) {
            return Err(HeaderFault::GsoNotNegotiated);
        }
        if self.flags() & VIRTIO_NET_HDR_F_NEEDS_CSUM == 0 {
            return Err(HeaderFault::GsoWithoutCsum);
        }
        if self.gso_size() == 0 {
            return Err(HeaderFault::GsoSizeZero);
        }
        if usize::from(self.hdr_len()) > len {
            return Err(HeaderFault::HdrLenOutOfFrame);
        }
        Ok(())
    }

    fn check_csum(&self, len: usize, features: Features) -> Result<(), HeaderFault> {
        if self.flags() & VIRTIO_NET_HDR_F_NEEDS_CSUM == 0 {
            return Ok(());
        }
        if !features.has(net::VIRTIO_NET_F_CSUM) {
            return Err(HeaderFault::CsumNotNegotiated);
        }
        // Three values of 16 bits cannot overflow: check the sum, not the parts.
        let end = usize::from(self.csum_start()) + usize::from(self.csum_offset()) + 2;
        if end > len {
            return Err(HeaderFault::CsumOutOfFrame);
        }
        Ok(())
    }
}

/// What a guest got wrong in a TX frame's header or length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeaderFault {
    /// The chain has no room for a header.
    Missing,
    /// Under [`MIN_FRAME`] bytes.
    FrameTooShort,
    /// Over [`MAX_FRAME`] bytes.
    FrameTooLong,
    /// No such gso_type.
    GsoUnknown,
    /// A GSO type that was not negotiated.
    GsoNotNegotiated,
    /// gso_size is 0.
    GsoSizeZero,
    /// GSO without NEEDS_CSUM.
    GsoWithoutCsum,
    /// NEEDS_CSUM without VIRTIO_NET_F_CSUM.
    CsumNotNegotiated,
    /// The checksum would lie beyond the frame.
    CsumOutOfFrame,
    /// hdr_len is longer than the frame.
    HdrLenOutOfFrame,
}

impl HeaderFault {
    /// Counts the fault.
    pub fn count(self, stats: &VringStats) {
        let counter = match self {
            Self::Missing => &stats.header_missing,
            Self::FrameTooShort => &stats.frame_too_short,
            Self::FrameTooLong => &stats.frame_too_long,
            Self::GsoUnknown => &stats.gso_unknown,
            Self::GsoNotNegotiated => &stats.gso_not_negotiated,
            Self::GsoSizeZero => &stats.gso_size_zero,
            Self::GsoWithoutCsum => &stats.gso_without_csum,
            Self::CsumNotNegotiated => &stats.csum_not_negotiated,
            Self::CsumOutOfFrame => &stats.csum_out_of_frame,
            Self::HdrLenOutOfFrame => &stats.hdr_len_out_of_frame,
        };
        counter.add(1);
    }
}

/// What the guest takes, as the uplink needs to know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameFormat {
    /// Bytes of the virtio-net header: 12, or 10 for a legacy driver without MRG_RXBUF.
    pub header_len: usize,
    /// The guest takes frames with a partial checksum (GUEST_CSUM).
    pub csum: bool,
    /// The guest takes TCP segments over IPv4 of up to 64 KiB (GUEST_TSO4).
    pub tso4: bool,
    /// The same over IPv6 (GUEST_TSO6).
    pub tso6: bool,
    /// The same with ECN (GUEST_ECN).
    pub ecn: bool,
    /// The guest takes UDP fragments of up to 64 KiB (GUEST_UFO).
    pub ufo: bool,
}

impl FrameFormat {
    /// Everything there is.
    pub const ALL: Self = Self {
        header_len: VNET_HEADER_LEN,
        csum: true,
        tso4: true,
        tso6: true,
        ecn: true,
        ufo: true,
    };
}
