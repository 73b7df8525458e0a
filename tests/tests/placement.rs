//! Workers stand where `/v1/devices` says, as the kernel sees it: beside their
//! vCPUs, also after these were pinned elsewhere, after a CPU went offline and
//! came back, and after the cpuset changed. And the map from queue pairs to
//! vCPUs is the one that the guest's driver made.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use virtionet_guest::net::MODERN;
use virtionet_guest::test_frontend::{TestFrontend, TestFrontendConfig};
use virtionet_tests::counters::{PairCounters, pairs};
use virtionet_tests::cpus::{Cpuset, Offline};
use virtionet_tests::daemon::{Daemon, Options};
use virtionet_tests::ethtool;
use virtionet_tests::guest::Guest;
use virtionet_tests::iperf::{Direction, IperfLoad};
use virtionet_tests::paths::RunDir;
use virtionet_tests::process::Proc;
use virtionet_tests::sched;
use virtionet_tests::testbed::{Testbed, TestbedConfig};
use virtionet_tests::topology::{CARD, GUEST};

/// How soon a worker has to be where its vCPU went.
const MAX_FOLLOW_TIME: Duration = Duration::from_secs(1);
/// For what has no such promise.
const SOON: Duration = Duration::from_secs(10);

#[test]
fn workers_follow_their_vcpus_without_losing_a_frame() {
    let cpus = sched::allowed_cpus().unwrap();
    if cpus.len() < 2 {
        eprintln!("skipped: this test needs two CPUs");
        return;
    }
    let testbed = TestbedConfig::new(2).start().unwrap();
    let vcpus = testbed.qemu.vcpu_threads().unwrap();
    let pin = |turn: usize| {
        for (k, tid) in vcpus.iter().enumerate() {
            sched::pin(*tid, cpus[(k + turn) % 2]).unwrap();
        }
        time_to_follow(&testbed, &vcpus)
    };
    pin(0);

    let dropped = drops(&testbed.daemon.device().unwrap());
    let ping = pings(&testbed, 60).unwrap();
    let mut slowest = Duration::ZERO;
    for turn in 1..=6 {
        slowest = slowest.max(pin(turn));
        sleep(Duration::from_millis(300));
    }
    all_answered(&testbed, ping, 60).unwrap();
    assert_eq!(drops(&testbed.daemon.device().unwrap()), dropped);

    let iperf = testbed.iperf().unwrap();
    for direction in [Direction::HostToGuest, Direction::GuestToHost] {
        let load = iperf.start(&IperfLoad::tcp(4).flows(4), direction).unwrap();
        for turn in 1..=3 {
            slowest = slowest.max(pin(turn));
            sleep(Duration::from_millis(400));
        }
        let report = load.finish().unwrap();
        eprintln!("{direction:?}: {:.2} Gbit/s {:?}", report.gbps, report.each);
        assert!(report.each.iter().all(|gbps| *gbps > 0.0), "{report:?}");
    }
    eprintln!("the slowest worker was with its vCPU after {slowest:?}");
    assert!(slowest < MAX_FOLLOW_TIME, "{slowest:?}");
}

#[test]
fn a_wrong_placement_is_reported_once_with_the_remedy() {
    let mut testbed = TestbedConfig::new(2).start().unwrap();
    let cpus = sched::allowed_cpus().unwrap();
    for tid in testbed.qemu.vcpu_threads().unwrap() {
        sched::pin_to(tid, &cpus).unwrap();
    }
    if cpus.len() < 2 {
        eprintln!("skipped: on one CPU nothing floats");
        return;
    }
    let has_warning = |device: &Value| device["warnings"].to_string().contains("virsh vcpupin");
    testbed
        .daemon
        .wait_device("warned of", SOON, has_warning)
        .unwrap();
    sleep(Duration::from_secs(2));
    let log = testbed.daemon.stderr();
    assert_eq!(log.matches("virsh vcpupin").count(), 1, "{log}");
    testbed.qemu.pin_vcpus().unwrap();
    let without_warning = |device: &Value| !has_warning(device);
    testbed
        .daemon
        .wait_device("content", SOON, without_warning)
        .unwrap();
}

#[test]
fn a_worker_polls_only_where_no_vcpu_is_pinned() {
    let cpus = sched::allowed_cpus().unwrap();
    if cpus.len() < 2 {
        eprintln!("skipped: this test needs two CPUs");
        return;
    }
    let plan = TestbedConfig::new(1)
        .vcpus(2)
        .daemon_flag("--poll", "always");
    let mut testbed = plan.start().unwrap();
    // Both CPUs have a vCPU: the worker sleeps beside its own.
    let asleep = |device: &Value| {
        device["warnings"]
            .to_string()
            .contains("instead of polling")
    };
    testbed
        .daemon
        .wait_device("asked to sleep", SOON, asleep)
        .unwrap();
    assert_eq!(polls_a_second(&testbed.daemon), 0);
    // One CPU is free: it polls there.
    let vcpus = testbed.qemu.vcpu_threads().unwrap();
    for tid in &vcpus {
        sched::pin(*tid, cpus[0]).unwrap();
    }
    let free = |device: &Value| device["pairs"][0]["cpus"] == serde_json::json!([cpus[1]]);
    let device = testbed
        .daemon
        .wait_device("on the free CPU", SOON, free)
        .unwrap();
    assert!(!asleep(
        &testbed
            .daemon
            .wait_device("content", SOON, |d| !asleep(d))
            .unwrap()
    ));
    assert_cpus_as_reported(&device).unwrap();
    assert!(polls_a_second(&testbed.daemon) > 100);
    // And there is none again.
    testbed.qemu.pin_vcpus().unwrap();
    testbed
        .daemon
        .wait_device("asked to sleep again", SOON, asleep)
        .unwrap();
    assert_eq!(polls_a_second(&testbed.daemon), 0);
    testbed.network.wait_for_ping(GUEST.v4).unwrap();
}

#[test]
fn following_an_idle_guest_costs_next_to_nothing() {
    const WHILE: Duration = Duration::from_secs(5);
    let testbed = TestbedConfig::new(4).start().unwrap();
    assert_nodes_reported(&testbed.daemon.device().unwrap());
    let threads = sched::threads(testbed.daemon.pid()).unwrap();
    let placer = threads.iter().find(|(_, name)| name == "placer").unwrap().0;
    let before = time_on_cpu(placer).unwrap();
    sleep(WHILE);
    let took = time_on_cpu(placer).unwrap() - before;
    let share = took.as_secs_f64() / WHILE.as_secs_f64();
    eprintln!("following takes {:.4} % of a CPU", 100.0 * share);
    assert!(share < 0.002, "{took:?} in {WHILE:?}");
}

#[test]
fn the_map_from_pairs_to_vcpus_is_the_guests_own() {
    // Guest with 4 vCPUs, then with 2.
    for (vcpus, uses) in [(4, &[4, 3, 2, 1][..]), (2, &[4, 2])] {
        let mut testbed = TestbedConfig::new(4).vcpus(vcpus).start().unwrap();
        for pairs in uses {
            let guest = testbed.qemu.guest();
            ethtool::set_combined(guest, CARD, *pairs).unwrap();
            let pairs = usize::try_from(*pairs).unwrap();
            let real = guest_map(guest, pairs).unwrap();
            eprintln!("{vcpus} vCPUs, {pairs} pairs: {real:?}");
            let same =
                |device: &Value| reported_map(device, pairs).is_ok_and(|reported| reported == real);
            let what = format!("serving {pairs} pairs as the guest does, {real:?}");
            let device = testbed.daemon.wait_device(&what, SOON, same).unwrap();
            assert_cpus_as_reported(&device).unwrap();
        }
    }
}

#[test]
fn vcpus_that_are_plugged_in_are_served_as_the_guest_does() {
    let mut testbed = TestbedConfig::new(2).max_vcpus(4).start().unwrap();
    let slots = testbed.qemu.qmp("query-hotpluggable-cpus", &Value::Null);
    let slots = slots.unwrap();
    let free = slots.as_array().unwrap().iter().rev();
    for (cpu, slot) in (2..).zip(free.filter(|slot| slot["qom-path"].is_null())) {
        let mut device = slot["props"].clone();
        device["driver"] = slot["type"].clone();
        device["id"] = format!("cpu{cpu}").into();
        testbed.qemu.qmp("device_add", &device).unwrap();
        let online = format!("echo 1 > /sys/devices/system/cpu/cpu{cpu}/online");
        let guest = testbed.qemu.guest();
        eventually(SOON, || guest.ok(&online).map(|_| ())).unwrap();
    }
    let real = guest_map(testbed.qemu.guest(), 2).unwrap();
    assert_eq!(real, [[0, 1], [2, 3]]);
    let same = |device: &Value| reported_map(device, 2).is_ok_and(|reported| reported == real);
    let device = testbed.daemon.wait_device("serving 4 vCPUs", SOON, same);
    assert_cpus_as_reported(&device.unwrap()).unwrap();
    testbed.network.wait_for_ping(GUEST.v4).unwrap();
}

#[test]
fn a_shrinking_cpuset_takes_the_workers_along_and_a_growing_one_back() {
    let cpus = sched::allowed_cpus().unwrap();
    if cpus.len() < 2 {
        eprintln!("skipped: this test needs two CPUs");
        return;
    }
    let mut testbed = TestbedConfig::new(2).start().unwrap();
    let vcpus = testbed.qemu.vcpu_threads().unwrap();
    time_to_follow(&testbed, &vcpus);
    let both = format!("{},{}", cpus[0], cpus[1]);
    let set = match Cpuset::for_process(testbed.daemon.pid(), &both) {
        Ok(set) => set,
        Err(why) => {
            eprintln!("skipped: {why:#}");
            return;
        }
    };
    time_to_follow(&testbed, &vcpus);
    let ping = pings(&testbed, 40).unwrap();
    for _ in 0..2 {
        set.change(&cpus[0].to_string()).unwrap();
        let has_moved = |device: &Value| {
            let warnings = device["warnings"].to_string();
            warnings.contains("widen the daemon's cpuset") && all_on(device, cpus[0])
        };
        let device = testbed
            .daemon
            .wait_device("on the CPU left", SOON, has_moved)
            .unwrap();
        assert_cpus_as_reported(&device).unwrap();
        set.change(&both).unwrap();
        time_to_follow(&testbed, &vcpus);
    }
    all_answered(&testbed, ping, 40).unwrap();
}

#[test]
fn a_cpu_that_goes_offline_and_comes_back_finds_its_workers_again() {
    let cpus = sched::allowed_cpus().unwrap();
    let Some(&last) = cpus.last().filter(|_| cpus.len() > 1) else {
        eprintln!("skipped: this test needs two CPUs");
        return;
    };
    if let Err(why) = Offline::check_possible(last) {
        eprintln!("skipped: {why:#}");
        return;
    }
    let testbed = TestbedConfig::new(2).start().unwrap();
    let vcpus = testbed.qemu.vcpu_threads().unwrap();
    time_to_follow(&testbed, &vcpus);
    // Beside the guest's, a daemon with a list of CPUs for its workers.
    let dir = RunDir::new().unwrap();
    let list = format!("list:{},{last}", cpus[0]);
    let options = Options::new().flag("--uplink", "null");
    let mut listed = options
        .flag("--placement", &list)
        .start(&dir, "list")
        .unwrap();
    let _card =
        TestFrontend::connect(listed.socket(), &TestFrontendConfig::new(2, 256, MODERN)).unwrap();
    wait_for_cpu(&mut listed, &[cpus[0], last]);

    let ping = pings(&testbed, 50).unwrap();
    let offline = Offline::set_offline(last).unwrap();
    let started_at = Instant::now();
    wait_for_cpu(&mut listed, &[cpus[0], cpus[0]]);
    eprintln!("away from CPU {last} after {:?}", started_at.elapsed());
    let warned = |device: &Value| device["warnings"].to_string().contains("is offline");
    listed.wait_device("warned of", SOON, warned).unwrap();
    eventually(SOON, || assert_cpus_as_reported(&testbed.daemon.device()?)).unwrap();
    drop(offline);
    let started_at = Instant::now();
    wait_for_cpu(&mut listed, &[cpus[0], last]);
    eprintln!("back on CPU {last} after {:?}", started_at.elapsed());
    // The daemon reviews its warnings at its next look after the workers have moved.
    let content = |device: &Value| device["warnings"] == serde_json::json!([]);
    let left = MAX_FOLLOW_TIME.saturating_sub(started_at.elapsed());
    listed.wait_device("content", left, content).unwrap();
    eprintln!("without a warning after {:?}", started_at.elapsed());
    assert!(started_at.elapsed() < MAX_FOLLOW_TIME);
    // The kernel took the vCPU off its CPU and does not put it back: a manager would.
    for (k, tid) in vcpus.iter().enumerate() {
        sched::pin(*tid, cpus[k % cpus.len()]).unwrap();
    }
    time_to_follow(&testbed, &vcpus);
    all_answered(&testbed, ping, 50).unwrap();
}

/// Waits until each worker is where its vCPU's thread is, as the kernel says;
/// how long that took.
fn time_to_follow(testbed: &Testbed, vcpus: &[i32]) -> Duration {
    let started_at = Instant::now();
    let workers = pairs(&testbed.daemon.device().unwrap()).unwrap();
    let there = || {
        for (worker, vcpu) in workers.iter().zip(vcpus) {
            let (is, goal) = (sched::affinity(worker.tid)?, sched::affinity(*vcpu)?);
            ensure!(
                is == goal,
                "{} is on CPUs {is:?}, its vCPU on {goal:?}",
                worker.worker
            );
        }
        Ok(())
    };
    eventually(SOON, there).unwrap();
    let took = started_at.elapsed();
    eventually(SOON, || assert_cpus_as_reported(&testbed.daemon.device()?)).unwrap();
    took
}

/// Each pair's worker and memory are on a NUMA node that the host has.
fn assert_nodes_reported(device: &Value) {
    if !std::path::Path::new("/sys/devices/system/node/node0").exists() {
        eprintln!("skipped: this kernel has no NUMA nodes");
        return;
    }
    for pair in device["pairs"].as_array().unwrap() {
        for what in ["worker_node", "memory_node"] {
            let node = pair[what]
                .as_u64()
                .unwrap_or_else(|| panic!("no {what} in {pair}"));
            let dir = format!("/sys/devices/system/node/node{node}");
            assert!(std::fs::exists(&dir).unwrap(), "{what} {node} is not there");
        }
    }
}

/// The kernel has each worker of the device on the CPUs that it names.
fn assert_cpus_as_reported(device: &Value) -> Result<()> {
    for PairCounters {
        worker, tid, cpus, ..
    } in pairs(device)?
    {
        let is = sched::affinity(tid)?;
        ensure!(
            is == cpus,
            "{worker} is on CPUs {is:?}, not on {cpus:?} as reported"
        );
    }
    Ok(())
}

/// Waits until worker k is on the k-th of `cpus`, as the daemon reports and as the kernel says.
fn wait_for_cpu(daemon: &mut Daemon, cpus: &[usize]) {
    eventually(SOON, || {
        let device = daemon.device()?;
        let reported: Vec<_> = pairs(&device)?.into_iter().map(|pair| pair.cpus).collect();
        let goal: Vec<_> = cpus.iter().map(|cpu| vec![*cpu]).collect();
        ensure!(
            reported == goal,
            "workers are on CPUs {reported:?}, not on {goal:?}"
        );
        assert_cpus_as_reported(&device)
    })
    .unwrap();
}

fn all_on(device: &Value, cpu: usize) -> bool {
    pairs(device).is_ok_and(|pairs| pairs.iter().all(|pair| pair.cpus == [cpu]))
}

fn eventually(limit: Duration, mut holds: impl FnMut() -> Result<()>) -> Result<()> {
    let until = Instant::now() + limit;
    loop {
        match holds() {
            Ok(()) => return Ok(()),
            Err(why) if Instant::now() >= until => {
                return Err(why.context(format!("after {limit:?}")));
            }
            Err(_) => sleep(Duration::from_millis(5)),
        }
    }
}

/// Starts `count` pings of the guest, ten a second.
fn pings(testbed: &Testbed, count: u32) -> Result<Proc> {
    let netns = Some(testbed.network.netns().name());
    let count = count.to_string();
    let args = ["ping", "-q", "-i", "0.1", "-W", "5", "-c", &count, GUEST.v4];
    Proc::spawn(&testbed.dir, "ping", netns, "busybox", args)
}

fn all_answered(testbed: &Testbed, mut ping: Proc, count: u32) -> Result<()> {
    ping.wait(Duration::from_secs(60))?;
    let said = ping.stdout();
    let all = format!("{count} packets transmitted, {count} packets received");
    let tap = || testbed.network.netns().ip("-s link show tap0");
    ensure!(
        said.contains(&all),
        "pings were lost: {said}; {:?}; {}",
        drops(&testbed.daemon.device()?),
        tap()?
    );
    Ok(())
}

/// All that the rings' counters say was dropped.
fn drops(device: &Value) -> BTreeMap<String, u64> {
    let mut drops = BTreeMap::new();
    for (k, pair) in device["pairs"].as_array().into_iter().flatten().enumerate() {
        for ring in ["rx", "tx"] {
            let counters = pair[ring]["counters"].as_object().into_iter().flatten();
            for (name, count) in counters.filter(|(name, _)| name.starts_with("dropped")) {
                drops.insert(format!("{k} {ring} {name}"), count.as_u64().unwrap_or(0));
            }
        }
    }
    assert!(!drops.is_empty(), "no counter of drops in {device}");
    drops
}

/// How often the first worker looks for frames in vain, in a second.
fn polls_a_second(daemon: &Daemon) -> u64 {
    let polls = || {
        let device = daemon.device().unwrap();
        device["pairs"][0]["worker_counters"]["polls"]
            .as_u64()
            .unwrap()
    };
    let before = polls();
    sleep(Duration::from_secs(1));
    polls() - before
}

/// The time that thread `tid` has been running (schedstat's first field).
fn time_on_cpu(tid: i32) -> Result<Duration> {
    let text = std::fs::read_to_string(format!("/proc/{tid}/schedstat"))?;
    let nanoseconds = text.split(' ').next().context("an empty schedstat")?;
    Ok(Duration::from_nanos(nanoseconds.parse()?))
}

/// By queue pair: its vCPUs, as the daemon tells.
fn reported_map(device: &Value, count: usize) -> Result<Vec<Vec<usize>>> {
    let all = pairs(device)?;
    ensure!(all.len() >= count, "{} pairs", all.len());
    Ok(all.into_iter().take(count).map(|pair| pair.vcpus).collect())
}

/// By queue pair: its vCPUs, as the guest's kernel has set both its interrupts
/// and, where it sets any, its transmit steering.
fn guest_map(guest: &Guest, count: usize) -> Result<Vec<Vec<usize>>> {
    let table = guest.ok("cat /proc/interrupts")?;
    (0..count)
        .map(|pair| {
            let mut vcpus = None;
            for ring in ["input", "output"] {
                let name = format!("virtio0-{ring}.{pair}");
                let line = table.lines().find(|line| line.trim_end().ends_with(&name));
                let line = line.with_context(|| format!("no vector {name} in {table}"))?;
                let irq = line.trim().split(':').next().context("no number")?;
                let list = guest.ok(&format!("cat /proc/irq/{irq}/smp_affinity_list"))?;
                let list = cpulist(list.trim())?;
                let same = vcpus.get_or_insert_with(|| list.clone());
                ensure!(
                    *same == list,
                    "{name} is on {list:?}, its other vector on {same:?}"
                );
            }
            let vcpus = vcpus.context("no vector")?;
            let xps = guest.ok(&format!(
                "cat /sys/class/net/{CARD}/queues/tx-{pair}/xps_cpus"
            ))?;
            let xps = mask(xps.trim())?;
            ensure!(
                xps == vcpus,
                "queue {pair} sends for {xps:?}, its vectors are on {vcpus:?}"
            );
            Ok(vcpus)
        })
        .collect()
}

/// Reads `0-1,3`.
fn cpulist(list: &str) -> Result<Vec<usize>> {
    let mut cpus = Vec::new();
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        cpus.extend(first.parse::<usize>()?..=last.parse()?);
    }
    Ok(cpus)
}

/// Reads a mask in the kernel's words of 32 bits, such as `3` or `00000000,0000000f`.
fn mask(text: &str) -> Result<Vec<usize>> {
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
