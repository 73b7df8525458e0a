//! The workers of the process.

use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use virtionet_config::PollMode;
use virtionet_placement::CpuSet;

use crate::start_gate::StartGate;
use crate::worker::Worker;
use crate::worker_placement::PlacementState;

/// All workers of the process. The supervisor owns it, and devices ask it for workers.
#[derive(Debug, Default)]
pub struct WorkerPool {
    workers: Mutex<Vec<Arc<Worker>>>,
    kind: PoolKind,
    gate: Arc<StartGate>,
}

/// How queue pairs are distributed over workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum PoolKind {
    /// Each queue pair has a worker of its own.
    #[default]
    PerPair,
    /// There is a fixed number of workers, and all of them serve queue pairs of any device.
    Shared,
}

impl WorkerPool {
    /// A pool with one worker on each of `cpus`, which serve the queue pairs of all devices. `cpus`
    /// must not be empty.
    #[must_use]
    pub fn shared(cpus: &CpuSet, poll: PollMode) -> Self {
        let gate = Arc::<StartGate>::default();
        let workers = cpus.iter().map(|cpu| {
            let name = format!("worker-cpu{cpu}");
            let placement = PlacementState::fixed(&name, CpuSet::from_iter([cpu]));
            Arc::new(Worker::new(name, poll, true, placement, Arc::clone(&gate)))
        });
        Self {
            workers: Mutex::new(workers.collect()),
            kind: PoolKind::Shared,
            gate,
        }
    }

    /// What holds workers back when they start.
    pub fn gate(&self) -> &Arc<StartGate> {
        &self.gate
    }

    /// Returns the worker for one more queue pair: the one with the fewest queue pairs where workers
    /// are shared, or else a new one, with `name` as its thread's name.
    pub fn worker_for(
        &self,
        name: String,
        poll: PollMode,
        placement: PlacementState,
    ) -> Arc<Worker> {
        let mut workers = self.workers.lock();
        let shared = match self.kind {
            PoolKind::Shared => workers.iter().min_by_key(|worker| worker.pair_count()),
            PoolKind::PerPair => None,
        };
        if let Some(worker) = shared {
            return Arc::clone(worker);
        }
        let worker = Arc::new(Worker::new(
            name,
            poll,
            false,
            placement,
            Arc::clone(&self.gate),
        ));
        workers.push(Arc::clone(&worker));
        worker
    }

    /// Removes a queue pair that is not served, and its worker if it has no other.
    pub fn remove_pair(&self, worker: &Arc<Worker>, position: u16) {
        worker.remove_pair(position);
        if self.kind == PoolKind::PerPair {
            self.workers
                .lock()
                .retain(|other| !Arc::ptr_eq(other, worker));
        }
    }

    /// The number of workers.
    #[cfg(test)]
    pub(crate) fn worker_count(&self) -> usize {
        self.workers.lock().len()
    }

    /// Asks all workers to serve nothing, until [`WorkerPool::resume`].
    pub fn request_stop(&self) {
        let workers = self.workers.lock().clone();
        workers.iter().for_each(|worker| worker.request_stop());
    }

    /// Lets all workers go on after [`WorkerPool::request_stop`].
    pub fn resume(&self) {
        let workers = self.workers.lock().clone();
        workers.iter().for_each(|worker| worker.resume());
    }

    /// Waits until all workers have stopped, or `deadline` has passed. The result names those that
    /// have not. To be called after [`WorkerPool::request_stop`].
    pub fn join(&self, deadline: Instant) -> Vec<String> {
        let workers = self.workers.lock().clone();
        let mut stuck = Vec::new();
        for worker in workers {
            if !worker.wait_until_stopped(deadline) {
                stuck.push(worker.name().to_owned());
            }
        }
        stuck
    }
}
