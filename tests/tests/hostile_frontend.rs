//! Front-ends that violate the protocol, or turn what they have handed over against the daemon.
//! They may lose their own device; other devices carry every frame, and the daemon ends in time.
#![allow(clippy::unwrap_used)]

use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use serde_json::Value;
use virtionet_guest::frame::{Frame, FrameSpec, Transport};
use virtionet_guest::frontend::FrontendConnection;
use virtionet_guest::hostile::{block_writes, forbid_seals, slow_closing_socket};
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
            std::thread::sleep(Duration::from_millis(20));
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
    let log = devices.daemon.stderr();
    assert!(
        log.contains("connected while a front-end is being served"),
        "{log}"
    );
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
