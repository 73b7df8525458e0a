//! Placement of the workers of one guest, by policy, host and vCPU threads.

use super::*;
use crate::testing::{TempDir, map, set};
use crate::vcpus::Vcpu;

fn planner(mode: &str, allowed: &str) -> PlacementPlanner {
    PlacementPlanner::new(mode.parse().unwrap(), set(allowed), None).unwrap()
}

fn cpus_of_workers(planner: &PlacementPlanner, map: &VcpuMap, pairs: u32) -> Vec<String> {
    (0..pairs)
        .map(|pair| planner.place(map, pair, pairs).cpus.to_string())
        .collect()
}

/// Policy, allowed CPUs, CPUs of the vCPU threads, pairs, CPUs of the workers.
type Case = (
    &'static str,
    &'static str,
    &'static [&'static str],
    u32,
    &'static [&'static str],
);

#[test]
fn each_policy_chooses_the_cpus_of_each_worker() {
    let table: [Case; 18] = [
        // Workers get the CPUs of pinned vCPUs, one by one or by groups.
        (
            "auto",
            "0-3",
            &["2", "3", "0", "1"],
            4,
            &["2", "3", "0", "1"],
        ),
        ("auto", "0-3", &["2", "3", "0", "1"], 2, &["2", "0"]),
        ("auto", "0-3", &["2", "3", "0", "1"], 3, &["2", "0", "1"]),
        ("auto", "0-3", &["2", "3"], 4, &["2", "3", "2", "3"]),
        ("auto", "0-7", &["0-1", "2-3"], 2, &["0-1", "2-3"]),
        ("auto", "0-7", &["0", "0"], 2, &["0", "0"]),
        ("auto", "0", &["0", "0"], 2, &["0", "0"]),
        // Workers of floating vCPUs float over the same CPUs.
        ("auto", "0-3", &["0-3", "0-3"], 2, &["0-3", "0-3"]),
        ("auto", "0-1", &["0-7", "0-7"], 3, &["0-1", "0-1", "0-1"]),
        ("auto", "0-7", &["2-5", "2-5"], 2, &["2-5", "2-5"]),
        // The vCPUs are partly or wholly outside the daemon's CPUs, unreadable, or unknown.
        ("auto", "1-4", &["0-1", "4-5"], 2, &["1", "4"]),
        ("auto", "2-3", &["6", "1"], 2, &["2", "3"]),
        ("auto", "0-1", &["?", "?"], 3, &["0-1", "0-1", "0-1"]),
        ("auto", "4,6", &[], 2, &["4,6", "4,6"]),
        ("same", "0-3", &["0-3", "0-3"], 2, &["0-3", "0-3"]),
        ("list:3,1", "0-3", &["2", "2"], 4, &["3", "1", "3", "1"]),
        ("list", "4-5", &[], 3, &["4", "5", "4"]),
        ("none", "0-3", &["2", "2"], 2, &["0-3", "0-3"]),
    ];
    for (mode, allowed, vcpus, pairs, workers) in table {
        let got = cpus_of_workers(&planner(mode, allowed), &map(vcpus), pairs);
        assert_eq!(got, workers, "{mode} on {allowed}, vCPUs on {vcpus:?}");
    }
}

#[test]
fn decision_lists_all_vcpus_and_the_reason() {
    for (mode, vcpus, line) in [
        (
            "auto",
            map(&["2", "3", "0", "1"]),
            "pair 1 -> vCPUs 2-3 (thread 102) -> worker on CPU 0: the vCPU thread is pinned there",
        ),
        (
            "auto",
            map(&["0-3", "0-3"]),
            "pair 1 -> vCPU 1 (thread 101) -> worker on CPUs 0-3: \
             the vCPU thread floats over CPUs 0-3, so the worker floats over these",
        ),
        (
            "auto",
            map(&["0", "3-4"]),
            "pair 1 -> vCPU 1 (thread 101) -> worker on CPU 3: \
             the vCPU thread is pinned to CPUs 3-4, of which this daemon may not use the others",
        ),
        (
            "same",
            map(&["0", "8"]),
            "pair 1 -> vCPU 1 (thread 101) -> worker on CPUs 0-3: the worker floats over CPUs 0-3, \
             as the vCPU thread is pinned to CPU 8, but this daemon may run on CPUs 0-3 only: widen the daemon's cpuset",
        ),
        (
            "auto",
            map(&["0", "?"]),
            "pair 1 -> vCPU 1 (thread 101) -> worker on CPUs 0-3: the worker floats over CPUs 0-3, \
             as the CPUs of the vCPU thread cannot be read",
        ),
        (
            "same",
            map(&["0", "2-3"]),
            "pair 1 -> vCPU 1 (thread 101) -> worker on CPUs 2-3: placement same, and the vCPU thread may run on CPUs 2-3",
        ),
        (
            "list:3",
            map(&["0", "2"]),
            "pair 1 -> vCPU 1 (thread 101) -> worker on CPU 3: placement list:3 names it",
        ),
        (
            "none",
            map(&[]),
            "pair 1 -> unknown vCPU -> worker on CPUs 0-3: placement none leaves the choice to the scheduler",
        ),
    ] {
        assert_eq!(planner(mode, "0-3").place(&vcpus, 1, 2).to_string(), line);
    }
}

#[test]
fn decision_without_vcpu_threads_says_what_to_do() {
    let dir = TempDir::new("no-vcpus");
    dir.thread(100, 100, "qemu-system-x86", "0-3");
    let planner = planner("auto", "0-1").with_proc_root(dir.path());
    assert_eq!(
        planner
            .place(&planner.discover(Some(100)), 3, 4)
            .to_string(),
        "pair 3 -> unknown vCPU -> worker on CPUs 0-1: the worker floats over CPUs 0-1, \
         as no vCPU threads were found in process 100: start QEMU with -name NAME,debug-threads=on or give --qmp=PATH"
    );
}

#[test]
fn refreshing_a_map_reads_only_threads_whose_cpus_were_known() {
    let dir = TempDir::new("refresh");
    dir.thread(100, 100, "qemu-system-x86", "0-3");
    dir.thread(100, 102, "CPU 0/KVM", "2");
    dir.thread(100, 103, "CPU 1/KVM", "3");
    let planner = planner("auto", "0-3").with_proc_root(dir.path());
    let mut map = planner.discover(Some(100));
    // An unrelated thread's id: its CPUs were never known, and are not read now.
    map.vcpus.push(Vcpu {
        index: 2,
        tid: 102,
        cpus: None,
    });
    dir.thread(100, 102, "CPU 0/KVM", "1");
    std::fs::remove_dir_all(dir.path().join("103")).unwrap();
    planner.refresh(&mut map);
    let cpus: Vec<_> = map.vcpus.iter().map(|vcpu| vcpu.cpus.clone()).collect();
    assert_eq!(cpus, [Some(set("1")), None, None]);
}

#[test]
fn changed_host_changes_the_decisions() {
    let map = map(&["0-3", "0-3"]);
    let mut planner = planner("auto", "0-3");
    assert_eq!(cpus_of_workers(&planner, &map, 2), ["0-3", "0-3"]);
    planner.set_host(set("2-3"), Topology::default());
    assert_eq!(cpus_of_workers(&planner, &map, 2), ["2-3", "2-3"]);
    planner.set_host(CpuSet::default(), Topology::default());
    assert_eq!(
        cpus_of_workers(&planner, &map, 2),
        ["2-3", "2-3"],
        "an empty set of allowed CPUs is ignored"
    );
    assert_eq!(
        planner.place_all(&map, 3, 2),
        [0, 1, 2].map(|pair| planner.place(&map, pair, 2))
    );
}

#[test]
fn workers_that_poll_avoid_the_vcpus_of_other_guests() {
    for (mode, alone, beside) in [
        ("auto", ["2", "3"], ["4", "5"]),
        ("none", ["2-5", "2-5"], ["4-5", "4-5"]),
        ("same", ["0", "1"], ["0", "1"]),
    ] {
        let map = map(&["0", "1"]);
        let mut planner = planner(mode, "0-5").with_polling(true);
        assert_eq!(planner.pinned(&map), set("0-1"));
        assert_eq!(cpus_of_workers(&planner, &map, 2), alone, "{mode}");
        planner.set_pinned_by_others(set("2-3"));
        assert_eq!(planner.pinned(&map), set("0-1"));
        assert_eq!(cpus_of_workers(&planner, &map, 2), beside, "{mode}");
    }
}

#[test]
fn hot_plugged_indices_keep_their_order() {
    let mut map = map(&["0", "1", "2"]);
    map.vcpus[2].index = 7;
    let decision = planner("auto", "0-3").place(&map, 2, 3);
    assert_eq!((decision.vcpus, decision.cpus), (vec![7], set("2")));
}

#[test]
fn qmp_is_asked_only_by_policies_that_depend_on_vcpus() {
    let dir = TempDir::new("qmp-asked");
    let path = dir.path().join("qmp.sock");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    listener.set_nonblocking(true).unwrap();
    for (mode, asks) in [
        ("none", false),
        ("list", false),
        ("same", true),
        ("auto", true),
    ] {
        let planner =
            PlacementPlanner::new(mode.parse().unwrap(), set("0"), Some(path.clone())).unwrap();
        _ = planner
            .with_qmp_timeout(Duration::from_millis(1))
            .discover(None);
        assert_eq!(listener.accept().is_ok(), asks, "{mode}");
    }
}

#[test]
fn list_outside_the_cpuset_is_refused() {
    let error = PlacementPlanner::new("list:0-3".parse().unwrap(), set("0-1"), None).unwrap_err();
    assert_eq!(
        error.to_string(),
        "placement list:0,1,2,3 names CPUs 2-3, but this daemon may run on CPUs 0-1 only: \
         choose among those or widen its cpuset"
    );
    assert_eq!(
        PlacementPlanner::new(Placement::None, CpuSet::default(), None).unwrap_err(),
        PlacementError::NoCpu
    );
}
