//! Looking over all decisions for one guest: what is wrong with how its vCPUs
//! and workers stand.

use crate::cpuset::CpuSet;
use crate::decision::Decision;
use crate::policy::Placement;
use crate::rules::{Rules, VcpuAffinity};
use crate::vcpus::Vcpu;
use crate::warnings::Warning;

/// What is wrong with `decisions`, those for the pairs in use.
pub(crate) fn warnings(rules: &Rules<'_>, decisions: &[Decision]) -> Vec<Warning> {
    let follows = rules.host().mode.follows_vcpus();
    let of_vcpus = [unknown, floating, outside, vcpus_offline];
    let found = of_vcpus.map(|check| follows.then(|| check(rules)).flatten());
    let of_workers = [no_polling, remote_vcpus, remote_memory, few_cpus];
    found
        .into_iter()
        .chain(of_workers.map(|check| check(rules, decisions)))
        .chain([list_offline(rules), list_outside(rules)])
        .flatten()
        .collect()
}

fn unknown(rules: &Rules<'_>) -> Option<Warning> {
    let map = rules.map();
    let unread = map.vcpus.iter().any(|vcpu| vcpu.cpus.is_none());
    let why = map.failures();
    let unknown = (map.vcpus.is_empty() || unread) && !why.is_empty();
    unknown.then_some(Warning::Unknown { why })
}

fn floating(rules: &Rules<'_>) -> Option<Warning> {
    let floating = vcpus_with_affinity(rules, |vcpu_affinity| match vcpu_affinity {
        VcpuAffinity::Floating(over, _) => Some(over),
        _ => None,
    });
    let (first, over) = *floating.first()?;
    Some(Warning::Floating {
        vcpus: indices(&floating),
        over: over.clone(),
        tid: first.tid,
    })
}

fn outside(rules: &Rules<'_>) -> Option<Warning> {
    let allowed = rules.host().allowed;
    let outside = vcpus_with_affinity(rules, |vcpu_affinity| match vcpu_affinity {
        VcpuAffinity::Unreachable(on) if on.intersection(allowed).is_empty() => Some(on),
        _ => None,
    });
    (!outside.is_empty()).then(|| Warning::Outside {
        vcpus: indices(&outside),
        on: union(outside.iter().map(|(_, on)| *on)),
        allowed: allowed.clone(),
    })
}

fn vcpus_offline(rules: &Rules<'_>) -> Option<Warning> {
    let offline = vcpus_with_affinity(rules, |vcpu_affinity| match vcpu_affinity {
        VcpuAffinity::Unreachable(on) if !on.intersection(rules.host().allowed).is_empty() => {
            Some(on)
        }
        _ => None,
    });
    (!offline.is_empty()).then(|| Warning::VcpusOffline {
        vcpus: indices(&offline),
        on: union(offline.iter().map(|(_, on)| *on)),
    })
}

fn no_polling(_: &Rules<'_>, decisions: &[Decision]) -> Option<Warning> {
    let not_polling: Vec<_> = decisions.iter().filter(|one| !one.may_poll).collect();
    (!not_polling.is_empty()).then(|| Warning::NoPolling {
        pairs: not_polling.iter().map(|one| one.pair).collect(),
        on: union(not_polling.iter().map(|one| &one.cpus)),
    })
}

fn remote_vcpus(rules: &Rules<'_>, decisions: &[Decision]) -> Option<Warning> {
    let topology = rules.host().topology;
    let remote: Vec<_> = decisions
        .iter()
        .filter_map(|one| {
            let vcpu = rules.followed_vcpu(one.pair)?.cpus.as_ref()?;
            let (there, here) = (
                topology.node_of_all(vcpu)?,
                topology.node_of_all(&one.cpus)?,
            );
            (there != here).then_some((one, vcpu))
        })
        .collect();
    (!remote.is_empty()).then(|| Warning::RemoteVcpus {
        pairs: remote.iter().map(|(one, _)| one.pair).collect(),
        on: union(remote.iter().map(|(one, _)| &one.cpus)),
        vcpus_on: union(remote.iter().map(|(_, vcpu)| *vcpu)),
    })
}

fn remote_memory(rules: &Rules<'_>, decisions: &[Decision]) -> Option<Warning> {
    let host = rules.host();
    let remote: Vec<_> = decisions
        .iter()
        .filter_map(|one| {
            let memory = *host.memory.get(&one.pair)?;
            let worker = host.topology.node_of_all(&one.cpus)?;
            (memory != worker).then_some((one, memory))
        })
        .collect();
    (!remote.is_empty()).then(|| Warning::RemoteMemory {
        pairs: remote.iter().map(|(one, _)| one.pair).collect(),
        on: union(remote.iter().map(|(one, _)| &one.cpus)),
        nodes: remote.iter().map(|(_, node)| *node).collect(),
    })
}

/// Workers that sleep beside vCPUs share these CPUs because the vCPUs do; that
/// is told only where the daemon could not have had more of them.
fn few_cpus(rules: &Rules<'_>, decisions: &[Decision]) -> Option<Warning> {
    let on = union(decisions.iter().map(|one| &one.cpus));
    let short = match rules.host().mode {
        Placement::List(_) => true,
        _ => rules.host().polling || rules.usable().len() < decisions.len(),
    };
    (short && on.len() < decisions.len()).then_some(Warning::FewCpus {
        workers: decisions.len(),
        on,
    })
}

fn list_offline(rules: &Rules<'_>) -> Option<Warning> {
    let host = rules.host();
    let cpus = listed(rules, |cpu| {
        host.allowed.contains(cpu) && !host.topology.is_online(cpu)
    })?;
    Some(Warning::ListOffline { cpus })
}

fn list_outside(rules: &Rules<'_>) -> Option<Warning> {
    let allowed = rules.host().allowed;
    let cpus = listed(rules, |cpu| !allowed.contains(cpu))?;
    let allowed = allowed.clone();
    Some(Warning::ListOutside { cpus, allowed })
}

/// The listed CPUs that are `bad`, if there are any.
fn listed(rules: &Rules<'_>, bad: impl Fn(u32) -> bool) -> Option<CpuSet> {
    let Placement::List(cpus) = rules.host().mode else {
        return None;
    };
    let cpus: CpuSet = cpus.iter().copied().filter(|&cpu| bad(cpu)).collect();
    (!cpus.is_empty()).then_some(cpus)
}

/// The vCPUs whose stance `pick` answers for, with its answer.
fn vcpus_with_affinity<'a>(
    rules: &Rules<'a>,
    pick: impl Fn(VcpuAffinity<'a>) -> Option<&'a CpuSet>,
) -> Vec<(&'a Vcpu, &'a CpuSet)> {
    let vcpus = rules.map().vcpus.iter();
    vcpus
        .filter_map(|vcpu| Some((vcpu, pick(rules.vcpu_affinity(Some(vcpu)))?)))
        .collect()
}

fn indices(vcpus: &[(&Vcpu, &CpuSet)]) -> CpuSet {
    vcpus.iter().map(|(vcpu, _)| vcpu.index).collect()
}

fn union<'a>(sets: impl Iterator<Item = &'a CpuSet>) -> CpuSet {
    sets.flat_map(CpuSet::iter).collect()
}

#[cfg(test)]
mod tests {
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
    fn each_thing_that_is_wrong_is_told() {
        let floating = Warning::Floating {
            vcpus: set("0-1"),
            over: set("0-6"),
            tid: 100,
        };
        let table: [Case; 17] = [
            ("all is well", "auto", "0-7", false, &["1", "2"], 2, vec![]),
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
                "floating, but not followed",
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
                        on: set("1"),
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
                "polling workers share",
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
                "a short list",
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
                "none, polling, no room",
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
            let dir = TempDir::new(&format!("review-{number}"));
            let planner = planner(&dir, mode, allowed).with_polling(polling);
            assert_eq!(warnings_of(&planner, &map(vcpus), pairs), wanted, "{name}");
        }
    }

    #[test]
    fn a_list_that_loses_its_cpus_to_the_cpuset_is_told() {
        let dir = TempDir::new("review-lost");
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
    fn memory_on_another_node_is_told() {
        let dir = TempDir::new("review-memory");
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
    fn unknown_vcpus_are_told_where_they_are_followed() {
        for (mode, told) in [
            ("auto", true),
            ("core-near", true),
            ("list", false),
            ("none", false),
        ] {
            let dir = TempDir::new(&format!("review-unknown-{mode}"));
            let planner = planner(&dir, mode, "0-7").with_proc_root(dir.path());
            let map = planner.discover(None);
            let warnings = warnings_of(&planner, &map, 1);
            let unknown = |warning: &Warning| matches!(warning, Warning::Unknown { why } if why.contains("--qmp=PATH"));
            assert_eq!(warnings.iter().any(unknown), told, "{mode}");
            assert_eq!(warnings.len(), usize::from(told), "{warnings:?}");
        }
    }
}
