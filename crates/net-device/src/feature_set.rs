//! What a device offers, by version of virtionetd. A guest keeps the features that it negotiated when
//! it is migrated, so two hosts with different versions must offer the same ones.

use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;
use virtio_bindings::virtio_config as config;
use virtio_bindings::virtio_net as net;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtionet_config::FeaturesVersion;
use virtionet_vhost_user::protocol_features;
use virtionet_virtio_net::features::Features;

/// The features that a device offers. The session adds those of its own (VHOST_F_LOG_ALL and
/// VHOST_USER_F_PROTOCOL_FEATURES), which no guest sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FeatureSet {
    /// The virtio features.
    pub virtio: Features,
    /// The vhost-user protocol features.
    pub protocol: u64,
}

/// The features of version 0.1.0.
const V0_1_0: FeatureSet = FeatureSet {
    virtio: Features(
        1 << net::VIRTIO_NET_F_CSUM
            | 1 << net::VIRTIO_NET_F_GUEST_CSUM
            | 1 << net::VIRTIO_NET_F_MTU
            | 1 << net::VIRTIO_NET_F_GUEST_TSO4
            | 1 << net::VIRTIO_NET_F_GUEST_TSO6
            | 1 << net::VIRTIO_NET_F_GUEST_ECN
            | 1 << net::VIRTIO_NET_F_GUEST_UFO
            | 1 << net::VIRTIO_NET_F_HOST_TSO4
            | 1 << net::VIRTIO_NET_F_HOST_TSO6
            | 1 << net::VIRTIO_NET_F_HOST_ECN
            | 1 << net::VIRTIO_NET_F_HOST_UFO
            | 1 << net::VIRTIO_NET_F_MRG_RXBUF
            | 1 << net::VIRTIO_NET_F_GUEST_ANNOUNCE
            | 1 << net::VIRTIO_NET_F_MQ
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << config::VIRTIO_F_ANY_LAYOUT
            | 1 << config::VIRTIO_F_VERSION_1
            | 1 << config::VIRTIO_F_ACCESS_PLATFORM
            | 1 << config::VIRTIO_F_RING_PACKED
            | 1 << config::VIRTIO_F_IN_ORDER,
    ),
    protocol: Protocol::MQ.bits()
        | Protocol::LOG_SHMFD.bits()
        | Protocol::RARP.bits()
        | Protocol::REPLY_ACK.bits()
        | Protocol::MTU.bits()
        | Protocol::BACKEND_REQ.bits()
        | Protocol::PAGEFAULT.bits()
        | Protocol::RESET_DEVICE.bits()
        | Protocol::CONFIGURE_MEM_SLOTS.bits()
        | Protocol::STATUS.bits(),
};

impl FeatureSet {
    /// What virtionetd of this version offers: the table of versions.
    #[must_use]
    pub fn of(version: FeaturesVersion) -> Self {
        match version {
            FeaturesVersion::V0_1_0 => V0_1_0,
        }
    }

    /// The features of either set.
    #[must_use]
    pub fn union(self, other: Self) -> Self {
        Self {
            virtio: Features(self.virtio.0 | other.virtio.0),
            protocol: self.protocol | other.protocol,
        }
    }

    /// Those features of the set that this program has.
    #[must_use]
    pub fn supported(self) -> Self {
        Self {
            virtio: Features(self.virtio.0 & Features::offered().0),
            protocol: self.protocol & protocol_features::OFFERED,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The sets as numbers. A line of a released version never changes.
    const FROZEN: [(&str, u64, u64); FeaturesVersion::ALL.len()] =
        [("0.1.0", 0xf_3860_ff8b, 0x1_a13f)];

    #[test]
    fn newest_version_offers_all_that_this_program_has() {
        let newest = FeaturesVersion::default();
        let all = FeatureSet {
            virtio: Features::offered(),
            protocol: protocol_features::OFFERED,
        };
        assert_eq!(
            FeatureSet::of(newest),
            all,
            "the features changed: if version {} is released, give the new set a version of its own in FeaturesVersion and in this table",
            newest.name()
        );
    }

    #[test]
    fn released_versions_offer_what_they_always_offered() {
        for (version, frozen) in FeaturesVersion::ALL.into_iter().zip(FROZEN) {
            let FeatureSet { virtio, protocol } = FeatureSet::of(version);
            assert_eq!(
                (version.name(), virtio.0, protocol),
                frozen,
                "{:#x} {protocol:#x}",
                virtio.0
            );
            let set = FeatureSet::of(version);
            assert_eq!(set.supported(), set);
        }
    }

    #[test]
    fn no_version_is_newer_than_this_program() {
        let numbers = |version: &str| -> Vec<u32> {
            let parts = version.split('.');
            parts.map(|part| part.parse().unwrap()).collect()
        };
        let names: Vec<_> = FeaturesVersion::ALL
            .map(|version| numbers(version.name()))
            .into();
        assert!(names.is_sorted_by(|older, newer| older < newer));
        assert!(names.last() <= Some(&numbers(env!("CARGO_PKG_VERSION"))));
    }

    #[test]
    fn documentation_has_the_features_of_each_version() {
        let page = include_str!("../../../docs/migration.md");
        let mut table = String::from(
            "| version | virtio features | vhost-user protocol features |\n|---|---|---|\n",
        );
        for version in FeaturesVersion::ALL {
            let FeatureSet { virtio, protocol } = FeatureSet::of(version);
            let names: Vec<_> = protocol_features::names(protocol).collect();
            table += &format!(
                "| {} | {} | {} |\n",
                version.name(),
                virtio.names().join(", "),
                names.join(", ")
            );
        }
        assert!(
            page.contains(&table),
            "replace the table of versions in docs/migration.md by this one:\n\n{table}"
        );
    }
}
