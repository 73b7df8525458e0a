//! The virtio-net header in front of each frame (virtio 1.3 §5.1.6), and the checks that a TX
//! frame's header must pass.

use virtio_bindings::virtio_net as net;

use crate::features::Features;
pub use crate::frame_format::{FrameFormat, LEGACY_VNET_HEADER_LEN, VNET_HEADER_LEN};
use crate::stats::VringStats;

/// The shortest frame: an Ethernet header. A shorter one must never reach a TAP (CVE-2024-41090).
pub const MIN_FRAME: usize = 14;
/// The longest frame: an Ethernet header, two VLAN tags, and the longest IP packet.
pub const MAX_FRAME: usize = 14 + 2 * 4 + 65_535;

/// `flags`: the receiver is to complete the checksum.
pub const VIRTIO_NET_HDR_F_NEEDS_CSUM: u8 = low_byte(net::VIRTIO_NET_HDR_F_NEEDS_CSUM);
/// `flags`: the checksum has been verified.
pub const VIRTIO_NET_HDR_F_DATA_VALID: u8 = low_byte(net::VIRTIO_NET_HDR_F_DATA_VALID);
/// `gso_type`: a frame without GSO.
pub const VIRTIO_NET_HDR_GSO_NONE: u8 = low_byte(net::VIRTIO_NET_HDR_GSO_NONE);
/// `gso_type`: TCP segmentation over IPv4.
pub const VIRTIO_NET_HDR_GSO_TCPV4: u8 = low_byte(net::VIRTIO_NET_HDR_GSO_TCPV4);
/// `gso_type`: UDP fragmentation.
pub const VIRTIO_NET_HDR_GSO_UDP: u8 = low_byte(net::VIRTIO_NET_HDR_GSO_UDP);
/// `gso_type`: TCP segmentation over IPv6.
pub const VIRTIO_NET_HDR_GSO_TCPV6: u8 = low_byte(net::VIRTIO_NET_HDR_GSO_TCPV6);
/// `gso_type`: the bit that is added to a TCP type where the packet uses ECN.
pub const VIRTIO_NET_HDR_GSO_ECN: u8 = low_byte(net::VIRTIO_NET_HDR_GSO_ECN);

/// The bindings define the constants with 32 bits, but the header's fields have 8.
const fn low_byte(constant: u32) -> u8 {
    let [low, ..] = constant.to_le_bytes();
    low
}

/// A virtio-net header in private memory, little-endian as in the ring. It is read from guest
/// memory exactly once, so the bytes that were checked are the bytes that are transmitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(transparent)]
pub struct VnetHeader(pub [u8; VNET_HEADER_LEN]);

impl VnetHeader {
    /// `flags`: NEEDS_CSUM and DATA_VALID.
    #[must_use]
    pub fn flags(&self) -> u8 {
        self.0[0]
    }

    /// `gso_type`, including the ECN bit.
    #[must_use]
    pub fn gso_type(&self) -> u8 {
        self.0[1]
    }

    /// `hdr_len`: bytes of all packet headers; a hint only.
    #[must_use]
    pub fn hdr_len(&self) -> u16 {
        self.read_le16(2)
    }

    /// `gso_size`: payload bytes of each segment.
    #[must_use]
    pub fn gso_size(&self) -> u16 {
        self.read_le16(4)
    }

    /// `csum_start`: the first byte that the checksum covers.
    #[must_use]
    pub fn csum_start(&self) -> u16 {
        self.read_le16(6)
    }

    /// `csum_offset`: where the checksum is stored, counted from `csum_start`.
    #[must_use]
    pub fn csum_offset(&self) -> u16 {
        self.read_le16(8)
    }

    fn read_le16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.0[at], self.0[at + 1]])
    }

    /// Checks the header of a TX frame of `len` bytes against the negotiated features.
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
        self.check_requests(len, features)
    }

    /// The same for a frame whose length is known to be allowed.
    #[inline(always)]
    pub(crate) fn check_requests(&self, len: usize, features: Features) -> Result<(), HeaderFault> {
        if self.request_bits() == 0 {
            return Ok(());
        }
        self.check_gso(len, features)?;
        self.check_csum(len, features)
    }

    /// 0 if no offload is requested: `flags` has no bit but DATA_VALID, and `gso_type` is NONE.
    #[inline(always)]
    pub(crate) fn request_bits(&self) -> u64 {
        const REQUESTS: u64 =
            u64::from_le_bytes([!VIRTIO_NET_HDR_F_DATA_VALID, 0xff, 0, 0, 0, 0, 0, 0]);
        // One load of eight bytes, so that the header is copied in as large parts: the CPU does not
        // forward several small stores to a later load of all of them.
        let first = self.0.first_chunk().copied().unwrap_or_default();
        u64::from_le_bytes(first) & REQUESTS
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
        // The sum is what must lie within the frame. Two values of 16 bits cannot overflow it.
        let end = usize::from(self.csum_start()) + usize::from(self.csum_offset()) + 2;
        if end > len {
            return Err(HeaderFault::CsumOutOfFrame);
        }
        Ok(())
    }
}

/// A fault of the guest in the header or the length of a TX frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeaderFault {
    /// The chain is shorter than a header.
    Missing,
    /// The frame has fewer than [`MIN_FRAME`] bytes.
    FrameTooShort,
    /// The frame has more than [`MAX_FRAME`] bytes.
    FrameTooLong,
    /// `gso_type` has a value that does not exist.
    GsoUnknown,
    /// `gso_type` was not negotiated.
    GsoNotNegotiated,
    /// `gso_size` is 0.
    GsoSizeZero,
    /// The header requests GSO without NEEDS_CSUM.
    GsoWithoutCsum,
    /// NEEDS_CSUM is set without VIRTIO_NET_F_CSUM.
    CsumNotNegotiated,
    /// The checksum lies beyond the frame.
    CsumOutOfFrame,
    /// `hdr_len` is longer than the frame.
    HdrLenOutOfFrame,
}

impl HeaderFault {
    /// Adds the fault to its counter.
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
