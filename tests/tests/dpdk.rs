//! DPDK's virtio-user as the guest's driver: frames go from a host's socket through a TAP to the
//! card, testpmd turns them round with all addresses swapped, and each comes back as it was sent.
//!
//! Split and packed rings, mergeable buffers, in-order use and the vectorized paths in all their
//! combinations, in both socket roles, with ring sizes and numbers of pairs that change from run to
//! run.

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
/// The flows' ports on the card's side; the host's are the kernel's choice.
const PORT: u16 = 5000;
const FLOWS: u16 = 8;
const PER_FLOW: u32 = 400;
/// Most datagrams of a flow under way at once: more than the vectorized receive path holds back (it
/// takes 8 at a time).
const WINDOW: u16 = 12;
/// Bytes of a datagram: from a frame of 60 bytes to one of the whole MTU.
const SIZES: [usize; 6] = [18, 64, 200, 470, 1000, 1472];
/// Packet buffers of testpmd's where a frame is to be merged from several. From packed rings it comes
/// back by an indirect table, whose header DPDK marks as writable.
const SMALL_BUFFER: u16 = 512;
const RINGS: [u16; 5] = [64, 128, 256, 512, 1024];
const PAIRS: [u16; 4] = [1, 2, 4, 8];
const RUNS: u16 = 32;
const WAIT: Duration = Duration::from_secs(20);
const MEMORY_MIB: u32 = 128;

#[test]
fn every_mode_is_run_in_both_roles_and_meets_every_ring_size_and_number_of_pairs() {
    let runs: Vec<Run> = (0..RUNS).map(Run::number).collect();
    let mut modes: Vec<_> = runs.iter().map(Run::modes).collect();
    modes.sort_unstable();
    modes.dedup();
    assert_eq!(modes.len(), 32, "all values of five modes");
    for packed in [false, true] {
        for (mode, on) in (1..5).flat_map(|mode| [(mode, false), (mode, true)]) {
            let chosen = |run: &&Run| run.packed == packed && run.modes()[mode] == on;
            let with: Vec<&Run> = runs.iter().filter(chosen).collect();
            for ring in RINGS {
                assert!(with.iter().any(|run| run.ring == ring), "ring {ring}");
            }
            for pairs in PAIRS {
                assert!(with.iter().any(|run| run.pairs == pairs), "pairs {pairs}");
            }
        }
    }
}

#[test]
fn split_rings_return_every_frame_as_it_was() {
    all(false).unwrap();
}

#[test]
fn packed_rings_return_every_frame_as_it_was() {
    all(true).unwrap();
}

fn all(packed: bool) -> Result<()> {
    let before = pool()?;
    let failed = in_turn(packed)?;
    let after = pool()?;
    ensure!(before == after, "of {before} huge pages {after} are left");
    ensure!(failed.is_empty(), "these failed: {failed:?}");
    Ok(())
}

/// The runs that failed.
fn in_turn(packed: bool) -> Result<Vec<Run>> {
    let _pages = HugePages::reserve((MEMORY_MIB / 2).into())?;
    let mut failed = Vec::new();
    for run in (0..RUNS)
        .map(Run::number)
        .filter(|run| run.packed == packed)
    {
        let started_at = Instant::now();
        match run.check() {
            Ok(words) => eprintln!(
                "{run:?}: {words} in {:.1} s",
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

fn pool() -> Result<String> {
    let text = fs::read_to_string("/proc/sys/vm/nr_hugepages")?;
    Ok(text.trim().to_owned())
}

/// How one run is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    packed: bool,
    mergeable: bool,
    in_order: bool,
    vectorized: bool,
    /// The back-end connects.
    client: bool,
    ring: u16,
    pairs: u16,
}

impl Run {
    fn number(n: u16) -> Self {
        let bit = |bit: u16| n >> bit & 1 == 1;
        let pick = |n: u16, of: usize| usize::from(n) % of;
        Self {
            packed: bit(0),
            mergeable: bit(1),
            in_order: bit(2),
            vectorized: bit(3),
            client: bit(0) != bit(4),
            ring: RINGS[pick(n, RINGS.len())],
            pairs: PAIRS[pick(n + n / 4 + n / 8, PAIRS.len())],
        }
    }

    fn modes(&self) -> [bool; 5] {
        [
            self.packed,
            self.mergeable,
            self.in_order,
            self.vectorized,
            self.client,
        ]
    }

    fn config(&self, dir: &RunDir) -> Result<TestpmdConfig> {
        let card = VirtioUser {
            queues: self.pairs,
            queue_size: self.ring,
            packed: self.packed,
            mergeable: self.mergeable,
            in_order: self.in_order,
            vectorized: self.vectorized,
            server: self.client,
            ..VirtioUser::new(&dir.join("vnet.sock"), MAC)
        };
        let cpu = *allowed_cpus()?.first().context("no CPU")?;
        let config = TestpmdConfig::front_end(&[card], cpu).memory(MEMORY_MIB, 24_000);
        // Small buffers: a frame of the whole MTU is merged from several of them.
        Ok(match self.buffer() {
            Some(bytes) => config
                .arg(format!("--mbuf-size={bytes}"))
                .arg("--enable-scatter"),
            None => config,
        })
    }

    fn check(&self) -> Result<String> {
        let dir = RunDir::new()?;
        let netns = Netns::new()?;
        // Frames of the kernel's own would be frames that nobody counts on.
        disable_ipv6(&netns)?;
        let mut options = Options::new()
            .netns(&netns)
            .flag("--tap", TAP)
            .flag("--queues", self.pairs.to_string());
        if self.client {
            options = options.client();
        }
        let mut daemon = options.start(&dir, "vnet")?;
        configure(&netns)?;
        let mut testpmd = self.config(&dir)?.start(&dir, "testpmd")?;
        testpmd.command("set fwd 5tswap")?;
        testpmd.forward(0)?;
        daemon.wait_device("serving all rings", WAIT, |device| self.served(device))?;

        let mut flows = flows(&netns, *self)?;
        exchange(&mut flows).with_context(|| counter_summary(&daemon, &mut testpmd))?;
        let sent = flows.iter().map(|flow| u64::from(flow.sent)).sum();
        let came = flows.iter().map(|flow| u64::from(flow.came)).sum();
        check_counters(&daemon, sent, came)?;
        let port = testpmd.port_stats()?[0];
        let there = (port.rx_packets, port.tx_packets, port.rx_nombuf);
        ensure!(there == (came, came, 0), "testpmd counts {port:?}");
        finish(testpmd, daemon)?;
        Ok(format!(
            "{came} of {sent} frames back, contents and order as sent"
        ))
    }

    /// Bytes of a packet buffer, where frames are to be merged.
    fn buffer(&self) -> Option<u16> {
        self.mergeable.then_some(SMALL_BUFFER)
    }

    /// The number of flows and how many datagrams each has under way: all of them fit one ring,
    /// with all their descriptors either way.
    fn flows(&self) -> (u16, u16) {
        match self.buffer() {
            None => ((self.ring / WINDOW).min(FLOWS), WINDOW),
            Some(buffer) => {
                let fit = self.ring / (1 + 1600 / (buffer - 128));
                let flows = (fit / 2).clamp(1, FLOWS);
                (flows, (fit / flows).min(WINDOW))
            }
        }
    }

    fn served(&self, device: &Value) -> bool {
        let pairs = device["pairs"].as_array();
        let pairs: Vec<&Value> = pairs.into_iter().flatten().collect();
        let running = |pair: &&Value| {
            ["rx", "tx"]
                .iter()
                .all(|ring| pair[ring]["state"] == "running" && pair[ring]["enabled"] == true)
        };
        pairs.iter().filter(|pair| running(pair)).count() == usize::from(self.pairs)
    }
}

fn disable_ipv6(netns: &Netns) -> Result<()> {
    let ipv6 = "for i in all default; do echo 1 >/proc/sys/net/ipv6/conf/$i/disable_ipv6; done";
    netns.run("sh", ["-c", ipv6]).map(drop)
}

fn configure(netns: &Netns) -> Result<()> {
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
    ensure!(stopped.status.success(), "virtionetd ended so: {stopped:?}");
    Ok(())
}

/// The daemon's counters, summed over its pairs, agree with what was sent and came.
fn check_counters(daemon: &Daemon, sent: u64, came: u64) -> Result<()> {
    let device = daemon.device()?;
    let pairs = counters::pairs(&device)?;
    let to_card: u64 = pairs.iter().map(|pair| pair.rx.frames).sum();
    let from_card: u64 = pairs.iter().map(|pair| pair.tx.frames).sum();
    ensure!(
        (to_card, from_card) == (sent, came),
        "virtionetd counts {to_card} frames to the card and {from_card} from it, where {sent} were sent and {came} came"
    );
    for pair in device["pairs"].as_array().into_iter().flatten() {
        for ring in ["rx", "tx"] {
            let counters = pair[ring]["counters"].as_object();
            for (name, count) in counters.context("no counters")? {
                let lost = name.starts_with("dropped_") || name == "quarantines";
                ensure!(!lost || *count == 0, "{name} is {count}: {pair}");
            }
        }
    }
    Ok(())
}

/// Datagrams to one port of the card and back.
struct Flow {
    number: u16,
    socket: UdpSocket,
    window: u32,
    sent: u32,
    came: u32,
}

/// What both programs counted, for an error.
fn counter_summary(daemon: &Daemon, testpmd: &mut Testpmd) -> String {
    let device = daemon.device().unwrap_or_default();
    let mut words = format!("{:?}", testpmd.port_stats());
    for pair in device["pairs"].as_array().into_iter().flatten() {
        for ring in ["rx", "tx"] {
            let counters = pair[ring]["counters"].as_object();
            let counted = counters.into_iter().flatten().filter(|(_, n)| **n != 0);
            let counted: Vec<String> = counted.map(|(name, n)| format!("{name} {n}")).collect();
            words.push_str(&format!(
                "; {ring} {}: {}",
                pair["pair"],
                counted.join(", ")
            ));
        }
    }
    words
}

/// A socket a flow, in the namespace.
fn flows(netns: &Netns, run: Run) -> Result<Vec<Flow>> {
    let inside = || -> Result<Vec<Flow>> {
        let file = File::open(format!("/run/netns/{}", netns.name()))?;
        setns(file, CloneFlags::CLONE_NEWNET)?;
        let (count, window) = run.flows();
        (0..count).map(|n| flow(n, window)).collect()
    };
    // Sockets stay in the namespace that they were made in.
    thread::scope(|scope| scope.spawn(inside).join()).map_err(|_| anyhow!("the thread panicked"))?
}

fn flow(number: u16, window: u16) -> Result<Flow> {
    let socket = UdpSocket::bind((HOST, 0))?;
    socket.connect((DEVICE_ADDRESS, PORT + number))?;
    socket.set_nonblocking(true)?;
    Ok(Flow {
        number,
        socket,
        window: window.into(),
        sent: 0,
        came: 0,
    })
}

/// Sends everything in windows and checks what comes back. The vectorized receive path takes 8
/// frames at a time: what it holds back at the end is pushed out by some more.
fn exchange(flows: &mut [Flow]) -> Result<()> {
    let mut last = Instant::now();
    while flows.iter().any(|flow| flow.came < PER_FLOW) {
        let mut moved = false;
        for flow in flows.iter_mut() {
            while flow.sent < PER_FLOW && flow.sent - flow.came < flow.window {
                flow.send()?;
            }
            moved |= flow.receive()?;
        }
        if moved {
            last = Instant::now();
            continue;
        }
        sleep(Duration::from_micros(200));
        if last.elapsed() > WAIT {
            let state: Vec<_> = flows.iter().map(|f| (f.sent, f.came)).collect();
            bail!("nothing more came for {WAIT:?}; sent and come by flow: {state:?}");
        }
        if last.elapsed() > Duration::from_millis(200) {
            flush_flows(flows)?;
        }
    }
    receive_remaining(flows)
}

/// One more for each flow that lacks some.
fn flush_flows(flows: &mut [Flow]) -> Result<()> {
    for flow in flows.iter_mut().filter(|flow| flow.came < PER_FLOW) {
        if flow.sent - flow.came < 2 * flow.window {
            flow.send()?;
        }
    }
    Ok(())
}

/// Takes in what still comes.
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
        ensure!(sent == bytes.len(), "{sent} of {} bytes sent", bytes.len());
        self.sent += 1;
        Ok(())
    }

    /// Takes in and checks what is there; whether anything was.
    fn receive(&mut self) -> Result<bool> {
        let mut buffer = [0; 2048];
        let before = self.came;
        loop {
            let len = match self.socket.recv(&mut buffer) {
                Ok(len) => len,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error.into()),
            };
            let want = self.datagram(self.came);
            let number = buffer[..8].to_vec();
            ensure!(
                buffer[..len] == want,
                "flow {}: number {} should come, but {len} bytes came that begin with {number:?}",
                self.number,
                self.came
            );
            self.came += 1;
        }
        Ok(self.came != before)
    }

    /// Flow and number, then bytes that depend on both.
    fn datagram(&self, number: u32) -> Vec<u8> {
        let size = SIZES[usize::try_from(number).unwrap_or(0) % SIZES.len()];
        let mut bytes = Vec::with_capacity(size);
        bytes.extend(u32::from(self.number).to_be_bytes());
        bytes.extend(number.to_be_bytes());
        let mut word = u32::from(self.number) << 24 | number;
        while bytes.len() < size {
            // Knuth's multiplicative hash: any change of a byte shows.
            word = word.wrapping_mul(2_654_435_761).wrapping_add(1);
            bytes.push(word.to_be_bytes()[0]);
        }
        bytes
    }
}
