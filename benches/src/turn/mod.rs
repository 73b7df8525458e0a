//! Measures the CPU time of one pass of a worker over a queue pair whose rings are as expensive as
//! a guest can make them. A pass is what a worker does between two looks at its events: a turn for
//! TX and one for RX. During a turn, everything else that needs the vring waits.
//!
//! The pass is that of the daemon ([`PairService`]), in a thread of this process, with the daemon's
//! own uplinks. Before each pass the rings are full again. Measured is the CPU time of
//! the thread, work of the kernel included, because other programs must not count; the figure of a
//! case is the pass in the 99th percentile.

mod ring;

use std::fs::File;
use std::io::{IoSlice, Write};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::time::{ClockId, clock_gettime};
use virtionet_guest::frame::{Checksum, Frame, FrameSpec, Transport};
use virtionet_guest::net::{MODERN, OFFLOADS};
use virtionet_net_device::pair_service::PairService;
use virtionet_net_device::queue_pair::QueuePair;
use virtionet_net_device::waker::Waker;
use virtionet_net_device::worker_event::PairEvent;
use virtionet_uplink::null::Null;
use virtionet_uplink::switch::Switch;
use virtionet_virtio_net::features::Features;
use virtionet_virtio_net::uplink::{MAX_BURST, Uplink};

use self::ring::{ChainKind, HostileRing, RX, TX};
use crate::harness::{pin_to_last_cpu, progress, run_in_netns};
use crate::outcome::{Better, GroupResult, Row};
use crate::sampling::Effort;
use crate::tap::testbed::TapTestbed;

/// The longest acceptable pass, in microseconds of CPU time.
const BOUND_US: f64 = 1000.0;
/// The features of a guest that accepts no offloads.
const NO_OFFLOADS: u64 = MODERN & !OFFLOADS;
/// The destination of frames that a switch copies to all ports.
const BROADCAST: [u8; 6] = [0xff; 6];
/// The destination of frames that the network stack of the host drops before it looks up a route,
/// because no interface has this address.
const OTHER_HOST: [u8; 6] = [2, 0, 0, 0, 0, 9];
/// Bytes of Ethernet, IPv4 and TCP headers.
const HEADERS_LEN: usize = 14 + 20 + 20;
/// The most segments of a chain.
const MAX_SEGMENTS: u16 = 1024;

/// Where the frames of a case go.
#[derive(Clone, Copy)]
enum Target {
    Null,
    Tap,
    /// A switch with so many other ports, whose guests accept no offloads and have receiveqs of
    /// such chains.
    Switch(u16, ChainKind),
}

/// A case of TX.
struct TransmitCase {
    name: &'static str,
    target: Target,
    /// The chains of the transmitq.
    kind: ChainKind,
    /// What each chain contains.
    frame: Frame,
}

/// Measures every case.
///
/// # Errors
/// When this process is not root, or a part of the testbed cannot be created.
pub fn run(effort: Effort) -> Result<GroupResult> {
    run_in_netns(|| {
        pin_to_last_cpu()?;
        let passes = effort.choose(2000, 50);
        let mut outcome = GroupResult::default();
        for case in cases_without_receivers()?
            .into_iter()
            .chain(cases_with_receivers()?)
        {
            progress(&format!("turn: {}", case.name));
            let mut pass = TransmitPass::new(&case)?;
            let times = (0..passes).map(|_| pass.run());
            outcome
                .rows
                .push(row(case.name, times.collect::<Result<_>>()?));
        }
        let small = frame(BROADCAST, 64, None)?;
        for (name, kind) in [
            ("RX from TAP, 64 B", direct(1)),
            ("RX from TAP, 64 B, buffers of 1,000 pieces", indirect(1000)),
            ("RX from TAP, 64 B, endless chains", ChainKind::Loop),
        ] {
            progress(&format!("turn: {name}"));
            let mut pass = ReceivePass::new(kind)?;
            let times = (0..passes).map(|_| pass.run(&small));
            outcome.rows.push(row(name, times.collect::<Result<_>>()?));
        }
        Ok(outcome)
    })
}

/// TX to an uplink behind which no guest receives.
fn cases_without_receivers() -> Result<Vec<TransmitCase>> {
    let (plain, pages, pieces) = (direct(1), direct(17), indirect(MAX_SEGMENTS));
    let null = |name, kind, frame| TransmitCase::new(name, Target::Null, kind, frame);
    let tap = |name, kind, frame| TransmitCase::new(name, Target::Tap, kind, frame);
    let small = || frame(BROADCAST, 64, None);
    let medium = || frame(BROADCAST, 1200, None);
    let large = || frame(BROADCAST, 65_000, Some(65_000 - 54));
    Ok(vec![
        null("TX to null, 64 B", plain, small()?),
        null("TX to null, endless chains", ChainKind::Loop, small()?),
        null("TX to null, tables of 1,024 buffers", pieces, medium()?),
        tap("TX to TAP, 64 B", plain, small()?),
        tap(
            "TX to TAP, 64 B to another host",
            plain,
            frame(OTHER_HOST, 64, None)?,
        ),
        tap("TX to TAP, 65,000 B in pages", pages, large()?),
        tap("TX to TAP, 1,024 buffers", direct(MAX_SEGMENTS), medium()?),
        tap("TX to TAP, 65,000 B in 1,024 buffers", pieces, large()?),
    ])
}

/// TX to guests behind a switch.
fn cases_with_receivers() -> Result<Vec<TransmitCase>> {
    let (plain, pages) = (direct(1), direct(17));
    let guest = |name, kind, frame| TransmitCase::new(name, Target::Switch(1, plain), kind, frame);
    let guests = |name, receivers, frame| {
        TransmitCase::new(name, Target::Switch(100, receivers), plain, frame)
    };
    let small = || frame(BROADCAST, 64, None);
    Ok(vec![
        guest(
            "TX to a guest without TSO, 65,000 B in segments of 28 B",
            pages,
            frame(BROADCAST, 65_000, Some(28))?,
        ),
        guest(
            "TX to a guest without TSO, 1,500 B in segments of 28 B",
            plain,
            frame(BROADCAST, 1500, Some(28))?,
        ),
        guests(
            "TX to 100 guests, 1,500 B",
            plain,
            frame(BROADCAST, 1500, None)?,
        ),
        guests(
            "TX to 100 guests, 64 B, receive buffers of 1,024 pieces",
            indirect(MAX_SEGMENTS),
            small()?,
        ),
        guests(
            "TX to 100 guests, 64 B, endless receive chains",
            ChainKind::Loop,
            small()?,
        ),
    ])
}

fn direct(segments: u16) -> ChainKind {
    ChainKind::Direct { segments }
}

fn indirect(segments: u16) -> ChainKind {
    ChainKind::Indirect { segments }
}

fn row(name: &str, mut times_us: Vec<f64>) -> Row {
    times_us.sort_by(f64::total_cmp);
    let longest = times_us[times_us.len() * 99 / 100];
    let row = Row::new(name, "us", Better::Lower, longest, ("bound", BOUND_US));
    row.with_bound(1.0)
}

/// A frame of `len` bytes.
fn frame(target_mac: [u8; 6], len: usize, gso_size: Option<u16>) -> Result<Frame> {
    let spec = FrameSpec {
        target_mac,
        checksum: match gso_size {
            Some(_) => Checksum::Partial,
            None => Checksum::Full,
        },
        gso_size,
        ..FrameSpec::v4(Transport::Tcp)
    };
    Ok(spec.build(&vec![7; len - HEADERS_LEN])?)
}

/// A queue pair of which only the transmitq has work.
struct TransmitPass {
    service: PairService,
    ring: HostileRing,
    receivers: Vec<(Arc<QueuePair>, HostileRing)>,
    // The TAP, or the switch's ports.
    _tap: Option<TapTestbed>,
    _ports: Vec<Box<dyn Uplink>>,
}

impl TransmitCase {
    fn new(name: &'static str, target: Target, kind: ChainKind, frame: Frame) -> Self {
        Self {
            name,
            target,
            kind,
            frame,
        }
    }
}

impl TransmitPass {
    fn new(case: &TransmitCase) -> Result<Self> {
        let frame = &case.frame;
        let pair = new_pair("sender");
        let ring = HostileRing::new(
            TX,
            case.kind,
            &[&frame.header.to_bytes()[..], &frame.bytes].concat(),
        )?;
        pair.tx()
            .start(ring.config(MODERN)?, Default::default(), None)?;
        pair.tx().set_enabled(true);
        let (mut receivers, mut ports, mut tap) = (Vec::new(), Vec::new(), None);
        let sink = Arc::downgrade(&pair);
        match case.target {
            Target::Null => pair.set_uplink(Null.open_queue(0, sink)?),
            Target::Tap => {
                let testbed = TapTestbed::without_source()?;
                pair.set_uplink(testbed.queue());
                tap = Some(testbed);
            }
            Target::Switch(count, kind) => {
                let switch = Switch::new("bench");
                let port = switch.add_device_port("sender")?;
                port.set_format(Features(MODERN).format())?;
                let queue = port.open_queue(0, sink)?;
                queue.set_attached(true)?;
                pair.set_uplink(queue);
                ports.push(Box::new(port) as Box<dyn Uplink>);
                for n in 0..count {
                    let name = format!("receiver{n}");
                    let port = switch.add_device_port(&name)?;
                    receivers.push(new_receiver(&name, &port, kind)?);
                    ports.push(Box::new(port));
                }
            }
        }
        Ok(Self {
            service: PairService::new(pair, false),
            ring,
            receivers,
            _tap: tap,
            _ports: ports,
        })
    }

    /// Returns the microseconds of CPU time of a pass over full rings.
    fn run(&mut self) -> Result<f64> {
        self.ring.refill();
        self.receivers
            .iter_mut()
            .for_each(|(_, ring)| ring.refill());
        self.service.handle(PairEvent::TxKick);
        let (time, found) = time_pass(&mut self.service);
        ensure!(found > 0, "the transmitq was quarantined");
        Ok(time)
    }
}

fn new_pair(device: &str) -> Arc<QueuePair> {
    Arc::new(QueuePair::new(0, device, Waker::default()))
}

/// A guest without offloads, behind a port of a switch.
fn new_receiver(
    name: &str,
    port: &dyn Uplink,
    kind: ChainKind,
) -> Result<(Arc<QueuePair>, HostileRing)> {
    let pair = new_pair(name);
    let ring = HostileRing::new(RX, kind, &[0; 2048])?;
    pair.rx()
        .start(ring.config(NO_OFFLOADS)?, Default::default(), None)?;
    pair.rx().set_enabled(true);
    port.set_format(Features(NO_OFFLOADS).format())?;
    let sink = Arc::downgrade(&pair);
    let queue = port.open_queue(0, sink)?;
    queue.set_attached(true)?;
    pair.set_uplink(queue);
    Ok((pair, ring))
}

/// A queue pair of which only the receiveq has work, behind a TAP.
struct ReceivePass {
    service: PairService,
    ring: HostileRing,
    source: File,
    _testbed: TapTestbed,
}

impl ReceivePass {
    fn new(kind: ChainKind) -> Result<Self> {
        let testbed = TapTestbed::with_source()?;
        let pair = new_pair("receiver");
        let ring = HostileRing::new(RX, kind, &[0; 2048])?;
        pair.rx()
            .start(ring.config(MODERN)?, Default::default(), None)?;
        pair.rx().set_enabled(true);
        pair.set_uplink(testbed.queue());
        Ok(Self {
            service: PairService::new(pair, false),
            ring,
            source: testbed.source_file()?,
            _testbed: testbed,
        })
    }

    fn run(&mut self, frame: &Frame) -> Result<f64> {
        self.ring.refill();
        let header = frame.header.to_bytes();
        let parts = [IoSlice::new(&header), IoSlice::new(&frame.bytes)];
        for _ in 0..MAX_BURST {
            self.source
                .write_vectored(&parts)
                .context("a frame cannot be written to the source TAP")?;
        }
        self.service.handle(PairEvent::UplinkReadable);
        self.service.handle(PairEvent::RxKick);
        Ok(time_pass(&mut self.service).0)
    }
}

/// Returns the microseconds of CPU time of a pass, and the frames that it found.
fn time_pass(service: &mut PairService) -> (f64, usize) {
    let start = thread_time();
    let found = service.run_pass(false);
    ((thread_time() - start).as_secs_f64() * 1e6, found)
}

/// The CPU time of this thread. The clock always exists on Linux.
fn thread_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}
