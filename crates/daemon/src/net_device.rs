//! One virtio-net device: what a vhost-user session drives, made of queue pairs and an uplink.

use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use virtionet_virtio_net::features::Features;
use virtionet_virtio_net::uplink::Uplink;
use virtionet_virtio_net::{DeviceQueue, QueueConfig};
use virtionet_placement::Warning;
use virtionet_virtqueue::memory::GuestMemory;
use virtionet_vhost_user::{Backend, BackendError, VringStart};

use crate::advice::{Adviser, QueueUsage};
use virtionet_base::MAX_QUEUE_PAIRS;
use virtionet_config::PollMode;
use crate::interrupts::{Interrupts, AffinityInput};
use crate::queue_pair::QueuePair;
use crate::placer::Placer;
use crate::busy_poll::BusyPoll;
use crate::vring_slot::{VringFds, VringSlot};

/// See the module.
#[derive(Debug)]
pub struct NetDevice {
    name: String,
    uplink: Arc<dyn Uplink>,
    placer: Arc<Placer>,
    poll: PollMode,
    /// Made when their first ring starts: a front-end may use fewer than it might.
    pairs: Vec<OnceLock<Arc<QueuePair>>>,
    frontend: Mutex<FrontendState>,
    reported: Mutex<ConnectionReports>,
    interrupts: Interrupts,
    adviser: Adviser,
}

/// A front-end that connects again and again must not flood the log.
const CONNECTION_REPORT_INTERVAL: Duration = Duration::from_secs(1);

/// What the log says of connections.
#[derive(Debug, Default)]
struct ConnectionReports {
    /// When it last told of one.
    last: Option<Instant>,
    /// Whether it told of the present one.
    is_reported: bool,
}

/// What is known of the front-end.
#[derive(Debug, Clone, Default)]
pub struct FrontendState {
    /// A front-end is connected.
    pub connected: bool,
    /// Its process id, where the kernel tells.
    pub pid: Option<u32>,
    /// Virtio features in force.
    pub features: Features,
    /// vhost-user protocol features in force.
    pub protocol_features: u64,
    /// The guest's memory.
    pub memory: Arc<GuestMemory>,
    /// The MTU that the front-end told.
    pub mtu: Option<u16>,
    /// Queue pairs that the front-end has for the driver, as far as it has named them.
    pub pairs: u16,
}

/// Which ring of a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum VringRole {
    Rx,
    Tx,
}

/// Calls `$body` with the slot of whichever half.
macro_rules! with_slot {
    ($pair:expr, $role:expr, $slot:ident => $body:expr) => {
        match $role {
            VringRole::Rx => {
                let $slot = $pair.rx();
                $body
            }
            VringRole::Tx => {
                let $slot = $pair.tx();
                $body
            }
        }
    };
}

impl NetDevice {
    /// A device called `name` with up to `max_queue_pairs` queue pairs.
    #[must_use]
    pub fn new(
        name: &str,
        max_queue_pairs: u16,
        uplink: Arc<dyn Uplink>,
        placer: Placer,
        poll: PollMode,
    ) -> Self {
        Self {
            name: name.to_owned(),
            uplink,
            placer: Arc::new(placer),
            poll,
            pairs: (0..max_queue_pairs).map(|_| OnceLock::new()).collect(),
            frontend: Mutex::default(),
            reported: Mutex::default(),
            interrupts: Interrupts::off(name),
            adviser: Adviser::new(name, None, None),
        }
    }

    /// The same with these to look after its interrupts and to advise its guest.
    #[must_use]
    pub fn with(mut self, interrupts: Interrupts, adviser: Adviser) -> Self {
        if self.uplink.host_interface().is_none() {
            interrupts.warn_if_unsupported(self.uplink.kind());
        }
        self.interrupts = interrupts;
        self.adviser = adviser;
        self
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where its frames go.
    #[must_use]
    pub fn uplink(&self) -> &dyn Uplink {
        &*self.uplink
    }

    /// What is known of the front-end now.
    #[must_use]
    pub fn frontend(&self) -> FrontendState {
        self.frontend.lock().clone()
    }

    /// The host's interrupts and steering masks that belong to it.
    #[must_use]
    pub fn interrupts(&self) -> &Interrupts {
        &self.interrupts
    }

    /// What its guest could do better.
    #[must_use]
    pub fn advice(&self) -> Vec<String> {
        self.adviser.current()
    }

    /// Brings in line what hangs on the workers' places and the guest's choice of pairs.
    fn reconcile_dependents(&self) {
        self.interrupts.reconcile(|| AffinityInput::of(self));
        self.adviser.update(|| QueueUsage::of(self), Instant::now());
    }

    /// The queue pairs that have been used so far.
    pub fn pairs(&self) -> impl Iterator<Item = &Arc<QueuePair>> {
        self.pairs.iter().filter_map(OnceLock::get)
    }

    /// The pair and half that ring `index` is, if that pair has been used.
    fn vring(&self, index: u16) -> Option<(&Arc<QueuePair>, VringRole)> {
        let pair = self.pairs.get(usize::from(index / 2))?.get()?;
        Some((pair, vring_role(index)))
    }

    /// The same, made now if it has not.
    fn vring_or_create(&self, index: u16) -> Result<(&Arc<QueuePair>, VringRole), BackendError> {
        let slot = self.pairs.get(usize::from(index / 2)).ok_or_else(|| {
            BackendError::new(format!(
                "ring {index} is beyond the {} queue pairs of {}; start virtionetd with more --queues",
                self.pairs.len(),
                self.name
            ))
        })?;
        if slot.get().is_none() {
            let pair = QueuePair::new(index / 2, &self.name, Arc::clone(&self.placer)).map_err(|e| {
                BackendError::new(format!(
                    "cannot make queue pair {}: {e}; raise the limit of open files",
                    index / 2
                ))
            })?;
            // Only the session thread makes pairs, so none was put there meanwhile.
            let _ = slot.set(Arc::new(pair));
        }
        self.vring(index)
            .ok_or_else(|| BackendError::new(format!("ring {index} does not exist")))
    }

    /// The number of pairs that the driver uses decides which vCPUs each of them serves.
    fn update_active_pairs(&self) {
        let count = self.pairs().filter(|pair| is_in_use(pair)).count();
        if self
            .placer
            .set_active_pairs(u32::try_from(count).unwrap_or(u32::MAX))
        {
            self.pairs().for_each(|pair| pair.wake());
        }
    }

    /// Brings all that hangs on whether a ring is live in line with it.
    fn apply_vring_state(&self, pair: &QueuePair, role: VringRole) {
        if role == VringRole::Rx {
            self.update_active_pairs();
            pair.apply_rx_state();
        } else {
            pair.wake();
        }
    }

    /// The protocol has no message for "more pairs than you have": a front-end that wants more just
    /// hangs up, before the device has any use (QEMU then tries again at once).
    fn log_disconnect(&self, frontend: &FrontendState) {
        let unused = frontend.protocol_features != 0 && frontend.features == Features::default();
        if unused && self.max_queue_pairs() < MAX_QUEUE_PAIRS {
            tracing::warn!(
                "{0}: front-end gone before it used the device; if it asked for more than {1} queue pairs, raise --queues {1} or lower queues= of QEMU's -netdev vhost-user",
                self.name,
                self.pairs.len()
            );
        } else {
            tracing::info!("{}: front-end gone", self.name);
        }
    }

    /// Whether there is a front-end whose vCPUs and memory may move.
    pub(crate) fn has_frontend(&self) -> bool {
        self.placer.is_connected()
    }

    /// Looks whether workers should stand elsewhere, and has them go there.
    pub(crate) fn refresh_placement(&self) {
        if !self.has_frontend() {
            return;
        }
        let mut changed = self.placer.refresh();
        if self.placer.has_several_nodes() {
            let memory = Arc::clone(&self.frontend.lock().memory);
            self.pairs().for_each(|pair| changed |= pair.update_memory_node(&memory));
        }
        if changed {
            self.pairs().for_each(|pair| pair.wake());
        } else {
            self.pairs().for_each(|pair| pair.check_affinity());
        }
        self.placer.update_warnings();
        self.reconcile_dependents();
    }

    /// What is wrong with how vCPUs and workers stand.
    #[must_use]
    pub fn warnings(&self) -> Vec<Warning> {
        self.placer.warnings()
    }

    fn set_format(&self, features: Features) {
        if let Err(error) = self.uplink.set_format(features.format()) {
            tracing::error!(
                "{}: the uplink cannot be set to the offloads that the guest took: {error}",
                self.name
            );
        }
    }
}

/// Whether the driver uses the pair.
pub(crate) fn is_in_use(pair: &QueuePair) -> bool {
    pair.rx().is_enabled() && pair.rx().size() > 0
}

fn vring_role(index: u16) -> VringRole {
    match index % 2 {
        0 => VringRole::Rx,
        _ => VringRole::Tx,
    }
}

impl Backend for NetDevice {
    fn features(&self) -> u64 {
        Features::offered().0
    }

    fn max_queue_pairs(&self) -> u16 {
        u16::try_from(self.pairs.len()).unwrap_or(u16::MAX)
    }

    fn on_connect(&self, pid: Option<u32>) {
        self.placer
            .connected(pid.and_then(|pid| i32::try_from(pid).ok()));
        *self.frontend.lock() = FrontendState {
            connected: true,
            pid,
            ..FrontendState::default()
        };
        let mut reported = self.reported.lock();
        reported.is_reported = reported.last.is_none_or(|last| last.elapsed() >= CONNECTION_REPORT_INTERVAL);
        if reported.is_reported {
            reported.last = Some(Instant::now());
            tracing::info!(
                "{}: front-end connected{}; it may use up to {} queue pairs (--queues)",
                self.name,
                pid.map_or(String::new(), |pid| format!(" (process {pid})")),
                self.pairs.len()
            );
        }
    }

    fn set_protocol_features(&self, protocol_features: u64) {
        self.frontend.lock().protocol_features = protocol_features;
    }

    fn set_features(&self, acked: u64) {
        let features = Features(acked);
        self.frontend.lock().features = features;
        self.set_format(features);
        tracing::debug!("{}: driver took {:?}", self.name, features.names());
    }

    fn set_memory(&self, memory: &Arc<GuestMemory>) {
        self.frontend.lock().memory = Arc::clone(memory);
        for pair in self.pairs() {
            for role in [VringRole::Rx, VringRole::Tx] {
                if let Err(error) = with_slot!(pair, role, slot => slot.rebind(memory)) {
                    tracing::error!(
                        "{pair}: the {role:?} ring is not in the new memory table and was stopped: {error}"
                    );
                    self.apply_vring_state(pair, role);
                }
            }
        }
    }

    fn start_vring(&self, index: u16, start: VringStart) -> Result<(), BackendError> {
        let (pair, role) = self.vring_or_create(index)?;
        pair.open_uplink(&*self.uplink)
            .map_err(|e| BackendError::new(e.to_string()))?;
        if role == VringRole::Rx {
            pair.set_rx_ring_address(start.layout.desc);
            pair.update_memory_node(&start.memory);
        }
        let near = pair
            .memory_node()
            .filter(|_| self.placer.has_several_nodes());
        let started = with_memory_node(
            near,
            || with_slot!(pair, role, slot => start_vring(slot, start)),
        );
        started.map_err(|e| BackendError::new(format!("ring {index} cannot start: {e}")))?;
        pair.start_worker(BusyPoll::new(self.poll)).map_err(|e| {
            BackendError::new(format!(
                "cannot start the worker of queue pair {}: {e}; raise the limit of threads",
                pair.index()
            ))
        })?;
        self.apply_vring_state(pair, role);
        Ok(())
    }

    fn stop_vring(&self, index: u16) -> Option<u32> {
        let (pair, role) = self.vring(index)?;
        let base = with_slot!(pair, role, slot => slot.stop());
        self.apply_vring_state(pair, role);
        base
    }

    fn set_enabled(&self, index: u16, enabled: bool) {
        if let Some((pair, role)) = self.vring(index) {
            with_slot!(pair, role, slot => slot.set_enabled(enabled));
            self.apply_vring_state(pair, role);
        }
    }

    fn set_kick(&self, index: u16, kick: Option<Arc<OwnedFd>>) -> Result<(), BackendError> {
        let Some((pair, role)) = self.vring(index) else {
            return Ok(());
        };
        with_slot!(pair, role, slot => slot.set_kick(kick)).map_err(|e| {
            BackendError::new(format!(
                "the kick descriptor of ring {index} cannot be polled: {e}"
            ))
        })?;
        pair.wake();
        Ok(())
    }

    fn set_call(&self, index: u16, call: Option<Arc<OwnedFd>>) {
        if let Some((pair, role)) = self.vring(index) {
            with_slot!(pair, role, slot => slot.set_call(call));
        }
    }

    fn on_vring_announced(&self, index: u16) {
        let mut frontend = self.frontend.lock();
        frontend.pairs = frontend.pairs.max(index / 2 + 1);
    }

    fn set_err(&self, index: u16, err: Option<Arc<OwnedFd>>) {
        if let Some((pair, role)) = self.vring(index) {
            with_slot!(pair, role, slot => slot.set_err(err));
        }
    }

    fn set_mtu(&self, mtu: u16) -> Result<(), BackendError> {
        self.uplink
            .set_mtu(mtu)
            .map_err(|e| BackendError::new(e.to_string()))?;
        self.frontend.lock().mtu = Some(mtu);
        Ok(())
    }

    fn on_disconnect(&self) {
        self.placer.disconnected();
        self.pairs().for_each(|pair| pair.stop_worker());
        self.pairs().for_each(|pair| pair.join_worker());
        // A worker's last word about its uplink may have come after ours.
        self.pairs().for_each(|pair| pair.reconcile_uplink());
        self.pairs().for_each(|pair| pair.clear_memory_location());
        self.interrupts.release();
        self.adviser.reset();
        let frontend = std::mem::take(&mut *self.frontend.lock());
        if self.reported.lock().is_reported {
            self.log_disconnect(&frontend);
        }
    }
}

/// What `work` allocates anew comes from `node`, where that is known: a ring's bookkeeping is made
/// by the session thread, which may run anywhere.
fn with_memory_node<T>(node: Option<u32>, work: impl FnOnce() -> T) -> T {
    if node.is_none() {
        return work();
    }
    virtionet_placement::prefer_node(node);
    let done = work();
    virtionet_placement::prefer_node(None);
    done
}

fn start_vring<Q: DeviceQueue>(
    slot: &VringSlot<Q>,
    start: VringStart,
) -> Result<(), crate::vring_slot::VringStartError> {
    slot.set_enabled(start.enabled);
    let config = QueueConfig {
        layout: start.layout,
        base: start.base,
        features: Features(start.features),
        memory: start.memory,
        stats: Arc::clone(slot.stats()),
    };
    let fds = VringFds {
        kick: start.kick,
        call: start.call,
        err: start.err,
    };
    slot.start(config, fds)
}
