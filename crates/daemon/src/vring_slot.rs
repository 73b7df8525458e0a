//! The slot of one vring of a queue pair.
//!
//! A vring's state changes by the table in [`virtionet_vhost_user::vring_state`], in one function
//! of this module (`VringSlot::set_state`), under the slot's lock. The lock also protects the
//! virtqueue, so the state and the virtqueue cannot contradict each other. The worker takes the
//! lock for a turn, and the session's thread takes it to start, stop or change the vring. The lock
//! is handed over fairly, so that neither waits for longer than one turn of the other. The values
//! that other threads read without waiting (state, size) are published in atomics at each change.

use std::fmt::Display;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};

use parking_lot::{Mutex, MutexGuard};
use virtionet_base::RateLimiter;
use virtionet_vhost_user::{InvalidTransition, VringEvent, VringState};
use virtionet_virtio_net::stats::VringStats;
use virtionet_virtio_net::uplink::TxFrame;
use virtionet_virtio_net::{DeviceQueue, QueueConfig, RxQueue};
use virtionet_virtqueue::memory::{GuestMemory, LossWatch};
use virtionet_virtqueue::{VirtqueueError, VirtqueueFault};

use crate::notifier::{Notifier, deferring};
use crate::panic_policy::{Panicked, contain};

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
}

/// Why a vring is quarantined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum QuarantineCause {
    /// The guest's fault.
    #[error("the guest broke the ring: {0}")]
    Guest(#[from] VirtqueueFault),
    /// The front-end's fault, or its host's.
    #[error(
        "pages of the guest's memory have vanished, because its file shrank or its file system is full"
    )]
    MemoryLost,
    /// A bug of this program.
    #[error("{0}")]
    Panic(#[from] Panicked),
}

/// What a turn did, and whom to notify of it once the vring is unlocked.
#[derive(Debug)]
enum Turn<T> {
    /// The vring does not run.
    Skipped,
    Done {
        outcome: T,
        call: Option<Arc<Notifier>>,
    },
    Quarantined {
        cause: QuarantineCause,
        err: Option<Arc<Notifier>>,
    },
}

/// The state that the lock protects.
#[derive(Debug)]
struct Contents<Q> {
    state: VringState,
    /// `Some` in exactly those states that are started.
    vring: Option<StartedVring<Q>>,
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
    contents: Mutex<Contents<Q>>,
    enabled: AtomicBool,
    /// The started vring has a kick descriptor.
    has_kick: AtomicBool,
    /// [`VringState::to_number`] of the state.
    state: AtomicU8,
    size: AtomicU16,
    stats: Arc<VringStats>,
    /// A guest can start the vring and break it again without end.
    quarantine_lines: RateLimiter,
}

impl<Q: DeviceQueue> Default for VringSlot<Q> {
    fn default() -> Self {
        Self {
            contents: Mutex::new(Contents {
                state: VringState::Stopped,
                vring: None,
            }),
            enabled: AtomicBool::new(false),
            has_kick: AtomicBool::new(true),
            state: AtomicU8::new(VringState::Stopped.to_number()),
            size: AtomicU16::new(0),
            stats: Arc::default(),
            quarantine_lines: RateLimiter::new(),
        }
    }
}

impl<Q: DeviceQueue> VringSlot<Q> {
    /// The vring's counters, which outlive it.
    #[must_use]
    pub fn stats(&self) -> &Arc<VringStats> {
        &self.stats
    }

    /// The vring's state.
    #[must_use]
    pub fn state(&self) -> VringState {
        VringState::from_number(self.state.load(Ordering::Relaxed))
    }

    /// Whether the vring runs and the front-end gave no kick descriptor, so that it must be polled.
    #[must_use]
    pub fn must_be_polled(&self) -> bool {
        !self.has_kick.load(Ordering::Relaxed) && self.state() == VringState::Running
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

    /// Starts the vring. It signals a call once, because a back-end that served this vring before
    /// may have ended before it sent one.
    ///
    /// # Errors
    /// When the configuration is not that of a virtqueue, or the vring is started already.
    pub fn start(
        &self,
        name: &dyn Display,
        config: QueueConfig,
        fds: VringFds,
    ) -> Result<(), VringStartError> {
        let mut contents = self.contents.lock();
        let state = contents.state.after(VringEvent::Start)?;
        let base = config.base;
        let mut queue = Q::new(config)?;
        queue.disable_kicks();
        let corrected = queue.corrected_base();
        let has_kick = fds.kick.is_some();
        let call = self.notifier(fds.call);
        contents.vring = Some(StartedVring {
            queue,
            kick: fds.kick,
            call: call.clone(),
            err: self.notifier(fds.err),
            losses: LossWatch::default(),
        });
        self.set_state(&mut contents, state);
        self.has_kick.store(has_kick, Ordering::Relaxed);
        drop(contents);
        if let Some(corrected) = corrected {
            self.stats.base_corrected.add(1);
            tracing::warn!(
                "{name}: the front-end starts the ring at {base}, but its used index shows that it has moved on to {corrected}, where it continues"
            );
        }
        if let Some(call) = call {
            call.call();
        }
        Ok(())
    }

    fn notifier(&self, fd: Option<Arc<OwnedFd>>) -> Option<Arc<Notifier>> {
        let stats = Arc::clone(&self.stats);
        fd.map(|fd| Arc::new(Notifier::new(fd, stats)))
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
            .map_or(0, |vring| vring.queue.size());
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
    /// stopped and returned together with the reason.
    pub fn rebind(&self, memory: &Arc<GuestMemory>) -> Option<(StoppedVring, VirtqueueError)> {
        let mut contents = self.contents.lock();
        let error = contents.vring.as_mut()?.queue.rebind(memory).err()?;
        let stopped = self.release(&mut contents, VringEvent::Unmap)?;
        Some((stopped, error))
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
        name: &dyn Display,
        work: impl FnOnce(&mut Q, bool) -> Result<(T, bool), VirtqueueFault>,
    ) -> Option<T> {
        let turn = deferring(|| {
            let mut contents = self.contents.lock();
            let turn = self.process_locked(&mut contents, work);
            MutexGuard::unlock_fair(contents);
            turn
        });
        self.notify(name, turn)
    }

    /// Quarantines the vring, if it runs, because its worker panicked.
    pub fn quarantine_after_panic(&self, name: &dyn Display) {
        let mut contents = self.contents.lock();
        if contents.state != VringState::Running {
            return;
        }
        let turn: Turn<()> = self.quarantine(&mut contents, QuarantineCause::Panic(Panicked));
        drop(contents);
        self.notify(name, turn);
    }

    fn process_locked<T>(
        &self,
        contents: &mut Contents<Q>,
        work: impl FnOnce(&mut Q, bool) -> Result<(T, bool), VirtqueueFault>,
    ) -> Turn<T> {
        if contents.state != VringState::Running {
            return Turn::Skipped;
        }
        let Some(vring) = contents.vring.as_mut() else {
            return Turn::Skipped;
        };
        let (queue, is_enabled) = (&mut vring.queue, self.is_enabled());
        // A panic in one vring's code must not end the thread, which serves others as well.
        let cause = match contain(|| work(queue, is_enabled)) {
            Ok(_) if vring.losses.has_changed() && vring.queue.memory().is_lost() => {
                QuarantineCause::MemoryLost
            }
            Ok(Ok((outcome, should_call))) => {
                let call = vring.call.as_ref().filter(|_| should_call);
                return Turn::Done {
                    outcome,
                    call: call.cloned(),
                };
            }
            Ok(Err(fault)) => fault.into(),
            Err(panic) => panic.into(),
        };
        self.quarantine(contents, cause)
    }

    /// Happens at most once a start.
    fn quarantine<T>(&self, contents: &mut Contents<Q>, cause: QuarantineCause) -> Turn<T> {
        if let Ok(state) = contents.state.after(VringEvent::Fault) {
            self.set_state(contents, state);
        }
        self.stats.quarantines.add(1);
        match cause {
            QuarantineCause::Guest(VirtqueueFault::AvailIndexJump { .. }) => {
                self.stats.avail_index_jump.add(1);
            }
            QuarantineCause::Guest(VirtqueueFault::HeadOutOfRange { .. }) => {
                self.stats.head_out_of_range.add(1);
            }
            QuarantineCause::Guest(VirtqueueFault::ChainWithoutEnd { .. }) => {
                self.stats.chain_without_end.add(1);
            }
            QuarantineCause::MemoryLost => self.stats.memory_lost.add(1),
            QuarantineCause::Panic(Panicked) => self.stats.panics.add(1),
        }
        let vring = contents.vring.as_ref();
        let err = vring.and_then(|vring| vring.err.clone());
        Turn::Quarantined { cause, err }
    }

    /// Notifies whom a turn concerns. The vring is unlocked.
    #[inline]
    fn notify<T>(&self, name: &dyn Display, turn: Turn<T>) -> Option<T> {
        match turn {
            Turn::Skipped => None,
            Turn::Done { outcome, call } => {
                if let Some(call) = call {
                    call.call_after_turn();
                }
                Some(outcome)
            }
            Turn::Quarantined { cause, err } => {
                if let Some(suppressed) = self.quarantine_lines.allow() {
                    tracing::warn!(
                        suppressed,
                        "{name}: {cause}; it is stopped until the guest's driver starts it again"
                    );
                }
                if let Some(err) = err {
                    err.signal_error();
                }
                None
            }
        }
    }
}

impl VringSlot<RxQueue> {
    /// Gives `frames` to the guest, or drops and counts them; false when the vring does not run.
    /// The driver is interrupted at the end of the calling thread's turn.
    pub fn push(&self, name: &dyn Display, frames: &[TxFrame<'_>]) -> bool {
        let mut contents = self.contents.lock();
        let mut was_tried = false;
        let turn = self.process_locked(&mut contents, |queue, enabled| {
            was_tried = enabled;
            match enabled {
                true => queue.push(frames).map(|pushed| ((), pushed.should_call)),
                false => Ok(((), false)),
            }
        });
        MutexGuard::unlock_fair(contents);
        // The queue itself counts what it drops.
        if !was_tried {
            let count = u64::try_from(frames.len()).unwrap_or(u64::MAX);
            self.stats.dropped_disabled.add(count);
        }
        self.notify(name, turn).is_some()
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
