//! Where a running ring lives: start puts it in, stop takes it out.
//!
//! Ownership is the synchronisation. The worker locks the slot for a turn, the session thread to
//! start, stop or change the ring; locks are handed over fairly, so that neither waits for longer
//! than one turn of the other. What others want to know without waiting (is it running, is it
//! enabled, how large) stands beside the lock in atomics.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};

use parking_lot::{Mutex, MutexGuard};
use virtionet_virtio_net::stats::VringStats;
use virtionet_virtio_net::uplink::TxFrame;
use virtionet_virtio_net::{DeviceQueue, QueueConfig, RxQueue};
use virtionet_virtqueue::memory::GuestMemory;
use virtionet_virtqueue::{VirtqueueError, VirtqueueFault};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::worker::WorkerEvent;

/// What a ring is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VringState {
    /// Not started, or stopped.
    Stopped,
    /// Started.
    Running,
    /// Stopped for a fault of the guest's, until configured anew.
    Quarantined,
}

/// The file descriptors of a ring.
#[derive(Debug, Clone, Default)]
pub struct VringFds {
    /// Written by the driver's side when chains are available.
    pub kick: Option<Arc<OwnedFd>>,
    /// Written by us when chains are used: the interrupt.
    pub call: Option<Arc<OwnedFd>>,
    /// Written by us when the ring is quarantined.
    pub err: Option<Arc<OwnedFd>>,
}

/// A ring in its slot.
#[derive(Debug)]
pub struct RunningVring<Q> {
    /// The queue on it.
    pub queue: Q,
    fds: VringFds,
    quarantined: bool,
}

/// The place of one ring of a queue pair.
#[derive(Debug)]
pub struct VringSlot<Q> {
    vring: Mutex<Option<RunningVring<Q>>>,
    enabled: AtomicBool,
    state: AtomicU8,
    size: AtomicU16,
    stats: Arc<VringStats>,
    /// Where the worker waits for kicks.
    epoll: Arc<Epoll>,
    kick_event: WorkerEvent,
}

impl<Q: DeviceQueue> VringSlot<Q> {
    /// An empty slot, whose kicks will come to `epoll` as `kick_event`.
    #[must_use]
    pub fn new(epoll: Arc<Epoll>, kick_event: WorkerEvent) -> Self {
        Self {
            vring: Mutex::new(None),
            enabled: AtomicBool::new(false),
            state: AtomicU8::new(0),
            size: AtomicU16::new(0),
            stats: Arc::default(),
            epoll,
            kick_event,
        }
    }

    /// The ring's counters; they outlive it.
    #[must_use]
    pub fn stats(&self) -> &Arc<VringStats> {
        &self.stats
    }

    /// What the ring is doing.
    #[must_use]
    pub fn state(&self) -> VringState {
        match self.state.load(Ordering::Relaxed) {
            0 => VringState::Stopped,
            1 => VringState::Running,
            _ => VringState::Quarantined,
        }
    }

    /// Whether the front-end has enabled the ring.
    #[must_use]
    pub fn is_enabled(&self) -> bool {
        self.enabled.load(Ordering::Relaxed)
    }

    /// Number of descriptors of the running ring; 0 when there is none.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size.load(Ordering::Relaxed)
    }

    /// Puts a ring in, replacing one that is there. A call is signalled once: the driver may have
    /// missed one of a back-end that was here before.
    ///
    /// # Errors
    /// When the configuration cannot be a ring, or the kick descriptor cannot be waited for.
    pub fn start(&self, config: QueueConfig, fds: VringFds) -> Result<(), VringStartError> {
        let mut slot = self.vring.lock();
        self.remove_vring(&mut slot);
        let mut queue = Q::new(config)?;
        self.watch_kick(fds.kick.as_deref())?;
        queue.disable_kicks();
        self.size.store(queue.size(), Ordering::Relaxed);
        let running = RunningVring {
            queue,
            fds,
            quarantined: false,
        };
        running.call(&self.stats);
        *slot = Some(running);
        self.state.store(1, Ordering::Relaxed);
        Ok(())
    }

    /// Takes the ring out; says where it would go on. After this nothing is written to guest
    /// memory. `None` when there was none.
    pub fn stop(&self) -> Option<u32> {
        self.remove_vring(&mut self.vring.lock())
    }

    fn remove_vring(&self, slot: &mut Option<RunningVring<Q>>) -> Option<u32> {
        let mut running = slot.take()?;
        self.unwatch_kick(running.fds.kick.as_deref());
        self.state.store(0, Ordering::Relaxed);
        self.size.store(0, Ordering::Relaxed);
        Some(running.queue.rewind())
    }

    /// Enables or disables the ring; after this the worker's next turn heeds it.
    pub fn set_enabled(&self, enabled: bool) {
        // Under the lock: no turn that saw the old value is still going on when this returns.
        let _turn = self.vring.lock();
        self.enabled.store(enabled, Ordering::Relaxed);
    }

    /// Lets the ring go on in another snapshot of memory; a ring that is not in it is stopped.
    ///
    /// # Errors
    /// When the ring had to be stopped.
    pub fn rebind(&self, memory: &Arc<GuestMemory>) -> Result<(), VirtqueueError> {
        let mut slot = self.vring.lock();
        let Some(running) = slot.as_mut() else {
            return Ok(());
        };
        running.queue.rebind(memory).inspect_err(|_| {
            self.remove_vring(&mut slot);
        })
    }

    /// Replaces the kick descriptor of a running ring.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn set_kick(&self, kick: Option<Arc<OwnedFd>>) -> io::Result<()> {
        if let Some(running) = self.vring.lock().as_mut() {
            self.watch_kick(kick.as_deref())?;
            self.unwatch_kick(running.fds.kick.as_deref());
            running.fds.kick = kick;
        }
        Ok(())
    }

    /// Replaces the call descriptor of a running ring, and signals the new one: what was used
    /// meanwhile may have been told to the old one.
    pub fn set_call(&self, call: Option<Arc<OwnedFd>>) {
        if let Some(running) = self.vring.lock().as_mut() {
            running.fds.call = call;
            running.call(&self.stats);
        }
    }

    /// Replaces the err descriptor of a running ring.
    pub fn set_err(&self, err: Option<Arc<OwnedFd>>) {
        if let Some(running) = self.vring.lock().as_mut() {
            running.fds.err = err;
        }
    }

    /// Gives the worker its turn: calls `work` on the ring if there is a sound one. Whether `work`
    /// said that the driver wants an interrupt decides if it gets one. `None` when there is no
    /// sound ring, or no longer: the fault is then in the log and in the counters.
    pub fn process<T>(
        &self,
        who: &dyn std::fmt::Display,
        work: impl FnOnce(&mut Q, bool) -> Result<(T, bool), VirtqueueFault>,
    ) -> Option<T> {
        let mut slot = self.vring.lock();
        let done = self.process_locked(&mut slot, who, work);
        MutexGuard::unlock_fair(slot);
        done
    }

    fn process_locked<T>(
        &self,
        slot: &mut Option<RunningVring<Q>>,
        who: &dyn std::fmt::Display,
        work: impl FnOnce(&mut Q, bool) -> Result<(T, bool), VirtqueueFault>,
    ) -> Option<T> {
        let running = slot.as_mut().filter(|ring| !ring.quarantined)?;
        match work(&mut running.queue, self.is_enabled()) {
            Ok((done, call)) => {
                if call {
                    running.call(&self.stats);
                }
                Some(done)
            }
            Err(fault) => {
                self.quarantine(running, fault, who);
                None
            }
        }
    }

    /// Once a start at most, so the log cannot be flooded by it.
    fn quarantine(
        &self,
        ring: &mut RunningVring<Q>,
        fault: VirtqueueFault,
        who: &dyn std::fmt::Display,
    ) {
        ring.quarantined = true;
        self.state.store(2, Ordering::Relaxed);
        self.stats.quarantines.add(1);
        match fault {
            VirtqueueFault::AvailIndexJump { .. } => self.stats.avail_index_jump.add(1),
            VirtqueueFault::HeadOutOfRange { .. } => self.stats.head_out_of_range.add(1),
            VirtqueueFault::ChainWithoutEnd { .. } => self.stats.chain_without_end.add(1),
        }
        if let Some(err) = &ring.fds.err {
            // Nobody may be listening; the counters and the log say it too.
            let _ = signal(err);
        }
        tracing::warn!(
            "{who}: the guest broke the ring ({fault}); it is stopped until the guest's driver starts it again"
        );
    }

    fn watch_kick(&self, kick: Option<&OwnedFd>) -> io::Result<()> {
        let Some(kick) = kick else { return Ok(()) };
        // Edge-triggered: the descriptor is never read, so one that blocks, or that its other side
        // drains, cannot hold the worker.
        let event = EpollEvent::new(
            EventSet::IN | EventSet::EDGE_TRIGGERED,
            self.kick_event.token(),
        );
        self.epoll
            .ctl(ControlOperation::Add, kick.as_raw_fd(), event)
    }

    fn unwatch_kick(&self, kick: Option<&OwnedFd>) {
        if let Some(kick) = kick {
            // Fails only when it was not watched.
            let _ = self.epoll.ctl(
                ControlOperation::Delete,
                kick.as_raw_fd(),
                EpollEvent::default(),
            );
        }
    }
}

impl VringSlot<RxQueue> {
    /// Gives `frames` to the guest, or drops and counts them; false when there is no sound ring.
    pub fn push(&self, who: &dyn std::fmt::Display, frames: &[TxFrame<'_>]) -> bool {
        let mut slot = self.vring.lock();
        let mut tried = false;
        let pushed = self.process_locked(&mut slot, who, |queue, enabled| {
            tried = enabled;
            match enabled {
                true => queue.push(frames).map(|pushed| ((), pushed.should_call)),
                false => Ok(((), false)),
            }
        });
        // What a ring refuses it counts itself.
        if !tried {
            let count = u64::try_from(frames.len()).unwrap_or(u64::MAX);
            self.stats.dropped_disabled.add(count);
        }
        MutexGuard::unlock_fair(slot);
        pushed.is_some()
    }
}

impl<Q> RunningVring<Q> {
    /// Interrupts the driver, where it gave a descriptor for that.
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

/// Why a ring could not start.
#[derive(Debug, thiserror::Error)]
pub enum VringStartError {
    /// It is no ring.
    #[error(transparent)]
    Virtqueue(#[from] VirtqueueError),
    /// Its kick descriptor cannot be waited for.
    #[error("the kick descriptor cannot be polled: {0}")]
    Kick(#[from] io::Error),
}
