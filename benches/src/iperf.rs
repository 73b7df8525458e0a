//! Measures TCP between a Linux guest and its host through virtionetd, against QEMU's own
//! virtio-net on a TAP (vhost=off) or another build of virtionetd. Both sides have the same guest, vCPUs and queue pairs, and
//! default settings.
//!
//! Both guests are booted again for each repetition and for each number of queue pairs. Only one of
//! them runs at a time. The other one is stopped through QMP, so that it does not use any CPU.

use std::path::Path;
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

use crate::harness::{OTHER_BUILD, progress};
use crate::outcome::{Better, GroupResult};
use crate::sampling::{Effort, PairedSamples};

const QUEUE_PAIRS: [u16; 3] = [1, 2, 4];
const FLOWS: [u16; 2] = [1, 4];
const DIRECTIONS: [Direction; 2] = [Direction::HostToGuest, Direction::GuestToHost];
const VCPUS: u16 = 4;
const BOOT_TIMEOUT: Duration = Duration::from_secs(120);

/// What the guest's network device is compared with.
#[derive(Debug, Clone, Copy)]
enum Peer<'a> {
    /// QEMU's own virtio-net.
    Qemu,
    /// Another build of virtionetd, which is this program.
    OtherBuild(&'a Path),
}

impl Peer<'_> {
    fn name(self) -> &'static str {
        match self {
            Self::Qemu => "QEMU virtio-net",
            Self::OtherBuild(_) => OTHER_BUILD,
        }
    }
}

/// Measures every number of queue pairs and flows in both directions.
///
/// # Errors
/// When this process is not root, or a part of the testbed fails. The error contains its
/// message.
pub fn run(effort: Effort) -> Result<GroupResult> {
    let mut outcome = GroupResult::default();
    measure_all(Peer::Qemu, effort, &mut outcome)?;
    Ok(outcome)
}

/// Measures the same against another build of virtionetd, and adds the rows.
///
/// # Errors
/// As [`run`]; also when the other build does not understand the arguments.
pub fn run_against_build(program: &Path, effort: Effort, outcome: &mut GroupResult) -> Result<()> {
    measure_all(Peer::OtherBuild(program), effort, outcome)
}

fn measure_all(peer: Peer<'_>, effort: Effort, outcome: &mut GroupResult) -> Result<()> {
    for queue_pairs in QUEUE_PAIRS {
        let cases = cases();
        let mut samples = vec![PairedSamples::default(); cases.len()];
        let mut counters = vec![String::new(); cases.len()];
        for n in 1..=effort.choose(3, 1) {
            progress(&format!("iperf: queue pairs {queue_pairs}, repetition {n}"));
            counters = measure_repetition(peer, queue_pairs, effort, &cases, &mut samples)
                .with_context(|| format!("with {queue_pairs} queue pair(s), in repetition {n}"))?;
        }
        for (n, (case, samples)) in cases.iter().zip(&samples).enumerate() {
            let name = case.name(queue_pairs);
            outcome.notes.push(format!("{name}: {}", counters[n]));
            let row = samples.row(&name, "Gbit/s", Better::Higher, peer.name());
            outcome.rows.push(row.with_headline(queue_pairs != 2));
        }
    }
    let accel = Accel::Auto.resolve()?;
    outcome.notes.push(format!(
        "{VCPUS} vCPUs under {accel}, vCPU i pinned to CPU i mod n; one iperf3 process for each flow; medians of the runs"
    ));
    Ok(())
}

/// The direction and the number of flows of one case.
#[derive(Debug, Clone, Copy)]
struct IperfCase {
    direction: Direction,
    flows: u16,
}

fn cases() -> Vec<IperfCase> {
    let of_direction = |direction| FLOWS.map(|flows| IperfCase { direction, flows });
    DIRECTIONS.into_iter().flat_map(of_direction).collect()
}

impl IperfCase {
    fn name(self, queue_pairs: u16) -> String {
        let direction = match self.direction {
            Direction::HostToGuest => "host to guest",
            Direction::GuestToHost => "guest to host",
        };
        let plural = |n: u16| if n == 1 { "" } else { "s" };
        format!(
            "{direction}, {} flow{}, {queue_pairs} queue pair{}",
            self.flows,
            plural(self.flows),
            plural(queue_pairs)
        )
    }
}

/// Boots both sides and adds one pair of samples to each case. Returns a description of the
/// counters of our vrings for each case.
fn measure_repetition(
    peer: Peer<'_>,
    queue_pairs: u16,
    effort: Effort,
    cases: &[IperfCase],
    samples: &mut [PairedSamples],
) -> Result<Vec<String>> {
    let dir = RunDir::new()?;
    let peer_name = peer.name();
    let ours = GuestUnderTest::virtionetd(Options::new(), &dir, "ours", queue_pairs)
        .context("with virtionetd")?;
    let peer = match peer {
        Peer::Qemu => GuestUnderTest::qemu(&dir, queue_pairs),
        Peer::OtherBuild(program) => {
            let options = Options::new().program(program);
            GuestUnderTest::virtionetd(options, &dir, "peer", queue_pairs)
        }
    };
    let peer = peer.with_context(|| format!("with {peer_name}"))?;
    let seconds = effort.choose(4, 2);
    let mut descriptions = Vec::new();
    for (case, samples) in cases.iter().zip(samples) {
        let before = ours.counters(case.direction)?;
        let our_rate = ours.measure(&dir, *case, seconds);
        descriptions.push(ours.counters(case.direction)?.since(before).describe());
        let our_rate = our_rate.context("with virtionetd")?;
        let peer_rate = peer.measure(&dir, *case, seconds);
        let peer_rate = peer_rate.with_context(|| format!("with {peer_name}"))?;
        progress(&format!(
            "iperf: {}: {our_rate:.2} against {peer_rate:.2} Gbit/s",
            case.name(queue_pairs)
        ));
        samples.push(our_rate, peer_rate);
    }
    Ok(descriptions)
}

/// A guest, its back-end and its network. They are dropped in this order: QEMU first, the network
/// last.
struct GuestUnderTest {
    qemu: Qemu,
    daemon: Option<Daemon>,
    network: HostNetwork,
}

/// The counters of all vrings of one direction.
#[derive(Debug, Clone, Copy, Default)]
struct DirectionCounters {
    frames: f64,
    bytes: f64,
    bursts: f64,
    dropped: f64,
}

impl GuestUnderTest {
    fn virtionetd(options: Options, dir: &RunDir, name: &str, queue_pairs: u16) -> Result<Self> {
        let network = HostNetwork::bare()?;
        let daemon = options
            .netns(network.netns())
            .flag("--tap", TAP)
            .start(dir, name)?;
        network.configure()?;
        let nic = Nic::vhost_user(daemon.socket()).queues(queue_pairs);
        let qemu = machine().nic(nic).start(dir, &format!("{name}-guest"))?;
        Self::boot(qemu, Some(daemon), network, queue_pairs)
    }

    fn qemu(dir: &RunDir, queue_pairs: u16) -> Result<Self> {
        let network = HostNetwork::with_tap(queue_pairs)?;
        let nic = Nic::tap(TAP).queues(queue_pairs);
        let machine = machine().netns(network.netns()).nic(nic);
        let qemu = machine.start(dir, "peer-guest")?;
        Self::boot(qemu, None, network, queue_pairs)
    }

    /// Boots the guest and stops it again.
    fn boot(
        mut qemu: Qemu,
        daemon: Option<Daemon>,
        network: HostNetwork,
        queue_pairs: u16,
    ) -> Result<Self> {
        qemu.pin_vcpus()?;
        qemu.resume()?;
        qemu.boot(BOOT_TIMEOUT)?;
        configure_guest(qemu.guest(), queue_pairs)?;
        diagnostics::wait_for_ping(&network, qemu.guest(), daemon.as_ref())?;
        stop(&qemu)?;
        Ok(Self {
            qemu,
            daemon,
            network,
        })
    }

    /// Resumes the guest, measures, and stops it again. Returns Gbit/s at the receivers.
    fn measure(&self, dir: &RunDir, case: IperfCase, seconds: u32) -> Result<f64> {
        self.qemu.resume()?;
        let guest = self.qemu.guest();
        diagnostics::wait_for_ping(&self.network, guest, self.daemon.as_ref())?;
        let iperf = Iperf::new(&self.network, guest, dir, Clients::Host, case.flows)?;
        // The first second is omitted, because the flows have not reached their full rate yet.
        let load = IperfLoad::tcp(seconds).flows(case.flows).arg("-O").arg("1");
        let report = iperf.run(&load, case.direction)?;
        stop(&self.qemu)?;
        Ok(report.gbps)
    }

    /// Reads the counters of virtionetd's vrings. They are 0 for QEMU's own virtio-net, which has
    /// none.
    fn counters(&self, direction: Direction) -> Result<DirectionCounters> {
        let vring = match direction {
            Direction::HostToGuest => "rx",
            Direction::GuestToHost => "tx",
        };
        let mut sum = DirectionCounters::default();
        let Some(daemon) = &self.daemon else {
            return Ok(sum);
        };
        let device = daemon.device()?;
        for pair in device["pairs"].as_array().into_iter().flatten() {
            let counters = pair[vring]["counters"].as_object();
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

    fn describe(self) -> String {
        format!(
            "{:.1} frames per burst, {:.0} bytes per frame, {} dropped",
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
