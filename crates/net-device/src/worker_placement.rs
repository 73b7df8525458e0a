//! The placement of a worker's thread: the decision of the device's placer, or a fixed set of CPUs,
//! and its result in the kernel.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use parking_lot::Mutex;
use virtionet_placement::{AffinityError, CpuSet, Decision, allowed_cpus};

use crate::placer::Placer;

/// The placement of a running worker.
#[derive(Debug, Clone)]
pub struct WorkerPlacement {
    /// The thread id of the worker.
    pub tid: i32,
    /// The decision. Its `cpus` are those that the kernel returned after it was applied.
    pub decision: Decision,
    /// The NUMA node of those CPUs, if it is one.
    pub node: Option<u32>,
    progress: PlacementProgress,
}

/// How far a worker has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PlacementProgress {
    /// There is no decision yet, and the thread runs where the kernel lets it.
    Pending,
    /// The thread runs as decided.
    Applied,
    /// The kernel refused the decision.
    Refused,
}

/// What decides where a worker runs.
#[derive(Debug)]
enum PlacementSource {
    /// The placer of the device whose queue pair the worker serves.
    Placer { placer: Arc<Placer>, pair: u16 },
    /// The configuration: the worker serves queue pairs of all devices.
    Fixed { worker: String, cpus: CpuSet },
}

/// The placement of one worker's thread. The thread takes the decision that the placer published,
/// or the fixed one, and pins itself; other threads read the result.
#[derive(Debug)]
pub struct PlacementState {
    source: PlacementSource,
    current: Mutex<Option<WorkerPlacement>>,
    /// The generation of the published decisions from which `current` is derived.
    generation: AtomicU32,
    /// Whether the worker may poll on the CPUs where it runs.
    may_poll: AtomicBool,
}

impl WorkerPlacement {
    /// Whether the worker has started before the first decision.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        self.progress == PlacementProgress::Pending
    }
}

impl PlacementState {
    /// The state of a worker that does not run yet.
    #[must_use]
    pub fn new(placer: Arc<Placer>, pair: u16) -> Self {
        Self::of(PlacementSource::Placer { placer, pair })
    }

    /// The state of the thread `worker`, which runs on `cpus` and serves queue pairs of all devices.
    #[must_use]
    pub fn fixed(worker: &str, cpus: CpuSet) -> Self {
        let worker = worker.to_owned();
        Self::of(PlacementSource::Fixed { worker, cpus })
    }

    fn of(source: PlacementSource) -> Self {
        Self {
            source,
            current: Mutex::new(None),
            generation: AtomicU32::new(0),
            may_poll: AtomicBool::new(true),
        }
    }

    /// The current placement; `None` while the worker does not run.
    #[must_use]
    pub fn current(&self) -> Option<WorkerPlacement> {
        self.current.lock().clone()
    }

    /// Whether a worker that is configured to poll may poll on the CPUs where it runs.
    #[must_use]
    pub fn may_poll(&self) -> bool {
        self.may_poll.load(Ordering::Relaxed)
    }

    /// Asks the placer for a decision, because the worker is about to start.
    pub(crate) fn request(&self) {
        if let PlacementSource::Placer { placer, pair } = &self.source {
            placer.request(*pair);
        }
    }

    /// Places the calling thread again if there is a new decision.
    pub(crate) fn refresh(&self) {
        if self.generation.load(Ordering::Relaxed) != self.published_generation() {
            self.place_this_thread();
        }
    }

    fn published_generation(&self) -> u32 {
        match &self.source {
            PlacementSource::Placer { placer, .. } => placer.published().generation,
            PlacementSource::Fixed { .. } => 0,
        }
    }

    /// Places the calling thread, which must be that of the worker. It does not wait for a decision
    /// that has not been published yet.
    pub(crate) fn place_this_thread(&self) {
        match &self.source {
            PlacementSource::Placer { placer, pair } => self.place_as_decided(placer, *pair),
            PlacementSource::Fixed { worker, cpus } => {
                self.generation.store(0, Ordering::Relaxed);
                let describe = |decision: &Decision| {
                    let on = decision.cpus.describe();
                    format!("{worker}: on {on}: {}", decision.why)
                };
                // A refusal is logged, and tried again at the placer's next check.
                self.apply(&fixed_decision(cpus), None, describe);
            }
        }
    }

    fn place_as_decided(&self, placer: &Placer, pair: u16) {
        let published = placer.published();
        self.generation
            .store(published.generation, Ordering::Relaxed);
        let Some(decision) = published.decision(pair) else {
            // A worker whose front-end has just disconnected stays where it is.
            if self.current().is_none() {
                self.set(pending(pair));
            }
            return;
        };
        let node = published.node_of(&decision.cpus);
        if published.has_several_nodes() {
            // This applies to the memory that the worker touches first from now on, such as its
            // stack.
            virtionet_placement::prefer_node(node);
        }
        let describe = |decision: &Decision| format!("{}: {decision}", placer.name());
        if self.apply(decision, node, describe) == PlacementProgress::Refused {
            placer.report_refusal();
        }
    }

    /// Pins the calling thread, and notes and logs the result.
    fn apply(
        &self,
        decision: &Decision,
        node: Option<u32>,
        describe: impl Fn(&Decision) -> String,
    ) -> PlacementProgress {
        let before = self.current();
        let (decision, refusal) = apply(decision.clone());
        let has_changed = before.is_none_or(|placement| placement.decision != decision);
        match &refusal {
            None if has_changed => tracing::info!("{}", describe(&decision)),
            Some(error) if has_changed => tracing::warn!("{}, but {error}", describe(&decision)),
            _ => {}
        }
        let progress = match refusal {
            None => PlacementProgress::Applied,
            Some(_) => PlacementProgress::Refused,
        };
        self.set(WorkerPlacement {
            tid: this_thread(),
            node,
            decision,
            progress,
        });
        progress
    }

    fn set(&self, placement: WorkerPlacement) {
        self.may_poll
            .store(placement.decision.may_poll, Ordering::Relaxed);
        *self.current.lock() = Some(placement);
    }

    /// Whether the kernel has moved the worker, as it does when a CPU goes offline or a cpuset
    /// changes. The worker then places itself again when it is woken.
    #[must_use]
    pub(crate) fn has_moved(&self) -> bool {
        let placement = self.current.lock();
        let has_moved = placement
            .as_ref()
            .is_some_and(|placement| match placement.progress {
                PlacementProgress::Pending => false,
                PlacementProgress::Refused => true,
                PlacementProgress::Applied => {
                    let now = virtionet_placement::thread_cpus(placement.tid);
                    now.is_ok_and(|cpus| cpus != placement.decision.cpus)
                }
            });
        drop(placement);
        if has_moved {
            let other = self.published_generation().wrapping_sub(1);
            self.generation.store(other, Ordering::Relaxed);
        }
        has_moved
    }

    /// Records that the worker has ended.
    pub(crate) fn clear(&self) {
        *self.current.lock() = None;
    }
}

/// The placement of the calling thread, the worker of `pair`, while there is no decision.
fn pending(pair: u16) -> WorkerPlacement {
    WorkerPlacement {
        tid: this_thread(),
        node: None,
        decision: Decision {
            pair: u32::from(pair),
            vcpus: Vec::new(),
            vcpu_tid: None,
            cpus: allowed_cpus().unwrap_or_default(),
            // A vCPU may be pinned to the CPU where the worker happens to run.
            may_poll: false,
            why: "placement pending: the worker is not pinned until its CPUs are decided"
                .to_owned(),
        },
        progress: PlacementProgress::Pending,
    }
}

/// The decision for a worker that serves queue pairs of all devices.
fn fixed_decision(cpus: &CpuSet) -> Decision {
    Decision {
        pair: 0,
        vcpus: Vec::new(),
        vcpu_tid: None,
        cpus: cpus.clone(),
        may_poll: true,
        why: "the worker serves queue pairs of all devices (--workers)".to_owned(),
    }
}

/// Pins the calling thread as decided. The result has the CPUs where the kernel lets it run, and
/// the error if that is not what was decided.
fn apply(mut decision: Decision) -> (Decision, Option<AffinityError>) {
    match virtionet_placement::set_thread_affinity(None, &decision.cpus) {
        Ok(cpus) => {
            decision.cpus = cpus;
            (decision, None)
        }
        Err(error) => {
            // Report the CPUs on which the thread runs instead of those that were decided. A vCPU
            // may be pinned to them.
            decision.may_poll = false;
            if let Ok(cpus) = allowed_cpus() {
                decision.cpus = cpus;
            }
            (decision, Some(error))
        }
    }
}

fn this_thread() -> i32 {
    rustix::thread::gettid().as_raw_nonzero().get()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host_cpus::HostCpus;
    use virtionet_placement::{CpuSet, Placement, PlacementPlanner};

    /// Runs `test` as the thread of a worker, because it is pinned.
    fn on_worker_thread(test: impl FnOnce() + Send) {
        std::thread::scope(|scope| scope.spawn(test).join().unwrap());
    }

    fn placer_of(mode: Placement, qmp: Option<std::path::PathBuf>) -> Arc<Placer> {
        let host = Arc::new(HostCpus::read().unwrap());
        let planner = PlacementPlanner::new(mode, host.allowed(), qmp).unwrap();
        Arc::new(Placer::new("test", planner, host))
    }

    #[test]
    fn worker_runs_unpinned_until_its_cpus_are_decided() {
        let all = allowed_cpus().unwrap();
        let cpu = all.last().unwrap();
        let placer = placer_of(Placement::List(vec![cpu]), None);
        placer.connected(None);
        let state = PlacementState::new(Arc::clone(&placer), 1);
        on_worker_thread(|| {
            state.request();
            state.place_this_thread();
            let pending = state.current().unwrap();
            assert!(pending.is_pending() && !state.has_moved());
            assert!(
                pending.decision.why.starts_with("placement pending"),
                "{}",
                pending.decision
            );
            assert_eq!((&pending.decision.cpus, state.may_poll()), (&all, false));
            // The thread `placer`, which `request` has woken.
            assert!(placer.update());
            assert!(!placer.update(), "nothing has changed since");
            state.refresh();
            let placed = state.current().unwrap();
            assert!(!placed.is_pending() && state.may_poll());
            assert_eq!(placed.decision.cpus, CpuSet::from_iter([cpu]));
            assert_eq!(allowed_cpus().unwrap(), placed.decision.cpus);
            // The kernel moves it.
            let moved = virtionet_placement::set_thread_affinity(None, &all).unwrap();
            assert_eq!(state.has_moved(), moved != placed.decision.cpus);
            state.refresh();
            assert_eq!(allowed_cpus().unwrap(), placed.decision.cpus);
            // The front-end disconnects, and the worker is woken once more before it ends.
            placer.disconnected();
            state.refresh();
            let last = state.current().unwrap();
            assert_eq!(last.decision, placed.decision);
        });
    }

    /// The monitor accepts the connection and never answers.
    #[test]
    fn worker_never_waits_for_a_monitor() {
        let path = std::env::temp_dir().join(format!("worker-{}.qmp", std::process::id()));
        let silent = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let placer = placer_of(Placement::Auto, Some(path.clone()));
        placer.connected(None);
        let state = PlacementState::new(Arc::clone(&placer), 0);
        on_worker_thread(|| {
            state.request();
            assert!(!placer.update(), "the monitor is being asked");
            state.place_this_thread();
            assert!(state.current().unwrap().is_pending());
        });
        drop(silent);
        std::fs::remove_file(path).unwrap();
    }
}
