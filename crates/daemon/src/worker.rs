//! The thread of a queue pair: who wakes it, and what it does then.
//!
//! ```text
//!   transmitq kick ──┐                  ┌── TX turn: a few bursts from the ring to the uplink
//!   receiveq kick ───┤                  │
//!   uplink readable ─┼── epoll ── pass ─┤
//!   wake-up ─────────┘                  └── RX turn: frames from the uplink into the ring
//! ```
//!
//! A pass gives TX and RX a turn each, with a budget of frames and bytes, so neither starves the
//! other and none holds the worker. As long as one of them has more, passes follow each other with
//! a look at epoll in between. Otherwise the worker polls for a while, if it is told to, asks for
//! kicks, looks once more and sleeps. No error of a frame, a guest or the host ends it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use virtionet_virtio_net::{DeviceQueue, RxEndReason};
use vmm_sys_util::epoll::{Epoll, EpollEvent};

use crate::busy_poll::BusyPoll;
use crate::queue_pair::QueuePair;
use crate::sys::read_cycles;

/// Why a worker wakes up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WorkerEvent {
    /// Something about the pair changed: a ring started, a placement, the end.
    Wake,
    /// The driver made chains available for TX.
    TxKick,
    /// The driver made buffers available for RX.
    RxKick,
    /// A frame waits in the uplink.
    Uplink,
}

impl WorkerEvent {
    const ALL: [Self; 4] = [Self::Wake, Self::TxKick, Self::RxKick, Self::Uplink];

    /// The number that epoll carries for it.
    #[must_use]
    pub fn token(self) -> u64 {
        match self {
            Self::Wake => 0,
            Self::TxKick => 1,
            Self::RxKick => 2,
            Self::Uplink => 3,
        }
    }

    fn of(token: u64) -> Option<Self> {
        Self::ALL.into_iter().find(|event| event.token() == token)
    }
}

/// What one turn of TX may take before RX has its own: about 1 ms at most, whatever is sent.
const TX_CHAINS: usize = 256;
const TX_BYTES: usize = 1 << 20;
/// The same for RX.
const RX_FRAMES: usize = 64;
const RX_BYTES: usize = 1 << 20;

/// Cycles that a yield takes at most when nobody else wants the CPU.
const MAX_UNCONTENDED_YIELD_CYCLES: u64 = 1500;

/// Looks at the rings while polling before it also looks at epoll.
const POLLS_PER_EPOLL_WAIT: u32 = 64;

/// A queue pair's thread, seen from within.
#[derive(Debug)]
pub struct Worker {
    pair: Arc<QueuePair>,
    epoll: Arc<Epoll>,
    stop: Arc<AtomicBool>,
    poll: BusyPoll,
    /// Frames must be asked for at the uplink; a switch pushes them instead.
    is_pull_uplink: bool,
    /// Chains may be available for TX.
    tx_ready: bool,
    /// A frame may wait in the uplink.
    uplink_ready: bool,
    /// The guest has no RX buffers; a kick will tell when it has.
    starved: bool,
    /// Somebody else ran when it last yielded: it has its CPU not for itself.
    shares_cpu: bool,
    /// Since when what it does is to be told busy or not, by the time-stamp counter.
    interval_start: u64,
}

impl Worker {
    /// A worker for `pair`, which ends when `stop` is set and it is woken.
    #[must_use]
    pub fn new(pair: Arc<QueuePair>, stop: Arc<AtomicBool>, poll: BusyPoll) -> Self {
        Self {
            epoll: Arc::clone(pair.epoll()),
            is_pull_uplink: pair
                .uplink()
                .is_some_and(|uplink| uplink.poll_fd().is_some()),
            pair,
            stop,
            poll,
            tx_ready: true,
            uplink_ready: true,
            starved: false,
            shares_cpu: false,
            interval_start: 0,
        }
    }

    /// Serves the pair until it is told to stop.
    pub fn run(mut self) {
        self.pair.place_worker();
        self.poll.set_permitted(self.pair.may_poll());
        while !self.stop.load(Ordering::Acquire) {
            let timeout = if self.has_work() { 0 } else { -1 };
            self.wait(timeout);
            let found = self.run_pass(false);
            if self.has_work() {
                continue;
            }
            if found > 0 || self.poll.is_always() {
                self.poll_or_yield();
                // Kicks are not asked for yet: look before it sleeps.
                self.tx_ready = true;
            } else {
                // Kicks are asked for, and what came before that is found.
                self.tx_ready = true;
                self.run_pass(true);
            }
        }
    }

    /// Gives frames that follow the last ones a chance to be found without a kick.
    ///
    /// Without polling that is one yield. Where the driver's vCPU shares this CPU, as it does when
    /// each pair stands beside its vCPU, the vCPU goes on and makes more frames meanwhile, instead
    /// of being interrupted for each of them; where nobody waits for this CPU it costs a system
    /// call.
    fn poll_or_yield(&mut self) {
        if self.poll.is_on() {
            self.busy_poll();
        } else {
            self.yield_cpu();
        }
    }

    fn has_work(&self) -> bool {
        self.tx_ready || (self.uplink_ready && !self.starved)
    }

    /// Waits for events (`timeout` in milliseconds, -1 for ever) and notes what they mean.
    fn wait(&mut self, timeout: i32) {
        if timeout != 0 {
            self.pair.worker_stats().sleeps.add(1);
        }
        let mut events = [EpollEvent::default(); WorkerEvent::ALL.len()];
        let count = match self.epoll.wait(timeout, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => {
                // Cannot happen to a live epoll descriptor; never spin on it if it does.
                tracing::error!("{}: waiting for events failed: {error}", self.pair);
                std::thread::sleep(Duration::from_millis(100));
                0
            }
        };
        for event in &events[..count] {
            match WorkerEvent::of(event.data()) {
                Some(WorkerEvent::Wake) => self.handle_wake_event(),
                Some(WorkerEvent::TxKick) => {
                    self.pair.tx().stats().kicks.add(1);
                    self.tx_ready = true;
                }
                Some(WorkerEvent::RxKick) => {
                    self.pair.rx().stats().kicks.add(1);
                    self.starved = false;
                }
                Some(WorkerEvent::Uplink) => self.uplink_ready = self.is_pull_uplink,
                None => {}
            }
        }
        if count > 0 {
            self.pair.worker_stats().wakeups.add(1);
        }
        self.interval_start = read_cycles();
    }

    /// Something changed: look at everything once.
    fn handle_wake_event(&mut self) {
        self.pair.handle_wake();
        self.poll.set_permitted(self.pair.may_poll());
        self.tx_ready = true;
        self.uplink_ready = self.is_pull_uplink;
        self.starved = false;
    }

    /// A turn for TX and one for RX; says how many frames they found. `sleep_next`: where there are
    /// none, kicks are asked for.
    fn run_pass(&mut self, sleep_next: bool) -> usize {
        let mut found = 0;
        if self.tx_ready {
            found += self.process_tx(sleep_next);
        }
        if self.uplink_ready && !self.starved {
            found += self.process_rx();
        }
        let stats = self.pair.worker_stats();
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

    fn process_tx(&mut self, sleep_next: bool) -> usize {
        let uplink = self.pair.uplink();
        let outcome =
            self.pair
                .tx()
                .process(&format_args!("{} tx", self.pair), |queue, enabled| {
                    let uplink = uplink.filter(|_| enabled).map(|uplink| &**uplink);
                    queue.disable_kicks();
                    let (mut chains, mut bytes, mut call) = (0, 0, false);
                    let more = loop {
                        let sent = match queue.send(uplink) {
                            Ok(sent) => sent,
                            // What was done before is told first; the next turn meets the fault again.
                            Err(_) if chains > 0 => break true,
                            Err(fault) => return Err(fault),
                        };
                        chains += sent.chains;
                        bytes += sent.bytes;
                        call |= sent.should_call;
                        if chains >= TX_CHAINS || bytes >= TX_BYTES {
                            break true;
                        }
                        if sent.chains == 0 && !(sleep_next && queue.enable_kicks()) {
                            break false;
                        }
                    };
                    Ok(((chains, more), call))
                });
        let (found, more) = outcome.unwrap_or_default();
        self.tx_ready = more;
        found
    }

    fn process_rx(&mut self) -> usize {
        let Some(uplink) = self.pair.uplink() else {
            self.uplink_ready = false;
            return 0;
        };
        let outcome =
            self.pair
                .rx()
                .process(&format_args!("{} rx", self.pair), |queue, enabled| {
                    if !enabled {
                        return Ok(((0, RxEndReason::UplinkEmpty), false));
                    }
                    let received = queue.receive(&**uplink, RX_FRAMES, RX_BYTES)?;
                    let end = match received.end {
                        RxEndReason::Starved if queue.enable_kicks() => RxEndReason::Budget,
                        end => end,
                    };
                    Ok(((received.frames, end), received.should_call))
                });
        let (found, end) = outcome.unwrap_or_else(|| {
            // There is no ring, or it is quarantined: frames had better go to other pairs.
            self.pair.reconcile_uplink();
            (0, RxEndReason::UplinkEmpty)
        });
        match end {
            RxEndReason::UplinkEmpty | RxEndReason::UplinkFailed => self.uplink_ready = false,
            RxEndReason::Starved => {
                self.starved = true;
                self.pair.rx().stats().rx_starved.add(1);
            }
            RxEndReason::Budget => {}
        }
        found
    }

    /// Who shares this CPU goes first: the vCPU that makes frames, other workers.
    fn yield_cpu(&mut self) {
        std::thread::yield_now();
        let now = read_cycles();
        self.shares_cpu = now.wrapping_sub(self.interval_start) > MAX_UNCONTENDED_YIELD_CYCLES;
        self.interval_start = now;
    }

    /// Looks for frames again and again, without kicks, for as long as that pays.
    fn busy_poll(&mut self) {
        let mut deadline = self.poll.deadline();
        let mut polls_done = 0u32;
        while !self.stop.load(Ordering::Relaxed) {
            // Also between looks that find frames: a busy ring must not hide a kick of the other,
            // or a change of the pair.
            polls_done = polls_done.wrapping_add(1);
            if polls_done.is_multiple_of(POLLS_PER_EPOLL_WAIT) {
                self.wait(0);
            }
            self.tx_ready = true;
            self.uplink_ready = self.is_pull_uplink;
            let found = self.run_pass(false);
            if found > 0 {
                self.pair.worker_stats().busy_polls.add(1);
                self.poll.record_hit(found);
                deadline = self.poll.deadline();
                // To be preempted instead would cost as much, at a worse moment: others on this
                // CPU have waited, and their frames too.
                if self.shares_cpu {
                    self.yield_cpu();
                }
                continue;
            }
            self.pair.worker_stats().polls.add(1);
            if deadline.is_none_or(|deadline| Instant::now() >= deadline) {
                self.poll.record_miss();
                return;
            }
            self.yield_cpu();
        }
    }
}
