//! What building and parsing a frame have in common: protocols, lengths, the frame itself and
//! errors.

use std::net::IpAddr;

use crate::header::NetHeader;

/// The size of an Ethernet header in bytes.
pub const ETHERNET_LEN: usize = 14;
pub(super) const ETHERTYPE_IPV4: u16 = 0x0800;
pub(super) const ETHERTYPE_IPV6: u16 = 0x86dd;
pub(super) const ETHERTYPE_VLAN: u16 = 0x8100;
pub(super) const IPV4_LEN: usize = 20;
pub(super) const IPV6_LEN: usize = 40;
pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;

/// Why a frame cannot be built or parsed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The payload does not fit an IP packet.
    #[error("{0} bytes of payload do not fit an IP packet; use at most 65,000")]
    TooLong(usize),
    /// Source and destination are of different address families.
    #[error("{0} and {1} are of different address families; use two of one family")]
    Families(IpAddr, IpAddr),
    /// The frame ends within its headers, or its lengths contradict each other.
    #[error("a frame of {len} bytes ends before its {header}; check its bytes")]
    Short {
        /// The size of the frame in bytes.
        len: usize,
        /// The part that does not fit.
        header: &'static str,
    },
    /// The frame is not TCP or UDP over IPv4 or IPv6.
    #[error("a frame with {0} is not TCP or UDP over IP; compare its bytes instead")]
    Unknown(String),
    /// A checksum is wrong.
    #[error("the frame's {0} checksum is wrong; find out where the frame was changed")]
    Checksum(&'static str),
}

/// A frame with its virtio-net header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// The virtio-net header.
    pub header: NetHeader,
    /// The frame's bytes from the Ethernet header on.
    pub bytes: Vec<u8>,
}

/// The transport protocol of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// TCP, with ACK and PSH set.
    Tcp,
    /// UDP.
    Udp,
}

impl Transport {
    /// The number of the protocol in an IP header.
    pub(super) fn protocol(self) -> u8 {
        match self {
            Self::Tcp => TCP,
            Self::Udp => UDP,
        }
    }

    /// The size of the header without options in bytes.
    pub(super) fn header_len(self) -> usize {
        match self {
            Self::Tcp => 20,
            Self::Udp => 8,
        }
    }

    /// The offset of the checksum in the transport header in bytes.
    pub(super) fn checksum_offset(self) -> u16 {
        match self {
            Self::Tcp => 16,
            Self::Udp => 6,
        }
    }
}
