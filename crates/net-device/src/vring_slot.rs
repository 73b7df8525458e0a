//! The slot of one vring of a queue pair.
//!
//! A vring's state changes by the table in [`virtionet_vhost_user::vring_state`], in one function
//! of this module (`VringSlot::set_state`), under the slot's lock. The lock also protects the
//! virtqueue, so the state and the virtqueue cannot contradict each other. The worker takes the
//! lock for a turn, and the session's thread takes it to start, stop or change the vring, for which it
//! waits for at most one turn (`turn_lock`). The values that other threads read without waiting
//! (state, size) are published in atomics at each change.

mod push;
mod turn_lock;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};

use virtionet_process::panic_policy::{Panicked, contain};
use virtionet_vhost_user::{InvalidTransition, VringEvent, VringState};
use virtionet_virtio_net::stats::VringStats;
use virtionet_virtio_net::{DeviceQueue, QueueConfig};
use virtionet_virtqueue::memory::{GuestMemory, IovaRange, LossWatch};
use virtionet_virtqueue::{VirtqueueError, VirtqueueFault};

use crate::notifier::{Notification, Notifier, deferring};
use crate::quarantine::QuarantineCause;
use crate::vring_log::VringLog;
pub use push::Pushed;
use turn_lock::TurnLock;

/// The file descriptors of a vring.
#[derive(Debug, Clone, Default)]
pub struct VringFds {
    /// The kick descriptor: the driver signals it when chains are available.
    pub kick: Option<Arc<OwnedFd>>,
    /// The call descriptor: the device signals it to interrupt the driver when chains are used.
    pub call: Option<Arc<OwnedFd>>,
    /// The err descriptor: the device signals it when it quarantines the vring.
    pub err: Option<Arc<OwnedFd>>,
}

/// The virtqueue and the file descriptors of a started vring.
#[derive(Debug)]
struct StartedVring<Q> {
    queue: Q,
    kick: Option<Arc<OwnedFd>>,
    call: Option<Arc<Notifier>>,
    err: Option<Arc<Notifier>>,
    losses: LossWatch,
    /// The memory in which the vring continues when the translations of its areas are known. Until
    /// then the queue must not be used, except to stop it.
    untranslated: Option<Arc<GuestMemory>>,
}

/// The state that the lock protects.
#[derive(Debug)]
struct Contents<Q> {
    state: VringState,
    /// `Some` in exactly those states that are started.
    vring: Option<StartedVring<Q>>,
}

impl<Q: DeviceQueue> Contents<Q> {
    /// Whether pages of the vring's memory may be missing.
    fn is_in_postcopy(&self) -> bool {
        let vring = self.vring.as_ref();
        vring.is_some_and(|vring| vring.queue.memory().is_in_postcopy())
    }
}

/// Where a vring was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StartedAt {
    /// At the base of its configuration.
    Base,
    /// At this base, because that of its configuration was outdated.
    Corrected(u32),
    /// At the base of its configuration, which its descriptors contradict: it does not continue.
    ImplausibleBase,
}

/// A vring that was stopped.
#[derive(Debug)]
pub struct StoppedVring {
    /// The base at which it would continue.
    pub base: u32,
    /// Its kick descriptor, which the worker no longer needs to wait for.
    pub kick: Option<Arc<OwnedFd>>,
}

/// The slot of one vring: its state, and while it is started, its virtqueue.
#[derive(Debug)]
pub struct VringSlot<Q> {
    contents: TurnLock<Contents<Q>>,
    enabled: AtomicBool,
    /// The started vring has a kick descriptor.
    has_kick: AtomicBool,
    /// The last turn ended at an address without a translation.
    waits_for_translation: AtomicBool,
    /// [`VringState::to_number`] of the state.
    state: AtomicU8,
    size: AtomicU16,
    log: Arc<VringLog>,
}

impl<Q: DeviceQueue> VringSlot<Q> {
    /// The slot of a vring that is stopped. `name` is for its log lines.
    #[must_use]
    pub fn new(name: String) -> Self {
        Self {
            contents: TurnLock::new(Contents {
                state: VringState::Stopped,
                vring: None,
            }),
            enabled: AtomicBool::new(false),
            has_kick: AtomicBool::new(true),
            waits_for_translation: AtomicBool::new(false),
            state: AtomicU8::new(VringState::Stopped.to_number()),
            size: AtomicU16::new(0),
            log: Arc::new(VringLog::new(name)),
        }
    }

    /// The vring's counters, which outlive it.
    #[must_use]
    pub fn stats(&self) -> &Arc<VringStats> {
        self.log.stats()
    }

    /// The vring's state.
    #[must_use]
    pub fn state(&self) -> VringState {
        VringState::from_number(self.state.load(Ordering::Relaxed))
    }

    /// Whether the vring runs and must be polled: the front-end gave no kick descriptor, or it waits
    /// for a translation.
    #[must_use]
    pub fn must_be_polled(&self) -> bool {
        (!self.has_kick.load(Ordering::Relaxed) || self.waits_for_translation())
            && self.state() == VringState::Running
    }

    /// Whether the last turn ended because the front-end has not sent a translation yet. It wakes
    /// the worker with the next one.
    #[must_use]
    pub fn waits_for_translation(&self) -> bool {
        self.waits_for_translation.load(Ordering::Relaxed)
    }

    /// Whether the front-end has enabled the vring.
    #[must_use]
    pub fn is_enabled(&self) -> bool {
        self.enabled.load(Ordering::Relaxed)
    }

    /// The number of descriptors of the started vring; 0 when it is stopped.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size.load(Ordering::Relaxed)
    }

    /// Whether the driver has made chains available that were not dequeued. A vring that is not served,
    /// or whose memory is not there yet, has none.
    #[must_use]
    pub fn has_available(&self) -> bool {
        let contents = self.contents.lock();
        let is_served = contents.state == VringState::Running && self.is_enabled();
        let vring = contents.vring.as_ref().filter(|vring| {
            is_served && vring.untranslated.is_none() && !vring.queue.memory().is_in_postcopy()
        });
        vring.is_some_and(|vring| vring.queue.virtqueue().has_more())
    }

    /// Starts the vring, and logs writes to the virtqueue itself at guest address `used_log` while its
    /// memory has a log. It signals a call once, because a back-end that served this vring before
    /// may have ended before it sent one.
    ///
    /// # Errors
    /// When the configuration is not that of a virtqueue, or the vring is started already.
    pub fn start(
        &self,
        config: QueueConfig,
        fds: VringFds,
        used_log: Option<u64>,
    ) -> Result<StartedAt, VringStartError> {
        let mut contents = self.contents.lock();
        let state = contents.state.after(VringEvent::Start)?;
        let base = config.base;
        let mut queue = Q::new(config)?;
        let started = match (
            queue.virtqueue().corrected_base(),
            queue.virtqueue().is_base_implausible(),
        ) {
            (_, true) => StartedAt::ImplausibleBase,
            (Some(corrected), false) => StartedAt::Corrected(corrected),
            (None, false) => StartedAt::Base,
        };
        self.stats()
            .dropped_at_start
            .add(queue.virtqueue().given_back_at_start().into());
        queue.set_used_log(used_log);
        let has_kick = fds.kick.is_some();
        let call = self.notifier(fds.call);
        queue.disable_kicks();
        contents.vring = Some(StartedVring {
            queue,
            kick: fds.kick,
            call: call.clone(),
            err: self.notifier(fds.err),
            losses: LossWatch::default(),
            untranslated: None,
        });
        self.set_state(&mut contents, state);
        self.has_kick.store(has_kick, Ordering::Relaxed);
        drop(contents);
        self.report_start(base, started);
        if let Some(call) = call {
            call.call();
        }
        Ok(started)
    }

    fn report_start(&self, base: u32, started: StartedAt) {
        match started {
            StartedAt::Base => {}
            StartedAt::Corrected(corrected) => {
                self.stats().base_corrected.add(1);
                self.log.base_corrected(base, corrected);
            }
            // The device's warning says so in the log.
            StartedAt::ImplausibleBase => self.stats().base_implausible.add(1),
        }
    }

    fn notifier(&self, fd: Option<Arc<OwnedFd>>) -> Option<Arc<Notifier>> {
        fd.map(|fd| Arc::new(Notifier::new(fd, Arc::clone(&self.log))))
    }

    /// Stops the vring. After this nothing is written to guest memory. `None` when it was stopped
    /// already.
    pub fn stop(&self) -> Option<StoppedVring> {
        self.release(&mut self.contents.lock(), VringEvent::Stop)
    }

    /// Stops the vring because of `event`.
    fn release(&self, contents: &mut Contents<Q>, event: VringEvent) -> Option<StoppedVring> {
        let state = contents.state.after(event).ok()?;
        let mut vring = contents.vring.take()?;
        self.set_state(contents, state);
        self.waits_for_translation.store(false, Ordering::Relaxed);
        Some(StoppedVring {
            base: vring.queue.rewind(),
            kick: vring.kick,
        })
    }

    /// Changes the state, and publishes it together with the size.
    fn set_state(&self, contents: &mut Contents<Q>, state: VringState) {
        contents.state = state;
        let size = contents
            .vring
            .as_ref()
            .map_or(0, |vring| vring.queue.virtqueue().size());
        self.size.store(size, Ordering::Relaxed);
        self.state.store(state.to_number(), Ordering::Relaxed);
    }

    /// Enables or disables the vring, beginning with the worker's next turn.
    pub fn set_enabled(&self, enabled: bool) {
        // The lock ensures that no turn that read the old value still runs when this returns.
        let _contents = self.contents.lock();
        self.enabled.store(enabled, Ordering::Relaxed);
    }

    /// Continues the vring in another snapshot of memory. A vring whose areas are not in it is
    /// stopped and returned together with the reason. One whose areas only have no translation yet
    /// stays started, and waits for it.
    pub fn rebind(&self, memory: &Arc<GuestMemory>) -> Option<(StoppedVring, VirtqueueError)> {
        let mut contents = self.contents.lock();
        let vring = contents.vring.as_mut()?;
        let is_known = memory.knows_areas(&vring.queue.virtqueue().areas());
        vring.untranslated = (!is_known).then(|| Arc::clone(memory));
        let error = vring.queue.rebind(memory).err().filter(|_| is_known)?;
        let stopped = self.release(&mut contents, VringEvent::Unmap)?;
        Some((stopped, error))
    }

    /// Drops the copies of translations, because those of `range` have ended. If its own areas are in
    /// the range, the vring waits for their translations, and continues in `memory`. Returns whether
    /// it waits.
    pub fn forget_translations(&self, range: IovaRange, memory: &Arc<GuestMemory>) -> bool {
        let mut contents = self.contents.lock();
        let Some(vring) = contents.vring.as_mut() else {
            return false;
        };
        vring.queue.forget_translations();
        if vring
            .queue
            .virtqueue()
            .areas()
            .iter()
            .any(|area| area.overlaps(range))
        {
            vring.untranslated = Some(Arc::clone(memory));
        }
        vring.untranslated.is_some()
    }

    /// Continues a vring whose areas had no translation, if they have one now.
    #[cold]
    fn translate_areas(&self, vring: &mut StartedVring<Q>) -> bool {
        let Some(memory) = &vring.untranslated else {
            return true;
        };
        let is_known = memory.knows_areas(&vring.queue.virtqueue().areas());
        let is_bound = is_known && vring.queue.rebind(memory).is_ok();
        if is_bound {
            vring.untranslated = None;
        } else {
            self.note_wait(true);
        }
        is_bound
    }

    /// Notes whether a turn ended at an address without a translation.
    fn note_wait(&self, waits: bool) {
        if waits {
            self.stats().iotlb_misses.add(1);
        }
        self.waits_for_translation.store(waits, Ordering::Relaxed);
    }

    /// Changes where writes to the virtqueue itself are logged.
    pub fn set_used_log(&self, used_log: Option<u64>) {
        if let Some(vring) = self.contents.lock().vring.as_mut() {
            vring.queue.set_used_log(used_log);
        }
    }

    /// Replaces the kick descriptor of a started vring. Returns the old one.
    pub fn replace_kick(&self, kick: Option<Arc<OwnedFd>>) -> Option<Arc<OwnedFd>> {
        let mut contents = self.contents.lock();
        let vring = contents.vring.as_mut()?;
        self.has_kick.store(kick.is_some(), Ordering::Relaxed);
        std::mem::replace(&mut vring.kick, kick)
    }

    /// Replaces the call descriptor of a started vring and signals the new one, because the last
    /// call may have gone to the old one.
    pub fn set_call(&self, call: Option<Arc<OwnedFd>>) {
        let call = self.notifier(call);
        match self.contents.lock().vring.as_mut() {
            Some(vring) => vring.call.clone_from(&call),
            None => return,
        }
        if let Some(call) = call {
            call.call();
        }
    }

    /// Replaces the err descriptor of a started vring.
    pub fn set_err(&self, err: Option<Arc<OwnedFd>>) {
        if let Some(vring) = self.contents.lock().vring.as_mut() {
            vring.err = self.notifier(err);
        }
    }

    /// Gives the worker its turn: calls `work` on the virtqueue if the vring runs. `work` returns,
    /// beside its result, whether the driver wants an interrupt. `None` when the vring does not
    /// run, or no longer: the cause is then in the log and in the counters.
    ///
    /// The driver is interrupted after the vring is unlocked, and so are those of other vrings to
    /// which `work` pushed frames.
    pub fn process<T>(
        &self,
        work: impl FnOnce(&mut Q, bool) -> Result<(T, bool), VirtqueueFault>,
    ) -> Option<T> {
        let (outcome, notification) = deferring(|| {
            let mut contents = self.contents.lock_for_turn();
            let turn = self.process_locked(&mut contents, work);
            contents.end_turn();
            turn
        });
        if let Some(notification) = notification {
            notification.deliver_after_turn();
        }
        outcome
    }

    /// Quarantines the vring, if it runs, because its worker panicked.
    pub fn quarantine_after_panic(&self) {
        let mut contents = self.contents.lock();
        if contents.state != VringState::Running {
            return;
        }
        let notification = self.quarantine(&mut contents, QuarantineCause::Panic(Panicked));
        drop(contents);
        notification.deliver_after_turn();
    }

    /// The outcome of `work` if the vring runs and continues to, and what is to be notified once it
    /// is unlocked.
    fn process_locked<T>(
        &self,
        contents: &mut Contents<Q>,
        work: impl FnOnce(&mut Q, bool) -> Result<(T, bool), VirtqueueFault>,
    ) -> (Option<T>, Option<Notification>) {
        if contents.state != VringState::Running {
            return (None, None);
        }
        let Some(vring) = contents.vring.as_mut() else {
            return (None, None);
        };
        if vring.untranslated.is_some() && !self.translate_areas(vring) {
            return (None, None);
        }
        let (queue, is_enabled) = (&mut vring.queue, self.is_enabled());
        // A panic in one vring's code must not end the thread, which serves others as well.
        let result = contain(|| work(queue, is_enabled));
        let loss = match vring.losses.has_changed() {
            true => QuarantineCause::of_lost(vring.queue.memory()),
            false => None,
        };
        let cause = match (result, loss) {
            (Ok(_), Some(loss)) => loss,
            (Ok(Ok((outcome, should_call))), None) => {
                self.note_wait(is_enabled && vring.queue.waits_for_translation());
                let call = vring.call.as_ref().filter(|_| should_call);
                return (Some(outcome), call.cloned().map(Notification::Call));
            }
            (Ok(Err(fault)), None) => fault.into(),
            (Err(panic), _) => panic.into(),
        };
        (None, Some(self.quarantine(contents, cause)))
    }

    /// Happens at most once a start.
    fn quarantine(&self, contents: &mut Contents<Q>, cause: QuarantineCause) -> Notification {
        if let Ok(state) = contents.state.after(VringEvent::Fault) {
            self.set_state(contents, state);
        }
        cause.count(self.stats());
        let vring = contents.vring.as_ref();
        Notification::Quarantine {
            log: Arc::clone(&self.log),
            cause,
            err: vring.and_then(|vring| vring.err.clone()),
        }
    }
}

/// Why a vring cannot start.
#[derive(Debug, thiserror::Error)]
pub enum VringStartError {
    /// The configuration is not that of a virtqueue.
    #[error(transparent)]
    Virtqueue(#[from] VirtqueueError),
    /// The vring is started already.
    #[error(transparent)]
    State(#[from] InvalidTransition),
}
