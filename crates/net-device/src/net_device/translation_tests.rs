//! Devices behind an IOMMU that answers when a test wants it to.

use std::collections::BTreeSet;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::Duration;

use virtionet_guest::dirty_log::{DirtyLog, MemorySnapshot};
use virtionet_guest::frame::{FrameSpec, Transport};
use virtionet_guest::frontend::FrontendConnection;
use virtionet_guest::iommu::{ACCESS_PLATFORM, DISTANCE, TestIommu, to_distant_regions};
use virtionet_guest::net::{MODERN, PACKED};
use virtionet_guest::test_frontend::{TestFrontend, TestFrontendConfig};
use virtionet_uplink::switch::Switch;
use virtionet_virtio_net::stats::VringStats;

use super::*;
use crate::testing::{
    TIMEOUT, TestUplink, net_device, send, sent_frames, wait_until, with_frontend, with_socket,
};

/// All I/O virtual addresses, in the form of INVALIDATE.
const ALL: (u64, u64) = (0, 0);
const FORMATS: [u64; 2] = [MODERN, MODERN | PACKED];

fn config(features: u64) -> TestFrontendConfig {
    TestFrontendConfig {
        required: ACCESS_PLATFORM,
        ..TestFrontendConfig::new(1, 64, features | ACCESS_PLATFORM)
    }
}

fn rx_stats(net_device: &NetDevice) -> &VringStats {
    net_device.pairs().next().unwrap().pair.rx().stats()
}

/// Connects a front-end whose device is behind an IOMMU, and whose vrings wait for it.
fn with_iommu(
    net_device: &NetDevice,
    features: u64,
    work: impl FnOnce(&mut TestFrontend, &mut TestIommu),
) {
    with_socket(net_device, |socket: UnixStream| {
        let config = config(features);
        let other_end = socket.try_clone().unwrap();
        let connection = FrontendConnection::from_socket(socket).unwrap();
        let mut frontend = TestFrontend::negotiate(connection, &config).unwrap();
        let channel = frontend.connection.open_backend_channel().unwrap();
        let mut iommu = TestIommu::new(other_end, channel, frontend.ram()).unwrap();
        frontend.pairs[0].rx.fill().unwrap();
        frontend.start().unwrap();
        work(&mut frontend, &mut iommu);
    });
}

/// Answers all misses while `work` runs.
fn serving(iommu: &mut TestIommu, work: impl FnOnce()) -> usize {
    let is_done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let served = scope.spawn(|| iommu.serve_until(|| is_done.load(Ordering::Relaxed)));
        work();
        is_done.store(true, Ordering::Relaxed);
        served.join().unwrap().unwrap()
    })
}

fn frame(byte: u8) -> Vec<u8> {
    FrameSpec::v4(Transport::Udp)
        .build(&[byte; 700])
        .unwrap()
        .bytes
}

#[test]
fn frames_pass_in_both_directions_by_translated_addresses() {
    for features in FORMATS {
        let uplink = TestUplink::with_frames();
        let net_device = net_device(1, uplink.clone(), PollMode::Off);
        with_iommu(&net_device, features, |frontend, iommu| {
            let answered = serving(iommu, || {
                send(frontend, 0, 200);
                for n in 0..100 {
                    uplink.arrive(frame(n));
                    let got = frontend.pairs[0].rx.wait_frames(1, TIMEOUT).unwrap();
                    assert_eq!(got[0].bytes, frame(n));
                }
            });
            assert!(answered > 0);
            assert_eq!(sent_frames(&net_device), [200]);
            assert_eq!(rx_stats(&net_device).quarantines.get(), 0);
        });
    }
}

#[test]
fn frames_wait_for_translations_that_come_late_and_none_is_lost() {
    for features in FORMATS {
        let uplink = TestUplink::with_frames();
        let net_device = net_device(1, uplink.clone(), PollMode::Off);
        with_iommu(&net_device, features, |frontend, iommu| {
            serving(iommu, || send(frontend, 0, 1));
            frontend.connection.invalidate(ALL.0, ALL.1).unwrap();
            for n in 0..20 {
                uplink.arrive(frame(n));
            }
            wait_until("the receiveq waits", || {
                rx_stats(&net_device).iotlb_misses.get() > 0
            });
            sleep(Duration::from_millis(50));
            assert_eq!(uplink.waiting_frames(), 20);
            serving(iommu, || {
                let got = frontend.pairs[0].rx.wait_frames(20, TIMEOUT).unwrap();
                for (n, got) in (0..).zip(got) {
                    assert_eq!(got.bytes, frame(n));
                }
            });
        });
    }
}

#[test]
fn translations_may_be_taken_back_all_the_time() {
    for features in FORMATS {
        let uplink = TestUplink::with_frames();
        let net_device = net_device(1, uplink.clone(), PollMode::Off);
        with_iommu(&net_device, features, |frontend, iommu| {
            serving(iommu, || {
                for n in 0..100 {
                    let body = frame(n);
                    uplink.arrive(body.clone());
                    let frame = FrameSpec::v4(Transport::Udp).build(&[n; 80]).unwrap();
                    frontend.pairs[0].tx.send(&frame).unwrap();
                    frontend.pairs[0].tx.flush().unwrap();
                    // In a few steps out of ten only a part of what is used.
                    let (iova, size) = match n % 10 {
                        0..7 => ALL,
                        part => (u64::from(part) << 14, 1 << 16),
                    };
                    frontend.connection.invalidate(iova, size).unwrap();
                    let got = frontend.pairs[0].rx.wait_frames(1, TIMEOUT).unwrap();
                    assert_eq!(got[0].bytes, body);
                }
                frontend.pairs[0].tx.drain(TIMEOUT).unwrap();
            });
            assert_eq!(sent_frames(&net_device), [100]);
            assert!(rx_stats(&net_device).iotlb_invalidations.get() >= 50);
            assert_eq!(rx_stats(&net_device).quarantines.get(), 0);
        });
    }
}

#[test]
fn device_works_while_the_iommu_of_another_never_answers() {
    let silent = net_device(1, TestUplink::default(), PollMode::Off);
    with_iommu(&silent, MODERN, |frontend, iommu| {
        serving(iommu, || send(frontend, 0, 1));
        frontend.connection.invalidate(ALL.0, ALL.1).unwrap();
        let frame = FrameSpec::v4(Transport::Udp).build(b"frame").unwrap();
        frontend.pairs[0].tx.send(&frame).unwrap();
        frontend.pairs[0].tx.flush().unwrap();
        let other = net_device(1, TestUplink::default(), PollMode::Off);
        with_frontend(
            &other,
            &TestFrontendConfig::new(1, 64, MODERN),
            |other_frontend| {
                send(other_frontend, 0, 100);
            },
        );
        assert_eq!(sent_frames(&silent), [1]);
        // The misses are repeated once a second, not all the time.
        sleep(Duration::from_millis(300));
        let mut misses = 0;
        while iommu.next_miss().unwrap().is_some() {
            misses += 1;
        }
        assert!((1..=128).contains(&misses), "{misses}");
        frontend.stop().unwrap();
    });
}

#[test]
fn switch_drops_and_counts_frames_for_a_guest_without_translations_and_does_not_wait() {
    let switch = Switch::new("lan");
    let port = |name| switch.add_device_port(name).unwrap();
    let sender = net_device(1, port("a"), PollMode::Off);
    let receiver = net_device(1, port("b"), PollMode::Off);
    with_iommu(&receiver, MODERN, |to, iommu| {
        serving(iommu, || send(to, 0, 1));
        with_frontend(&sender, &TestFrontendConfig::new(1, 64, MODERN), |from| {
            // What the guest has reserved is there; then its translations end.
            to.connection.invalidate(ALL.0, ALL.1).unwrap();
            let stats = rx_stats(&receiver);
            let before = stats.frames.get();
            send(from, 0, 50);
            wait_until("drops", || stats.dropped_untranslated.get() == 50);
            assert_eq!(stats.frames.get(), before);
            assert_eq!(stats.dropped_no_buffer.get(), 0);
            // The worker asks for translations without a frame, so that the next ones arrive.
            serving(iommu, || {
                let waits = || {
                    receiver
                        .pairs()
                        .next()
                        .unwrap()
                        .pair
                        .rx()
                        .waits_for_translation()
                };
                wait_until("translations", || !waits());
            });
            send(from, 0, 5);
            wait_until("frames", || stats.frames.get() == before + 5);
        });
    });
}

#[test]
fn everything_that_is_written_by_translated_addresses_is_logged_by_guest_address() {
    for features in FORMATS {
        let uplink = TestUplink::with_frames();
        let net_device = net_device(1, uplink.clone(), PollMode::Off);
        with_iommu(&net_device, features, |frontend, iommu| {
            frontend.pairs[0].rx.refill = false;
            serving(iommu, || {
                send(frontend, 0, 1);
                uplink.arrive(frame(0));
                wait_until("frames", || rx_stats(&net_device).frames.get() == 1);
            });
            let regions = to_distant_regions(frontend.ram().regions());
            let log = DirtyLog::of_regions(&regions).unwrap();
            frontend.start_logging(&log).unwrap();
            serving(iommu, || {
                sleep(Duration::from_millis(50));
                log.take().unwrap();
                let before = MemorySnapshot::of(frontend.ram()).unwrap();
                for n in 1..20 {
                    uplink.arrive(frame(n));
                }
                wait_until("frames", || rx_stats(&net_device).frames.get() == 20);
                sleep(Duration::from_millis(50));
                let after = MemorySnapshot::of(frontend.ram()).unwrap();
                let logged = log.take().unwrap();
                let changed = before.changed_in(&after);
                assert!(!changed.is_empty());
                let guest_page = |page: &u64| page + DISTANCE / 4096;
                let changed: BTreeSet<u64> = changed.iter().map(guest_page).collect();
                let missing: Vec<_> = changed.difference(&logged).collect();
                assert!(missing.is_empty(), "{missing:x?}");
            });
        });
    }
}
