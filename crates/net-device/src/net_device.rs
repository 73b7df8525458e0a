//! A virtio-net device. It consists of queue pairs and an uplink, and a vhost-user session drives
//! it.

mod backend;
mod connection_log;
mod handover;
mod health;
mod removal;
mod translation;

use std::collections::BTreeSet;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use parking_lot::Mutex;
use virtionet_base::RateLimiter;
use virtionet_config::{FeaturesVersion, PollMode};
use virtionet_placement::{CpuSet, worker_name};
use virtionet_vhost_user::BackendError;
use virtionet_virtio_net::features::Features;
use virtionet_virtio_net::uplink::Uplink;
use virtionet_virtqueue::memory::GuestMemory;

use crate::advice::{Adviser, QueueUsage};
use crate::conditions::{ConditionKind, Conditions};
use crate::crash_records::CrashRecords;
use crate::feature_set::FeatureSet;
use crate::interrupts::{AffinityInput, Interrupts};
use crate::placer::Placer;
use crate::queue_pair::QueuePair;
use crate::worker::Worker;
use crate::worker_event::PairEvent;
use crate::worker_placement::PlacementState;
use crate::worker_pool::WorkerPool;
use connection_log::ConnectionLog;

/// A virtio-net device.
#[derive(Debug)]
pub struct NetDevice {
    name: String,
    uplink: Arc<dyn Uplink>,
    placer: Arc<Placer>,
    pool: Arc<WorkerPool>,
    poll: PollMode,
    feature_set: FeatureSet,
    /// Whether PAGEFAULT is offered, if the feature set has it.
    may_postcopy: bool,
    /// Each queue pair is created when its first vring starts, because a front-end may use fewer
    /// than it may have.
    pairs: Vec<OnceLock<ServedPair>>,
    frontend: Mutex<FrontendState>,
    connection_log: ConnectionLog,
    interrupts: Interrupts,
    adviser: Adviser,
    conditions: Conditions,
    /// Where the progress of packed vrings is recorded, if it is.
    crash_records: Option<CrashRecords>,
    /// The sum of the vrings' counters `address_invalid` at the last check.
    invalid_addresses: AtomicU64,
    /// Of log lines about sessions that ended with an error: a front-end may come again at once.
    session_errors: RateLimiter,
    /// Of log lines about an uplink that was deleted and made again at once.
    reopened_uplinks: RateLimiter,
}

/// A queue pair and the worker that serves it. Both last as long as the device, so that their
/// counters do. Their descriptors are closed when the front-end has disconnected.
#[derive(Debug)]
pub struct ServedPair {
    /// The queue pair.
    pub pair: Arc<QueuePair>,
    /// The worker that serves it.
    pub worker: Arc<Worker>,
    /// The queue pair's position among those of the worker.
    position: u16,
}

impl ServedPair {
    /// Closes the descriptors of the pair, which its worker must have released: the queue of the
    /// uplink, unless the uplink itself keeps it, and those of the worker, unless another pair needs
    /// them.
    fn close(&self) {
        if let Some(uplink) = self.pair.uplink()
            && let Some(fd) = uplink.poll_fd()
        {
            self.worker.unwatch(&fd);
        }
        self.worker.close(self.position);
        self.pair.close_uplink();
    }
}

/// The state of the front-end, as far as it is known.
#[derive(Debug, Clone, Default)]
pub struct FrontendState {
    /// Whether a front-end is connected.
    pub connected: bool,
    /// Its process id, if the kernel reports it.
    pub pid: Option<u32>,
    /// The features that it was offered.
    pub offered: Option<FeatureSet>,
    /// The negotiated virtio features.
    pub features: Features,
    /// The negotiated vhost-user protocol features.
    pub protocol_features: u64,
    /// The guest's memory.
    pub memory: Arc<GuestMemory>,
    /// The MTU that the front-end set.
    pub mtu: Option<u16>,
    /// The number of queue pairs that the front-end has for the driver, as far as it has announced
    /// them.
    pub pairs: u16,
    /// Whether a vring was started since the front-end connected.
    pub has_started_vring: bool,
}

impl NetDevice {
    /// Creates a device called `name` with up to `max_queue_pairs` queue pairs, whose workers come
    /// from `pool`.
    #[must_use]
    pub fn new(
        name: &str,
        max_queue_pairs: u16,
        uplink: Arc<dyn Uplink>,
        placer: Placer,
        poll: PollMode,
        pool: Arc<WorkerPool>,
    ) -> Self {
        Self {
            name: name.to_owned(),
            uplink,
            placer: Arc::new(placer),
            pool,
            poll,
            feature_set: FeatureSet::of(FeaturesVersion::default()),
            may_postcopy: false,
            pairs: (0..max_queue_pairs).map(|_| OnceLock::new()).collect(),
            frontend: Mutex::default(),
            connection_log: ConnectionLog::default(),
            interrupts: Interrupts::off(name),
            adviser: Adviser::new(name, None, None),
            conditions: Conditions::default(),
            crash_records: None,
            invalid_addresses: AtomicU64::new(0),
            session_errors: RateLimiter::new(),
            reopened_uplinks: RateLimiter::new(),
        }
    }

    /// The same device with these objects, which manage its interrupts and advise its guest.
    #[must_use]
    pub fn with(mut self, interrupts: Interrupts, adviser: Adviser) -> Self {
        if self.uplink.host_interface().is_none() {
            interrupts.warn_if_unsupported(self.uplink.kind());
        }
        self.interrupts = interrupts;
        self.adviser = adviser;
        self
    }

    /// The same device, which records the progress of packed vrings in these records.
    #[must_use]
    pub fn with_crash_records(mut self, crash_records: CrashRecords) -> Self {
        self.crash_records = Some(crash_records);
        self
    }

    /// The same device, which offers exactly these features.
    #[must_use]
    pub fn with_feature_set(mut self, feature_set: FeatureSet) -> Self {
        self.feature_set = feature_set.supported();
        self
    }

    /// The same device, whose front-end may migrate its guest by postcopy, or may not. A front-end that
    /// may can write the memory of this process.
    #[must_use]
    pub fn with_postcopy(mut self, may_postcopy: bool) -> Self {
        self.may_postcopy = may_postcopy;
        self
    }

    /// Notes why the progress of packed vrings would not survive the process.
    pub fn note_no_crash_records(&self, reason: &str) {
        self.conditions
            .set(&self.name, ConditionKind::NoCrashRecord, reason);
    }

    /// The device's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The uplink that carries the device's frames.
    #[must_use]
    pub fn uplink(&self) -> &dyn Uplink {
        &*self.uplink
    }

    /// The current state of the front-end.
    #[must_use]
    pub fn frontend(&self) -> FrontendState {
        self.frontend.lock().clone()
    }

    /// The host's interrupts and steering masks that belong to the device.
    #[must_use]
    pub fn interrupts(&self) -> &Interrupts {
        &self.interrupts
    }

    /// The current advice for the guest.
    #[must_use]
    pub fn advice(&self) -> Vec<String> {
        self.adviser.current()
    }

    /// What is wrong with the device, and with the placement of vCPUs and workers, one sentence
    /// each.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = self.conditions.current();
        warnings.extend(self.placer.warnings().iter().map(ToString::to_string));
        warnings
    }

    /// Whether the uplink could carry frames when that was last checked.
    #[must_use]
    pub fn is_uplink_up(&self) -> bool {
        !self.conditions.has(ConditionKind::Uplink)
    }

    /// The queue pairs that have been used so far, with their workers.
    pub fn pairs(&self) -> impl Iterator<Item = &ServedPair> {
        self.pairs.iter().filter_map(OnceLock::get)
    }

    fn pairs_in_use(&self) -> impl Iterator<Item = &ServedPair> {
        self.pairs().filter(|served| served.pair.is_in_use())
    }

    /// Returns queue pair `index` with its descriptors open, and creates it if it does not exist.
    /// `vring` is the vring that needs it.
    fn open_pair(&self, index: u16, vring: u16) -> Result<&ServedPair, BackendError> {
        let no_such_pair = || BackendError::NoSuchQueuePair {
            index: vring,
            queue_pairs: self.pairs.len(),
            device: self.name.clone(),
        };
        let place = self
            .pairs
            .get(usize::from(index))
            .ok_or_else(no_such_pair)?;
        if let Some(served) = place.get() {
            self.open_descriptors(served)?;
            return Ok(served);
        }
        let served = self.create_pair(index);
        if let Err(error) = self.open_descriptors(&served) {
            self.pool.remove_pair(&served.worker, served.position);
            return Err(error);
        }
        Ok(place.get_or_init(|| served))
    }

    /// Creates a queue pair, and a worker that has not started. They have no descriptors yet.
    fn create_pair(&self, index: u16) -> ServedPair {
        let name = worker_name(&self.name, u32::from(index));
        let placement = PlacementState::new(Arc::clone(&self.placer), index);
        let worker = self.pool.worker_for(name, self.poll, placement);
        let pair = Arc::new(QueuePair::new(index, &self.name, worker.waker().clone()));
        let position = worker.add_pair(Arc::clone(&pair));
        ServedPair {
            pair,
            worker,
            position,
        }
    }

    /// Opens the worker's descriptors and the queue of the uplink, unless they are open.
    fn open_descriptors(&self, served: &ServedPair) -> Result<(), BackendError> {
        if served.pair.uplink().is_some() {
            return Ok(());
        }
        let pair = served.pair.index();
        let opened = served
            .worker
            .open(served.position)
            .map_err(|source| BackendError::QueuePair { pair, source })
            .and_then(|()| self.open_uplink(served));
        if opened.is_err() {
            served.worker.close(served.position);
        }
        opened
    }

    fn open_uplink(&self, served: &ServedPair) -> Result<(), BackendError> {
        let queue = served
            .pair
            .open_uplink(&*self.uplink)
            .map_err(|error| BackendError::Uplink(error.into()))?;
        if let Some(fd) = queue.poll_fd() {
            served
                .worker
                .watch_pair(served.position, PairEvent::UplinkReadable, &fd)
                .map_err(|source| BackendError::UplinkWatch { source })?;
        }
        served.pair.set_uplink(queue);
        Ok(())
    }

    /// Updates the number of queue pairs in use, which determines the vCPUs that each of them
    /// serves.
    fn update_active_pairs(&self) {
        let count = u32::try_from(self.pairs_in_use().count()).unwrap_or(u32::MAX);
        self.placer.set_active_pairs(count);
    }

    fn wake_all(&self) {
        self.pairs().for_each(|served| served.pair.wake());
    }

    /// Updates the NUMA node of the receiveq's memory.
    fn update_memory_node(&self, pair: &QueuePair, memory: &GuestMemory) {
        let node = pair.update_memory_node(memory);
        self.placer.set_memory_node(pair.index(), node);
    }

    /// Whether there is a front-end whose vCPUs and memory may move.
    pub(crate) fn has_frontend(&self) -> bool {
        self.placer.is_connected()
    }

    /// Decides again where workers run if another thread has reported a change, and wakes the
    /// workers if they must move.
    pub(crate) fn update_placement(&self) {
        if self.placer.update() {
            self.wake_all();
        }
    }

    /// Checks whether workers must move to other CPUs, and wakes them so that they do. Updates all
    /// that depends on their placement.
    pub(crate) fn refresh_placement(&self) {
        if !self.has_frontend() {
            return;
        }
        if self.placer.has_several_nodes() {
            let memory = Arc::clone(&self.frontend.lock().memory);
            for served in self.pairs() {
                self.update_memory_node(&served.pair, &memory);
            }
        }
        if self.placer.refresh() {
            self.wake_all();
        } else {
            self.pairs()
                .for_each(|served| served.worker.check_affinity());
        }
        self.placer.update_warnings();
        self.reconcile_dependents();
        self.check_conditions();
    }

    /// Reconciles what depends on the workers' placement and on the guest's use of queue pairs.
    fn reconcile_dependents(&self) {
        self.interrupts.reconcile(|| self.affinity_input());
        self.adviser.update(|| self.queue_usage(), Instant::now());
    }

    /// How the guest uses its queue pairs now; `None` while it uses none.
    fn queue_usage(&self) -> Option<QueueUsage> {
        let frontend = self.frontend();
        // Together, the queue pairs in use serve all vCPUs.
        let vcpus: BTreeSet<u32> = self
            .pairs_in_use()
            .filter_map(|served| served.worker.placement())
            .flat_map(|placement| placement.decision.vcpus)
            .collect();
        let enabled = u16::try_from(self.pairs_in_use().count()).unwrap_or(u16::MAX);
        (frontend.connected && enabled > 0).then(|| QueueUsage {
            offered: frontend.pairs,
            enabled,
            multiqueue: frontend.features.names().contains(&"MQ"),
            vcpus: u16::try_from(vcpus.len()).ok().filter(|count| *count > 0),
        })
    }

    /// The values from which the settings of interrupts are derived; `None` while the guest uses no
    /// queue pair, or if the uplink is not an interface of the host.
    fn affinity_input(&self) -> Option<AffinityInput> {
        let mut workers = Vec::new();
        for served in self.pairs_in_use() {
            workers.resize_with(usize::from(served.pair.index()) + 1, CpuSet::default);
            let placement = served.worker.placement();
            let placement = placement.filter(|placement| !placement.is_pending());
            if let (Some(last), Some(placement)) = (workers.last_mut(), placement) {
                *last = placement.decision.cpus;
            }
        }
        let interface = self.uplink.host_interface()?;
        (!workers.is_empty()).then_some(AffinityInput { interface, workers })
    }
}

#[cfg(test)]
mod crash_tests;
#[cfg(test)]
mod feature_tests;
#[cfg(test)]
mod migration_tests;
#[cfg(test)]
mod placement_tests;
#[cfg(test)]
mod postcopy_tests;
#[cfg(test)]
mod shared_worker_tests;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod translation_tests;
