//! A Linux guest's TCP through virtionetd against QEMU's own virtio-net on a TAP (vhost=off): the
//! same guest, vCPUs and queues, both at their defaults.
//!
//! Both guests are booted anew for each repetition and number of pairs. Only one of them runs at a
//! time: the other is stopped over its monitor, so that it takes no CPU while the other one is measured.

use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;
use virtionet_tests::accel::Accel;
use virtionet_tests::daemon::{Daemon, Options};
use virtionet_tests::diagnostics;
use virtionet_tests::iperf::{Clients, Direction, Iperf, IperfLoad};
use virtionet_tests::paths::RunDir;
use virtionet_tests::qemu::{Machine, Nic, Qemu};
use virtionet_tests::topology::{HostNetwork, TAP, configure_guest};

use crate::harness::progress;
use crate::outcome::{Better, GroupResult};
use crate::sampling::{Effort, PairedSamples};

const PAIRS: [u16; 3] = [1, 2, 4];
const FLOWS: [u16; 2] = [1, 4];
const DIRECTIONS: [Direction; 2] = [Direction::HostToGuest, Direction::GuestToHost];
const VCPUS: u16 = 4;
const BOOT: Duration = Duration::from_secs(120);

/// Measures every number of pairs and flows, both ways.
///
/// # Errors
/// When this process is not root, or a part fails: with its words.
pub fn run(effort: Effort) -> Result<GroupResult> {
    let mut outcome = GroupResult::default();
    for pairs in PAIRS {
        let loads = loads();
        let mut taken = vec![PairedSamples::default(); loads.len()];
        let mut work = vec![String::new(); loads.len()];
        for n in 1..=effort.choose(3, 1) {
            progress(&format!("iperf: pairs {pairs}, repetition {n}"));
            work = repeat(pairs, effort, &loads, &mut taken)
                .with_context(|| format!("with {pairs} pair(s), in repetition {n}"))?;
        }
        for (n, (load, taken)) in loads.iter().zip(&taken).enumerate() {
            let case = load.case(pairs);
            outcome.notes.push(format!("{case}: {}", work[n]));
            let row = taken.row(&case, "Gbit/s", Better::Higher, "QEMU virtio-net");
            outcome.rows.push(row.headline(pairs != 2));
        }
    }
    let accel = Accel::Auto.resolve()?;
    outcome.notes.push(format!(
        "{VCPUS} vCPUs under {accel}, vCPU i pinned to CPU i mod n; one iperf3 process a flow; medians of the runs"
    ));
    Ok(outcome)
}

/// What iperf3 is to do.
#[derive(Debug, Clone, Copy)]
struct IperfCase {
    direction: Direction,
    flows: u16,
}

fn loads() -> Vec<IperfCase> {
    let both = |direction| FLOWS.map(|flows| IperfCase { direction, flows });
    DIRECTIONS.into_iter().flat_map(both).collect()
}

impl IperfCase {
    fn case(self, pairs: u16) -> String {
        let way = match self.direction {
            Direction::HostToGuest => "host to guest",
            Direction::GuestToHost => "guest to host",
        };
        let plural = |n: u16| if n == 1 { "" } else { "s" };
        let (flows, of) = (self.flows, plural(self.flows));
        format!("{way}, {flows} flow{of}, {pairs} pair{}", plural(pairs))
    }
}

/// Boots both sides and takes one pair of every load; says what our rings did in each.
fn repeat(
    pairs: u16,
    effort: Effort,
    loads: &[IperfCase],
    taken: &mut [PairedSamples],
) -> Result<Vec<String>> {
    let dir = RunDir::new()?;
    let ours = GuestUnderTest::ours(&dir, pairs).context("with virtionetd")?;
    let peer = GuestUnderTest::peer(&dir, pairs).context("with QEMU's own card")?;
    let seconds = effort.choose(4, 2);
    let mut work = Vec::new();
    for (load, taken) in loads.iter().zip(taken) {
        let before = ours.ring_counters(load.direction)?;
        let our_rate = ours.measure(&dir, *load, seconds);
        work.push(ours.ring_counters(load.direction)?.since(before).words());
        let our_rate = our_rate.context("with virtionetd")?;
        let peer_rate = peer.measure(&dir, *load, seconds);
        let peer_rate = peer_rate.context("with QEMU's own card")?;
        progress(&format!(
            "iperf: {}: {our_rate:.2} against {peer_rate:.2} Gbit/s",
            load.case(pairs)
        ));
        taken.push(our_rate, peer_rate);
    }
    Ok(work)
}

/// A guest and what its card is connected to. QEMU goes first, the network last.
struct GuestUnderTest {
    qemu: Qemu,
    daemon: Option<Daemon>,
    network: HostNetwork,
}

/// What the rings of one direction counted, all pairs together.
#[derive(Debug, Clone, Copy, Default)]
struct DirectionCounters {
    frames: f64,
    bytes: f64,
    bursts: f64,
    dropped: f64,
}

impl GuestUnderTest {
    fn ours(dir: &RunDir, pairs: u16) -> Result<Self> {
        let network = HostNetwork::bare()?;
        let daemon = Options::new()
            .netns(network.netns())
            .flag("--tap", TAP)
            .start(dir, "ours")?;
        network.configure()?;
        let nic = Nic::vhost_user(daemon.socket()).queues(pairs);
        let qemu = machine().nic(nic).start(dir, "ours-guest")?;
        Self::boot(qemu, Some(daemon), network, pairs)
    }

    fn peer(dir: &RunDir, pairs: u16) -> Result<Self> {
        let network = HostNetwork::with_tap(pairs)?;
        let nic = Nic::tap(TAP).queues(pairs);
        let machine = machine().netns(network.netns()).nic(nic);
        let qemu = machine.start(dir, "peer-guest")?;
        Self::boot(qemu, None, network, pairs)
    }

    /// Boots the guest and stops it again.
    fn boot(
        mut qemu: Qemu,
        daemon: Option<Daemon>,
        network: HostNetwork,
        pairs: u16,
    ) -> Result<Self> {
        qemu.pin_vcpus()?;
        qemu.resume()?;
        qemu.boot(BOOT)?;
        configure_guest(qemu.guest(), pairs)?;
        diagnostics::wait_for_ping(&network, qemu.guest(), daemon.as_ref())?;
        stop(&qemu)?;
        Ok(Self {
            qemu,
            daemon,
            network,
        })
    }

    /// Gbit/s at the receivers, while the guest runs for this.
    fn measure(&self, dir: &RunDir, load: IperfCase, seconds: u32) -> Result<f64> {
        self.qemu.resume()?;
        let guest = self.qemu.guest();
        diagnostics::wait_for_ping(&self.network, guest, self.daemon.as_ref())?;
        let iperf = Iperf::new(&self.network, guest, dir, Clients::Host, load.flows)?;
        // The first second, in which the flows find their speed, does not count.
        let what = IperfLoad::tcp(seconds).flows(load.flows).arg("-O").arg("1");
        let report = iperf.run(&what, load.direction)?;
        stop(&self.qemu)?;
        Ok(report.gbps)
    }

    /// Zeros for QEMU's own card, which tells nothing.
    fn ring_counters(&self, direction: Direction) -> Result<DirectionCounters> {
        let ring = match direction {
            Direction::HostToGuest => "rx",
            Direction::GuestToHost => "tx",
        };
        let mut sum = DirectionCounters::default();
        let Some(daemon) = &self.daemon else {
            return Ok(sum);
        };
        let device = daemon.device()?;
        for pair in device["pairs"].as_array().into_iter().flatten() {
            let counters = pair[ring]["counters"].as_object();
            for (name, value) in counters.into_iter().flatten() {
                let value = value.as_f64().unwrap_or(0.0);
                match name.as_str() {
                    "frames" => sum.frames += value,
                    "bytes" => sum.bytes += value,
                    "bursts" => sum.bursts += value,
                    name if name.starts_with("dropped_") => sum.dropped += value,
                    _ => {}
                }
            }
        }
        Ok(sum)
    }
}

impl DirectionCounters {
    fn since(self, before: Self) -> Self {
        Self {
            frames: self.frames - before.frames,
            bytes: self.bytes - before.bytes,
            bursts: self.bursts - before.bursts,
            dropped: self.dropped - before.dropped,
        }
    }

    fn words(self) -> String {
        format!(
            "{:.1} frames a burst, {:.0} bytes a frame, {} dropped",
            self.frames / self.bursts.max(1.0),
            self.bytes / self.frames.max(1.0),
            self.dropped
        )
    }
}

fn machine() -> Machine {
    Machine::new()
        .vcpus(VCPUS.into())
        .accel(Accel::Auto)
        .paused()
}

fn stop(qemu: &Qemu) -> Result<()> {
    qemu.qmp("stop", &Value::Null).map(drop)
}
