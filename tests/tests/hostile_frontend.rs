//! Front-ends that violate the protocol, or turn what they have handed over against the daemon.
//! They may lose their own device; other devices carry every frame, and the daemon ends in time.
#![allow(clippy::unwrap_used)]

use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use serde_json::Value;
use virtionet_guest::frame::{Frame, FrameSpec, Transport};
use virtionet_guest::frontend::FrontendConnection;
use virtionet_guest::hostile::{block_writes, forbid_seals, make_blocking, slow_closing_socket};
use virtionet_guest::net::MODERN;
use virtionet_guest::test_frontend::{TestFrontend, TestFrontendConfig};
use virtionet_tests::daemon::{Daemon, Options};
use virtionet_tests::paths::RunDir;

const TIMEOUT: Duration = Duration::from_secs(5);
/// The bound on the end of the daemon, with a margin for a busy machine.
const STOP_TIMEOUT: Duration = Duration::from_secs(4);

/// A daemon with the devices `d0`, which a hostile front-end gets, and `d1`.
struct Devices {
    dir: RunDir,
    daemon: Daemon,
}

impl Devices {
    fn start(uplink: &str) -> Self {
        Self::start_with(Options::new(), uplink)
    }

    fn start_with(options: Options, uplink: &str) -> Self {
        let dir = RunDir::new().unwrap();
        let mut options = options.no_socket();
        for n in 0..2 {
            let socket = dir.join(&format!("{n}.sock"));
            let device = format!("name=d{n},socket-path={},uplink={uplink}", socket.display());
            options = options.flag("--device", device);
        }
        let daemon = options.start(&dir, "vnet").unwrap();
        Self { dir, daemon }
    }

    fn connect(&self, device: usize) -> TestFrontend {
        let socket = self.dir.join(&format!("{device}.sock"));
        TestFrontend::connect(&socket, &config()).unwrap()
    }

    fn device(&self, device: usize) -> Value {
        self.daemon.get("/v1/devices").unwrap()["devices"][device].clone()
    }

    fn wait_for(&self, device: usize, state: &str, is_reached: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let report = self.device(device);
            if is_reached(&report) {
                return report;
            }
            assert!(Instant::now() < deadline, "not {state}: {report}");
            sleep(Duration::from_millis(20));
        }
    }

    /// Sends frames on device 1 and waits until the daemon has carried all of them, or dropped them
    /// because the switch has no other port left.
    fn assert_carries_frames(&self, frontend: &mut TestFrontend) {
        const COUNT: u64 = 500;
        let done = |device: &Value| {
            counter(device, "tx", "frames") + counter(device, "tx", "dropped_no_port")
        };
        let before = done(&self.device(1));
        for _ in 0..COUNT {
            let tx = &mut frontend.pairs[0].tx;
            tx.send_all(&[broadcast()], TIMEOUT).unwrap();
        }
        self.wait_for(1, "carrying all frames", |device| {
            done(device) == before + COUNT
        });
    }

    fn stop(self) {
        let exit = self.daemon.stop(Signal::SIGTERM).unwrap();
        assert!(exit.duration < STOP_TIMEOUT, "{exit:?}");
        assert!(exit.status.success(), "{exit:?}");
    }
}

fn config() -> TestFrontendConfig {
    TestFrontendConfig::new(1, 256, MODERN)
}

fn broadcast() -> Frame {
    let mut frame = FrameSpec::v4(Transport::Udp).build(b"hello").unwrap();
    frame.bytes[..6].fill(0xff);
    frame
}

fn counter(device: &Value, ring: &str, name: &str) -> u64 {
    device["pairs"][0][ring]["counters"][name]
        .as_u64()
        .unwrap_or(0)
}

/// Sets a flag when it is dropped, also by a panic, so that the thread that reads it ends.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn warnings(device: &Value) -> String {
    device["warnings"].to_string()
}

#[test]
fn call_eventfd_that_blocks_is_cut_off_and_the_other_device_carries_every_frame() {
    let devices = Devices::start("switch:sw");
    let hostile = devices.connect(0);
    let mut other = devices.connect(1);
    block_writes(&hostile.pairs[0].rx.queue.call).unwrap();
    // Each broadcast is pushed to the hostile device and calls its driver.
    devices.assert_carries_frames(&mut other);
    let report = devices.wait_for(0, "cut off", |device| {
        counter(device, "rx", "calls_cut_off") == 1
    });
    assert!(counter(&report, "rx", "calls_failed") > 0, "{report}");
    devices.assert_carries_frames(&mut other);
    devices.stop();
}

#[test]
fn kick_eventfd_that_blocks_and_is_drained_by_its_owner_holds_up_no_worker() {
    let devices = Devices::start("null");
    let mut hostile = devices.connect(0);
    let mut other = devices.connect(1);
    for pair in &hostile.pairs {
        for queue in [&pair.rx.queue, &pair.tx.queue] {
            make_blocking(queue.kick.as_raw_fd()).unwrap();
        }
    }
    // A worker that reads the eventfd after the owner has drained it would sleep for ever.
    let kick = &hostile.pairs[0].tx.queue.kick;
    for _ in 0..10_000 {
        kick.signal().unwrap();
        assert_eq!(kick.try_read(), 1, "the worker does not read it");
    }
    devices.assert_carries_frames(&mut other);
    hostile.pairs[0]
        .tx
        .send_all(&[broadcast()], TIMEOUT)
        .unwrap();
    hostile.pairs[0].tx.queue.kick.signal().unwrap();
    devices.wait_for(0, "served", |device| counter(device, "tx", "frames") == 1);
    devices.stop();
}

#[test]
fn err_eventfd_that_blocks_delays_neither_the_quarantine_nor_the_other_device() {
    let devices = Devices::start("null");
    let mut hostile = devices.connect(0);
    let mut other = devices.connect(1);
    let queue = &hostile.pairs[0].tx.queue;
    block_writes(&queue.err).unwrap();
    let ring = hostile.pairs[0].tx.queue.ring.as_split().unwrap();
    ring.set_avail_index(ring.avail_index().wrapping_add(1000));
    hostile.pairs[0].tx.queue.kick.signal().unwrap();
    devices.wait_for(0, "quarantined", |device| {
        counter(device, "tx", "quarantines") == 1
    });
    devices.assert_carries_frames(&mut other);
    hostile.reset().unwrap();
    hostile.start().unwrap();
    let tx = &mut hostile.pairs[0].tx;
    tx.send_all(&[broadcast()], TIMEOUT).unwrap();
    devices.wait_for(0, "served", |device| counter(device, "tx", "frames") == 1);
    devices.stop();
}

#[test]
fn kicks_of_a_vring_that_does_not_run_have_no_effect_until_it_does() {
    let devices = Devices::start("null");
    let socket = devices.dir.join("0.sock");
    let connection = FrontendConnection::connect(&socket, TIMEOUT).unwrap();
    let mut frontend = TestFrontend::negotiate(connection, &config()).unwrap();
    let mut other = devices.connect(1);
    // Not started yet, and later stopped.
    for sent in 0..2 {
        let tx = &mut frontend.pairs[0].tx;
        tx.send_all(&[broadcast()], TIMEOUT).unwrap();
        for _ in 0..1000 {
            tx.queue.kick.signal().unwrap();
        }
        devices.assert_carries_frames(&mut other);
        let device = devices.device(0);
        assert_ne!(device["pairs"][0]["tx"]["state"], "running");
        assert_eq!(counter(&device, "tx", "frames"), 2 * sent);
        frontend.start().unwrap();
        let is_carried = |device: &Value| counter(device, "tx", "frames") == 2 * sent + 1;
        devices.wait_for(0, "carrying the frame", is_carried);
        // A disabled transmitq is drained.
        frontend.enable(0, false).unwrap();
        frontend.connection.get_features().unwrap();
        let tx = &mut frontend.pairs[0].tx;
        tx.send_all(&[broadcast()], TIMEOUT).unwrap();
        let is_drained = |device: &Value| counter(device, "tx", "dropped_disabled") == sent + 1;
        devices.wait_for(0, "draining", is_drained);
        frontend.enable(0, true).unwrap();
        frontend.connection.get_features().unwrap();
        let tx = &mut frontend.pairs[0].tx;
        tx.send_all(&[broadcast()], TIMEOUT).unwrap();
        let is_carried = |device: &Value| counter(device, "tx", "frames") == 2 * sent + 2;
        devices.wait_for(0, "carrying frames again", is_carried);
        frontend.stop().unwrap();
    }
    devices.stop();
}

#[test]
fn kick_storm_on_an_empty_vring_costs_the_other_device_no_frame() {
    let devices = Devices::start("null");
    let hostile = devices.connect(0);
    let mut other = devices.connect(1);
    let kick = hostile.pairs[0].tx.queue.kick.try_clone().unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                kick.signal().unwrap();
            }
        });
        let _done = SetOnDrop(&done);
        for _ in 0..10 {
            devices.assert_carries_frames(&mut other);
        }
    });
    let report = devices.device(0);
    assert!(counter(&report, "tx", "kicks") > 0, "{report}");
    assert_eq!(report["pairs"][0]["tx"]["state"], "running");
    assert_eq!(counter(&report, "tx", "bursts"), 0);
    devices.stop();
}

/// As a front-end that is stopped (SIGSTOP): its socket is open, and it does nothing more.
#[test]
fn front_end_that_does_nothing_more_holds_up_neither_the_other_device_nor_the_end() {
    let devices = Devices::start("switch:sw");
    let stopped = devices.connect(0);
    let mut other = devices.connect(1);
    // The device has more frames for it than it has buffers.
    devices.assert_carries_frames(&mut other);
    let report = devices.device(0);
    assert!(counter(&report, "rx", "dropped_no_buffer") > 0, "{report}");
    devices.assert_carries_frames(&mut other);
    devices.stop();
    drop(stopped);
}

#[test]
fn memory_that_is_truncated_costs_its_own_device_only() {
    for uplink in ["null", "switch:sw"] {
        let devices = Devices::start(uplink);
        let socket = devices.dir.join("0.sock");
        let connection = FrontendConnection::connect(&socket, TIMEOUT).unwrap();
        let mut hostile = TestFrontend::negotiate(connection, &config()).unwrap();
        forbid_seals(hostile.ram().file()).unwrap();
        hostile.pairs[0].rx.fill().unwrap();
        hostile.start().unwrap();
        let mut other = devices.connect(1);
        devices.assert_carries_frames(&mut other);
        // The test must not access this memory any more.
        hostile.ram().file().set_len(0).unwrap();
        hostile.pairs[0].tx.queue.kick.signal().unwrap();
        devices.assert_carries_frames(&mut other);
        let report = devices.wait_for(0, "quarantined", |device| {
            counter(device, "tx", "memory_lost") == 1
        });
        assert_eq!(report["pairs"][0]["tx"]["state"], "quarantined");
        devices.wait_for(0, "warned of", |device| {
            warnings(device).contains("pages of the guest's memory have vanished")
        });
        devices.assert_carries_frames(&mut other);
        std::mem::forget(hostile);
        devices.stop();
    }
}

#[test]
fn queue_pairs_beyond_the_limit_of_open_files_cost_the_other_device_nothing() {
    const PAIRS: u16 = 128;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    // The daemon raises a soft limit itself; the hard one holds.
    for (limit, is_enough) in [("ulimit -Sn 1024", true), ("ulimit -n 1024", false)] {
        let command = format!("{limit}; exec \"$@\"");
        let options = Options::new().wrapped_in(["sh", "-c", &command, "sh"]);
        let devices = Devices::start_with(options, "null");
        let mut other = devices.connect(1);
        devices.assert_carries_frames(&mut other);
        let socket = devices.dir.join("0.sock");
        let config = TestFrontendConfig::new(PAIRS, 16, MODERN);
        let large = TestFrontend::connect(&socket, &config);
        assert_eq!(large.is_ok(), is_enough, "{limit}: {:?}", large.err());
        devices.assert_carries_frames(&mut other);
        drop(large);
        devices.connect(0);
        devices.assert_carries_frames(&mut other);
        devices.stop();
    }
}

#[test]
fn second_front_end_is_refused_and_one_that_comes_after_the_first_is_served() {
    let devices = Devices::start("null");
    let first = devices.connect(0);
    let socket = devices.dir.join("0.sock");
    let second = UnixStream::connect(&socket).unwrap();
    second.set_read_timeout(Some(TIMEOUT)).unwrap();
    let read = std::io::Read::read(&mut &second, &mut [0]);
    assert_eq!(read.unwrap(), 0, "the second connection is closed");
    // Another thread writes the log.
    let expected = "connected while a front-end is being served";
    let deadline = Instant::now() + TIMEOUT;
    while !devices.daemon.stderr().contains(expected) && Instant::now() < deadline {
        sleep(Duration::from_millis(10));
    }
    let log = devices.daemon.stderr();
    assert!(log.contains(expected), "{log}");
    // At once, at the first try.
    drop(first);
    devices.connect(0);
    devices.stop();
}

#[test]
fn socket_that_lingers_when_it_is_closed_holds_up_neither_sessions_nor_the_end() {
    let devices = Devices::start("null");
    let mut other = devices.connect(1);
    let (socket, _peer) = slow_closing_socket(Duration::from_secs(60)).unwrap();
    let mut hostile = devices.connect(0);
    // A socket is not an eventfd, so this ends the session.
    let _ = hostile
        .connection
        .set_vring_call(0, Some(socket.as_raw_fd()));
    drop((hostile, socket));
    devices.connect(0);
    devices.assert_carries_frames(&mut other);
    devices.stop();
}

#[test]
fn ring_without_kick_descriptor_is_served() {
    let devices = Devices::start("null");
    let mut frontend = devices.connect(1);
    frontend.connection.set_vring_kick(1, None).unwrap();
    devices.assert_carries_frames(&mut frontend);
    devices.stop();
}

#[test]
fn ring_whose_memory_is_removed_and_added_again_continues() {
    let devices = Devices::start("null");
    let mut frontend = devices.connect(1);
    devices.assert_carries_frames(&mut frontend);
    let regions = frontend.ram().regions();
    let fd = frontend.ram().fd();
    for region in &regions {
        frontend.connection.remove_mem_region(region).unwrap();
    }
    devices.wait_for(1, "stopped", |device| {
        device["pairs"][0]["tx"]["state"] == "stopped"
    });
    for region in &regions {
        frontend.connection.add_mem_region(region, fd).unwrap();
    }
    devices.wait_for(1, "running", |device| {
        device["pairs"][0]["tx"]["state"] == "running"
    });
    devices.assert_carries_frames(&mut frontend);
    devices.stop();
}

#[test]
fn base_that_does_not_match_the_used_index_is_corrected() {
    let devices = Devices::start("null");
    let mut frontend = devices.connect(1);
    devices.assert_carries_frames(&mut frontend);
    // As DPDK's virtio-user does after a restart of the back-end.
    frontend.connection.get_vring_base(1).unwrap();
    frontend.connection.set_vring_base(1, 0).unwrap();
    let kick = frontend.pairs[0].tx.queue.kick.as_raw_fd();
    frontend.connection.set_vring_kick(1, Some(kick)).unwrap();
    devices.assert_carries_frames(&mut frontend);
    assert_eq!(counter(&devices.device(1), "tx", "base_corrected"), 1);
    devices.stop();
}

#[test]
fn front_end_without_shared_memory_is_reported_and_its_successor_is_served() {
    let dir = RunDir::new().unwrap();
    // The only device of its daemon.
    let mut daemon = Options::new()
        .flag("--uplink", "null")
        .start(&dir, "vnet")
        .unwrap();
    let connection = FrontendConnection::connect(daemon.socket(), TIMEOUT).unwrap();
    let mut unshared = TestFrontend::negotiate(connection, &config()).unwrap();
    let features = unshared.features();
    let addresses = unshared.rings()[0].addresses;
    let kick = unshared.rings()[0].kick.as_raw_fd();
    let ram = unshared.ram().clone();
    let connection = &mut unshared.connection;
    connection.set_features(features).unwrap();
    connection.set_vring_num(0, 256).unwrap();
    connection.set_vring_base(0, 0).unwrap();
    connection.set_vring_addr(0, &ram, addresses).unwrap();
    connection.set_vring_kick(0, Some(kick)).unwrap_err();
    daemon
        .wait_for_device("warning", TIMEOUT, |device| {
            warnings(device).contains("memory is not shared with virtionetd")
        })
        .unwrap();
    drop(unshared);
    let shared = TestFrontend::connect(daemon.socket(), &config()).unwrap();
    daemon
        .wait_for_device("without a warning", TIMEOUT, |device| {
            !warnings(device).contains("not shared")
        })
        .unwrap();
    drop(shared);
    assert!(daemon.stop(Signal::SIGTERM).unwrap().status.success());
}

#[test]
fn client_waits_for_its_front_end_whatever_is_in_the_way() {
    let dir = RunDir::new().unwrap();
    let socket = dir.join("vnet.sock");
    let wrong = UnixDatagram::bind(&socket).unwrap();
    let mut daemon = Options::new()
        .client()
        .flag("--uplink", "null")
        .start(&dir, "vnet")
        .unwrap();
    daemon
        .wait_for_device("warning", TIMEOUT, |device| {
            warnings(device).contains("it is no stream socket")
        })
        .unwrap();
    drop(wrong);
    std::fs::remove_file(&socket).unwrap();
    let listener = UnixListener::bind(&socket).unwrap();
    let (stream, _) = listener.accept().unwrap();
    let frontend = TestFrontend::from_socket(stream, &config()).unwrap();
    daemon
        .wait_for_device("without a warning", TIMEOUT, |device| {
            !warnings(device).contains("cannot connect")
        })
        .unwrap();
    drop(frontend);
    assert!(daemon.stop(Signal::SIGTERM).unwrap().status.success());
}
