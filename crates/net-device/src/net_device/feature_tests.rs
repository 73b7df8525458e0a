//! Tests of what a device offers to a front-end.

use virtionet_guest::frontend::{FrontendConnection, VHOST_USER_F_PROTOCOL_FEATURES};
use virtionet_guest::net::{MODERN, PACKED};
use virtionet_guest::test_frontend::{TestFrontend, TestFrontendConfig};
use virtionet_uplink::null::Null;
use virtionet_vhost_user::protocol_features::{OFFERED, VHOST_F_LOG_ALL};

use super::*;
use crate::testing::{net_device, send, sent_frames, two_pairs, with_frontend, with_socket};

/// What the session itself offers.
const OF_THE_SESSION: u64 = VHOST_USER_F_PROTOCOL_FEATURES | VHOST_F_LOG_ALL;
/// VIRTIO_NET_F_GUEST_UFO.
const UFO: u64 = 1 << 10;
/// VHOST_USER_PROTOCOL_F_RARP.
const RARP: u64 = 1 << 2;
/// VHOST_USER_PROTOCOL_F_PAGEFAULT, which these devices do not offer, because they have no `--postcopy`.
const PAGEFAULT: u64 = 1 << 8;

fn device_with(feature_set: FeatureSet) -> NetDevice {
    net_device(2, Null, PollMode::Off).with_feature_set(feature_set)
}

/// The virtio and the protocol features that a front-end is offered.
fn offered(net_device: &NetDevice) -> (u64, u64) {
    let mut found = (0, 0);
    with_socket(net_device, |socket| {
        let mut connection = FrontendConnection::from_socket(socket).unwrap();
        found.0 = connection.get_features().unwrap();
        found.1 = connection.get_protocol_features().unwrap();
    });
    found
}

/// A set without packed virtqueues, UFO and RARP.
fn smaller_set() -> FeatureSet {
    let FeatureSet { virtio, protocol } = FeatureSet::of(FeaturesVersion::default());
    FeatureSet {
        virtio: Features(virtio.0 & !(PACKED | UFO)),
        protocol: protocol & !RARP,
    }
}

#[test]
fn front_end_is_offered_exactly_the_features_of_the_version() {
    for version in FeaturesVersion::ALL {
        let set = FeatureSet::of(version);
        let expected = (set.virtio.0 | OF_THE_SESSION, set.protocol & !PAGEFAULT);
        assert_eq!(offered(&device_with(set)), expected, "{version:?}");
    }
    let all = (Features::offered().0 | OF_THE_SESSION, OFFERED & !PAGEFAULT);
    assert_eq!(offered(&net_device(2, Null, PollMode::Off)), all);
    // Nothing is offered that this program does not have.
    let foreign = FeatureSet {
        virtio: Features(u64::MAX),
        protocol: u64::MAX,
    };
    assert_eq!(offered(&device_with(foreign)), all);
}

#[test]
fn features_that_are_left_out_are_refused_and_the_others_work() {
    let set = smaller_set();
    let net_device = device_with(set);
    assert_eq!(
        offered(&net_device),
        (set.virtio.0 | OF_THE_SESSION, set.protocol & !PAGEFAULT)
    );
    with_frontend(&net_device, &two_pairs(), |frontend| {
        send(frontend, 1, 3);
        let connection = &mut frontend.connection;
        connection.set_features(MODERN | PACKED).unwrap_err();
        connection.set_features(MODERN | UFO).unwrap_err();
        connection
            .set_protocol_features(set.protocol | RARP)
            .unwrap_err();
    });
    assert_eq!(sent_frames(&net_device), [0, 3]);
    with_socket(&net_device, |socket| {
        let packed = TestFrontendConfig {
            required: PACKED,
            ..two_pairs()
        };
        let refused = TestFrontend::from_socket(socket, &packed);
        assert!(refused.is_err());
    });
}

#[test]
fn front_end_is_offered_again_what_an_earlier_daemon_offered_it() {
    let set = smaller_set();
    let more = FeatureSet::of(FeaturesVersion::default());
    let own = std::process::id();
    for (pid, earlier, expected, has_warning) in [
        (own, more, more, true),
        // Another front-end was offered these.
        (own.wrapping_add(1), more, set, false),
        (own, set, set, false),
    ] {
        let net_device = device_with(set);
        let records = net_device.crash_records.as_ref().unwrap();
        records.note_offered(pid, earlier).unwrap();
        for _ in 0..2 {
            with_frontend(&net_device, &two_pairs(), |frontend| {
                let found = frontend.connection.get_features().unwrap();
                assert_eq!(found, expected.virtio.0 | OF_THE_SESSION);
                let found = frontend.connection.get_protocol_features().unwrap();
                assert_eq!(found, expected.protocol & !PAGEFAULT);
                let warnings = net_device.warnings().join("\n");
                let is_warned = warnings.contains("was offered more features before");
                assert_eq!(is_warned, has_warning, "{warnings}");
            });
        }
        assert!(!net_device.conditions.has(ConditionKind::FeaturesKept));
        let noted = net_device.crash_records.as_ref().unwrap().offered_to(own);
        assert_eq!(noted, Some(expected));
    }
}
