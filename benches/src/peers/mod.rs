//! Measures frames between two network devices through virtionetd's switch, DPDK's vhost PMD and a
//! plain device on the crates vhost-user-backend and virtio-queue. All of them run on the same CPU,
//! with the same front-end (DPDK's virtio-user) on another CPU.
//!
//! The front-end is an efficient driver without a guest, so that it limits the back-end as little
//! as possible. Where the front-end is the limit, the rates are about equal, and the busy cycles
//! per frame show the difference between the back-ends. Both count them in the same way: with the
//! time-stamp counter, around bursts that found frames.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use virtionet_tests::hugepages::HugePages;

use crate::harness::progress;
use crate::outcome::{Better, FrontEndBusy, GroupResult, Row};
use crate::sampling::{Effort, PairedSamples, median};
use back_end::{BackEndKind, WorkerPollMode};
use load::{ForwardingLoad, TrafficPattern};
use under_test::{BackEndUnderTest, ForwardingSample, FrameBalance, required_huge_pages};

pub mod back_end;
pub mod load;
pub mod under_test;

/// Divisor for rates, which are shown in millions of frames per second.
const MILLION: f64 = 1e6;
/// CPU time that an idle back-end may use, in per cent of a CPU.
const MAX_IDLE_PERCENT: f64 = 0.1;
/// The lowest CPU time that is shown, in per cent of a CPU. Less than that cannot be measured.
const MIN_IDLE_PERCENT: f64 = 0.01;
/// Number of bursts of 32 frames that circulate on each queue. They do not fill the virtqueue of
/// 256 entries: a back-end that copies from guest to guest marks the sender's descriptors as used
/// after the receiver has the frames. A faster front-end would find its virtqueue full and drop a
/// burst.
const BURSTS: u32 = 6;
/// The largest number of queue pairs on one CPU.
const MAX_QUEUE_PAIRS: u16 = 64;

/// A load, the peer, and the bounds.
#[derive(Debug, Clone, Copy)]
struct Case {
    load: ForwardingLoad,
    ours: BackEndKind,
    peer: BackEndKind,
    /// Lowest acceptable ratio of the rates.
    rate_bound: Option<f64>,
    /// Lowest acceptable ratio of the busy cycles (those of the peer divided by ours).
    cycles_bound: Option<f64>,
}

/// Measures all cases.
///
/// # Errors
/// When this process is not root, DPDK is missing, or a part of the testbed fails. The error
/// contains its message.
pub fn run(effort: Effort) -> Result<GroupResult> {
    let mut outcome = GroupResult::default();
    let _huge_pages = HugePages::reserve(required_huge_pages())?;
    let mut rates: Vec<(u16, f64)> = Vec::new();
    for case in cases() {
        let rate = measure(case, effort, &mut outcome)
            .with_context(|| format!("the case '{}'", case.name()))?;
        if case.is_scaling_case() {
            rates.push((case.load.queue_pairs, rate));
        }
    }
    outcome.rows.extend(scaling_row(&rates));
    measure_idle(effort, &mut outcome)?;
    outcome.notes.push(
        "rates are those of both directions together, at the front-end; busy cycles are those of bursts in which the back-end found frames"
            .to_owned(),
    );
    Ok(outcome)
}

/// Measures frames that circulate, against another build of virtionetd, and adds the rows.
///
/// # Errors
/// As [`run`]; also when the other build does not understand the arguments.
pub fn run_against_build(
    program: &'static Path,
    effort: Effort,
    outcome: &mut GroupResult,
) -> Result<()> {
    let _huge_pages = HugePages::reserve(required_huge_pages())?;
    for is_packed in [false, true] {
        for (frame_len, queue_pairs) in [(64, 1), (64, 4), (1518, 1)] {
            let case = Case {
                load: forward(frame_len, queue_pairs, is_packed),
                ours: BackEndKind::OursPerPair,
                peer: BackEndKind::OtherBuild(program),
                rate_bound: None,
                cycles_bound: None,
            };
            measure(case, effort, outcome)
                .with_context(|| format!("the case '{}'", case.name()))?;
        }
    }
    Ok(())
}

fn forward(frame_len: u16, queue_pairs: u16, is_packed: bool) -> ForwardingLoad {
    ForwardingLoad {
        traffic: TrafficPattern::Forward,
        frame_len,
        queue_pairs,
        is_packed,
        bursts: BURSTS,
    }
}

fn cases() -> Vec<Case> {
    let dpdk = |load, rate_bound, cycles_bound| Case {
        load,
        ours: BackEndKind::Ours,
        peer: BackEndKind::Dpdk,
        rate_bound,
        cycles_bound,
    };
    let mut cases = Vec::new();
    for is_packed in [false, true] {
        for queue_pairs in [1, 4] {
            cases.push(dpdk(
                forward(64, queue_pairs, is_packed),
                Some(1.0),
                Some(1.5),
            ));
        }
        for frame_len in [256, 1518] {
            cases.push(dpdk(
                forward(frame_len, 1, is_packed),
                Some(1.2),
                Some(1.67),
            ));
        }
        for frame_len in [64, 1518] {
            let load = ForwardingLoad {
                traffic: TrafficPattern::OneWay,
                ..forward(frame_len, 1, is_packed)
            };
            cases.push(dpdk(load, Some(1.0), None));
        }
    }
    for queue_pairs in [2, 8, 16, MAX_QUEUE_PAIRS] {
        cases.push(dpdk(forward(64, queue_pairs, false), None, None));
    }
    for (frame_len, queue_pairs) in [(64, 1), (64, 4), (1518, 1)] {
        cases.push(Case {
            load: forward(frame_len, queue_pairs, false),
            ours: BackEndKind::Ours,
            peer: BackEndKind::Plain,
            rate_bound: None,
            cycles_bound: None,
        });
    }
    cases
}

impl Case {
    fn name(&self) -> String {
        let ForwardingLoad {
            frame_len,
            queue_pairs,
            ..
        } = self.load;
        let traffic = match self.load.traffic {
            TrafficPattern::Forward => "forward",
            TrafficPattern::OneWay => "one way",
        };
        let format = if self.load.is_packed {
            "packed"
        } else {
            "split"
        };
        let plural = if queue_pairs == 1 { "" } else { "s" };
        format!("{traffic} {frame_len} B, {format}, {queue_pairs} queue pair{plural}")
    }

    /// Whether the chart shows this case: one queue pair on split virtqueues.
    fn is_headline(&self) -> bool {
        self.load.queue_pairs == 1 && !self.load.is_packed
    }

    /// Whether this case is one of those that differ only in the number of queue pairs.
    fn is_scaling_case(&self) -> bool {
        let ForwardingLoad {
            traffic,
            frame_len,
            is_packed,
            ..
        } = self.load;
        (traffic, frame_len, is_packed, self.peer)
            == (TrafficPattern::Forward, 64, false, BackEndKind::Dpdk)
    }
}

/// Measures both sides of a case in turns and adds its rows. Returns our rate in millions of frames
/// per second.
fn measure(case: Case, effort: Effort, outcome: &mut GroupResult) -> Result<f64> {
    let name = case.name();
    progress(&format!("peers: {name}"));
    let start = |kind: BackEndKind| {
        BackEndUnderTest::start(kind, case.load, WorkerPollMode::Always)
            .with_context(|| kind.name().to_owned())
    };
    let mut ours = start(case.ours)?;
    let mut peer = start(case.peer)?;
    let interval = Duration::from_millis(effort.choose(1000, 300));
    let (mut rates, mut cycles) = (PairedSamples::default(), PairedSamples::default());
    let (mut front_end_cycles, mut busy) = (Vec::new(), [Vec::new(), Vec::new()]);
    for _ in 0..effort.choose(5, 1) {
        let (a, b) = (ours.measure(interval)?, peer.measure(interval)?);
        log_progress(&name, a, b, case.peer);
        rates.push(a.rate / MILLION, b.rate / MILLION);
        if let (Some(a), Some(b)) = (a.cycles, b.cycles) {
            cycles.push(a, b);
        }
        front_end_cycles.push(a.front_end_cycles);
        busy[0].extend(a.front_end_busy);
        busy[1].extend(b.front_end_busy);
    }
    let mut row = rates.row(&name, "M frames/s", Better::Higher, case.peer.name());
    row.front_end_busy = median_front_end_busy(&busy);
    let rate = row.ours;
    let row = add_bound(row, case.rate_bound);
    outcome.rows.push(row.with_headline(case.is_headline()));
    if case.load.traffic == TrafficPattern::Forward {
        if case.peer.has_busy_cycles() {
            let row = cycles.row(&name, "busy cycles", Better::Lower, case.peer.name());
            outcome.rows.push(add_bound(row, case.cycles_bound));
        }
        let (a, b) = (ours.frame_balance()?, peer.frame_balance()?);
        outcome.notes.push(format!(
            "{name}: the front-end itself needs {:.0} cycles per frame; {}; {}",
            median(&front_end_cycles),
            describe_frames(case.ours, &a),
            describe_frames(case.peer, &b)
        ));
    }
    Ok(rate)
}

/// Returns the medians of both sides, or `None` if the front-end does not report the clock of its
/// CPU.
fn median_front_end_busy(percent: &[Vec<f64>; 2]) -> Option<FrontEndBusy> {
    let is_known = percent.iter().all(|side| !side.is_empty());
    is_known.then(|| FrontEndBusy {
        ours: median(&percent[0]),
        peer: median(&percent[1]),
    })
}

fn add_bound(row: Row, bound: Option<f64>) -> Row {
    match bound {
        Some(bound) => row.with_bound(bound),
        None => row,
    }
}

fn log_progress(name: &str, ours: ForwardingSample, peer: ForwardingSample, kind: BackEndKind) {
    let side = |sample: ForwardingSample| {
        let cycles = sample.cycles.map(|n| format!(" at {n:.0} cycles"));
        format!(
            "{:.2} M frames/s{}",
            sample.rate / MILLION,
            cycles.unwrap_or_default()
        )
    };
    progress(&format!(
        "peers: {name}: {} against {} ({})",
        side(ours),
        side(peer),
        kind.name()
    ));
}

fn describe_frames(kind: BackEndKind, frames: &FrameBalance) -> String {
    let FrameBalance {
        sent,
        remaining,
        drops,
    } = frames;
    let mut text = format!(
        "{}: {remaining} of {sent} frames still circulate",
        kind.name()
    );
    for (counter, count) in drops {
        text.push_str(&format!(", {counter} {count}"));
    }
    text
}

/// Compares the rate of the largest number of queue pairs with that of one queue pair.
fn scaling_row(rates: &[(u16, f64)]) -> Option<Row> {
    let rate_of = |queue_pairs: u16| {
        let found = rates.iter().find(|(n, _)| *n == queue_pairs);
        found.map(|(_, rate)| *rate)
    };
    let peer = ("virtionetd, 1 queue pair", rate_of(1)?);
    let row = Row::new(
        &format!("forward 64 B, split, {MAX_QUEUE_PAIRS} queue pairs against 1"),
        "M frames/s",
        Better::Higher,
        rate_of(MAX_QUEUE_PAIRS)?,
        peer,
    );
    Some(row.with_bound(0.9).with_headline(true))
}

/// Measures the CPU time of an idle back-end from 100 ms after the last frame on.
fn measure_idle(effort: Effort, outcome: &mut GroupResult) -> Result<()> {
    let load = ForwardingLoad {
        traffic: TrafficPattern::Forward,
        frame_len: 64,
        queue_pairs: 1,
        is_packed: false,
        bursts: BURSTS,
    };
    let interval = Duration::from_millis(effort.choose(2000, 500));
    let percent = |kind| -> Result<f64> {
        let side = BackEndUnderTest::start(kind, load, WorkerPollMode::Adaptive)?;
        Ok(side.idle_cpu_time(interval)?.as_secs_f64() / interval.as_secs_f64() * 100.0)
    };
    let (ours, peer) = (percent(BackEndKind::Ours)?, percent(BackEndKind::Dpdk)?);
    let case = "idle, 100 ms after the last frame";
    let aim = ("aim", MAX_IDLE_PERCENT);
    let row = Row::new(
        case,
        "% of a CPU",
        Better::Lower,
        ours.max(MIN_IDLE_PERCENT),
        aim,
    );
    outcome.rows.push(row.with_bound(1.0));
    outcome.notes.push(format!(
        "{case}: {ours:.3} % of a CPU (shown as {MIN_IDLE_PERCENT} at least); {} uses {peer:.0} %",
        BackEndKind::Dpdk.name()
    ));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_cases_and_peers_are_unique() {
        let mut names: Vec<String> = cases()
            .iter()
            .map(|case| format!("{} {}", case.name(), case.peer.name()))
            .collect();
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all, "{names:?}");
    }

    #[test]
    fn front_end_load_is_the_median_of_each_side_or_absent() {
        let busy = median_front_end_busy(&[vec![90.0, 100.0, 95.0], vec![40.0]]).unwrap();
        assert_eq!((busy.ours, busy.peer), (95.0, 40.0));
        assert_eq!(median_front_end_busy(&[vec![90.0], vec![]]), None);
    }

    #[test]
    fn lower_rate_with_many_queue_pairs_is_a_missed_bound() {
        let row = scaling_row(&[(1, 10.0), (8, 9.0), (MAX_QUEUE_PAIRS, 8.9)]).unwrap();
        assert!(!row.is_within_bound() && (row.ratio() - 0.89).abs() < 1e-9);
        assert!(
            scaling_row(&[(1, 10.0), (MAX_QUEUE_PAIRS, 9.1)])
                .unwrap()
                .is_within_bound()
        );
        assert!(scaling_row(&[(1, 10.0)]).is_none());
    }
}
