//! Measures how long a single frame takes to another network device and back, while no other frame
//! is on its way.
//!
//! The driver (of the guest crate) runs on the first CPU, and the back-end on the last one. The
//! frame goes from the first device through the back-end to the second device, whose driver, the
//! same thread, sends it back.
//!
//! | mode | driver waits by | back-end waits by | peer |
//! |---|---|---|---|
//! | sleeping | sleeping until it is called | sleeping until it is kicked | as many wake-ups by bare eventfds and epoll |
//! | busy-polling | looking at the ring | looking at the ring (`--poll always`) | DPDK's vhost PMD |
//! | adaptive | looking at the ring | looking at the ring for some time, then sleeping | DPDK's vhost PMD |

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use virtionet_tests::hugepages::HugePages;
use virtionet_tests::sched;

use crate::harness::{progress, run_in_thread};
use crate::outcome::{Better, GroupResult};
use crate::peers::back_end::{BackEndKind, WorkerPollMode};
use crate::peers::load::Cpus;
use crate::peers::under_test::required_huge_pages;
use crate::sampling::{Effort, PairedSamples, median};
use bare::BareWakeUps;
use distribution::Distribution;
use round_trip::{DriverWait, RoundTrips};

pub mod bare;
pub mod distribution;
pub mod round_trip;

/// The sleeping back-end may take 1.1 times as long as the bare wake-ups.
const SLEEPING_BOUND: f64 = 0.91;
/// The busy-polling one must be as fast as DPDK's.
const POLLING_BOUND: f64 = 1.0;
/// The time between the frames of [`measure_idle_share`].
const PING_INTERVAL: Duration = Duration::from_millis(1);

/// How both ends wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Sleeping,
    BusyPolling,
    Adaptive,
}

impl Mode {
    const ALL: [Self; 3] = [Self::Sleeping, Self::BusyPolling, Self::Adaptive];

    fn name(self) -> &'static str {
        match self {
            Self::Sleeping => "sleeping",
            Self::BusyPolling => "busy-polling",
            Self::Adaptive => "adaptive",
        }
    }

    fn worker(self) -> WorkerPollMode {
        match self {
            Self::Sleeping => WorkerPollMode::Off,
            Self::BusyPolling => WorkerPollMode::Always,
            Self::Adaptive => WorkerPollMode::Adaptive,
        }
    }

    fn driver(self) -> DriverWait {
        match self {
            Self::Sleeping => DriverWait::Sleep,
            Self::BusyPolling | Self::Adaptive => DriverWait::Poll,
        }
    }

    fn bound(self) -> Option<f64> {
        match self {
            Self::Sleeping => Some(SLEEPING_BOUND),
            Self::BusyPolling => Some(POLLING_BOUND),
            Self::Adaptive => None,
        }
    }
}

/// Measures each mode with both lengths and both formats.
///
/// # Errors
/// When this process may use only one CPU, DPDK is missing, or a part of the testbed fails.
pub fn run(effort: Effort) -> Result<GroupResult> {
    let cpus = Cpus::get()?;
    let _huge_pages = HugePages::reserve(required_huge_pages())?;
    let mut outcome = GroupResult::default();
    for mode in Mode::ALL {
        for is_packed in [false, true] {
            for frame_len in [64, 1400] {
                // The affinity of the thread changes.
                run_in_thread(|| measure(mode, frame_len, is_packed, cpus, effort, &mut outcome))
                    .with_context(|| case_name(mode, frame_len, is_packed))?;
            }
        }
    }
    run_in_thread(|| measure_ping_cost(cpus, effort, &mut outcome))?;
    outcome.notes.push(
        "figures are medians of round trips; a driver that polls uses the first CPU all the time"
            .to_owned(),
    );
    Ok(outcome)
}

fn case_name(mode: Mode, frame_len: usize, is_packed: bool) -> String {
    let format = if is_packed { "packed" } else { "split" };
    format!("{}, {frame_len} B, {format}", mode.name())
}

/// The other side of a comparison.
enum Peer {
    Bare(BareWakeUps),
    Dpdk(Box<RoundTrips>),
}

impl Peer {
    fn measure(&mut self, interval: Duration) -> Result<Distribution> {
        match self {
            Self::Bare(wake_ups) => wake_ups.measure(interval),
            Self::Dpdk(round_trips) => round_trips.measure(interval),
        }
    }
}

fn measure(
    mode: Mode,
    frame_len: usize,
    is_packed: bool,
    cpus: Cpus,
    effort: Effort,
    outcome: &mut GroupResult,
) -> Result<()> {
    let name = case_name(mode, frame_len, is_packed);
    progress(&format!("latency: {name}"));
    let start = |kind| {
        RoundTrips::start(
            kind,
            mode.worker(),
            mode.driver(),
            frame_len,
            is_packed,
            cpus,
        )
        .with_context(|| format!("with {}", kind.name()))
    };
    let mut ours = start(BackEndKind::Ours)?;
    let (mut peer, peer_name) = match mode {
        Mode::Sleeping => (
            Peer::Bare(BareWakeUps::start(cpus.back_end)?),
            "bare wake-ups",
        ),
        Mode::BusyPolling | Mode::Adaptive => {
            let kind = BackEndKind::Dpdk;
            (Peer::Dpdk(Box::new(start(kind)?)), kind.name())
        }
    };
    sched::pin(0, cpus.front_end)?;
    let interval = effort.choose(Duration::from_millis(500), Duration::from_millis(100));
    let mut samples = PairedSamples::default();
    let mut tails: [[Vec<f64>; 2]; 2] = Default::default();
    for n in 0..=effort.choose(9, 1) {
        let sides = [ours.measure(interval)?, peer.measure(interval)?];
        // The first pair warms up the caches and is not counted.
        if n == 0 {
            continue;
        }
        samples.push(sides[0].microseconds(500), sides[1].microseconds(500));
        for (tail, side) in tails.iter_mut().zip(&sides) {
            tail[0].push(side.microseconds(990));
            tail[1].push(side.microseconds(999));
        }
    }
    let [ours, peer] = tails.map(|tail| tail.map(|samples| median(&samples)));
    outcome.notes.push(format!(
        "{name}: 99 % of the round trips take up to {:.1} µs ({peer_name}: {:.1}), 99.9 % up to {:.1} µs ({:.1})",
        ours[0], peer[0], ours[1], peer[1]
    ));
    let mut row = samples.row(&name, "µs", Better::Lower, peer_name);
    row.bound = mode.bound();
    outcome.rows.push(row.with_headline(!is_packed));
    Ok(())
}

/// Measures what one round trip a millisecond costs an adaptive worker.
fn measure_ping_cost(cpus: Cpus, effort: Effort, outcome: &mut GroupResult) -> Result<()> {
    let kind = BackEndKind::Ours;
    let mode = Mode::Adaptive;
    let mut ours = RoundTrips::start(kind, mode.worker(), mode.driver(), 64, false, cpus)?;
    sched::pin(0, cpus.front_end)?;
    let interval = effort.choose(Duration::from_secs(2), Duration::from_millis(300));
    let before = ours.cpu_time()?;
    let started_at = Instant::now();
    let round_trips = ours.measure_paced(interval, PING_INTERVAL)?;
    let share = (ours.cpu_time()? - before).as_secs_f64() / started_at.elapsed().as_secs_f64();
    outcome.notes.push(format!(
        "adaptive, 64 B, split, one round trip each {PING_INTERVAL:?}: {:.1} µs (median), and the daemon uses {:.1} % of a CPU",
        round_trips.microseconds(500),
        100.0 * share
    ));
    Ok(())
}
