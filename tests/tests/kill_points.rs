//! A daemon that is killed at chosen lines of the code that publishes chains. The next daemon goes on,
//! and of the numbered frames of each vring
//!
//! - none that a driver sent to a TAP is lost, and at most one burst of them is sent again;
//! - of those that a driver sent to another one at most one burst is lost or comes twice;
//! - none that a driver was to receive comes twice, and at most one turn of them is lost;
//! - all others arrive, in order.
//!
//! `KILLS=N` kills the daemon N times at each line, with both formats and on both uplinks; without it
//! once at each line of the publish of a packed virtqueue, on a TAP. `KILL_SEED` repeats a run.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use virtionet_guest::driver::DriverVirtqueue;
use virtionet_guest::packed::{PackedDriverVirtqueue, RingPosition};
use virtionet_tests::debugger::{Killer, SourceLine};
use virtionet_tests::random::Random;
use virtionet_tests::settings::{number, seed};
use virtionet_tests::traffic::testbed::{Setup, TrafficTestbed, Uplink};
use virtionet_tests::traffic::{End, Flow, Traffic};

const PAIRS: u16 = 1;
/// The most frames of a burst on TX, and of a turn on RX.
const BURST_LIMIT: u64 = 64;
/// The frames of a flow that are sent at once, and those that are on their way.
const BURST: u64 = 8;
const WINDOW: u64 = BURST_LIMIT;
/// The highest number of times that the process comes to a line before it is killed.
const MAX_HITS: u64 = 40;
const KILL_TIMEOUT: Duration = Duration::from_secs(60);
const ARRIVAL_TIMEOUT: Duration = Duration::from_secs(10);
/// What the flows carry after a kill.
const AFTERWARDS: Duration = Duration::from_millis(20);

const TX: &str = "crates/virtio-net/src/tx.rs";
const RX: &str = "crates/virtio-net/src/rx.rs";
const RX_PUSH: &str = "crates/virtio-net/src/rx/push.rs";
const NOTIFIER: &str = "crates/net-device/src/notifier.rs";
const PACKED: &str = "crates/virtqueue/src/packed/publish.rs";
const SPLIT: &str = "crates/virtqueue/src/split.rs";
const RECORD: &str = "crates/virtqueue/src/crash_record.rs";

/// An instant at which the daemon is killed. Each line has code of its own in all builds.
#[derive(Clone, Copy, Debug)]
struct KillPoint {
    name: &'static str,
    line: SourceLine,
}

const fn point(name: &'static str, file: &'static str, text: &'static str) -> KillPoint {
    KillPoint {
        name,
        line: SourceLine { file, text },
    }
}

const COMMON: [KillPoint; 2] = [
    point(
        "frames are sent, chains not published",
        TX,
        "match should_call {",
    ),
    point(
        "chains are published, the driver not called",
        NOTIFIER,
        "match self.write() {",
    ),
];

const ON_TAP: [KillPoint; 2] = [
    point(
        "a frame is read, its chain not completed",
        RX,
        "Received::Frame(len) => bytes += self.commit::<LOG>(len),",
    ),
    point(
        "frames are read, chains not published",
        RX,
        "if frames > 0 {",
    ),
];

const ON_SWITCH: [KillPoint; 2] = [
    point(
        "frames are copied, chains not published",
        RX_PUSH,
        "if progress.frames > 0 {",
    ),
    point(
        "the sender's chains are published, the receiver's are not",
        RX_PUSH,
        "match fault {",
    ),
];

const OF_SPLIT: [KillPoint; 2] = [
    point("before the used index", SPLIT, "if old == new {"),
    point(
        "after the used index",
        SPLIT,
        "let event = self.avail.acquire(RING_ENTRIES + self.size);",
    ),
];

const OF_PACKED: [KillPoint; 4] = [
    point(
        "before the list of the record",
        RECORD,
        "let list = self.next_list;",
    ),
    point(
        "before the progress of the record",
        RECORD,
        "self.next_list = list ^ 1;",
    ),
    BETWEEN_DESCRIPTORS,
    point(
        "after the first descriptor, before the call",
        PACKED,
        "let moved = end.since(start, self.size);",
    ),
];

/// Where at most times descriptors are written that the driver does not see yet.
const BETWEEN_DESCRIPTORS: KillPoint = point(
    "before a descriptor",
    PACKED,
    "let written = u16::from(chain.written != 0) * VRING_DESC_F_WRITE;",
);
/// The number of kills there of which one must show that.
const MANY_KILLS: u64 = 10;

fn points(setup: Setup) -> Vec<KillPoint> {
    let mut points = COMMON.to_vec();
    match setup.uplink {
        Uplink::Tap => points.extend(ON_TAP),
        Uplink::Switch => points.extend(ON_SWITCH),
    }
    match setup.is_packed {
        true => points.extend(OF_PACKED),
        false => points.extend(OF_SPLIT),
    }
    points
}

#[test]
fn daemon_killed_at_any_line_of_a_publish_loses_no_more_than_a_burst() {
    let seed = seed("KILL_SEED").unwrap();
    let kills = number("KILLS", 0).unwrap();
    eprintln!("KILL_SEED={seed}");
    let mut random = Random::new(seed, 0);
    for setup in Setup::all(PAIRS) {
        if kills > 0 {
            check(setup, &points(setup), kills, &mut random).unwrap();
        } else if setup.uplink == Uplink::Tap && setup.is_packed {
            check(setup, &OF_PACKED, 1, &mut random).unwrap();
        }
    }
}

fn check(setup: Setup, points: &[KillPoint], kills: u64, random: &mut Random) -> Result<()> {
    let mut testbed = TrafficTestbed::start(setup)?;
    let mut traffic = testbed.connect()?;
    traffic.window = WINDOW;
    for point in points {
        let mut interrupted = 0;
        for _ in 0..kills {
            let hits = random.range(1, MAX_HITS);
            let killed = kill_once(&mut testbed, &mut traffic, (setup, *point), hits);
            let (is_interrupted, summary) = killed.with_context(|| {
                let log = testbed.daemon.stderr();
                format!("{setup:?}, {}, {hits} hits\n{log}", point.name)
            })?;
            interrupted += u64::from(is_interrupted);
            eprintln!("{setup:?}, {}, {hits} hits: {summary}", point.name);
        }
        let must_be_between = point.name == BETWEEN_DESCRIPTORS.name && kills >= MANY_KILLS;
        ensure!(
            interrupted > 0 || !must_be_between,
            "no publish was interrupted"
        );
    }
    Ok(())
}

/// Kills the daemon and starts the next one. Returns whether a publish was interrupted, and what
/// became of the frames.
fn kill_once(
    testbed: &mut TrafficTestbed,
    traffic: &mut Traffic,
    (setup, point): (Setup, KillPoint),
    hits: u64,
) -> Result<(bool, String)> {
    let is_switch = setup.uplink == Uplink::Switch;
    let is_interrupted = kill_daemon(testbed, traffic, point, hits)?;
    let before = counts(traffic);
    let lost_before: Vec<u64> = traffic.flows.iter().map(|flow| flow.check.lost()).collect();
    let sent: Vec<u64> = traffic.flows.iter().map(|flow| flow.sent).collect();
    testbed.restart()?;
    testbed.reconnect(traffic)?;
    wait_for_arrivals(traffic)?;
    let until = Instant::now() + AFTERWARDS;
    while Instant::now() < until {
        exchange(traffic)?;
    }
    traffic.wait_for_late_frames(AFTERWARDS)?;
    let mut summary = format!("publish interrupted: {is_interrupted}");
    for (n, flow) in traffic.flows.iter().enumerate() {
        let lost = match flow.source {
            // None of all that it has ever sent.
            End::Driver { .. } if !is_switch => flow.unreceived(),
            _ => flow.check.lost_below(sent[n]) - lost_before[n],
        };
        let [reordered, repeated] = counts(traffic)[n];
        let (reordered, repeated) = (reordered - before[n][0], repeated - before[n][1]);
        let limits = match flow.source {
            // The receiver sees a burst after the sender has its buffers back.
            End::Driver { .. } if is_switch => [BURST_LIMIT, BURST_LIMIT],
            End::Driver { .. } => [0, BURST_LIMIT],
            End::Host { .. } => [BURST_LIMIT, 0],
        };
        ensure!(
            lost <= limits[0] && repeated <= limits[1] && reordered == 0,
            "{lost} lost, {reordered} reordered, {repeated} repeated\n{}",
            traffic.describe()
        );
        let source = flow.source;
        summary += &format!("; from {source:?} {lost} lost, {repeated} repeated");
    }
    Ok((is_interrupted, summary))
}

/// Carries frames until the daemon is killed. Returns whether a publish was interrupted.
fn kill_daemon(
    testbed: &mut TrafficTestbed,
    traffic: &mut Traffic,
    point: KillPoint,
    hits: u64,
) -> Result<bool> {
    let pid = testbed.daemon.pid();
    let killer = Killer::attach(testbed.dir(), pid, point.line, hits)?;
    let until = Instant::now() + KILL_TIMEOUT;
    while testbed.daemon.proc().try_wait()?.is_none() {
        ensure!(
            Instant::now() < until,
            "the daemon did not come to {:?} within {KILL_TIMEOUT:?}: {}",
            point.line,
            killer.output()
        );
        exchange(traffic)?;
    }
    killer.finish()?;
    // What it has published.
    traffic.exchange(0)?;
    traffic.give_up_frames_of_host();
    let rings = traffic.frontend(0).pairs.iter();
    let mut rings = rings.flat_map(|pair| [&pair.rx.queue.ring, &pair.tx.queue.ring]);
    Ok(rings.any(is_publish_interrupted))
}

/// Whether descriptors behind the first one that the driver waits for are used already.
fn is_publish_interrupted(ring: &DriverVirtqueue) -> bool {
    match ring {
        DriverVirtqueue::Split(_) => false,
        DriverVirtqueue::Packed(ring) => is_packed_publish_interrupted(ring),
    }
}

fn is_packed_publish_interrupted(ring: &PackedDriverVirtqueue) -> bool {
    let first = ring.used_up_to();
    // AVAIL and USED.
    let mask = RingPosition {
        index: 0,
        wrap: true,
    }
    .used();
    let used = (1..u16::try_from(BURST_LIMIT).unwrap_or(0)).filter(|n| {
        let at = first.after(*n, ring.size());
        ring.descriptor(at.index).flags & mask == at.used()
    });
    used.count() > 0
}

/// Lets the host and the first device send. The second device only receives, because frames of the
/// first one have no receiver while it is not connected.
fn exchange(traffic: &mut Traffic) -> Result<()> {
    let second = |flow: &Flow| matches!(flow.source, End::Driver { device: 1, .. });
    traffic.send_where(BURST, |flow| !second(flow))?;
    traffic.exchange(0)
}

/// Exchanges frames until one of each flow has arrived. The host's are lost until its kernel has
/// noticed that the TAP has a reader again.
fn wait_for_arrivals(traffic: &mut Traffic) -> Result<()> {
    let until = Instant::now() + ARRIVAL_TIMEOUT;
    let received = |traffic: &Traffic| -> Vec<u64> {
        let host = traffic.flows.iter();
        let host = host.filter(|flow| matches!(flow.source, End::Host { .. }));
        host.map(|flow| flow.check.received).collect()
    };
    let before = received(traffic);
    loop {
        let now = received(traffic);
        if now.iter().zip(&before).all(|(now, before)| now > before) {
            return Ok(());
        }
        ensure!(Instant::now() < until, "{}", traffic.describe());
        traffic.give_up_frames_of_host();
        exchange(traffic)?;
        std::thread::sleep(Duration::from_millis(1));
        traffic.exchange(0)?;
    }
}

/// For each flow the frames that came out of order and those that came again.
fn counts(traffic: &Traffic) -> Vec<[u64; 2]> {
    let checks = traffic.flows.iter().map(|flow| &flow.check);
    checks
        .map(|check| [check.reordered, check.repeated])
        .collect()
}
