//! A worker as other threads see it: what it serves, how it is started, woken and ended. Its thread
//! runs `EventLoop`.

mod event_loop;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use virtionet_config::PollMode;
use virtionet_virtio_net::stats::WorkerStats;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::queue_pair::QueuePair;
use crate::start_gate::StartGate;
use crate::waker::{WakeEvent, Waker};
use crate::worker_event::{PairEvent, WorkerEvent};
use crate::worker_placement::{PlacementState, WorkerPlacement};
use crate::worker_thread::{StopRequest, ThreadLifetime, ThreadState};
use event_loop::EventLoop;

/// Stack of a worker: its deepest call keeps a few dozen KiB of frames and segments.
const WORKER_STACK_SIZE: usize = 256 * 1024;

/// Pause between two checks of whether the thread has ended. Frames wait meanwhile in a handover.
const JOIN_INTERVAL: Duration = Duration::from_micros(50);

/// A worker, as other threads see it. It lasts as long as its device, because its counters do. Its
/// descriptors exist only while a front-end is connected.
#[derive(Debug)]
pub struct Worker {
    name: String,
    poll: PollMode,
    /// The thread has its own reference, so it takes no lock.
    descriptors: Mutex<Option<Arc<WorkerDescriptors>>>,
    waker: Waker,
    pairs: Mutex<Vec<Arc<QueuePair>>>,
    stats: WorkerStats,
    lifetime: ThreadLifetime,
    placement: PlacementState,
    gate: Arc<StartGate>,
    thread: Mutex<ThreadState>,
}

/// The descriptors of a worker.
#[derive(Debug)]
struct WorkerDescriptors {
    epoll: Epoll,
    wake: WakeEvent,
}

impl Worker {
    /// A worker without a thread, descriptors or queue pairs yet. `name` is its thread's name.
    #[must_use]
    pub fn new(
        name: String,
        poll: PollMode,
        placement: PlacementState,
        gate: Arc<StartGate>,
    ) -> Self {
        Self {
            name,
            poll,
            descriptors: Mutex::default(),
            waker: Waker::default(),
            pairs: Mutex::default(),
            stats: WorkerStats::default(),
            lifetime: ThreadLifetime::default(),
            placement,
            gate,
            thread: Mutex::new(ThreadState::Ended),
        }
    }

    /// Opens its descriptors, unless they are open.
    ///
    /// # Errors
    /// When the kernel has no descriptors left.
    pub fn open(&self) -> io::Result<()> {
        self.open_descriptors().map(|_| ())
    }

    fn open_descriptors(&self) -> io::Result<Arc<WorkerDescriptors>> {
        let mut descriptors = self.descriptors.lock();
        if let Some(open) = &*descriptors {
            return Ok(Arc::clone(open));
        }
        let epoll = Epoll::new()?;
        let wake = self.waker.open()?;
        let event = EpollEvent::new(EventSet::IN, WorkerEvent::Wake.to_token());
        if let Err(error) = epoll.ctl(ControlOperation::Add, wake.as_raw_fd(), event) {
            self.waker.close();
            return Err(error);
        }
        let open = Arc::new(WorkerDescriptors { epoll, wake });
        *descriptors = Some(Arc::clone(&open));
        Ok(open)
    }

    /// Closes its descriptors, and waits no longer for any other. The thread must have ended.
    pub fn close(&self) {
        *self.descriptors.lock() = None;
        self.waker.close();
    }

    /// Whether its descriptors are open.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.descriptors.lock().is_some()
    }

    /// The name of its thread.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What wakes it.
    #[must_use]
    pub fn waker(&self) -> &Waker {
        &self.waker
    }

    /// Its counters.
    #[must_use]
    pub fn stats(&self) -> &WorkerStats {
        &self.stats
    }

    /// Where it runs, while it does.
    #[must_use]
    pub fn placement(&self) -> Option<WorkerPlacement> {
        self.placement.current()
    }

    /// Cycles of the time-stamp counter that its threads have run.
    #[must_use]
    pub fn cycles(&self) -> u64 {
        self.lifetime.cycles()
    }

    /// Lets it serve one more queue pair from its next start on. The result is the position by
    /// which its events name the pair.
    pub fn add_pair(&self, pair: Arc<QueuePair>) -> u16 {
        let mut pairs = self.pairs.lock();
        let position = u16::try_from(pairs.len()).unwrap_or(u16::MAX);
        pairs.push(pair);
        position
    }

    /// Waits for `event` of the queue pair at `position` whenever `fd` becomes readable.
    ///
    /// The worker never reads `fd` for that, so that a descriptor that blocks, or that another
    /// process reads, cannot stop it.
    ///
    /// # Errors
    /// When the kernel refuses, or has no descriptors left for the worker's own.
    pub fn watch_pair(&self, position: u16, event: PairEvent, fd: &impl AsRawFd) -> io::Result<()> {
        let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let event = WorkerEvent::Pair { position, event };
        let event = EpollEvent::new(events, event.to_token());
        let epoll = &self.open_descriptors()?.epoll;
        epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), event)
    }

    /// Waits no longer for a descriptor.
    pub fn unwatch(&self, fd: &OwnedFd) {
        let event = EpollEvent::default();
        if let Some(open) = &*self.descriptors.lock() {
            // Fails only when it was not watched.
            let _ = open
                .epoll
                .ctl(ControlOperation::Delete, fd.as_raw_fd(), event);
        }
    }

    /// Starts the thread, unless it runs.
    ///
    /// # Errors
    /// When the kernel refuses a thread, or has no descriptors left.
    pub fn start(self: &Arc<Self>) -> io::Result<()> {
        let mut thread = self.thread.lock();
        if !matches!(*thread, ThreadState::Ended) {
            return Ok(());
        }
        // The decision is made while the thread starts.
        self.placement.request();
        let stop = Arc::new(StopRequest::default());
        let descriptors = self.open_descriptors()?;
        let event_loop = EventLoop::new(Arc::clone(self), descriptors, Arc::clone(&stop));
        let handle = std::thread::Builder::new()
            .name(self.name.clone())
            .stack_size(WORKER_STACK_SIZE)
            .spawn(move || event_loop.run())?;
        self.lifetime.begin();
        *thread = ThreadState::Running { stop, handle };
        Ok(())
    }

    /// Whether there is a thread that a wake-up reaches.
    pub(crate) fn is_running(&self) -> bool {
        matches!(*self.thread.lock(), ThreadState::Running { .. })
    }

    /// Lets the thread go on that was asked to end, or starts another one if it has ended or is about
    /// to.
    ///
    /// # Errors
    /// When the kernel refuses a thread, or has no descriptors left.
    pub fn resume(self: &Arc<Self>) -> io::Result<()> {
        if let ThreadState::Running { stop, .. } = &*self.thread.lock()
            && stop.withdraw()
        {
            return Ok(());
        }
        self.join();
        self.start()
    }

    /// Asks the thread to end, without waiting for it.
    pub fn request_stop(&self) {
        if let ThreadState::Running { stop, .. } = &*self.thread.lock() {
            stop.request();
            self.waker.wake();
        }
    }

    /// Waits until the thread has ended, or `deadline` has passed; false in that case. To be called
    /// after [`Worker::request_stop`].
    pub fn join_until(&self, deadline: Instant) -> bool {
        while !self.thread.lock().has_ended() {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(JOIN_INTERVAL);
        }
        self.join();
        true
    }

    /// Waits until the thread has ended; to be called after [`Worker::request_stop`].
    pub fn join(&self) {
        let mut thread = self.thread.lock();
        let handle = match std::mem::replace(&mut *thread, ThreadState::Joining) {
            ThreadState::Running { handle, .. } => handle,
            other => {
                *thread = other;
                return;
            }
        };
        // Others that look at the thread must not wait.
        drop(thread);
        if handle.join().is_err() {
            tracing::error!(
                "{}: the worker ended by a panic; please report this as a bug",
                self.name
            );
        }
        self.lifetime.end();
        self.placement.clear();
        *self.thread.lock() = ThreadState::Ended;
    }

    /// Wakes it to be placed again if the kernel has moved it.
    pub(crate) fn check_affinity(&self) {
        if self.placement.has_moved() {
            self.waker.wake();
        }
    }
}
