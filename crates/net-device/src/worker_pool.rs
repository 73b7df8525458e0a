//! The workers of the process.

use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use virtionet_config::PollMode;

use crate::start_gate::StartGate;
use crate::worker::Worker;
use crate::worker_placement::PlacementState;

/// All workers of the process. The supervisor owns it and devices ask it for workers, so that
/// devices can share workers later; today each queue pair has one of its own.
#[derive(Debug, Default)]
pub struct WorkerPool {
    workers: Mutex<Vec<Arc<Worker>>>,
    gate: Arc<StartGate>,
}

impl WorkerPool {
    /// What holds workers back when they start.
    pub fn gate(&self) -> &Arc<StartGate> {
        &self.gate
    }

    /// Creates a worker for one more queue pair. `name` is its thread's name.
    pub fn add_worker(
        &self,
        name: String,
        poll: PollMode,
        placement: PlacementState,
    ) -> Arc<Worker> {
        let worker = Arc::new(Worker::new(name, poll, placement, Arc::clone(&self.gate)));
        self.workers.lock().push(Arc::clone(&worker));
        worker
    }

    /// Removes a worker that never started.
    pub fn remove_worker(&self, worker: &Arc<Worker>) {
        self.workers
            .lock()
            .retain(|other| !Arc::ptr_eq(other, worker));
    }

    /// The number of workers.
    #[cfg(test)]
    pub(crate) fn worker_count(&self) -> usize {
        self.workers.lock().len()
    }

    /// Asks all workers to end.
    pub fn request_stop(&self) {
        let workers = self.workers.lock().clone();
        workers.iter().for_each(|worker| worker.request_stop());
    }

    /// Waits until all workers have ended, or `deadline` has passed. The result names those that
    /// have not. To be called after [`WorkerPool::request_stop`].
    pub fn join(&self, deadline: Instant) -> Vec<String> {
        let workers = self.workers.lock().clone();
        let mut stuck = Vec::new();
        for worker in workers {
            if !worker.join_until(deadline) {
                stuck.push(worker.name().to_owned());
            }
        }
        stuck
    }
}
