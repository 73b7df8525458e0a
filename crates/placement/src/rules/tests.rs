//! Each rule, on a host with two NUMA nodes, four L3 caches and SMT.

use std::collections::BTreeMap;

use super::*;
use crate::context::HostConstraints;
use crate::testing::{TempDir, map, set, sysfs};
use crate::topology::Topology;
use crate::vcpus::VcpuMap;

/// Two nodes with two L3 caches each, two cores a cache, two threads a core: CPUs k and k + 8 share
/// a core, CPUs 0-1 and 8-9 share a cache, CPUs 0-3 and 8-11 are on one node.
fn host(dir: &TempDir, online: &str, isolated: &str) -> Topology {
    sysfs(dir.path())
        .online(online)
        .isolated(isolated)
        .cores(&["0,8", "1,9", "2,10", "3,11", "4,12", "5,13", "6,14", "7,15"])
        .caches(&["0-1,8-9", "2-3,10-11", "4-5,12-13", "6-7,14-15"])
        .nodes(&["0-3,8-11", "4-7,12-15"]);
    Topology::read(dir.path())
}

struct Case {
    name: &'static str,
    mode: &'static str,
    polling: bool,
    allowed: &'static str,
    online: &'static str,
    isolated: &'static str,
    vcpus: &'static [&'static str],
    pairs: u32,
    /// The CPUs of each worker, with `!` where it may not poll.
    workers: &'static [&'static str],
}

const ALL: &str = "0-15";

/// All CPUs allowed and online, none isolated; as many pairs as workers are given.
const fn case(
    name: &'static str,
    mode: &'static str,
    vcpus: &'static [&'static str],
    pairs: u32,
    workers: &'static [&'static str],
) -> Case {
    Case {
        name,
        mode,
        polling: false,
        allowed: ALL,
        online: ALL,
        isolated: "",
        vcpus,
        pairs,
        workers,
    }
}

impl Case {
    const fn polls(mut self) -> Self {
        self.polling = true;
        self
    }

    const fn allowed(mut self, cpus: &'static str) -> Self {
        self.allowed = cpus;
        self
    }

    const fn online(mut self, cpus: &'static str) -> Self {
        self.online = cpus;
        self
    }

    const fn isolated(mut self, cpus: &'static str) -> Self {
        self.isolated = cpus;
        self
    }

    /// How the placement differs from the expected one.
    fn check(&self, number: usize) -> Option<String> {
        let dir = TempDir::new(&format!("rules-{number}"));
        let topology = host(&dir, self.online, self.isolated);
        let (mode, allowed, map) = (
            self.mode.parse().unwrap(),
            set(self.allowed),
            map(self.vcpus),
        );
        let host = HostConstraints {
            mode: &mode,
            allowed: &allowed,
            topology: &topology,
            polling: self.polling,
            memory: &BTreeMap::new(),
            others: &CpuSet::default(),
            polling_elsewhere: &[],
            previous: &BTreeMap::new(),
        };
        let context = PlacementContext::new(host, &map, self.pairs);
        let rules = Rules::new(&context);
        let workers: Vec<_> = (0..self.pairs)
            .map(|pair| {
                let CpuChoice {
                    cpus,
                    may_poll,
                    why,
                } = rules.choose_cpus(pair);
                assert!(!why.is_empty());
                format!("{cpus}{}", if may_poll { "" } else { "!" })
            })
            .collect();
        let wanted = self.workers;
        (workers != wanted).then(|| format!("{}: {workers:?}, not {wanted:?}", self.name))
    }
}

#[test]
fn every_rule_chooses_the_cpus_of_every_worker() {
    let table = [
        // auto
        case(
            "auto, sleeping: the CPU of the vCPU",
            "auto",
            &["2", "3"],
            2,
            &["2", "3"],
        ),
        case(
            "auto, polling: same cache, no sibling",
            "auto",
            &["0", "2"],
            2,
            &["1", "3"],
        )
        .polls(),
        case(
            "a CPU for each worker: of the cache, then of the node, siblings last",
            "auto",
            &["0", "0", "0", "0"],
            4,
            &["1", "9", "2", "3"],
        )
        .polls(),
        case(
            "siblings of vCPUs come last",
            "auto",
            &["0", "1", "2", "3"],
            4,
            &["8", "9", "10", "11"],
        )
        .polls(),
        case(
            "another node is not near",
            "auto",
            &["0", "1"],
            2,
            &["0!", "1!"],
        )
        .polls()
        .allowed("0-1,4-7"),
        case(
            "no CPU is free: the workers sleep",
            "auto",
            &["0", "1"],
            2,
            &["0!", "1!"],
        )
        .polls()
        .allowed("0-1"),
        case(
            "too few CPUs are shared",
            "auto",
            &["0", "1"],
            4,
            &["2", "2", "2", "2"],
        )
        .polls()
        .allowed("0-2"),
        case(
            "isolated CPUs are not near",
            "auto",
            &["0", "2"],
            2,
            &["9", "11"],
        )
        .polls()
        .isolated("1,3,8,10"),
        case(
            "offline CPUs are not near",
            "auto",
            &["0", "2"],
            2,
            &["8", "10"],
        )
        .polls()
        .online("0,2,4-15")
        .allowed("0,2,8,10"),
        case(
            "an isolated CPU that the vCPU is pinned to is used",
            "auto",
            &["4", "5"],
            2,
            &["4", "5"],
        )
        .isolated("4-5"),
        case(
            "floating vCPUs do not prevent polling",
            "auto",
            &["0-15", "0-15"],
            2,
            &["0", "1"],
        )
        .polls(),
        case(
            "floating vCPUs: the workers float too",
            "auto",
            &["0-15", "0-15"],
            2,
            &["0-15", "0-15"],
        ),
        case(
            "a guest that is confined as a whole: its workers float over the same CPUs",
            "auto",
            &["2-5", "2-5"],
            2,
            &["2-5", "2-5"],
        ),
        case(
            "workers do not float over isolated CPUs",
            "auto",
            &["0-15", "0-15"],
            2,
            &["2-15", "2-15"],
        )
        .isolated("0-1"),
        case(
            "workers do not float over offline CPUs",
            "auto",
            &["0-15", "0-15"],
            2,
            &["1-15", "1-15"],
        )
        .online("1-15"),
        case(
            "one vCPU floats, one is pinned",
            "auto",
            &["0", "0-15"],
            2,
            &["0", "0-15"],
        ),
        case(
            "floating, polling: a free CPU for each, siblings of vCPUs last",
            "auto",
            &["0", "0-15", "0-15", "0-15"],
            4,
            &["1", "2", "3", "4"],
        )
        .polls()
        .allowed("0-4,8"),
        case(
            "floating, polling: more workers than CPUs share them evenly",
            "auto",
            &["0-15", "0-15", "0-15", "0-15"],
            4,
            &["2", "3", "2", "3"],
        )
        .polls()
        .allowed("2-3"),
        case(
            "floating, polling: vCPUs are pinned to all CPUs that it may use",
            "auto",
            &["0", "1", "0-15"],
            3,
            &["0!", "1!", "0-1!"],
        )
        .polls()
        .allowed("0-1"),
        case(
            "one vCPU floats, one is pinned: no worker polls on the CPU of the latter",
            "auto",
            &["0", "0-15"],
            2,
            &["1", "2"],
        )
        .polls(),
        case(
            "the CPU of the vCPU is offline: a CPU near it",
            "auto",
            &["7", "6"],
            2,
            &["4", "6"],
        )
        .online("0-6,8-13"),
        case(
            "the CPU of the vCPU is outside the cpuset: a CPU near it",
            "auto",
            &["1", "3"],
            2,
            &["0", "2"],
        )
        .allowed("0,2"),
        case(
            "the whole node of the vCPU is outside the cpuset: the workers float",
            "auto",
            &["0", "1"],
            2,
            &["4-5", "4-5"],
        )
        .allowed("4-5"),
        case(
            "the whole node of the vCPU is outside the cpuset, polling: free CPUs",
            "auto",
            &["0", "1"],
            2,
            &["4", "5"],
        )
        .polls()
        .allowed("4-5"),
        case(
            "unknown: the workers float",
            "auto",
            &[],
            2,
            &["1-2,4-15", "1-2,4-15"],
        )
        .isolated("0")
        .online("0-2,4-15"),
        case(
            "unknown, polling: free CPUs",
            "auto",
            &[],
            3,
            &["1", "2", "4"],
        )
        .polls()
        .isolated("0")
        .online("0-2,4-15"),
        case(
            "unreadable: the workers float",
            "auto",
            &["?", "?"],
            2,
            &["0-15", "0-15"],
        ),
        // same
        case("same, sleeping", "same", &["2", "3"], 2, &["2", "3"]),
        case("same forces polling", "same", &["2", "3"], 2, &["2", "3"]).polls(),
        case(
            "same takes all CPUs of the vCPU thread",
            "same",
            &["2-3", "0-15"],
            2,
            &["2-3", "0-15"],
        ),
        case(
            "same, polling, the CPU of the vCPU is offline: a free CPU",
            "same",
            &["7", "6"],
            2,
            &["0", "6"],
        )
        .polls()
        .online("0-6,8-13"),
        case(
            "same with unknown vCPUs: the workers float",
            "same",
            &[],
            2,
            &["0-15", "0-15"],
        ),
        // sibling
        case(
            "the other thread of the core",
            "sibling",
            &["0", "5"],
            2,
            &["8", "13"],
        ),
        case(
            "the other thread, polling",
            "sibling",
            &["0", "5"],
            2,
            &["8", "13"],
        )
        .polls(),
        case(
            "a vCPU is pinned to the other thread",
            "sibling",
            &["0", "8"],
            2,
            &["8", "0"],
        ),
        case(
            "a vCPU is pinned to the other thread: no polling",
            "sibling",
            &["0", "8"],
            2,
            &["8!", "0!"],
        )
        .polls(),
        case(
            "one of two siblings is free",
            "sibling",
            &["0-1", "8"],
            2,
            &["9", "0!"],
        )
        .polls()
        .allowed("0-1,8-9,3")
        .online("0-1,3,8-9"),
        case("SMT off: as auto", "sibling", &["0", "1"], 2, &["0", "1"]).online("0-7"),
        case(
            "SMT off, polling: as auto",
            "sibling",
            &["0", "1"],
            2,
            &["2", "3"],
        )
        .polls()
        .online("0-7"),
        case(
            "a sibling outside the cpuset: as auto",
            "sibling",
            &["0", "1"],
            2,
            &["0", "1"],
        )
        .allowed("0-7"),
        case(
            "an isolated core that the vCPU is pinned to is used",
            "sibling",
            &["0", "1"],
            2,
            &["8", "9"],
        )
        .isolated("0-1,8-9"),
        case(
            "floating: as auto",
            "sibling",
            &["0-15", "0-15"],
            2,
            &["0-15", "0-15"],
        ),
        case("unknown: as auto", "sibling", &[], 2, &["0-15", "0-15"]),
        // core-near
        case("near, sleeping", "core-near", &["0", "2"], 2, &["1", "3"]),
        case("near, polling", "core-near", &["0", "2"], 2, &["1", "3"]).polls(),
        case(
            "near: never a CPU that a vCPU is pinned to",
            "core-near",
            &["0", "1"],
            2,
            &["2", "3"],
        ),
        case(
            "no CPU is near: as auto",
            "core-near",
            &["0", "1"],
            2,
            &["0", "1"],
        )
        .allowed("0-1,4-7,12-15"),
        case(
            "no CPU is near, polling: the workers sleep",
            "core-near",
            &["0", "1"],
            2,
            &["0!", "1!"],
        )
        .polls()
        .allowed("0-1,4-7,12-15"),
        case(
            "near the first vCPU of each group",
            "core-near",
            &["0", "1", "4", "5"],
            2,
            &["2", "6"],
        ),
        case(
            "near: never an isolated CPU",
            "core-near",
            &["0"],
            1,
            &["2"],
        )
        .isolated("1,9"),
        case(
            "floating: as auto",
            "core-near",
            &["0-15", "0-15"],
            2,
            &["0-15", "0-15"],
        ),
        case("unknown: as auto", "core-near", &[], 2, &["0-15", "0-15"]),
        // list
        case("as listed", "list:3,1", &["1", "3"], 3, &["3", "1", "3"]),
        case(
            "a list forces polling",
            "list:3,1",
            &["1", "3"],
            2,
            &["3", "1"],
        )
        .polls(),
        case(
            "a list may name isolated CPUs",
            "list:3,1",
            &["0", "0"],
            2,
            &["3", "1"],
        )
        .isolated("1,3"),
        case(
            "others of the list replace an offline CPU",
            "list:3,1,2",
            &["0"],
            3,
            &["1", "1", "2"],
        )
        .online("0-2"),
        case(
            "the whole list is offline: all CPUs in turn",
            "list:3",
            &["0"],
            2,
            &["0", "1"],
        )
        .online("0-2"),
        case(
            "the whole list is outside the cpuset, polling: no CPU of a vCPU",
            "list:3",
            &["0"],
            2,
            &["1", "2"],
        )
        .polls()
        .allowed("0-2"),
        case(
            "list alone: in turn, without isolated CPUs",
            "list",
            &["0"],
            3,
            &["1", "2", "3"],
        )
        .isolated("0"),
        // none
        case("none: any CPU", "none", &["0", "1"], 2, &["0-15", "0-15"]),
        case(
            "none: no isolated or offline CPU",
            "none",
            &["0"],
            1,
            &["1-13"],
        )
        .isolated("0")
        .online("0-13"),
        case(
            "none, polling: no CPU of a vCPU",
            "none",
            &["0", "1"],
            2,
            &["2-15", "2-15"],
        )
        .polls(),
        case(
            "none, polling, vCPUs on all CPUs: no polling",
            "none",
            &["0", "1"],
            2,
            &["0-1!", "0-1!"],
        )
        .polls()
        .allowed("0-1"),
        case("only isolated CPUs are allowed", "none", &[], 1, &["4-5"])
            .isolated("4-5")
            .allowed("4-5"),
    ];
    let wrong: Vec<_> = (0..)
        .zip(&table)
        .filter_map(|(number, case)| case.check(number))
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn workers_of_a_floating_guest_stay_on_the_node_of_its_memory() {
    let dir = TempDir::new("memory");
    let topology = host(&dir, ALL, "5");
    let (mode, allowed) = (Placement::Auto, set(ALL));
    // The memory of pair 2 is on a node without CPUs.
    let memory = BTreeMap::from([(0, 1), (1, 1), (2, 7)]);
    let choose = |map: &VcpuMap, polling| {
        let host = HostConstraints {
            mode: &mode,
            allowed: &allowed,
            topology: &topology,
            polling,
            memory: &memory,
            others: &CpuSet::default(),
            polling_elsewhere: &[],
            previous: &BTreeMap::new(),
        };
        let context = PlacementContext::new(host, map, 3);
        let rules = Rules::new(&context);
        let choices = [0, 1, 2].map(|pair| rules.choose_cpus(pair));
        let cpus = choices.each_ref().map(|choice| choice.cpus.to_string());
        let [_, CpuChoice { why, .. }, _] = choices;
        (cpus, why)
    };
    for (vcpus, polling, cpus, why) in [
        (
            &["0-15"; 3][..],
            false,
            ["4,6-7,12-15", "4,6-7,12-15", "0-4,6-15"],
            "the vCPU thread floats over CPUs 0-15, so the worker floats over those of NUMA node 1, which holds the pair's memory",
        ),
        (
            &["0-15"; 3],
            true,
            ["4", "6", "0"],
            "the vCPU thread floats over CPUs 0-15, so the worker polls on one of those of NUMA node 1, which holds the pair's memory, chosen to avoid pinned vCPUs and other polling workers",
        ),
        (
            &["?"; 3],
            false,
            ["4,6-7,12-15", "4,6-7,12-15", "0-4,6-15"],
            "the worker floats over CPUs 4,6-7,12-15 of NUMA node 1, which holds the pair's memory, as the CPUs of the vCPU thread cannot be read",
        ),
        (
            &["0-3"; 3],
            false,
            ["0-3"; 3],
            "the vCPU thread floats over CPUs 0-3, so the worker floats over these",
        ),
    ] {
        let got = choose(&map(vcpus), polling);
        assert_eq!(got, (cpus.map(String::from), why.to_owned()), "{vcpus:?}");
    }
}

#[test]
fn each_choice_has_its_reason() {
    let dir = TempDir::new("reasons");
    let topology = host(&dir, "0-7,9-15", "");
    for (mode, polling, allowed, vcpus, why) in [
        (
            "auto",
            true,
            ALL,
            "0",
            "the worker polls near the vCPU thread on CPU 0, on a CPU that shares its L3 cache",
        ),
        (
            "auto",
            true,
            "0,2",
            "0",
            "the worker polls near the vCPU thread on CPU 0, on a CPU of its NUMA node",
        ),
        (
            "auto",
            true,
            "0",
            "0",
            "the vCPU thread is pinned there; the worker sleeps instead of polling, as no CPU near it is free",
        ),
        (
            "auto",
            false,
            "0-15",
            "8",
            "the vCPU thread is pinned to CPU 8, which is offline; meanwhile the worker runs on a CPU of its NUMA node",
        ),
        (
            "auto",
            false,
            "0-3",
            "0-7",
            "the vCPU thread floats over CPUs 0-7, so the worker floats over those of them that it may use",
        ),
        (
            "auto",
            true,
            "4-5",
            "0",
            "the worker polls on one of CPUs 4-5, chosen to avoid pinned vCPUs and other polling workers, as the vCPU thread is pinned to CPU 0, but this daemon may run on CPUs 4-5 only: widen the daemon's cpuset",
        ),
        (
            "sibling",
            false,
            ALL,
            "0",
            "CPU 0 has no usable SMT sibling, so placement auto applies: the vCPU thread is pinned there",
        ),
        (
            "sibling",
            false,
            ALL,
            "1",
            "this is an SMT sibling of CPU 1, which the vCPU thread is pinned to",
        ),
        (
            "core-near",
            false,
            ALL,
            "0",
            "the worker runs near the vCPU thread on CPU 0, on a CPU that shares its L3 cache",
        ),
        (
            "core-near",
            false,
            "0,4",
            "0",
            "no CPU near CPU 0 is free, so placement auto applies: the vCPU thread is pinned there",
        ),
        (
            "list:8",
            false,
            ALL,
            "0",
            "workers are pinned to CPUs 0-7,9-15 in turn, as CPU 8 of placement list:8 cannot be used now",
        ),
        (
            "list:8,3",
            false,
            ALL,
            "0",
            "CPU 8 of placement list:8,3 cannot be used now, so another CPU of the list replaces it",
        ),
        (
            "none",
            true,
            "0",
            "0",
            "placement none leaves the choice to the scheduler; the worker sleeps instead of polling, as vCPUs are pinned there",
        ),
    ] {
        let (mode, allowed, map) = (mode.parse().unwrap(), set(allowed), map(&[vcpus]));
        let host = HostConstraints {
            mode: &mode,
            allowed: &allowed,
            topology: &topology,
            polling,
            memory: &BTreeMap::new(),
            others: &CpuSet::default(),
            polling_elsewhere: &[],
            previous: &BTreeMap::new(),
        };
        let context = PlacementContext::new(host, &map, 1);
        assert_eq!(Rules::new(&context).choose_cpus(0).why, why);
    }
}

#[test]
fn cpu_of_a_worker_does_not_depend_on_the_order_of_placement() {
    let dir = TempDir::new("order");
    let topology = host(&dir, ALL, "");
    let map = map(&["0", "1", "2", "3", "4", "5"]);
    let (mode, allowed) = (Placement::CoreNear, set(ALL));
    let host = HostConstraints {
        mode: &mode,
        allowed: &allowed,
        topology: &topology,
        polling: true,
        memory: &BTreeMap::new(),
        others: &CpuSet::default(),
        polling_elsewhere: &[],
        previous: &BTreeMap::new(),
    };
    let context = PlacementContext::new(host, &map, 6);
    let all = Rules::new(&context);
    for pair in (0..6).rev() {
        let alone = Rules::new(&context);
        assert_eq!(alone.choose_cpus(pair), all.choose_cpus(pair), "{pair}");
    }
    // A pair beyond the maximum causes no long loop.
    assert!(!all.choose_cpus(u32::MAX).cpus.is_empty());
}
