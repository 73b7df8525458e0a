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

use virtionet_virtio_net::{DeviceQueue, RxEnd};
use vmm_sys_util::epoll::{Epoll, EpollEvent};

use crate::pair::Pair;
use crate::poll::Polling;
use crate::sys::cycles;

/// Why a worker wakes up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// Something about the pair changed: a ring started, a placement, the end.
    Wake,
    /// The driver made chains available for TX.
    TxKick,
    /// The driver made buffers available for RX.
    RxKick,
    /// A frame waits in the uplink.
    Uplink,
}

impl Event {
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
const ALONE: u64 = 1500;

/// Looks at the rings while polling before it also looks at epoll.
const LOOKS_PER_WAIT: u32 = 64;

/// A queue pair's thread, seen from within.
#[derive(Debug)]
pub struct Worker {
    pair: Arc<Pair>,
    epoll: Arc<Epoll>,
    stop: Arc<AtomicBool>,
    poll: Polling,
    /// Frames must be asked for at the uplink; a switch pushes them instead.
    pulls: bool,
    /// Chains may be available for TX.
    tx_ready: bool,
    /// A frame may wait in the uplink.
    uplink_ready: bool,
    /// The guest has no RX buffers; a kick will tell when it has.
    starved: bool,
    /// Somebody else ran when it last yielded: it has its CPU not for itself.
    shares: bool,
    /// Since when what it does is to be told busy or not, by the time-stamp counter.
    since: u64,
}

impl Worker {
    /// A worker for `pair`, which ends when `stop` is set and it is woken.
    #[must_use]
    pub fn new(pair: Arc<Pair>, stop: Arc<AtomicBool>, poll: Polling) -> Self {
        Self {
            epoll: Arc::clone(pair.epoll()),
            pulls: pair
                .uplink()
                .is_some_and(|uplink| uplink.readable().is_some()),
            pair,
            stop,
            poll,
            tx_ready: true,
            uplink_ready: true,
            starved: false,
            shares: false,
            since: 0,
        }
    }

    /// Serves the pair until it is told to stop.
    pub fn run(mut self) {
        self.pair.place_worker();
        self.poll.permit(self.pair.may_poll());
        while !self.stop.load(Ordering::Acquire) {
            let timeout = if self.has_work() { 0 } else { -1 };
            self.wait(timeout);
            let found = self.pass(false);
            if self.has_work() {
                continue;
            }
            if found > 0 || self.poll.is_always() {
                self.linger();
                // Kicks are not asked for yet: look before it sleeps.
                self.tx_ready = true;
            } else {
                // Kicks are asked for, and what came before that is found.
                self.tx_ready = true;
                self.pass(true);
            }
        }
    }

    /// Gives frames that follow the last ones a chance to be found without a kick.
    ///
    /// Without polling that is one yield. Where the driver's vCPU shares this CPU, as it does when
    /// each pair stands beside its vCPU, the vCPU goes on and makes more frames meanwhile, instead
    /// of being interrupted for each of them; where nobody waits for this CPU it costs a system
    /// call.
    fn linger(&mut self) {
        if self.poll.is_on() {
            self.spin();
        } else {
            self.give_way();
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
        let mut events = [EpollEvent::default(); Event::ALL.len()];
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
            match Event::of(event.data()) {
                Some(Event::Wake) => self.woken(),
                Some(Event::TxKick) => {
                    self.pair.tx().stats().kicks.add(1);
                    self.tx_ready = true;
                }
                Some(Event::RxKick) => {
                    self.pair.rx().stats().kicks.add(1);
                    self.starved = false;
                }
                Some(Event::Uplink) => self.uplink_ready = self.pulls,
                None => {}
            }
        }
        if count > 0 {
            self.pair.worker_stats().wakeups.add(1);
        }
        self.since = cycles();
    }

    /// Something changed: look at everything once.
    fn woken(&mut self) {
        self.pair.heed_wake();
        self.poll.permit(self.pair.may_poll());
        self.tx_ready = true;
        self.uplink_ready = self.pulls;
        self.starved = false;
    }

    /// A turn for TX and one for RX; says how many frames they found. `sleep_next`: where there are
    /// none, kicks are asked for.
    fn pass(&mut self, sleep_next: bool) -> usize {
        let mut found = 0;
        if self.tx_ready {
            found += self.tx_turn(sleep_next);
        }
        if self.uplink_ready && !self.starved {
            found += self.rx_turn();
        }
        let stats = self.pair.worker_stats();
        let now = cycles();
        if found > 0 {
            stats.busy_cycles.add(now.wrapping_sub(self.since));
            stats.busy_frames.add(u64::try_from(found).unwrap_or(0));
            if self.has_work() {
                stats.over_budget.add(1);
            }
        }
        self.since = now;
        found
    }

    fn tx_turn(&mut self, sleep_next: bool) -> usize {
        let uplink = self.pair.uplink();
        let outcome = self
            .pair
            .tx()
            .turn(&format_args!("{} tx", self.pair), |queue, enabled| {
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
                    call |= sent.call;
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

    fn rx_turn(&mut self) -> usize {
        let Some(uplink) = self.pair.uplink() else {
            self.uplink_ready = false;
            return 0;
        };
        let outcome = self
            .pair
            .rx()
            .turn(&format_args!("{} rx", self.pair), |queue, enabled| {
                if !enabled {
                    return Ok(((0, RxEnd::UplinkEmpty), false));
                }
                let filled = queue.fill(&**uplink, RX_FRAMES, RX_BYTES)?;
                let end = match filled.end {
                    RxEnd::Starved if queue.enable_kicks() => RxEnd::Budget,
                    end => end,
                };
                Ok(((filled.frames, end), filled.call))
            });
        let (found, end) = outcome.unwrap_or_else(|| {
            // There is no ring, or it is quarantined: frames had better go to other pairs.
            self.pair.steer();
            (0, RxEnd::UplinkEmpty)
        });
        match end {
            RxEnd::UplinkEmpty | RxEnd::UplinkFailed => self.uplink_ready = false,
            RxEnd::Starved => {
                self.starved = true;
                self.pair.rx().stats().rx_starved.add(1);
            }
            RxEnd::Budget => {}
        }
        found
    }

    /// Who shares this CPU goes first: the vCPU that makes frames, other workers.
    fn give_way(&mut self) {
        std::thread::yield_now();
        let now = cycles();
        self.shares = now.wrapping_sub(self.since) > ALONE;
        self.since = now;
    }

    /// Looks for frames again and again, without kicks, for as long as that pays.
    fn spin(&mut self) {
        let mut until = self.poll.until();
        let mut looks = 0u32;
        while !self.stop.load(Ordering::Relaxed) {
            // Also between looks that find frames: a busy ring must not hide a kick of the other,
            // or a change of the pair.
            looks = looks.wrapping_add(1);
            if looks.is_multiple_of(LOOKS_PER_WAIT) {
                self.wait(0);
            }
            self.tx_ready = true;
            self.uplink_ready = self.pulls;
            let found = self.pass(false);
            if found > 0 {
                self.pair.worker_stats().busy_polls.add(1);
                self.poll.found(found);
                until = self.poll.until();
                // To be preempted instead would cost as much, at a worse moment: others on this
                // CPU have waited, and their frames too.
                if self.shares {
                    self.give_way();
                }
                continue;
            }
            self.pair.worker_stats().polls.add(1);
            if until.is_none_or(|until| Instant::now() >= until) {
                self.poll.in_vain();
                return;
            }
            self.give_way();
        }
    }
}
