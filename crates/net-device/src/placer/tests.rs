//! The decisions of a placer, with this process as the front-end.

use super::*;
use crate::testing::{ONE_TEST_WITH_VCPUS_AT_A_TIME, start_vcpu};
use std::time::Duration;
use virtionet_placement::Placement;

fn me() -> Option<i32> {
    i32::try_from(std::process::id()).ok()
}

/// Does what the start of the worker of `pair` and the thread `placer` do.
fn decide(placer: &Arc<Placer>, pair: u16) -> Decision {
    placer.request(pair);
    placer.update();
    placer.published().decision(pair).unwrap().clone()
}

fn refresh_until(placer: &Arc<Placer>, changed: impl Fn() -> bool) {
    let until = Instant::now() + Duration::from_secs(20);
    while !changed() {
        placer.refresh();
        assert!(Instant::now() < until);
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// This process acts as the front-end. Its vCPUs appear late, move, and are added and removed.
#[test]
fn decisions_change_with_the_vcpus() {
    let _guard = ONE_TEST_WITH_VCPUS_AT_A_TIME.lock();
    let host = Arc::new(HostCpus::read().unwrap());
    let cpus = host.allowed();
    let planner = PlacementPlanner::new(Placement::Auto, cpus.clone(), None).unwrap();
    let placer = Arc::new(Placer::new("test", planner, host));
    assert!(!placer.refresh(), "no front-end is connected");
    placer.connected(me());
    placer.set_active_pairs(2);
    let blind = decide(&placer, 1);
    assert_eq!((blind.vcpu_tid, &blind.cpus), (None, &cpus), "{blind}");
    assert!(matches!(
        placer.warnings()[..],
        [Warning::Unknown { .. }, ..]
    ));

    // The threads get their names.
    let (first, ends_first, thread) = start_vcpu(0);
    refresh_until(&placer, || decide(&placer, 0).vcpu_tid == Some(first));
    assert_eq!(
        decide(&placer, 1).vcpu_tid,
        Some(first),
        "one vCPU for both pairs"
    );

    // The first vCPU is pinned to another CPU.
    for turn in [1, 0] {
        let there = cpus.nth_cyclic(turn);
        virtionet_placement::set_thread_affinity(Some(first), &there).unwrap();
        let before = placer.published().generation;
        assert!(placer.refresh() || cpus.len() == 1);
        assert!(placer.published().generation != before || cpus.len() == 1);
        assert_eq!(decide(&placer, 0).cpus, there);
        assert_eq!(
            decide(&placer, 7).cpus,
            there,
            "also for a pair that is not in use"
        );
    }

    // Another vCPU is added and removed.
    let (second, ends_second, other) = start_vcpu(1);
    refresh_until(&placer, || decide(&placer, 1).vcpu_tid == Some(second));
    drop(ends_second);
    other.join().unwrap();
    refresh_until(&placer, || decide(&placer, 1).vcpu_tid == Some(first));

    placer.disconnected();
    assert_eq!(placer.warnings(), []);
    assert!(!placer.is_connected());
    drop(ends_first);
    thread.join().unwrap();
}

/// A changed number of threads must not hide until the next search that a vCPU moved.
#[test]
fn vcpu_that_moves_while_threads_start_and_end_is_detected_at_the_next_refresh() {
    let _guard = ONE_TEST_WITH_VCPUS_AT_A_TIME.lock();
    let host = Arc::new(HostCpus::read().unwrap());
    let cpus = host.allowed();
    let (tid, ends, thread) = start_vcpu(40);
    virtionet_placement::set_thread_affinity(Some(tid), &cpus.nth_cyclic(0)).unwrap();
    let planner = PlacementPlanner::new(Placement::Auto, cpus.clone(), None).unwrap();
    let placer = Arc::new(Placer::new("test", planner, host));
    placer.connected(me());
    let pair = |placer: &Arc<Placer>| {
        let all = (0..64).map(|pair| decide(placer, pair));
        all.into_iter()
            .find(|one| one.vcpu_tid == Some(tid))
            .unwrap()
    };
    assert_eq!(pair(&placer).cpus, cpus.nth_cyclic(0));
    let later = Instant::now() + Duration::from_secs(60);
    placer.known.lock().found.as_mut().unwrap().search_at(later);
    let (_, ends_other, other) = start_vcpu(41);
    virtionet_placement::set_thread_affinity(Some(tid), &cpus.nth_cyclic(1)).unwrap();
    assert!(placer.refresh() || cpus.len() == 1);
    assert_eq!(pair(&placer).cpus, cpus.nth_cyclic(1));
    drop((ends, ends_other));
    thread.join().unwrap();
    other.join().unwrap();
}

#[test]
fn warnings_end_when_the_front_end_disconnects() {
    let host = Arc::new(HostCpus::read().unwrap());
    let planner = PlacementPlanner::new(Placement::Auto, host.allowed(), None).unwrap();
    let placer = Arc::new(Placer::new("test", planner, host));
    placer.connected(None);
    let _ = decide(&placer, 0);
    placer.disconnected();
    // A refresh that began before the front-end disconnected.
    placer.update_warnings();
    assert_eq!(placer.warnings(), []);
}

#[test]
fn polling_workers_avoid_the_vcpus_of_another_device() {
    let _guard = ONE_TEST_WITH_VCPUS_AT_A_TIME.lock();
    let host = Arc::new(HostCpus::read().unwrap());
    let cpus = host.allowed();
    let planner = || {
        PlacementPlanner::new(Placement::None, cpus.clone(), None)
            .unwrap()
            .with_polling(true)
    };
    let one = Arc::new(Placer::new("test", planner(), Arc::clone(&host)));
    let other = Arc::new(Placer::new("test", planner(), Arc::clone(&host)));
    let (tid, ends, thread) = start_vcpu(50);
    virtionet_placement::set_thread_affinity(Some(tid), &cpus.nth_cyclic(0)).unwrap();
    one.connected(me());
    other.connected(None);
    assert_eq!(
        decide(&other, 0).cpus,
        cpus,
        "no device has searched for vCPUs"
    );
    let _ = decide(&one, 0);
    assert!(other.refresh(), "another guest has connected");
    let free = cpus.difference(&host.used_by_others(other.device).pinned);
    assert_eq!(host.used_by_others(one.device).pinned, CpuSet::default());
    assert!(!free.contains(cpus.nth_cyclic(0).last().unwrap()));
    let decision = decide(&other, 0);
    assert_eq!(decision.may_poll, !free.is_empty());
    assert!(free.is_empty() || decision.cpus == free, "{decision}");
    one.disconnected();
    assert!(other.refresh(), "that guest has disconnected");
    assert_eq!(decide(&other, 0).cpus, cpus);
    drop(ends);
    thread.join().unwrap();
}

/// Neither the thread `placer` nor the session's thread waits for the monitor.
#[test]
fn monitor_that_hangs_delays_only_the_first_decision() {
    let host = Arc::new(HostCpus::read().unwrap());
    let path = std::env::temp_dir().join(format!("placer-{}.qmp", std::process::id()));
    let silent = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let planner =
        PlacementPlanner::new(Placement::Auto, host.allowed(), Some(path.clone())).unwrap();
    let planner = planner.with_qmp_timeout(Duration::from_millis(200));
    let placer = Arc::new(Placer::new("test", planner, host));
    let is_searching = || placer.known.lock().is_searching;
    placer.connected(None);
    assert!(!placer.update() && !is_searching(), "no worker has started");
    placer.request(0);
    assert!(!placer.update());
    assert!(is_searching(), "the monitor is being asked");
    // The answer for a front-end that has disconnected is not used for the next one.
    placer.disconnected();
    placer.connected(None);
    placer.request(0);
    refresh_until(&placer, || placer.published().decision(0).is_some());
    let first = placer.published();
    assert!(!is_searching());
    let now = Instant::now();
    placer.known.lock().found.as_mut().unwrap().search_at(now);
    assert!(!placer.refresh());
    assert!(is_searching(), "the monitor is being asked again");
    assert!(!placer.refresh());
    assert_eq!(placer.published().generation, first.generation);
    refresh_until(&placer, || Arc::strong_count(&placer) == 1);
    drop(silent);
    std::fs::remove_file(path).unwrap();
}

#[test]
fn change_of_the_host_that_changes_no_decision_wakes_no_worker() {
    let host = Arc::new(HostCpus::read().unwrap());
    let planner = PlacementPlanner::new(Placement::None, host.allowed(), None).unwrap();
    let placer = Arc::new(Placer::new("test", planner, host));
    placer.connected(None);
    assert!(!decide(&placer, 0).cpus.is_empty());
    placer.known.lock().host = u32::MAX;
    let before = placer.published().generation;
    assert!(!placer.update() && !placer.refresh());
    assert_eq!(placer.published().generation, before);
    placer.request(1);
    assert!(placer.update(), "another worker");
    placer.disconnected();
    assert!(placer.published().decision(0).is_none());
}

#[test]
fn polling_workers_of_several_devices_run_on_different_cpus() {
    let host = Arc::new(HostCpus::read().unwrap());
    let cpus = host.allowed().intersection(host.topology().online());
    let cpus = cpus.difference(host.topology().isolated());
    let start = |_| {
        let planner = PlacementPlanner::new(Placement::Auto, host.allowed(), None).unwrap();
        let planner = planner.with_polling(true);
        let placer = Arc::new(Placer::new("test", planner, Arc::clone(&host)));
        placer.connected(None);
        assert_eq!(decide(&placer, 0).cpus.len(), 1);
        placer
    };
    let mut placers: Vec<_> = (0..cpus.len()).map(start).collect();
    let used = |placers: &[Arc<Placer>]| -> CpuSet {
        let all = placers.iter().map(|placer| decide(placer, 0).cpus);
        all.flat_map(|cpus| cpus.iter().collect::<Vec<_>>())
            .collect()
    };
    assert_eq!(used(&placers), cpus);
    // The CPU of a device whose front-end disconnects is free for the next one.
    let left = placers.remove(0);
    let cpu = decide(&left, 0).cpus;
    left.disconnected();
    assert_eq!(used(&placers), cpus.difference(&cpu), "no worker moves");
    placers.push(start(0));
    assert_eq!(used(&placers), cpus);
}
