//! The demo's end: a table for people, JSON for programs.

use std::fmt::Write as _;
use std::time::Duration;

use serde::Serialize;

use crate::interrupts::DriverSettings;
use crate::sample::FrameCount;

/// One row: a queue pair.
#[derive(Debug, Serialize)]
pub struct PairRow {
    /// Its number.
    pub pair: usize,
    /// The vCPU that its receive interrupt goes to; none while the guest does
    /// not use the pair.
    pub guest_cpu: Option<u32>,
    /// The worker thread's name.
    pub worker: String,
    /// The worker thread's id.
    pub tid: i32,
    /// The host CPU that the worker is pinned to, or was last seen on.
    pub host_cpu: usize,
    /// Whether it may run on that one alone.
    pub pinned: bool,
    /// Why the worker stands there, in the daemon's words.
    pub placement: String,
    /// Frames from the guest, over both directions' runs.
    pub tx_frames: u64,
    /// Bytes from the guest.
    pub tx_bytes: u64,
    /// Frames to the guest.
    pub rx_frames: u64,
    /// Bytes to the guest.
    pub rx_bytes: u64,
    /// Gbit/s to the guest while that was the direction.
    pub rx_gbps: f64,
    /// Gbit/s from the guest while that was the direction.
    pub tx_gbps: f64,
}

/// All of it.
#[derive(Debug, Serialize)]
pub struct DemoResult {
    /// The queue pairs, by number.
    pub pairs: Vec<PairRow>,
    /// What the guest's driver chose.
    pub guest: DriverSettings,
    /// What iperf3's receivers saw.
    pub host_to_guest_gbps: f64,
    /// What iperf3's receivers saw.
    pub guest_to_host_gbps: f64,
    /// How QEMU ran the guest.
    pub accel: String,
    /// QEMU's version.
    pub qemu: String,
    /// The guest's vCPUs.
    pub vcpus: u16,
    /// iperf3's flows.
    pub flows: u16,
    /// Seconds of each direction.
    pub seconds: u32,
    /// Seconds from QEMU's start until the guest was up.
    pub boot_seconds: f64,
}

/// What one pair moved in one direction's run, and how long iperf3 sent.
#[derive(Clone, Copy, Debug)]
pub struct PairTraffic {
    /// To the guest.
    pub rx: FrameCount,
    /// From the guest.
    pub tx: FrameCount,
    /// The time that iperf3 sent; connecting takes longer and moves nothing.
    pub time: Duration,
}

impl PairRow {
    /// Fills in what the pair moved: `there` with the guest receiving, `back`
    /// with the guest sending.
    pub fn traffic(&mut self, there: PairTraffic, back: PairTraffic) {
        self.rx_frames = there.rx.frames + back.rx.frames;
        self.rx_bytes = there.rx.bytes + back.rx.bytes;
        self.tx_frames = there.tx.frames + back.tx.frames;
        self.tx_bytes = there.tx.bytes + back.tx.bytes;
        self.rx_gbps = there.rx.gbps(there.time);
        self.tx_gbps = back.tx.gbps(back.time);
    }
}

const HEAD: [&str; 2] = [
    "     | guest |                          | host |            to guest            |           from guest",
    "pair |  vCPU | worker (thread)          |  CPU |     frames      bytes   Gbit/s |     frames      bytes   Gbit/s",
];

impl DemoResult {
    /// The table with its totals.
    pub fn table(&self) -> String {
        let rule: String = HEAD[1]
            .chars()
            .map(|c| if c == '|' { '+' } else { '-' })
            .collect();
        let mut text = format!("{}\n{}\n{rule}\n", HEAD[0], HEAD[1]);
        for row in &self.pairs {
            let vcpu = row.guest_cpu.map_or("-".to_owned(), |cpu| cpu.to_string());
            let worker = format!("{} ({})", row.worker, row.tid);
            let cpu = format!("{}{}", row.host_cpu, if row.pinned { "" } else { "*" });
            let pair = row.pair;
            _ = write!(text, "{pair:>4} | {vcpu:>5} | {worker:<24} | {cpu:>4} |");
            write_direction(&mut text, row.rx_frames, row.rx_bytes, row.rx_gbps);
            text.push_str(" |");
            write_direction(&mut text, row.tx_frames, row.tx_bytes, row.tx_gbps);
            text.push('\n');
        }
        self.totals(&mut text, &rule);
        text
    }

    fn totals(&self, text: &mut String, rule: &str) {
        let sum = |f: fn(&PairRow) -> u64| self.pairs.iter().map(f).sum::<u64>();
        let rate = |f: fn(&PairRow) -> f64| self.pairs.iter().map(f).sum::<f64>();
        let empty = "";
        _ = write!(
            text,
            "{rule}\n all | {empty:>5} | {empty:<24} | {empty:>4} |"
        );
        write_direction(
            text,
            sum(|r| r.rx_frames),
            sum(|r| r.rx_bytes),
            rate(|r| r.rx_gbps),
        );
        text.push_str(" |");
        write_direction(
            text,
            sum(|r| r.tx_frames),
            sum(|r| r.tx_bytes),
            rate(|r| r.tx_gbps),
        );
        text.push('\n');
        if self.pairs.iter().any(|row| !row.pinned) {
            text.push_str("* not pinned: where it was last seen\n");
        }
        _ = write!(text, "\n{}", self.guest.lines());
        _ = write!(
            text,
            "\niperf3, {} flows: host to guest {:.2} Gbit/s, guest to host {:.2} Gbit/s (QEMU {}, {}, {} vCPUs)\n",
            self.flows,
            self.host_to_guest_gbps,
            self.guest_to_host_gbps,
            self.qemu,
            self.accel,
            self.vcpus
        );
    }
}

fn write_direction(text: &mut String, frames: u64, bytes: u64, gbps: f64) {
    let bytes = human(bytes);
    _ = write!(text, " {frames:>10} {bytes:>10} {gbps:>8.2}");
}

/// Bytes in the unit that leaves up to four digits before the point.
fn human(bytes: u64) -> String {
    let units = ["B", "kB", "MB", "GB", "TB", "PB"];
    let mut value = bytes as f64;
    let mut unit = "";
    for name in units {
        unit = name;
        if value < 1000.0 {
            break;
        }
        if name != "PB" {
            value /= 1000.0;
        }
    }
    if unit == "B" {
        format!("{bytes} B")
    } else {
        format!("{value:.2} {unit}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome() -> DemoResult {
        let mut row = PairRow {
            pair: 0,
            guest_cpu: Some(3),
            worker: "vnet-q0".into(),
            tid: 4711,
            host_cpu: 1,
            pinned: true,
            placement: String::new(),
            tx_frames: 0,
            tx_bytes: 0,
            rx_frames: 0,
            rx_bytes: 0,
            rx_gbps: 0.0,
            tx_gbps: 0.0,
        };
        let count = |frames, bytes| FrameCount { frames, bytes };
        let time = Duration::from_secs(2);
        let traffic = |rx, tx| PairTraffic { rx, tx, time };
        row.traffic(
            traffic(count(10, 500_000_000), count(5, 300)),
            traffic(count(7, 400), count(20, 250_000_000)),
        );
        DemoResult {
            pairs: vec![row],
            guest: DriverSettings::default(),
            host_to_guest_gbps: 1.9,
            guest_to_host_gbps: 0.9,
            accel: "tcg".into(),
            qemu: "10.0.2".into(),
            vcpus: 4,
            flows: 8,
            seconds: 2,
            boot_seconds: 3.0,
        }
    }

    #[test]
    fn rates_are_of_the_direction_that_ran() {
        let row = &outcome().pairs[0];
        assert_eq!((row.rx_frames, row.tx_frames), (17, 25));
        assert!((row.rx_gbps - 2.0).abs() < 1e-6);
        assert!((row.tx_gbps - 1.0).abs() < 1e-6);
    }

    #[test]
    fn the_tables_columns_stand_below_each_other() {
        let table = outcome().table();
        let columns = |line: &str| -> Vec<usize> {
            let bar = |(i, c)| (c == '|' || c == '+').then_some(i);
            line.char_indices().filter_map(bar).collect()
        };
        let lines: Vec<_> = table.lines().take(6).collect();
        for line in &lines {
            assert_eq!(columns(line), columns(HEAD[1]), "{line}");
        }
        for line in &lines[1..] {
            assert_eq!(line.len(), HEAD[1].len(), "{line}");
        }
        assert!(lines[3].contains("vnet-q0 (4711)") && lines[3].contains("500.00 MB"));
    }

    #[test]
    fn bytes_take_the_unit_that_fits() {
        assert_eq!(human(999), "999 B");
        assert_eq!(human(1_500), "1.50 kB");
        assert_eq!(human(12_345_678_901), "12.35 GB");
        assert_eq!(human(u64::MAX), "18446.74 PB");
    }
}
