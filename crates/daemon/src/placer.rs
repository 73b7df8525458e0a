//! Placement of one device's workers, derived from the front-end's vCPUs.
//!
//! Workers ask the placer, and the session's thread never does, because QEMU answers no QMP request
//! while it waits for a reply on the vhost-user socket. While a front-end is connected, the
//! placement monitor calls [`Placer::refresh`], which checks whether the vCPU threads, their
//! affinity or the CPUs of this process have changed. If so, the generation increases, and workers
//! that are woken ask again.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use virtionet_placement::{
    CpuSet, Decision, PlacementPlanner, VcpuChange, VcpuMap, VcpuSource, VcpuWatch, Warning,
};

use crate::host_cpus::HostCpus;
use crate::warning_log::WarningLog;

/// The shortest time between two searches for vCPU threads when their number has changed or none
/// was found. The time doubles with each search without success.
const MIN_SEARCH_INTERVAL: Duration = Duration::from_secs(1);
const MAX_SEARCH_INTERVAL: Duration = Duration::from_secs(8);
/// The same where QEMU's monitor must be asked, which may have other uses.
const QMP_SEARCH_INTERVAL: Duration = Duration::from_secs(5);

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
    /// Increases when decisions may have changed.
    generation: AtomicU32,
    /// Whether workers should ask again and have not been woken.
    wake_pending: AtomicBool,
    /// The NUMA nodes of the pairs' rings. They have a lock of their own, because the session's
    /// thread sets them and must not wait for a monitor that is being asked.
    nodes: Mutex<BTreeMap<u32, Option<u32>>>,
    warning_log: Mutex<WarningLog>,
}

#[derive(Debug)]
struct PlacerState {
    planner: PlacementPlanner,
    /// The version of the host on which the planner's state is based.
    host: u32,
    pid: Option<i32>,
    /// The number of front-ends that have connected.
    session: u32,
    found: Option<DiscoveredVcpus>,
    /// The decisions, with the generation and the number of pairs in use for which they were made.
    decisions: Option<(u32, u32, Vec<Decision>)>,
}

/// The vCPU threads of the front-end, and when to search for them again.
#[derive(Debug)]
struct DiscoveredVcpus {
    map: VcpuMap,
    watch: VcpuWatch,
    /// Whether they should be searched for again.
    stale: bool,
    /// Whether a separate thread is searching for them.
    searching: bool,
    /// The earliest time of the next search.
    search_at: Instant,
    /// The time between the last two searches.
    pause: Duration,
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
                decisions: None,
            }),
            host,
            connected: AtomicBool::new(false),
            pairs: AtomicU32::new(1),
            generation: AtomicU32::new(0),
            wake_pending: AtomicBool::new(false),
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
        let mut known = self.known.lock();
        known.pid = pid;
        known.session = known.session.wrapping_add(1);
        known.found = None;
        drop(known);
        self.generation.fetch_add(1, Ordering::Relaxed);
        self.connected.store(true, Ordering::Release);
        self.host.notify();
    }

    /// Records that the front-end has disconnected.
    pub fn disconnected(&self) {
        self.connected.store(false, Ordering::Release);
        self.warning_log.lock().clear_current();
        self.host.set_pinned(self.device, CpuSet::default);
    }

    /// Whether a front-end is connected.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Acquire)
    }

    /// Sets the number of queue pairs that the driver uses. Returns whether it changed.
    pub fn set_active_pairs(&self, pairs: u32) -> bool {
        let changed = self.pairs.swap(pairs.max(1), Ordering::Relaxed) != pairs.max(1);
        if changed {
            self.generation.fetch_add(1, Ordering::Relaxed);
        }
        changed
    }

    /// Sets the NUMA node of the receiveq of `pair`. Returns whether that may change the CPUs of
    /// its worker.
    pub fn set_memory_node(&self, pair: u16, node: Option<u32>) -> bool {
        let before = self.nodes.lock().insert(u32::from(pair), node);
        let changed = before.flatten() != node && self.has_several_nodes();
        if changed {
            self.generation.fetch_add(1, Ordering::Relaxed);
        }
        changed
    }

    /// Whether the host has more than one NUMA node.
    #[must_use]
    pub fn has_several_nodes(&self) -> bool {
        self.host.topology().node_count() > 1
    }

    /// The NUMA node of these CPUs; `None` if they are on several.
    #[must_use]
    pub fn node_of(&self, decision: &Decision) -> Option<u32> {
        self.host.topology().node_of_all(&decision.cpus)
    }

    /// A number that changes when workers should ask again.
    #[must_use]
    pub fn generation(&self) -> u32 {
        self.generation.load(Ordering::Relaxed)
    }

    /// The CPUs on which the worker of `pair` should run. The first call searches for the vCPUs,
    /// which takes milliseconds, or up to 2 s when a monitor must be asked and does not answer.
    #[must_use]
    pub fn decide(&self, pair: u16) -> Decision {
        let mut known = self.known.lock();
        let known = &mut *known;
        if known.apply_host_changes(&self.host, self.device) {
            // This worker is the first to notice the change, so the others must be woken.
            self.generation.fetch_add(1, Ordering::Relaxed);
            self.wake_pending.store(true, Ordering::Relaxed);
        }
        let (planner, pid) = (&known.planner, known.pid);
        let found = known.found.get_or_insert_with(|| {
            let found = DiscoveredVcpus::search(planner, pid);
            tracing::info!("{}: {}", self.name, found.map);
            found
        });
        self.publish_pins(&known.planner, &found.map);
        let (generation, pairs) = (self.generation(), self.pairs.load(Ordering::Relaxed));
        let at = usize::from(pair);
        if let Some((of, with, decisions)) = &known.decisions
            && (*of, *with) == (generation, pairs)
            && let Some(decision) = decisions.get(at)
        {
            return decision.clone();
        }
        for (pair, node) in &*self.nodes.lock() {
            known.planner.set_memory_node(*pair, *node);
        }
        let count = pairs.max(u32::from(pair) + 1);
        let decisions = known.planner.place_all(&found.map, count, pairs);
        let decision = decisions.get(at).cloned();
        known.decisions = Some((generation, pairs, decisions));
        decision.unwrap_or_else(|| known.planner.place(&found.map, u32::from(pair), pairs))
    }

    /// Publishes the CPUs that this device's vCPUs are pinned to, for the placers of other devices.
    fn publish_pins(&self, planner: &PlacementPlanner, map: &VcpuMap) {
        // The connection is checked under the lock, so that the pins of a front-end that
        // disconnects meanwhile are not published.
        self.host
            .set_pinned(self.device, || match self.is_connected() {
                true => planner.pinned(map),
                false => CpuSet::default(),
            });
    }

    /// Invalidates all decisions after the kernel refused one, because the host may have changed
    /// since the last refresh.
    pub fn invalidate(&self) {
        self.host.refresh();
        self.generation.fetch_add(1, Ordering::Relaxed);
    }

    /// Checks whether anything has changed that decisions depend on. Returns true when workers
    /// should ask again.
    pub fn refresh(self: &Arc<Self>) -> bool {
        // Another thread holds the lock and will report any change.
        let Some(mut known) = self.known.try_lock() else {
            return false;
        };
        let mut changed = known.apply_host_changes(&self.host, self.device)
            | self.wake_pending.swap(false, Ordering::Relaxed);
        let (pid, session) = (known.pid, known.session);
        let PlacerState { planner, found, .. } = &mut *known;
        let Some(found) = found else {
            return false;
        };
        match found.watch.poll() {
            VcpuChange::Unchanged => {}
            VcpuChange::AffinityChanged => changed |= found.refresh(planner),
            VcpuChange::ThreadsChanged => {
                found.stale = true;
                // Other vCPUs may have moved as well, and the search may come later.
                changed |= found.refresh_alive(planner);
            }
        }
        if found.stale && !found.searching && Instant::now() >= found.search_at {
            let planner = planner.clone();
            if planner.may_ask_monitor() {
                found.searching = self.spawn_search(planner, pid, session).is_ok();
            } else {
                drop(known);
                changed |= self.search(&planner, pid, session);
            }
        }
        if changed {
            self.generation.fetch_add(1, Ordering::Relaxed);
        }
        changed
    }

    /// Calls [`Placer::search`] in a separate thread, because a monitor may answer late, and
    /// neither the workers that ask nor other devices may wait for it.
    fn spawn_search(
        self: &Arc<Self>,
        planner: PlacementPlanner,
        pid: Option<i32>,
        session: u32,
    ) -> io::Result<()> {
        let placer = Arc::clone(self);
        let search = move || {
            if placer.search(&planner, pid, session) {
                placer.wake_pending.store(true, Ordering::Relaxed);
            }
        };
        let thread = std::thread::Builder::new().name("qmp".into());
        thread.spawn(search).map(|_| ())
    }

    /// Searches for the vCPU threads again. Returns whether they changed.
    fn search(&self, planner: &PlacementPlanner, pid: Option<i32>, session: u32) -> bool {
        let mut new = DiscoveredVcpus::search(planner, pid);
        let mut known = self.known.lock();
        let Some(old) = known.found.as_ref().filter(|_| known.session == session) else {
            return false;
        };
        new.back_off(old.pause);
        let mut map = old.map.clone();
        planner.refresh(&mut map);
        if new.stale && map.vcpus.iter().any(|vcpu| vcpu.cpus.is_some()) {
            // A monitor that does not answer now does not make the known threads invalid.
            new.watch = planner.watch(pid, &map);
            new.map = map;
        }
        let changed = new.map != old.map;
        if changed {
            tracing::info!("{}: {}", self.name, new.map);
        }
        known.found = Some(new);
        changed
    }

    /// Updates the warnings about the placement of vCPUs and workers, and logs those that are new.
    pub fn update_warnings(&self) {
        let state = (self.generation(), self.pairs.load(Ordering::Relaxed));
        if self.warning_log.lock().is_current(state) {
            return;
        }
        let (_, pairs) = state;
        let warnings = {
            let Some(known) = self.known.try_lock() else {
                return;
            };
            let (Some(found), Some((of, with, decisions))) = (&known.found, &known.decisions)
            else {
                return;
            };
            let in_use = usize::try_from(pairs).ok().and_then(|n| decisions.get(..n));
            let current = (*of, *with) == state;
            let Some(in_use) = in_use.filter(|_| current) else {
                // The workers have not asked since the last change, so there are no decisions to
                // check.
                return;
            };
            known.planner.warnings(&found.map, in_use)
        };
        let mut log = self.warning_log.lock();
        if !self.is_connected() {
            // The front-end has disconnected meanwhile, so its warnings no longer apply.
            return;
        }
        for warning in log.update(state, warnings, Instant::now()) {
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

impl PlacerState {
    /// Updates the planner after a change of the host. Returns whether there was one.
    fn apply_host_changes(&mut self, host: &HostCpus, device: u32) -> bool {
        let version = host.version();
        let changed = version != self.host;
        if changed {
            self.host = version;
            self.planner.set_host(host.allowed(), host.topology());
            self.planner
                .set_pinned_by_others(host.pinned_by_others(device));
            self.decisions = None;
        }
        changed
    }
}

impl DiscoveredVcpus {
    fn search(planner: &PlacementPlanner, pid: Option<i32>) -> Self {
        let mut map = planner.discover(pid);
        let watch = planner.watch(pid, &map);
        // The affinity may have changed between the discovery and the start of the watch.
        planner.refresh(&mut map);
        let pause = MIN_SEARCH_INTERVAL;
        Self {
            searching: false,
            stale: map.vcpus.iter().all(|vcpu| vcpu.cpus.is_none()),
            map,
            watch,
            search_at: Instant::now() + pause,
            pause,
        }
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use virtionet_placement::Placement;

    /// The tests run one at a time, because each of them would find the vCPU threads of the others.
    static ONE_TEST_AT_A_TIME: Mutex<()> = Mutex::new(());

    fn me() -> Option<i32> {
        i32::try_from(std::process::id()).ok()
    }

    /// Starts a thread with the name of a vCPU thread of QEMU. It runs until the sender is dropped.
    fn vcpu(index: u32) -> (i32, mpsc::Sender<()>, std::thread::JoinHandle<()>) {
        let (tid_sender, tid) = mpsc::channel();
        let (end, ended) = mpsc::channel::<()>();
        let thread = std::thread::Builder::new().name(format!("CPU {index}/TCG"));
        let thread = thread.spawn(move || {
            tid_sender
                .send(rustix::thread::gettid().as_raw_nonzero().get())
                .unwrap();
            ended.recv().unwrap_err();
        });
        (tid.recv().unwrap(), end, thread.unwrap())
    }

    fn refresh_until(placer: &Arc<Placer>, changed: impl Fn() -> bool) {
        let until = Instant::now() + Duration::from_secs(20);
        while !changed() {
            placer.refresh();
            assert!(Instant::now() < until);
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// This process acts as the front-end. Its vCPUs appear late, move, and are added and removed.
    #[test]
    fn decisions_change_with_the_vcpus() {
        let _guard = ONE_TEST_AT_A_TIME.lock();
        let host = Arc::new(HostCpus::read().unwrap());
        let cpus = host.allowed();
        let planner = PlacementPlanner::new(Placement::Auto, cpus.clone(), None).unwrap();
        let placer = Arc::new(Placer::new("test", planner, host));
        assert!(!placer.refresh(), "no front-end is connected");
        placer.connected(me());
        placer.set_active_pairs(2);
        let blind = placer.decide(1);
        assert_eq!(
            (blind.vcpu_tid, &blind.cpus),
            (None, &cpus),
            "{blind}"
        );
        assert!(matches!(
            placer.warnings()[..],
            [Warning::Unknown { .. }, ..]
        ));

        // The threads get their names.
        let (first, ends_first, thread) = vcpu(0);
        refresh_until(&placer, || placer.decide(0).vcpu_tid == Some(first));
        assert_eq!(
            placer.decide(1).vcpu_tid,
            Some(first),
            "one vCPU for both pairs"
        );

        // The first vCPU is pinned to another CPU.
        for turn in [1, 0] {
            let there = cpus.nth_cyclic(turn);
            virtionet_placement::set_thread_affinity(Some(first), &there).unwrap();
            let before = placer.generation();
            assert!(placer.refresh() || cpus.len() == 1);
            assert!(placer.generation() != before || cpus.len() == 1);
            assert_eq!(placer.decide(0).cpus, there);
            assert_eq!(
                placer.decide(7).cpus,
                there,
                "also for a pair that is not in use"
            );
        }

        // Another vCPU is added and removed.
        let (second, ends_second, other) = vcpu(1);
        refresh_until(&placer, || placer.decide(1).vcpu_tid == Some(second));
        drop(ends_second);
        other.join().unwrap();
        refresh_until(&placer, || placer.decide(1).vcpu_tid == Some(first));

        placer.disconnected();
        assert_eq!(placer.warnings(), []);
        assert!(!placer.is_connected());
        drop(ends_first);
        thread.join().unwrap();
    }

    /// A changed number of threads must not hide until the next search that a vCPU moved.
    #[test]
    fn vcpu_that_moves_while_threads_start_and_end_is_detected_at_the_next_refresh() {
        let _guard = ONE_TEST_AT_A_TIME.lock();
        let host = Arc::new(HostCpus::read().unwrap());
        let cpus = host.allowed();
        let (tid, ends, thread) = vcpu(40);
        virtionet_placement::set_thread_affinity(Some(tid), &cpus.nth_cyclic(0)).unwrap();
        let planner = PlacementPlanner::new(Placement::Auto, cpus.clone(), None).unwrap();
        let placer = Arc::new(Placer::new("test", planner, host));
        placer.connected(me());
        let pair = |placer: &Arc<Placer>| {
            let all = (0..64).map(|pair| placer.decide(pair));
            all.into_iter()
                .find(|one| one.vcpu_tid == Some(tid))
                .unwrap()
        };
        assert_eq!(pair(&placer).cpus, cpus.nth_cyclic(0));
        placer.known.lock().found.as_mut().unwrap().search_at += Duration::from_secs(60);
        let (_, ends_other, other) = vcpu(41);
        virtionet_placement::set_thread_affinity(Some(tid), &cpus.nth_cyclic(1)).unwrap();
        assert!(placer.refresh() || cpus.len() == 1);
        assert_eq!(pair(&placer).cpus, cpus.nth_cyclic(1));
        drop((ends, ends_other));
        thread.join().unwrap();
        other.join().unwrap();
    }

    #[test]
    fn warnings_end_when_the_front_end_disconnects() {
        let host = Arc::new(HostCpus::read().unwrap());
        let planner = PlacementPlanner::new(Placement::Auto, host.allowed(), None).unwrap();
        let placer = Arc::new(Placer::new("test", planner, host));
        placer.connected(None);
        let _ = placer.decide(0);
        placer.disconnected();
        // A refresh that began before the front-end disconnected.
        placer.update_warnings();
        assert_eq!(placer.warnings(), []);
    }

    #[test]
    fn polling_workers_avoid_the_vcpus_of_another_device() {
        let _guard = ONE_TEST_AT_A_TIME.lock();
        let host = Arc::new(HostCpus::read().unwrap());
        let cpus = host.allowed();
        let planner = || {
            PlacementPlanner::new(Placement::None, cpus.clone(), None)
                .unwrap()
                .with_polling(true)
        };
        let one = Arc::new(Placer::new("test", planner(), Arc::clone(&host)));
        let other = Arc::new(Placer::new("test", planner(), Arc::clone(&host)));
        let (tid, ends, thread) = vcpu(50);
        virtionet_placement::set_thread_affinity(Some(tid), &cpus.nth_cyclic(0)).unwrap();
        one.connected(me());
        other.connected(None);
        assert_eq!(
            other.decide(0).cpus,
            cpus,
            "no device has searched for vCPUs"
        );
        let _ = one.decide(0);
        assert!(other.refresh(), "another guest has connected");
        let free = cpus.difference(&host.pinned_by_others(other.device));
        assert_eq!(host.pinned_by_others(one.device), CpuSet::default());
        assert!(!free.contains(cpus.nth_cyclic(0).last().unwrap()));
        let decision = other.decide(0);
        assert_eq!(decision.may_poll, !free.is_empty());
        assert!(free.is_empty() || decision.cpus == free, "{decision}");
        one.disconnected();
        assert!(other.refresh(), "that guest has disconnected");
        assert_eq!(other.decide(0).cpus, cpus);
        drop(ends);
        thread.join().unwrap();
    }

    /// A refresh does not wait for the monitor, and a worker that asks gets what is known.
    #[test]
    fn monitor_that_hangs_blocks_neither_a_refresh_nor_a_worker() {
        let host = Arc::new(HostCpus::read().unwrap());
        let path = std::env::temp_dir().join(format!("placer-{}.qmp", std::process::id()));
        let silent = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let planner =
            PlacementPlanner::new(Placement::Auto, host.allowed(), Some(path.clone())).unwrap();
        let planner = planner.with_qmp_timeout(Duration::from_millis(200));
        let placer = Arc::new(Placer::new("test", planner, host));
        placer.connected(None);
        let first = placer.decide(0);
        let due = |placer: &Placer| {
            let mut known = placer.known.lock();
            let found = known.found.as_mut().unwrap();
            found.search_at = Instant::now();
            found.searching
        };
        assert!(!due(&placer));
        assert!(!placer.refresh());
        assert!(due(&placer), "the monitor is being asked");
        assert!(!placer.refresh(), "the monitor is not asked twice");
        assert_eq!(placer.decide(0), first);
        refresh_until(&placer, || Arc::strong_count(&placer) == 1);
        drop(silent);
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn worker_that_detects_a_change_of_the_host_causes_a_wake_up_of_the_others() {
        let host = Arc::new(HostCpus::read().unwrap());
        let planner = PlacementPlanner::new(Placement::None, host.allowed(), None).unwrap();
        let placer = Arc::new(Placer::new("test", planner, host));
        placer.connected(None);
        assert!(!placer.decide(0).cpus.is_empty());
        assert!(!placer.refresh());
        placer.known.lock().host = u32::MAX;
        let before = placer.generation();
        assert_eq!(
            placer.decide(0).cpus,
            CpuSet::from_iter(placer.host.allowed().iter())
        );
        assert_ne!(placer.generation(), before);
        assert!(placer.refresh(), "the others have yet to ask");
        assert!(!placer.refresh());
    }
}
