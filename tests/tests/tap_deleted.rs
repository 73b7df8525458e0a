//! A TAP that is deleted while a front-end uses it, and created again.
#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use serde_json::Value;
use virtionet_guest::net::MODERN;
use virtionet_guest::test_frontend::TestFrontendConfig;
use virtionet_tests::daemon::Options;
use virtionet_tests::paths::RunDir;
use virtionet_tests::responder::{EchoResponder, ResponderAddresses};
use virtionet_tests::topology::{GUEST, HostNetwork, TAP};

const TIMEOUT: Duration = Duration::from_secs(5);

/// Deletes the TAP of a daemon that runs with `poll`, and creates it again.
fn assert_deleted_tap_is_reported_and_opened_again(poll: &str) {
    let dir = RunDir::new().unwrap();
    let network = HostNetwork::with_tap(2).unwrap();
    let mut daemon = Options::new()
        .netns(network.netns())
        .flag("--tap", TAP)
        .flag("--poll", poll)
        .start(&dir, "vnet")
        .unwrap();
    let config = TestFrontendConfig::new(2, 256, MODERN);
    let addresses = ResponderAddresses::from_ipv4(GUEST.v4).unwrap();
    let _responder = EchoResponder::connect(daemon.socket(), &config, addresses).unwrap();
    network.wait_for_ping(GUEST.v4).unwrap();

    let warns = |device: &Value| device["warnings"].to_string().contains("was deleted");
    network.netns().ip(&format!("link del {TAP}")).unwrap();
    let deleted_at = Instant::now();
    let device = daemon
        .wait_for_device("warning of the deleted TAP", TIMEOUT, warns)
        .unwrap();
    eprintln!("reported after {:?}", deleted_at.elapsed());
    assert_eq!(device["uplink"]["up"], false, "{device}");
    let page = daemon.get_text("/metrics").unwrap();
    let gauge = "virtionetd_device_uplink_up{device=\"vnet\"} 0";
    assert!(page.contains(gauge), "{page}");
    // Time for a flood of log lines.
    std::thread::sleep(Duration::from_secs(2));

    let add = format!("tuntap add dev {TAP} mode tap multi_queue vnet_hdr");
    network.netns().ip(&add).unwrap();
    network.configure().unwrap();
    daemon
        .wait_for_device("without a warning", TIMEOUT, |device| !warns(device))
        .unwrap();
    network.wait_for_ping(GUEST.v4).unwrap();
    let log = daemon.stderr();
    let lines = log.lines().filter(|line| line.contains(TAP)).count();
    assert!(lines <= 8, "{lines} lines about the TAP: {log}");
}

#[test]
fn deleted_tap_is_reported_and_opened_again_once_it_is_created_again() {
    assert_deleted_tap_is_reported_and_opened_again("off");
}

#[test]
fn deleted_tap_causes_no_flood_of_log_lines_in_a_polling_worker() {
    assert_deleted_tap_is_reported_and_opened_again("always");
}
