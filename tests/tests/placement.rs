//! The placement of the workers. Their affinity in the kernel must be the one that `/v1/devices`
//! reports: that of their vCPUs, also after the vCPUs are pinned to other CPUs, after a CPU goes
//! offline and comes back, and after the cpuset changes. The map from queue pairs to vCPUs must be
//! that of the guest's driver.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use virtionet_guest::net::MODERN;
use virtionet_guest::test_frontend::{TestFrontend, TestFrontendConfig};
use virtionet_tests::counters::{PairCounters, pairs};
use virtionet_tests::cpus::{Cpuset, OfflineCpu};
use virtionet_tests::daemon::{Daemon, Options};
use virtionet_tests::ethtool;
use virtionet_tests::guest::Guest;
use virtionet_tests::iperf::{Direction, IperfLoad};
use virtionet_tests::paths::RunDir;
use virtionet_tests::process::Proc;
use virtionet_tests::sched;
use virtionet_tests::testbed::{Testbed, TestbedConfig};
use virtionet_tests::topology::{GUEST, GUEST_INTERFACE};

/// The time within which a worker must move to the CPU of its vCPU.
const MAX_FOLLOW_TIME: Duration = Duration::from_secs(1);
/// The timeout for steps that have no specified limit.
const TIMEOUT: Duration = Duration::from_secs(10);

#[test]
fn workers_move_with_their_vcpus_and_lose_no_frame() {
    let cpus = sched::allowed_cpus().unwrap();
    if cpus.len() < 2 {
        eprintln!("skipped: this test needs two CPUs");
        return;
    }
    let testbed = TestbedConfig::new(2).start().unwrap();
    let vcpus = testbed.qemu.vcpu_threads().unwrap();
    let pin_and_measure = |turn: usize| {
        for (k, tid) in vcpus.iter().enumerate() {
            sched::pin(*tid, cpus[(k + turn) % 2]).unwrap();
        }
        wait_until_followed(&testbed, &vcpus)
    };
    pin_and_measure(0);

    let drops_before = read_drops(&testbed.daemon.device().unwrap());
    let ping = start_pings(&testbed, 60).unwrap();
    let mut slowest = Duration::ZERO;
    for turn in 1..=6 {
        slowest = slowest.max(pin_and_measure(turn));
        sleep(Duration::from_millis(300));
    }
    assert_all_answered(&testbed, ping, 60).unwrap();
    assert_eq!(read_drops(&testbed.daemon.device().unwrap()), drops_before);

    let iperf = testbed.iperf().unwrap();
    for direction in [Direction::HostToGuest, Direction::GuestToHost] {
        let load = iperf.start(&IperfLoad::tcp(4).flows(4), direction).unwrap();
        for turn in 1..=3 {
            slowest = slowest.max(pin_and_measure(turn));
            sleep(Duration::from_millis(400));
        }
        let report = load.finish().unwrap();
        eprintln!(
            "{direction:?}: {:.2} Gbit/s {:?}",
            report.gbps, report.gbps_by_process
        );
        assert!(
            report.gbps_by_process.iter().all(|gbps| *gbps > 0.0),
            "{report:?}"
        );
    }
    eprintln!("the slowest worker had moved to its vCPU's CPU after {slowest:?}");
    assert!(slowest < MAX_FOLLOW_TIME, "{slowest:?}");
}

#[test]
fn floating_vcpus_are_reported_once_with_the_remedy_and_no_longer_after_pinning() {
    let mut testbed = TestbedConfig::new(2).start().unwrap();
    let cpus = sched::allowed_cpus().unwrap();
    for tid in testbed.qemu.vcpu_threads().unwrap() {
        sched::pin_to(tid, &cpus).unwrap();
    }
    if cpus.len() < 2 {
        eprintln!("skipped: this test needs two CPUs");
        return;
    }
    let has_warning = |device: &Value| device["warnings"].to_string().contains("virsh vcpupin");
    testbed
        .daemon
        .wait_for_device("reported with a warning", TIMEOUT, has_warning)
        .unwrap();
    sleep(Duration::from_secs(2));
    let log = testbed.daemon.stderr();
    assert_eq!(log.matches("virsh vcpupin").count(), 1, "{log}");
    testbed.qemu.pin_vcpus().unwrap();
    let has_no_warning = |device: &Value| !has_warning(device);
    testbed
        .daemon
        .wait_for_device("reported without a warning", TIMEOUT, has_no_warning)
        .unwrap();
}

#[test]
fn worker_busy_polls_only_on_a_cpu_to_which_no_vcpu_is_pinned() {
    let cpus = sched::allowed_cpus().unwrap();
    if cpus.len() < 2 {
        eprintln!("skipped: this test needs two CPUs");
        return;
    }
    let config = TestbedConfig::new(1)
        .vcpus(2)
        .daemon_flag("--poll", "always");
    let mut testbed = config.start().unwrap();
    // A vCPU is pinned to each CPU, so the worker must sleep instead of polling.
    let has_poll_warning = |device: &Value| {
        device["warnings"]
            .to_string()
            .contains("instead of polling")
    };
    testbed
        .daemon
        .wait_for_device("warning about polling", TIMEOUT, has_poll_warning)
        .unwrap();
    assert_polling_stops(&testbed.daemon);
    // One CPU has no vCPU, so the worker must poll there.
    let vcpus = testbed.qemu.vcpu_threads().unwrap();
    for tid in &vcpus {
        sched::pin(*tid, cpus[0]).unwrap();
    }
    let is_on_free_cpu =
        |device: &Value| device["pairs"][0]["cpus"] == serde_json::json!([cpus[1]]);
    let device = testbed
        .daemon
        .wait_for_device("on the CPU without a vCPU", TIMEOUT, is_on_free_cpu)
        .unwrap();
    assert!(!has_poll_warning(
        &testbed
            .daemon
            .wait_for_device("reported without a warning", TIMEOUT, |d| {
                !has_poll_warning(d)
            })
            .unwrap()
    ));
    assert_cpus_as_reported(&device).unwrap();
    assert!(polls_per_second(&testbed.daemon) > 100);
    // A vCPU is pinned to each CPU again.
    testbed.qemu.pin_vcpus().unwrap();
    testbed
        .daemon
        .wait_for_device("warning about polling again", TIMEOUT, has_poll_warning)
        .unwrap();
    assert_polling_stops(&testbed.daemon);
    testbed.network.wait_for_ping(GUEST.v4).unwrap();
}

#[test]
fn placer_of_an_idle_guest_uses_less_than_0_2_percent_of_a_cpu() {
    const INTERVAL: Duration = Duration::from_secs(5);
    let testbed = TestbedConfig::new(4).start().unwrap();
    assert_nodes_reported(&testbed.daemon.device().unwrap());
    let threads = sched::threads(testbed.daemon.pid()).unwrap();
    let placer = threads.iter().find(|(_, name)| name == "placer").unwrap().0;
    let before = read_cpu_time(placer).unwrap();
    sleep(INTERVAL);
    let used = read_cpu_time(placer).unwrap() - before;
    let share = used.as_secs_f64() / INTERVAL.as_secs_f64();
    eprintln!("the placer uses {:.4} % of a CPU", 100.0 * share);
    assert!(share < 0.002, "{used:?} in {INTERVAL:?}");
}

#[test]
fn reported_map_from_pairs_to_vcpus_is_that_of_the_guest() {
    for (vcpus, pair_counts) in [(4, &[4, 3, 2, 1][..]), (2, &[4, 2])] {
        let mut testbed = TestbedConfig::new(4).vcpus(vcpus).start().unwrap();
        for pairs in pair_counts {
            let guest = testbed.qemu.guest();
            ethtool::set_combined(guest, GUEST_INTERFACE, *pairs).unwrap();
            let pairs = usize::try_from(*pairs).unwrap();
            let map = read_guest_map(guest, pairs).unwrap();
            eprintln!("{vcpus} vCPUs, {pairs} pairs: {map:?}");
            let is_same =
                |device: &Value| reported_map(device, pairs).is_ok_and(|reported| reported == map);
            let state = format!("reporting the guest's map of {pairs} pairs, {map:?}");
            let device = testbed
                .daemon
                .wait_for_device(&state, TIMEOUT, is_same)
                .unwrap();
            assert_cpus_as_reported(&device).unwrap();
        }
    }
}

#[test]
fn after_vcpus_are_plugged_in_the_reported_map_is_that_of_the_guest() {
    let mut testbed = TestbedConfig::new(2).max_vcpus(4).start().unwrap();
    let slots = testbed.qemu.qmp("query-hotpluggable-cpus", &Value::Null);
    let slots = slots.unwrap();
    let slots = slots.as_array().unwrap().iter().rev();
    let free_slots = slots.filter(|slot| slot["qom-path"].is_null());
    for (cpu, slot) in (2..).zip(free_slots) {
        let mut device = slot["props"].clone();
        device["driver"] = slot["type"].clone();
        device["id"] = format!("cpu{cpu}").into();
        testbed.qemu.qmp("device_add", &device).unwrap();
        let online = format!("echo 1 > /sys/devices/system/cpu/cpu{cpu}/online");
        let guest = testbed.qemu.guest();
        retry_until_ok(TIMEOUT, || guest.ok(&online).map(|_| ())).unwrap();
    }
    let map = read_guest_map(testbed.qemu.guest(), 2).unwrap();
    assert_eq!(map, [[0, 1], [2, 3]]);
    let is_same = |device: &Value| reported_map(device, 2).is_ok_and(|reported| reported == map);
    let device = testbed
        .daemon
        .wait_for_device("serving 4 vCPUs", TIMEOUT, is_same);
    assert_cpus_as_reported(&device.unwrap()).unwrap();
    testbed.network.wait_for_ping(GUEST.v4).unwrap();
}

#[test]
fn workers_leave_a_cpu_that_is_removed_from_the_cpuset_and_return_when_it_is_added() {
    let cpus = sched::allowed_cpus().unwrap();
    if cpus.len() < 2 {
        eprintln!("skipped: this test needs two CPUs");
        return;
    }
    let mut testbed = TestbedConfig::new(2).start().unwrap();
    let vcpus = testbed.qemu.vcpu_threads().unwrap();
    wait_until_followed(&testbed, &vcpus);
    let both = format!("{},{}", cpus[0], cpus[1]);
    let set = match Cpuset::for_process(testbed.daemon.pid(), &both) {
        Ok(set) => set,
        Err(error) => {
            eprintln!("skipped: {error:#}");
            return;
        }
    };
    wait_until_followed(&testbed, &vcpus);
    let ping = start_pings(&testbed, 40).unwrap();
    for _ in 0..2 {
        set.set_cpus(&cpus[0].to_string()).unwrap();
        let has_moved = |device: &Value| {
            let warnings = device["warnings"].to_string();
            warnings.contains("widen the daemon's cpuset") && are_all_on(device, cpus[0])
        };
        let device = testbed
            .daemon
            .wait_for_device("on the remaining CPU", TIMEOUT, has_moved)
            .unwrap();
        assert_cpus_as_reported(&device).unwrap();
        set.set_cpus(&both).unwrap();
        wait_until_followed(&testbed, &vcpus);
    }
    assert_all_answered(&testbed, ping, 40).unwrap();
}

#[test]
fn workers_leave_a_cpu_that_goes_offline_and_return_when_it_comes_back() {
    let cpus = sched::allowed_cpus().unwrap();
    let Some(&last) = cpus.last().filter(|_| cpus.len() > 1) else {
        eprintln!("skipped: this test needs two CPUs");
        return;
    };
    if let Err(error) = OfflineCpu::check_possible(last) {
        eprintln!("skipped: {error:#}");
        return;
    }
    let testbed = TestbedConfig::new(2).start().unwrap();
    let vcpus = testbed.qemu.vcpu_threads().unwrap();
    wait_until_followed(&testbed, &vcpus);
    // A second daemon has a list of CPUs for its workers.
    let dir = RunDir::new().unwrap();
    let list = format!("list:{},{last}", cpus[0]);
    let options = Options::new().flag("--uplink", "null");
    let mut list_daemon = options
        .flag("--placement", &list)
        .start(&dir, "list")
        .unwrap();
    let _frontend = TestFrontend::connect(
        list_daemon.socket(),
        &TestFrontendConfig::new(2, 256, MODERN),
    )
    .unwrap();
    wait_for_cpus(&mut list_daemon, &[cpus[0], last]);

    let ping = start_pings(&testbed, 50).unwrap();
    let offline = OfflineCpu::set_offline(last).unwrap();
    let started_at = Instant::now();
    wait_for_cpus(&mut list_daemon, &[cpus[0], cpus[0]]);
    eprintln!(
        "the worker has left CPU {last} after {:?}",
        started_at.elapsed()
    );
    let has_warning = |device: &Value| device["warnings"].to_string().contains("is offline");
    list_daemon
        .wait_for_device("reported with a warning", TIMEOUT, has_warning)
        .unwrap();
    retry_until_ok(TIMEOUT, || {
        assert_cpus_as_reported(&testbed.daemon.device()?)
    })
    .unwrap();
    drop(offline);
    let started_at = Instant::now();
    wait_for_cpus(&mut list_daemon, &[cpus[0], last]);
    eprintln!(
        "the worker has returned to CPU {last} after {:?}",
        started_at.elapsed()
    );
    // The daemon reviews its warnings at the next refresh after the workers have moved.
    let has_no_warnings = |device: &Value| device["warnings"] == serde_json::json!([]);
    let left = MAX_FOLLOW_TIME.saturating_sub(started_at.elapsed());
    list_daemon
        .wait_for_device("reported without warnings", left, has_no_warnings)
        .unwrap();
    eprintln!(
        "the daemon reports no warning after {:?}",
        started_at.elapsed()
    );
    assert!(started_at.elapsed() < MAX_FOLLOW_TIME);
    // The kernel removed the offline CPU from the affinity of its vCPU, and does not restore it, so
    // the test pins the vCPU again, as a management program would.
    for (k, tid) in vcpus.iter().enumerate() {
        sched::pin(*tid, cpus[k % cpus.len()]).unwrap();
    }
    wait_until_followed(&testbed, &vcpus);
    assert_all_answered(&testbed, ping, 50).unwrap();
}

/// Waits until the affinity of each worker is that of its vCPU, and then until the daemon reports
/// it. Returns the time until the workers had moved.
fn wait_until_followed(testbed: &Testbed, vcpus: &[i32]) -> Duration {
    let started_at = Instant::now();
    let workers = pairs(&testbed.daemon.device().unwrap()).unwrap();
    let compare_affinities = || {
        for (worker, vcpu) in workers.iter().zip(vcpus) {
            let (actual, expected) = (sched::affinity(worker.tid)?, sched::affinity(*vcpu)?);
            ensure!(
                actual == expected,
                "{} may run on CPUs {actual:?}, but its vCPU on {expected:?}",
                worker.worker
            );
        }
        Ok(())
    };
    retry_until_ok(TIMEOUT, compare_affinities).unwrap();
    let follow_time = started_at.elapsed();
    retry_until_ok(TIMEOUT, || {
        assert_cpus_as_reported(&testbed.daemon.device()?)
    })
    .unwrap();
    follow_time
}

/// Checks that the reported NUMA nodes of each pair's worker and memory exist on the host.
fn assert_nodes_reported(device: &Value) {
    if !std::path::Path::new("/sys/devices/system/node/node0").exists() {
        eprintln!("skipped: this kernel has no NUMA nodes");
        return;
    }
    for pair in device["pairs"].as_array().unwrap() {
        for what in ["worker_node", "memory_node"] {
            let node = pair[what]
                .as_u64()
                .unwrap_or_else(|| panic!("the pair has no {what}: {pair}"));
            let dir = format!("/sys/devices/system/node/node{node}");
            assert!(
                std::fs::exists(&dir).unwrap(),
                "{what} is {node}, but the host has no such node"
            );
        }
    }
}

/// Checks that the affinity of each worker is the one that the device reports.
fn assert_cpus_as_reported(device: &Value) -> Result<()> {
    for PairCounters {
        worker, tid, cpus, ..
    } in pairs(device)?
    {
        let actual = sched::affinity(tid)?;
        ensure!(
            actual == cpus,
            "{worker} may run on CPUs {actual:?}, but the device reports {cpus:?}"
        );
    }
    Ok(())
}

/// Waits until the daemon reports that worker k is pinned to the k-th of `cpus`, and the affinity
/// of the worker is the same.
fn wait_for_cpus(daemon: &mut Daemon, cpus: &[usize]) {
    retry_until_ok(TIMEOUT, || {
        let device = daemon.device()?;
        let reported: Vec<_> = pairs(&device)?.into_iter().map(|pair| pair.cpus).collect();
        let expected: Vec<_> = cpus.iter().map(|cpu| vec![*cpu]).collect();
        ensure!(
            reported == expected,
            "the workers should be on CPUs {expected:?}, but the daemon reports {reported:?}"
        );
        assert_cpus_as_reported(&device)
    })
    .unwrap();
}

/// Returns whether all workers of the device are pinned to `cpu`.
fn are_all_on(device: &Value, cpu: usize) -> bool {
    pairs(device).is_ok_and(|pairs| pairs.iter().all(|pair| pair.cpus == [cpu]))
}

/// Repeats `attempt` until it succeeds, for at most `timeout`.
fn retry_until_ok(timeout: Duration, mut attempt: impl FnMut() -> Result<()>) -> Result<()> {
    let until = Instant::now() + timeout;
    loop {
        match attempt() {
            Ok(()) => return Ok(()),
            Err(error) if Instant::now() >= until => {
                return Err(error.context(format!("the check still fails after {timeout:?}")));
            }
            Err(_) => sleep(Duration::from_millis(5)),
        }
    }
}

/// Starts to send `count` pings to the guest, ten per second.
fn start_pings(testbed: &Testbed, count: u32) -> Result<Proc> {
    let netns = Some(testbed.network.netns().name());
    let count = count.to_string();
    let args = ["ping", "-q", "-i", "0.1", "-W", "5", "-c", &count, GUEST.v4];
    Proc::spawn(&testbed.dir, "ping", netns, "busybox", args)
}

fn assert_all_answered(testbed: &Testbed, mut ping: Proc, count: u32) -> Result<()> {
    ping.wait(Duration::from_secs(60))?;
    let summary = ping.stdout();
    let expected = format!("{count} packets transmitted, {count} packets received");
    let tap = || testbed.network.netns().ip("-s link show tap0");
    ensure!(
        summary.contains(&expected),
        "pings were lost: {summary}; drop counters: {:?}; TAP: {}",
        read_drops(&testbed.daemon.device()?),
        tap()?
    );
    Ok(())
}

/// Returns all drop counters of the rings.
fn read_drops(device: &Value) -> BTreeMap<String, u64> {
    let mut drops = BTreeMap::new();
    for (k, pair) in device["pairs"].as_array().into_iter().flatten().enumerate() {
        for ring in ["rx", "tx"] {
            let counters = pair[ring]["counters"].as_object().into_iter().flatten();
            for (name, count) in counters.filter(|(name, _)| name.starts_with("dropped")) {
                drops.insert(format!("{k} {ring} {name}"), count.as_u64().unwrap_or(0));
            }
        }
    }
    assert!(
        !drops.is_empty(),
        "the device has no drop counters: {device}"
    );
    drops
}

/// Asserts that the first worker stops polling. The report says that it must not poll a moment
/// before the worker reads that, so the first second is allowed to count polls.
fn assert_polling_stops(daemon: &Daemon) {
    if polls_per_second(daemon) > 0 {
        assert_eq!(polls_per_second(daemon), 0);
    }
}

/// Returns how often the first worker polls without finding frames, per second.
fn polls_per_second(daemon: &Daemon) -> u64 {
    let read_polls = || {
        let device = daemon.device().unwrap();
        device["pairs"][0]["worker_counters"]["polls"]
            .as_u64()
            .unwrap()
    };
    let before = read_polls();
    sleep(Duration::from_secs(1));
    read_polls() - before
}

/// Returns the CPU time of thread `tid` (the first field of schedstat).
fn read_cpu_time(tid: i32) -> Result<Duration> {
    let text = std::fs::read_to_string(format!("/proc/{tid}/schedstat"))?;
    let nanoseconds = text.split(' ').next().context("schedstat is empty")?;
    Ok(Duration::from_nanos(nanoseconds.parse()?))
}

/// Returns the vCPUs of each of the first `count` queue pairs that the daemon reports.
fn reported_map(device: &Value, count: usize) -> Result<Vec<Vec<usize>>> {
    let all = pairs(device)?;
    ensure!(
        all.len() >= count,
        "the device has only {} of {count} pairs",
        all.len()
    );
    Ok(all.into_iter().take(count).map(|pair| pair.vcpus).collect())
}

/// Reads the vCPUs of each of the first `count` queue pairs from the guest's kernel. The affinity
/// of both interrupts and the transmit steering (XPS) of a pair must agree.
fn read_guest_map(guest: &Guest, count: usize) -> Result<Vec<Vec<usize>>> {
    let table = guest.ok("cat /proc/interrupts")?;
    (0..count)
        .map(|pair| {
            let mut vcpus = None;
            for ring in ["input", "output"] {
                let name = format!("virtio0-{ring}.{pair}");
                let line = table.lines().find(|line| line.trim_end().ends_with(&name));
                let line =
                    line.with_context(|| format!("the guest has no vector {name}: {table}"))?;
                let irq = line
                    .trim()
                    .split(':')
                    .next()
                    .with_context(|| format!("the vector {name} has no number"))?;
                let list = guest.ok(&format!("cat /proc/irq/{irq}/smp_affinity_list"))?;
                let list = parse_list(list.trim())?;
                let other = vcpus.get_or_insert_with(|| list.clone());
                ensure!(
                    *other == list,
                    "{name} goes to vCPUs {list:?}, but the other vector of the pair to {other:?}"
                );
            }
            let vcpus = vcpus.context("the pair has no vector")?;
            let xps = guest.ok(&format!(
                "cat /sys/class/net/{GUEST_INTERFACE}/queues/tx-{pair}/xps_cpus"
            ))?;
            let xps = parse_mask(xps.trim())?;
            ensure!(
                xps == vcpus,
                "vCPUs {xps:?} transmit on queue {pair}, but its vectors go to {vcpus:?}"
            );
            Ok(vcpus)
        })
        .collect()
}

/// Parses a list such as `0-1,3`.
fn parse_list(list: &str) -> Result<Vec<usize>> {
    let mut cpus = Vec::new();
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        cpus.extend(first.parse::<usize>()?..=last.parse()?);
    }
    Ok(cpus)
}

/// Parses a mask of comma-separated 32-bit words, such as `3` or `00000000,0000000f`.
fn parse_mask(text: &str) -> Result<Vec<usize>> {
    let mut cpus = Vec::new();
    for (word, bits) in text.split(',').rev().enumerate() {
        let bits = u32::from_str_radix(bits, 16)?;
        cpus.extend(
            (0..32)
                .filter(|bit| bits >> bit & 1 == 1)
                .map(|bit| word * 32 + bit),
        );
    }
    Ok(cpus)
}
