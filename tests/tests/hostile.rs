//! A guest that breaks its rings, seen from outside: the ring at fault stops and is told of, all
//! others go on, and a driver that starts anew is served again.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use serde_json::Value;
use virtionet_guest::header::NetHeader;
use virtionet_guest::net::{MODERN, PACKED};
use virtionet_guest::test_frontend::{TestFrontend, TestFrontendConfig};
use virtionet_tests::daemon::{Daemon, Options};
use virtionet_tests::paths::RunDir;

const LIMIT: Duration = Duration::from_secs(5);
/// Flags of a packed ring's descriptor.
const VRING_DESC_F_NEXT: u16 = 1;
const VIRTQ_DESC_F_AVAIL: u16 = 1 << 7;
const FRAME: [u8; 60] = [0x55; 60];

/// Sends `count` frames on a pair and waits until the daemon has counted them.
fn send_and_wait(daemon: &mut Daemon, frontend: &mut TestFrontend, pair: usize, count: u64) {
    let frames = |device: &Value| device["pairs"][pair]["tx"]["counters"]["frames"].as_u64();
    let before = frames(&daemon.device().unwrap()).unwrap();
    for _ in 0..count {
        let tx = &mut frontend.pairs[pair].tx;
        assert!(tx.queue(&NetHeader::default(), &FRAME).unwrap());
        tx.flush().unwrap();
    }
    daemon
        .wait_device("the frames", LIMIT, |device| {
            frames(device) == Some(before + count)
        })
        .unwrap();
}

/// Breaks pair 0's transmitq with `breakage`, and sees what that leads to.
fn a_broken_ring_stops_alone(features: u64, counter: &str, breakage: impl Fn(&mut TestFrontend)) {
    let dir = RunDir::new().unwrap();
    let mut daemon = Options::new()
        .flag("--uplink", "null")
        .start(&dir, "vnet")
        .unwrap();
    let config = TestFrontendConfig::new(2, 256, features);
    let mut frontend = TestFrontend::connect(daemon.socket(), &config).unwrap();
    send_and_wait(&mut daemon, &mut frontend, 0, 10);

    breakage(&mut frontend);
    frontend.pairs[0].tx.queue.kick.signal().unwrap();
    assert_eq!(frontend.pairs[0].tx.queue.err.wait(LIMIT).unwrap(), 1);
    let device = daemon.device().unwrap();
    let ring = &device["pairs"][0]["tx"];
    assert_eq!(ring["state"], "quarantined");
    assert_eq!(ring["counters"]["quarantines"], 1);
    assert_eq!(ring["counters"][counter], 1);
    assert_eq!(device["pairs"][0]["rx"]["state"], "running");

    // However often it kicks, nothing more comes of it; the other pair goes on.
    for _ in 0..100 {
        frontend.pairs[0].tx.queue.kick.signal().unwrap();
    }
    send_and_wait(&mut daemon, &mut frontend, 1, 10);
    let device = daemon.device().unwrap();
    assert_eq!(device["pairs"][0]["tx"]["counters"]["quarantines"], 1);
    let told = daemon.stderr();
    let lines = told.lines().filter(|line| line.contains("broke the ring"));
    assert_eq!(lines.count(), 1, "{told}");

    frontend.reset().unwrap();
    frontend.start().unwrap();
    send_and_wait(&mut daemon, &mut frontend, 0, 10);
}

#[test]
fn a_jump_of_the_available_index_stops_that_ring_alone() {
    a_broken_ring_stops_alone(MODERN, "avail_index_jump", |frontend| {
        let ring = frontend.pairs[0].tx.queue.ring.as_split().unwrap();
        ring.set_avail_index(ring.avail_index().wrapping_add(1000));
    });
}

#[test]
fn a_head_outside_the_ring_stops_that_ring_alone() {
    a_broken_ring_stops_alone(MODERN, "head_out_of_range", |frontend| {
        let ring = frontend.pairs[0].tx.queue.ring.as_split().unwrap();
        let index = ring.avail_index();
        ring.set_avail_entry(index % 256, 256);
        ring.set_avail_index(index.wrapping_add(1));
    });
}

#[test]
fn a_packed_chain_without_end_stops_that_ring_alone() {
    a_broken_ring_stops_alone(MODERN | PACKED, "chain_without_end", |frontend| {
        let ring = frontend.pairs[0].tx.queue.ring.as_packed().unwrap();
        for index in (0..256).rev() {
            ring.set_flags(index, VRING_DESC_F_NEXT | VIRTQ_DESC_F_AVAIL);
        }
    });
}
