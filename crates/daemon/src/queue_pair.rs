//! A queue pair: two slots for rings, a queue of the uplink, and the thread that serves them.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use parking_lot::Mutex;
use std::os::fd::AsRawFd;
use virtionet_placement::{Decision, worker_name};
use virtionet_virtio_net::stats::WorkerStats;
use virtionet_virtio_net::uplink::{RxSink, TxFrame, Uplink, UplinkError, UplinkQueue};
use virtionet_virtio_net::{RxQueue, TxQueue};
use virtionet_virtqueue::memory::GuestMemory;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::busy_poll::BusyPoll;
use crate::placer::Placer;
use crate::sys::read_cycles;
use crate::vring_slot::{VringSlot, VringState};
use crate::worker::{Worker, WorkerEvent};

/// Stack of a worker: its deepest call keeps a few dozen KiB of frames and pieces.
const WORKER_STACK_SIZE: usize = 256 * 1024;

/// See the module.
#[derive(Debug)]
pub struct QueuePair {
    index: u16,
    /// The device's name, for the log.
    device: String,
    epoll: Arc<Epoll>,
    wake: EventFd,
    rx: VringSlot<RxQueue>,
    tx: VringSlot<TxQueue>,
    uplink: OnceLock<Arc<dyn UplinkQueue>>,
    worker_stats: WorkerStats,
    lifetime: WorkerLifetime,
    placer: Arc<Placer>,
    placement: Mutex<Option<WorkerPlacement>>,
    /// The placer's generation that `placed` is of.
    generation: AtomicU32,
    /// Whether the worker may poll where it stands.
    may_poll: AtomicBool,
    /// Where the receiveq's descriptors lie in the front-end's addresses, if it ever started.
    ring_address: AtomicU64,
    memory_node: Mutex<Option<u32>>,
    thread: Mutex<Option<WorkerThread>>,
}

/// Where a worker stands.
#[derive(Debug, Clone)]
pub struct WorkerPlacement {
    /// Its thread id.
    pub tid: i32,
    /// What was decided. `cpus` is what the kernel then said.
    pub decision: Decision,
    /// The NUMA node of those CPUs, if it is one.
    pub node: Option<u32>,
    /// The kernel refused what was decided.
    refused: bool,
}

/// How long workers of the pair have lived, in cycles of the time-stamp counter.
#[derive(Debug, Default)]
struct WorkerLifetime {
    /// Those that have ended.
    past: AtomicU64,
    /// When the present one began; 0 while there is none.
    began: AtomicU64,
}

#[derive(Debug)]
struct WorkerThread {
    stop: Arc<AtomicBool>,
    handle: JoinHandle<()>,
}

impl QueuePair {
    /// Pair number `index` of `device`, without a thread yet.
    ///
    /// # Errors
    /// When the kernel has no descriptors left.
    pub fn new(index: u16, device: &str, placer: Arc<Placer>) -> io::Result<Self> {
        let epoll = Arc::new(Epoll::new()?);
        let wake = EventFd::new(EFD_NONBLOCK)?;
        let event = EpollEvent::new(EventSet::IN, WorkerEvent::Wake.token());
        epoll.ctl(ControlOperation::Add, wake.as_raw_fd(), event)?;
        Ok(Self {
            index,
            device: device.to_owned(),
            rx: VringSlot::new(Arc::clone(&epoll), WorkerEvent::RxKick),
            tx: VringSlot::new(Arc::clone(&epoll), WorkerEvent::TxKick),
            epoll,
            wake,
            uplink: OnceLock::new(),
            worker_stats: WorkerStats::default(),
            lifetime: WorkerLifetime::default(),
            placer,
            placement: Mutex::new(None),
            generation: AtomicU32::new(0),
            may_poll: AtomicBool::new(true),
            ring_address: AtomicU64::new(0),
            memory_node: Mutex::new(None),
            thread: Mutex::new(None),
        })
    }

    /// The receiveq's slot.
    #[must_use]
    pub fn rx(&self) -> &VringSlot<RxQueue> {
        &self.rx
    }

    /// The transmitq's slot.
    #[must_use]
    pub fn tx(&self) -> &VringSlot<TxQueue> {
        &self.tx
    }

    /// Its number, from 0.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.index
    }

    /// What its worker waits on.
    #[must_use]
    pub fn epoll(&self) -> &Arc<Epoll> {
        &self.epoll
    }

    /// The name of its worker's thread.
    #[must_use]
    pub fn worker_name(&self) -> String {
        worker_name(&self.device, u32::from(self.index))
    }

    /// Its queue of the uplink, once opened.
    #[must_use]
    pub fn uplink(&self) -> Option<&Arc<dyn UplinkQueue>> {
        self.uplink.get()
    }

    /// What its worker did.
    #[must_use]
    pub fn worker_stats(&self) -> &WorkerStats {
        &self.worker_stats
    }

    /// Cycles of the time-stamp counter that its worker has lived.
    #[must_use]
    pub fn worker_cycles(&self) -> u64 {
        let past = self.lifetime.past.load(Ordering::Relaxed);
        match self.lifetime.began.load(Ordering::Relaxed) {
            0 => past,
            began => past + read_cycles().saturating_sub(began),
        }
    }

    /// Where its worker stands, while it runs.
    #[must_use]
    pub fn placement(&self) -> Option<WorkerPlacement> {
        self.placement.lock().clone()
    }

    /// Opens the pair's queue of `uplink`, unless it is open.
    ///
    /// # Errors
    /// One sentence for a person.
    pub fn open_uplink(self: &Arc<Self>, uplink: &dyn Uplink) -> Result<(), UplinkError> {
        if self.uplink.get().is_some() {
            return Ok(());
        }
        let rx = Arc::downgrade(self);
        let queue = uplink.open_queue(self.index, rx)?;
        if let Some(fd) = queue.poll_fd() {
            let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
            self.epoll
                .ctl(
                    ControlOperation::Add,
                    fd.as_raw_fd(),
                    EpollEvent::new(events, WorkerEvent::Uplink.token()),
                )
                .map_err(|e| UplinkError(format!("cannot wait for frames of the uplink: {e}")))?;
        }
        // Only the session thread opens queues, so none was put there meanwhile.
        let _ = self.uplink.set(queue);
        Ok(())
    }

    /// The RX ring was started, stopped, enabled or disabled.
    pub fn apply_rx_state(&self) {
        self.reconcile_uplink();
        self.wake();
    }

    /// Frames come to this pair exactly while its RX ring is sound and enabled.
    pub(crate) fn reconcile_uplink(&self) {
        let live = self.rx.is_enabled() && self.rx.state() == VringState::Running;
        if let Some(uplink) = self.uplink()
            && let Err(error) = uplink.set_attached(live)
        {
            let verb = if live { "attach" } else { "detach" };
            tracing::error!("{self}: cannot {verb} the uplink's queue: {error}");
        }
    }

    /// Makes the worker look at everything once.
    pub fn wake(&self) {
        // Fails only when 2^64 wake-ups are pending.
        let _ = self.wake.write(1);
    }

    /// The worker's side of [`QueuePair::wake`]: heeds a change of state or placement. It steers again
    /// because its own word from just before the change may have come after the session's.
    pub(crate) fn handle_wake(&self) {
        let _ = self.wake.read();
        self.reconcile_uplink();
        if self.generation.load(Ordering::Relaxed) != self.placer.generation() {
            self.place_worker();
        }
    }

    /// Moves the calling thread, the pair's worker, to where it belongs.
    pub(crate) fn place_worker(&self) {
        let mut placement = self.apply_placement();
        if placement.refused {
            // The cpuset or the online CPUs may have changed just now.
            self.placer.invalidate();
            placement = self.apply_placement();
        }
        self.may_poll
            .store(placement.decision.may_poll, Ordering::Relaxed);
        if self.placer.has_several_nodes() {
            // What the worker touches first from here on, its stack for one.
            virtionet_placement::prefer_node(placement.node);
        }
        *self.placement.lock() = Some(placement);
    }

    /// Carries the placer's decision out, and tells the log of it when it is another than before.
    fn apply_placement(&self) -> WorkerPlacement {
        self.generation
            .store(self.placer.generation(), Ordering::Relaxed);
        let mut decision = self.placer.decide(self.index);
        let refusal = match virtionet_placement::set_thread_affinity(None, &decision.cpus) {
            Ok(cpus) => {
                decision.cpus = cpus;
                None
            }
            Err(error) => {
                // What is told is where it stands, not where it should; that may be a vCPU's place.
                decision.may_poll = false;
                if let Ok(cpus) = virtionet_placement::allowed_cpus() {
                    decision.cpus = cpus;
                }
                Some(error)
            }
        };
        let before = self.placement();
        let changed = before.is_none_or(|placement| placement.decision != decision);
        match &refusal {
            None if changed => tracing::info!("{}: {decision}", self.device),
            Some(error) if changed => tracing::warn!("{}: {decision}, but {error}", self.device),
            _ => {}
        }
        WorkerPlacement {
            tid: rustix::thread::gettid().as_raw_nonzero().get(),
            node: self.placer.node_of(&decision),
            decision,
            refused: refusal.is_some(),
        }
    }

    /// Whether a worker that is told to poll may do so where it stands.
    pub(crate) fn may_poll(&self) -> bool {
        self.may_poll.load(Ordering::Relaxed)
    }

    /// Wakes the worker to be placed anew where the kernel has moved it, as it does when a CPU goes
    /// offline or a cpuset changes.
    pub(crate) fn check_affinity(&self) {
        let has_moved = self.placement.lock().as_ref().is_some_and(|placement| {
            let now = virtionet_placement::thread_cpus(placement.tid);
            placement.refused || now.is_ok_and(|cpus| cpus != placement.decision.cpus)
        });
        if has_moved {
            let other = self.placer.generation().wrapping_sub(1);
            self.generation.store(other, Ordering::Relaxed);
            self.wake();
        }
    }

    /// The NUMA node of its receiveq, while there is a front-end and as far as the kernel tells.
    #[must_use]
    pub fn memory_node(&self) -> Option<u32> {
        *self.memory_node.lock()
    }

    /// Its receiveq lies here, in the front-end's addresses.
    pub(crate) fn set_rx_ring_address(&self, address: u64) {
        self.ring_address.store(address, Ordering::Relaxed);
    }

    /// The front-end and its memory are gone.
    pub(crate) fn clear_memory_location(&self) {
        self.ring_address.store(0, Ordering::Relaxed);
        *self.memory_node.lock() = None;
        self.placer.set_memory_node(self.index, None);
    }

    /// Asks the kernel on which node its receiveq lies; true when that may change where the worker
    /// belongs.
    pub(crate) fn update_memory_node(&self, memory: &GuestMemory) -> bool {
        let address = self.ring_address.load(Ordering::Relaxed);
        let address = (address != 0).then(|| memory.host_address(address));
        let node = address
            .flatten()
            .and_then(virtionet_placement::node_of_address);
        *self.memory_node.lock() = node;
        self.placer.set_memory_node(self.index, node)
    }

    /// Starts the worker, unless it runs.
    ///
    /// # Errors
    /// When the kernel refuses a thread.
    pub fn start_worker(self: &Arc<Self>, poll: BusyPoll) -> io::Result<()> {
        let mut thread = self.thread.lock();
        if thread.is_some() {
            return Ok(());
        }
        let stop = Arc::new(AtomicBool::new(false));
        let worker = Worker::new(Arc::clone(self), Arc::clone(&stop), poll);
        let handle = std::thread::Builder::new()
            .name(self.worker_name())
            .stack_size(WORKER_STACK_SIZE)
            .spawn(move || worker.run())?;
        self.lifetime.began.store(read_cycles(), Ordering::Relaxed);
        *thread = Some(WorkerThread { stop, handle });
        Ok(())
    }

    /// Tells the worker to end, without waiting for it.
    pub fn stop_worker(&self) {
        if let Some(thread) = &*self.thread.lock() {
            thread.stop.store(true, Ordering::Release);
            self.wake();
        }
    }

    /// Waits until the worker has ended; to be called after [`QueuePair::stop_worker`].
    pub fn join_worker(&self) {
        let thread = self.thread.lock().take();
        if let Some(thread) = thread
            && thread.handle.join().is_err()
        {
            tracing::error!("{self}: the worker ended by a panic, which is a bug");
        }
        let lifetime_cycles = self.worker_cycles();
        self.lifetime.began.store(0, Ordering::Relaxed);
        self.lifetime.past.store(lifetime_cycles, Ordering::Relaxed);
        *self.placement.lock() = None;
    }
}

/// For uplinks that push: called by other threads than the worker.
impl RxSink for QueuePair {
    fn push(&self, frames: &[TxFrame<'_>]) {
        if !self.rx.push(&format_args!("{self} rx"), frames) {
            // No ring, or one that just was quarantined: the worker has the uplink told.
            self.wake();
        }
    }
}

impl fmt::Display for QueuePair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} pair {}", self.device, self.index)
    }
}
