//! A TAP that is deleted, and one of the same name that is made again.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::print_stdout)]

mod host;

use std::os::fd::AsRawFd;
use std::sync::{Arc, mpsc};
use std::thread;

use host::{
    PacketSocket, become_nobody, datagram, drain, eventually, frame, in_namespaces, large_segment,
    link, open_tap, receive, run, send, share_tun, wait_for_frame,
};
use rustix::event::epoll;
use virtionet_virtio_net::header::{FrameFormat, VnetHeader};
use virtionet_virtio_net::uplink::{Received, Uplink, UplinkChange, UplinkQueue, null_rx_sink};

const PLAIN: VnetHeader = VnetHeader([0; 12]);
const MAKE: &str = "ip tuntap add dev vt0 mode tap multi_queue vnet_hdr";

fn tap(spec: &str) -> Arc<dyn Uplink> {
    eventually(|| open_tap(spec).ok())
}

fn queue(uplink: &dyn Uplink, pair: u16, is_attached: bool) -> Arc<dyn UplinkQueue> {
    let queue = uplink.open_queue(pair, null_rx_sink()).unwrap();
    queue.set_attached(is_attached).unwrap();
    queue
}

/// The text of the error that `refresh` reports.
fn fault(uplink: &dyn Uplink) -> String {
    let error = uplink.refresh().unwrap_err();
    println!("{} {error}", error.code());
    format!("{} {error}", error.code())
}

fn assert_refreshed(uplink: &dyn Uplink, expected: UplinkChange) {
    assert_eq!(uplink.refresh().unwrap(), expected);
}

/// Makes the TAP with `command`, and brings it up.
fn make(command: &str) {
    run(command);
    run("ip link set vt0 up");
}

fn transmits(queue: &dyn UplinkQueue) -> bool {
    let stats = send(queue, PLAIN, &frame(60, 1), 60);
    let is_sent = stats.frames.get() == 1;
    if !is_sent {
        println!("not transmitted: {stats:?}");
    }
    is_sent
}

#[test]
fn tap_that_is_made_again_is_opened_again_as_it_was() {
    in_namespaces(|| {
        make(MAKE);
        let uplink = tap("vt0");
        let queues = [(0, true), (1, true), (2, false)].map(|(n, on)| queue(&*uplink, n, on));
        uplink.set_format(FrameFormat::ALL).unwrap();
        uplink.set_mtu(9000).unwrap();
        let fd = queues[1].poll_fd().unwrap().as_raw_fd();
        let before = uplink.host_interface().unwrap();
        assert_refreshed(&*uplink, UplinkChange::Unchanged);

        run("ip link del vt0");
        for _ in 0..2 {
            assert!(fault(&*uplink).starts_with(
                "tap-gone TAP vt0 was deleted; make it again with `ip tuntap add dev vt0 mode tap"
            ));
        }
        let stats = send(&*queues[0], PLAIN, &frame(60, 1), 60);
        assert_eq!(stats.dropped_uplink_down.get(), 1);
        assert_eq!(receive(&*queues[0], &[2048]).0, Received::Failed);

        make(MAKE);
        assert_refreshed(&*uplink, UplinkChange::Reopened);
        assert_refreshed(&*uplink, UplinkChange::Unchanged);
        let text = link("vt0");
        for part in ["mtu 9000", "numqueues 2 numdisabled 1"] {
            assert!(text.contains(part), "{text}");
        }
        let after = uplink.host_interface().unwrap();
        assert_eq!(after.queues, [0, 1]);
        assert!(after.index != before.index && after.changes > before.changes);
        assert_eq!(queues[1].poll_fd().unwrap().as_raw_fd(), fd);
        assert!(queues.iter().all(|queue| transmits(&**queue)));
        // A frame that asks for segmentation arrives whole, with its header of 12 bytes.
        let socket = PacketSocket::with_header("vt0", true);
        socket.send(&large_segment());
        let lens = queues.each_ref().map(|queue| {
            std::iter::from_fn(|| match receive(&**queue, &[65_600]) {
                (Received::Frame(_), bytes) => Some(bytes.len()),
                _ => None,
            })
            .max()
        });
        assert_eq!(lens.iter().max().unwrap(), &Some(12 + 54 + 4000));
        assert_eq!(lens[2], None);
    });
}

#[test]
fn epoll_registration_of_the_old_tap_reports_frames_of_the_new_one() {
    in_namespaces(|| {
        make(MAKE);
        let uplink = tap("vt0");
        let queue = queue(&*uplink, 0, true);
        let poller = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        let events = epoll::EventFlags::IN | epoll::EventFlags::ET;
        let data = epoll::EventData::new_u64(7);
        epoll::add(&poller, queue.poll_fd().unwrap(), data, events).unwrap();
        let wait = || {
            let mut events = Vec::with_capacity(4);
            let second = rustix::event::Timespec {
                tv_sec: 1,
                tv_nsec: 0,
            };
            let buffer = rustix::buffer::spare_capacity(&mut events);
            epoll::wait(&poller, buffer, Some(&second)).unwrap()
        };
        for _ in 0..3 {
            run("ip link del vt0");
            assert_eq!(wait(), 1);
            make(MAKE);
            assert_refreshed(&*uplink, UplinkChange::Reopened);
            let socket = PacketSocket::on("vt0");
            drain(&*queue);
            socket.send(&frame(60, 4));
            assert_eq!(wait(), 1);
            assert_eq!(wait_for_frame(&*queue)[12..], frame(60, 4));
        }
    });
}

#[test]
fn what_is_changed_while_the_tap_is_gone_takes_effect_afterwards() {
    in_namespaces(|| {
        make(MAKE);
        let uplink = tap("vt0");
        let mut queues = vec![queue(&*uplink, 0, true), queue(&*uplink, 1, false)];
        run("ip link del vt0");
        queues[0].set_attached(false).unwrap();
        queues[1].set_attached(true).unwrap();
        queues.push(queue(&*uplink, 2, true));
        queues.push(queue(&*uplink, 3, false));
        assert!(uplink.host_interface().unwrap().queues.is_empty());
        uplink.set_mtu(4000).unwrap();
        let format = FrameFormat {
            header_len: 10,
            ..FrameFormat::ALL
        };
        uplink.set_format(format).unwrap();
        assert_eq!(receive(&*queues[3], &[2048]).0, Received::Failed);

        make(MAKE);
        // Also before the TAP is refreshed, and while one of the same name is there.
        queues.push(queue(&*uplink, 4, true));
        assert_refreshed(&*uplink, UplinkChange::Reopened);
        assert_eq!(uplink.host_interface().unwrap().queues, [1, 2, 4]);
        let text = link("vt0");
        for part in ["mtu 4000", "numqueues 3 numdisabled 2"] {
            assert!(text.contains(part), "{text}");
        }
        let socket = PacketSocket::on("vt0");
        for n in 0..200 {
            socket.send(&datagram(n, 5000 + n));
        }
        let counts: Vec<usize> = queues.iter().map(|queue| drain(&**queue)).collect();
        assert_eq!((counts[0], counts[3]), (0, 0));
        assert!([1, 2, 4].iter().all(|&n| counts[n] > 20), "{counts:?}");
        queues[1].set_attached(false).unwrap();
        assert_eq!(uplink.host_interface().unwrap().queues, [4, 2]);
        socket.send(&frame(60, 9));
        let bytes = eventually(|| {
            [2, 4]
                .iter()
                .find_map(|&n| match receive(&*queues[n], &[2048]) {
                    (Received::Frame(_), bytes) => Some(bytes),
                    _ => None,
                })
        });
        assert_eq!(bytes[10..], frame(60, 9));
    });
}

#[test]
fn tap_that_this_program_created_is_created_again() {
    in_namespaces(|| {
        run("ip link add vbr up type bridge");
        let uplink = tap("vt%d,bridge=vbr");
        let queues = [(0, true), (1, true)].map(|(n, on)| queue(&*uplink, n, on));
        uplink.set_mtu(1400).unwrap();
        for _ in 0..20 {
            run("ip link del vt0");
            assert_refreshed(&*uplink, UplinkChange::Reopened);
            let text = link("vt0");
            for part in [",UP", "master vbr", "mtu 1400", "numqueues 2 numdisabled 0"] {
                assert!(text.contains(part), "{text}");
            }
            assert!(queues.iter().all(|queue| transmits(&**queue)));
        }
        // An interface that another process creates first is used as it is.
        run("ip link del vt0");
        run(MAKE);
        run("ip link set vt0 mtu 2000");
        assert_refreshed(&*uplink, UplinkChange::Reopened);
        assert!(fault(&*uplink).contains("tap-down TAP vt0 is down"));
        assert!(link("vt0").contains("mtu 2000"));
        run("ip link del vt0");
        assert!(fault(&*uplink).contains("TAP vt0 was deleted"));
        drop((uplink, queues));
        assert!(!run("ip link").contains("vt0"));
    });
}

#[test]
fn tap_that_is_down_is_reported_until_it_is_up() {
    in_namespaces(|| {
        let uplink = tap("vt0");
        run("ip link set vt0 down");
        assert_eq!(
            fault(&*uplink),
            "tap-down TAP vt0 is down and carries nothing; bring it up with `ip link set vt0 up`"
        );
        run("ip link set vt0 up");
        assert_refreshed(&*uplink, UplinkChange::Unchanged);
        // A name does not matter to a TAP that is open.
        run("ip link set vt0 name other");
        assert_refreshed(&*uplink, UplinkChange::Unchanged);
    });
}

#[test]
fn interface_of_the_same_name_that_cannot_be_used_is_reported_until_it_can() {
    in_namespaces(|| {
        run("ip link add vbr1 up type bridge");
        run("ip link add vbr2 up type bridge");
        make(MAKE);
        let uplink = tap("vt0,bridge=vbr1");
        let queue = queue(&*uplink, 0, true);
        run("ip link del vt0");
        run("ip tuntap add dev vt0 mode tap vnet_hdr");
        assert!(fault(&*uplink).contains("tap-single-queue"));
        run("ip link del vt0");
        run("ip link add vt0 type bridge");
        assert!(fault(&*uplink).contains("not-a-tap interface"));
        run("ip link del vt0");
        make(MAKE);
        run("ip link set vt0 master vbr2");
        for _ in 0..2 {
            assert!(fault(&*uplink).contains("tap-in-other-bridge"));
        }
        run("ip link set vt0 nomaster");
        assert_refreshed(&*uplink, UplinkChange::Reopened);
        assert!(link("vt0").contains("master vbr1"));
        assert!(transmits(&*queue));
        // Another program is faster.
        run("ip link del vt0");
        let other = tap("vt0,bridge=vbr1");
        assert!(fault(&*uplink).contains("tap-shared"));
        assert!(!transmits(&*queue));
        drop(other);
        // The kernel lets go of it a moment later.
        eventually(|| fault(&*uplink).contains("tap-gone").then_some(()));
    });
}

#[test]
fn tap_in_another_network_namespace_is_not_taken_for_a_deleted_one() {
    in_namespaces(|| {
        let uplink = tap("vt0");
        let queue = queue(&*uplink, 0, true);
        // It is deleted there, or together with the namespace.
        for (delete, clean_up) in [
            ("ip -n vns link del vt0", "ip netns del vns"),
            ("ip netns del vns", "true"),
        ] {
            run("ip netns add vns");
            run("ip link set vt0 netns vns");
            run("ip -n vns link set vt0 up");
            assert_refreshed(&*uplink, UplinkChange::Unchanged);
            assert!(transmits(&*queue));
            let error = uplink.set_mtu(9000).unwrap_err();
            assert_eq!(error.code(), "tap-moved");
            run(delete);
            // The kernel removes a namespace a moment later.
            eventually(|| {
                let change = uplink.refresh().ok()?;
                (change == UplinkChange::Reopened).then_some(())
            });
            assert!(transmits(&*queue), "{delete}");
            run(clean_up);
        }
    });
}

#[test]
fn owner_of_a_tap_that_is_made_again_needs_no_privilege() {
    in_namespaces(|| {
        share_tun();
        let make_for = |user: &str| {
            run(&format!(
                "ip tuntap add dev vt0 mode tap user {user} multi_queue vnet_hdr"
            ));
            run("ip link set vt0 up mtu 2000");
        };
        make_for("65534");
        let (work, orders) = mpsc::channel::<Box<dyn FnOnce() + Send>>();
        let (done, is_done) = mpsc::channel();
        // A thread of the same namespaces that stays privileged.
        let root = thread::spawn(move || {
            for order in orders {
                order();
                done.send(()).unwrap();
            }
        });
        let as_root = |order: Box<dyn FnOnce() + Send>| {
            work.send(order).unwrap();
            is_done.recv().unwrap();
        };
        as_root(Box::new(|| {}));
        become_nobody();
        let uplink = tap("vt0");
        let queue = queue(&*uplink, 0, true);
        uplink.set_mtu(1500).unwrap();
        as_root(Box::new(|| drop(run("ip link del vt0"))));
        assert!(fault(&*uplink).contains("mode tap user 65534 multi_queue vnet_hdr`"));
        as_root(Box::new(move || make_for("1")));
        assert!(fault(&*uplink).contains("does not belong to user 65534"));
        as_root(Box::new(|| drop(run("ip link del vt0"))));
        as_root(Box::new(move || make_for("65534")));
        assert_refreshed(&*uplink, UplinkChange::Reopened);
        assert!(transmits(&*queue));
        drop(work);
        root.join().unwrap();
    });
}
