//! The samples of all rounds, and the rows and the page that present them.

use std::fmt::Write;

use super::bulk::{BulkSample, Traffic, TrafficKind};
use super::latency::{BackgroundLoad, LatencyPercentiles};
use super::testbed::VcpuPlacement;
use crate::outcome::{Better, GroupResult, Row};
use crate::sampling::{PairedSamples, median};
use crate::table::{format_figure, format_range};
use virtionet_tests::iperf::Direction;

/// Lowest acceptable ratio for small packets from the guest, which several queue pairs can slow
/// down.
const BOUND: f64 = 0.95;

/// The samples for one number of queue pairs.
#[derive(Debug, Clone)]
pub struct Column<T> {
    /// The number of queue pairs in use.
    pub queue_pairs: u16,
    /// One sample for each round.
    pub samples: Vec<T>,
}

/// One load on one of the guests. The first column is for one queue pair.
#[derive(Debug, Clone)]
pub struct BulkCell {
    /// The load.
    pub traffic: Traffic,
    /// The placement, which identifies the guest.
    pub vcpu_placement: VcpuPlacement,
    /// One column for each number of queue pairs.
    pub columns: Vec<Column<BulkSample>>,
}

/// Requests to one of the guests. The first column is for one queue pair.
#[derive(Debug, Clone)]
pub struct LatencyCell {
    /// The load beside the requests.
    pub background: BackgroundLoad,
    /// The placement, which identifies the guest.
    pub vcpu_placement: VcpuPlacement,
    /// One column for each number of queue pairs.
    pub columns: Vec<Column<LatencyPercentiles>>,
}

/// All samples of the group.
#[derive(Debug, Clone)]
pub struct QueueFigures {
    /// Throughput and CPU time.
    pub bulk: Vec<BulkCell>,
    /// Latency of requests.
    pub latency: Vec<LatencyCell>,
}

impl QueueFigures {
    /// Creates the cells without samples, with a column for each of `queue_pairs`.
    #[must_use]
    pub fn new(traffics: Vec<Traffic>, background: &[BackgroundLoad], queue_pairs: &[u16]) -> Self {
        let mut bulk = Vec::new();
        for traffic in traffics {
            bulk.extend(VcpuPlacement::ALL.map(|vcpu_placement| BulkCell {
                traffic,
                vcpu_placement,
                columns: empty_columns(queue_pairs),
            }));
        }
        let mut latency = Vec::new();
        for background in background {
            latency.extend(VcpuPlacement::ALL.map(|vcpu_placement| LatencyCell {
                background: *background,
                vcpu_placement,
                columns: empty_columns(queue_pairs),
            }));
        }
        Self { bulk, latency }
    }

    /// Returns the rows, which compare with one queue pair, and the page.
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

    /// Returns two tables in Markdown.
    fn page(&self) -> String {
        let mut page = String::from(BULK_HEAD);
        for cell in &self.bulk {
            for_each_comparison(&cell.columns, |one, several| {
                write_bulk_line(&mut page, cell, one, several);
            });
        }
        page.push_str(LATENCY_HEAD);
        for cell in &self.latency {
            for_each_comparison(&cell.columns, |one, several| {
                write_latency_line(&mut page, cell, one, several);
            });
        }
        page
    }
}

const BULK_HEAD: &str = "\
The figures are medians. A ratio is that of the two medians beside it, and several queue pairs are
better where it is above 1. The range is that of the ratios of all rounds. CPU time is that of
all threads, in seconds per received Gbit (TCP) or microseconds per received datagram (UDP). The host
column is the sum of workers and QEMU.

| load | placement | queue pairs | one queue pair | several | ratio | range | workers | QEMU | host | host ratio | range | frames per burst |
|---|---|---|---|---|---|---|---|---|---|---|---|---|
";

const LATENCY_HEAD: &str = "
Time from a request of 64 B from the host to the guest until its response of 64 B, in microseconds.

| background load | placement | queue pairs | median, one queue pair | median, several | p99, one queue pair | p99, several |
|---|---|---|---|---|---|---|
";

fn empty_columns<T>(queue_pairs: &[u16]) -> Vec<Column<T>> {
    let column = |queue_pairs: &u16| Column {
        queue_pairs: *queue_pairs,
        samples: Vec::new(),
    };
    queue_pairs.iter().map(column).collect()
}

/// Calls `with` for the column of one queue pair and each of the others.
fn for_each_comparison<T>(columns: &[Column<T>], mut with: impl FnMut(&Column<T>, &Column<T>)) {
    if let Some((one, several)) = columns.split_first() {
        for several in several {
            with(one, several);
        }
    }
}

fn bulk_rows(cell: &BulkCell) -> Vec<Row> {
    let mut rows = Vec::new();
    for_each_comparison(&cell.columns, |one, several| {
        let name = |metric: &str| {
            case_name(
                &cell.traffic.name(),
                cell.vcpu_placement,
                several.queue_pairs,
                metric,
            )
        };
        let row = |metric, unit, better, of: fn(&BulkSample) -> f64| {
            pair_samples(several, one, of).row(&name(metric), unit, better, "1 queue pair")
        };
        let (unit, of) = rate_of(cell.traffic.kind);
        let rate = row("rate", unit, Better::Higher, of);
        let rate = rate.with_headline(cell.vcpu_placement == VcpuPlacement::Pinned);
        rows.push(match is_bounded(cell.traffic) {
            true => rate.with_bound(BOUND),
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
    for_each_comparison(&cell.columns, |one, several| {
        let load = format!("ping {}", cell.background.name());
        let name =
            |metric: &str| case_name(&load, cell.vcpu_placement, several.queue_pairs, metric);
        let row = |metric, of: fn(&LatencyPercentiles) -> f64| {
            pair_samples(several, one, of).row(&name(metric), "us", Better::Lower, "1 queue pair")
        };
        rows.push(row("median", |t| t.median));
        rows.push(row("p99", |t| t.p99));
    });
    rows
}

fn case_name(load: &str, vcpu_placement: VcpuPlacement, queue_pairs: u16, metric: &str) -> String {
    format!("{load}, {}, {queue_pairs}: {metric}", vcpu_placement.name())
}

/// Whether [`BOUND`] applies: to small packets that the guest sends.
fn is_bounded(traffic: Traffic) -> bool {
    traffic.direction == Direction::GuestToHost && traffic.kind != TrafficKind::Stream
}

fn pair_samples<T>(ours: &Column<T>, peer: &Column<T>, of: impl Fn(&T) -> f64) -> PairedSamples {
    let mut samples = PairedSamples::default();
    for (ours, peer) in ours.samples.iter().zip(&peer.samples) {
        samples.push(of(ours), of(peer));
    }
    samples
}

/// Returns the unit of a load's throughput, and the function that reads it from a sample.
fn rate_of(kind: TrafficKind) -> (&'static str, fn(&BulkSample) -> f64) {
    match kind {
        TrafficKind::Stream => ("Gbit/s", |s| s.gbps),
        TrafficKind::Writes => ("Mbit/s", |s| s.gbps * 1e3),
        TrafficKind::Datagrams => ("kpps", |s| BulkSample::kpps(s.gbps)),
    }
}

fn median_text<T>(column: &Column<T>, of: &dyn Fn(&T) -> f64) -> String {
    let values: Vec<f64> = column.samples.iter().map(of).collect();
    format_figure(median(&values))
}

fn write_bulk_line(
    page: &mut String,
    cell: &BulkCell,
    one: &Column<BulkSample>,
    several: &Column<BulkSample>,
) {
    let (unit, rate) = rate_of(cell.traffic.kind);
    let cpu_time = |seconds: f64| match cell.traffic.kind {
        TrafficKind::Datagrams => seconds * 1e3 / BulkSample::kpps(1.0),
        TrafficKind::Stream | TrafficKind::Writes => seconds,
    };
    let both = |of: &dyn Fn(&BulkSample) -> f64| {
        format!("{} / {}", median_text(one, of), median_text(several, of))
    };
    let ratio = |better, of: fn(&BulkSample) -> f64| {
        let row = pair_samples(several, one, of).row("", "", better, "");
        format!("{:.2} | {}", row.ratio(), format_range(row.spread))
    };
    // Writing to a String cannot fail.
    _ = writeln!(
        page,
        "| {} | {} | {} | {} {unit} | {} {unit} | {} | {} | {} | {} | {} | {} |",
        cell.traffic.name(),
        cell.vcpu_placement.name(),
        several.queue_pairs,
        median_text(one, &rate),
        median_text(several, &rate),
        ratio(Better::Higher, rate),
        both(&|s| cpu_time(s.workers)),
        both(&|s| cpu_time(s.qemu)),
        both(&|s| cpu_time(s.workers + s.qemu)),
        ratio(Better::Lower, |s| s.workers + s.qemu),
        both(&|s| s.frames_per_burst),
    );
}

fn write_latency_line(
    page: &mut String,
    cell: &LatencyCell,
    one: &Column<LatencyPercentiles>,
    several: &Column<LatencyPercentiles>,
) {
    let [median, p99] = [
        |t: &LatencyPercentiles| t.median,
        |t: &LatencyPercentiles| t.p99,
    ];
    // Writing to a String cannot fail.
    _ = writeln!(
        page,
        "| {} | {} | {} | {} | {} | {} | {} |",
        cell.background.name(),
        cell.vcpu_placement.name(),
        several.queue_pairs,
        median_text(one, &median),
        median_text(several, &median),
        median_text(one, &p99),
        median_text(several, &p99),
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
    fn several_queue_pairs_are_ours_and_one_is_the_peer() {
        let rows = figures().outcome().rows;
        let row = |case: &str| rows.iter().find(|row| row.case == case).unwrap();
        let rate = row("UDP 64 B to host, 8 flows, pinned, 4: rate");
        // 2 Gbit/s of 64 B are 3.9 million datagrams a second.
        assert_eq!((rate.ours, rate.peer), (BulkSample::kpps(1.8), 3906.25));
        assert!(
            (rate.ratio() - 0.9).abs() < 1e-9 && !rate.is_within_bound(),
            "{rate:?}"
        );
        let cost = row("TCP to host, 8 flows, floating, 4: QEMU");
        assert!((cost.ratio() - 0.9).abs() < 1e-9, "{cost:?}");
        let latency = row("ping idle, pinned, 4: p99");
        assert_eq!(
            (latency.ours, latency.peer, latency.ratio()),
            (100.0, 200.0, 2.0)
        );
    }

    #[test]
    fn only_small_packets_from_the_guest_have_a_bound() {
        let rows = figures().outcome().rows;
        let bounded = rows.iter().filter(|row| row.bound.is_some());
        let cases: Vec<&str> = bounded.map(|row| &*row.case).collect();
        let want =
            ["pinned", "floating"].map(|s| format!("UDP 64 B to host, 8 flows, {s}, 4: rate"));
        assert_eq!(cases, want);
    }

    #[test]
    fn page_has_a_line_with_both_sides_for_each_load() {
        let page = figures().page();
        let line = |load: &str| page.lines().find(|line| line.starts_with(load)).unwrap();
        assert_eq!(
            line("| TCP to host, 8 flows | pinned"),
            "| TCP to host, 8 flows | pinned | 4 | 2.00 Gbit/s | 1.80 Gbit/s | 0.90 | 0.90 to 10.00 | 0.25 / 0.28 | 0.50 / 0.56 | 0.75 / 0.83 | 0.90 | 0.90 to 10.00 | 8.00 / 8.00 |"
        );
        // 0.25 s per Gbit are 0.25 ns per bit or 128 ns per datagram.
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
