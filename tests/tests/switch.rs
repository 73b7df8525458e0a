//! Devices of one process on a switch: who gets which frame, on which pair, and who does not.
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
use virtionet_tests::responder::{EchoResponder, Identity};
use virtionet_tests::topology::HostNetwork;

const LIMIT: Duration = Duration::from_secs(5);
/// How long to wait for what must not come.
const NO_FRAME_TIMEOUT: Duration = Duration::from_millis(50);
const ALL: u8 = 0xff;

/// A daemon with a device for each uplink.
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
        let daemon = options_for(options, &dir, uplinks).start(&dir, "vnet");
        Self {
            daemon: daemon.unwrap(),
            dir,
        }
    }

    /// Card n on device n.
    fn frontend(&self, n: usize, pairs: u16) -> TestFrontend {
        self.connect(n, &TestFrontendConfig::new(pairs, 256, MODERN))
            .unwrap()
    }

    fn connect(&self, n: usize, config: &TestFrontendConfig) -> Result<TestFrontend> {
        Ok(TestFrontend::connect(
            &self.dir.join(&format!("{n}.sock")),
            config,
        )?)
    }

    /// A counter of all rings of one direction of a device.
    fn counter(&self, device: usize, direction: &str, name: &str) -> u64 {
        let all = self.daemon.get("/v1/devices").unwrap();
        let pairs = all["devices"][device]["pairs"].as_array().unwrap();
        let of = |pair: &Value| pair[direction]["counters"][name].as_u64().unwrap();
        pairs.iter().map(of).sum()
    }
}

fn options_for(options: Options, dir: &RunDir, uplinks: &[&str]) -> Options {
    let start = options.no_socket();
    uplinks
        .iter()
        .enumerate()
        .fold(start, |options, (n, uplink)| {
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
        ALL => [0xff; 6],
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

/// Frames that came on a pair, `count` of them.
fn wait(frontend: &mut TestFrontend, pair: usize, count: usize) -> Vec<Vec<u8>> {
    let frames = frontend.pairs[pair].rx.wait_frames(count, LIMIT).unwrap();
    frames.into_iter().map(|frame| frame.bytes).collect()
}

fn bytes(frames: &[Frame]) -> Vec<Vec<u8>> {
    frames.iter().map(|frame| frame.bytes.clone()).collect()
}

/// Nothing waits for a card, on any pair, and nothing comes.
fn assert_no_frames(frontends: &mut [&mut TestFrontend]) {
    thread::sleep(NO_FRAME_TIMEOUT);
    for frontend in frontends {
        for pair in &mut frontend.pairs {
            assert_eq!(pair.rx.receive_frames().unwrap(), []);
        }
    }
}

/// Lets the switch know where card n is; the others get a frame each.
fn announce_mac(n: u8, frontend: &mut TestFrontend, others: &mut [&mut TestFrontend]) {
    frontend.pairs[0].tx.send(&frame(n, ALL, b"here")).unwrap();
    for other in others {
        wait_anywhere(other, 1);
    }
}

/// Frames that come on whichever pair: those of each pair.
fn wait_anywhere(frontend: &mut TestFrontend, count: usize) -> Vec<Vec<Vec<u8>>> {
    let mut got = vec![Vec::new(); frontend.pairs.len()];
    let end = Instant::now() + LIMIT;
    while got.iter().map(Vec::len).sum::<usize>() < count {
        assert!(Instant::now() < end, "only {got:?} of {count}");
        for (pair, got) in frontend.pairs.iter_mut().zip(&mut got) {
            let frames = pair.rx.receive_frames().unwrap();
            got.extend(frames.into_iter().map(|frame| frame.bytes));
        }
        thread::yield_now();
    }
    got
}

#[test]
fn a_frame_goes_to_all_until_its_receiver_is_known_and_then_to_it_alone() {
    let testbed = SwitchTestbed::new(&["switch:s"; 3]);
    let [mut a, mut b, mut c] = [0, 1, 2].map(|n| testbed.frontend(n, 1));
    let first = frame(0, 1, b"who are you");
    a.pairs[0].tx.send(&first).unwrap();
    for frontend in [&mut b, &mut c] {
        assert_eq!(wait(frontend, 0, 1), from_ref(&first.bytes));
    }
    let reply = frame(1, 0, b"one");
    b.pairs[0].tx.send(&reply).unwrap();
    assert_eq!(wait(&mut a, 0, 1), from_ref(&reply.bytes));
    let again: Vec<Frame> = (0..100).map(|n| frame(0, 1, &[n; 100])).collect();
    a.pairs[0].tx.send_all(&again, LIMIT).unwrap();
    assert_eq!(wait(&mut b, 0, 100), bytes(&again));
    assert_no_frames(&mut [&mut a, &mut b, &mut c]);
    for frontend in [&mut a, &mut b] {
        frontend.pairs[0].tx.drain(LIMIT).unwrap();
    }

    let frames = |device, direction| testbed.counter(device, direction, "frames");
    assert_eq!([0, 1, 2].map(|n| frames(n, "tx")), [101, 1, 0]);
    assert_eq!([0, 1, 2].map(|n| frames(n, "rx")), [1, 101, 1]);
    let total: usize = again.iter().map(|f| f.bytes.len()).sum();
    let total = u64::try_from(total + first.bytes.len()).unwrap();
    assert_eq!(testbed.counter(0, "tx", "bytes"), total);
    let device = testbed.daemon.device().unwrap();
    assert_eq!(device["uplink"]["kind"], "switch");
    assert_eq!(device["uplink"]["name"], "s");
    let stopped = testbed.daemon.stop(Signal::SIGTERM).unwrap();
    assert!(stopped.status.success());
    let known = "switch s: 3 ports, 2 addresses known, 0 moved, 0 evicted";
    assert!(stopped.stderr.contains(known), "{}", stopped.stderr);
}

#[test]
fn two_switches_do_not_meet() {
    let testbed = SwitchTestbed::new(&["switch:one", "switch:one", "switch:two", "switch:two"]);
    let [mut a, mut b, mut c, mut d] = [0, 1, 2, 3].map(|n| testbed.frontend(n, 1));
    // The same address on both.
    let [one, two] = [b"one", b"two"].map(|payload| frame(0, ALL, payload));
    a.pairs[0].tx.send(&one).unwrap();
    c.pairs[0].tx.send(&two).unwrap();
    assert_eq!(wait(&mut b, 0, 1), [one.bytes]);
    assert_eq!(wait(&mut d, 0, 1), [two.bytes]);
    assert_no_frames(&mut [&mut a, &mut b, &mut c, &mut d]);
}

#[test]
fn a_flow_is_answered_on_its_pair_and_elsewhere_while_that_is_disabled() {
    let testbed = SwitchTestbed::new(&["switch:s"; 2]);
    let mut a = testbed.frontend(0, 4);
    let config = TestFrontendConfig::new(4, 256, MODERN | PACKED);
    let mut b = testbed.connect(1, &config).unwrap();
    announce_mac(0, &mut a, &mut [&mut b]);
    announce_mac(1, &mut b, &mut [&mut a]);
    let flow = |from, to, port| {
        let flow = FrameSpec {
            source_port: port,
            target_port: port,
            ..spec(from, to)
        };
        flow.build(b"flow").unwrap()
    };
    // New flows: pair k talks to pair k.
    for pair in 0..4 {
        a.pairs[pair].tx.send(&flow(0, 1, 1)).unwrap();
        assert_eq!(wait(&mut b, pair, 1).len(), 1);
    }
    // b sends flow 100 + n on pair n.
    let mine: Vec<Frame> = (0..4).map(|n| flow(1, 0, 100 + n)).collect();
    let replies: Vec<Frame> = (0..4).map(|n| flow(0, 1, 100 + n)).collect();
    let steered = |a: &mut TestFrontend, b: &mut TestFrontend| {
        for (pair, frame) in b.pairs.iter_mut().zip(&mine) {
            pair.tx.send(frame).unwrap();
        }
        wait_anywhere(a, 4);
        a.pairs[3].tx.send_all(&replies, LIMIT).unwrap();
        wait_anywhere(b, 4)
    };
    let got = steered(&mut a, &mut b);
    for (got, reply) in got.iter().zip(&replies) {
        assert_eq!(got, from_ref(&reply.bytes));
    }
    // Two pairs are disabled, as by `ethtool -L`: what was theirs goes where a new flow would.
    for pair in [2, 3] {
        b.enable(pair, false).unwrap();
    }
    b.connection.get_features().unwrap();
    a.pairs[3].tx.send_all(&replies, LIMIT).unwrap();
    let got = wait_anywhere(&mut b, 4);
    assert_eq!(got[0], [replies[0].bytes.clone()]);
    assert_eq!(got[1], bytes(&replies[1..]));
    assert_no_frames(&mut [&mut b]);
    b.enable(2, true).unwrap();
    b.enable(3, true).unwrap();
    b.connection.get_features().unwrap();
    let got = steered(&mut a, &mut b);
    assert!(got.iter().all(|got| got.len() == 1), "{got:?}");
    assert_eq!(testbed.counter(1, "rx", "dropped_disabled"), 0);
}

#[test]
fn a_station_that_moves_is_found_at_once() {
    let testbed = SwitchTestbed::new(&["switch:s"; 3]);
    let [mut a, mut b, mut c] = [0, 1, 2].map(|n| testbed.frontend(n, 1));
    for round in 0..10 {
        let (here, there) = match round % 2 {
            0 => (&mut b, &mut c),
            _ => (&mut c, &mut b),
        };
        announce_mac(7, here, &mut [&mut a, there]);
        let sent = frame(0, 7, &[round; 80]);
        a.pairs[0].tx.send(&sent).unwrap();
        assert_eq!(wait(here, 0, 1), [sent.bytes]);
        assert_eq!(there.pairs[0].rx.receive_frames().unwrap(), []);
    }
    let stopped = testbed.daemon.stop(Signal::SIGTERM).unwrap();
    assert!(stopped.stderr.contains("9 moved"), "{}", stopped.stderr);
}

#[test]
fn a_flooded_port_drops_and_holds_nobody_up() {
    let testbed = SwitchTestbed::new(&["switch:s"; 3]);
    let [mut a, mut b, mut c] = [0, 1, 2].map(|n| testbed.frontend(n, 1));
    announce_mac(1, &mut b, &mut [&mut a, &mut c]);
    announce_mac(2, &mut c, &mut [&mut a, &mut b]);
    // c never looks at its 256 buffers.
    let flood: Vec<Frame> = (0..4000).map(|_| frame(0, 2, &[0; 500])).collect();
    let started_at = Instant::now();
    a.pairs[0].tx.send_all(&flood, LIMIT).unwrap();
    a.pairs[0].tx.drain(LIMIT).unwrap();
    let took = started_at.elapsed();
    let after = frame(0, 1, b"after");
    a.pairs[0].tx.send(&after).unwrap();
    assert_eq!(wait(&mut b, 0, 1), [after.bytes]);
    // A frame may be there a moment before it is counted with its sender.
    a.pairs[0].tx.drain(LIMIT).unwrap();
    assert!(took < LIMIT, "{took:?}");
    // One frame came before the flood, and its buffer went back.
    assert_eq!(testbed.counter(2, "rx", "frames"), 1 + 256);
    assert_eq!(testbed.counter(2, "rx", "dropped_no_buffer"), 4000 - 256);
    assert_eq!(testbed.counter(0, "tx", "frames"), 4001);
    assert_eq!(c.pairs[0].rx.receive_frames().unwrap().len(), 256);
}

/// Sets its flag when it goes, by a panic as well: else the other thread would go on for ever.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_port_that_stops_or_goes_hurts_no_other() {
    let testbed = SwitchTestbed::new(&["switch:s"; 3]);
    let [mut a, mut b] = [0, 1].map(|n| testbed.frontend(n, 1));
    announce_mac(0, &mut a, &mut [&mut b]);
    announce_mac(1, &mut b, &mut [&mut a]);
    let rounds = AtomicU32::new(0);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let mut c = testbed.frontend(2, 1);
                c.pairs[0].tx.send(&frame(2, 0, b"c")).unwrap();
                c.enable(0, false).unwrap();
                c.enable(0, true).unwrap();
                c.stop().unwrap();
                c.start().unwrap();
                c.pairs[0].rx.receive_frames().unwrap();
                rounds.fetch_add(1, Ordering::Relaxed);
            }
        });
        let _done = StopOnDrop(&done);
        let end = Instant::now() + 4 * LIMIT;
        for burst in 0.. {
            if rounds.load(Ordering::Relaxed) >= 30 || Instant::now() > end {
                break;
            }
            // To all, to b, and to the one that comes and goes: b gets two of three, in order.
            let to_each = |n: u32| {
                let payload = (100 * burst + n).to_le_bytes();
                [ALL, 1, 2].map(|to| frame(0, to, &payload))
            };
            let sent: Vec<Frame> = (0..10).flat_map(to_each).collect();
            a.pairs[0].tx.send_all(&sent, LIMIT).unwrap();
            let mut want = bytes(&sent);
            want.retain(|frame| frame[..6] != mac(2));
            let mut got = Vec::new();
            while got.len() < want.len() {
                got.extend(wait(&mut b, 0, 1));
                // Before c has said where it is, frames to it go to b as well.
                got.retain(|frame| frame[..6] != mac(2));
            }
            assert_eq!(got, want);
            a.pairs[0].rx.receive_frames().unwrap();
        }
    });
    assert!(rounds.into_inner() >= 30);
    assert_eq!(testbed.counter(1, "rx", "dropped_no_buffer"), 0);
    let log = testbed.daemon.stderr();
    assert!(!log.contains("panic") && !log.contains("ERROR"), "{log}");
}

#[test]
fn a_guest_without_offloads_gets_whole_frames() {
    let testbed = SwitchTestbed::new(&["switch:s"; 3]);
    let mut large = TestFrontendConfig::new(1, 256, MODERN);
    large.queues.tx_slot = 66_000;
    let mut a = testbed.connect(0, &large).unwrap();
    let mut b = testbed.frontend(1, 1);
    let plain = TestFrontendConfig::new(1, 256, MODERN & !OFFLOADS);
    let mut c = testbed.connect(2, &plain).unwrap();
    for transport in [FrameSpec::v4, FrameSpec::v6] {
        let tso = FrameSpec {
            target_mac: mac(ALL),
            checksum: Checksum::Partial,
            gso_size: Some(1448),
            ..transport(Transport::Tcp)
        };
        let data: Vec<u8> = (0..60_000_u32).map(|n| n.to_le_bytes()[0]).collect();
        let sent = tso.build(&data).unwrap();
        a.pairs[0].tx.send(&sent).unwrap();
        // Whole and unchecked where that was negotiated.
        let got = b.pairs[0].rx.wait_frames(1, LIMIT).unwrap();
        assert_eq!(got[0].bytes, sent.bytes);
        assert_eq!(got[0].header.gso_type, sent.header.gso_type);
        let got = c.pairs[0].rx.wait_frames(42, LIMIT).unwrap();
        let mut joined = Vec::<u8>::new();
        for frame in &got {
            assert_eq!((frame.header.flags, frame.header.gso_type), (0, 0));
            joined.extend(&frame.bytes[check(frame).unwrap().payload]);
        }
        assert_eq!((got.len(), joined == data), (42, true));
    }
}

#[test]
fn the_host_is_a_port_too() {
    let network = HostNetwork::bare().unwrap();
    let options = Options::new().netns(network.netns());
    let testbed = SwitchTestbed::start(options, &["switch:s,tap=tap0", "switch:s", "switch:s"]);
    network
        .netns()
        .ip("addr add 10.77.0.1/24 dev tap0")
        .unwrap();
    let config = TestFrontendConfig::new(2, 256, MODERN);
    let stations: Vec<EchoResponder> = [(0, "10.77.0.2"), (1, "10.77.0.3")]
        .iter()
        .map(|(n, address)| {
            let socket = testbed.dir.join(&format!("{n}.sock"));
            EchoResponder::connect(&socket, &config, Identity::at(address).unwrap()).unwrap()
        })
        .collect();
    let mut plain = TestFrontendConfig::new(1, 256, MODERN & !OFFLOADS);
    plain.queues.tx_slot = 66_000;
    let mut c = testbed.connect(2, &plain).unwrap();
    network.wait_for_ping("10.77.0.2").unwrap();
    network.wait_for_ping("10.77.0.3").unwrap();
    // The requests went to all, their answers and the pings not.
    assert_only_multicast(&mut c);

    // From a guest: who has 10.77.0.1?
    let arp = [
        &[0, 1, 8, 0, 6, 4, 0, 1][..],
        &mac(9),
        &[10, 77, 0, 9],
        &[0; 6],
        &[10, 77, 0, 1],
    ];
    let bytes = ethernet(mac(ALL), mac(9), 0x0806, &arp.concat());
    let header = NetHeader::default();
    c.pairs[0].tx.send(&Frame { header, bytes }).unwrap();
    let end = Instant::now() + LIMIT;
    let answered = |frame: &Frame| frame.bytes[..6] == mac(9) && frame.bytes[12..14] == [8, 6];
    while !c.pairs[0].rx.receive_frames().unwrap().iter().any(answered) {
        assert!(Instant::now() < end, "the host did not answer");
        thread::sleep(Duration::from_millis(1));
    }

    // A flood from the host: UDP to the guest that has no room for it all.
    let send = "exec 3<>/dev/udp/10.77.0.9/9; for i in $(seq 300); do echo $i >&3; done";
    network
        .netns()
        .ip("neigh replace 10.77.0.9 lladdr 02:00:00:00:00:09 dev tap0")
        .unwrap();
    network.netns().run("bash", ["-c", send]).unwrap();
    let udp = c.pairs[0].rx.wait_frames(200, LIMIT).unwrap();
    let whole = udp.iter().filter(|f| f.bytes[..6] == mac(9));
    for frame in whole {
        assert_eq!(frame.header.flags, 0);
        check(frame).unwrap();
    }
    network.wait_for_ping("10.77.0.2").unwrap();

    // A TAP that goes takes nobody with it, and a quick end is still an end.
    network.netns().ip("link del tap0").unwrap();
    c.pairs[0].tx.send(&frame(9, ALL, b"still here")).unwrap();
    drop(stations);
    let stopped = testbed.daemon.stop(Signal::SIGTERM).unwrap();
    assert!(stopped.status.success(), "{}", stopped.stderr);
    assert!(stopped.took < Duration::from_secs(2), "{:?}", stopped.took);
}

/// What has come was for groups.
fn assert_only_multicast(frontend: &mut TestFrontend) {
    thread::sleep(NO_FRAME_TIMEOUT);
    for frame in frontend.pairs[0].rx.receive_frames().unwrap() {
        assert_eq!(frame.bytes[0] & 1, 1, "{frame:?}");
    }
}

#[test]
fn what_cannot_be_is_told_in_a_sentence() {
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
        let options = options_for(Options::new().netns(network.netns()), &dir, &uplinks);
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
