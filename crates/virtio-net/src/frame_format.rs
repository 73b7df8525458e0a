//! The form of the frames that a guest accepts: the header's length, and the offloads.

/// The number of bytes of a virtio-net header with `num_buffers` (VERSION_1 or MRG_RXBUF
/// negotiated).
pub const VNET_HEADER_LEN: usize = 12;
/// The number of bytes of a legacy virtio-net header, without `num_buffers`.
pub const LEGACY_VNET_HEADER_LEN: usize = 10;

/// What the driver negotiated about received frames, for the uplink.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameFormat {
    /// The number of bytes of the virtio-net header: 12, or 10 for a legacy driver without
    /// MRG_RXBUF.
    pub header_len: usize,
    /// The guest accepts frames with a partial checksum (GUEST_CSUM).
    pub csum: bool,
    /// The guest accepts TCP frames over IPv4 of up to 64 KiB (GUEST_TSO4).
    pub tso4: bool,
    /// The same over IPv6 (GUEST_TSO6).
    pub tso6: bool,
    /// The same with ECN (GUEST_ECN).
    pub ecn: bool,
    /// The guest accepts UDP datagrams of up to 64 KiB (GUEST_UFO).
    pub ufo: bool,
}

impl FrameFormat {
    /// A header of 12 bytes and every offload.
    pub const ALL: Self = Self {
        header_len: VNET_HEADER_LEN,
        csum: true,
        tso4: true,
        tso6: true,
        ecn: true,
        ufo: true,
    };
}
