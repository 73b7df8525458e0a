//! Feature bits of the protocol itself.

use vhost::vhost_user::message::VhostUserProtocolFeatures as Bits;

/// VHOST_USER_F_PROTOCOL_FEATURES: the virtio feature bit that announces protocol features.
pub const VHOST_USER_F_PROTOCOL_FEATURES: u64 = 1 << 30;

/// VHOST_F_LOG_ALL: the virtio feature bit with which a front-end makes the back-end log what it
/// writes to guest memory.
pub const VHOST_F_LOG_ALL: u64 = 1 << 26;

/// The protocol features that this back-end offers. QEMU accepts whatever is offered, so the list
/// contains only features that work. The session leaves PAGEFAULT out where postcopy is not possible.
pub const OFFERED: u64 = Bits::MQ.bits()
    | Bits::LOG_SHMFD.bits()
    | Bits::RARP.bits()
    | Bits::REPLY_ACK.bits()
    | Bits::MTU.bits()
    | Bits::BACKEND_REQ.bits()
    | Bits::PAGEFAULT.bits()
    | Bits::RESET_DEVICE.bits()
    | Bits::CONFIGURE_MEM_SLOTS.bits()
    | Bits::STATUS.bits();

/// The protocol's names of the offered features, with their bits.
const NAMES: [(Bits, &str); 10] = [
    (Bits::MQ, "MQ"),
    (Bits::LOG_SHMFD, "LOG_SHMFD"),
    (Bits::RARP, "RARP"),
    (Bits::REPLY_ACK, "REPLY_ACK"),
    (Bits::MTU, "NET_MTU"),
    (Bits::BACKEND_REQ, "BACKEND_REQ"),
    (Bits::PAGEFAULT, "PAGEFAULT"),
    (Bits::RESET_DEVICE, "RESET_DEVICE"),
    (Bits::CONFIGURE_MEM_SLOTS, "CONFIGURE_MEM_SLOTS"),
    (Bits::STATUS, "STATUS"),
];

/// The names of the protocol features in `bits`, lowest bit first. Bits that are not offered are
/// left out.
pub fn names(bits: u64) -> impl Iterator<Item = &'static str> {
    NAMES
        .into_iter()
        .filter(move |(bit, _)| bits & bit.bits() != 0)
        .map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_offered_feature_has_a_name() {
        let named = NAMES.iter().fold(0, |sum, (bit, _)| sum | bit.bits());
        assert_eq!(named, OFFERED);
        assert_eq!(names(u64::MAX).count(), 10);
        assert_eq!(names(0b1001).collect::<Vec<_>>(), ["MQ", "REPLY_ACK"]);
    }
}
