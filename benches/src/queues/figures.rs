//! The samples of all rounds, as rows against one pair and as a page for people.

use std::fmt::Write;

use super::bulk::{BulkSample, Traffic, TrafficKind};
use super::latency::{BackgroundLoad, LatencyPercentiles};
use super::testbed::VcpuPlacement;
use crate::outcome::{Better, GroupResult, Row};
use crate::sampling::{PairedSamples, median};
use crate::table::{figure, quartiles};
use virtionet_tests::iperf::Direction;

/// Small outgoing packets: what many queues are known to slow down.
const BOUND: f64 = 0.95;

/// The samples of one number of pairs, by round.
#[derive(Debug, Clone)]
pub struct Column<T> {
    /// How many are in use.
    pub pairs: u16,
    /// One of each round.
    pub samples: Vec<T>,
}

/// One load on one of the guests; the first column is one pair's.
#[derive(Debug, Clone)]
pub struct BulkCell {
    /// The load.
    pub traffic: Traffic,
    /// The guest.
    pub vcpu_placement: VcpuPlacement,
    /// By number of pairs.
    pub columns: Vec<Column<BulkSample>>,
}

/// Requests to one of the guests; the first column is one pair's.
#[derive(Debug, Clone)]
pub struct LatencyCell {
    /// What goes on beside them.
    pub background: BackgroundLoad,
    /// The guest.
    pub vcpu_placement: VcpuPlacement,
    /// By number of pairs.
    pub columns: Vec<Column<LatencyPercentiles>>,
}

/// All that is measured.
#[derive(Debug, Clone)]
pub struct QueueFigures {
    /// Throughput and CPU time.
    pub bulk: Vec<BulkCell>,
    /// Request and response.
    pub latency: Vec<LatencyCell>,
}

impl QueueFigures {
    /// Without samples yet, for each of `pairs`.
    #[must_use]
    pub fn new(traffics: Vec<Traffic>, background: &[BackgroundLoad], pairs: &[u16]) -> Self {
        let mut bulk = Vec::new();
        for traffic in traffics {
            bulk.extend(VcpuPlacement::ALL.map(|vcpu_placement| BulkCell {
                traffic,
                vcpu_placement,
                columns: empty(pairs),
            }));
        }
        let mut latency = Vec::new();
        for background in background {
            latency.extend(VcpuPlacement::ALL.map(|vcpu_placement| LatencyCell {
                background: *background,
                vcpu_placement,
                columns: empty(pairs),
            }));
        }
        Self { bulk, latency }
    }

    /// Rows with the ratios to one pair, and the page.
    #[must_use]
    pub fn outcome(&self) -> GroupResult {
        let bulk = self.bulk.iter().flat_map(bulk_rows);
        let latency = self.latency.iter().flat_map(latency_rows);
        GroupResult {
            rows: bulk.chain(latency).collect(),
            page: Some(self.page()),
            ..GroupResult::default()
        }
    }

    /// Two tables in Markdown.
    fn page(&self) -> String {
        let mut page = String::from(BULK_HEAD);
        for cell in &self.bulk {
            each_pair(&cell.columns, |one, several| {
                bulk_line(&mut page, cell, one, several);
            });
        }
        page.push_str(LATENCY_HEAD);
        for cell in &self.latency {
            each_pair(&cell.columns, |one, several| {
                latency_line(&mut page, cell, one, several);
            });
        }
        page
    }
}

const BULK_HEAD: &str = "\
Medians. A ratio is that of the two medians beside it, better above 1; quartiles are those of the
ratios of all rounds. CPU time is that of all threads, in seconds a Gbit (TCP) or microseconds a
datagram (UDP) that was received; `host` is workers and QEMU together.

| load | threads | queue pairs | one pair | several | ratio | quartiles | workers | QEMU | host | host ratio | quartiles | frames a burst |
|---|---|---|---|---|---|---|---|---|---|---|---|---|
";

const LATENCY_HEAD: &str = "
Request and response of 64 B from the host to the guest, there and back, in microseconds.

| background | threads | pairs | median, one pair | several | p99, one pair | several |
|---|---|---|---|---|---|---|
";

fn empty<T>(pairs: &[u16]) -> Vec<Column<T>> {
    let column = |pairs: &u16| Column {
        pairs: *pairs,
        samples: Vec::new(),
    };
    pairs.iter().map(column).collect()
}

/// One pair's column with each other one.
fn each_pair<T>(columns: &[Column<T>], mut with: impl FnMut(&Column<T>, &Column<T>)) {
    if let Some((one, several)) = columns.split_first() {
        for several in several {
            with(one, several);
        }
    }
}

fn bulk_rows(cell: &BulkCell) -> Vec<Row> {
    let mut rows = Vec::new();
    each_pair(&cell.columns, |one, several| {
        let name = |what: &str| {
            case(
                &cell.traffic.name(),
                cell.vcpu_placement,
                several.pairs,
                what,
            )
        };
        let row = |what, unit, better, of: fn(&BulkSample) -> f64| {
            paired(several, one, of).row(&name(what), unit, better, "1 pair")
        };
        let (unit, of) = rate(cell.traffic.kind);
        let rate = row("rate", unit, Better::Higher, of);
        let rate = rate.headline(cell.vcpu_placement == VcpuPlacement::Pinned);
        rows.push(match is_bounded(cell.traffic) {
            true => rate.bound(BOUND),
            false => rate,
        });
        let unit = "s/Gbit";
        rows.push(row("workers", unit, Better::Lower, |s| s.workers));
        rows.push(row("QEMU", unit, Better::Lower, |s| s.qemu));
    });
    rows
}

fn latency_rows(cell: &LatencyCell) -> Vec<Row> {
    let mut rows = Vec::new();
    each_pair(&cell.columns, |one, several| {
        let load = format!("ping {}", cell.background.name());
        let name = |what: &str| case(&load, cell.vcpu_placement, several.pairs, what);
        let row = |what, of: fn(&LatencyPercentiles) -> f64| {
            paired(several, one, of).row(&name(what), "us", Better::Lower, "1 pair")
        };
        rows.push(row("median", |t| t.median));
        rows.push(row("p99", |t| t.p99));
    });
    rows
}

fn case(load: &str, vcpu_placement: VcpuPlacement, pairs: u16, what: &str) -> String {
    format!("{load}, {}, {pairs}: {what}", vcpu_placement.name())
}

/// Small packets that the guest sends.
fn is_bounded(traffic: Traffic) -> bool {
    traffic.direction == Direction::GuestToHost && traffic.kind != TrafficKind::Stream
}

fn paired<T>(ours: &Column<T>, peer: &Column<T>, of: impl Fn(&T) -> f64) -> PairedSamples {
    let mut pairs = PairedSamples::default();
    for (ours, peer) in ours.samples.iter().zip(&peer.samples) {
        pairs.push(of(ours), of(peer));
    }
    pairs
}

/// A load's throughput: its unit, and how it is read from a sample.
fn rate(kind: TrafficKind) -> (&'static str, fn(&BulkSample) -> f64) {
    match kind {
        TrafficKind::Stream => ("Gbit/s", |s| s.gbps),
        TrafficKind::Writes => ("Mbit/s", |s| s.gbps * 1e3),
        TrafficKind::Datagrams => ("kpps", |s| BulkSample::kpps(s.gbps)),
    }
}

fn median_text<T>(column: &Column<T>, of: &dyn Fn(&T) -> f64) -> String {
    let values: Vec<f64> = column.samples.iter().map(of).collect();
    figure(median(&values))
}

fn bulk_line(
    page: &mut String,
    cell: &BulkCell,
    one: &Column<BulkSample>,
    several: &Column<BulkSample>,
) {
    let (unit, rate) = rate(cell.traffic.kind);
    let cost = |seconds: f64| match cell.traffic.kind {
        TrafficKind::Datagrams => seconds * 1e3 / BulkSample::kpps(1.0),
        TrafficKind::Stream | TrafficKind::Writes => seconds,
    };
    let both = |of: &dyn Fn(&BulkSample) -> f64| {
        format!("{} / {}", median_text(one, of), median_text(several, of))
    };
    let ratio = |better, of: fn(&BulkSample) -> f64| {
        let row = paired(several, one, of).row("", "", better, "");
        format!("{:.2} | {}", row.ratio(), quartiles(row.spread))
    };
    // Writing to a String cannot fail.
    _ = writeln!(
        page,
        "| {} | {} | {} | {} {unit} | {} {unit} | {} | {} | {} | {} | {} | {} |",
        cell.traffic.name(),
        cell.vcpu_placement.name(),
        several.pairs,
        median_text(one, &rate),
        median_text(several, &rate),
        ratio(Better::Higher, rate),
        both(&|s| cost(s.workers)),
        both(&|s| cost(s.qemu)),
        both(&|s| cost(s.workers + s.qemu)),
        ratio(Better::Lower, |s| s.workers + s.qemu),
        both(&|s| s.frames_per_burst),
    );
}

fn latency_line(
    page: &mut String,
    cell: &LatencyCell,
    one: &Column<LatencyPercentiles>,
    several: &Column<LatencyPercentiles>,
) {
    let [half, rare] = [
        |t: &LatencyPercentiles| t.median,
        |t: &LatencyPercentiles| t.p99,
    ];
    // Writing to a String cannot fail.
    _ = writeln!(
        page,
        "| {} | {} | {} | {} | {} | {} | {} |",
        cell.background.name(),
        cell.vcpu_placement.name(),
        several.pairs,
        median_text(one, &half),
        median_text(several, &half),
        median_text(one, &rare),
        median_text(several, &rare),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(gbps: f64) -> BulkSample {
        BulkSample {
            gbps,
            workers: 0.5 / gbps,
            qemu: 1.0 / gbps,
            frames_per_burst: 8.0,
        }
    }

    fn figures() -> QueueFigures {
        let small = Traffic {
            direction: Direction::GuestToHost,
            flows: 8,
            kind: TrafficKind::Datagrams,
        };
        let large = Traffic {
            kind: TrafficKind::Stream,
            ..small
        };
        let mut figures =
            QueueFigures::new(vec![small, large], &[BackgroundLoad::Nothing], &[1, 4]);
        for cell in &mut figures.bulk {
            cell.columns[0].samples.extend([1.0, 2.0, 4.0].map(sample));
            cell.columns[1].samples.extend([0.9, 1.8, 40.0].map(sample));
        }
        for cell in &mut figures.latency {
            for (column, median) in cell.columns.iter_mut().zip([100.0, 50.0]) {
                let p99 = 2.0 * median;
                column.samples.push(LatencyPercentiles { median, p99 });
            }
        }
        figures
    }

    #[test]
    fn several_pairs_are_ours_and_one_pair_the_peer() {
        let rows = figures().outcome().rows;
        let row = |case: &str| rows.iter().find(|row| row.case == case).unwrap();
        let rate = row("UDP 64 B to host, 8 flows, pinned, 4: rate");
        // 2 Gbit/s of 64 B are 3.9 million datagrams a second.
        assert_eq!((rate.ours, rate.peer), (BulkSample::kpps(1.8), 3906.25));
        assert!(
            (rate.ratio() - 0.9).abs() < 1e-9 && !rate.holds(),
            "{rate:?}"
        );
        let cost = row("TCP to host, 8 flows, floating, 4: QEMU");
        assert!((cost.ratio() - 0.9).abs() < 1e-9, "{cost:?}");
        let times = row("ping idle, pinned, 4: p99");
        assert_eq!((times.ours, times.peer, times.ratio()), (100.0, 200.0, 2.0));
    }

    #[test]
    fn only_small_packets_from_the_guest_are_held_to_the_bound() {
        let rows = figures().outcome().rows;
        let bounded = rows.iter().filter(|row| row.bound.is_some());
        let cases: Vec<&str> = bounded.map(|row| &*row.case).collect();
        let want =
            ["pinned", "floating"].map(|s| format!("UDP 64 B to host, 8 flows, {s}, 4: rate"));
        assert_eq!(cases, want);
    }

    #[test]
    fn the_page_has_a_line_a_load_with_both_sides() {
        let page = figures().page();
        let line = |load: &str| page.lines().find(|line| line.starts_with(load)).unwrap();
        assert_eq!(
            line("| TCP to host, 8 flows | pinned"),
            "| TCP to host, 8 flows | pinned | 4 | 2.00 Gbit/s | 1.80 Gbit/s | 0.90 | 0.90 to 5.45 | 0.25 / 0.28 | 0.50 / 0.56 | 0.75 / 0.83 | 0.90 | 0.90 to 5.45 | 8.00 / 8.00 |"
        );
        // 0.25 s a Gbit are 0.25 ns a bit, 128 ns a datagram.
        assert!(
            line("| UDP 64 B to host").contains("| 0.13 / 0.14 |"),
            "{page}"
        );
        assert_eq!(
            line("| idle | pinned"),
            "| idle | pinned | 4 | 100 | 50.0 | 200 | 100 |"
        );
    }
}
