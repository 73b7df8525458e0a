//! Guests that violate the virtqueue protocol. The daemon must quarantine and report the faulty
//! ring, keep serving all other rings, and serve the ring again when the driver starts it again.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use serde_json::Value;
use virtionet_guest::header::NetHeader;
use virtionet_guest::net::{MODERN, PACKED};
use virtionet_guest::test_frontend::{TestFrontend, TestFrontendConfig};
use virtionet_tests::daemon::{Daemon, Options};
use virtionet_tests::paths::RunDir;

const TIMEOUT: Duration = Duration::from_secs(5);
const VRING_DESC_F_NEXT: u16 = 1;
/// The available flag of a descriptor in a packed ring.
const VIRTQ_DESC_F_AVAIL: u16 = 1 << 7;
const FRAME: [u8; 60] = [0x55; 60];

/// Sends `count` frames on a queue pair and waits until the daemon has counted them.
fn send_and_wait(daemon: &mut Daemon, frontend: &mut TestFrontend, pair: usize, count: u64) {
    let frames = |device: &Value| device["pairs"][pair]["tx"]["counters"]["frames"].as_u64();
    let before = frames(&daemon.device().unwrap()).unwrap();
    for _ in 0..count {
        let tx = &mut frontend.pairs[pair].tx;
        assert!(tx.queue(&NetHeader::default(), &FRAME).unwrap());
        tx.flush().unwrap();
    }
    daemon
        .wait_for_device("counting all frames", TIMEOUT, |device| {
            frames(device) == Some(before + count)
        })
        .unwrap();
}

/// Causes a fault of the transmitq of queue pair 0, and checks that the daemon quarantines only
/// this ring and counts the fault in `counter`.
fn assert_only_faulty_ring_stops(
    features: u64,
    counter: &str,
    cause_fault: impl Fn(&mut TestFrontend),
) {
    let dir = RunDir::new().unwrap();
    let mut daemon = Options::new()
        .flag("--uplink", "null")
        .start(&dir, "vnet")
        .unwrap();
    let config = TestFrontendConfig::new(2, 256, features);
    let mut frontend = TestFrontend::connect(daemon.socket(), &config).unwrap();
    send_and_wait(&mut daemon, &mut frontend, 0, 10);

    cause_fault(&mut frontend);
    frontend.pairs[0].tx.queue.kick.signal().unwrap();
    assert_eq!(frontend.pairs[0].tx.queue.err.wait(TIMEOUT).unwrap(), 1);
    let device = daemon.device().unwrap();
    let ring = &device["pairs"][0]["tx"];
    assert_eq!(ring["state"], "quarantined");
    assert_eq!(ring["counters"]["quarantines"], 1);
    assert_eq!(ring["counters"][counter], 1);
    assert_eq!(device["pairs"][0]["rx"]["state"], "running");

    // Further kicks have no effect, and the other queue pair still carries frames.
    for _ in 0..100 {
        frontend.pairs[0].tx.queue.kick.signal().unwrap();
    }
    send_and_wait(&mut daemon, &mut frontend, 1, 10);
    let device = daemon.device().unwrap();
    assert_eq!(device["pairs"][0]["tx"]["counters"]["quarantines"], 1);
    let log = daemon.stderr();
    let lines = log.lines().filter(|line| line.contains("broke the ring"));
    assert_eq!(lines.count(), 1, "{log}");

    frontend.reset().unwrap();
    frontend.start().unwrap();
    send_and_wait(&mut daemon, &mut frontend, 0, 10);
}

#[test]
fn jump_of_the_available_index_stops_only_that_ring() {
    assert_only_faulty_ring_stops(MODERN, "avail_index_jump", |frontend| {
        let ring = frontend.pairs[0].tx.queue.ring.as_split().unwrap();
        ring.set_avail_index(ring.avail_index().wrapping_add(1000));
    });
}

#[test]
fn head_outside_the_ring_stops_only_that_ring() {
    assert_only_faulty_ring_stops(MODERN, "head_out_of_range", |frontend| {
        let ring = frontend.pairs[0].tx.queue.ring.as_split().unwrap();
        let index = ring.avail_index();
        ring.set_avail_entry(index % 256, 256);
        ring.set_avail_index(index.wrapping_add(1));
    });
}

#[test]
fn packed_descriptor_chain_without_end_stops_only_that_ring() {
    assert_only_faulty_ring_stops(MODERN | PACKED, "chain_without_end", |frontend| {
        let ring = frontend.pairs[0].tx.queue.ring.as_packed().unwrap();
        for index in (0..256).rev() {
            ring.set_flags(index, VRING_DESC_F_NEXT | VIRTQ_DESC_F_AVAIL);
        }
    });
}
