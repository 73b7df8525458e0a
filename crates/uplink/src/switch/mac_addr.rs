//! A MAC address in one word.

/// The bit of a group address, in the first byte on the wire.
const GROUP_BIT: u64 = 1;

/// A MAC address. The first byte on the wire is the lowest; the upper 16 bits are 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MacAddr(pub(super) u64);

impl MacAddr {
    /// Whether this is a group address, or zero.
    #[inline(always)]
    pub(super) fn is_group_or_zero(self) -> bool {
        self.0 & GROUP_BIT != 0 || self.0 == 0
    }

    /// The bytes in the order on the wire.
    pub(super) fn to_bytes(self) -> [u8; 6] {
        let [a, b, c, d, e, f, ..] = self.0.to_le_bytes();
        [a, b, c, d, e, f]
    }
}
