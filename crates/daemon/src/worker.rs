//! A worker: a thread that serves queue pairs, and what other threads see of it.
//!
//! ```text
//!   transmitq kick ────┐                  ┌── TX turn: a few bursts from the vring to the uplink
//!   receiveq kick ─────┤                  │
//!   uplink readable ───┼── epoll ── pass ─┤   (of each queue pair that is ready)
//!   wake-up ───────────┘                  └── RX turn: frames from the uplink into the vring
//! ```
//!
//! A pass gives TX and RX of each queue pair a turn, with a budget of frames and bytes, so that
//! none starves another. As long as one of them has more, passes follow each other with a check of
//! epoll in between. Otherwise the worker polls for a while, if it is configured to, asks for
//! kicks, polls the vrings once more and sleeps. No error of a frame, a guest or the host ends it.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use virtionet_config::PollMode;
use virtionet_sandbox::ThreadKind;
use virtionet_virtio_net::stats::WorkerStats;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::busy_poll::BusyPoll;
use crate::pair_service::PairService;
use crate::panic_policy::{contain, contain_panics};
use crate::queue_pair::QueuePair;
use crate::sandbox;
use crate::start_gate::StartGate;
use crate::sys::read_cycles;
use crate::waker::{WakeEvent, Waker};
use crate::worker_event::{PairEvent, WorkerEvent};
use crate::worker_placement::{PlacementState, WorkerPlacement};
use crate::worker_thread::ThreadState;

/// Stack of a worker: its deepest call keeps a few dozen KiB of frames and segments.
const WORKER_STACK_SIZE: usize = 256 * 1024;

/// Events taken from epoll at once.
const MAX_EVENTS: usize = 4;

/// Cycles that a yield takes at most when no other thread wants the CPU.
const MAX_UNCONTENDED_YIELD_CYCLES: u64 = 1500;

/// Interval, in milliseconds, at which vrings without a kick descriptor are polled.
const NO_KICK_INTERVAL_MS: i32 = 1;

/// Pause between two checks of whether the thread has ended.
const JOIN_INTERVAL: Duration = Duration::from_millis(1);

/// Pause after a panic, so that one that repeats does not use up the CPU.
const PANIC_PAUSE: Duration = Duration::from_millis(100);

/// Polls of the vrings after which the worker also checks epoll.
const POLLS_PER_EPOLL_WAIT: u32 = 64;

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
    lifetime: WorkerLifetime,
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

/// How long a worker's threads have run, in cycles of the time-stamp counter.
#[derive(Debug, Default)]
struct WorkerLifetime {
    /// Those that have ended.
    past: AtomicU64,
    /// When the present one started; 0 while there is none.
    started_at: AtomicU64,
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
            lifetime: WorkerLifetime::default(),
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
        let past = self.lifetime.past.load(Ordering::Relaxed);
        match self.lifetime.started_at.load(Ordering::Relaxed) {
            0 => past,
            started_at => past + read_cycles().saturating_sub(started_at),
        }
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
        let stop = Arc::new(AtomicBool::new(false));
        let descriptors = self.open_descriptors()?;
        let event_loop = EventLoop::new(Arc::clone(self), descriptors, Arc::clone(&stop));
        let handle = std::thread::Builder::new()
            .name(self.name.clone())
            .stack_size(WORKER_STACK_SIZE)
            .spawn(move || event_loop.run())?;
        self.lifetime
            .started_at
            .store(read_cycles(), Ordering::Relaxed);
        *thread = ThreadState::Running { stop, handle };
        Ok(())
    }

    /// Asks the thread to end, without waiting for it.
    pub fn request_stop(&self) {
        if let ThreadState::Running { stop, .. } = &*self.thread.lock() {
            stop.store(true, Ordering::Release);
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
        let cycles = self.cycles();
        self.lifetime.started_at.store(0, Ordering::Relaxed);
        self.lifetime.past.store(cycles, Ordering::Relaxed);
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

/// A worker's thread.
#[derive(Debug)]
struct EventLoop {
    worker: Arc<Worker>,
    descriptors: Arc<WorkerDescriptors>,
    pairs: Vec<PairService>,
    stop: Arc<AtomicBool>,
    poll: BusyPoll,
    /// Another thread ran when the worker last yielded, so it shares its CPU.
    shares_cpu: bool,
    /// Value of the time-stamp counter at the start of the interval being accounted.
    interval_start: u64,
}

impl EventLoop {
    /// The loop of `worker`, which ends when `stop` is set and the worker is woken.
    fn new(
        worker: Arc<Worker>,
        descriptors: Arc<WorkerDescriptors>,
        stop: Arc<AtomicBool>,
    ) -> Self {
        let pairs = worker.pairs.lock().clone();
        Self {
            pairs: pairs.into_iter().map(PairService::new).collect(),
            stop,
            poll: BusyPoll::new(worker.poll),
            shares_cpu: false,
            interval_start: 0,
            worker,
            descriptors,
        }
    }

    /// Serves the queue pairs until it is asked to stop. The code of one vring that panics is
    /// caught in its turn; what panics outside of all turns costs the worker's queue pairs.
    fn run(mut self) {
        sandbox::confine_thread(ThreadKind::Worker);
        contain_panics();
        self.worker.gate.wait();
        while contain(|| self.run_until_stopped()).is_err() {
            for pair in &self.pairs {
                pair.pair().quarantine_after_panic();
            }
            std::thread::sleep(PANIC_PAUSE);
        }
    }

    fn run_until_stopped(&mut self) {
        self.worker.placement.place_this_thread();
        self.poll.set_permitted(self.worker.placement.may_poll());
        while !self.stop.load(Ordering::Acquire) {
            let must_poll = self.pairs.iter().any(PairService::must_be_polled);
            self.wait(match self.has_work() {
                true => 0,
                false if must_poll => NO_KICK_INTERVAL_MS,
                false => -1,
            });
            if must_poll {
                self.pairs
                    .iter_mut()
                    .for_each(PairService::poll_without_kick);
            }
            let found = self.run_pass(false);
            if self.has_work() {
                continue;
            }
            if found > 0 || self.poll.is_always() {
                self.poll_or_yield();
                // Kicks are not asked for yet, so the vrings must be polled before a sleep.
                self.pairs.iter_mut().for_each(PairService::poll_tx);
            } else {
                // Ask for kicks, and poll for what the driver made available before that.
                self.pairs.iter_mut().for_each(PairService::poll_tx);
                self.run_pass(true);
            }
        }
    }

    /// Gives frames that follow the last ones a chance to be found without a kick.
    ///
    /// Without polling that is one yield. Where the driver's vCPU shares this CPU, as it does when
    /// each queue pair is placed beside its vCPU, the vCPU goes on and makes more frames meanwhile
    /// instead of being interrupted for each of them. Where no other thread waits for this CPU it
    /// costs a system call.
    fn poll_or_yield(&mut self) {
        if self.poll.is_on() {
            self.busy_poll();
        } else {
            self.yield_cpu();
        }
    }

    #[inline]
    fn has_work(&self) -> bool {
        self.pairs.iter().any(PairService::has_work)
    }

    /// Waits for events (`timeout` in milliseconds, -1 without limit) and notes what they mean.
    fn wait(&mut self, timeout: i32) {
        if timeout != 0 {
            self.worker.stats.sleeps.add(1);
        }
        let mut events = [EpollEvent::default(); MAX_EVENTS];
        let count = match self.descriptors.epoll.wait(timeout, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => {
                // Cannot happen to an open epoll descriptor. If it does, do not spin on it.
                tracing::error!("{}: waiting for events failed: {error}", self.worker.name);
                std::thread::sleep(Duration::from_millis(100));
                0
            }
        };
        for event in &events[..count] {
            match WorkerEvent::from_token(event.data()) {
                Some(WorkerEvent::Wake) => self.handle_wake(),
                Some(WorkerEvent::Pair { position, event }) => {
                    if let Some(pair) = self.pairs.get_mut(usize::from(position)) {
                        pair.handle(event);
                    }
                }
                None => {}
            }
        }
        if count > 0 {
            self.worker.stats.wakeups.add(1);
        }
        self.interval_start = read_cycles();
    }

    /// Something changed: check everything once.
    fn handle_wake(&mut self) {
        self.descriptors.wake.clear();
        self.pairs.iter_mut().for_each(PairService::handle_wake);
        self.worker.placement.refresh();
        self.poll.set_permitted(self.worker.placement.may_poll());
    }

    /// Gives each queue pair its turns; the result is how many frames they found. With
    /// `sleep_next`, the turns ask for kicks where they found none.
    fn run_pass(&mut self, sleep_next: bool) -> usize {
        let mut found = 0;
        for pair in &mut self.pairs {
            found += pair.run_pass(sleep_next);
        }
        let stats = &self.worker.stats;
        let now = read_cycles();
        if found > 0 {
            stats.busy_cycles.add(now.wrapping_sub(self.interval_start));
            stats.busy_frames.add(u64::try_from(found).unwrap_or(0));
            if self.has_work() {
                stats.over_budget.add(1);
            }
        }
        self.interval_start = now;
        found
    }

    /// Lets threads that share this CPU run first: the vCPU that makes frames, other workers.
    fn yield_cpu(&mut self) {
        std::thread::yield_now();
        let now = read_cycles();
        self.shares_cpu = now.wrapping_sub(self.interval_start) > MAX_UNCONTENDED_YIELD_CYCLES;
        self.interval_start = now;
    }

    /// Polls for frames, without kicks, for as long as that pays.
    fn busy_poll(&mut self) {
        let mut deadline = self.poll.deadline();
        let mut polls_done = 0u32;
        while !self.stop.load(Ordering::Relaxed) {
            // Also between polls that find frames: a busy vring must not hide a kick of another, or
            // a wake-up.
            polls_done = polls_done.wrapping_add(1);
            if polls_done.is_multiple_of(POLLS_PER_EPOLL_WAIT) {
                self.wait(0);
            }
            self.pairs.iter_mut().for_each(PairService::poll_all);
            let found = self.run_pass(false);
            if found > 0 {
                self.worker.stats.busy_polls.add(1);
                self.poll.record_hit(found);
                deadline = self.poll.deadline();
                // Being preempted instead would cost as much, at a worse moment: other threads on
                // this CPU have waited, and their frames too.
                if self.shares_cpu {
                    self.yield_cpu();
                }
                continue;
            }
            self.worker.stats.polls.add(1);
            if deadline.is_none_or(|deadline| Instant::now() >= deadline) {
                self.poll.record_miss();
                return;
            }
            self.yield_cpu();
        }
    }
}
