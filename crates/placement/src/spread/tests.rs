//! Many guests of one daemon on large hosts.

use std::collections::{BTreeMap, BTreeSet};

use crate::testing::{TempDir, map, set, sysfs};
use crate::{CpuSet, Decision, PlacementPlanner, Topology, VcpuMap, VcpuSource};

/// The number of queue pairs of each guest.
const PAIRS: u32 = 4;

/// A host of `cpus` CPUs on two nodes. CPUs k and k + cpus / 2 share a core.
fn host(dir: &TempDir, cpus: u32) -> Topology {
    let (half, quarter) = (cpus / 2, cpus / 4);
    let cores: Vec<_> = (0..half)
        .map(|cpu| format!("{cpu},{}", cpu + half))
        .collect();
    let node = |first: u32| {
        let second = first + half;
        let end = quarter - 1;
        format!("{first}-{},{second}-{}", first + end, second + end)
    };
    let nodes = [node(0), node(quarter)];
    let nodes = nodes.each_ref().map(String::as_str);
    sysfs(dir.path())
        .online(&format!("0-{}", cpus - 1))
        .cores(&cores.iter().map(String::as_str).collect::<Vec<_>>())
        .caches(&nodes)
        .nodes(&nodes);
    Topology::read(dir.path())
}

/// One daemon's devices, which are placed one after the other as the daemon does it.
struct Devices {
    planners: Vec<PlacementPlanner>,
    maps: Vec<VcpuMap>,
    decisions: Vec<Vec<Decision>>,
}

impl Devices {
    fn new(topology: &Topology, polling: bool, maps: Vec<VcpuMap>) -> Self {
        let planner = || {
            let allowed = topology.online().clone();
            let planner = PlacementPlanner::new("auto".parse().unwrap(), allowed, None).unwrap();
            planner
                .with_topology(topology.clone())
                .with_polling(polling)
        };
        Self {
            planners: maps.iter().map(|_| planner()).collect(),
            decisions: vec![Vec::new(); maps.len()],
            maps,
        }
    }

    /// Places the workers of `device`. Returns whether any of them moved.
    fn place(&mut self, device: usize) -> bool {
        let others = |&other: &usize| other != device;
        let elsewhere = (0..self.maps.len())
            .filter(others)
            .flat_map(|other| self.planners[other].polling_workers(&self.decisions[other]));
        let elsewhere = elsewhere.collect();
        let running = (0..self.maps.len())
            .filter(others)
            .filter(|other| !self.decisions[*other].is_empty());
        let pinned: CpuSet = running
            .flat_map(|other| {
                let pinned = self.planners[other].pinned(&self.maps[other]);
                pinned.iter().collect::<Vec<_>>()
            })
            .collect();
        let planner = &mut self.planners[device];
        planner.set_pinned_by_others(pinned);
        planner.set_polling_elsewhere(elsewhere);
        planner.set_previous(&self.decisions[device]);
        let decisions = planner.place_all(&self.maps[device], PAIRS, PAIRS);
        let cpus = |all: &[Decision]| all.iter().map(|one| one.cpus.clone()).collect::<Vec<_>>();
        let has_moved = cpus(&decisions) != cpus(&self.decisions[device]);
        self.decisions[device] = decisions;
        has_moved
    }

    /// Places the workers of all devices until none moves. Returns how often any moved.
    fn place_until_stable(&mut self) -> usize {
        let mut moves = 0;
        for _ in 0..100 {
            let devices = 0..self.maps.len();
            let moved = devices.filter(|device| self.place(*device)).count();
            if moved == 0 {
                return moves;
            }
            moves += moved;
        }
        panic!("the workers still move after 100 rounds");
    }

    /// By CPU: the number of workers that are pinned to it.
    fn workers_by_cpu(&self) -> BTreeMap<u32, u32> {
        let mut workers = BTreeMap::new();
        for decision in self.decisions.iter().flatten() {
            assert_eq!(decision.cpus.len(), 1, "{decision}");
            *workers.entry(decision.cpus.last().unwrap()).or_default() += 1;
        }
        workers
    }
}

fn floating(cpus: u32) -> VcpuMap {
    let all = format!("0-{}", cpus - 1);
    map(&[all.as_str(); PAIRS as usize])
}

fn unknown() -> VcpuMap {
    VcpuMap {
        vcpus: vec![],
        source: VcpuSource::Nowhere,
        notes: vec!["no name: give one".into()],
    }
}

#[test]
fn workers_of_30_floating_guests_need_not_share_a_cpu() {
    for cpus in [64, 256] {
        let dir = TempDir::new(&format!("spread-floating-{cpus}"));
        let topology = host(&dir, cpus);
        for of_guest in [floating(cpus), unknown()] {
            let mut devices = Devices::new(&topology, false, vec![of_guest; 30]);
            devices.place_until_stable();
            for decision in devices.decisions.iter().flatten() {
                assert_eq!(&decision.cpus, topology.online(), "{decision}");
            }
            // With the memory of each guest on one node, its workers float over that node.
            for (node, planner) in (0..).zip(&mut devices.planners) {
                (0..PAIRS).for_each(|pair| planner.set_memory_node(pair, Some(node % 2)));
            }
            devices.place_until_stable();
            for (device, decisions) in (0..).zip(&devices.decisions) {
                for decision in decisions {
                    let node = topology.node_of_all(&decision.cpus);
                    assert_eq!(node, Some(device % 2), "{decision}");
                    assert_eq!(decision.cpus.len(), topology.online().len() / 2);
                }
            }
        }
    }
}

#[test]
fn polling_workers_of_30_floating_guests_are_spread_evenly() {
    for (cpus, fewest, most, used) in [(64, 1, 2, 64), (256, 1, 1, 120)] {
        let dir = TempDir::new(&format!("spread-polling-{cpus}"));
        let topology = host(&dir, cpus);
        for of_guest in [floating(cpus), unknown()] {
            let mut devices = Devices::new(&topology, true, vec![of_guest; 30]);
            assert_eq!(
                devices.place_until_stable(),
                30,
                "each device is placed once"
            );
            let workers = devices.workers_by_cpu();
            assert_eq!(workers.len(), used);
            assert_eq!(workers.values().min(), Some(&fewest), "{workers:?}");
            assert_eq!(workers.values().max(), Some(&most), "{workers:?}");
            assert!(devices.decisions.iter().flatten().all(|one| one.may_poll));
        }
    }
}

#[test]
fn polling_workers_avoid_the_pinned_vcpus_of_every_guest() {
    let dir = TempDir::new("spread-pinned");
    let topology = host(&dir, 64);
    // Guests 0-3 are pinned to CPUs 0-15, whose siblings are CPUs 32-47; the others float.
    let pinned = (0..4_u32).map(|guest| {
        let cpus = [0, 1, 2, 3].map(|vcpu| (PAIRS * guest + vcpu).to_string());
        map(&cpus.each_ref().map(String::as_str))
    });
    let maps = pinned.chain((0..8).map(|_| floating(64))).collect();
    let mut devices = Devices::new(&topology, true, maps);
    devices.place_until_stable();
    let workers = devices.workers_by_cpu();
    assert_eq!(workers.len(), 48, "12 guests of 4 on 48 CPUs: {workers:?}");
    assert!(workers.keys().all(|cpu| *cpu >= 16), "{workers:?}");
}

#[test]
fn guest_that_leaves_moves_only_workers_that_shared_a_cpu() {
    let dir = TempDir::new("spread-leave");
    let topology = host(&dir, 64);
    let mut devices = Devices::new(&topology, true, vec![floating(64); 17]);
    devices.place_until_stable();
    let before = devices.workers_by_cpu();
    let shared: BTreeSet<_> = before.iter().filter(|(_, n)| **n > 1).collect();
    assert_eq!(shared.len(), 4, "17 guests of 4 on 64 CPUs: {before:?}");
    // A guest whose CPUs are not shared.
    let all = devices.decisions.clone();
    let leaves = all
        .iter()
        .position(|of| of.iter().all(|one| before[&one.cpus.last().unwrap()] == 1))
        .unwrap();
    devices.maps.remove(leaves);
    devices.planners.remove(leaves);
    devices.decisions.remove(leaves);
    assert_eq!(
        devices.place_until_stable(),
        1,
        "one of the guests that shared moves"
    );
    assert!(devices.workers_by_cpu().values().all(|n| *n == 1));
}

#[test]
fn few_cpus_for_the_polling_workers_of_all_devices_give_a_warning() {
    let dir = TempDir::new("spread-warning");
    let topology = host(&dir, 8);
    let mut devices = Devices::new(&topology, true, vec![floating(8); 2]);
    devices.place_until_stable();
    let is_crowded = |devices: &Devices| {
        let (planner, map) = (&devices.planners[0], &devices.maps[0]);
        let warnings = planner.warnings(map, &devices.decisions[0]);
        let warnings = warnings.iter().map(ToString::to_string);
        let few: Vec<_> = warnings.filter(|text| text.contains("share")).collect();
        few
    };
    assert_eq!(is_crowded(&devices), [""; 0]);
    let mut devices = Devices::new(&topology, true, vec![floating(8); 3]);
    devices.place_until_stable();
    assert_eq!(
        is_crowded(&devices),
        ["8 workers share CPUs 0-3: give the daemon more CPUs or the guest fewer queue pairs"]
    );
    assert_eq!(devices.decisions[0][0].cpus, set("0"));
}
