//! DPDK's virtio-user as the driver. Frames go from a host's socket through a TAP to the device,
//! testpmd returns them with all addresses swapped, and each frame must arrive unchanged.
//!
//! The runs cover all combinations of split and packed rings, mergeable buffers, in-order use, the
//! vectorized data paths and both socket roles. The ring sizes and the numbers of queue pairs
//! differ from run to run.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::net::UdpSocket;
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::Signal;
use serde_json::Value;
use virtionet_tests::counters;
use virtionet_tests::daemon::{Daemon, Options};
use virtionet_tests::hugepages::HugePages;
use virtionet_tests::netns::Netns;
use virtionet_tests::paths::RunDir;
use virtionet_tests::sched::allowed_cpus;
use virtionet_tests::testpmd::{Testpmd, TestpmdConfig, VirtioUser};
use virtionet_tests::topology::TAP;

const HOST: &str = "10.77.0.1";
const DEVICE_ADDRESS: &str = "10.77.0.2";
const MAC: &str = "02:00:00:00:00:02";
/// The first destination port of the flows. The kernel chooses the source ports.
const FIRST_PORT: u16 = 5000;
const MAX_FLOWS: u16 = 8;
const DATAGRAMS_PER_FLOW: u32 = 400;
/// The maximum number of datagrams in flight in each flow. It must exceed the number of frames that
/// the vectorized receive path can hold back, because that path takes 8 frames at a time.
const MAX_WINDOW: u16 = 12;
/// The payload sizes in bytes: from a frame of 60 bytes to a frame of the whole MTU.
const SIZES: [usize; 6] = [18, 64, 200, 470, 1000, 1472];
/// The size in bytes of testpmd's packet buffers in runs with mergeable buffers, in which a large
/// frame needs several buffers. On packed rings, testpmd transmits such a frame with an indirect
/// descriptor table, whose header descriptor DPDK marks as writable.
const SMALL_BUFFER: u16 = 512;
const RING_SIZES: [u16; 5] = [64, 128, 256, 512, 1024];
const PAIRS: [u16; 4] = [1, 2, 4, 8];
const RUNS: u16 = 32;
const TIMEOUT: Duration = Duration::from_secs(20);
const MEMORY_MIB: u32 = 128;

#[test]
fn runs_cover_all_modes_with_every_ring_size_and_number_of_pairs() {
    let runs: Vec<Run> = (0..RUNS).map(Run::number).collect();
    let mut modes: Vec<_> = runs.iter().map(Run::modes).collect();
    modes.sort_unstable();
    modes.dedup();
    assert_eq!(modes.len(), 32, "the number of combinations of five modes");
    for is_packed in [false, true] {
        for (mode, is_on) in (1..5).flat_map(|mode| [(mode, false), (mode, true)]) {
            let has_mode = |run: &&Run| run.is_packed == is_packed && run.modes()[mode] == is_on;
            let matching: Vec<&Run> = runs.iter().filter(has_mode).collect();
            for size in RING_SIZES {
                assert!(
                    matching.iter().any(|run| run.ring_size == size),
                    "ring size {size}"
                );
            }
            for pairs in PAIRS {
                assert!(
                    matching.iter().any(|run| run.pairs == pairs),
                    "pairs {pairs}"
                );
            }
        }
    }
}

#[test]
fn every_frame_returns_unchanged_over_split_rings() {
    check_all(false).unwrap();
}

#[test]
fn every_frame_returns_unchanged_over_packed_rings() {
    check_all(true).unwrap();
}

/// In server mode, virtio-user starts a split ring at base 0 again when its back-end is another one,
/// although the ring has moved on.
#[test]
fn split_rings_continue_after_a_restart_at_which_the_front_end_forgets_the_base() {
    let _pages = HugePages::reserve((MEMORY_MIB / 2).into()).unwrap();
    let run = Run {
        is_client: true,
        ring_size: 256,
        pairs: 2,
        ..Run::number(0)
    };
    run.check_restart().unwrap();
}

/// In server mode, virtio-user clears a packed ring when its back-end is another one, and starts it
/// at its beginning: the ring's crash record does not hold any more.
#[test]
fn packed_rings_start_anew_after_a_restart_at_which_the_front_end_clears_them() {
    let _pages = HugePages::reserve((MEMORY_MIB / 2).into()).unwrap();
    let run = Run {
        is_packed: true,
        is_client: true,
        ring_size: 256,
        pairs: 2,
        ..Run::number(0)
    };
    run.check_restart().unwrap();
}

fn check_all(is_packed: bool) -> Result<()> {
    let before = huge_page_count()?;
    let failed = run_all(is_packed)?;
    let after = huge_page_count()?;
    ensure!(
        before == after,
        "the huge page pool had {before} pages before the runs and has {after} now"
    );
    ensure!(failed.is_empty(), "these runs failed: {failed:?}");
    Ok(())
}

/// Performs the runs one after the other, and returns those that failed.
fn run_all(is_packed: bool) -> Result<Vec<Run>> {
    let _pages = HugePages::reserve((MEMORY_MIB / 2).into())?;
    let mut failed = Vec::new();
    for run in (0..RUNS)
        .map(Run::number)
        .filter(|run| run.is_packed == is_packed)
    {
        let started_at = Instant::now();
        match run.check() {
            Ok(summary) => eprintln!(
                "{run:?}: {summary} in {:.1} s",
                started_at.elapsed().as_secs_f64()
            ),
            Err(error) => {
                eprintln!("{run:?}: FAILED: {error:#}");
                failed.push(run);
            }
        }
    }
    Ok(failed)
}

fn huge_page_count() -> Result<String> {
    let text = fs::read_to_string("/proc/sys/vm/nr_hugepages")?;
    Ok(text.trim().to_owned())
}

/// The configuration of one run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    is_packed: bool,
    is_mergeable: bool,
    is_in_order: bool,
    is_vectorized: bool,
    /// Whether virtionetd connects to the front-end, instead of listening.
    is_client: bool,
    ring_size: u16,
    pairs: u16,
}

impl Run {
    fn number(n: u16) -> Self {
        let bit = |bit: u16| n >> bit & 1 == 1;
        let pick = |n: u16, count: usize| usize::from(n) % count;
        Self {
            is_packed: bit(0),
            is_mergeable: bit(1),
            is_in_order: bit(2),
            is_vectorized: bit(3),
            is_client: bit(0) != bit(4),
            ring_size: RING_SIZES[pick(n, RING_SIZES.len())],
            pairs: PAIRS[pick(n + n / 4 + n / 8, PAIRS.len())],
        }
    }

    fn modes(&self) -> [bool; 5] {
        [
            self.is_packed,
            self.is_mergeable,
            self.is_in_order,
            self.is_vectorized,
            self.is_client,
        ]
    }

    fn config(&self, dir: &RunDir) -> Result<TestpmdConfig> {
        let device = VirtioUser {
            queues: self.pairs,
            queue_size: self.ring_size,
            packed: self.is_packed,
            mergeable: self.is_mergeable,
            in_order: self.is_in_order,
            vectorized: self.is_vectorized,
            server: self.is_client,
            ..VirtioUser::new(&dir.join("vnet.sock"), MAC)
        };
        let cpu = *allowed_cpus()?
            .first()
            .context("this process may use no CPU")?;
        let config = TestpmdConfig::front_end(&[device], cpu).memory(MEMORY_MIB, 24_000);
        Ok(match self.buffer_size() {
            Some(bytes) => config
                .arg(format!("--mbuf-size={bytes}"))
                .arg("--enable-scatter"),
            None => config,
        })
    }

    fn check(&self) -> Result<String> {
        let dir = RunDir::new()?;
        let netns = Netns::new()?;
        let (daemon, mut testpmd) = self.start(&dir, &netns)?;

        let mut flows = open_flows(&netns, *self)?;
        exchange(&mut flows).with_context(|| counter_summary(&daemon, &mut testpmd))?;
        let sent = flows.iter().map(|flow| u64::from(flow.sent)).sum();
        let received = flows.iter().map(|flow| u64::from(flow.received)).sum();
        check_counters(&daemon, sent, received)?;
        let port = testpmd.port_stats()?[0];
        let counted = (port.rx_packets, port.tx_packets, port.rx_nombuf);
        ensure!(
            counted == (received, received, 0),
            "testpmd should count {received} frames in each direction, but counts {port:?}"
        );
        finish(testpmd, daemon)?;
        Ok(format!(
            "{received} of {sent} frames returned unchanged and in order"
        ))
    }

    /// Exchanges datagrams with one daemon, and then with another one in its place.
    fn check_restart(&self) -> Result<()> {
        let dir = RunDir::new()?;
        let netns = Netns::new()?;
        let (daemon, mut testpmd) = self.start(&dir, &netns)?;
        exchange(&mut open_flows(&netns, *self)?)?;
        ensure!(daemon.stop(Signal::SIGTERM)?.status.success());

        let mut daemon = self.start_daemon(&dir, &netns)?;
        self.wait_until_served(&mut daemon)?;
        let mut flows = open_flows(&netns, *self)?;
        exchange(&mut flows).with_context(|| counter_summary(&daemon, &mut testpmd))?;
        let device = daemon.device()?;
        let count = |ring: &str, counter: &str| -> u64 {
            let pairs = device["pairs"].as_array();
            let counts = pairs.into_iter().flatten();
            counts
                .filter_map(|pair| pair[ring]["counters"][counter].as_u64())
                .sum()
        };
        // Each ring has moved on, and each started once.
        let is_corrected = ["rx", "tx"].map(|ring| count(ring, "base_corrected") > 0);
        ensure!(
            is_corrected == [!self.is_packed; 2] && count("tx", "base_implausible") == 0,
            "bases were corrected: {is_corrected:?}; {}",
            counter_summary(&daemon, &mut testpmd)
        );
        finish(testpmd, daemon)
    }

    /// Starts both programs, and waits until the daemon serves all rings.
    fn start(&self, dir: &RunDir, netns: &Netns) -> Result<(Daemon, Testpmd)> {
        // The kernel would send IPv6 frames of its own, which exact counters would include.
        disable_ipv6(netns)?;
        let mut daemon = self.start_daemon(dir, netns)?;
        let mut testpmd = self.config(dir)?.start(dir, "testpmd")?;
        testpmd.command("set fwd 5tswap")?;
        testpmd.forward(0)?;
        self.wait_until_served(&mut daemon)?;
        Ok((daemon, testpmd))
    }

    fn start_daemon(&self, dir: &RunDir, netns: &Netns) -> Result<Daemon> {
        let mut options = Options::new()
            .netns(netns)
            .flag("--tap", TAP)
            .flag("--queues", self.pairs.to_string());
        if self.is_client {
            options = options.client();
        }
        let daemon = options.start(dir, "vnet")?;
        configure_tap(netns)?;
        Ok(daemon)
    }

    fn wait_until_served(&self, daemon: &mut Daemon) -> Result<()> {
        daemon.wait_for_device("serving all rings", TIMEOUT, |device| {
            self.is_served(device)
        })?;
        Ok(())
    }

    /// Returns the size of a packet buffer in bytes, if it differs from testpmd's default.
    fn buffer_size(&self) -> Option<u16> {
        self.is_mergeable.then_some(SMALL_BUFFER)
    }

    /// Returns the number of flows, and the number of datagrams in flight in each flow. All their
    /// descriptors fit into one ring in either direction.
    fn flow_count_and_window(&self) -> (u16, u16) {
        match self.buffer_size() {
            None => ((self.ring_size / MAX_WINDOW).min(MAX_FLOWS), MAX_WINDOW),
            Some(buffer) => {
                let frames = self.ring_size / (1 + 1600 / (buffer - 128));
                let flows = (frames / 2).clamp(1, MAX_FLOWS);
                (flows, (frames / flows).min(MAX_WINDOW))
            }
        }
    }

    fn is_served(&self, device: &Value) -> bool {
        let pairs = device["pairs"].as_array();
        let pairs: Vec<&Value> = pairs.into_iter().flatten().collect();
        let is_running = |pair: &&Value| {
            ["rx", "tx"]
                .iter()
                .all(|ring| pair[ring]["state"] == "running" && pair[ring]["enabled"] == true)
        };
        pairs.iter().filter(|pair| is_running(pair)).count() == usize::from(self.pairs)
    }
}

fn disable_ipv6(netns: &Netns) -> Result<()> {
    let ipv6 = "for i in all default; do echo 1 >/proc/sys/net/ipv6/conf/$i/disable_ipv6; done";
    netns.run("sh", ["-c", ipv6]).map(drop)
}

fn configure_tap(netns: &Netns) -> Result<()> {
    netns.ip(&format!("addr add {HOST}/24 dev {TAP}"))?;
    netns.ip(&format!("link set {TAP} up"))?;
    netns.ip(&format!(
        "neigh replace {DEVICE_ADDRESS} lladdr {MAC} dev {TAP} nud permanent"
    ))?;
    Ok(())
}

fn finish(testpmd: Testpmd, daemon: Daemon) -> Result<()> {
    testpmd.quit()?;
    let stopped = daemon.stop(Signal::SIGTERM)?;
    ensure!(stopped.status.success(), "virtionetd failed: {stopped:?}");
    Ok(())
}

/// Checks that the daemon's counters, summed over all queue pairs, are the numbers of sent and
/// received frames, and that it has dropped no frame.
fn check_counters(daemon: &Daemon, sent: u64, received: u64) -> Result<()> {
    let device = daemon.device()?;
    let pairs = counters::pairs(&device)?;
    let rx: u64 = pairs.iter().map(|pair| pair.rx.frames).sum();
    let tx: u64 = pairs.iter().map(|pair| pair.tx.frames).sum();
    ensure!(
        (rx, tx) == (sent, received),
        "virtionetd counts {rx} RX frames and {tx} TX frames, but the host has sent {sent} and received {received} frames"
    );
    for pair in device["pairs"].as_array().into_iter().flatten() {
        for ring in ["rx", "tx"] {
            let counters = pair[ring]["counters"].as_object();
            for (name, count) in counters.context("a ring has no counters")? {
                let is_loss = name.starts_with("dropped_") || name == "quarantines";
                ensure!(!is_loss || *count == 0, "{name} is {count}: {pair}");
            }
        }
    }
    Ok(())
}

/// A flow of datagrams to one port of the device, and back.
struct Flow {
    number: u16,
    socket: UdpSocket,
    /// The maximum number of datagrams in flight.
    window: u32,
    sent: u32,
    received: u32,
}

/// Returns the counters of both programs for an error message.
fn counter_summary(daemon: &Daemon, testpmd: &mut Testpmd) -> String {
    let device = daemon.device().unwrap_or_default();
    let mut summary = format!("{:?}", testpmd.port_stats());
    for pair in device["pairs"].as_array().into_iter().flatten() {
        for ring in ["rx", "tx"] {
            let counters = pair[ring]["counters"].as_object();
            let nonzero = counters.into_iter().flatten().filter(|(_, n)| **n != 0);
            let nonzero: Vec<String> = nonzero.map(|(name, n)| format!("{name} {n}")).collect();
            summary.push_str(&format!(
                "; {ring} {}: {}",
                pair["pair"],
                nonzero.join(", ")
            ));
        }
    }
    summary
}

/// Opens a socket in the namespace for each flow.
fn open_flows(netns: &Netns, run: Run) -> Result<Vec<Flow>> {
    let open = || -> Result<Vec<Flow>> {
        let file = File::open(format!("/run/netns/{}", netns.name()))?;
        setns(file, CloneFlags::CLONE_NEWNET)?;
        let (count, window) = run.flow_count_and_window();
        (0..count).map(|n| open_flow(n, window)).collect()
    };
    // A socket stays in the namespace in which it was created, so only the thread that creates it
    // needs to enter the namespace.
    thread::scope(|scope| scope.spawn(open).join()).map_err(|_| anyhow!("the thread panicked"))?
}

fn open_flow(number: u16, window: u16) -> Result<Flow> {
    let socket = UdpSocket::bind((HOST, 0))?;
    socket.connect((DEVICE_ADDRESS, FIRST_PORT + number))?;
    socket.set_nonblocking(true)?;
    Ok(Flow {
        number,
        socket,
        window: window.into(),
        sent: 0,
        received: 0,
    })
}

/// Sends all datagrams, and checks those that return. The vectorized receive path takes 8 frames at
/// a time, so it may hold back the last frames until additional frames arrive.
fn exchange(flows: &mut [Flow]) -> Result<()> {
    let mut last = Instant::now();
    while flows.iter().any(|flow| flow.received < DATAGRAMS_PER_FLOW) {
        let mut has_received = false;
        for flow in flows.iter_mut() {
            while flow.sent < DATAGRAMS_PER_FLOW && flow.sent - flow.received < flow.window {
                flow.send()?;
            }
            has_received |= flow.receive()?;
        }
        if has_received {
            last = Instant::now();
            continue;
        }
        sleep(Duration::from_micros(200));
        if last.elapsed() > TIMEOUT {
            let state: Vec<_> = flows.iter().map(|f| (f.sent, f.received)).collect();
            bail!(
                "no datagram has returned for {TIMEOUT:?}; (sent, received) of each flow: {state:?}"
            );
        }
        if last.elapsed() > Duration::from_millis(200) {
            flush_flows(flows)?;
        }
    }
    receive_remaining(flows)
}

/// Sends an additional datagram in each incomplete flow.
fn flush_flows(flows: &mut [Flow]) -> Result<()> {
    for flow in flows
        .iter_mut()
        .filter(|flow| flow.received < DATAGRAMS_PER_FLOW)
    {
        if flow.sent - flow.received < 2 * flow.window {
            flow.send()?;
        }
    }
    Ok(())
}

/// Receives datagrams until none arrives for 50 ms.
fn receive_remaining(flows: &mut [Flow]) -> Result<()> {
    let mut last = Instant::now();
    while last.elapsed() < Duration::from_millis(50) {
        for flow in flows.iter_mut() {
            if flow.receive()? {
                last = Instant::now();
            }
        }
        sleep(Duration::from_millis(1));
    }
    Ok(())
}

impl Flow {
    fn send(&mut self) -> Result<()> {
        let bytes = self.datagram(self.sent);
        let sent = self.socket.send(&bytes)?;
        ensure!(
            sent == bytes.len(),
            "the kernel sent only {sent} of {} bytes",
            bytes.len()
        );
        self.sent += 1;
        Ok(())
    }

    /// Receives and checks all available datagrams. Returns whether there were any.
    fn receive(&mut self) -> Result<bool> {
        let mut buffer = [0; 2048];
        let before = self.received;
        loop {
            let len = match self.socket.recv(&mut buffer) {
                Ok(len) => len,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error.into()),
            };
            let expected = self.datagram(self.received);
            let start = buffer[..8].to_vec();
            ensure!(
                buffer[..len] == expected,
                "flow {}: datagram {} was expected, but {len} bytes arrived that begin with {start:?}",
                self.number,
                self.received
            );
            self.received += 1;
        }
        Ok(self.received != before)
    }

    /// Returns the payload of a datagram: the numbers of the flow and of the datagram, and bytes
    /// that depend on both.
    fn datagram(&self, number: u32) -> Vec<u8> {
        let size = SIZES[usize::try_from(number).unwrap_or(0) % SIZES.len()];
        let mut bytes = Vec::with_capacity(size);
        bytes.extend(u32::from(self.number).to_be_bytes());
        bytes.extend(number.to_be_bytes());
        let mut word = u32::from(self.number) << 24 | number;
        while bytes.len() < size {
            // Knuth's multiplicative hash makes the bytes irregular, so that the comparison also
            // detects a shifted or repeated part of a datagram.
            word = word.wrapping_mul(2_654_435_761).wrapping_add(1);
            bytes.push(word.to_be_bytes()[0]);
        }
        bytes
    }
}
