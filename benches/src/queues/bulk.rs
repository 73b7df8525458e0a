//! Measures throughput and CPU time of TCP and UDP flows of iperf3.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use virtionet_tests::iperf::{Clients, Direction, Iperf, IperfLoad};

use super::testbed::{GuestTestbed, ResourceUsage, VCPUS, VringUsage};
use crate::harness::progress;

/// Payload of a small datagram and of a small write, in bytes.
pub const SMALL_PAYLOAD: u32 = 64;
/// Datagrams per second that all flows together send to the guest. The guest cannot receive all of
/// them, but their sender leaves enough CPU time to the guest.
const OFFERED_RATE: u32 = 80_000;
/// Seconds at the start that are not counted, because the flows have not reached their full rate
/// yet.
const OMITTED_SECONDS: u32 = 1;
/// Time between the end of the measured interval and the end of the load.
const END_MARGIN: Duration = Duration::from_millis(200);
/// Number of frames that shows that the load has started. Opening the connections needs fewer
/// frames.
const MIN_FRAMES: f64 = 50.0;
/// Number of attempts for a load of datagrams, which can fail if a datagram is lost.
const MAX_ATTEMPTS: u32 = 4;

/// The flows of one case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Traffic {
    /// The direction.
    pub direction: Direction,
    /// The number of flows.
    pub flows: u16,
    /// The protocol and the size of the writes.
    pub kind: TrafficKind,
}

/// How the sender passes data to its kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TrafficKind {
    /// TCP with writes of 128 KiB, which results in frames of up to 64 KiB.
    Stream,
    /// TCP with TCP_NODELAY and writes of [`SMALL_PAYLOAD`] bytes. The kernel of the sender merges
    /// waiting writes.
    Writes,
    /// UDP datagrams of [`SMALL_PAYLOAD`] bytes, as many as the guest can send, or more than it can
    /// receive.
    Datagrams,
}

impl TrafficKind {
    /// Every kind.
    pub const ALL: [Self; 3] = [Self::Stream, Self::Writes, Self::Datagrams];

    /// Returns the name in a table.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Stream => "TCP",
            Self::Writes => "TCP writes",
            Self::Datagrams => "UDP 64 B",
        }
    }
}

impl Traffic {
    /// Returns the name in a table.
    #[must_use]
    pub fn name(self) -> String {
        let direction = match self.direction {
            Direction::HostToGuest => "to guest",
            Direction::GuestToHost => "to host",
        };
        let plural = if self.flows == 1 { "" } else { "s" };
        format!(
            "{} {direction}, {} flow{plural}",
            self.kind.name(),
            self.flows
        )
    }

    fn iperf_load(self, seconds: u32) -> IperfLoad {
        let size = SMALL_PAYLOAD.to_string();
        let load = match self.kind {
            TrafficKind::Stream => IperfLoad::tcp(seconds),
            TrafficKind::Writes => IperfLoad::tcp(seconds).arg("-N").arg("-l").arg(&size),
            TrafficKind::Datagrams => IperfLoad::udp(seconds, &self.bits_per_second())
                .arg("-l")
                .arg(&size),
        };
        // The omitted time of iperf3's -O is in addition to the given seconds.
        load.flows(self.flows)
            .arg("-O")
            .arg(&OMITTED_SECONDS.to_string())
    }

    /// Returns the bits per second of each flow of datagrams, where 0 means no limit.
    fn bits_per_second(self) -> String {
        let rate = match self.direction {
            Direction::HostToGuest => OFFERED_RATE * SMALL_PAYLOAD * 8 / u32::from(self.flows),
            Direction::GuestToHost => 0,
        };
        rate.to_string()
    }

    /// Returns the number of iperf3 processes, at most one for each vCPU.
    fn processes(self) -> u16 {
        self.flows.min(VCPUS)
    }
}

/// The figures of one run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BulkSample {
    /// Payload at the receivers in Gbit/s.
    pub gbps: f64,
    /// CPU seconds of virtionetd per received Gbit.
    pub workers: f64,
    /// CPU seconds of QEMU per received Gbit.
    pub qemu: f64,
    /// Frames per burst of the vrings that carry the load.
    pub frames_per_burst: f64,
}

impl BulkSample {
    /// Converts a rate in Gbit/s to thousands of small datagrams per second.
    #[must_use]
    pub fn kpps(gbps: f64) -> f64 {
        gbps * 1e6 / f64::from(8 * SMALL_PAYLOAD)
    }
}

/// Runs `traffic` for `seconds` while the guest uses `queue_pairs` queue pairs.
///
/// # Errors
/// When a part of the testbed fails. The error contains its message.
pub fn measure(
    testbed: &GuestTestbed,
    traffic: Traffic,
    queue_pairs: u16,
    seconds: u32,
) -> Result<BulkSample> {
    let mut remaining_attempts = MAX_ATTEMPTS;
    testbed
        .run_resumed(queue_pairs, || {
            loop {
                remaining_attempts -= 1;
                match run(testbed, traffic, seconds) {
                    // The first datagram, which opens a flow, can be lost if other flows already
                    // run.
                    Err(error)
                        if remaining_attempts > 0 && traffic.kind == TrafficKind::Datagrams =>
                    {
                        progress(&format!(
                            "queues: {}, trying again: {error:#}",
                            traffic.name()
                        ));
                    }
                    outcome => return outcome,
                }
            }
        })
        .with_context(|| format!("{}, {queue_pairs} queue pair(s)", traffic.name()))
}

fn run(testbed: &GuestTestbed, traffic: Traffic, seconds: u32) -> Result<BulkSample> {
    let guest = testbed.qemu().guest();
    let iperf = Iperf::new(
        testbed.network(),
        guest,
        testbed.dir(),
        Clients::Host,
        traffic.processes(),
    )?;
    let running = iperf.start(&traffic.iperf_load(seconds), traffic.direction)?;
    // The CPU time of the start and of the report of iperf3 is not a cost of the network device.
    wait_for_load(testbed, traffic.direction)?;
    sleep(Duration::from_secs(OMITTED_SECONDS.into()));
    let before = testbed.usage()?;
    sleep(Duration::from_secs(seconds.into()).saturating_sub(END_MARGIN));
    let (usage, duration) = testbed.usage()?.since(&before);
    let report = running.finish()?;
    ensure!(report.gbps > 0.0, "iperf3 received no data: {report:?}");
    let gbit = report.gbps * duration;
    let vrings = loaded_vrings(&usage, traffic.direction);
    Ok(BulkSample {
        gbps: report.gbps,
        workers: usage.workers / gbit,
        qemu: usage.qemu / gbit,
        frames_per_burst: vrings.frames_per_burst(),
    })
}

/// Waits until the load has started, at most for a second.
fn wait_for_load(testbed: &GuestTestbed, direction: Direction) -> Result<()> {
    let frames = || Ok::<_, anyhow::Error>(loaded_vrings(&testbed.usage()?, direction).frames);
    let before = frames()?;
    for _ in 0..40 {
        if frames()? - before > MIN_FRAMES {
            break;
        }
        sleep(Duration::from_millis(25));
    }
    Ok(())
}

fn loaded_vrings(usage: &ResourceUsage, direction: Direction) -> VringUsage {
    match direction {
        Direction::HostToGuest => usage.rx,
        Direction::GuestToHost => usage.tx,
    }
}

/// Runs `work` beside a TCP flow on vCPU 0, which takes longer than `seconds`.
///
/// # Errors
/// When `work` or the flow fails.
pub fn run_with_background_flow<T>(
    testbed: &GuestTestbed,
    direction: Direction,
    seconds: u32,
    work: impl FnOnce() -> Result<T>,
) -> Result<T> {
    let guest = testbed.qemu().guest();
    let iperf = Iperf::new(testbed.network(), guest, testbed.dir(), Clients::Host, 1)?;
    let running = iperf.start(&IperfLoad::tcp(seconds + OMITTED_SECONDS), direction)?;
    sleep(Duration::from_millis(500));
    let result = work()?;
    running.finish()?;
    Ok(result)
}
