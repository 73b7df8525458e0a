//! From policy, host, vCPU threads and queue pair to a decision; the rules
//! themselves are in `rules.rs`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::checks;
use crate::cpuset::CpuSet;
use crate::decision::Decision;
use crate::discovery;
use crate::policy::Placement;
use crate::procfs::ProcFs;
use crate::rules::{CpuChoice, HostConstraints, Rules};
use crate::topology::Topology;
use crate::vcpus::VcpuMap;
use crate::warnings::Warning;
use crate::watch::VcpuWatch;

/// How long a visit to QEMU's monitor may take.
const QMP_TIMEOUT: Duration = Duration::from_secs(2);

/// Decides where workers stand.
#[derive(Debug, Clone)]
pub struct PlacementPlanner {
    mode: Placement,
    allowed: CpuSet,
    qmp: Option<PathBuf>,
    qmp_timeout: Duration,
    proc: ProcFs,
    topology: Arc<Topology>,
    polling: bool,
    /// NUMA node of each pair's rings, as far as it is known.
    memory: BTreeMap<u32, u32>,
    /// CPUs that vCPUs of other guests are pinned to.
    others: CpuSet,
}

/// Why a policy cannot be followed on this host.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlacementError {
    /// The list names CPUs that the daemon may not use.
    #[error("placement {mode} names {}, but this daemon may run on {} only: choose among those or widen its cpuset", .outside.describe(), .allowed.describe())]
    Outside {
        /// The policy.
        mode: Placement,
        /// The CPUs of its list that are not allowed.
        outside: CpuSet,
        /// The CPUs that are.
        allowed: CpuSet,
    },
    /// There is no CPU to place anything on.
    #[error("the set of CPUs allowed to this daemon is empty: widen its cpuset")]
    NoCpu,
}

impl PlacementPlanner {
    /// A planner for `mode` on the CPUs `allowed` to this process, as
    /// [`process_cpus`](crate::process_cpus) gives them. `qmp` is the
    /// path of a QMP socket that nobody else uses.
    ///
    /// # Errors
    ///
    /// [`PlacementError`] when the policy's list names a CPU that is not allowed, or
    /// nothing is allowed.
    pub fn new(
        mode: Placement,
        allowed: CpuSet,
        qmp: Option<PathBuf>,
    ) -> Result<Self, PlacementError> {
        if allowed.is_empty() {
            return Err(PlacementError::NoCpu);
        }
        if let Placement::List(cpus) = &mode {
            let outside: CpuSet = cpus
                .iter()
                .copied()
                .filter(|&cpu| !allowed.contains(cpu))
                .collect();
            if !outside.is_empty() {
                return Err(PlacementError::Outside {
                    mode,
                    outside,
                    allowed,
                });
            }
        }
        Ok(Self {
            mode,
            allowed,
            qmp,
            qmp_timeout: QMP_TIMEOUT,
            proc: ProcFs::new("/proc"),
            topology: Arc::default(),
            polling: false,
            memory: BTreeMap::new(),
            others: CpuSet::default(),
        })
    }

    /// Heeds the host's topology: offline and isolated CPUs, SMT siblings,
    /// caches, nodes. Without it every CPU counts as online and near.
    #[must_use]
    pub fn with_topology(mut self, topology: impl Into<Arc<Topology>>) -> Self {
        self.topology = topology.into();
        self
    }

    /// Whether the workers poll: these keep off the CPUs of pinned vCPUs.
    #[must_use]
    pub fn with_polling(mut self, polling: bool) -> Self {
        self.polling = polling;
        self
    }

    /// The host has changed: other CPUs are `allowed` to this process, or
    /// online. An empty `allowed` is ignored.
    pub fn set_host(&mut self, allowed: CpuSet, topology: impl Into<Arc<Topology>>) {
        if !allowed.is_empty() {
            self.allowed = allowed;
        }
        self.topology = topology.into();
    }

    /// The rings of `pair` lie on this NUMA node (`None`: not known).
    pub fn set_memory_node(&mut self, pair: u32, node: Option<u32>) {
        match node {
            Some(node) => _ = self.memory.insert(pair, node),
            None => _ = self.memory.remove(&pair),
        }
    }

    /// vCPUs of other guests are pinned to these CPUs: workers that poll keep off them, too.
    pub fn set_pinned_by_others(&mut self, cpus: CpuSet) {
        self.others = cpus;
    }

    /// The CPUs that the vCPUs of `map` are pinned to.
    #[must_use]
    pub fn pinned(&self, map: &VcpuMap) -> CpuSet {
        self.rules(map, 1).pinned()
    }

    /// The topology that decisions heed.
    #[must_use]
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// Reads threads from another procfs than the one at `/proc`.
    #[must_use]
    pub fn with_proc_root(mut self, root: impl Into<PathBuf>) -> Self {
        self.proc = ProcFs::new(root);
        self
    }

    /// Gives a visit to QEMU's monitor another limit than 2 seconds, a minute at
    /// most.
    #[must_use]
    pub fn with_qmp_timeout(mut self, timeout: Duration) -> Self {
        self.qmp_timeout = timeout.min(Duration::from_secs(60));
        self
    }

    /// Whether [`PlacementPlanner::discover`] may ask QEMU's monitor, and wait for it.
    #[must_use]
    pub fn may_ask_monitor(&self) -> bool {
        self.qmp.is_some() && self.mode.follows_vcpus()
    }

    /// Looks for the vCPU threads of the front-end, process `pid` (from
    /// SO_PEERCRED).
    ///
    /// Blocks up to the QMP limit when it asks QEMU, which it does only where
    /// the policy follows vCPUs; see the crate's page on when to call it.
    #[must_use]
    pub fn discover(&self, pid: Option<i32>) -> VcpuMap {
        let monitor = self.qmp.as_deref().filter(|_| self.mode.follows_vcpus());
        discovery::discover(
            &self.proc,
            pid,
            monitor.map(|path| (path, self.qmp_timeout)),
        )
    }

    /// Reads anew where the threads of `map` may run, without looking for them
    /// again. A thread that is gone is left without CPUs.
    pub fn refresh(&self, map: &mut VcpuMap) {
        for vcpu in &mut map.vcpus {
            // One whose CPUs were never known may be a stranger with the same number.
            if vcpu.cpus.is_some() {
                vcpu.cpus = self.proc.any_thread(vcpu.tid).map(|thread| thread.cpus);
            }
        }
    }

    /// A watch over the threads of `map`, which [`discover`](Self::discover)
    /// found in process `pid`. To miss nothing, [`refresh`](Self::refresh) the
    /// map once more after this.
    #[must_use]
    pub fn watch(&self, pid: Option<i32>, map: &VcpuMap) -> VcpuWatch {
        VcpuWatch::new(&self.proc, pid, map)
    }

    /// Where the worker of `pair` stands when the driver uses `pairs` pairs.
    #[must_use]
    pub fn place(&self, map: &VcpuMap, pair: u32, pairs: u32) -> Decision {
        decide(&self.rules(map, pairs), pair)
    }

    /// Where the workers of the first `count` pairs stand when the driver uses
    /// `pairs` of them: what [`place`](Self::place) says of each.
    #[must_use]
    pub fn place_all(&self, map: &VcpuMap, count: u32, pairs: u32) -> Vec<Decision> {
        let rules = self.rules(map, pairs);
        // The last one first: what is worked out for it serves all.
        let decisions = (0..count).rev().map(|pair| decide(&rules, pair));
        let mut decisions: Vec<_> = decisions.collect();
        decisions.reverse();
        decisions
    }

    /// What is wrong with how vCPUs and workers stand, with these decisions for
    /// the pairs in use.
    #[must_use]
    pub fn warnings(&self, map: &VcpuMap, decisions: &[Decision]) -> Vec<Warning> {
        let pairs = u32::try_from(decisions.len()).unwrap_or(u32::MAX);
        checks::warnings(&self.rules(map, pairs), decisions)
    }

    fn rules<'a>(&'a self, map: &'a VcpuMap, pairs: u32) -> Rules<'a> {
        let host = HostConstraints {
            mode: &self.mode,
            allowed: &self.allowed,
            topology: &self.topology,
            polling: self.polling,
            memory: &self.memory,
            others: &self.others,
        };
        Rules::new(host, map, pairs)
    }
}

fn decide(rules: &Rules<'_>, pair: u32) -> Decision {
    let vcpus = rules.vcpus_of(pair);
    let CpuChoice {
        cpus,
        may_poll,
        why,
    } = rules.choose_cpus(pair);
    Decision {
        pair,
        vcpus: vcpus.iter().map(|vcpu| vcpu.index).collect(),
        vcpu_tid: vcpus.first().map(|vcpu| vcpu.tid),
        cpus,
        may_poll,
        why,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{TempDir, map, set};
    use crate::vcpus::Vcpu;

    fn planner(mode: &str, allowed: &str) -> PlacementPlanner {
        PlacementPlanner::new(mode.parse().unwrap(), set(allowed), None).unwrap()
    }

    fn places(planner: &PlacementPlanner, map: &VcpuMap, pairs: u32) -> Vec<String> {
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
    fn each_policy_places_each_worker() {
        let table: [Case; 18] = [
            // Pinned vCPUs are followed, one by one or by groups.
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
            // Floating ones: a turn over where they float.
            ("auto", "0-3", &["0-3", "0-3"], 2, &["0", "1"]),
            ("auto", "0-1", &["0-7", "0-7"], 4, &["0", "1", "0", "1"]),
            ("auto", "0-7", &["2-5", "2-5"], 2, &["2", "3"]),
            // Partly outside the daemon's CPUs, wholly outside, unreadable, unknown.
            ("auto", "1-4", &["0-1", "4-5"], 2, &["1", "4"]),
            ("auto", "0-1", &["6", "7"], 2, &["0", "1"]),
            ("auto", "0-1", &["?", "?"], 3, &["0", "1", "0"]),
            ("auto", "4,6", &[], 3, &["4", "6", "4"]),
            ("same", "0-3", &["0-3", "0-3"], 2, &["0-3", "0-3"]),
            ("list:3,1", "0-3", &["2", "2"], 4, &["3", "1", "3", "1"]),
            ("list", "4-5", &[], 3, &["4", "5", "4"]),
            ("none", "0-3", &["2", "2"], 2, &["0-3", "0-3"]),
        ];
        for (mode, allowed, vcpus, pairs, workers) in table {
            let got = places(&planner(mode, allowed), &map(vcpus), pairs);
            assert_eq!(got, workers, "{mode} on {allowed}, vCPUs on {vcpus:?}");
        }
    }

    #[test]
    fn the_decision_lists_all_vcpus_and_the_reason() {
        for (mode, vcpus, line) in [
            (
                "auto",
                map(&["2", "3", "0", "1"]),
                "pair 1 -> vCPUs 2-3 (thread 102) -> worker on CPU 0: vCPU thread pinned there",
            ),
            (
                "auto",
                map(&["0-3", "0-3"]),
                "pair 1 -> vCPU 1 (thread 101) -> worker on CPU 1: \
                 vCPU thread floats over CPUs 0-3, so workers take these in turn",
            ),
            (
                "auto",
                map(&["0", "3-4"]),
                "pair 1 -> vCPU 1 (thread 101) -> worker on CPU 3: \
                 vCPU thread pinned to CPUs 3-4, the rest not allowed to this daemon",
            ),
            (
                "same",
                map(&["0", "8"]),
                "pair 1 -> vCPU 1 (thread 101) -> worker on CPU 1: workers take CPUs 0-3 in turn, \
                 as vCPU thread is on CPU 8 where this daemon, on CPUs 0-3, may not run: widen the daemon's cpuset",
            ),
            (
                "auto",
                map(&["0", "?"]),
                "pair 1 -> vCPU 1 (thread 101) -> worker on CPU 1: workers take CPUs 0-3 in turn, \
                 as the CPUs of the vCPU thread cannot be read",
            ),
            (
                "same",
                map(&["0", "2-3"]),
                "pair 1 -> vCPU 1 (thread 101) -> worker on CPUs 2-3: placement same, vCPU thread on CPUs 2-3",
            ),
            (
                "list:3",
                map(&["0", "2"]),
                "pair 1 -> vCPU 1 (thread 101) -> worker on CPU 3: placement list:3 says so",
            ),
            (
                "none",
                map(&[]),
                "pair 1 -> unknown vCPU -> worker on CPUs 0-3: placement none leaves it to the scheduler",
            ),
        ] {
            assert_eq!(planner(mode, "0-3").place(&vcpus, 1, 2).to_string(), line);
        }
    }

    #[test]
    fn a_blind_decision_says_what_to_do() {
        let dir = TempDir::new("blind");
        dir.thread(100, 100, "qemu-system-x86", "0-3");
        let planner = planner("auto", "0-1").with_proc_root(dir.path());
        assert_eq!(
            planner
                .place(&planner.discover(Some(100)), 3, 4)
                .to_string(),
            "pair 3 -> unknown vCPU -> worker on CPU 1: workers take CPUs 0-1 in turn, \
             as no vCPU threads found for process 100: start QEMU with -name NAME,debug-threads=on or give --qmp=PATH"
        );
    }

    #[test]
    fn a_map_is_refreshed_without_a_search() {
        let dir = TempDir::new("refresh");
        dir.thread(100, 100, "qemu-system-x86", "0-3");
        dir.thread(100, 102, "CPU 0/KVM", "2");
        dir.thread(100, 103, "CPU 1/KVM", "3");
        let planner = planner("auto", "0-3").with_proc_root(dir.path());
        let mut map = planner.discover(Some(100));
        // A stranger's number: its CPUs were never known, and are not read now.
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
    fn another_host_makes_other_decisions() {
        let map = map(&["0-3", "0-3"]);
        let mut planner = planner("auto", "0-3");
        assert_eq!(places(&planner, &map, 2), ["0", "1"]);
        planner.set_host(set("2-3"), Topology::default());
        assert_eq!(places(&planner, &map, 2), ["2", "3"]);
        planner.set_host(CpuSet::default(), Topology::default());
        assert_eq!(
            places(&planner, &map, 2),
            ["2", "3"],
            "no CPU at all cannot be"
        );
        assert_eq!(
            planner.place_all(&map, 3, 2),
            [0, 1, 2].map(|pair| planner.place(&map, pair, 2))
        );
    }

    #[test]
    fn workers_that_poll_keep_off_the_vcpus_of_other_guests() {
        for (mode, alone, beside) in [
            ("auto", ["2", "3"], ["4", "5"]),
            ("none", ["2-5", "2-5"], ["4-5", "4-5"]),
            ("same", ["0", "1"], ["0", "1"]),
        ] {
            let map = map(&["0", "1"]);
            let mut planner = planner(mode, "0-5").with_polling(true);
            assert_eq!(planner.pinned(&map), set("0-1"));
            assert_eq!(places(&planner, &map, 2), alone, "{mode}");
            planner.set_pinned_by_others(set("2-3"));
            assert_eq!(planner.pinned(&map), set("0-1"));
            assert_eq!(places(&planner, &map, 2), beside, "{mode}");
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
    fn qmp_is_left_alone_by_policies_that_do_not_follow() {
        let dir = TempDir::new("alone");
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
    fn lists_stay_within_the_cpuset() {
        let error =
            PlacementPlanner::new("list:0-3".parse().unwrap(), set("0-1"), None).unwrap_err();
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
}
