//! The result of the demo, as a table for people and as JSON for programs.

use std::fmt::Write as _;
use std::time::Duration;

use serde::Serialize;

use crate::interrupts::DriverSettings;
use crate::sample::FrameCount;

/// The row of a queue pair.
#[derive(Debug, Serialize)]
pub struct PairRow {
    /// The number of the queue pair.
    pub pair: usize,
    /// The vCPU that receives the receiveq's interrupt, or `None` if the guest does not use the
    /// pair.
    pub guest_cpu: Option<u32>,
    /// The name of the worker thread.
    pub worker: String,
    /// The id of the worker thread.
    pub tid: i32,
    /// The host CPU to which the worker is pinned, or on which it last ran.
    pub host_cpu: usize,
    /// Whether the worker is pinned to one host CPU.
    pub pinned: bool,
    /// The daemon's reason for the worker's placement.
    pub placement: String,
    /// The number of frames from the guest during the loads of both directions.
    pub tx_frames: u64,
    /// The number of bytes from the guest during the loads of both directions.
    pub tx_bytes: u64,
    /// The number of frames to the guest during the loads of both directions.
    pub rx_frames: u64,
    /// The number of bytes to the guest during the loads of both directions.
    pub rx_bytes: u64,
    /// The rate to the guest in Gbit/s during the load in this direction.
    pub rx_gbps: f64,
    /// The rate from the guest in Gbit/s during the load in this direction.
    pub tx_gbps: f64,
}

/// The result of the demo.
#[derive(Debug, Serialize)]
pub struct DemoResult {
    /// The queue pairs, in the order of their numbers.
    pub pairs: Vec<PairRow>,
    /// The interrupt settings of the guest's driver.
    pub guest: DriverSettings,
    /// The rate at iperf3's receivers in the guest in Gbit/s.
    pub host_to_guest_gbps: f64,
    /// The rate at iperf3's receivers on the host in Gbit/s.
    pub guest_to_host_gbps: f64,
    /// The accelerator of QEMU.
    pub accel: String,
    /// The version of QEMU.
    pub qemu: String,
    /// The number of vCPUs of the guest.
    pub vcpus: u16,
    /// The number of iperf3's flows.
    pub flows: u16,
    /// The duration of each direction in seconds.
    pub seconds: u32,
    /// The time from the start of QEMU until the guest had booted, in seconds.
    pub boot_seconds: f64,
}

/// The traffic of a queue pair during the load in one direction.
#[derive(Clone, Copy, Debug)]
pub struct PairTraffic {
    /// The frames to the guest.
    pub rx: FrameCount,
    /// The frames from the guest.
    pub tx: FrameCount,
    /// The time for which iperf3 sent data, which excludes the time to connect.
    pub duration: Duration,
}

impl PairRow {
    /// Sets the traffic of the queue pair. The guest received data during `to_guest`, and sent data
    /// during `from_guest`.
    pub fn set_traffic(&mut self, to_guest: PairTraffic, from_guest: PairTraffic) {
        self.rx_frames = to_guest.rx.frames + from_guest.rx.frames;
        self.rx_bytes = to_guest.rx.bytes + from_guest.rx.bytes;
        self.tx_frames = to_guest.tx.frames + from_guest.tx.frames;
        self.tx_bytes = to_guest.tx.bytes + from_guest.tx.bytes;
        self.rx_gbps = to_guest.rx.gbps(to_guest.duration);
        self.tx_gbps = from_guest.tx.gbps(from_guest.duration);
    }
}

const HEADER: [&str; 2] = [
    "     | guest |                          | host |            to guest            |           from guest",
    "pair |  vCPU | worker (thread)          |  CPU |     frames      bytes   Gbit/s |     frames      bytes   Gbit/s",
];

impl DemoResult {
    /// Returns the table with its totals, the guest's settings and the rates.
    pub fn table(&self) -> String {
        let rule: String = HEADER[1]
            .chars()
            .map(|c| if c == '|' { '+' } else { '-' })
            .collect();
        let mut text = format!("{}\n{}\n{rule}\n", HEADER[0], HEADER[1]);
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
        self.write_totals(&mut text, &rule);
        text
    }

    fn write_totals(&self, text: &mut String, rule: &str) {
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
            text.push_str("* the worker is not pinned; this is the CPU on which it last ran\n");
        }
        _ = write!(text, "\n{}", self.guest.to_text());
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
    let bytes = format_bytes(bytes);
    _ = write!(text, " {frames:>10} {bytes:>10} {gbps:>8.2}");
}

/// Formats a number of bytes in the unit in which it is below 1000, or in PB if it is larger.
fn format_bytes(bytes: u64) -> String {
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

    fn example_result() -> DemoResult {
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
        let duration = Duration::from_secs(2);
        let traffic = |rx, tx| PairTraffic { rx, tx, duration };
        row.set_traffic(
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
    fn rate_of_a_direction_is_that_of_its_own_load() {
        let row = &example_result().pairs[0];
        assert_eq!((row.rx_frames, row.tx_frames), (17, 25));
        assert!((row.rx_gbps - 2.0).abs() < 1e-6);
        assert!((row.tx_gbps - 1.0).abs() < 1e-6);
    }

    #[test]
    fn columns_of_the_table_are_aligned() {
        let table = example_result().table();
        let columns = |line: &str| -> Vec<usize> {
            let bar = |(i, c)| (c == '|' || c == '+').then_some(i);
            line.char_indices().filter_map(bar).collect()
        };
        let lines: Vec<_> = table.lines().take(6).collect();
        for line in &lines {
            assert_eq!(columns(line), columns(HEADER[1]), "{line}");
        }
        for line in &lines[1..] {
            assert_eq!(line.len(), HEADER[1].len(), "{line}");
        }
        assert!(lines[3].contains("vnet-q0 (4711)") && lines[3].contains("500.00 MB"));
    }

    #[test]
    fn bytes_are_formatted_in_the_unit_below_1000() {
        assert_eq!(format_bytes(999), "999 B");
        assert_eq!(format_bytes(1_500), "1.50 kB");
        assert_eq!(format_bytes(12_345_678_901), "12.35 GB");
        assert_eq!(format_bytes(u64::MAX), "18446.74 PB");
    }
}
