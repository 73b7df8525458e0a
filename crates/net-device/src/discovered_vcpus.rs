//! The vCPU threads of a front-end, as far as they are known, and when to search for them again.

use std::time::{Duration, Instant};

use virtionet_placement::{PlacementPlanner, VcpuChange, VcpuMap, VcpuSource, VcpuWatch};

/// The shortest time between two searches for vCPU threads when their number has changed or none
/// was found. The time doubles with each search without success.
const MIN_SEARCH_INTERVAL: Duration = Duration::from_secs(1);
const MAX_SEARCH_INTERVAL: Duration = Duration::from_secs(8);
/// The same where QEMU's monitor must be asked, which may have other uses.
const QMP_SEARCH_INTERVAL: Duration = Duration::from_secs(5);

/// The vCPU threads of the front-end, and when to search for them again.
#[derive(Debug)]
pub(crate) struct DiscoveredVcpus {
    pub(crate) map: VcpuMap,
    watch: VcpuWatch,
    /// Whether they should be searched for again.
    stale: bool,
    /// The earliest time of the next search.
    search_at: Instant,
    /// The time between the last two searches.
    pause: Duration,
}

impl DiscoveredVcpus {
    /// Searches for the vCPU threads of process `pid`. That takes milliseconds, or up to 2 s where
    /// a monitor must be asked and does not answer.
    pub(crate) fn search(planner: &PlacementPlanner, pid: Option<i32>) -> Self {
        let mut map = planner.discover(pid);
        let watch = planner.watch(pid, &map);
        // The affinity may have changed between the discovery and the start of the watch.
        planner.refresh(&mut map);
        let pause = MIN_SEARCH_INTERVAL;
        Self {
            stale: map.vcpus.iter().all(|vcpu| vcpu.cpus.is_none()),
            map,
            watch,
            search_at: Instant::now() + pause,
            pause,
        }
    }

    /// Whether a search is due.
    pub(crate) fn is_search_due(&self) -> bool {
        self.stale && Instant::now() >= self.search_at
    }

    /// Checks whether the threads have changed since the last call. Returns whether the CPUs of any
    /// changed.
    pub(crate) fn poll(&mut self, planner: &PlacementPlanner) -> bool {
        match self.watch.poll() {
            VcpuChange::Unchanged => false,
            VcpuChange::AffinityChanged => self.refresh(planner),
            VcpuChange::ThreadsChanged => {
                self.stale = true;
                // Other vCPUs may have moved as well, and the search may come later.
                self.refresh_alive(planner)
            }
        }
    }

    /// Takes the result of a new search for the threads of process `pid`. Returns whether the
    /// threads changed.
    pub(crate) fn replace_by(
        &mut self,
        mut new: Self,
        planner: &PlacementPlanner,
        pid: Option<i32>,
    ) -> bool {
        new.back_off(self.pause);
        let mut map = self.map.clone();
        planner.refresh(&mut map);
        if new.stale && map.vcpus.iter().any(|vcpu| vcpu.cpus.is_some()) {
            // A monitor that does not answer now does not make the known threads invalid.
            new.watch = planner.watch(pid, &map);
            new.map = map;
        }
        let has_changed = new.map != self.map;
        *self = new;
        has_changed
    }

    /// Sets the time of the next search. `pause` is the time between the last two searches.
    fn back_off(&mut self, pause: Duration) {
        self.pause = match (self.stale, self.map.source) {
            (true, _) => (pause * 2).min(MAX_SEARCH_INTERVAL),
            (false, VcpuSource::Qmp) => QMP_SEARCH_INTERVAL,
            (false, _) => MIN_SEARCH_INTERVAL,
        };
        self.search_at = Instant::now() + self.pause;
    }

    /// Reads the CPUs that the threads may run on now. A thread that has ended keeps its last CPUs
    /// until the next search replaces it. Returns whether any thread's CPUs changed.
    fn refresh_alive(&mut self, planner: &PlacementPlanner) -> bool {
        let before = self.map.vcpus.clone();
        planner.refresh(&mut self.map);
        for (now, before) in self.map.vcpus.iter_mut().zip(&before) {
            if now.cpus.is_none() {
                now.cpus.clone_from(&before.cpus);
            }
        }
        self.map.vcpus != before
    }

    /// Reads the CPUs that the threads may run on now. Returns whether they changed.
    fn refresh(&mut self, planner: &PlacementPlanner) -> bool {
        let before = self.map.vcpus.clone();
        planner.refresh(&mut self.map);
        self.map.vcpus != before
    }

    /// Sets the earliest time of the next search.
    #[cfg(test)]
    pub(crate) fn search_at(&mut self, time: Instant) {
        self.search_at = time;
    }
}
