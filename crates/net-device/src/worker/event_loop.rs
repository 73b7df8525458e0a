//! What a worker's thread does.
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
use std::sync::Arc;
use std::time::{Duration, Instant};

use virtionet_process::panic_policy::{Panicked, contain, contain_panics};
use virtionet_process::{sandbox, scheduling};
use virtionet_sandbox::ThreadKind;
use virtionet_virtio_net::stats::{WorkerStats, to_u64};
use vmm_sys_util::epoll::EpollEvent;

use super::members::Members;
use super::{Worker, WorkerDescriptors};
use crate::busy_poll::BusyPoll;
use crate::pair_service::PairService;
use crate::sys::read_cycles;
use crate::worker_event::WorkerEvent;

/// Events taken from epoll at once.
const MAX_EVENTS: usize = 16;

/// Cycles that a yield takes at most when no other thread wants the CPU.
const MAX_UNCONTENDED_YIELD_CYCLES: u64 = 1500;

/// Interval, in milliseconds, at which vrings without a kick descriptor are polled.
const NO_KICK_INTERVAL_MS: i32 = 1;

/// Pause after a panic, so that one that repeats does not use up the CPU.
const PANIC_PAUSE: Duration = Duration::from_millis(100);

/// Polls of the vrings, or cycles (0.1 to 0.2 ms), after which the worker also checks epoll.
const POLLS_PER_EPOLL_WAIT: u64 = 64;
const CYCLES_PER_EPOLL_WAIT: u64 = 300_000;

/// Polls after which the worker yields, and reads the clock, where no other thread has wanted its CPU:
/// a thread that wants it meanwhile waits for about a microsecond.
const POLLS_PER_YIELD: u64 = 16;

/// Tells the members that their thread has ended, also if it ends by a panic.
struct MembersEnd<'a>(Option<&'a Members>);

impl MembersEnd<'_> {
    /// They know, and another thread may have been started meanwhile.
    fn is_done(&mut self) {
        self.0 = None;
    }
}

impl Drop for MembersEnd<'_> {
    fn drop(&mut self) {
        if let Some(members) = self.0 {
            members.end();
        }
    }
}

/// A worker's thread.
#[derive(Debug)]
pub(super) struct EventLoop {
    worker: Arc<Worker>,
    descriptors: Arc<WorkerDescriptors>,
    /// By their positions, which are in ascending order.
    pairs: Vec<(u16, PairService)>,
    poll: BusyPoll,
    /// Another thread ran when the worker last yielded, so it shares its CPU.
    shares_cpu: bool,
    /// Value of the time-stamp counter at the start of the interval being accounted.
    interval_start: u64,
}

impl EventLoop {
    /// The loop of `worker`, which ends when the worker has nothing to serve.
    pub(super) fn new(worker: Arc<Worker>, descriptors: Arc<WorkerDescriptors>) -> Self {
        Self {
            pairs: Vec::new(),
            poll: BusyPoll::new(worker.poll),
            shares_cpu: false,
            interval_start: 0,
            worker,
            descriptors,
        }
    }

    /// Serves the queue pairs until it has none. The code of one vring that panics is caught in its
    /// turn; what panics outside of all turns costs the worker's queue pairs.
    pub(super) fn run(mut self) {
        // In a handover the guest waits for it. Until it is confined as a worker, it is as the session's
        // thread, which may set slices.
        self.worker.gate.wait();
        scheduling::use_default_slice();
        sandbox::confine_thread(ThreadKind::Worker);
        contain_panics();
        let worker = Arc::clone(&self.worker);
        let mut end = MembersEnd(Some(&worker.members));
        loop {
            match contain(|| self.run_until_stopped()) {
                Ok(()) if worker.members.end_if_unused() => return end.is_done(),
                // The request to stop was withdrawn, or another queue pair has started.
                Ok(()) => {}
                Err(Panicked) => {
                    for (_, pair) in &self.pairs {
                        pair.pair().quarantine_after_panic();
                    }
                    std::thread::sleep(PANIC_PAUSE);
                }
            }
        }
    }

    fn run_until_stopped(&mut self) {
        self.worker.placement.place_this_thread();
        self.poll.set_permitted(self.worker.placement.may_poll());
        self.apply_member_changes();
        while !self.worker.stop.is_requested() && !self.pairs.is_empty() {
            let must_poll = self.pairs.iter().any(|(_, pair)| pair.must_be_polled());
            self.wait(match self.has_work() {
                true => 0,
                false if must_poll => NO_KICK_INTERVAL_MS,
                false => -1,
            });
            if must_poll {
                self.for_each_pair(PairService::poll_without_kick);
            }
            let found = self.run_pass(false);
            if self.has_work() {
                // Transmitqs that were found empty have not been asked for kicks.
                self.for_each_pair(PairService::poll_tx_without_kicks);
                continue;
            }
            if found > 0 || self.poll.is_always() {
                self.poll_or_yield();
                // Kicks are not asked for yet, so the vrings must be polled before a sleep.
                self.for_each_pair(PairService::poll_tx);
            } else {
                // Ask for kicks, and poll for what the driver made available before that.
                self.for_each_pair(PairService::poll_tx);
                self.run_pass(true);
            }
        }
        self.stay_stopped();
    }

    /// Serves nothing as long as the worker is asked to, but takes and drops queue pairs. What happens
    /// to their vrings meanwhile is looked at afterwards.
    fn stay_stopped(&mut self) {
        while self.worker.stop.is_requested() {
            self.worker.stop.obey();
            self.apply_member_changes();
            if self.pairs.is_empty() {
                return;
            }
            self.wait_for_events(-1, &mut [EpollEvent::default(); MAX_EVENTS]);
            self.descriptors.wake.clear();
        }
        self.handle_wake();
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

    /// Takes the queue pairs that have started, and drops those that are released.
    fn apply_member_changes(&mut self) {
        let members = &self.worker.members;
        let changes = members.apply_changes();
        self.pairs
            .retain(|(position, _)| !changes.dropped.contains(position));
        members.confirm_dropped(&changes.dropped);
        let is_shared = self.worker.is_shared;
        for (position, pair) in changes.taken {
            self.pairs
                .push((position, PairService::new(pair, is_shared)));
        }
        self.pairs.sort_unstable_by_key(|(position, _)| *position);
    }

    #[inline]
    fn for_each_pair(&mut self, mut each: impl FnMut(&mut PairService)) {
        self.pairs.iter_mut().for_each(|(_, pair)| each(pair));
    }

    /// Counts something that happened to all queue pairs of the worker.
    fn count(&self, mut add: impl FnMut(&WorkerStats)) {
        for (_, pair) in &self.pairs {
            add(pair.pair().worker_stats());
        }
    }

    #[inline]
    fn has_work(&self) -> bool {
        self.pairs.iter().any(|(_, pair)| pair.has_work())
    }

    /// Waits for events (`timeout` in milliseconds, -1 without limit) and notes what they mean.
    fn wait(&mut self, timeout: i32) {
        if timeout != 0 {
            self.count(|stats| stats.sleeps.add(1));
        }
        let mut events = [EpollEvent::default(); MAX_EVENTS];
        let count = self.wait_for_events(timeout, &mut events);
        for event in &events[..count] {
            match WorkerEvent::from_token(event.data()) {
                Some(WorkerEvent::Wake) => self.handle_wake(),
                Some(WorkerEvent::Pair { position, event }) => {
                    let found = self
                        .pairs
                        .binary_search_by_key(&position, |(position, _)| *position);
                    // The event of one that was released is late.
                    if let Ok(index) = found {
                        self.pairs[index].1.handle(event);
                    }
                }
                None => {}
            }
        }
        if count > 0 {
            self.count(|stats| stats.wakeups.add(1));
        }
        self.interval_start = read_cycles();
    }

    fn wait_for_events(&self, timeout: i32, events: &mut [EpollEvent]) -> usize {
        match self.descriptors.epoll.wait(timeout, events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => {
                // Cannot happen to an open epoll descriptor. If it does, do not spin on it.
                tracing::error!("{}: waiting for events failed: {error}", self.worker.name);
                std::thread::sleep(Duration::from_millis(100));
                0
            }
        }
    }

    /// Something changed: check everything once.
    fn handle_wake(&mut self) {
        self.descriptors.wake.clear();
        self.apply_member_changes();
        self.for_each_pair(PairService::handle_wake);
        self.worker.placement.refresh();
        self.poll.set_permitted(self.worker.placement.may_poll());
    }

    /// Gives each queue pair its turns; the result is how many frames they found. With
    /// `sleep_next`, the turns ask for kicks where they found none.
    fn run_pass(&mut self, sleep_next: bool) -> usize {
        let mut found = 0;
        let mut has_run = false;
        for (_, pair) in &mut self.pairs {
            if !pair.needs_pass() {
                continue;
            }
            has_run = true;
            let frames = pair.run_pass(sleep_next);
            let now = read_cycles();
            if frames > 0 {
                let stats = pair.pair().worker_stats();
                stats.busy_cycles.add(now.wrapping_sub(self.interval_start));
                stats.busy_frames.add(to_u64(frames));
                if pair.has_work() {
                    stats.over_budget.add(1);
                }
            }
            self.interval_start = now;
            found += frames;
        }
        if !has_run {
            self.interval_start = read_cycles();
        }
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
        let mut is_deadline_old = false;
        let (mut polls_done, mut hits) = (0, 0);
        let mut checked_at = self.interval_start;
        while !self.worker.stop.is_requested() && !self.pairs.is_empty() {
            match self.pairs.len() {
                1 => self.for_each_pair(PairService::poll_all),
                _ => self.for_each_pair(PairService::poll_unless_idle),
            }
            let found = self.run_pass(false);
            polls_done += 1;
            hits += u64::from(found > 0);
            let cycles = self.interval_start.wrapping_sub(checked_at);
            if polls_done == POLLS_PER_EPOLL_WAIT || cycles > CYCLES_PER_EPOLL_WAIT {
                self.count_polls(hits, polls_done - hits);
                (polls_done, hits) = (0, 0);
                checked_at = self.interval_start;
                // Also between polls that find frames: a busy vring must not hide a kick of another,
                // or a wake-up.
                self.wait(0);
            }
            if found > 0 {
                self.poll.record_hit(found);
                is_deadline_old = true;
                // Being preempted instead would cost as much, at a worse moment: other threads on
                // this CPU have waited, and their frames too.
                if self.shares_cpu {
                    self.yield_cpu();
                }
                continue;
            }
            if !self.shares_cpu && !polls_done.is_multiple_of(POLLS_PER_YIELD) {
                continue;
            }
            if std::mem::take(&mut is_deadline_old) {
                deadline = self.poll.deadline();
            }
            if deadline.is_none_or(|deadline| Instant::now() >= deadline) {
                self.poll.record_miss();
                break;
            }
            self.yield_cpu();
        }
        self.count_polls(hits, polls_done - hits);
    }

    fn count_polls(&self, hits: u64, misses: u64) {
        self.count(|stats| {
            stats.busy_polls.add(hits);
            stats.polls.add(misses);
        });
    }
}
