//! From policy, vCPU threads and queue pair to a decision.

use std::path::PathBuf;
use std::time::Duration;

use crate::cpuset::CpuSet;
use crate::decision::Decision;
use crate::discovery;
use crate::mode::Placement;
use crate::pairs::vcpus_of_pair;
use crate::procfs::ProcFs;
use crate::vcpus::{Vcpu, VcpuMap};

/// How long a visit to QEMU's monitor may take.
const QMP_TIMEOUT: Duration = Duration::from_secs(2);

/// Decides where workers stand.
#[derive(Debug, Clone)]
pub struct Planner {
    mode: Placement,
    allowed: CpuSet,
    qmp: Option<PathBuf>,
    qmp_timeout: Duration,
    proc: ProcFs,
}

/// Why a policy cannot be followed on this host.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// The list names CPUs that the daemon may not use.
    #[error("placement {mode} names {}, but this daemon may run on {} only: choose among those or widen its cpuset", .outside.words(), .allowed.words())]
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

impl Planner {
    /// A planner for `mode` on the CPUs `allowed` to this process, as
    /// [`allowed_cpus`](crate::allowed_cpus) gave them at start. `qmp` is the
    /// path of a QMP socket that nobody else uses.
    ///
    /// # Errors
    ///
    /// [`PlanError`] when the policy's list names a CPU that is not allowed, or
    /// nothing is allowed.
    pub fn new(mode: Placement, allowed: CpuSet, qmp: Option<PathBuf>) -> Result<Self, PlanError> {
        if allowed.is_empty() {
            return Err(PlanError::NoCpu);
        }
        if let Placement::List(cpus) = &mode {
            let outside: CpuSet = cpus
                .iter()
                .copied()
                .filter(|&cpu| !allowed.contains(cpu))
                .collect();
            if !outside.is_empty() {
                return Err(PlanError::Outside {
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
        })
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

    /// Where the worker of `pair` stands when the driver uses `pairs` pairs.
    #[must_use]
    pub fn place(&self, map: &VcpuMap, pair: u32, pairs: u32) -> Decision {
        let vcpus = served(map, pair, pairs);
        let (cpus, why) = match &self.mode {
            Placement::Auto => self.follow(map, vcpus.first(), pair, false),
            Placement::Same => self.follow(map, vcpus.first(), pair, true),
            Placement::List(cpus) => self.listed(cpus, pair),
            Placement::None => (
                self.allowed.clone(),
                "placement none leaves it to the scheduler".into(),
            ),
        };
        Decision {
            pair,
            vcpus: vcpus.iter().map(|vcpu| vcpu.index).collect(),
            vcpu_tid: vcpus.first().map(|vcpu| vcpu.tid),
            cpus,
            why,
        }
    }

    fn listed(&self, cpus: &[u32], pair: u32) -> (CpuSet, String) {
        let turn = usize::try_from(pair)
            .ok()
            .and_then(|pair| pair.checked_rem(cpus.len()));
        let cpus = match turn.and_then(|turn| cpus.get(turn)) {
            Some(&cpu) => CpuSet::from_iter([cpu]),
            None => self.allowed.turn(pair),
        };
        (cpus, format!("placement {} says so", self.mode))
    }

    /// The CPUs of the matching vCPU's thread, within what is allowed.
    fn follow(
        &self,
        map: &VcpuMap,
        vcpu: Option<&&Vcpu>,
        pair: u32,
        exactly: bool,
    ) -> (CpuSet, String) {
        let Some(vcpu) = vcpu else {
            return self.take_turn(pair, &map.failures());
        };
        let Some(pinned) = &vcpu.cpus else {
            let why = format!(
                "the CPUs of the vCPU thread cannot be read; {}",
                map.failures()
            );
            return self.take_turn(pair, why.trim_end_matches("; "));
        };
        let shared = pinned.intersection(&self.allowed);
        if shared.is_empty() {
            let (there, here) = (pinned.words(), self.allowed.words());
            return self.take_turn(
                pair,
                &format!("vCPU thread is on {there} where this daemon, on {here}, may not run: widen the daemon's cpuset"),
            );
        }
        if exactly {
            return (
                shared,
                format!("placement same, vCPU thread on {}", pinned.words()),
            );
        }
        if self.floats(map, pinned, &shared) {
            return (
                shared.turn(pair),
                format!(
                    "vCPU thread floats over {}, so workers take these in turn",
                    pinned.words()
                ),
            );
        }
        let why = match shared == *pinned {
            true => "vCPU thread pinned there".into(),
            false => format!(
                "vCPU thread pinned to {}, the rest not allowed to this daemon",
                pinned.words()
            ),
        };
        (shared, why)
    }

    /// Whether a vCPU is not pinned: it may run on every CPU that we may (and
    /// there is a choice), or all vCPUs were confined to one wide set.
    ///
    /// A worker that floats as well would wander off the cache its ring lies
    /// in, and two could meet on one CPU; standing on one of the vCPU's CPUs,
    /// each its own while there are enough, neither happens.
    fn floats(&self, map: &VcpuMap, pinned: &CpuSet, shared: &CpuSet) -> bool {
        (pinned.len() > 1 && *shared == self.allowed) || map.float_together()
    }

    fn take_turn(&self, pair: u32, why: &str) -> (CpuSet, String) {
        (
            self.allowed.turn(pair),
            format!("workers take {} in turn, as {why}", self.allowed.words()),
        )
    }
}

/// The vCPUs that the driver gives to `pair`.
fn served(map: &VcpuMap, pair: u32, pairs: u32) -> Vec<&Vcpu> {
    let count = u32::try_from(map.vcpus.len()).unwrap_or(u32::MAX);
    let positions = vcpus_of_pair(pair, pairs, count);
    positions
        .iter()
        .filter_map(|&at| map.vcpus.get(usize::try_from(at).ok()?))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Dir;
    use crate::vcpus::Source;

    fn set(list: &str) -> CpuSet {
        list.parse().unwrap()
    }

    fn planner(mode: &str, allowed: &str) -> Planner {
        Planner::new(mode.parse().unwrap(), set(allowed), None).unwrap()
    }

    /// vCPUs 0.. in threads 100.. on these CPUs; `?` for unreadable ones.
    fn map(cpus: &[&str]) -> VcpuMap {
        let vcpus = (0..)
            .zip(100..)
            .zip(cpus)
            .map(|((index, tid), cpus)| Vcpu {
                index,
                tid,
                cpus: (*cpus != "?").then(|| set(cpus)),
            })
            .collect();
        VcpuMap {
            vcpus,
            source: Source::ThreadNames,
            notes: vec![],
        }
    }

    fn places(planner: &Planner, map: &VcpuMap, pairs: u32) -> Vec<String> {
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
                "pair 1 -> vCPUs 2-3 (thread 102) -> worker vnet-q1 on CPU 0: vCPU thread pinned there",
            ),
            (
                "auto",
                map(&["0-3", "0-3"]),
                "pair 1 -> vCPU 1 (thread 101) -> worker vnet-q1 on CPU 1: \
                 vCPU thread floats over CPUs 0-3, so workers take these in turn",
            ),
            (
                "auto",
                map(&["0", "3-4"]),
                "pair 1 -> vCPU 1 (thread 101) -> worker vnet-q1 on CPU 3: \
                 vCPU thread pinned to CPUs 3-4, the rest not allowed to this daemon",
            ),
            (
                "same",
                map(&["0", "8"]),
                "pair 1 -> vCPU 1 (thread 101) -> worker vnet-q1 on CPU 1: workers take CPUs 0-3 in turn, \
                 as vCPU thread is on CPU 8 where this daemon, on CPUs 0-3, may not run: widen the daemon's cpuset",
            ),
            (
                "auto",
                map(&["0", "?"]),
                "pair 1 -> vCPU 1 (thread 101) -> worker vnet-q1 on CPU 1: workers take CPUs 0-3 in turn, \
                 as the CPUs of the vCPU thread cannot be read",
            ),
            (
                "same",
                map(&["0", "2-3"]),
                "pair 1 -> vCPU 1 (thread 101) -> worker vnet-q1 on CPUs 2-3: placement same, vCPU thread on CPUs 2-3",
            ),
            (
                "list:3",
                map(&["0", "2"]),
                "pair 1 -> vCPU 1 (thread 101) -> worker vnet-q1 on CPU 3: placement list:3 says so",
            ),
            (
                "none",
                map(&[]),
                "pair 1 -> unknown vCPU -> worker vnet-q1 on CPUs 0-3: placement none leaves it to the scheduler",
            ),
        ] {
            assert_eq!(planner(mode, "0-3").place(&vcpus, 1, 2).to_string(), line);
        }
    }

    #[test]
    fn a_blind_decision_says_what_to_do() {
        let dir = Dir::new("blind");
        dir.thread(100, 100, "qemu-system-x86", "0-3");
        let planner = planner("auto", "0-1").with_proc_root(dir.path());
        assert_eq!(
            planner
                .place(&planner.discover(Some(100)), 3, 4)
                .to_string(),
            "pair 3 -> unknown vCPU -> worker vnet-q3 on CPU 1: workers take CPUs 0-1 in turn, \
             as no vCPU threads found for process 100: start QEMU with -name NAME,debug-threads=on or give --qmp=PATH"
        );
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
        let dir = Dir::new("alone");
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
                Planner::new(mode.parse().unwrap(), set("0"), Some(path.clone())).unwrap();
            _ = planner
                .with_qmp_timeout(Duration::from_millis(1))
                .discover(None);
            assert_eq!(listener.accept().is_ok(), asks, "{mode}");
        }
    }

    #[test]
    fn lists_stay_within_the_cpuset() {
        let error = Planner::new("list:0-3".parse().unwrap(), set("0-1"), None).unwrap_err();
        assert_eq!(
            error.to_string(),
            "placement list:0,1,2,3 names CPUs 2-3, but this daemon may run on CPUs 0-1 only: \
             choose among those or widen its cpuset"
        );
        assert_eq!(
            Planner::new(Placement::None, CpuSet::default(), None).unwrap_err(),
            PlanError::NoCpu
        );
    }
}
