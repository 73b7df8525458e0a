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

    /// Whether this is one of the group addresses that IEEE 802.1Q (§8.6.3) reserves for a link's
    /// own protocols, such as spanning tree, LACP and PAUSE: 01:80:C2:00:00:00 to -0F.
    pub(super) fn is_reserved_group(self) -> bool {
        self.0 & 0xf0ff_ffff_ffff == 0xc2_8001
    }

    /// The address with these bytes, in the order on the wire.
    pub(super) fn from_bytes([a, b, c, d, e, f]: [u8; 6]) -> Self {
        Self(u64::from_le_bytes([a, b, c, d, e, f, 0, 0]))
    }

    /// The bytes in the order on the wire.
    pub(super) fn to_bytes(self) -> [u8; 6] {
        let [a, b, c, d, e, f, ..] = self.0.to_le_bytes();
        [a, b, c, d, e, f]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exactly_the_sixteen_reserved_groups_are_recognized() {
        let mac = MacAddr::from_bytes;
        for last in 0..=255 {
            let address = [1, 0x80, 0xc2, 0, 0, last];
            assert_eq!(mac(address).is_reserved_group(), last < 16, "{last}");
            assert_eq!(mac(address).to_bytes(), address);
        }
        for other in [[1, 0x80, 0xc2, 0, 1, 0], [1, 0, 0x5e, 0, 0, 1], [0xff; 6]] {
            assert!(!mac(other).is_reserved_group(), "{other:?}");
        }
    }
}
