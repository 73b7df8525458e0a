//! Each warning, for each kind of placement that causes it.

use super::*;
use crate::testing::{TempDir, map, set, sysfs};
use crate::vcpus::VcpuMap;
use crate::{PlacementPlanner, Topology};

/// CPUs 0-3 on node 0, 4-7 on node 1; 7 is offline.
fn planner(dir: &TempDir, mode: &str, allowed: &str) -> PlacementPlanner {
    sysfs(dir.path()).online("0-6").nodes(&["0-3", "4-6"]);
    PlacementPlanner::new(mode.parse().unwrap(), set(allowed), None)
        .unwrap()
        .with_topology(Topology::read(dir.path()))
}

fn warnings_of(planner: &PlacementPlanner, map: &VcpuMap, pairs: u32) -> Vec<Warning> {
    planner.warnings(map, &planner.place_all(map, pairs, pairs))
}

/// Name, mode, allowed CPUs, whether workers poll, vCPUs' CPUs, pairs, warnings.
type Case = (
    &'static str,
    &'static str,
    &'static str,
    bool,
    &'static [&'static str],
    u32,
    Vec<Warning>,
);

#[test]
fn each_problem_gives_its_warning() {
    let floating = Warning::Floating {
        vcpus: set("0-1"),
        over: set("0-6"),
        tid: 100,
    };
    let table: [Case; 17] = [
        ("no problem", "auto", "0-7", false, &["1", "2"], 2, vec![]),
        ("polling near", "auto", "0-7", true, &["0", "1"], 2, vec![]),
        (
            "floating",
            "auto",
            "0-7",
            false,
            &["0-6", "0-6"],
            2,
            vec![floating.clone()],
        ),
        (
            "floating, same",
            "same",
            "0-7",
            false,
            &["0-6", "0-6"],
            2,
            vec![floating],
        ),
        (
            "floating, but the policy does not depend on it",
            "list:0-1",
            "0-7",
            false,
            &["0-6", "0-6"],
            2,
            vec![],
        ),
        (
            "outside",
            "auto",
            "0-2",
            false,
            &["1", "3"],
            2,
            vec![Warning::Outside {
                vcpus: set("1"),
                on: set("3"),
                allowed: set("0-2"),
            }],
        ),
        (
            "outside, another node",
            "auto",
            "0-3",
            false,
            &["0", "4"],
            2,
            vec![
                Warning::Outside {
                    vcpus: set("1"),
                    on: set("4"),
                    allowed: set("0-3"),
                },
                Warning::RemoteVcpus {
                    pairs: set("1"),
                    on: set("0-3"),
                    vcpus_on: set("4"),
                },
            ],
        ),
        (
            "the vCPU's CPU is offline",
            "auto",
            "0-7",
            false,
            &["0", "7"],
            2,
            vec![Warning::VcpusOffline {
                vcpus: set("1"),
                on: set("7"),
            }],
        ),
        (
            "no CPU for polling",
            "auto",
            "0-1",
            true,
            &["0", "1"],
            2,
            vec![Warning::NoPolling {
                pairs: set("0-1"),
                on: set("0-1"),
            }],
        ),
        (
            "polling workers share a CPU",
            "auto",
            "0-2",
            true,
            &["0", "1"],
            2,
            vec![Warning::FewCpus {
                workers: 2,
                on: set("2"),
            }],
        ),
        (
            "fewer CPUs than workers",
            "auto",
            "0-1",
            false,
            &["0", "1", "0"],
            3,
            vec![Warning::FewCpus {
                workers: 3,
                on: set("0-1"),
            }],
        ),
        (
            "workers share as their vCPUs do",
            "auto",
            "0-3",
            false,
            &["0", "0"],
            2,
            vec![],
        ),
        (
            "fewer listed CPUs than workers",
            "list:3",
            "0-7",
            false,
            &["3"],
            2,
            vec![Warning::FewCpus {
                workers: 2,
                on: set("3"),
            }],
        ),
        (
            "a list on another node",
            "list:4",
            "0-7",
            false,
            &["0"],
            1,
            vec![Warning::RemoteVcpus {
                pairs: set("0"),
                on: set("4"),
                vcpus_on: set("0"),
            }],
        ),
        (
            "a list with an offline CPU",
            "list:0,7",
            "0-7",
            false,
            &[],
            1,
            vec![Warning::ListOffline { cpus: set("7") }],
        ),
        (
            "none, polling, no free CPU",
            "none",
            "0",
            true,
            &["0"],
            1,
            vec![Warning::NoPolling {
                pairs: set("0"),
                on: set("0"),
            }],
        ),
        ("none", "none", "0-7", false, &["0-6"], 1, vec![]),
    ];
    for (number, (name, mode, allowed, polling, vcpus, pairs, wanted)) in
        table.into_iter().enumerate()
    {
        let dir = TempDir::new(&format!("checks-{number}"));
        let planner = planner(&dir, mode, allowed).with_polling(polling);
        assert_eq!(warnings_of(&planner, &map(vcpus), pairs), wanted, "{name}");
    }
}

#[test]
fn list_whose_cpus_leave_the_cpuset_gives_a_warning() {
    let dir = TempDir::new("checks-lost");
    let mut planner = planner(&dir, "list:0,2", "0-3");
    let topology = planner.topology().clone();
    assert_eq!(warnings_of(&planner, &map(&[]), 1), []);
    planner.set_host(set("0-1"), topology);
    let lost = Warning::ListOutside {
        cpus: set("2"),
        allowed: set("0-1"),
    };
    assert_eq!(warnings_of(&planner, &map(&[]), 1), [lost]);
}

#[test]
fn memory_on_another_node_gives_a_warning() {
    let dir = TempDir::new("checks-memory");
    let mut planner = planner(&dir, "auto", "0-7");
    planner.set_memory_node(0, Some(0));
    planner.set_memory_node(1, Some(1));
    let remote = Warning::RemoteMemory {
        pairs: set("1"),
        on: set("2"),
        nodes: set("1"),
    };
    assert_eq!(warnings_of(&planner, &map(&["1", "2"]), 2), [remote]);
    planner.set_memory_node(1, None);
    assert_eq!(warnings_of(&planner, &map(&["1", "2"]), 2), []);
}

#[test]
fn unknown_vcpus_give_a_warning_where_the_policy_depends_on_them() {
    for (mode, has_warning) in [
        ("auto", true),
        ("core-near", true),
        ("list", false),
        ("none", false),
    ] {
        let dir = TempDir::new(&format!("checks-unknown-{mode}"));
        let planner = planner(&dir, mode, "0-7").with_proc_root(dir.path());
        let map = planner.discover(None);
        let warnings = warnings_of(&planner, &map, 1);
        let unknown = |warning: &Warning| matches!(warning, Warning::Unknown { why } if why.contains("--qmp=PATH"));
        assert_eq!(warnings.iter().any(unknown), has_warning, "{mode}");
        assert_eq!(warnings.len(), usize::from(has_warning), "{warnings:?}");
    }
}
