//! Frames between two cards, through virtionetd's switch, DPDK's vhost PMD and a plain device on
//! the stock crates: each on the same CPU, with the same front-end (DPDK's virtio-user) on another.
//!
//! A front-end of a good driver and no guest around it shows what the back-end can do. Where the
//! front-end itself is the limit, the rates are alike, and busy cycles a frame tell the back-ends
//! apart: the time-stamp counter around bursts that found frames, counted by both alike.

use std::time::Duration;

use anyhow::{Context, Result};
use virtionet_tests::hugepages::HugePages;

use crate::harness::progress;
use crate::outcome::{Better, FrontEndBusy, GroupResult, Row};
use crate::sampling::{Effort, PairedSamples, median};
use back_end::{BackEndKind, WorkerPollMode};
use load::{ForwardingLoad, TrafficPattern};
use under_test::{BackEndUnderTest, ForwardingSample, FrameBalance, pages};

pub mod back_end;
pub mod load;
pub mod under_test;

/// Frames that are shown as one.
const MILLION: f64 = 1e6;
/// Per cent of a CPU: an idle back-end may take as much, and less than the second is not told from
/// none.
const IDLE: f64 = 0.1;
const NONE: f64 = 0.01;
/// Bursts of 32 frames in circulation on each queue. Not a whole ring of 256: a back-end that copies
/// from guest to guest gives the sender's descriptors back after the receiver has its frames, and a
/// front-end that is quicker than that would find its ring full and drop a burst.
const BURSTS: u32 = 6;
/// Queue pairs of the case that stands for "many on one CPU".
const MANY_PAIRS: u16 = 64;

/// A load, whom it is compared with, and what is asked of it.
#[derive(Debug, Clone, Copy)]
struct Case {
    load: ForwardingLoad,
    peer: BackEndKind,
    /// Least ratio of the rates.
    rate: Option<f64>,
    /// Least ratio of the busy cycles (the peer's by ours).
    cycles: Option<f64>,
}

/// Measures all cases.
///
/// # Errors
/// When this process is not root, DPDK is missing, or a part fails: with its words.
pub fn run(effort: Effort) -> Result<GroupResult> {
    let mut outcome = GroupResult::default();
    let _pages = HugePages::reserve(pages())?;
    let mut scale: Vec<(u16, f64)> = Vec::new();
    for case in cases() {
        let rate = compare(case, effort, &mut outcome)
            .with_context(|| format!("the case '{}'", case.words()))?;
        if case.scales() {
            scale.push((case.load.pairs, rate));
        }
    }
    outcome.rows.extend(scaling(&scale));
    idle(effort, &mut outcome)?;
    outcome.notes.push(
        "rates are of both directions together, at the front-end; busy cycles are those of the back-end's bursts that found frames"
            .to_owned(),
    );
    Ok(outcome)
}

fn cases() -> Vec<Case> {
    let forward = |size, pairs, packed| ForwardingLoad {
        traffic: TrafficPattern::Forward,
        size,
        pairs,
        packed,
        bursts: BURSTS,
    };
    let dpdk = |load, rate, cycles| Case {
        load,
        peer: BackEndKind::Dpdk,
        rate,
        cycles,
    };
    let mut cases = Vec::new();
    for packed in [false, true] {
        for pairs in [1, 4] {
            cases.push(dpdk(forward(64, pairs, packed), Some(1.0), Some(1.5)));
        }
        for size in [256, 1518] {
            cases.push(dpdk(forward(size, 1, packed), Some(1.2), Some(1.67)));
        }
        for size in [64, 1518] {
            let load = ForwardingLoad {
                traffic: TrafficPattern::OneWay,
                ..forward(size, 1, packed)
            };
            cases.push(dpdk(load, Some(1.0), None));
        }
    }
    for pairs in [2, 8, 16, MANY_PAIRS] {
        cases.push(dpdk(forward(64, pairs, false), None, None));
    }
    for (size, pairs) in [(64, 1), (64, 4), (1518, 1)] {
        cases.push(Case {
            load: forward(size, pairs, false),
            peer: BackEndKind::Plain,
            rate: None,
            cycles: None,
        });
    }
    cases
}

impl Case {
    fn words(&self) -> String {
        let ForwardingLoad { size, pairs, .. } = self.load;
        let what = match self.load.traffic {
            TrafficPattern::Forward => "forward",
            TrafficPattern::OneWay => "one way",
        };
        let ring = if self.load.packed { "packed" } else { "split" };
        let plural = if pairs == 1 { "" } else { "s" };
        format!("{what} {size} B, {ring}, {pairs} pair{plural}")
    }

    /// Whether the chart shows it: one of each kind of traffic with one pair on split virtqueues.
    fn is_headline(&self) -> bool {
        self.load.pairs == 1 && !self.load.packed
    }

    /// Whether it is one of those that differ in the number of pairs only.
    fn scales(&self) -> bool {
        let ForwardingLoad {
            traffic,
            size,
            packed,
            ..
        } = self.load;
        (traffic, size, packed, self.peer)
            == (TrafficPattern::Forward, 64, false, BackEndKind::Dpdk)
    }
}

/// Measures a case in turns, adds its rows, and gives our rate.
fn compare(case: Case, effort: Effort, outcome: &mut GroupResult) -> Result<f64> {
    let words = case.words();
    progress(&format!("peers: {words}"));
    let start = |kind: BackEndKind| {
        BackEndUnderTest::start(kind, case.load, WorkerPollMode::Always)
            .with_context(|| kind.name().to_owned())
    };
    let mut ours = start(BackEndKind::Ours)?;
    let mut peer = start(case.peer)?;
    let interval = Duration::from_millis(effort.choose(1000, 300));
    let (mut rates, mut cycles) = (PairedSamples::default(), PairedSamples::default());
    let (mut front, mut busy) = (Vec::new(), [Vec::new(), Vec::new()]);
    for _ in 0..effort.choose(5, 1) {
        let (a, b) = (ours.measure(interval)?, peer.measure(interval)?);
        log_progress(&words, a, b, case.peer);
        rates.push(a.rate / MILLION, b.rate / MILLION);
        if let (Some(a), Some(b)) = (a.cycles, b.cycles) {
            cycles.push(a, b);
        }
        front.push(a.front_cycles);
        busy[0].extend(a.front_busy);
        busy[1].extend(b.front_busy);
    }
    let mut row = rates.row(&words, "M frames/s", Better::Higher, case.peer.name());
    row.front_end_busy = front_end_busy(&busy);
    let rate = row.ours;
    let row = with_bound(row, case.rate);
    outcome.rows.push(row.headline(case.is_headline()));
    if case.load.traffic == TrafficPattern::Forward {
        if case.peer == BackEndKind::Dpdk {
            let row = cycles.row(&words, "busy cycles", Better::Lower, case.peer.name());
            outcome.rows.push(with_bound(row, case.cycles));
        }
        let (a, b) = (ours.frame_balance()?, peer.frame_balance()?);
        outcome.notes.push(format!(
            "{words}: the front-end itself takes {:.0} cycles a frame; {}; {}",
            median(&front),
            describe_frames(BackEndKind::Ours, &a),
            describe_frames(case.peer, &b)
        ));
    }
    Ok(rate)
}

/// The medians of both sides; none where the front-end does not report its CPU's clock.
fn front_end_busy(percent: &[Vec<f64>; 2]) -> Option<FrontEndBusy> {
    let is_known = percent.iter().all(|side| !side.is_empty());
    is_known.then(|| FrontEndBusy {
        ours: median(&percent[0]),
        peer: median(&percent[1]),
    })
}

fn with_bound(row: Row, bound: Option<f64>) -> Row {
    match bound {
        Some(bound) => row.bound(bound),
        None => row,
    }
}

fn log_progress(words: &str, ours: ForwardingSample, peer: ForwardingSample, kind: BackEndKind) {
    let side = |sample: ForwardingSample| {
        let cycles = sample.cycles.map(|n| format!(" at {n:.0} cycles"));
        format!(
            "{:.2} M/s{}",
            sample.rate / MILLION,
            cycles.unwrap_or_default()
        )
    };
    progress(&format!(
        "peers: {words}: {} against {} ({})",
        side(ours),
        side(peer),
        kind.name()
    ));
}

fn describe_frames(kind: BackEndKind, frames: &FrameBalance) -> String {
    let FrameBalance { sent, left, lost } = frames;
    let mut words = format!("{}: {left} of {sent} frames still circulate", kind.name());
    for (counter, count) in lost {
        words.push_str(&format!(", {counter} {count}"));
    }
    words
}

/// What is left of the rate of one pair when there are many.
fn scaling(rates: &[(u16, f64)]) -> Option<Row> {
    let of = |pairs: u16| {
        let found = rates.iter().find(|(n, _)| *n == pairs);
        found.map(|(_, rate)| *rate)
    };
    let peer = ("virtionetd, 1 pair", of(1)?);
    let row = Row::new(
        &format!("forward 64 B, split, {MANY_PAIRS} pairs against 1"),
        "M frames/s",
        Better::Higher,
        of(MANY_PAIRS)?,
        peer,
    );
    Some(row.bound(0.9).headline(true))
}

/// What an idle back-end takes of its CPU, from 100 ms after the last frame.
fn idle(effort: Effort, outcome: &mut GroupResult) -> Result<()> {
    let load = ForwardingLoad {
        traffic: TrafficPattern::Forward,
        size: 64,
        pairs: 1,
        packed: false,
        bursts: BURSTS,
    };
    let interval = Duration::from_millis(effort.choose(2000, 500));
    let percent = |kind| -> Result<f64> {
        let side = BackEndUnderTest::start(kind, load, WorkerPollMode::Adaptive)?;
        Ok(side.idle(interval)?.as_secs_f64() / interval.as_secs_f64() * 100.0)
    };
    let (ours, peer) = (percent(BackEndKind::Ours)?, percent(BackEndKind::Dpdk)?);
    let case = "idle, 100 ms after the last frame";
    let aim = ("aim", IDLE);
    let row = Row::new(case, "% of a CPU", Better::Lower, ours.max(NONE), aim);
    outcome.rows.push(row.bound(1.0));
    outcome.notes.push(format!(
        "{case}: {ours:.3} % of a CPU (shown as {NONE} at least); {} takes {peer:.0} %",
        BackEndKind::Dpdk.name()
    ));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_has_a_name_of_its_own_against_each_peer() {
        let mut names: Vec<String> = cases()
            .iter()
            .map(|case| format!("{} {}", case.words(), case.peer.name()))
            .collect();
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all, "{names:?}");
    }

    #[test]
    fn front_end_load_is_the_median_of_each_side_or_absent() {
        let busy = front_end_busy(&[vec![90.0, 100.0, 95.0], vec![40.0]]).unwrap();
        assert_eq!((busy.ours, busy.peer), (95.0, 40.0));
        assert_eq!(front_end_busy(&[vec![90.0], vec![]]), None);
    }

    #[test]
    fn a_fall_with_many_pairs_is_a_missed_bound() {
        let row = scaling(&[(1, 10.0), (8, 9.0), (MANY_PAIRS, 8.9)]).unwrap();
        assert!(!row.holds() && (row.ratio() - 0.89).abs() < 1e-9);
        assert!(scaling(&[(1, 10.0), (MANY_PAIRS, 9.1)]).unwrap().holds());
        assert!(scaling(&[(1, 10.0)]).is_none());
    }
}
