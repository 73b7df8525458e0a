//! The workers of the process.

use std::io;
use std::sync::Arc;

use parking_lot::Mutex;
use virtionet_config::PollMode;

use crate::worker::Worker;
use crate::worker_placement::PlacementState;

/// All workers of the process. The supervisor owns it and devices ask it for workers, so that
/// devices can share workers later; today each queue pair has one of its own.
#[derive(Debug, Default)]
pub struct WorkerPool {
    workers: Mutex<Vec<Arc<Worker>>>,
}

impl WorkerPool {
    /// Creates a worker for one more queue pair. `name` is its thread's name.
    ///
    /// # Errors
    /// When the kernel has no descriptors left.
    pub fn add_worker(
        &self,
        name: String,
        poll: PollMode,
        placement: PlacementState,
    ) -> io::Result<Arc<Worker>> {
        let worker = Arc::new(Worker::new(name, poll, placement)?);
        self.workers.lock().push(Arc::clone(&worker));
        Ok(worker)
    }

    /// Removes a worker that never started.
    pub fn remove_worker(&self, worker: &Arc<Worker>) {
        self.workers
            .lock()
            .retain(|other| !Arc::ptr_eq(other, worker));
    }

    /// Stops all workers and waits until they have ended.
    pub fn stop(&self) {
        let workers = self.workers.lock();
        workers.iter().for_each(|worker| worker.request_stop());
        workers.iter().for_each(|worker| worker.join());
    }
}
