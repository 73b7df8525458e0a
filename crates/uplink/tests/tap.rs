//! Frames through real TAPs, each test in a network namespace of its own.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::print_stdout)]

mod host;

use std::sync::Arc;

use host::{
    PacketSocket, become_nobody, datagram, drain, eventually, frame, in_namespaces, kernel_packets,
    large_segment, link, open_tap, receive, run, send, share_tun, wait_for_frame,
};
use virtionet_uplink::tap::{Tap, TapConfig};
use virtionet_virtio_net::header::{FrameFormat, VnetHeader};
use virtionet_virtio_net::stats::VringStats;
use virtionet_virtio_net::uplink::{Received, TxFrame, Uplink, UplinkQueue, null_rx_sink};

const PLAIN: VnetHeader = VnetHeader([0; 12]);
const WHOLE: usize = 65_600;

fn tap(spec: &str) -> Arc<dyn Uplink> {
    eventually(|| open_tap(spec).ok())
}

fn attached(uplink: &dyn Uplink, pair: u16) -> Arc<dyn UplinkQueue> {
    let queue = uplink.open_queue(pair, null_rx_sink()).unwrap();
    queue.set_attached(true).unwrap();
    queue
}

fn format(header_len: usize, tso: bool) -> FrameFormat {
    FrameFormat {
        header_len,
        csum: tso,
        tso4: tso,
        tso6: tso,
        ecn: tso,
        ufo: tso,
    }
}

#[test]
fn transmitted_frames_arrive_unchanged() {
    in_namespaces(|| {
        let uplink = tap("vt0");
        let queue = attached(&*uplink, 0);
        let socket = PacketSocket::on("vt0");
        // In one segment, in odd ones, in more than the small list holds, in as many as one system
        // call accepts with the header, in one more, and in many more.
        for (len, cut) in [
            (14, 14),
            (60, 7),
            (1514, WHOLE),
            (1514, 20),
            (1023, 1),
            (1024, 1),
            (1514, 1),
            (65_549, 4096),
            (65_549, 60),
        ] {
            for header_len in [12, 10] {
                uplink.set_format(format(header_len, false)).unwrap();
                let sent = frame(len, 1);
                // The kernel must not see the guest's value of num_buffers.
                let mut header = PLAIN;
                header.0[10..].fill(0xff);
                let stats = send(&*queue, header, &sent, cut);
                assert_eq!(stats.frames.get(), 1, "{len} in {cut}");
                assert_eq!(stats.bytes.get(), u64::try_from(len).unwrap());
                assert!(socket.next() == sent, "{len} in {cut}");
            }
        }
    });
}

#[test]
fn burst_is_transmitted_in_order() {
    in_namespaces(|| {
        let uplink = tap("vt0");
        let queue = attached(&*uplink, 0);
        let socket = PacketSocket::on("vt0");
        let (before, _) = kernel_packets("vt0");
        let stats = VringStats::default();
        let mut guest = host::Guest::new();
        for mark in 0..64 {
            guest.put(&frame(100, mark), 100);
        }
        let burst: Vec<TxFrame<'_>> = guest
            .slices()
            .chunks(1)
            .map(|payload| TxFrame {
                header: PLAIN,
                payload,
                len: 100,
            })
            .collect();
        queue.transmit(&burst, &stats);
        assert_eq!((stats.frames.get(), stats.bytes.get()), (64, 6400));
        assert_eq!(kernel_packets("vt0").0 - before, 64);
        for mark in 0..64 {
            assert_eq!(socket.next(), frame(100, mark));
        }
    });
}

#[test]
fn frames_arrive_in_many_buffers_and_too_long_ones_are_reported() {
    in_namespaces(|| {
        let uplink = tap("vt0");
        let queue = attached(&*uplink, 0);
        let socket = PacketSocket::on("vt0");
        assert_eq!(receive(&*queue, &[WHOLE]).0, Received::Empty);
        for header_len in [12, 10] {
            uplink.set_format(format(header_len, false)).unwrap();
            let sent = frame(1514, 3);
            for buffers in [
                vec![header_len + 1514],
                vec![WHOLE],
                vec![5, 9, 1, 3000],
                vec![32; 48],
                vec![2; 900],
                vec![2; 1400],
            ] {
                socket.send(&sent);
                let (received, bytes) = receive(&*queue, &buffers);
                assert_eq!(received, Received::Frame(header_len + 1514), "{buffers:?}");
                assert_eq!(bytes[..10], [0; 10]);
                assert!(bytes[header_len..] == sent, "{buffers:?}");
            }
            for buffers in [vec![header_len + 1513], vec![700, 700], vec![1; 2000]] {
                socket.send(&sent);
                assert_eq!(receive(&*queue, &buffers).0, Received::TooLong);
            }
            assert_eq!(receive(&*queue, &[WHOLE]).0, Received::Empty);
        }
        // Without space for a header the kernel refuses, and the frame is lost.
        socket.send(&frame(60, 4));
        assert_eq!(receive(&*queue, &[8]).0, Received::Lost);
        assert_eq!(receive(&*queue, &[WHOLE]).0, Received::Empty);
        // The part that does not fit into the buffers goes to the bounce buffer.
        socket.send(&frame(60, 5));
        let mut bounce = [0; 64];
        assert_eq!(queue.receive(&[], &mut bounce), Received::TooLong);
        socket.send(&frame(50, 5));
        assert_eq!(queue.receive(&[], &mut bounce), Received::Frame(60));
        assert_eq!(bounce[10..60], frame(50, 5));
    });
}

#[test]
fn detached_queue_receives_nothing() {
    in_namespaces(|| {
        let uplink = tap("vt0");
        let queues = [attached(&*uplink, 0), attached(&*uplink, 1)];
        let socket = PacketSocket::on("vt0");
        let spread = || {
            for port in 0..200 {
                socket.send(&datagram(port, 5000 + port));
            }
            queues.each_ref().map(|queue| drain(&**queue))
        };
        let [first, second] = spread();
        assert!(first > 20 && second > 20, "{first} and {second}");
        assert_eq!(first + second, 200);
        for (idle, expected) in [(1, [200, 0]), (0, [0, 0])] {
            // The second call changes nothing.
            queues[idle].set_attached(false).unwrap();
            queues[idle].set_attached(false).unwrap();
            assert_eq!(spread(), expected);
        }
        queues[1].set_attached(true).unwrap();
        assert_eq!(spread(), [0, 200]);
        // A new queue is detached; a queue that is opened again is as it was.
        let third = uplink.open_queue(2, null_rx_sink()).unwrap();
        assert_eq!((spread(), drain(&*third)), ([0, 200], 0));
        let again = uplink.open_queue(1, null_rx_sink()).unwrap();
        socket.send(&datagram(1, 2));
        assert_eq!(wait_for_frame(&*again).len(), 12 + 46);
        // A detached queue can transmit.
        assert_eq!(send(&*third, PLAIN, &frame(60, 1), 60).frames.get(), 1);
    });
}

#[test]
fn reply_arrives_at_the_queue_on_which_its_flow_was_transmitted() {
    in_namespaces(|| {
        let uplink = tap("vt0");
        let queues: Vec<_> = (0..4).map(|pair| attached(&*uplink, pair)).collect();
        let socket = PacketSocket::on("vt0");
        for port in 0..32_u16 {
            let queue = usize::from(port % 4);
            send(&*queues[queue], PLAIN, &datagram(port, 900 + port), WHOLE);
        }
        for port in 0..32_u16 {
            socket.send(&datagram(900 + port, port));
            let got: Vec<usize> = queues.iter().map(|queue| drain(&**queue)).collect();
            assert_eq!(got[usize::from(port % 4)], 1, "port {port}: {got:?}");
        }
    });
}

#[test]
fn offloads_follow_the_format_on_every_queue() {
    in_namespaces(|| {
        let uplink = tap("vt0");
        let queue = attached(&*uplink, 0);
        let socket = PacketSocket::with_header("vt0", true);
        let segments = |queue: &dyn UplinkQueue| {
            socket.send(&large_segment());
            std::iter::from_fn(|| match receive(queue, &[WHOLE]) {
                (Received::Frame(_), bytes) => Some((bytes[1], bytes.len() - 12)),
                _ => None,
            })
            .collect::<Vec<_>>()
        };
        let small = vec![(0, 1054), (0, 1054), (0, 1054), (0, 1054)];
        let large = vec![(1, 4054)];
        assert_eq!(segments(&*queue), small);
        uplink.set_format(format(12, true)).unwrap();
        assert_eq!(segments(&*queue), large);
        let second = attached(&*uplink, 1);
        queue.set_attached(false).unwrap();
        assert_eq!(segments(&*second), large);
        uplink.set_format(format(12, false)).unwrap();
        assert_eq!(segments(&*second), small);
    });
}

#[test]
fn large_frame_of_the_guest_is_accepted_whole() {
    in_namespaces(|| {
        let uplink = tap("vt0");
        let queue = attached(&*uplink, 0);
        let packet = large_segment();
        let mut header = PLAIN;
        header.0[..10].copy_from_slice(&packet[..10]);
        let stats = send(&*queue, header, &packet[10..], 1000);
        assert_eq!((stats.frames.get(), stats.bytes.get()), (1, 4054));
        // A checksum beyond the frame: the kernel refuses it, and the next frame passes.
        header.0[6..8].copy_from_slice(&60_000_u16.to_le_bytes());
        let stats = send(&*queue, header, &packet[10..], 1000);
        assert_eq!(stats.frames.get(), 0);
        assert_eq!(stats.dropped_uplink_error.get(), 1);
        assert_eq!(send(&*queue, PLAIN, &frame(60, 1), 60).frames.get(), 1);
    });
}

#[test]
fn frames_to_a_tap_that_is_down_or_gone_are_dropped_and_counted() {
    in_namespaces(|| {
        let uplink = tap("vt0");
        let queue = attached(&*uplink, 0);
        run("ip link set vt0 down");
        let stats = send(&*queue, PLAIN, &frame(60, 1), 60);
        assert_eq!(
            (stats.frames.get(), stats.dropped_uplink_down.get()),
            (0, 1)
        );
        assert_eq!(receive(&*queue, &[WHOLE]).0, Received::Empty);
        run("ip link set vt0 up");
        assert_eq!(send(&*queue, PLAIN, &frame(60, 1), 60).frames.get(), 1);

        run("ip link del vt0");
        let stats = send(&*queue, PLAIN, &frame(60, 1), 60);
        assert_eq!(
            (stats.frames.get(), stats.dropped_uplink_down.get()),
            (0, 1)
        );
        assert_eq!(receive(&*queue, &[WHOLE]).0, Received::Failed);
    });
}

#[test]
fn unmapped_guest_memory_loses_one_frame_only() {
    virtionet_virtqueue::memory::survive_lost_memory().unwrap();
    in_namespaces(|| {
        let uplink = tap("vt0");
        let queue = attached(&*uplink, 0);
        let socket = PacketSocket::on("vt0");
        let mut guest = host::Guest::new();
        guest.put(&frame(100, 1), 100);
        guest.cut_short();
        let stats = VringStats::default();
        let lost = TxFrame {
            header: PLAIN,
            payload: guest.slices(),
            len: 100,
        };
        queue.transmit(&[lost], &stats);
        assert_eq!(
            (stats.frames.get(), stats.dropped_uplink_error.get()),
            (0, 1)
        );
        // The memory was found lost and replaced with zeros, so further frames pass.
        assert!(guest.bytes().iter().all(|byte| *byte == 0));
        socket.send(&frame(60, 2));
        assert_eq!(queue.receive(guest.slices(), &mut [0]), Received::Frame(72));
        socket.send(&frame(60, 3));
        assert_eq!(wait_for_frame(&*queue)[12..], frame(60, 3));
    });
}

#[test]
fn queue_that_is_dropped_is_closed_and_can_be_opened_again() {
    in_namespaces(|| {
        let uplink = tap("vt0");
        let has_queues = |attached: usize, detached: usize| {
            let expected = format!("numqueues {attached} numdisabled {detached}");
            eventually(|| link("vt0").contains(&expected).then_some(()));
        };
        let kept = attached(&*uplink, 1);
        let [detached, last] = [2, 3].map(|pair| attached(&*uplink, pair));
        detached.set_attached(false).unwrap();
        has_queues(2, 2);
        drop((detached, last));
        has_queues(1, 1);
        assert_eq!(uplink.host_interface().unwrap().queues, [1]);
        let again = attached(&*uplink, 3);
        has_queues(2, 1);
        assert_eq!(uplink.host_interface().unwrap().queues, [1, 3]);
        let socket = PacketSocket::on("vt0");
        send(&*again, PLAIN, &frame(60, 1), 60);
        assert_eq!(socket.next(), frame(60, 1));
        // The first queue stays open, or the interface would disappear.
        drop((kept, again, uplink.open_queue(0, null_rx_sink()).unwrap()));
        has_queues(0, 1);
    });
}

#[test]
fn tap_that_was_renamed_still_gets_queues() {
    in_namespaces(|| {
        let uplink = tap("vt0");
        run("ip link set vt0 down");
        run("ip link set vt0 name other");
        run("ip link set other up");
        let queue = attached(&*uplink, 1);
        let socket = PacketSocket::on("other");
        send(&*queue, PLAIN, &frame(60, 1), 60);
        assert_eq!(socket.next(), frame(60, 1));
        assert!(!run("ip link").contains("vt0"));
    });
}

#[test]
fn created_tap_is_up_in_its_bridge_and_disappears_with_the_uplink() {
    in_namespaces(|| {
        run("ip link add vbr type bridge");
        let uplink = tap("vt%d,bridge=vbr");
        assert_eq!((uplink.kind(), uplink.name().as_str()), ("tap", "vt0"));
        let other = tap("vt%d");
        assert_eq!(other.name(), "vt1");
        let text = link("vt0");
        assert!(
            text.contains(",UP") && text.contains("master vbr"),
            "{text}"
        );
        assert!(text.contains("numdisabled 1"), "{text}");
        assert!(!link("vt1").contains("master"));
        let queue = uplink.open_queue(0, null_rx_sink()).unwrap();
        drop(uplink);
        link("vt0");
        drop(queue);
        eventually(|| (!run("ip link").contains("vt0")).then_some(()));
    });
}

#[test]
fn frames_pass_from_tap_to_tap_through_a_bridge() {
    in_namespaces(|| {
        run("ip link add vbr up type bridge");
        let uplinks = [tap("vt0,bridge=vbr"), tap("vt1,bridge=vbr")];
        let queues = uplinks.each_ref().map(|uplink| attached(&**uplink, 0));
        let sent = frame(1514, 7);
        send(&*queues[0], PLAIN, &sent, 100);
        let got = loop {
            // The bridge may send a frame of its own first.
            let got = wait_for_frame(&*queues[1]);
            if got[24..26] == host::ETHERTYPE {
                break got;
            }
        };
        assert!(got[12..] == sent);
    });
}

#[test]
fn mtu_is_set_on_a_created_tap_and_raised_on_an_existing_one() {
    in_namespaces(|| {
        let ours = tap("vt0");
        run("ip tuntap add dev vt1 mode tap multi_queue vnet_hdr");
        let theirs = tap("vt1");
        for (mtu, on_ours, on_theirs) in [
            (9000, "mtu 9000 ", "mtu 9000 "),
            (1400, "mtu 1400 ", "mtu 9000 "),
            (65_521, "mtu 65521 ", "mtu 65521 "),
        ] {
            ours.set_mtu(mtu).unwrap();
            theirs.set_mtu(mtu).unwrap();
            assert!(link("vt0").contains(on_ours), "{mtu}");
            assert!(link("vt1").contains(on_theirs), "{mtu}");
        }
        let error = ours.set_mtu(65_535).unwrap_err().to_string();
        assert!(
            error.contains("MTU of 65521 and it cannot be set to 65535"),
            "{error}"
        );
    });
}

#[test]
fn mtu_that_the_host_changes_costs_an_open_queue_no_frame() {
    in_namespaces(|| {
        let uplink = tap("vt0");
        let queue = attached(&*uplink, 0);
        let socket = PacketSocket::on("vt0");
        for (mtu, len) in [(9000, 9014), (1280, 1294), (1500, 1514)] {
            run(&format!("ip link set vt0 mtu {mtu}"));
            socket.send(&frame(len, 6));
            let received = eventually(|| match receive(&*queue, &[WHOLE]) {
                (Received::Frame(_), bytes) => Some(bytes),
                _ => None,
            });
            assert_eq!(received[12..], frame(len, 6), "{mtu}");
            // What the guest sends may be longer than the host's MTU.
            let stats = send(&*queue, PLAIN, &frame(9014, 7), 9014);
            assert_eq!(stats.frames.get(), 1, "{mtu}");
        }
    });
}

#[test]
fn existing_tap_is_not_changed() {
    in_namespaces(|| {
        run("ip tuntap add dev vt0 mode tap multi_queue vnet_hdr");
        for _ in 0..2 {
            let uplink = tap("vt0");
            assert!(!link("vt0").contains(",UP"));
            run("ip link set vt0 up");
            let queue = attached(&*uplink, 0);
            assert_eq!(send(&*queue, PLAIN, &frame(60, 1), 60).frames.get(), 1);
            drop((uplink, queue));
            assert!(link("vt0").contains(",UP"));
            run("ip link set vt0 down");
        }
    });
}

#[test]
fn owner_of_a_tap_needs_no_privilege() {
    in_namespaces(|| {
        share_tun();
        run("ip link add vbr up type bridge");
        run("ip tuntap add dev vt0 mode tap user 65534 multi_queue vnet_hdr");
        run("ip link set vt0 up mtu 2000 master vbr");
        let socket = PacketSocket::on("vt0");
        become_nobody();
        let uplink = tap("vt0,bridge=vbr");
        uplink.set_format(format(12, true)).unwrap();
        uplink.set_mtu(1500).unwrap();
        let error = uplink.set_mtu(2001).unwrap_err().to_string();
        assert!(
            error.contains("MTU of 2000 and it cannot be set to 2001"),
            "{error}"
        );
        let queues = [attached(&*uplink, 0), attached(&*uplink, 1)];
        for (queue, mark) in queues.iter().zip(1..) {
            assert_eq!(send(&**queue, PLAIN, &frame(60, mark), 60).frames.get(), 1);
            assert_eq!(socket.next(), frame(60, mark));
        }
        queues[0].set_attached(false).unwrap();
        socket.send(&frame(60, 9));
        assert_eq!(wait_for_frame(&*queues[1])[12..], frame(60, 9));
    });
}

#[test]
fn tap_of_an_image_continues_with_the_queues_and_the_frames_that_wait_in_them() {
    in_namespaces(|| {
        let config = TapConfig {
            name: "vt0".into(),
            bridge: None,
        };
        let old = eventually(|| Tap::open(&config).ok());
        let _queues = [attached(&old, 0), attached(&old, 1)];
        let early = old.to_image().unwrap();
        // A third queue is opened after the first image.
        let third = attached(&old, 2);
        third.set_attached(false).unwrap();
        let socket = PacketSocket::on("vt0");
        for port in 0..100 {
            socket.send(&datagram(port, 5000 + port));
        }
        // A daemon that does not take over after all detaches nothing.
        drop(Tap::from_image(&config, &early).unwrap());
        let new = Tap::from_image(&config, &early).unwrap();
        new.update_from_image(&old.to_image().unwrap()).unwrap();
        assert_eq!(
            new.host_interface().unwrap().queues,
            old.host_interface().unwrap().queues
        );
        new.own();
        let queues = [0, 1, 2].map(|pair| new.open_queue(pair, null_rx_sink()).unwrap());
        // The process of the old one ends, and it does nothing more.
        std::mem::forget((old, third, _queues));
        let [first, second, third] = queues.each_ref().map(|queue| drain(&**queue));
        assert!(first > 10 && second > 10, "{first} and {second}");
        assert_eq!((first + second, third), (100, 0));
        // From now on it detaches and attaches them itself.
        queues[0].set_attached(false).unwrap();
        queues[2].set_attached(true).unwrap();
        for port in 0..100 {
            socket.send(&datagram(port, 5000 + port));
        }
        let [first, second, third] = queues.each_ref().map(|queue| drain(&**queue));
        assert!(second > 10 && third > 10, "{second} and {third}");
        assert_eq!((first, second + third), (0, 100));
    });
}
