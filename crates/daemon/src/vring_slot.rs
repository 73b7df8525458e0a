//! The slot of one vring of a queue pair.
//!
//! A vring's state changes by the table in [`virtionet_vhost_user::vring_state`], in one function
//! of this module (`VringSlot::set_state`), under the slot's lock. The lock also protects the
//! virtqueue, so the state and the virtqueue cannot contradict each other. The worker takes the
//! lock for a turn, and the session's thread takes it to start, stop or change the vring. The lock
//! is handed over fairly, so that neither waits for longer than one turn of the other. The values
//! that other threads read without waiting (state, size) are published in atomics at each change.

use std::fmt::Display;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};

use parking_lot::{Mutex, MutexGuard};
use virtionet_vhost_user::{InvalidTransition, VringEvent, VringState};
use virtionet_virtio_net::stats::VringStats;
use virtionet_virtio_net::uplink::TxFrame;
use virtionet_virtio_net::{DeviceQueue, QueueConfig, RxQueue};
use virtionet_virtqueue::memory::GuestMemory;
use virtionet_virtqueue::{VirtqueueError, VirtqueueFault};

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
    fds: VringFds,
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
    /// [`VringState::to_number`] of the state.
    state: AtomicU8,
    size: AtomicU16,
    stats: Arc<VringStats>,
}

impl<Q: DeviceQueue> Default for VringSlot<Q> {
    fn default() -> Self {
        Self {
            contents: Mutex::new(Contents {
                state: VringState::Stopped,
                vring: None,
            }),
            enabled: AtomicBool::new(false),
            state: AtomicU8::new(VringState::Stopped.to_number()),
            size: AtomicU16::new(0),
            stats: Arc::default(),
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
    pub fn start(&self, config: QueueConfig, fds: VringFds) -> Result<(), VringStartError> {
        let mut contents = self.contents.lock();
        let state = contents.state.after(VringEvent::Start)?;
        let mut queue = Q::new(config)?;
        queue.disable_kicks();
        let vring = StartedVring { queue, fds };
        vring.call(&self.stats);
        contents.vring = Some(vring);
        self.set_state(&mut contents, state);
        Ok(())
    }

    /// Stops the vring. The device writes nothing to guest memory after this returns. Returns
    /// `None` when the vring was stopped already.
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
            kick: vring.fds.kick,
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
        std::mem::replace(&mut vring.fds.kick, kick)
    }

    /// Replaces the call descriptor of a started vring and signals the new one, because the last
    /// call may have gone to the old one.
    pub fn set_call(&self, call: Option<Arc<OwnedFd>>) {
        if let Some(vring) = self.contents.lock().vring.as_mut() {
            vring.fds.call = call;
            vring.call(&self.stats);
        }
    }

    /// Replaces the err descriptor of a started vring.
    pub fn set_err(&self, err: Option<Arc<OwnedFd>>) {
        if let Some(vring) = self.contents.lock().vring.as_mut() {
            vring.fds.err = err;
        }
    }

    /// Runs a turn of the worker: calls `work` on the virtqueue if the vring runs. `work` returns,
    /// beside its result, whether the driver wants an interrupt. Returns `None` when the vring does
    /// not run, or was quarantined during the turn; the fault is then in the log and in the
    /// counters.
    pub fn process<T>(
        &self,
        name: &dyn Display,
        work: impl FnOnce(&mut Q, bool) -> Result<(T, bool), VirtqueueFault>,
    ) -> Option<T> {
        let mut contents = self.contents.lock();
        let done = self.process_locked(&mut contents, name, work);
        MutexGuard::unlock_fair(contents);
        done
    }

    fn process_locked<T>(
        &self,
        contents: &mut Contents<Q>,
        name: &dyn Display,
        work: impl FnOnce(&mut Q, bool) -> Result<(T, bool), VirtqueueFault>,
    ) -> Option<T> {
        if contents.state != VringState::Running {
            return None;
        }
        let vring = contents.vring.as_mut()?;
        match work(&mut vring.queue, self.is_enabled()) {
            Ok((done, call)) => {
                if call {
                    vring.call(&self.stats);
                }
                Some(done)
            }
            Err(fault) => {
                self.quarantine(contents, fault, name);
                None
            }
        }
    }

    /// Quarantines the vring. This happens at most once after each start, so its line cannot flood
    /// the log.
    fn quarantine(&self, contents: &mut Contents<Q>, fault: VirtqueueFault, name: &dyn Display) {
        match contents.state.after(VringEvent::Fault) {
            Ok(state) => self.set_state(contents, state),
            Err(error) => tracing::error!("{name}: {error}"),
        }
        self.stats.quarantines.add(1);
        match fault {
            VirtqueueFault::AvailIndexJump { .. } => self.stats.avail_index_jump.add(1),
            VirtqueueFault::HeadOutOfRange { .. } => self.stats.head_out_of_range.add(1),
            VirtqueueFault::ChainWithoutEnd { .. } => self.stats.chain_without_end.add(1),
        }
        if let Some(err) = contents
            .vring
            .as_ref()
            .and_then(|vring| vring.fds.err.as_ref())
        {
            // If the front-end does not read the err descriptor, the counters and the log still
            // report the fault.
            let _ = signal(err);
        }
        tracing::warn!(
            "{name}: the guest broke the ring ({fault}); it is stopped until the guest's driver starts it again"
        );
    }
}

impl VringSlot<RxQueue> {
    /// Pushes `frames` to the guest, or drops and counts them. Returns false when the vring does
    /// not run.
    pub fn push(&self, name: &dyn Display, frames: &[TxFrame<'_>]) -> bool {
        let mut contents = self.contents.lock();
        let mut was_tried = false;
        let pushed = self.process_locked(&mut contents, name, |queue, enabled| {
            was_tried = enabled;
            match enabled {
                true => queue.push(frames).map(|pushed| ((), pushed.should_call)),
                false => Ok(((), false)),
            }
        });
        // The queue counts the frames that it drops.
        if !was_tried {
            let count = u64::try_from(frames.len()).unwrap_or(u64::MAX);
            self.stats.dropped_disabled.add(count);
        }
        MutexGuard::unlock_fair(contents);
        pushed.is_some()
    }
}

impl<Q> StartedVring<Q> {
    /// Interrupts the driver, if the front-end sent a call descriptor.
    fn call(&self, stats: &VringStats) {
        let Some(call) = &self.fds.call else { return };
        match signal(call) {
            Ok(()) => stats.calls.add(1),
            Err(_) => stats.calls_failed.add(1),
        }
    }
}

/// Adds 1 to an eventfd. It does not block: the session made the descriptor non-blocking.
fn signal(fd: &OwnedFd) -> io::Result<()> {
    rustix::io::write(fd, &1u64.to_ne_bytes())?;
    Ok(())
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
