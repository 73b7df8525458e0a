//! A vring that has stopped is not written to: from the reply to GET_VRING_BASE on, its memory stays
//! as it is, though its driver kicks, other vrings carry frames and more frames arrive for it.
//!
//! `STOPS=N` stops all vrings of each kind of device N times. `STOP_SEED` repeats a run.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use virtionet_tests::quantile::quantile;
use virtionet_tests::random::Random;
use virtionet_tests::settings::{number, seed};
use virtionet_tests::traffic::reply_watch::ReplyWatch;
use virtionet_tests::traffic::testbed::{Setup, TrafficTestbed};
use virtionet_tests::traffic::{End, Traffic};
use virtionet_tests::wake_chain::WakeChain;

const PAIRS: u16 = 2;
const DEFAULT_STOPS: u64 = 4;
/// The frames of a flow that are sent at once.
const BURST: u64 = 8;
/// How long each device may take to write to memory that is observed.
const CONTROL_TIMEOUT: Duration = Duration::from_secs(5);

#[test]
fn guest_memory_is_unchanged_after_get_vring_base() {
    for setup in Setup::all(PAIRS) {
        check(setup).unwrap();
    }
}

fn check(setup: Setup) -> Result<()> {
    let stops = number("STOPS", DEFAULT_STOPS)?;
    let seed = seed("STOP_SEED")?;
    eprintln!("{setup:?}: {stops} stops, STOP_SEED={seed}");
    let testbed = TrafficTestbed::start(setup)?;
    let mut traffic = testbed.connect()?;
    check_ranges(&traffic)?;
    let mut random = Random::new(seed, 0);
    let watch = ReplyWatch::start()?;
    let chain = WakeChain::start(1)?;
    let (mut reply_times, mut wake_times) = (Vec::new(), Vec::new());
    for n in 0..stops {
        let device = usize::try_from(n)? % traffic.device_count();
        let load = Duration::from_micros(random.range(1_000, 20_000));
        traffic.exchange_for(BURST, load)?;
        check_load(&mut traffic, device)?;
        for _ in 0..traffic.vring_count(device) {
            traffic.exchange_for(BURST, Duration::from_millis(1))?;
            wake_times.push(chain.measure(|| traffic.exchange(BURST))?);
        }
        let times = stop_and_compare(&mut traffic, device, &mut random, &watch);
        reply_times.extend(times.map_err(|error| error.context(testbed.daemon.stderr()))?);
    }
    for (what, times) in [
        ("replies to GET_VRING_BASE", &mut reply_times),
        ("bare wake-ups of a thread", &mut wake_times),
    ] {
        eprintln!(
            "{setup:?}: {} {what} under load: {:.0?} (median), {:.0?} (p99), {:.0?} (longest)",
            times.len(),
            quantile(times, 0.5),
            quantile(times, 0.99),
            quantile(times, 1.0),
        );
    }
    // Where a vring stops, its frames wait, or are dropped by the TAP; none is sent twice.
    let repeated: u64 = traffic.flows.iter().map(|flow| flow.check.repeated).sum();
    ensure!(repeated == 0, "{}", traffic.describe());
    Ok(())
}

/// No memory belongs to two vrings.
fn check_ranges(traffic: &Traffic) -> Result<()> {
    for device in 0..traffic.device_count() {
        let ranges = (0..traffic.vring_count(device)).flat_map(|n| traffic.vring_ranges(device, n));
        let mut ranges: Vec<_> = ranges.collect();
        ranges.sort_unstable_by_key(|range| range.start);
        let is_apart = ranges.windows(2).all(|two| two[0].end <= two[1].start);
        ensure!(is_apart, "{ranges:x?}");
    }
    Ok(())
}

/// Shows that the comparison can fail: while the driver does nothing, the memory of a receiveq changes
/// by the frames that the device writes to it. That of a transmitq also changes by the driver, so there
/// the used chains show it.
fn check_load(traffic: &mut Traffic, device: usize) -> Result<()> {
    for vring in 0..traffic.vring_count(device) {
        let until = Instant::now() + CONTROL_TIMEOUT;
        while !is_written_to(traffic, device, vring)? {
            ensure!(
                Instant::now() < until,
                "vring {vring} of device {device} is not written to under load: {}",
                traffic.describe()
            );
        }
    }
    Ok(())
}

fn is_written_to(traffic: &mut Traffic, device: usize, vring: usize) -> Result<bool> {
    let (used, before) = (
        traffic.used(device, vring),
        memory_hash(traffic, device, vring)?,
    );
    let pair = vring / 2;
    let end = End::Driver { device, pair };
    let is_transmitq = vring % 2 == 1;
    traffic.send_where(BURST, |flow| match is_transmitq {
        true => flow.source == end,
        false => flow.target == end,
    })?;
    std::thread::sleep(Duration::from_millis(1));
    let after = memory_hash(traffic, device, vring)?;
    traffic.exchange(BURST)?;
    Ok(before != after && traffic.used(device, vring) > used)
}

fn memory_hash(traffic: &Traffic, device: usize, vring: usize) -> Result<u64> {
    Ok(hash(&traffic.vring_memory(device, vring)?))
}

/// Stops the vrings of a device one after the other, compares their memory, and starts them again.
fn stop_and_compare(
    traffic: &mut Traffic,
    device: usize,
    random: &mut Random,
    watch: &ReplyWatch,
) -> Result<Vec<Duration>> {
    let count = traffic.vring_count(device);
    let first = usize::try_from(random.range(0, u64::try_from(count)? - 1))?;
    let (mut bases, mut memory, mut reply_times) = (Vec::new(), Vec::new(), Vec::new());
    for n in 0..count {
        let vring = (first + n) % count;
        let (base, reply_time) = traffic.stop_vring(device, vring, BURST, watch)?;
        memory.push((vring, traffic.vring_memory(device, vring)?));
        bases.push((vring, base));
        reply_times.push(reply_time);
        let others = Duration::from_micros(random.range(0, 2_000));
        traffic.exchange_for(BURST, others)?;
        compare(traffic, device, &memory)?;
    }
    let whole = traffic.whole_memory(device)?;
    let wait = Duration::from_millis(random.range(50, 100));
    traffic.exchange_for(BURST, wait)?;
    compare(traffic, device, &memory)?;
    let after = traffic.whole_memory(device)?;
    ensure!(
        hash(&whole) == hash(&after),
        "the memory of device {device} has changed {wait:?} after all its vrings stopped: {:x?}",
        changes(&whole, &after)
    );
    traffic.restart(device, &bases)?;
    // What was sent to stopped vrings.
    traffic.give_up();
    Ok(reply_times)
}

/// Compares the memory of stopped vrings with what it was when the reply came.
fn compare(traffic: &Traffic, device: usize, memory: &[(usize, Vec<u8>)]) -> Result<()> {
    for (vring, before) in memory {
        let after = traffic.vring_memory(device, *vring)?;
        ensure!(
            hash(before) == hash(&after),
            "vring {vring} of device {device} was written to after the reply to GET_VRING_BASE, at these bytes of its memory: {:x?}",
            changes(before, &after)
        );
    }
    Ok(())
}

fn hash(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}

/// The first offsets at which two memories differ.
fn changes(before: &[u8], after: &[u8]) -> Vec<usize> {
    let pairs = before.iter().zip(after).enumerate();
    let changed = pairs.filter(|(_, (before, after))| before != after);
    changed.map(|(offset, _)| offset).take(16).collect()
}
