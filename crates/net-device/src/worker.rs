//! A worker as other threads see it: what it serves, how it is started, woken and ended. Its thread
//! runs `EventLoop`.

mod event_loop;
mod members;

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};
use virtionet_config::PollMode;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::queue_pair::QueuePair;
use crate::start_gate::StartGate;
use crate::waker::{WakeEvent, Waker};
use crate::worker_event::{PairEvent, WorkerEvent};
use crate::worker_placement::{PlacementState, WorkerPlacement};
use crate::worker_thread::{StopRequest, ThreadLifetime, ThreadState};
use event_loop::EventLoop;
use members::Members;

/// Stack of a worker: its deepest call keeps a few dozen KiB of frames and segments.
const WORKER_STACK_SIZE: usize = 256 * 1024;

/// Pause between two checks of whether the thread has stopped, or released a queue pair. Frames wait
/// meanwhile in a handover.
const JOIN_INTERVAL: Duration = Duration::from_micros(50);

/// A worker, as other threads see it. It serves one queue pair, or queue pairs of several devices,
/// each of which it names by a position. It lasts as long as they do. Its descriptors exist only
/// while one of them has a front-end, and its thread only while one of them is started.
#[derive(Debug)]
pub struct Worker {
    name: String,
    poll: PollMode,
    /// Whether it may serve queue pairs of several devices.
    is_shared: bool,
    /// The thread has its own reference, so it takes no lock.
    descriptors: Mutex<Option<Arc<WorkerDescriptors>>>,
    waker: Waker,
    members: Members,
    lifetime: ThreadLifetime,
    placement: PlacementState,
    gate: Arc<StartGate>,
    /// Held while the thread is started or joined, so that no two do it at a time.
    lifecycle: Mutex<()>,
    thread: Mutex<ThreadState>,
    stop: StopRequest,
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
        is_shared: bool,
        placement: PlacementState,
        gate: Arc<StartGate>,
    ) -> Self {
        Self {
            name,
            poll,
            is_shared,
            descriptors: Mutex::default(),
            waker: Waker::default(),
            members: Members::default(),
            lifetime: ThreadLifetime::default(),
            placement,
            gate,
            lifecycle: Mutex::default(),
            thread: Mutex::new(ThreadState::Ended),
            stop: StopRequest::default(),
        }
    }

    /// Opens its descriptors for the queue pair at `position`, unless they are open.
    ///
    /// # Errors
    /// When the kernel has no descriptors left.
    pub fn open(&self, position: u16) -> io::Result<()> {
        self.members.open(position);
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

    /// Closes its descriptors unless another queue pair than the one at `position` needs them, which
    /// must have been released, and whose descriptors must not be watched any more.
    pub fn close(&self, position: u16) {
        let mut descriptors = self.descriptors.lock();
        if self.members.close(position) {
            *descriptors = None;
            self.waker.close();
        }
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

    /// Adds a queue pair, which it does not serve yet. Returns its position.
    pub fn add_pair(&self, pair: Arc<QueuePair>) -> u16 {
        self.members.add(pair)
    }

    /// Removes a queue pair that never started.
    pub fn remove_pair(&self, position: u16) {
        self.close(position);
        self.members.remove(position);
    }

    /// The number of its queue pairs.
    #[must_use]
    pub fn pair_count(&self) -> usize {
        self.members.count()
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
    pub fn unwatch(&self, fd: &impl AsRawFd) {
        let event = EpollEvent::default();
        if let Some(open) = &*self.descriptors.lock() {
            // Fails only when it was not watched.
            let _ = open
                .epoll
                .ctl(ControlOperation::Delete, fd.as_raw_fd(), event);
        }
    }

    /// Serves the queue pair at `position` from now on. Starts the thread, unless it runs.
    ///
    /// # Errors
    /// When the kernel refuses a thread, or has no descriptors left.
    pub fn start(self: &Arc<Self>, position: u16) -> io::Result<()> {
        let lifecycle = self.lifecycle.lock();
        if !self.members.start(position) {
            self.waker.wake();
            return Ok(());
        }
        let started = self.start_thread(&lifecycle);
        started.inspect_err(|_| self.members.stop(position))
    }

    fn start_thread(self: &Arc<Self>, lifecycle: &MutexGuard<'_, ()>) -> io::Result<()> {
        // The thread before this one may not have returned yet.
        self.join_thread(lifecycle);
        self.spawn_thread().inspect_err(|_| self.members.end())
    }

    fn spawn_thread(self: &Arc<Self>) -> io::Result<()> {
        let descriptors = self.open_descriptors()?;
        let mut thread = self.thread.lock();
        // The decision is made while the thread starts.
        self.placement.request();
        let event_loop = EventLoop::new(Arc::clone(self), descriptors);
        let handle = std::thread::Builder::new()
            .name(self.name.clone())
            .stack_size(WORKER_STACK_SIZE)
            .spawn(move || event_loop.run())?;
        self.lifetime.begin();
        *thread = ThreadState::Running(handle);
        Ok(())
    }

    /// Whether its thread attaches and detaches the uplink of the queue pair at `position` when it is
    /// woken: it serves the pair, or is about to, and no other device.
    pub(crate) fn reconciles_uplink(&self, position: u16) -> bool {
        !self.is_shared && self.members.will_be_served(position)
    }

    /// Lets the thread go on after [`Worker::request_stop`].
    pub fn resume(&self) {
        self.stop.withdraw();
        self.waker.wake();
    }

    /// Serves the queue pair at `position` no longer, without waiting for that.
    pub fn request_release(&self, position: u16) {
        self.members.stop(position);
        self.waker.wake();
    }

    /// Waits until the queue pair at `position` is not served; to be called after
    /// [`Worker::request_release`]. If no other is served, the thread has ended.
    pub fn release(&self, position: u16) {
        while !self.members.is_released(position) {
            std::thread::sleep(JOIN_INTERVAL);
        }
        let lifecycle = self.lifecycle.lock();
        if !self.members.has_thread() {
            self.join_thread(&lifecycle);
        }
    }

    /// Asks the thread, and those that follow, to serve nothing until [`Worker::resume`]. It does not
    /// wait for that. Queue pairs may start and be released meanwhile.
    pub fn request_stop(&self) {
        self.stop.request();
        self.waker.wake();
    }

    /// Waits until the thread serves nothing, or `deadline` has passed; false in that case. To be called
    /// after [`Worker::request_stop`].
    pub fn wait_until_stopped(&self, deadline: Instant) -> bool {
        while self.members.has_thread() && !self.stop.is_obeyed() {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(JOIN_INTERVAL);
        }
        true
    }

    /// Waits until the thread has ended, which must have no work.
    fn join_thread(&self, _lifecycle: &MutexGuard<'_, ()>) {
        let mut thread = self.thread.lock();
        let handle = match std::mem::replace(&mut *thread, ThreadState::Joining) {
            ThreadState::Running(handle) => handle,
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
