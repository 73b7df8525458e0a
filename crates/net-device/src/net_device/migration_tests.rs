//! Tests of what a migration needs from a device: the log of written pages while its workers run,
//! and the announcement of the guest's address.

use std::collections::BTreeSet;

use virtionet_guest::dirty_log::{DirtyLog, MemorySnapshot};
use virtionet_guest::frame::{FrameSpec, Transport};
use virtionet_guest::header::NetHeader;
use virtionet_guest::net::{MODERN, PACKED};
use virtionet_guest::test_frontend::{TestFrontend, TestFrontendConfig};
use virtionet_uplink::switch::Switch;
use virtionet_vhost_user::VringState;
use virtionet_virtqueue::memory::survive_lost_memory;

use super::*;
use crate::testing::{TIMEOUT, TestUplink, net_device, send, wait_until, with_frontend};

/// Both ring formats, with mergeable buffers and without.
const FORMATS: [u64; 4] = [MODERN, MODERN | PACKED, 1 << 32, 1 << 32 | PACKED];

fn config(features: u64) -> TestFrontendConfig {
    TestFrontendConfig::new(2, 256, features)
}

/// Checks that `log` has every page that `work` changes. The driver must write none meanwhile.
fn check_logged(frontend: &mut TestFrontend, log: &DirtyLog, work: impl FnOnce(&mut TestFrontend)) {
    log.take().unwrap();
    let before = MemorySnapshot::of(frontend.ram()).unwrap();
    work(frontend);
    let after = MemorySnapshot::of(frontend.ram()).unwrap();
    let logged = log.take().unwrap();
    let changed = before.changed_in(&after);
    let missing: BTreeSet<_> = changed.difference(&logged).collect();
    assert!(!changed.is_empty() && missing.is_empty(), "{missing:x?}");
}

fn frames_of(net_device: &NetDevice, of_tx: bool) -> u64 {
    let served = net_device.pairs().next().unwrap();
    match of_tx {
        true => served.pair.tx().stats().frames.get(),
        false => served.pair.rx().stats().frames.get(),
    }
}

/// Lets frames arrive at the uplink, and waits until the guest has them and the worker sleeps.
fn arrive(net_device: &NetDevice, uplink: &TestUplink, count: u64) {
    let wanted = frames_of(net_device, false) + count;
    for n in 0..count {
        let body = vec![u8::try_from(n % 200 + 1).unwrap(); 900];
        let frame = FrameSpec::v4(Transport::Udp).build(&body).unwrap();
        uplink.arrive(frame.bytes);
    }
    wait_until("frames", || frames_of(net_device, false) == wanted);
    wait_until_idle(net_device);
}

/// Waits until the worker of queue pair 0 does nothing for a while.
fn wait_until_idle(net_device: &NetDevice) {
    let served = net_device.pairs().next().unwrap();
    let sleeps = || served.pair.worker_stats().sleeps.get();
    let before = std::cell::Cell::new(u64::MAX);
    wait_until("the worker sleeps", || {
        let now = sleeps();
        std::thread::sleep(std::time::Duration::from_millis(20));
        before.replace(now) == sleeps()
    });
}

#[test]
fn everything_that_running_workers_write_is_logged_until_the_migration_is_cancelled() {
    for features in FORMATS {
        let uplink = TestUplink::with_frames();
        let net_device = net_device(2, uplink.clone(), PollMode::Off);
        with_frontend(&net_device, &config(features), |frontend| {
            let log = DirtyLog::new(frontend.ram()).unwrap();
            for pair in &mut frontend.pairs {
                pair.rx.refill = false;
            }
            arrive(&net_device, &uplink, 5);
            for _ in 0..2 {
                frontend.start_logging(&log).unwrap();
                wait_until_idle(&net_device);
                check_logged(frontend, &log, |_| arrive(&net_device, &uplink, 30));

                let wanted = frames_of(&net_device, true) + 50;
                for _ in 0..50 {
                    let tx = &mut frontend.pairs[0].tx;
                    tx.queue(&NetHeader::default(), &[7; 80]).unwrap();
                }
                frontend.pairs[0].tx.queue.ring.publish();
                check_logged(frontend, &log, |frontend| {
                    frontend.pairs[0].tx.queue.kick_now().unwrap();
                    wait_until("frames", || frames_of(&net_device, true) == wanted);
                    wait_until_idle(&net_device);
                });
                frontend.pairs[0].tx.drain(TIMEOUT).unwrap();

                frontend.stop_logging().unwrap();
                log.take().unwrap();
                arrive(&net_device, &uplink, 30);
                send(frontend, 0, 10);
                assert!(log.take().unwrap().is_empty());
                frontend.pairs[0].rx.wait_frames(60, TIMEOUT).ok();
                frontend.pairs[0].rx.fill().unwrap();
            }
            let rx = net_device.pairs().next().unwrap().pair.rx();
            assert_eq!(rx.stats().quarantines.get(), 0);
        });
    }
}

#[test]
fn frames_that_a_switch_pushes_are_logged() {
    for features in FORMATS {
        let switch = Switch::new("lan");
        let port = |name| switch.add_device_port(name).unwrap();
        let sender = net_device(2, port("a"), PollMode::Off);
        let receiver = net_device(2, port("b"), PollMode::Off);
        with_frontend(&receiver, &config(features), |to| {
            let log = DirtyLog::new(to.ram()).unwrap();
            to.start_logging(&log).unwrap();
            to.pairs.iter_mut().for_each(|pair| pair.rx.refill = false);
            with_frontend(&sender, &config(features), |from| {
                check_logged(to, &log, |_| {
                    send(from, 0, 60);
                    wait_until("frames", || frames_of(&receiver, false) == 60);
                });
            });
        });
    }
}

#[test]
fn log_that_vanishes_quarantines_the_vrings_that_write_and_is_counted() {
    survive_lost_memory().unwrap();
    let net_device = net_device(2, TestUplink::default(), PollMode::Off);
    with_frontend(&net_device, &config(MODERN), |frontend| {
        let log = DirtyLog::new(frontend.ram()).unwrap();
        frontend.start_logging(&log).unwrap();
        // A file that takes no seals.
        let path = std::env::temp_dir().join(format!("virtionet-log-{}", std::process::id()));
        let mut options = std::fs::File::options();
        let file = options.read(true).write(true).create_new(true).open(&path);
        let file = file.unwrap();
        std::fs::remove_file(&path).unwrap();
        file.set_len(log.size()).unwrap();
        let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
        frontend.connection.set_log_base(log.size(), 0, fd).unwrap();
        file.set_len(0).unwrap();
        let frame = FrameSpec::v4(Transport::Udp).build(b"frame").unwrap();
        frontend.pairs[0].tx.send(&frame).unwrap();
        let tx = net_device.pairs().next().unwrap().pair.tx();
        wait_until("quarantine", || tx.state() == VringState::Quarantined);
        assert_eq!(tx.stats().log_lost.get(), 1);
        assert_eq!(tx.stats().memory_lost.get(), 0);
        // Started again without a log, it goes on.
        frontend.stop_logging().unwrap();
        frontend.stop().unwrap();
        frontend.reset().unwrap();
        frontend.start().unwrap();
        send(frontend, 0, 3);
    });
}

#[test]
fn address_that_the_front_end_announces_is_sent_once_to_the_other_ports() {
    let switch = Switch::new("lan");
    let port = |name| switch.add_device_port(name).unwrap();
    let moved = net_device(2, port("a"), PollMode::Off);
    let other = net_device(2, port("b"), PollMode::Off);
    let mac = [2, 0, 0, 0x12, 0x34, 0x56];
    with_frontend(&other, &config(MODERN), |receiver| {
        with_frontend(&moved, &config(MODERN), |frontend| {
            frontend.connection.send_rarp(mac).unwrap();
            let frames = receiver.pairs[0].rx.wait_frames(1, TIMEOUT).unwrap();
            assert_eq!(frames[0].bytes.len(), 64);
            assert_eq!(frames[0].bytes[..6], [0xff; 6]);
            assert_eq!(frames[0].bytes[6..12], mac);
            assert_eq!(frames[0].bytes[12..14], [0x80, 0x35]);
            assert_eq!(frames_of(&moved, true), 1);
            assert!(frontend.connection.send_rarp([1; 6]).is_err());
        });
    });
    assert_eq!(frames_of(&moved, true), 1);
    assert!(frames_of(&other, false) >= 1);
}

#[test]
fn announcement_waits_until_the_transmitq_is_enabled() {
    let uplink = TestUplink::default();
    let net_device = net_device(2, uplink.clone(), PollMode::Off);
    with_frontend(&net_device, &config(MODERN), |frontend| {
        frontend.enable(0, false).unwrap();
        frontend.connection.send_rarp([2, 0, 0, 0, 0, 1]).unwrap();
        frontend.connection.send_rarp([2, 0, 0, 0, 0, 2]).unwrap();
        wait_until_idle(&net_device);
        assert_eq!(frames_of(&net_device, true), 0);
        frontend.enable(0, true).unwrap();
        wait_until("the frame", || frames_of(&net_device, true) == 1);
        wait_until_idle(&net_device);
        assert_eq!(frames_of(&net_device, true), 1);
    });
}
