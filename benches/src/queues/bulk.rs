//! iperf3's streams and floods of datagrams.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use virtionet_tests::iperf::{Clients, Direction, Iperf, IperfLoad};

use super::testbed::{GuestTestbed, ResourceUsage, RingUsage, VCPUS};
use crate::harness::progress;

/// Payload of a small datagram and of a small write, in bytes.
pub const SMALL: u32 = 64;
/// Datagrams a second that are sent to the guest, all flows together: more than it takes, but not
/// so many that their sender takes the CPUs from the guest.
const OFFERED: u32 = 80_000;
/// In which the flows find their speed; it does not count.
const OMIT: u32 = 1;
/// The account ends so much before the load.
const END_MARGIN: Duration = Duration::from_millis(200);
/// More frames than the connections alone make.
const FLOWS: f64 = 50.0;
/// Of a load whose datagrams are lost.
const MAX_ATTEMPTS: u32 = 4;

/// What flows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Traffic {
    /// Which way.
    pub direction: Direction,
    /// How many flows.
    pub flows: u16,
    /// In which pieces.
    pub kind: TrafficKind,
}

/// How data is handed to the kernel that sends it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TrafficKind {
    /// TCP, 128 KiB at a time: frames of up to 64 KiB.
    Stream,
    /// TCP without delay, [`SMALL`] bytes at a time; the sender's kernel joins what waits.
    Writes,
    /// UDP datagrams of [`SMALL`] bytes, as many as the guest can send or more than it can take.
    Datagrams,
}

impl TrafficKind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Stream, Self::Writes, Self::Datagrams];

    /// In a table.
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
    /// In a table.
    #[must_use]
    pub fn name(self) -> String {
        let way = match self.direction {
            Direction::HostToGuest => "to guest",
            Direction::GuestToHost => "to host",
        };
        let plural = if self.flows == 1 { "" } else { "s" };
        format!("{} {way}, {} flow{plural}", self.kind.name(), self.flows)
    }

    fn load(self, seconds: u32) -> IperfLoad {
        let size = SMALL.to_string();
        let load = match self.kind {
            TrafficKind::Stream => IperfLoad::tcp(seconds),
            TrafficKind::Writes => IperfLoad::tcp(seconds).arg("-N").arg("-l").arg(&size),
            TrafficKind::Datagrams => IperfLoad::udp(seconds, &self.rate()).arg("-l").arg(&size),
        };
        // iperf3's -O makes the whole longer, not the rest shorter.
        load.flows(self.flows).arg("-O").arg(&OMIT.to_string())
    }

    /// Bits a second of each flow of datagrams, 0 for no limit.
    fn rate(self) -> String {
        let rate = match self.direction {
            Direction::HostToGuest => OFFERED * SMALL * 8 / u32::from(self.flows),
            Direction::GuestToHost => 0,
        };
        rate.to_string()
    }

    /// One process for each vCPU at most.
    fn processes(self) -> u16 {
        self.flows.min(VCPUS)
    }
}

/// What one run gave.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BulkSample {
    /// Gbit/s of payload at the receivers.
    pub gbps: f64,
    /// CPU seconds of virtionetd for each Gbit that was received.
    pub workers: f64,
    /// The same of QEMU.
    pub qemu: f64,
    /// Frames that a burst of the loaded rings carried.
    pub frames_per_burst: f64,
}

impl BulkSample {
    /// Thousands of small datagrams a second.
    #[must_use]
    pub fn kpps(gbps: f64) -> f64 {
        gbps * 1e6 / f64::from(8 * SMALL)
    }
}

/// Runs `traffic` for `seconds` with `pairs` of the guest's pairs in use.
///
/// # Errors
/// When a part fails: with its words.
pub fn measure(
    testbed: &GuestTestbed,
    traffic: Traffic,
    pairs: u16,
    seconds: u32,
) -> Result<BulkSample> {
    let mut tries = MAX_ATTEMPTS;
    testbed
        .run_resumed(pairs, || {
            loop {
                tries -= 1;
                match run(testbed, traffic, seconds) {
                    // The first datagram of a flow, which opens it, can be lost in what flows already.
                    Err(error) if tries > 0 && traffic.kind == TrafficKind::Datagrams => {
                        progress(&format!("queues: {}, once more: {error:#}", traffic.name()));
                    }
                    outcome => return outcome,
                }
            }
        })
        .with_context(|| format!("{}, {pairs} pair(s)", traffic.name()))
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
    let running = iperf.start(&traffic.load(seconds), traffic.direction)?;
    // What the guest spends on iperf3's start and report is not the card's cost.
    wait_for_flow(testbed, traffic.direction)?;
    sleep(Duration::from_secs(OMIT.into()));
    let before = testbed.usage()?;
    sleep(Duration::from_secs(seconds.into()).saturating_sub(END_MARGIN));
    let (spent, lasted) = testbed.usage()?.since(&before);
    let report = running.finish()?;
    ensure!(report.gbps > 0.0, "nothing arrived: {report:?}");
    let gbit = report.gbps * lasted;
    let ring = loaded(&spent, traffic.direction);
    Ok(BulkSample {
        gbps: report.gbps,
        workers: spent.workers / gbit,
        qemu: spent.qemu / gbit,
        frames_per_burst: ring.frames_per_burst(),
    })
}

/// Waits until the load flows, or for as long as its start may take at most.
fn wait_for_flow(testbed: &GuestTestbed, direction: Direction) -> Result<()> {
    let frames = || Ok::<_, anyhow::Error>(loaded(&testbed.usage()?, direction).frames);
    let before = frames()?;
    for _ in 0..40 {
        if frames()? - before > FLOWS {
            break;
        }
        sleep(Duration::from_millis(25));
    }
    Ok(())
}

fn loaded(usage: &ResourceUsage, direction: Direction) -> RingUsage {
    match direction {
        Direction::HostToGuest => usage.rx,
        Direction::GuestToHost => usage.tx,
    }
}

/// Runs `work` beside a TCP flow on vCPU 0, which is more than `seconds` long.
///
/// # Errors
/// As `work`, or when the flow fails.
pub fn background<T>(
    testbed: &GuestTestbed,
    direction: Direction,
    seconds: u32,
    work: impl FnOnce() -> Result<T>,
) -> Result<T> {
    let guest = testbed.qemu().guest();
    let iperf = Iperf::new(testbed.network(), guest, testbed.dir(), Clients::Host, 1)?;
    let running = iperf.start(&IperfLoad::tcp(seconds + OMIT), direction)?;
    sleep(Duration::from_millis(500));
    let done = work()?;
    running.finish()?;
    Ok(done)
}
