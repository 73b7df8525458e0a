//! Placement of one device's workers, derived from the front-end's vCPUs.
//!
//! Only the thread `placer` searches for vCPU threads and decides: it calls [`Placer::refresh`]
//! four times a second while a front-end is connected, and [`Placer::update`] as soon as another
//! thread has reported a change. The decisions for all queue pairs are published together, and a
//! worker takes its own from there. So neither a worker nor the session's thread waits for `/proc`
//! or for QEMU's monitor. QEMU answers no QMP request while it waits for a reply on the vhost-user
//! socket.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Instant;

use parking_lot::Mutex;
use virtionet_placement::{CpuSet, Decision, PlacementPlanner, Topology, Warning};
use virtionet_process::sandbox;
use virtionet_sandbox::ThreadKind;

use crate::discovered_vcpus::DiscoveredVcpus;
use crate::host_cpus::{DeviceCpus, HostCpus};
use crate::warning_log::WarningLog;

/// The placer of one device: it decides on which CPUs the device's workers run.
#[derive(Debug)]
pub struct Placer {
    /// The device's name, for the log.
    name: String,
    host: Arc<HostCpus>,
    /// The number of the device in `host`.
    device: u32,
    known: Mutex<PlacerState>,
    /// Whether a front-end is connected.
    connected: AtomicBool,
    /// The number of queue pairs that the driver uses.
    pairs: AtomicU32,
    /// The number of queue pairs whose workers have started since the front-end connected.
    workers: AtomicU32,
    /// Increases when anything may have changed that decisions depend on.
    changes: AtomicU32,
    published: Mutex<Arc<PublishedPlacement>>,
    /// The NUMA nodes of the pairs' rings. They have a lock of their own, because the session's
    /// thread sets them and must not wait for a decision.
    nodes: Mutex<BTreeMap<u32, Option<u32>>>,
    warning_log: Mutex<WarningLog>,
}

/// The decisions for a device's workers.
#[derive(Debug, Default)]
pub struct PublishedPlacement {
    /// Differs from that of the decisions before.
    pub generation: u32,
    /// The topology of the host when they were published.
    topology: Arc<Topology>,
    /// By queue pair; empty while there are none yet.
    decisions: Vec<Decision>,
}

#[derive(Debug)]
struct PlacerState {
    planner: PlacementPlanner,
    /// The version of the host on which the planner's state is based.
    host: u32,
    pid: Option<i32>,
    /// The number of front-ends that have connected or disconnected.
    session: u32,
    found: Option<DiscoveredVcpus>,
    /// Whether a separate thread is searching for the vCPU threads, perhaps for a front-end that
    /// has disconnected meanwhile.
    is_searching: bool,
    decided: Option<Decided>,
}

/// Decisions, and what they are based on.
#[derive(Debug)]
struct Decided {
    changes: u32,
    pairs: u32,
    decisions: Vec<Decision>,
}

impl Placer {
    /// Creates the placer of the device of this name, which applies `planner` to `host`.
    #[must_use]
    pub fn new(name: &str, planner: PlacementPlanner, host: Arc<HostCpus>) -> Self {
        let version = host.version();
        Self {
            name: name.to_owned(),
            device: host.register_device(),
            known: Mutex::new(PlacerState {
                planner: planner.with_topology(host.topology()),
                host: version,
                pid: None,
                session: 0,
                found: None,
                is_searching: false,
                decided: None,
            }),
            host,
            connected: AtomicBool::new(false),
            pairs: AtomicU32::new(1),
            workers: AtomicU32::new(0),
            changes: AtomicU32::new(0),
            published: Mutex::default(),
            nodes: Mutex::default(),
            warning_log: Mutex::default(),
        }
    }

    /// The device's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Records that a front-end of this process id has connected.
    pub fn connected(&self, pid: Option<i32>) {
        self.start_session(pid, true);
        self.host.notify();
    }

    /// Records that the front-end has disconnected.
    pub fn disconnected(&self) {
        self.start_session(None, false);
        self.warning_log.lock().clear_current();
    }

    /// Forgets all that is known about the last front-end.
    fn start_session(&self, pid: Option<i32>, connected: bool) {
        let mut known = self.known.lock();
        known.pid = pid;
        known.session = known.session.wrapping_add(1);
        known.found = None;
        known.decided = None;
        // These change under the lock, so that a decision that is being made comes before.
        self.workers.store(0, Ordering::Release);
        self.connected.store(connected, Ordering::Release);
        self.host.set_used(self.device, DeviceCpus::default());
        self.publish(Vec::new());
        self.count_change();
    }

    /// Whether a front-end is connected.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Acquire)
    }

    /// Asks for a decision for the worker of `pair`, which is about to start.
    pub fn request(&self, pair: u16) {
        let workers = u32::from(pair) + 1;
        if self.workers.fetch_max(workers, Ordering::AcqRel) < workers {
            self.report_change();
        }
    }

    /// Sets the number of queue pairs that the driver uses.
    pub fn set_active_pairs(&self, pairs: u32) {
        if self.pairs.swap(pairs.max(1), Ordering::AcqRel) != pairs.max(1) {
            self.report_change();
        }
    }

    /// Sets the NUMA node of the receiveq of `pair`.
    pub fn set_memory_node(&self, pair: u16, node: Option<u32>) {
        let before = self.nodes.lock().insert(u32::from(pair), node);
        if before.flatten() != node && self.has_several_nodes() {
            self.report_change();
        }
    }

    /// Reports that the kernel refused a decision, because the host may have changed just now.
    pub fn report_refusal(&self) {
        self.host.notify();
    }

    /// Whether the host has more than one NUMA node.
    #[must_use]
    pub fn has_several_nodes(&self) -> bool {
        self.host.topology().node_count() > 1
    }

    /// The current decisions.
    #[must_use]
    pub fn published(&self) -> Arc<PublishedPlacement> {
        Arc::clone(&self.published.lock())
    }

    /// Counts a change, and wakes the thread `placer` so that it decides again.
    fn report_change(&self) {
        self.count_change();
        self.host.notify();
    }

    fn count_change(&self) {
        self.changes.fetch_add(1, Ordering::Release);
    }

    /// Checks whether the vCPU threads have changed, and calls [`Placer::update`]. For the thread
    /// `placer` only.
    pub fn refresh(self: &Arc<Self>) -> bool {
        let mut known = self.known.lock();
        let PlacerState { planner, found, .. } = &mut *known;
        if let Some(found) = found
            && found.poll(planner)
        {
            self.count_change();
        }
        drop(known);
        self.update()
    }

    /// Decides again if anything has changed that the decisions depend on. Returns true when there
    /// are new decisions, so that the workers must be woken. For the thread `placer` only.
    pub fn update(self: &Arc<Self>) -> bool {
        // QEMU connects before it creates its vCPU threads, so the first worker is waited for.
        if !self.is_connected() || self.workers.load(Ordering::Acquire) == 0 {
            return false;
        }
        self.search_if_due();
        self.decide()
    }

    /// Searches for the vCPU threads if they are not known, or no longer.
    fn search_if_due(self: &Arc<Self>) {
        let mut known = self.known.lock();
        let found = known.found.as_ref();
        if known.is_searching || !found.is_none_or(DiscoveredVcpus::is_search_due) {
            return;
        }
        let (planner, pid, session) = (known.planner.clone(), known.pid, known.session);
        if planner.may_ask_monitor() {
            known.is_searching = self.spawn_search(planner, pid, session).is_ok();
        } else {
            drop(known);
            self.search(&planner, pid, session);
        }
    }

    /// Calls [`Placer::search`] in a separate thread, because a monitor may answer late, and the
    /// placement of other devices must not wait for it.
    fn spawn_search(
        self: &Arc<Self>,
        planner: PlacementPlanner,
        pid: Option<i32>,
        session: u32,
    ) -> io::Result<()> {
        let placer = Arc::clone(self);
        let search = move || {
            sandbox::confine_thread(ThreadKind::Qmp);
            placer.search(&planner, pid, session);
            placer.host.notify();
        };
        let thread = std::thread::Builder::new().name("qmp".into());
        thread.spawn(search).map(|_| ())
    }

    /// Searches for the vCPU threads of process `pid`.
    fn search(&self, planner: &PlacementPlanner, pid: Option<i32>, session: u32) {
        let new = DiscoveredVcpus::search(planner, pid);
        let mut known = self.known.lock();
        known.is_searching = false;
        if known.session != session {
            return;
        }
        let has_changed = match &mut known.found {
            Some(old) => old.replace_by(new, planner, pid),
            None => {
                known.found = Some(new);
                true
            }
        };
        if let Some(found) = known.found.as_ref().filter(|_| has_changed) {
            tracing::info!("{}: {}", self.name, found.map);
            self.count_change();
        }
    }

    /// Decides for all queue pairs, unless the last decisions still hold, and publishes the
    /// decisions. Returns whether they are new.
    fn decide(&self) -> bool {
        let mut known = self.known.lock();
        if !self.is_connected() {
            return false;
        }
        if known.apply_host_changes(&self.host, self.device) {
            self.count_change();
        }
        let PlacerState {
            planner,
            found: Some(found),
            decided,
            ..
        } = &mut *known
        else {
            return false;
        };
        // Read before all that it counts, so that a change meanwhile leads to another decision.
        let changes = self.changes.load(Ordering::Acquire);
        if decided.as_ref().is_some_and(|last| last.changes == changes) {
            return false;
        }
        let pairs = self.pairs.load(Ordering::Acquire);
        let count = pairs.max(self.workers.load(Ordering::Acquire));
        for (pair, node) in &*self.nodes.lock() {
            planner.set_memory_node(*pair, *node);
        }
        planner.set_previous(
            decided
                .as_ref()
                .map_or(&[], |last| last.decisions.as_slice()),
        );
        let decisions = planner.place_all(&found.map, count, pairs);
        self.host.set_used(
            self.device,
            DeviceCpus {
                pinned: planner.pinned(&found.map),
                polling: planner.polling_workers(&decisions),
            },
        );
        let are_new = self.publish(decisions.clone());
        *decided = Some(Decided {
            changes,
            pairs,
            decisions,
        });
        are_new
    }

    /// Publishes decisions. Returns whether they are new.
    fn publish(&self, decisions: Vec<Decision>) -> bool {
        let topology = self.host.topology();
        let mut published = self.published.lock();
        if published.decisions == decisions && Arc::ptr_eq(&published.topology, &topology) {
            return false;
        }
        *published = Arc::new(PublishedPlacement {
            generation: published.generation.wrapping_add(1),
            topology,
            decisions,
        });
        true
    }

    /// Updates the warnings about the placement of vCPUs and workers, and logs those that are new.
    pub fn update_warnings(&self) {
        let changes = self.changes.load(Ordering::Acquire);
        let basis = (changes, self.pairs.load(Ordering::Acquire));
        if self.warning_log.lock().is_current(basis) {
            return;
        }
        let warnings = {
            // The placer holds the lock only while it decides, and updates the warnings after that.
            let Some(known) = self.known.try_lock() else {
                return;
            };
            let (Some(found), Some(decided)) = (&known.found, &known.decided) else {
                return;
            };
            let in_use = usize::try_from(decided.pairs);
            let in_use = in_use.ok().and_then(|n| decided.decisions.get(..n));
            let is_current = (decided.changes, decided.pairs) == basis;
            let Some(in_use) = in_use.filter(|_| is_current) else {
                // There will be another decision, and warnings after it.
                return;
            };
            known.planner.warnings(&found.map, in_use)
        };
        let mut log = self.warning_log.lock();
        if !self.is_connected() {
            // The front-end has disconnected meanwhile, so its warnings no longer apply.
            return;
        }
        for warning in log.update(basis, warnings, Instant::now()) {
            tracing::warn!("{}: {warning}", self.name);
        }
    }

    /// The current warnings about the CPUs on which the workers run.
    #[must_use]
    pub fn warnings(&self) -> Vec<Warning> {
        self.update_warnings();
        self.warning_log.lock().current().to_vec()
    }
}

impl PublishedPlacement {
    /// The decision for the worker of `pair`; `None` while there is none yet.
    #[must_use]
    pub fn decision(&self, pair: u16) -> Option<&Decision> {
        self.decisions.get(usize::from(pair))
    }

    /// The NUMA node of these CPUs; `None` if they are on several.
    #[must_use]
    pub fn node_of(&self, cpus: &CpuSet) -> Option<u32> {
        self.topology.node_of_all(cpus)
    }

    /// Whether the host has more than one NUMA node.
    #[must_use]
    pub fn has_several_nodes(&self) -> bool {
        self.topology.node_count() > 1
    }
}

impl PlacerState {
    /// Updates the planner after a change of the host or of other devices. Returns whether there
    /// was one.
    fn apply_host_changes(&mut self, host: &HostCpus, device: u32) -> bool {
        let version = host.version();
        let changed = version != self.host;
        if changed {
            self.host = version;
            self.planner.set_host(host.allowed(), host.topology());
            let others = host.used_by_others(device);
            self.planner.set_pinned_by_others(others.pinned);
            self.planner.set_polling_elsewhere(others.polling);
        }
        changed
    }
}

#[cfg(test)]
mod tests;
