//! A queue pair: two slots for rings, a queue of the uplink, and the thread that serves them.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use parking_lot::Mutex;
use std::os::fd::AsRawFd;
use virtionet_virtio_net::port::{RxPort, TxFrame, Uplink, UplinkError, UplinkQueue};
use virtionet_virtio_net::stats::WorkerStats;
use virtionet_virtio_net::{RxQueue, TxQueue};
use virtionet_placement::{Decision, worker_name};
use virtionet_virtqueue::memory::GuestMemory;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::placer::Placer;
use crate::poll::Polling;
use crate::slot::{RingState, Slot};
use crate::sys::cycles;
use crate::worker::{Event, Worker};

/// Stack of a worker: its deepest call keeps a few dozen KiB of frames and pieces.
const STACK: usize = 256 * 1024;

/// See the module.
#[derive(Debug)]
pub struct Pair {
    index: u16,
    /// The device's name, for the log.
    device: String,
    epoll: Arc<Epoll>,
    wake: EventFd,
    rx: Slot<RxQueue>,
    tx: Slot<TxQueue>,
    uplink: OnceLock<Arc<dyn UplinkQueue>>,
    worker_stats: WorkerStats,
    life: Life,
    placer: Arc<Placer>,
    placed: Mutex<Option<Placed>>,
    /// The placer's generation that `placed` is of.
    generation: AtomicU32,
    /// Whether the worker may poll where it stands.
    may_poll: AtomicBool,
    /// Where the receiveq's descriptors lie in the front-end's addresses, if it ever started.
    ring_address: AtomicU64,
    memory_node: Mutex<Option<u32>>,
    thread: Mutex<Option<Thread>>,
}

/// Where a worker stands.
#[derive(Debug, Clone)]
pub struct Placed {
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
struct Life {
    /// Those that have ended.
    past: AtomicU64,
    /// When the present one began; 0 while there is none.
    began: AtomicU64,
}

#[derive(Debug)]
struct Thread {
    stop: Arc<AtomicBool>,
    handle: JoinHandle<()>,
}

impl Pair {
    /// Pair number `index` of `device`, without a thread yet.
    ///
    /// # Errors
    /// When the kernel has no descriptors left.
    pub fn new(index: u16, device: &str, placer: Arc<Placer>) -> io::Result<Self> {
        let epoll = Arc::new(Epoll::new()?);
        let wake = EventFd::new(EFD_NONBLOCK)?;
        let event = EpollEvent::new(EventSet::IN, Event::Wake.token());
        epoll.ctl(ControlOperation::Add, wake.as_raw_fd(), event)?;
        Ok(Self {
            index,
            device: device.to_owned(),
            rx: Slot::new(Arc::clone(&epoll), Event::RxKick),
            tx: Slot::new(Arc::clone(&epoll), Event::TxKick),
            epoll,
            wake,
            uplink: OnceLock::new(),
            worker_stats: WorkerStats::default(),
            life: Life::default(),
            placer,
            placed: Mutex::new(None),
            generation: AtomicU32::new(0),
            may_poll: AtomicBool::new(true),
            ring_address: AtomicU64::new(0),
            memory_node: Mutex::new(None),
            thread: Mutex::new(None),
        })
    }

    /// The receiveq's slot.
    #[must_use]
    pub fn rx(&self) -> &Slot<RxQueue> {
        &self.rx
    }

    /// The transmitq's slot.
    #[must_use]
    pub fn tx(&self) -> &Slot<TxQueue> {
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
        let past = self.life.past.load(Ordering::Relaxed);
        match self.life.began.load(Ordering::Relaxed) {
            0 => past,
            began => past + cycles().saturating_sub(began),
        }
    }

    /// Where its worker stands, while it runs.
    #[must_use]
    pub fn placed(&self) -> Option<Placed> {
        self.placed.lock().clone()
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
        if let Some(fd) = queue.readable() {
            let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
            self.epoll
                .ctl(
                    ControlOperation::Add,
                    fd.as_raw_fd(),
                    EpollEvent::new(events, Event::Uplink.token()),
                )
                .map_err(|e| UplinkError(format!("cannot wait for frames of the uplink: {e}")))?;
        }
        // Only the session thread opens queues, so none was put there meanwhile.
        let _ = self.uplink.set(queue);
        Ok(())
    }

    /// The RX ring was started, stopped, enabled or disabled.
    pub fn follow_rx_state(&self) {
        self.steer();
        self.wake();
    }

    /// Frames come to this pair exactly while its RX ring is sound and enabled.
    pub(crate) fn steer(&self) {
        let live = self.rx.enabled() && self.rx.state() == RingState::Running;
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

    /// The worker's side of [`Pair::wake`]: heeds a change of state or placement. It steers again
    /// because its own word from just before the change may have come after the session's.
    pub(crate) fn heed_wake(&self) {
        let _ = self.wake.read();
        self.steer();
        if self.generation.load(Ordering::Relaxed) != self.placer.generation() {
            self.place_worker();
        }
    }

    /// Moves the calling thread, the pair's worker, to where it belongs.
    pub(crate) fn place_worker(&self) {
        let mut placed = self.settle();
        if placed.refused {
            // The cpuset or the online CPUs may have changed just now.
            self.placer.doubt();
            placed = self.settle();
        }
        self.may_poll
            .store(placed.decision.may_poll, Ordering::Relaxed);
        if self.placer.has_several_nodes() {
            // What the worker touches first from here on, its stack for one.
            virtionet_placement::prefer_node(placed.node);
        }
        *self.placed.lock() = Some(placed);
    }

    /// Carries the placer's decision out, and tells the log of it when it is another than before.
    fn settle(&self) -> Placed {
        self.generation
            .store(self.placer.generation(), Ordering::Relaxed);
        let mut decision = self.placer.decide(self.index);
        let refusal = match virtionet_placement::apply(None, &decision.cpus) {
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
        let before = self.placed();
        let news = before.is_none_or(|placed| placed.decision != decision);
        match &refusal {
            None if news => tracing::info!("{}: {decision}", self.device),
            Some(error) if news => tracing::warn!("{}: {decision}, but {error}", self.device),
            _ => {}
        }
        Placed {
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
    pub(crate) fn look(&self) {
        let strayed = self.placed.lock().as_ref().is_some_and(|placed| {
            let now = virtionet_placement::thread_cpus(placed.tid);
            placed.refused || now.is_ok_and(|cpus| cpus != placed.decision.cpus)
        });
        if strayed {
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
    pub(crate) fn set_ring_address(&self, address: u64) {
        self.ring_address.store(address, Ordering::Relaxed);
    }

    /// The front-end and its memory are gone.
    pub(crate) fn forget_ring(&self) {
        self.ring_address.store(0, Ordering::Relaxed);
        *self.memory_node.lock() = None;
        self.placer.set_memory_node(self.index, None);
    }

    /// Asks the kernel on which node its receiveq lies; true when that may change where the worker
    /// belongs.
    pub(crate) fn locate(&self, memory: &GuestMemory) -> bool {
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
    pub fn start_worker(self: &Arc<Self>, poll: Polling) -> io::Result<()> {
        let mut thread = self.thread.lock();
        if thread.is_some() {
            return Ok(());
        }
        let stop = Arc::new(AtomicBool::new(false));
        let worker = Worker::new(Arc::clone(self), Arc::clone(&stop), poll);
        let handle = std::thread::Builder::new()
            .name(self.worker_name())
            .stack_size(STACK)
            .spawn(move || worker.run())?;
        self.life.began.store(cycles(), Ordering::Relaxed);
        *thread = Some(Thread { stop, handle });
        Ok(())
    }

    /// Tells the worker to end, without waiting for it.
    pub fn stop_worker(&self) {
        if let Some(thread) = &*self.thread.lock() {
            thread.stop.store(true, Ordering::Release);
            self.wake();
        }
    }

    /// Waits until the worker has ended; to be called after [`Pair::stop_worker`].
    pub fn join_worker(&self) {
        let thread = self.thread.lock().take();
        if let Some(thread) = thread
            && thread.handle.join().is_err()
        {
            tracing::error!("{self}: the worker ended by a panic, which is a bug");
        }
        let lived = self.worker_cycles();
        self.life.began.store(0, Ordering::Relaxed);
        self.life.past.store(lived, Ordering::Relaxed);
        *self.placed.lock() = None;
    }
}

/// For uplinks that push: called by other threads than the worker.
impl RxPort for Pair {
    fn push(&self, frames: &[TxFrame<'_>]) {
        if !self.rx.push(&format_args!("{self} rx"), frames) {
            // No ring, or one that just was quarantined: the worker has the uplink told.
            self.wake();
        }
    }
}

impl fmt::Display for Pair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} pair {}", self.device, self.index)
    }
}
