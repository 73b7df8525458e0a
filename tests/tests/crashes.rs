//! Daemons that end again and again, killed and terminated in turn, at random instants, while
//! iperf3 sends both ways: with split and packed virtqueues, in both socket roles, on a persistent
//! TAP and on a switch. Each time the next daemon must carry frames soon, and at the end no
//! connection is lost, the guest has not rebooted, and the daemon takes as much memory as the first
//! one.
//!
//! `CRASHES` says how often each daemon ends (default: 2). `ci/test crashes` runs it with 100.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use virtionet_tests::attachment::Attachment;
use virtionet_tests::iperf::{Clients, Direction, Iperf, IperfLoad};
use virtionet_tests::procfs::private_memory_kib;
use virtionet_tests::random::Random;
use virtionet_tests::settings::{number, seed};
use virtionet_tests::testbed::{Testbed, TestbedConfig};
use virtionet_tests::topology::{GUEST, HostNetwork};

const PAIRS: u16 = 2;
const DEFAULT_CRASHES: u64 = 2;
/// The pause of QEMU before it connects again, in milliseconds.
const RECONNECT_MS: u32 = 100;
/// The longest time from the start of the next daemon to the first answer of the guest. Most of it is
/// the guest's: QEMU takes the link down and up, and Linux looks at its carrier once a second. An
/// emulated guest on a busy machine is late.
const MAX_RECOVERY: Duration = Duration::from_secs(5);
/// What the memory of a daemon may differ from that of the first one, in KiB.
const MEMORY_TOLERANCE_KIB: u64 = 1024;

#[test]
fn guest_with_split_virtqueues_on_a_tap_outlives_every_daemon() {
    check(Attachment::SPLIT_ON_TAP).unwrap();
}

#[test]
fn guest_with_packed_virtqueues_on_a_tap_outlives_every_daemon() {
    check(Attachment::PACKED_ON_TAP).unwrap();
}

#[test]
fn guest_with_split_virtqueues_on_a_switch_outlives_every_daemon() {
    check(Attachment::SPLIT_ON_SWITCH).unwrap();
}

#[test]
fn guest_with_packed_virtqueues_on_a_switch_outlives_every_daemon() {
    check(Attachment::PACKED_ON_SWITCH).unwrap();
}

fn config(attachment: Attachment) -> TestbedConfig {
    let config = attachment.config(PAIRS);
    config.persistent_tap().reconnect_ms(RECONNECT_MS)
}

/// QEMU knows where split vrings stopped, and the last daemon knew it of packed ones.
fn check_counters(attachment: Attachment, device: &Value) -> Result<()> {
    let corrected = counter_sum(device, "base_corrected");
    let implausible = counter_sum(device, "base_implausible");
    ensure!(
        (corrected > 0) == attachment.is_packed && implausible == 0,
        "{corrected} bases were corrected, {implausible} implausible"
    );
    Ok(())
}

fn check(attachment: Attachment) -> Result<()> {
    let crashes = number("CRASHES", DEFAULT_CRASHES)?;
    let seed = seed("CRASH_SEED")?;
    eprintln!("{attachment:?}: {crashes} ends, CRASH_SEED={seed}");
    let mut testbed = config(attachment).start()?;
    end_daemons(attachment, &mut testbed, crashes, seed).map_err(|error| {
        let device = testbed.daemon.device();
        let log = testbed.daemon.proc().stderr();
        error.context(format!("{device:#?}\n{log}"))
    })
}

fn end_daemons(
    attachment: Attachment,
    testbed: &mut Testbed,
    crashes: u64,
    seed: u64,
) -> Result<()> {
    let config = config(attachment);
    let boot = boot_id(testbed)?;
    let memory_before = private_memory_kib(testbed.daemon.pid())?;
    let mut random = Random::new(seed, 0);
    let mut recoveries = Vec::new();
    for (n, direction) in [Direction::HostToGuest, Direction::GuestToHost]
        .into_iter()
        .enumerate()
    {
        let ends = (crashes + u64::from(n == 0)) / 2;
        recoveries.extend(check_under_load(
            &config,
            testbed,
            direction,
            ends,
            &mut random,
        )?);
    }
    recoveries.sort_unstable();
    eprintln!(
        "{attachment:?}: recovered within {:?} (median), {:?} (longest)",
        recoveries[recoveries.len() / 2],
        recoveries.last()
    );
    ensure!(boot_id(testbed)? == boot, "the guest rebooted");
    check_counters(attachment, &testbed.daemon.device()?)?;
    let memory = private_memory_kib(testbed.daemon.pid())?;
    ensure!(
        memory.abs_diff(memory_before) <= MEMORY_TOLERANCE_KIB,
        "the last daemon takes {memory} KiB, and the first one took {memory_before} KiB"
    );
    testbed.move_data_both_ways()
}

/// The sum of a counter over all vrings of a device.
fn counter_sum(device: &Value, counter: &str) -> u64 {
    let pairs = device["pairs"].as_array().into_iter().flatten();
    pairs
        .flat_map(|pair| [&pair["rx"], &pair["tx"]])
        .filter_map(|vring| vring["counters"][counter].as_u64())
        .sum()
}

/// Ends the daemon `ends` times while iperf3 sends in `direction`. Returns how long the guest took to
/// answer each time.
fn check_under_load(
    config: &TestbedConfig,
    testbed: &mut Testbed,
    direction: Direction,
    ends: u64,
    random: &mut Random,
) -> Result<Vec<Duration>> {
    let (network, guest, dir) = (&testbed.network, testbed.qemu.guest(), &testbed.dir);
    let iperf = Iperf::new(network, guest, dir, Clients::Host, PAIRS)?;
    // As long as the ends can take, and then some.
    let load = IperfLoad::tcp(u32::try_from(ends * 3 + 3)?).flows(PAIRS);
    let mut load = iperf.start(&load, direction)?;
    let mut recoveries = Vec::new();
    for n in 0..ends {
        sleep(Duration::from_millis(random.range(300, 1300)));
        let signal = match n % 2 {
            0 => Signal::SIGKILL,
            _ => Signal::SIGTERM,
        };
        let stopped = testbed.daemon.stop_in_place(signal)?;
        ensure!(
            signal == Signal::SIGKILL || stopped.status.success(),
            "{stopped:?}"
        );
        testbed.daemon = config.start_daemon(network, dir)?;
        recoveries.push(recovery(network, signal).with_context(|| format!("end {n}"))?);
    }
    ensure!(
        !load.is_finished()?,
        "the load ended before the daemons did"
    );
    let report = load.finish()?;
    ensure!(
        report.gbps_by_process.iter().all(|gbps| *gbps > 0.0),
        "a connection was lost: {report:?}"
    );
    Ok(recoveries)
}

/// How long the guest takes to answer.
fn recovery(network: &HostNetwork, signal: Signal) -> Result<Duration> {
    let started_at = Instant::now();
    let wait = format!(
        "for i in $(seq 200); do timeout 0.2 busybox ping -c 1 {} >/dev/null && exit; done; exit 1",
        GUEST.v4
    );
    network
        .netns()
        .run("bash", ["-c", &wait])
        .with_context(|| format!("the guest does not answer after {signal}"))?;
    let took = started_at.elapsed();
    ensure!(
        took <= MAX_RECOVERY,
        "the guest answered {took:?} after {signal}"
    );
    Ok(took)
}

/// The number that the guest's kernel chose when it booted.
fn boot_id(testbed: &Testbed) -> Result<String> {
    let guest = testbed.qemu.guest();
    guest.ok("cat /proc/sys/kernel/random/boot_id")
}
