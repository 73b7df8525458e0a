//! Measures migrations of one guest, with virtionetd and with QEMU's own network device in turns:
//! the time for which the guest stops, what TCP carries to the guest before and during a migration, and
//! how many UDP datagrams are lost at its end, 1,000 of which are sent a second each way. `VIRTIONETD`
//! names the program, the argument is the number of pairs:
//!
//! ```text
//! VIRTIONETD=target/release/virtionetd cargo run --release -p virtionet-tests --example migration 10
//! ```

#![allow(clippy::print_stdout)]

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use virtionet_tests::migration::{Device, Hosts, set_speed, wait_for_migration};
use virtionet_tests::qemu::Qemu;
use virtionet_tests::topology::GUEST;
use virtionet_tests::udp_streams::UdpStreams;

/// The seconds of each load.
const SECONDS: &str = "3";
const ATTEMPTS: u32 = 10;
/// The bandwidth of the migration after it, in bytes/s.
const FAST: u64 = 1 << 30;
const DOWNTIME_LIMIT_MS: u64 = 30;
/// The bandwidth of the migration during the load, in bytes/s: too little for it to end.
const SLOW: u64 = 1 << 20;
/// The seconds of datagrams, and of those in front of the end of the migration.
const UDP_SECONDS: u32 = 8;
const UDP_LEAD: Duration = Duration::from_secs(3);

fn main() -> Result<()> {
    let pairs = std::env::args().nth(1).map_or(Ok(10), |n| n.parse())?;
    let mut sides = [Vec::new(), Vec::new()];
    for n in 1..=pairs {
        for (name, side) in ["virtionetd", "QEMU"].into_iter().zip(&mut sides) {
            let figures = measure(name == "QEMU")?;
            println!("{n} {name}: {figures:?}");
            side.push(figures);
        }
    }
    for (name, side) in ["virtionetd", "QEMU"].into_iter().zip(&sides) {
        let median = |of: fn(&Figures) -> f64| median(side.iter().map(of).collect());
        println!(
            "{name}: downtime {:.0} ms, {:.2} Gbit/s before, {:.2} of that during the migration, {:.0} datagrams to the guest lost, {:.0} from it",
            median(|figures| figures.downtime_ms),
            median(|figures| figures.gbps_before),
            median(|figures| figures.gbps_during / figures.gbps_before),
            median(|figures| figures.lost[0]),
            median(|figures| figures.lost[1]),
        );
    }
    Ok(())
}

#[derive(Debug)]
struct Figures {
    downtime_ms: f64,
    gbps_before: f64,
    gbps_during: f64,
    /// Datagrams to the guest and from it.
    lost: [f64; 2],
}

fn measure(is_own: bool) -> Result<Figures> {
    let device = Device::new(1, false);
    let hosts = match is_own {
        true => Hosts::without_daemons(device),
        false => Hosts::new(device),
    }?;
    let source = hosts.boot()?;
    source.guest().ok("iperf3 -s -D && sleep 1")?;
    // The first load makes the emulator translate the guest's code.
    load(&hosts)?;
    let gbps_before = load(&hosts)?;
    let without = send_datagrams(&hosts, UDP_SECONDS / 2)?.finish()?;
    let uri = hosts.uri();
    let _dest: Qemu = hosts.expect_guest(&uri)?;
    set_speed(&source, SLOW, 1)?;
    source.qmp("migrate", &json!({"uri": uri}))?;
    wait_for_migration(&source, "active")?;
    let gbps_during = load(&hosts)?;
    wait_for_migration(&source, "active")?;
    let datagrams = send_datagrams(&hosts, UDP_SECONDS)?;
    sleep(UDP_LEAD);
    // QEMU stops the guest when it expects to carry the rest within this time.
    set_speed(&source, FAST, DOWNTIME_LIMIT_MS)?;
    let migration = wait_for_migration(&source, "completed")?;
    let downtime = migration["downtime"].as_f64();
    let counts = datagrams.finish()?;
    println!("to the guest and from it: {counts:?}, without a migration {without:?}");
    Ok(Figures {
        downtime_ms: downtime.context("QEMU reports no downtime")?,
        gbps_before,
        gbps_during,
        lost: counts.map(|count| to_f64(count.lost)),
    })
}

/// What TCP carries to the guest, in Gbit/s.
fn load(hosts: &Hosts) -> Result<f64> {
    let args = ["-J", "-c", GUEST.v4, "-t", SECONDS];
    let mut report = Value::Null;
    // A server that has just served a load refuses the next one.
    for _ in 0..ATTEMPTS {
        sleep(Duration::from_secs(1));
        let text = hosts.bridge().netns().run("iperf3", args)?;
        report = serde_json::from_str(&text)?;
        let rate = &report["end"]["sum_received"]["bits_per_second"];
        if let Some(rate) = rate.as_f64() {
            return Ok(rate / 1e9);
        }
    }
    bail!("iperf3 reports no rate: {}", report["error"])
}

/// Sends datagrams both ways.
fn send_datagrams(hosts: &Hosts, seconds: u32) -> Result<UdpStreams> {
    // The server needs a moment after a load.
    sleep(Duration::from_secs(1));
    UdpStreams::start(hosts.bridge().netns(), hosts.dir(), GUEST.v4, seconds)
}

/// A number of datagrams, for a median.
fn to_f64(count: u64) -> f64 {
    u32::try_from(count).unwrap_or(u32::MAX).into()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() % 2 {
        0 => (values[middle - 1] + values[middle]) / 2.0,
        _ => values[middle],
    }
}
