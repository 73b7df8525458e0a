//! Measures migrations of one guest, with virtionetd and with QEMU's own network device in turns:
//! the time for which the guest stops, and what TCP carries to the guest before and during a
//! migration. `VIRTIONETD` names the program, the argument is the number of pairs:
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

/// The seconds of each load.
const SECONDS: &str = "3";
const ATTEMPTS: u32 = 10;
/// The bandwidth of the migration after it, in bytes/s.
const FAST: u64 = 1 << 30;
const DOWNTIME_LIMIT_MS: u64 = 30;
/// The bandwidth of the migration during the load, in bytes/s: too little for it to end.
const SLOW: u64 = 1 << 20;

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
            "{name}: downtime {:.0} ms, {:.2} Gbit/s before, {:.2} of that during the migration",
            median(|figures| figures.downtime_ms),
            median(|figures| figures.gbps_before),
            median(|figures| figures.gbps_during / figures.gbps_before),
        );
    }
    Ok(())
}

#[derive(Debug)]
struct Figures {
    downtime_ms: f64,
    gbps_before: f64,
    gbps_during: f64,
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
    let uri = hosts.uri();
    let _dest: Qemu = hosts.expect_guest(&uri)?;
    set_speed(&source, SLOW, 1)?;
    source.qmp("migrate", &json!({"uri": uri}))?;
    wait_for_migration(&source, "active")?;
    let gbps_during = load(&hosts)?;
    wait_for_migration(&source, "active")?;
    // QEMU stops the guest when it expects to carry the rest within this time.
    set_speed(&source, FAST, DOWNTIME_LIMIT_MS)?;
    let migration = wait_for_migration(&source, "completed")?;
    let downtime = migration["downtime"].as_f64();
    Ok(Figures {
        downtime_ms: downtime.context("QEMU reports no downtime")?,
        gbps_before,
        gbps_during,
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

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() % 2 {
        0 => (values[middle - 1] + values[middle]) / 2.0,
        _ => values[middle],
    }
}
