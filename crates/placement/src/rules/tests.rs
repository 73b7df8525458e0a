//! Each rule, on a host with two nodes, four caches and SMT.

use super::*;
use crate::testing::{TempDir, map, set, sysfs};

/// Two nodes of two L3 caches of two cores of two threads: CPU k and k + 8
/// are one core, 0-1 (and 8-9) one cache, 0-3 (and 8-11) one node.
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
    /// Where each worker stands; with `!` where it may not poll.
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

    /// What is wrong with where the workers stand.
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
        };
        let rules = Rules::new(host, &map, self.pairs);
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
fn every_rule_places_every_worker() {
    let table = [
        // auto
        case("beside, asleep", "auto", &["2", "3"], 2, &["2", "3"]),
        case(
            "near, polling: same cache, no sibling",
            "auto",
            &["0", "2"],
            2,
            &["1", "3"],
        )
        .polls(),
        case(
            "each its own: the cache's, then the node's, siblings last",
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
            "no CPU left: it sleeps",
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
            "floating vCPUs leave polling alone",
            "auto",
            &["0-15", "0-15"],
            2,
            &["0", "1"],
        )
        .polls(),
        case(
            "isolated CPUs get no turn",
            "auto",
            &["0-15", "0-15"],
            2,
            &["2", "3"],
        )
        .isolated("0-1"),
        case(
            "offline CPUs get no turn",
            "auto",
            &["0-15", "0-15"],
            2,
            &["1", "2"],
        )
        .online("1-15"),
        case(
            "one floats beside a pinned one: polling keeps off the latter",
            "auto",
            &["0", "0-15"],
            2,
            &["1", "2"],
        )
        .polls(),
        case(
            "a CPU that went offline: near it",
            "auto",
            &["7", "6"],
            2,
            &["4", "6"],
        )
        .online("0-6,8-13"),
        case(
            "outside the cpuset: near it",
            "auto",
            &["1", "3"],
            2,
            &["0", "2"],
        )
        .allowed("0,2"),
        case(
            "outside the cpuset, node and all",
            "auto",
            &["0", "1"],
            2,
            &["4", "5"],
        )
        .allowed("4-5"),
        case("unknown: in turn", "auto", &[], 3, &["1", "2", "4"])
            .isolated("0")
            .online("0-2,4-15"),
        case("unreadable: in turn", "auto", &["?", "?"], 2, &["0", "1"]),
        // same
        case("same, asleep", "same", &["2", "3"], 2, &["2", "3"]),
        case("same forces polling", "same", &["2", "3"], 2, &["2", "3"]).polls(),
        case(
            "same takes all of them",
            "same",
            &["2-3", "0-15"],
            2,
            &["2-3", "0-15"],
        ),
        case("same without knowing: in turn", "same", &[], 2, &["0", "1"]),
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
            "the other thread is a vCPU's",
            "sibling",
            &["0", "8"],
            2,
            &["8", "0"],
        ),
        case(
            "and polling there is not allowed",
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
            "an isolated core is the guest's",
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
            &["0", "1"],
        ),
        case("unknown: as auto", "sibling", &[], 2, &["0", "1"]),
        // core-near
        case("near, asleep", "core-near", &["0", "2"], 2, &["1", "3"]),
        case("near, polling", "core-near", &["0", "2"], 2, &["1", "3"]).polls(),
        case(
            "near: never a vCPU's CPU",
            "core-near",
            &["0", "1"],
            2,
            &["2", "3"],
        ),
        case(
            "none near: as auto",
            "core-near",
            &["0", "1"],
            2,
            &["0", "1"],
        )
        .allowed("0-1,4-7,12-15"),
        case(
            "none near, polling: asleep",
            "core-near",
            &["0", "1"],
            2,
            &["0!", "1!"],
        )
        .polls()
        .allowed("0-1,4-7,12-15"),
        case(
            "near, spread over groups",
            "core-near",
            &["0", "1", "4", "5"],
            2,
            &["2", "6"],
        ),
        case("near: not an isolated one", "core-near", &["0"], 1, &["2"]).isolated("1,9"),
        case(
            "floating: as auto",
            "core-near",
            &["0-15", "0-15"],
            2,
            &["0", "1"],
        ),
        case("unknown: as auto", "core-near", &[], 2, &["0", "1"]),
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
            "for an offline one others stand in",
            "list:3,1,2",
            &["0"],
            3,
            &["1", "1", "2"],
        )
        .online("0-2"),
        case(
            "all of them offline: in turn",
            "list:3",
            &["0"],
            2,
            &["0", "1"],
        )
        .online("0-2"),
        case(
            "all of them lost to the cpuset, polling: no vCPU's CPU",
            "list:3",
            &["0"],
            2,
            &["1", "2"],
        )
        .polls()
        .allowed("0-2"),
        case(
            "list alone: in turn, none isolated",
            "list",
            &["0"],
            3,
            &["1", "2", "3"],
        )
        .isolated("0"),
        // none
        case("anywhere", "none", &["0", "1"], 2, &["0-15", "0-15"]),
        case(
            "anywhere, but not isolated or offline",
            "none",
            &["0"],
            1,
            &["1-13"],
        )
        .isolated("0")
        .online("0-13"),
        case(
            "anywhere, polling: no vCPU's CPU",
            "none",
            &["0", "1"],
            2,
            &["2-15", "2-15"],
        )
        .polls(),
        case(
            "anywhere, but vCPUs are everywhere",
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
fn a_floating_guest_is_served_on_the_node_of_its_memory() {
    let nobody = CpuSet::default();
    let dir = TempDir::new("memory");
    let topology = host(&dir, ALL, "5");
    let map = map(&["0-15", "0-15", "0-15"]);
    let memory = BTreeMap::from([(0, 1), (1, 1), (2, 7)]);
    let (mode, allowed) = (Placement::Auto, set(ALL));
    let rules = Rules::new(
        HostConstraints {
            mode: &mode,
            allowed: &allowed,
            topology: &topology,
            polling: false,
            memory: &memory,
            others: &nobody,
        },
        &map,
        3,
    );
    let choices: Vec<_> = (0..3).map(|pair| rules.choose_cpus(pair)).collect();
    let cpus: Vec<_> = choices
        .iter()
        .map(|choice| choice.cpus.to_string())
        .collect();
    assert_eq!(
        cpus,
        ["4", "6", "2"],
        "pair 2's memory is on a node without CPUs"
    );
    assert_eq!(
        choices[1].why,
        "vCPU thread floats over CPUs 0-15, so workers take these in turn on the node of its memory, 1"
    );
}

#[test]
fn reasons_are_told_in_words() {
    let dir = TempDir::new("reasons");
    let topology = host(&dir, "0-7,9-15", "");
    for (mode, polling, allowed, vcpus, why) in [
        (
            "auto",
            true,
            ALL,
            "0",
            "polls near the vCPU thread on CPU 0, on its L3 cache",
        ),
        (
            "auto",
            true,
            "0,2",
            "0",
            "polls near the vCPU thread on CPU 0, on its NUMA node",
        ),
        (
            "auto",
            true,
            "0",
            "0",
            "vCPU thread pinned there; it sleeps instead of polling, as no CPU near is free",
        ),
        (
            "auto",
            false,
            "0-15",
            "8",
            "vCPU thread is on CPU 8, offline now; until then the worker is on its NUMA node",
        ),
        (
            "sibling",
            false,
            ALL,
            "0",
            "CPU 0 has no SMT sibling to use, so as auto: vCPU thread pinned there",
        ),
        (
            "sibling",
            false,
            ALL,
            "1",
            "SMT sibling of the vCPU thread on CPU 1",
        ),
        (
            "core-near",
            false,
            ALL,
            "0",
            "near the vCPU thread on CPU 0, on its L3 cache",
        ),
        (
            "core-near",
            false,
            "0,4",
            "0",
            "no CPU near CPU 0 is free, so as auto: vCPU thread pinned there",
        ),
        (
            "list:8",
            false,
            ALL,
            "0",
            "workers take CPUs 0-7,9-15 in turn, as CPU 8 of placement list:8 cannot be used now",
        ),
        (
            "list:8,3",
            false,
            ALL,
            "0",
            "CPU 8 of placement list:8,3 cannot be used now, so another of it stands in",
        ),
        (
            "none",
            true,
            "0",
            "0",
            "placement none leaves it to the scheduler; it sleeps instead of polling, as vCPUs are pinned there",
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
        };
        assert_eq!(Rules::new(host, &map, 1).choose_cpus(0).why, why);
    }
}

#[test]
fn one_workers_place_does_not_depend_on_who_asks() {
    let dir = TempDir::new("asks");
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
    };
    let all = Rules::new(host, &map, 6);
    for pair in (0..6).rev() {
        let alone = Rules::new(host, &map, 6);
        assert_eq!(alone.choose_cpus(pair), all.choose_cpus(pair), "{pair}");
    }
    // Pairs beyond what anything can address cost no endless walk.
    assert!(!all.choose_cpus(u32::MAX).cpus.is_empty());
}
