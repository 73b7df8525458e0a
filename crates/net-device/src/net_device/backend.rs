//! The calls of a vhost-user session to the device.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use vhost::vhost_user::message::VhostUserProtocolFeatures;
use virtionet_vhost_user::{Backend, BackendError, RefusedRequest, UnmappedVring, VringStart};
use virtionet_virtio_net::features::Features;
use virtionet_virtio_net::{DeviceQueue, QueueConfig};
use virtionet_virtqueue::CrashRecord;
use virtionet_virtqueue::memory::{GuestMemory, IovaRange};

use super::{FrontendState, NetDevice, ServedPair};
use crate::conditions::ConditionKind;
use crate::feature_set::FeatureSet;
use crate::vring_slot::{StartedAt, StoppedVring, VringFds, VringSlot, VringStartError};
use crate::worker_event::PairEvent;

/// The role of a vring in its queue pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum VringRole {
    Rx,
    Tx,
}

/// Evaluates `$body` with the slot of the vring that has role `$role`.
macro_rules! with_slot {
    ($served:expr, $role:expr, $slot:ident => $body:expr) => {
        match $role {
            VringRole::Rx => {
                let $slot = $served.pair.rx();
                $body
            }
            VringRole::Tx => {
                let $slot = $served.pair.tx();
                $body
            }
        }
    };
}

impl VringRole {
    /// Vring 2k is the receiveq of queue pair k, and vring 2k+1 is its transmitq.
    fn of(index: u16) -> Self {
        match index % 2 {
            0 => Self::Rx,
            _ => Self::Tx,
        }
    }

    fn vring_index(self, pair: u16) -> u16 {
        2 * pair + u16::from(self == Self::Tx)
    }

    fn kick_event(self) -> PairEvent {
        match self {
            Self::Rx => PairEvent::RxKick,
            Self::Tx => PairEvent::TxKick,
        }
    }
}

impl Backend for NetDevice {
    fn features(&self) -> u64 {
        self.offered().virtio.0
    }

    fn protocol_features(&self) -> u64 {
        let offered = self.offered().protocol;
        match self.may_postcopy {
            true => offered,
            false => offered & !VhostUserProtocolFeatures::PAGEFAULT.bits(),
        }
    }

    fn max_queue_pairs(&self) -> u16 {
        u16::try_from(self.pairs.len()).unwrap_or(u16::MAX)
    }

    fn on_connect(&self, pid: Option<u32>) {
        self.set_connected(pid);
        self.connection_log
            .report_connect(&self.name, pid, self.max_queue_pairs());
    }

    fn on_resume(&self, pid: Option<u32>) {
        self.set_connected(pid);
        self.connection_log.report_resume(&self.name, pid);
    }

    fn on_resumed(&self) {
        self.pool.gate().session_continues();
    }

    /// Workers release the queue pairs first, so that none finds a vring stopped and detaches the uplink's queue.
    fn suspend(&self) -> Vec<(u16, u32)> {
        self.release_workers();
        let mut stopped = Vec::new();
        for served in self.pairs() {
            for role in [VringRole::Rx, VringRole::Tx] {
                let Some(vring) = with_slot!(served, role, slot => slot.stop()) else {
                    continue;
                };
                if let Some(kick) = &vring.kick {
                    served.worker.unwatch(kick);
                }
                stopped.push((role.vring_index(served.pair.index()), vring.base));
            }
        }
        stopped
    }

    fn set_protocol_features(&self, protocol_features: u64) {
        self.frontend.lock().protocol_features = protocol_features;
    }

    fn set_features(&self, acked: u64) {
        let features = Features(acked);
        self.frontend.lock().features = features;
        if let Err(error) = self.uplink.set_format(features.format()) {
            tracing::error!(
                "{}: the uplink cannot be set to the offloads that the driver accepted: {error}",
                self.name
            );
        }
        tracing::debug!("{}: driver accepted {:?}", self.name, features.names());
    }

    fn set_memory(&self, memory: &Arc<GuestMemory>) -> Vec<UnmappedVring> {
        self.frontend.lock().memory = Arc::clone(memory);
        let mut unmapped = Vec::new();
        for served in self.pairs() {
            if memory.is_in_postcopy() {
                served.pair.inbox().open();
            }
            for role in [VringRole::Rx, VringRole::Tx] {
                let stopped = with_slot!(served, role, slot => slot.rebind(memory));
                let Some((stopped, source)) = stopped else {
                    continue;
                };
                let index = role.vring_index(served.pair.index());
                let error = BackendError::VringUnmapped { index, source };
                tracing::error!("{}: {error}; it was stopped", self.name);
                unmapped.push(UnmappedVring {
                    index,
                    base: self.after_stop(served, role, stopped),
                    error,
                });
            }
            // Where all pages have arrived, the worker closes the inbox.
            if served.pair.inbox().is_open() {
                served.pair.wake();
            }
        }
        unmapped
    }

    fn forget_translations(&self, range: IovaRange, memory: &Arc<GuestMemory>) {
        self.forget_ring_translations(range, memory);
    }

    fn on_translations(&self) {
        self.wake_for_translations();
    }

    fn start_vring(&self, index: u16, start: VringStart) -> Result<(), BackendError> {
        let role = VringRole::of(index);
        let served = self.open_pair(index / 2, index)?;
        if role == VringRole::Rx {
            served.pair.prepare_inbox(&start.memory);
            served.pair.set_rx_ring_address(start.layout.desc);
            self.update_memory_node(&served.pair, &start.memory);
        }
        let kick = start.kick.clone();
        let base = start.base;
        let record = self.crash_record(index, &start);
        watch_kick(served, index, kick.as_deref())?;
        let node = served
            .pair
            .memory_node()
            .filter(|_| self.placer.has_several_nodes());
        let started = with_memory_node(
            node,
            || with_slot!(served, role, slot => start_vring(slot, start, record)),
        );
        match started {
            Ok(StartedAt::ImplausibleBase) => self.note_implausible_base(index, base),
            Ok(_) => {}
            Err(error) => {
                if let Some(kick) = kick {
                    served.worker.unwatch(&kick);
                }
                return Err(match error {
                    VringStartError::Virtqueue(source) => {
                        BackendError::VringConfig { index, source }
                    }
                    VringStartError::State(source) => BackendError::VringState { index, source },
                });
            }
        }
        self.frontend.lock().has_started_vring = true;
        self.conditions.clear(
            &self.name,
            ConditionKind::MemoryNotShared,
            "the guest's memory is shared now",
        );
        self.apply_vring_state(served, role);
        self.start_worker(served, index)
    }

    fn stop_vring(&self, index: u16) -> Option<u32> {
        let (served, role) = self.vring(index)?;
        let stopped = with_slot!(served, role, slot => slot.stop())?;
        Some(self.after_stop(served, role, stopped))
    }

    fn forget_progress(&self, index: u16) {
        // The driver may set up its rings again. If another one still cannot continue, its next start
        // says so.
        self.conditions.clear(
            &self.name,
            ConditionKind::BaseImplausible,
            "the guest's driver has stopped the packed rings that did not continue",
        );
        let Some(records) = &self.crash_records else {
            return;
        };
        if let Err(error) = records.forget(index) {
            tracing::error!(
                "{}: the crash record of vring {index} cannot be made void: {error}",
                self.name
            );
        }
    }

    fn set_used_log(&self, index: u16, used_log: Option<u64>) {
        if let Some((served, role)) = self.vring(index) {
            with_slot!(served, role, slot => slot.set_used_log(used_log));
        }
    }

    fn set_enabled(&self, index: u16, enabled: bool) {
        if let Some((served, role)) = self.vring(index) {
            with_slot!(served, role, slot => slot.set_enabled(enabled));
            self.apply_vring_state(served, role);
        }
    }

    fn set_kick(&self, index: u16, kick: Option<Arc<OwnedFd>>) -> Result<(), BackendError> {
        let Some((served, role)) = self.vring(index) else {
            return Ok(());
        };
        watch_kick(served, index, kick.as_deref())?;
        let old = with_slot!(served, role, slot => slot.replace_kick(kick));
        if let Some(old) = old {
            served.worker.unwatch(&old);
        }
        served.pair.wake();
        Ok(())
    }

    fn set_call(&self, index: u16, call: Option<Arc<OwnedFd>>) {
        if let Some((served, role)) = self.vring(index) {
            with_slot!(served, role, slot => slot.set_call(call));
        }
    }

    fn on_vring_announced(&self, index: u16) {
        let mut frontend = self.frontend.lock();
        frontend.pairs = frontend.pairs.max(index / 2 + 1);
    }

    fn set_err(&self, index: u16, err: Option<Arc<OwnedFd>>) {
        if let Some((served, role)) = self.vring(index) {
            with_slot!(served, role, slot => slot.set_err(err));
        }
    }

    /// A device whose uplink does not take the MTU still carries smaller frames, so this never
    /// fails: it is a condition until the uplink takes it.
    fn set_mtu(&self, mtu: u16) -> Result<(), BackendError> {
        self.frontend.lock().mtu = Some(mtu);
        self.apply_mtu();
        Ok(())
    }

    /// The worker of the first queue pair sends the frame, so that it takes the way of the guest's
    /// own frames.
    fn announce(&self, mac: [u8; 6]) {
        if let Some(served) = self.pairs().next() {
            served.pair.announce(mac);
        }
    }

    fn on_disconnect(&self, refused: Option<&RefusedRequest>) {
        self.placer.disconnected();
        self.release_workers();
        for served in self.pairs() {
            // The worker's last attach or detach may have overtaken the session's, so repeat it.
            served.pair.reconcile_uplink();
            served.pair.clear_memory_location();
            self.placer.set_memory_node(served.pair.index(), None);
        }
        self.interrupts.release();
        // A guest with many queue pairs must not keep descriptors that another device may need.
        self.pairs().for_each(ServedPair::close);
        self.adviser.reset();
        self.conditions.clear_connection(&self.name);
        let frontend = std::mem::take(&mut *self.frontend.lock());
        self.connection_log.report_disconnect(
            &self.name,
            &frontend,
            refused,
            self.max_queue_pairs(),
        );
    }
}

impl NetDevice {
    fn set_connected(&self, pid: Option<u32>) {
        self.placer
            .connected(pid.and_then(|pid| i32::try_from(pid).ok()));
        *self.frontend.lock() = FrontendState {
            connected: true,
            pid,
            offered: Some(self.decide_offer(pid)),
            ..FrontendState::default()
        };
    }

    fn offered(&self) -> FeatureSet {
        self.frontend.lock().offered.unwrap_or(self.feature_set)
    }

    /// What the front-end of process `pid` is offered: the features of this device, and those that an
    /// earlier virtionetd with another `--features-compat` has offered the same process. The guest may
    /// use them, and a front-end asks only once what it may let the guest have.
    fn decide_offer(&self, pid: Option<u32>) -> FeatureSet {
        let (Some(records), Some(pid)) = (&self.crash_records, pid) else {
            return self.feature_set;
        };
        let earlier = records.offered_to(pid).map(FeatureSet::supported);
        let offer = earlier.map_or(self.feature_set, |earlier| self.feature_set.union(earlier));
        if offer != self.feature_set {
            self.conditions.set(
                &self.name,
                ConditionKind::FeaturesKept,
                "the front-end was offered more features before --features-compat was changed, and its guest may use them; restart QEMU before the guest is migrated to a host with that version",
            );
        }
        if let Err(error) = records.note_offered(pid, offer) {
            self.note_no_crash_records(&format!(
                "the features that the front-end was offered are not recorded, so that --features-compat must stay as it is until the front-end ends: {error}"
            ));
        }
        offer
    }

    /// The record of the progress of vring `index`, if it is packed. Without one it runs as well,
    /// but does not continue after a crash.
    fn crash_record(&self, index: u16, start: &VringStart) -> Option<CrashRecord> {
        let records = self.crash_records.as_ref()?;
        if !Features(start.features).has_packed_virtqueues() {
            return None;
        }
        let record = records.record(index, start.layout.size, start.first_base);
        record
            .inspect_err(|error| {
                self.note_no_crash_records(&format!(
                    "vring {index} has no crash record, so that it does not continue after the end of this session: {error}"
                ));
            })
            .ok()
    }

    /// Starts the worker of vring `index`, unless it runs, or else stops the vring. The vring has been
    /// started before: a worker that finds the receiveq stopped detaches the uplink's queue, and the
    /// frames that wait there since a handover would be lost.
    fn start_worker(&self, served: &ServedPair, index: u16) -> Result<(), BackendError> {
        served.worker.start(served.position).map_err(|source| {
            self.stop_vring(index);
            let pair = served.pair.index();
            BackendError::Worker { pair, source }
        })
    }

    /// Lets no worker serve a queue pair of this device any more, and waits for that.
    fn release_workers(&self) {
        for served in self.pairs() {
            served.worker.request_release(served.position);
        }
        for served in self.pairs() {
            served.worker.release(served.position);
        }
    }

    /// The queue pair and role of vring `index`, if that queue pair has been used.
    fn vring(&self, index: u16) -> Option<(&ServedPair, VringRole)> {
        let served = self.pairs.get(usize::from(index / 2))?.get()?;
        Some((served, VringRole::of(index)))
    }

    fn note_implausible_base(&self, index: u16, base: u32) {
        let text = format!(
            "vring {index}: the front-end starts the packed ring at {base:#x}, where its descriptors show that it cannot be, and there is no crash record of it; reload the guest's driver or restart the guest"
        );
        self.conditions
            .set(&self.name, ConditionKind::BaseImplausible, &text);
    }

    /// Reconciles what depends on whether a vring runs and is enabled, and wakes the worker.
    fn apply_vring_state(&self, served: &ServedPair, role: VringRole) {
        if role == VringRole::Rx {
            self.update_active_pairs();
            served.pair.reconcile_uplink();
        }
        served.pair.wake();
    }

    /// Updates what depends on a vring that was stopped. Returns the vring's base, for which the
    /// front-end waits. So it is the worker that detaches the uplink's queue, unless other guests would wait
    /// for it then: the kernel waits until every CPU has passed a quiescent state, which takes
    /// milliseconds on busy CPUs.
    fn after_stop(&self, served: &ServedPair, role: VringRole, stopped: StoppedVring) -> u32 {
        if let Some(kick) = &stopped.kick {
            served.worker.unwatch(kick);
        }
        if role == VringRole::Rx {
            self.update_active_pairs();
            if !served.worker.reconciles_uplink(served.position) {
                served.pair.reconcile_uplink();
            }
        }
        served.pair.wake();
        stopped.base
    }
}

/// Makes the worker wait for `kick`, the kick descriptor of vring `index`.
fn watch_kick(served: &ServedPair, index: u16, kick: Option<&OwnedFd>) -> Result<(), BackendError> {
    let Some(kick) = kick else { return Ok(()) };
    served
        .worker
        .watch_pair(served.position, VringRole::of(index).kick_event(), kick)
        .map_err(|source| BackendError::Kick { index, source })
}

/// Runs `work` so that the memory that it allocates comes from `node`, if the node is known. The
/// session's thread, which allocates the private state of a virtqueue, may run on any node.
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
    record: Option<CrashRecord>,
) -> Result<StartedAt, VringStartError> {
    slot.set_enabled(start.enabled);
    let config = QueueConfig {
        layout: start.layout,
        base: start.base,
        features: Features(start.features),
        memory: start.memory,
        stats: Arc::clone(slot.stats()),
        record,
    };
    let fds = VringFds {
        kick: start.kick,
        call: start.call,
        err: start.err,
    };
    slot.start(config, fds, start.used_log)
}
