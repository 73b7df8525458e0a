//! Tests of a device whose guest's memory arrives page by page, after a migration by postcopy.

use std::cell::RefCell;
use std::sync::Arc;

use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;
use virtionet_guest::frame::{FrameSpec, Transport};
use virtionet_guest::frontend::FrontendConnection;
use virtionet_guest::header::NetHeader;
use virtionet_guest::memory::PageSource;
use virtionet_guest::net::{MODERN, PACKED};
use virtionet_guest::test_frontend::{TestFrontend, TestFrontendConfig};
use virtionet_uplink::switch::Switch;
use virtionet_virtio_net::stats::VringStats;

use super::*;
use crate::testing::{
    TIMEOUT, TestUplink, net_device, send, wait_until, with_frontend, with_socket,
};

const FORMATS: [u64; 2] = [MODERN, MODERN | PACKED];

fn config(features: u64) -> TestFrontendConfig {
    let config = TestFrontendConfig::new(1, 256, features);
    TestFrontendConfig {
        protocol: config.protocol | Protocol::PAGEFAULT.bits(),
        ..config
    }
}

/// Connects a front-end whose guest has prepared its rings by `prepare`, and then lost all pages.
fn with_postcopy(
    net_device: &NetDevice,
    features: u64,
    prepare: impl FnOnce(&mut TestFrontend),
    work: impl FnOnce(TestFrontend, &Arc<PageSource>),
) {
    with_socket(net_device, |socket| {
        let connection = FrontendConnection::from_socket(socket).unwrap();
        let mut frontend = TestFrontend::negotiate(connection, &config(features)).unwrap();
        frontend.pairs[0].rx.fill().unwrap();
        prepare(&mut frontend);
        let pages = frontend.begin_postcopy().unwrap();
        frontend.start().unwrap();
        frontend.connection.get_features().unwrap();
        work(frontend, &pages);
    });
}

fn rx_stats(net_device: &NetDevice) -> &VringStats {
    net_device.pairs().next().unwrap().pair.rx().stats()
}

fn is_inbox_open(net_device: &NetDevice) -> bool {
    net_device.pairs().next().unwrap().pair.inbox().is_open()
}

/// Three devices on a switch.
fn three_devices() -> [NetDevice; 3] {
    let switch = Switch::new("lan");
    let port = |name| switch.add_device_port(name).unwrap();
    ["a", "b", "c"].map(|name| net_device(1, port(name), PollMode::Off).with_postcopy(true))
}

#[test]
fn frames_travel_both_ways_on_a_switch_while_pages_arrive_and_afterwards() {
    for features in FORMATS {
        let [moved, other, _] = three_devices();
        with_frontend(&other, &config(features), |peer| {
            with_postcopy(
                &moved,
                features,
                |_| {},
                |mut guest, pages| {
                    for is_in_postcopy in [true, false] {
                        send(peer, 0, 60);
                        let frames = guest.pairs[0].rx.wait_frames(60, TIMEOUT).unwrap();
                        let wanted = FrameSpec::v4(Transport::Udp).build(b"frame").unwrap();
                        assert!(frames.iter().all(|frame| frame.bytes == wanted.bytes));
                        send(&mut guest, 0, 60);
                        let frames = peer.pairs[0].rx.wait_frames(60, TIMEOUT).unwrap();
                        assert!(frames.iter().all(|frame| frame.bytes == wanted.bytes));
                        if is_in_postcopy {
                            assert!(is_inbox_open(&moved));
                            assert!(pages.back_end_faults() > 3, "{}", pages.back_end_faults());
                            guest.end_postcopy().unwrap();
                            wait_until("the inbox closes", || !is_inbox_open(&moved));
                        }
                    }
                    assert_eq!(rx_stats(&moved).dropped_postcopy.get(), 0);
                    assert_eq!(rx_stats(&moved).frames.get(), 120);
                    assert_eq!(rx_stats(&moved).quarantines.get(), 0);
                },
            );
        });
    }
}

#[test]
fn no_sender_waits_for_a_receiver_whose_pages_do_not_arrive() {
    for features in FORMATS {
        let [moved, sender, other] = three_devices();
        with_frontend(&other, &config(features), |third| {
            with_frontend(&sender, &config(features), |peer| {
                with_postcopy(
                    &moved,
                    features,
                    |_| {},
                    |mut guest, pages| {
                        pages.withhold(true);
                        // To both, as the switch knows no address.
                        for _ in 0..10 {
                            send(peer, 0, 100);
                            third.pairs[0].rx.wait_frames(100, TIMEOUT).unwrap();
                        }
                        assert!(rx_stats(&moved).dropped_postcopy.get() > 0);
                        let waits = || rx_stats(&moved).frames.get() < 256;
                        assert!(waits());
                        pages.withhold(false);
                        guest.pairs[0].rx.wait_frames(200, TIMEOUT).unwrap();
                        guest.end_postcopy().unwrap();
                    },
                );
                // Whatever waited in the inbox is gone with the front-end.
                assert!(!is_inbox_open(&moved));
            });
        });
    }
}

#[test]
fn no_receiver_waits_for_a_sender_whose_pages_do_not_arrive() {
    for features in FORMATS {
        let [moved, peer_device, other] = three_devices();
        with_frontend(&other, &config(features), |third| {
            with_frontend(&peer_device, &config(features), |peer| {
                let queue = |frontend: &mut TestFrontend| {
                    for _ in 0..20 {
                        let tx = &mut frontend.pairs[0].tx;
                        tx.queue(&NetHeader::default(), &[7; 80]).unwrap();
                    }
                };
                with_postcopy(&moved, features, queue, |mut guest, pages| {
                    pages.withhold(true);
                    let before = pages.back_end_faults();
                    guest.pairs[0].tx.queue.ring.publish();
                    guest.pairs[0].tx.queue.kick_now().unwrap();
                    wait_until("an access", || pages.back_end_faults() > before);
                    for (from, to) in [(0, 1), (1, 0)] {
                        let ends = [&mut *peer, &mut *third];
                        send(ends[from], 0, 100);
                        ends[to].pairs[0].rx.wait_frames(100, TIMEOUT).unwrap();
                    }
                    pages.withhold(false);
                    peer.pairs[0].rx.wait_frames(20, TIMEOUT).unwrap();
                    guest.pairs[0].tx.drain(TIMEOUT).unwrap();
                    guest.end_postcopy().unwrap();
                });
            });
        });
    }
}

#[test]
fn stop_of_a_vring_whose_worker_waits_for_a_page_is_answered_once_the_page_is_there() {
    let [moved, sender, _] = three_devices();
    with_frontend(&sender, &config(MODERN), |peer| {
        with_postcopy(
            &moved,
            MODERN,
            |_| {},
            |mut guest, pages| {
                pages.withhold(true);
                let before = pages.back_end_faults();
                send(peer, 0, 10);
                wait_until("an access", || pages.back_end_faults() > before);
                let pages = Arc::clone(pages);
                let serve = std::thread::spawn(move || {
                    std::thread::sleep(std::time::Duration::from_millis(100));
                    pages.withhold(false);
                });
                guest.stop().unwrap();
                serve.join().unwrap();
                guest.start().unwrap();
                send(peer, 0, 10);
                guest.pairs[0].rx.wait_frames(10, TIMEOUT).unwrap();
                guest.end_postcopy().unwrap();
            },
        );
    });
}

#[test]
fn front_end_that_is_gone_while_its_worker_waits_for_a_page_is_followed_by_another_one() {
    let [moved, sender, _] = three_devices();
    let kept = RefCell::new(Vec::new());
    with_frontend(&sender, &config(MODERN), |peer| {
        for _ in 0..2 {
            with_postcopy(
                &moved,
                MODERN,
                |_| {},
                |guest, pages| {
                    pages.withhold(true);
                    let before = pages.back_end_faults();
                    send(peer, 0, 10);
                    wait_until("an access", || pages.back_end_faults() > before);
                    // It takes the pages with it.
                    kept.borrow_mut().push(Arc::clone(pages));
                    drop(guest);
                },
            );
        }
        assert_eq!(rx_stats(&moved).memory_lost.get(), 2);
        with_frontend(&moved, &config(MODERN), |guest| {
            send(peer, 0, 10);
            guest.pairs[0].rx.wait_frames(10, TIMEOUT).unwrap();
        });
    });
}

/// The test's uplink asserts that no buffer of the guest is given to it.
#[test]
fn system_calls_of_an_uplink_get_no_memory_of_the_guest() {
    for features in FORMATS {
        let uplink = TestUplink::with_frames();
        let moved = net_device(1, uplink.clone(), PollMode::Off).with_postcopy(true);
        with_postcopy(
            &moved,
            features,
            |_| {},
            |mut guest, _| {
                for _ in 0..4 {
                    // After a large frame the next ones would be read into the guest's buffers.
                    let frame = FrameSpec::v4(Transport::Udp).build(&[9; 6000]).unwrap();
                    uplink.arrive(frame.bytes.clone());
                    let frames = guest.pairs[0].rx.wait_frames(1, TIMEOUT).unwrap();
                    assert_eq!(frames[0].bytes, frame.bytes);
                }
                // Afterwards the next frames would be read into the guest's buffers.
                guest.stop().unwrap();
                guest.end_postcopy().unwrap();
            },
        );
        assert_eq!(rx_stats(&moved).quarantines.get(), 0);
    }
}

#[test]
fn postcopy_is_offered_only_where_the_front_end_may_have_it() {
    use virtionet_vhost_user::Backend;
    let pagefault = Protocol::PAGEFAULT.bits();
    let device = net_device(1, TestUplink::default(), PollMode::Off);
    assert_eq!(device.protocol_features() & pagefault, 0);
    let device = device.with_postcopy(true);
    assert_eq!(device.protocol_features() & pagefault, pagefault);
}
