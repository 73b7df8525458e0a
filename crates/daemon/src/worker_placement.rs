//! The placement of a worker's thread: the decision of the device's placer, and its result in the
//! kernel.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use parking_lot::Mutex;
use virtionet_placement::Decision;

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
    /// Whether the kernel refused the decision.
    refused: bool,
}

/// The placement of one worker's thread. The thread asks the placer and pins itself to the CPUs
/// that the placer decides; other threads read the result.
#[derive(Debug)]
pub struct PlacementState {
    placer: Arc<Placer>,
    /// The queue pair that the placer decides for.
    pair: u16,
    current: Mutex<Option<WorkerPlacement>>,
    /// The placer's generation from which `current` is derived.
    generation: AtomicU32,
    /// Whether the worker may poll on the CPUs where it runs.
    may_poll: AtomicBool,
}

impl PlacementState {
    /// The state of a worker that does not run yet.
    #[must_use]
    pub fn new(placer: Arc<Placer>, pair: u16) -> Self {
        Self {
            placer,
            pair,
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

    /// Places the calling thread again if decisions may have changed.
    pub(crate) fn refresh(&self) {
        if self.generation.load(Ordering::Relaxed) != self.placer.generation() {
            self.place_this_thread();
        }
    }

    /// Places the calling thread, which must be that of the worker.
    pub(crate) fn place_this_thread(&self) {
        let mut placement = self.apply_decision();
        if placement.refused {
            // The cpuset or the online CPUs may have changed just now.
            self.placer.invalidate();
            placement = self.apply_decision();
        }
        self.may_poll
            .store(placement.decision.may_poll, Ordering::Relaxed);
        if self.placer.has_several_nodes() {
            // This applies to the memory that the worker touches first from now on, such as its
            // stack.
            virtionet_placement::prefer_node(placement.node);
        }
        *self.current.lock() = Some(placement);
    }

    /// Pins the calling thread as the placer decides, and logs the decision if it is new.
    fn apply_decision(&self) -> WorkerPlacement {
        self.generation
            .store(self.placer.generation(), Ordering::Relaxed);
        let mut decision = self.placer.decide(self.pair);
        let refusal = match virtionet_placement::set_thread_affinity(None, &decision.cpus) {
            Ok(cpus) => {
                decision.cpus = cpus;
                None
            }
            Err(error) => {
                // Report the CPUs on which the thread runs instead of those that were decided. A
                // vCPU may be pinned to them.
                decision.may_poll = false;
                if let Ok(cpus) = virtionet_placement::allowed_cpus() {
                    decision.cpus = cpus;
                }
                Some(error)
            }
        };
        let before = self.current();
        let has_changed = before.is_none_or(|placement| placement.decision != decision);
        let device = self.placer.name();
        match &refusal {
            None if has_changed => tracing::info!("{device}: {decision}"),
            Some(error) if has_changed => tracing::warn!("{device}: {decision}, but {error}"),
            _ => {}
        }
        WorkerPlacement {
            tid: rustix::thread::gettid().as_raw_nonzero().get(),
            node: self.placer.node_of(&decision),
            decision,
            refused: refusal.is_some(),
        }
    }

    /// Whether the kernel has moved the worker, as it does when a CPU goes offline or a cpuset
    /// changes. The worker then places itself again when it is woken.
    #[must_use]
    pub(crate) fn has_moved(&self) -> bool {
        let has_moved = self.current.lock().as_ref().is_some_and(|placement| {
            let now = virtionet_placement::thread_cpus(placement.tid);
            placement.refused || now.is_ok_and(|cpus| cpus != placement.decision.cpus)
        });
        if has_moved {
            let other = self.placer.generation().wrapping_sub(1);
            self.generation.store(other, Ordering::Relaxed);
        }
        has_moved
    }

    /// Records that the worker has ended.
    pub(crate) fn clear(&self) {
        *self.current.lock() = None;
    }
}
