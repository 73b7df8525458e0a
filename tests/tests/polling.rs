//! Workers that busy-poll for frames before they sleep.
#![allow(clippy::unwrap_used)]

use std::thread::sleep;
use std::time::Duration;

use virtionet_guest::header::NetHeader;
use virtionet_guest::net::MODERN;
use virtionet_guest::test_frontend::{TestFrontend, TestFrontendConfig};
use virtionet_tests::daemon::{Daemon, Options};
use virtionet_tests::paths::RunDir;
use virtionet_tests::procfs::cpu_ticks;

const TIMEOUT: Duration = Duration::from_secs(5);
const FRAMES: u64 = 500;

/// Sends [`FRAMES`] frames one by one, and waits until the daemon has counted `total` frames.
fn send_and_wait(daemon: &mut Daemon, frontend: &mut TestFrontend, total: u64) {
    for _ in 0..FRAMES {
        let tx = &mut frontend.pairs[0].tx;
        while !tx.queue(&NetHeader::default(), &[0x55; 60]).unwrap() {
            sleep(Duration::from_millis(1));
        }
        tx.flush().unwrap();
    }
    daemon
        .wait_for_device("counting all frames", TIMEOUT, |device| {
            device["pairs"][0]["tx"]["counters"]["frames"] == total
        })
        .unwrap();
}

#[test]
fn polling_worker_carries_every_frame_also_after_a_pause_and_a_disabled_pair() {
    for mode in ["adaptive", "always"] {
        let dir = RunDir::new().unwrap();
        let mut daemon = Options::new()
            .flag("--uplink", "null")
            .flag("--poll", mode)
            .start(&dir, "vnet")
            .unwrap();
        let config = TestFrontendConfig::new(2, 256, MODERN);
        let mut frontend = TestFrontend::connect(daemon.socket(), &config).unwrap();
        send_and_wait(&mut daemon, &mut frontend, FRAMES);
        if mode == "adaptive" {
            let before = cpu_ticks(daemon.pid()).unwrap();
            sleep(Duration::from_secs(2));
            assert!(cpu_ticks(daemon.pid()).unwrap() - before <= 1);
        }
        frontend.enable(1, false).unwrap();
        send_and_wait(&mut daemon, &mut frontend, 2 * FRAMES);
        let device = daemon.device().unwrap();
        assert!(device["pairs"][0]["worker_counters"]["polls"].as_u64() > Some(0));
    }
}
