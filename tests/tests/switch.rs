//! Devices of one process on a switch: which devices receive which frames, and on which queue
//! pairs.
#![allow(clippy::unwrap_used)]

use std::slice::from_ref;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use nix::sys::signal::Signal;
use serde_json::Value;
use virtionet_guest::frame::{Checksum, Frame, FrameSpec, Transport, check, ethernet};
use virtionet_guest::header::NetHeader;
use virtionet_guest::net::{MODERN, OFFLOADS, PACKED};
use virtionet_guest::test_frontend::{TestFrontend, TestFrontendConfig};
use virtionet_tests::daemon::{Daemon, Options};
use virtionet_tests::paths::RunDir;
use virtionet_tests::responder::{EchoResponder, ResponderAddresses};
use virtionet_tests::topology::HostNetwork;

const TIMEOUT: Duration = Duration::from_secs(5);
/// The time after which a test assumes that no frame arrives.
const NO_FRAME_TIMEOUT: Duration = Duration::from_millis(50);
/// The number that stands for the broadcast address.
const BROADCAST: u8 = 0xff;

/// A daemon with one device for each uplink.
struct SwitchTestbed {
    dir: RunDir,
    daemon: Daemon,
}

impl SwitchTestbed {
    fn new(uplinks: &[&str]) -> Self {
        Self::start(Options::new(), uplinks)
    }

    fn start(options: Options, uplinks: &[&str]) -> Self {
        let dir = RunDir::new().unwrap();
        let daemon = add_devices(options, &dir, uplinks).start(&dir, "vnet");
        Self {
            daemon: daemon.unwrap(),
            dir,
        }
    }

    /// Connects a front-end with `pairs` queue pairs to device n.
    fn connect(&self, n: usize, pairs: u16) -> TestFrontend {
        self.connect_with_config(n, &TestFrontendConfig::new(pairs, 256, MODERN))
            .unwrap()
    }

    fn connect_with_config(&self, n: usize, config: &TestFrontendConfig) -> Result<TestFrontend> {
        Ok(TestFrontend::connect(
            &self.dir.join(&format!("{n}.sock")),
            config,
        )?)
    }

    /// Sums a counter over all rings of one direction of a device.
    fn sum_counter(&self, device: usize, direction: &str, name: &str) -> u64 {
        let all = self.daemon.get("/v1/devices").unwrap();
        let pairs = all["devices"][device]["pairs"].as_array().unwrap();
        let value = |pair: &Value| pair[direction]["counters"][name].as_u64().unwrap();
        pairs.iter().map(value).sum()
    }
}

fn add_devices(options: Options, dir: &RunDir, uplinks: &[&str]) -> Options {
    uplinks
        .iter()
        .enumerate()
        .fold(options.no_socket(), |options, (n, uplink)| {
            let socket = dir.join(&format!("{n}.sock"));
            let uplink = uplink.replace(',', ",,");
            options.flag(
                "--device",
                format!("name=d{n},socket-path={},uplink={uplink}", socket.display()),
            )
        })
}

fn mac(n: u8) -> [u8; 6] {
    match n {
        BROADCAST => [0xff; 6],
        n => [2, 0, 0, 0, 0, n],
    }
}

fn spec(from: u8, to: u8) -> FrameSpec {
    FrameSpec {
        source_mac: mac(from),
        target_mac: mac(to),
        source: [10, 0, 0, from].into(),
        target: [10, 0, 0, to].into(),
        ..FrameSpec::v4(Transport::Udp)
    }
}

fn frame(from: u8, to: u8, payload: &[u8]) -> Frame {
    spec(from, to).build(payload).unwrap()
}

/// Waits until `count` frames have arrived on a queue pair, and returns them.
fn wait_for_frames(frontend: &mut TestFrontend, pair: usize, count: usize) -> Vec<Vec<u8>> {
    let frames = frontend.pairs[pair].rx.wait_frames(count, TIMEOUT).unwrap();
    frames.into_iter().map(|frame| frame.bytes).collect()
}

fn frame_bytes(frames: &[Frame]) -> Vec<Vec<u8>> {
    frames.iter().map(|frame| frame.bytes.clone()).collect()
}

/// Checks that no frame arrives on any queue pair.
fn assert_no_frames(frontends: &mut [&mut TestFrontend]) {
    thread::sleep(NO_FRAME_TIMEOUT);
    for frontend in frontends {
        for pair in &mut frontend.pairs {
            assert_eq!(pair.rx.receive_frames().unwrap(), []);
        }
    }
}

/// Broadcasts a frame from address n, so that the switch learns the port of the address. Each of
/// the other front-ends receives the frame.
fn announce_mac(n: u8, frontend: &mut TestFrontend, others: &mut [&mut TestFrontend]) {
    frontend.pairs[0]
        .tx
        .send(&frame(n, BROADCAST, b"here"))
        .unwrap();
    for other in others {
        wait_on_all_pairs(other, 1);
    }
}

/// Waits until `count` frames have arrived on all queue pairs together. Returns the frames of each
/// pair.
fn wait_on_all_pairs(frontend: &mut TestFrontend, count: usize) -> Vec<Vec<Vec<u8>>> {
    let mut received = vec![Vec::new(); frontend.pairs.len()];
    let until = Instant::now() + TIMEOUT;
    while received.iter().map(Vec::len).sum::<usize>() < count {
        assert!(
            Instant::now() < until,
            "{count} frames should arrive, but only these have arrived: {received:?}"
        );
        for (pair, received) in frontend.pairs.iter_mut().zip(&mut received) {
            let frames = pair.rx.receive_frames().unwrap();
            received.extend(frames.into_iter().map(|frame| frame.bytes));
        }
        thread::yield_now();
    }
    received
}

#[test]
fn frame_is_flooded_until_its_receiver_is_known_and_then_goes_only_to_it() {
    let testbed = SwitchTestbed::new(&["switch:s"; 3]);
    let [mut a, mut b, mut c] = [0, 1, 2].map(|n| testbed.connect(n, 1));
    let first = frame(0, 1, b"who are you");
    a.pairs[0].tx.send(&first).unwrap();
    for frontend in [&mut b, &mut c] {
        assert_eq!(wait_for_frames(frontend, 0, 1), from_ref(&first.bytes));
    }
    let reply = frame(1, 0, b"one");
    b.pairs[0].tx.send(&reply).unwrap();
    assert_eq!(wait_for_frames(&mut a, 0, 1), from_ref(&reply.bytes));
    let again: Vec<Frame> = (0..100).map(|n| frame(0, 1, &[n; 100])).collect();
    a.pairs[0].tx.send_all(&again, TIMEOUT).unwrap();
    assert_eq!(wait_for_frames(&mut b, 0, 100), frame_bytes(&again));
    assert_no_frames(&mut [&mut a, &mut b, &mut c]);
    for frontend in [&mut a, &mut b] {
        frontend.pairs[0].tx.drain(TIMEOUT).unwrap();
    }

    let frames = |device, direction| testbed.sum_counter(device, direction, "frames");
    assert_eq!([0, 1, 2].map(|n| frames(n, "tx")), [101, 1, 0]);
    assert_eq!([0, 1, 2].map(|n| frames(n, "rx")), [1, 101, 1]);
    let total: usize = again.iter().map(|f| f.bytes.len()).sum();
    let total = u64::try_from(total + first.bytes.len()).unwrap();
    assert_eq!(testbed.sum_counter(0, "tx", "bytes"), total);
    let device = testbed.daemon.device().unwrap();
    assert_eq!(device["uplink"]["kind"], "switch");
    assert_eq!(device["uplink"]["name"], "s");
    let stopped = testbed.daemon.stop(Signal::SIGTERM).unwrap();
    assert!(stopped.status.success());
    let known = "switch s: 3 ports, 2 addresses known, 0 moved, 0 evicted";
    assert!(stopped.stderr.contains(known), "{}", stopped.stderr);
}

#[test]
fn frames_do_not_pass_between_two_switches_that_have_the_same_address() {
    let testbed = SwitchTestbed::new(&["switch:one", "switch:one", "switch:two", "switch:two"]);
    let [mut a, mut b, mut c, mut d] = [0, 1, 2, 3].map(|n| testbed.connect(n, 1));
    // The same source address is used on both switches.
    let [one, two] = [b"one", b"two"].map(|payload| frame(0, BROADCAST, payload));
    a.pairs[0].tx.send(&one).unwrap();
    c.pairs[0].tx.send(&two).unwrap();
    assert_eq!(wait_for_frames(&mut b, 0, 1), [one.bytes]);
    assert_eq!(wait_for_frames(&mut d, 0, 1), [two.bytes]);
    assert_no_frames(&mut [&mut a, &mut b, &mut c, &mut d]);
}

#[test]
fn flow_is_answered_on_its_own_pair_or_on_another_while_that_pair_is_disabled() {
    let testbed = SwitchTestbed::new(&["switch:s"; 2]);
    let mut a = testbed.connect(0, 4);
    let config = TestFrontendConfig::new(4, 256, MODERN | PACKED);
    let mut b = testbed.connect_with_config(1, &config).unwrap();
    announce_mac(0, &mut a, &mut [&mut b]);
    announce_mac(1, &mut b, &mut [&mut a]);
    let flow_frame = |from, to, port| {
        let spec = FrameSpec {
            source_port: port,
            target_port: port,
            ..spec(from, to)
        };
        spec.build(b"flow").unwrap()
    };
    // A frame of a new flow arrives on the pair with the number of the pair that sent it.
    for pair in 0..4 {
        a.pairs[pair].tx.send(&flow_frame(0, 1, 1)).unwrap();
        assert_eq!(wait_for_frames(&mut b, pair, 1).len(), 1);
    }
    // b sends the frame of flow 100 + n on pair n.
    let requests: Vec<Frame> = (0..4).map(|n| flow_frame(1, 0, 100 + n)).collect();
    let replies: Vec<Frame> = (0..4).map(|n| flow_frame(0, 1, 100 + n)).collect();
    let exchange = |a: &mut TestFrontend, b: &mut TestFrontend| {
        for (pair, frame) in b.pairs.iter_mut().zip(&requests) {
            pair.tx.send(frame).unwrap();
        }
        wait_on_all_pairs(a, 4);
        a.pairs[3].tx.send_all(&replies, TIMEOUT).unwrap();
        wait_on_all_pairs(b, 4)
    };
    let received = exchange(&mut a, &mut b);
    for (received, reply) in received.iter().zip(&replies) {
        assert_eq!(received, from_ref(&reply.bytes));
    }
    // While two pairs are disabled, as `ethtool -L` does, their flows are steered like new flows.
    for pair in [2, 3] {
        b.enable(pair, false).unwrap();
    }
    b.connection.get_features().unwrap();
    a.pairs[3].tx.send_all(&replies, TIMEOUT).unwrap();
    let received = wait_on_all_pairs(&mut b, 4);
    assert_eq!(received[0], [replies[0].bytes.clone()]);
    assert_eq!(received[1], frame_bytes(&replies[1..]));
    assert_no_frames(&mut [&mut b]);
    b.enable(2, true).unwrap();
    b.enable(3, true).unwrap();
    b.connection.get_features().unwrap();
    let received = exchange(&mut a, &mut b);
    assert!(
        received.iter().all(|received| received.len() == 1),
        "{received:?}"
    );
    assert_eq!(testbed.sum_counter(1, "rx", "dropped_disabled"), 0);
}

#[test]
fn address_that_moves_to_another_port_receives_the_next_frame_there() {
    let testbed = SwitchTestbed::new(&["switch:s"; 3]);
    let [mut a, mut b, mut c] = [0, 1, 2].map(|n| testbed.connect(n, 1));
    for round in 0..10 {
        let (new_port, old_port) = match round % 2 {
            0 => (&mut b, &mut c),
            _ => (&mut c, &mut b),
        };
        announce_mac(7, new_port, &mut [&mut a, old_port]);
        let sent = frame(0, 7, &[round; 80]);
        a.pairs[0].tx.send(&sent).unwrap();
        assert_eq!(wait_for_frames(new_port, 0, 1), [sent.bytes]);
        assert_eq!(old_port.pairs[0].rx.receive_frames().unwrap(), []);
    }
    let stopped = testbed.daemon.stop(Signal::SIGTERM).unwrap();
    assert!(stopped.stderr.contains("9 moved"), "{}", stopped.stderr);
}

#[test]
fn overloaded_port_drops_frames_and_does_not_delay_other_ports() {
    let testbed = SwitchTestbed::new(&["switch:s"; 3]);
    let [mut a, mut b, mut c] = [0, 1, 2].map(|n| testbed.connect(n, 1));
    announce_mac(1, &mut b, &mut [&mut a, &mut c]);
    announce_mac(2, &mut c, &mut [&mut a, &mut b]);
    // c does not refill its 256 buffers.
    let flood: Vec<Frame> = (0..4000).map(|_| frame(0, 2, &[0; 500])).collect();
    let started_at = Instant::now();
    a.pairs[0].tx.send_all(&flood, TIMEOUT).unwrap();
    a.pairs[0].tx.drain(TIMEOUT).unwrap();
    let flood_time = started_at.elapsed();
    let after = frame(0, 1, b"after");
    a.pairs[0].tx.send(&after).unwrap();
    assert_eq!(wait_for_frames(&mut b, 0, 1), [after.bytes]);
    // The daemon may count a frame for its sender only after the receiver has it.
    a.pairs[0].tx.drain(TIMEOUT).unwrap();
    assert!(flood_time < TIMEOUT, "{flood_time:?}");
    // c received one frame before the flood, and refilled the buffer of that frame.
    assert_eq!(testbed.sum_counter(2, "rx", "frames"), 1 + 256);
    assert_eq!(
        testbed.sum_counter(2, "rx", "dropped_no_buffer"),
        4000 - 256
    );
    assert_eq!(testbed.sum_counter(0, "tx", "frames"), 4001);
    assert_eq!(c.pairs[0].rx.receive_frames().unwrap().len(), 256);
}

/// Sets a flag when it is dropped, also by a panic, so that the thread that reads the flag ends.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn frames_between_other_ports_arrive_in_order_while_a_port_stops_and_disconnects() {
    let testbed = SwitchTestbed::new(&["switch:s"; 3]);
    let [mut a, mut b] = [0, 1].map(|n| testbed.connect(n, 1));
    announce_mac(0, &mut a, &mut [&mut b]);
    announce_mac(1, &mut b, &mut [&mut a]);
    let rounds = AtomicU32::new(0);
    let should_stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !should_stop.load(Ordering::Relaxed) {
                let mut c = testbed.connect(2, 1);
                c.pairs[0].tx.send(&frame(2, 0, b"c")).unwrap();
                c.enable(0, false).unwrap();
                c.enable(0, true).unwrap();
                c.stop().unwrap();
                c.start().unwrap();
                c.pairs[0].rx.receive_frames().unwrap();
                rounds.fetch_add(1, Ordering::Relaxed);
            }
        });
        let _stop = StopOnDrop(&should_stop);
        let until = Instant::now() + 4 * TIMEOUT;
        for burst in 0.. {
            if rounds.load(Ordering::Relaxed) >= 30 || Instant::now() > until {
                break;
            }
            // Of each three frames, which go to all, to b and to c, b must receive two in order.
            let three_frames = |n: u32| {
                let payload = (100 * burst + n).to_le_bytes();
                [BROADCAST, 1, 2].map(|to| frame(0, to, &payload))
            };
            let sent: Vec<Frame> = (0..10).flat_map(three_frames).collect();
            a.pairs[0].tx.send_all(&sent, TIMEOUT).unwrap();
            let mut expected = frame_bytes(&sent);
            expected.retain(|frame| frame[..6] != mac(2));
            let mut received = Vec::new();
            while received.len() < expected.len() {
                received.extend(wait_for_frames(&mut b, 0, 1));
                // Until c has sent a frame, the switch floods frames to c, and b receives them as
                // well.
                received.retain(|frame| frame[..6] != mac(2));
            }
            assert_eq!(received, expected);
            a.pairs[0].rx.receive_frames().unwrap();
        }
    });
    assert!(rounds.into_inner() >= 30);
    assert_eq!(testbed.sum_counter(1, "rx", "dropped_no_buffer"), 0);
    let log = testbed.daemon.stderr();
    assert!(!log.contains("panic") && !log.contains("ERROR"), "{log}");
}

#[test]
fn guest_without_offloads_receives_segmented_frames_with_complete_checksums() {
    let testbed = SwitchTestbed::new(&["switch:s"; 3]);
    let mut large = TestFrontendConfig::new(1, 256, MODERN);
    large.queues.tx_slot = 66_000;
    let mut a = testbed.connect_with_config(0, &large).unwrap();
    let mut b = testbed.connect(1, 1);
    let without_offloads = TestFrontendConfig::new(1, 256, MODERN & !OFFLOADS);
    let mut c = testbed.connect_with_config(2, &without_offloads).unwrap();
    for transport in [FrameSpec::v4, FrameSpec::v6] {
        let tso = FrameSpec {
            target_mac: mac(BROADCAST),
            checksum: Checksum::Partial,
            gso_size: Some(1448),
            ..transport(Transport::Tcp)
        };
        let data: Vec<u8> = (0..60_000_u32).map(|n| n.to_le_bytes()[0]).collect();
        let sent = tso.build(&data).unwrap();
        a.pairs[0].tx.send(&sent).unwrap();
        // b has negotiated the offloads, so it receives the frame unchanged.
        let received = b.pairs[0].rx.wait_frames(1, TIMEOUT).unwrap();
        assert_eq!(received[0].bytes, sent.bytes);
        assert_eq!(received[0].header.gso_type, sent.header.gso_type);
        let received = c.pairs[0].rx.wait_frames(42, TIMEOUT).unwrap();
        let mut joined = Vec::<u8>::new();
        for frame in &received {
            assert_eq!((frame.header.flags, frame.header.gso_type), (0, 0));
            joined.extend(&frame.bytes[check(frame).unwrap().payload]);
        }
        assert_eq!((received.len(), joined == data), (42, true));
    }
}

#[test]
fn host_exchanges_frames_with_all_devices_and_removing_its_tap_affects_no_device() {
    let network = HostNetwork::bare().unwrap();
    let options = Options::new().netns(network.netns());
    let testbed = SwitchTestbed::start(options, &["switch:s,tap=tap0", "switch:s", "switch:s"]);
    network
        .netns()
        .ip("addr add 10.77.0.1/24 dev tap0")
        .unwrap();
    let config = TestFrontendConfig::new(2, 256, MODERN);
    let responders: Vec<EchoResponder> = [(0, "10.77.0.2"), (1, "10.77.0.3")]
        .iter()
        .map(|(n, address)| {
            let socket = testbed.dir.join(&format!("{n}.sock"));
            EchoResponder::connect(
                &socket,
                &config,
                ResponderAddresses::from_ipv4(address).unwrap(),
            )
            .unwrap()
        })
        .collect();
    let mut without_offloads = TestFrontendConfig::new(1, 256, MODERN & !OFFLOADS);
    without_offloads.queues.tx_slot = 66_000;
    let mut c = testbed.connect_with_config(2, &without_offloads).unwrap();
    network.wait_for_ping("10.77.0.2").unwrap();
    network.wait_for_ping("10.77.0.3").unwrap();
    // c receives the broadcast ARP requests, but not the ARP replies and the pings.
    assert_only_multicast(&mut c);

    // An ARP request from c for 10.77.0.1, the address of the host.
    let arp = [
        &[0, 1, 8, 0, 6, 4, 0, 1][..],
        &mac(9),
        &[10, 77, 0, 9],
        &[0; 6],
        &[10, 77, 0, 1],
    ];
    let bytes = ethernet(mac(BROADCAST), mac(9), 0x0806, &arp.concat());
    let header = NetHeader::default();
    c.pairs[0].tx.send(&Frame { header, bytes }).unwrap();
    let until = Instant::now() + TIMEOUT;
    let is_reply = |frame: &Frame| frame.bytes[..6] == mac(9) && frame.bytes[12..14] == [8, 6];
    while !c.pairs[0].rx.receive_frames().unwrap().iter().any(is_reply) {
        assert!(Instant::now() < until, "the host did not answer");
        thread::sleep(Duration::from_millis(1));
    }

    // The host sends more UDP datagrams than c has buffers.
    let send = "exec 3<>/dev/udp/10.77.0.9/9; for i in $(seq 300); do echo $i >&3; done";
    network
        .netns()
        .ip("neigh replace 10.77.0.9 lladdr 02:00:00:00:00:09 dev tap0")
        .unwrap();
    network.netns().run("bash", ["-c", send]).unwrap();
    let udp = c.pairs[0].rx.wait_frames(200, TIMEOUT).unwrap();
    let to_c = udp.iter().filter(|f| f.bytes[..6] == mac(9));
    for frame in to_c {
        assert_eq!(frame.header.flags, 0);
        check(frame).unwrap();
    }
    network.wait_for_ping("10.77.0.2").unwrap();

    // Removing the TAP must not affect the devices, and the daemon must still stop within 2 s.
    network.netns().ip("link del tap0").unwrap();
    c.pairs[0]
        .tx
        .send(&frame(9, BROADCAST, b"still here"))
        .unwrap();
    drop(responders);
    let stopped = testbed.daemon.stop(Signal::SIGTERM).unwrap();
    assert!(stopped.status.success(), "{}", stopped.stderr);
    assert!(
        stopped.duration < Duration::from_secs(2),
        "{:?}",
        stopped.duration
    );
}

/// Checks that the front-end has received only broadcast and multicast frames.
fn assert_only_multicast(frontend: &mut TestFrontend) {
    thread::sleep(NO_FRAME_TIMEOUT);
    for frame in frontend.pairs[0].rx.receive_frames().unwrap() {
        assert_eq!(frame.bytes[0] & 1, 1, "{frame:?}");
    }
}

#[test]
fn conflicting_or_invalid_switch_uplink_is_refused_in_one_line() {
    let dir = RunDir::new().unwrap();
    let network = HostNetwork::bare().unwrap();
    for (uplinks, parts, status) in [
        (
            ["switch:s,tap=tap0", "switch:s,tap=tap1"],
            [
                "d1: switch s has tap=tap0 already, not tap=tap1",
                "name the same TAP",
            ],
            1,
        ),
        (
            ["switch:s,tap=tap0", "switch:t,tap=tap0"],
            [
                "TAP tap0 is given to both switch s and switch t",
                "give each",
            ],
            2,
        ),
        (
            ["switch:s,tap=tap0", "tap:tap0"],
            ["TAP tap0 is given to both switch s and d1", "give each"],
            2,
        ),
        (["switch:s", "switch:"], ["has 0 bytes", "1 to 32"], 2),
        (
            ["switch:s", "switch:s,x=1"],
            ["no option \"x=1\"", "write"],
            2,
        ),
        (
            ["switch:s", "switch"],
            ["lacks the switch's name", "write"],
            2,
        ),
    ] {
        let options = add_devices(Options::new().netns(network.netns()), &dir, &uplinks);
        let refused = options.run_to_end(&dir, "vnet").unwrap();
        let text = refused.stderr.trim();
        assert_eq!(refused.status.code(), Some(status), "{text}");
        assert!(text.starts_with("virtionetd: "), "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
        for part in parts {
            assert!(text.contains(part), "no {part:?} in: {text}");
        }
    }
}
