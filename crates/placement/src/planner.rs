//! The entry point of placement: finds the vCPU threads, and applies the rules of `rules.rs` and
//! the checks of `checks.rs` to them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::checks;
use crate::context::{HostConstraints, PlacementContext};
use crate::cpuset::CpuSet;
use crate::decision::Decision;
use crate::discovery;
use crate::policy::Placement;
use crate::procfs::ProcFs;
use crate::rules::{CpuChoice, Rules};
use crate::topology::Topology;
use crate::vcpus::VcpuMap;
use crate::warnings::Warning;
use crate::watch::VcpuWatch;

/// How long a QMP session may take, unless the caller gives another limit.
const QMP_TIMEOUT: Duration = Duration::from_secs(2);

/// Finds a front-end's vCPU threads and decides which CPUs the workers are pinned to.
#[derive(Debug, Clone)]
pub struct PlacementPlanner {
    mode: Placement,
    allowed: CpuSet,
    qmp: Option<PathBuf>,
    qmp_timeout: Duration,
    proc: ProcFs,
    topology: Arc<Topology>,
    polling: bool,
    /// The NUMA node of each pair's rings, where it is known.
    memory: BTreeMap<u32, u32>,
    /// CPUs that vCPUs of other guests are pinned to.
    others: CpuSet,
    /// The CPUs of each worker of another device that polls.
    polling_elsewhere: Vec<CpuSet>,
    /// By pair: the CPU of a worker that polls there already.
    previous: BTreeMap<u32, u32>,
}

/// Why a policy cannot be applied on this host.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlacementError {
    /// The list of the policy names CPUs that the daemon may not use.
    #[error("placement {mode} names {}, but this daemon may run on {} only: choose among those or widen its cpuset", .outside.describe(), .allowed.describe())]
    Outside {
        /// The policy.
        mode: Placement,
        /// The listed CPUs that are not allowed.
        outside: CpuSet,
        /// The CPUs that are allowed.
        allowed: CpuSet,
    },
    /// No CPU is allowed.
    #[error("the set of CPUs allowed to this daemon is empty: widen its cpuset")]
    NoCpu,
}

impl PlacementError {
    /// A stable name of the cause, for programs.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Outside { .. } => "placement-cpus-not-allowed",
            Self::NoCpu => "placement-no-cpu-allowed",
        }
    }
}

impl PlacementPlanner {
    /// A planner for policy `mode` on the CPUs `allowed` to this process, as
    /// [`process_cpus`](crate::process_cpus) returns them. `qmp` is the path of a QMP socket that
    /// no other program uses.
    ///
    /// # Errors
    ///
    /// [`PlacementError`] when the policy's list names a CPU that is not allowed, or when no CPU is
    /// allowed.
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
            polling_elsewhere: Vec::new(),
            previous: BTreeMap::new(),
        })
    }

    /// Sets the host's topology: offline and isolated CPUs, SMT siblings, caches and NUMA nodes.
    /// Without it every CPU counts as online and near to every other.
    #[must_use]
    pub fn with_topology(mut self, topology: impl Into<Arc<Topology>>) -> Self {
        self.topology = topology.into();
        self
    }

    /// Sets whether the workers poll. Workers that poll avoid the CPUs of pinned vCPUs.
    #[must_use]
    pub fn with_polling(mut self, polling: bool) -> Self {
        self.polling = polling;
        self
    }

    /// Sets which CPUs are `allowed` to this process and online after a change of the host. An
    /// empty `allowed` is ignored, because a process always has a CPU.
    pub fn set_host(&mut self, allowed: CpuSet, topology: impl Into<Arc<Topology>>) {
        if !allowed.is_empty() {
            self.allowed = allowed;
        }
        self.topology = topology.into();
    }

    /// Sets the NUMA node of the rings of `pair`; `None` where it is not known.
    pub fn set_memory_node(&mut self, pair: u32, node: Option<u32>) {
        match node {
            Some(node) => _ = self.memory.insert(pair, node),
            None => _ = self.memory.remove(&pair),
        }
    }

    /// Sets the CPUs that vCPUs of other guests are pinned to. Workers that poll avoid them too.
    pub fn set_pinned_by_others(&mut self, cpus: CpuSet) {
        self.others = cpus;
    }

    /// Sets the CPUs of each worker of another device that polls. Workers that poll avoid them as
    /// far as there are enough CPUs.
    pub fn set_polling_elsewhere(&mut self, workers: Vec<CpuSet>) {
        self.polling_elsewhere = workers;
    }

    /// Sets the decisions that hold now. A worker that polls keeps its CPU unless another one has
    /// become better.
    pub fn set_previous(&mut self, decisions: &[Decision]) {
        let polling = decisions.iter().filter(|one| one.may_poll);
        let pinned = polling.filter(|one| one.cpus.len() == 1);
        self.previous = pinned
            .filter_map(|one| Some((one.pair, one.cpus.last()?)))
            .collect();
    }

    /// The CPUs of each worker that polls by these decisions, for the planners of other devices.
    #[must_use]
    pub fn polling_workers(&self, decisions: &[Decision]) -> Vec<CpuSet> {
        let polling = decisions.iter().filter(|one| self.polling && one.may_poll);
        polling.map(|one| one.cpus.clone()).collect()
    }

    /// The CPUs that the vCPUs of `map` are pinned to.
    #[must_use]
    pub fn pinned(&self, map: &VcpuMap) -> CpuSet {
        self.context(map, 1).pinned_by_guest()
    }

    /// The topology that decisions depend on.
    #[must_use]
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// Reads threads from the procfs at `root` instead of `/proc`.
    #[must_use]
    pub fn with_proc_root(mut self, root: impl Into<PathBuf>) -> Self {
        self.proc = ProcFs::new(root);
        self
    }

    /// Limits a QMP session to `timeout` instead of 2 seconds; at most a minute.
    #[must_use]
    pub fn with_qmp_timeout(mut self, timeout: Duration) -> Self {
        self.qmp_timeout = timeout.min(Duration::from_secs(60));
        self
    }

    /// Whether [`discover`](Self::discover) may open a QMP session and wait for it.
    #[must_use]
    pub fn may_ask_monitor(&self) -> bool {
        self.qmp.is_some() && self.mode.follows_vcpus()
    }

    /// Finds the vCPU threads of the front-end, which is process `pid` (from `SO_PEERCRED`).
    ///
    /// It blocks up to the time limit when it asks QEMU, which it does only where the policy
    /// depends on the vCPUs. The crate's page says when to call it.
    #[must_use]
    pub fn discover(&self, pid: Option<i32>) -> VcpuMap {
        let monitor = self.qmp.as_deref().filter(|_| self.mode.follows_vcpus());
        discovery::discover(
            &self.proc,
            pid,
            monitor.map(|path| (path, self.qmp_timeout)),
        )
    }

    /// Reads again which CPUs the threads of `map` may run on, without searching for the threads. A
    /// thread that has ended gets no CPUs.
    pub fn refresh(&self, map: &mut VcpuMap) {
        for vcpu in &mut map.vcpus {
            // A thread whose CPUs were never known may be an unrelated one with the same id.
            if vcpu.cpus.is_some() {
                vcpu.cpus = self.proc.any_thread(vcpu.tid).map(|thread| thread.cpus);
            }
        }
    }

    /// A watch over the threads of `map`, which [`discover`](Self::discover) found in process
    /// `pid`. Call [`refresh`](Self::refresh) after this, so that no change in between is missed.
    #[must_use]
    pub fn watch(&self, pid: Option<i32>, map: &VcpuMap) -> VcpuWatch {
        VcpuWatch::new(&self.proc, pid, map)
    }

    /// The CPUs for the worker of `pair` when the driver uses `pairs` pairs.
    #[must_use]
    pub fn place(&self, map: &VcpuMap, pair: u32, pairs: u32) -> Decision {
        let context = self.context(map, pairs);
        decide(&context, &Rules::new(&context), pair)
    }

    /// The result of [`place`](Self::place) for the workers of the first `count` pairs when the
    /// driver uses `pairs` of them.
    #[must_use]
    pub fn place_all(&self, map: &VcpuMap, count: u32, pairs: u32) -> Vec<Decision> {
        let context = self.context(map, pairs);
        let rules = Rules::new(&context);
        // The last pair first, because the rules spread the workers of all pairs up to the first
        // one that they are asked for, once.
        let decisions = (0..count).rev().map(|pair| decide(&context, &rules, pair));
        let mut decisions: Vec<_> = decisions.collect();
        decisions.reverse();
        decisions
    }

    /// What is wrong with the placement of vCPUs and workers, with these decisions for the pairs in
    /// use.
    #[must_use]
    pub fn warnings(&self, map: &VcpuMap, decisions: &[Decision]) -> Vec<Warning> {
        let pairs = u32::try_from(decisions.len()).unwrap_or(u32::MAX);
        checks::find_warnings(&self.context(map, pairs), decisions)
    }

    fn context<'a>(&'a self, map: &'a VcpuMap, pairs: u32) -> PlacementContext<'a> {
        let host = HostConstraints {
            mode: &self.mode,
            allowed: &self.allowed,
            topology: &self.topology,
            polling: self.polling,
            memory: &self.memory,
            others: &self.others,
            polling_elsewhere: &self.polling_elsewhere,
            previous: &self.previous,
        };
        PlacementContext::new(host, map, pairs)
    }
}

fn decide(context: &PlacementContext<'_>, rules: &Rules<'_>, pair: u32) -> Decision {
    let vcpus = context.vcpus_of(pair);
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
mod tests;
