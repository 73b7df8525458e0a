//! How a worker serves one queue pair: a turn for TX, a turn for RX, and the state that they need.

use std::sync::Arc;

use virtionet_virtio_net::stats::to_u64;
use virtionet_virtio_net::uplink::UplinkQueue;
use virtionet_virtio_net::{DeviceQueue, RxEndReason, RxQueue};

use crate::frame_inbox::OwnFrame;
use crate::queue_pair::QueuePair;
use crate::sys::read_cycles;
use crate::worker_event::PairEvent;

/// A TX turn ends, and an RX turn follows it, after this many chains or the burst in which this many
/// cycles have passed: 0.2 to 0.4 ms on CPUs of 2 to 4 GHz. What a burst costs at most is limited in
/// [`TxQueue::send`](virtionet_virtio_net::TxQueue::send).
const TX_CHAINS: usize = 256;
const TX_CYCLES: u64 = 800_000;
/// Polls without a frame after which a pair of a busy-polling worker is not polled any more, if the
/// worker has others: some milliseconds on a worker that is idle otherwise.
const MAX_IDLE_POLLS: u32 = 16_384;
/// The budget of one RX turn.
const RX_FRAMES: usize = 64;
const RX_BYTES: usize = 1 << 20;

/// A queue pair, and its readiness as its worker knows it.
#[derive(Debug)]
pub struct PairService {
    pair: Arc<QueuePair>,
    /// The pair's queue of the uplink.
    uplink: Option<Arc<dyn UplinkQueue>>,
    /// Whether the worker must poll the uplink for frames; a switch pushes them instead.
    is_pull_uplink: bool,
    /// Whether chains may be available for TX.
    tx_ready: bool,
    /// Whether a frame may wait in the uplink.
    uplink_ready: bool,
    /// Whether the guest has no RX buffers. A kick comes when it adds some.
    starved: bool,
    /// Whether more frames may wait in the inbox.
    inbox_ready: bool,
    /// Polls since the last frame.
    idle_polls: u32,
    /// Whether the transmitq was found empty in a turn that did not ask for kicks.
    is_tx_without_kicks: bool,
    /// Whether the worker serves other queue pairs, too.
    is_shared: bool,
}

impl PairService {
    /// The service of `pair`, whose uplink must be open. With `is_shared`, the worker also serves queue
    /// pairs of other devices.
    #[must_use]
    pub fn new(pair: Arc<QueuePair>, is_shared: bool) -> Self {
        let uplink = pair.uplink();
        Self {
            is_pull_uplink: uplink
                .as_ref()
                .is_some_and(|uplink| uplink.poll_fd().is_some()),
            uplink,
            pair,
            tx_ready: true,
            uplink_ready: true,
            starved: false,
            inbox_ready: false,
            idle_polls: 0,
            is_tx_without_kicks: false,
            is_shared,
        }
    }

    /// The queue pair.
    #[must_use]
    pub fn pair(&self) -> &QueuePair {
        &self.pair
    }

    /// Whether the next pass has work to do.
    #[inline]
    #[must_use]
    pub fn has_work(&self) -> bool {
        self.tx_ready || (self.uplink_ready && !self.starved) || self.inbox_ready
    }

    /// Whether a pass over the queue pair can do anything.
    #[inline]
    #[must_use]
    pub fn needs_pass(&self) -> bool {
        self.has_work() || self.pair.inbox().is_open()
    }

    /// Makes the next pass of a busy-polling worker that serves several queue pairs poll this one,
    /// unless the last `MAX_IDLE_POLLS` have found no frame. Then the next passes ask for kicks, and
    /// one of those brings it back.
    #[inline]
    pub fn poll_unless_idle(&mut self) {
        if self.idle_polls < MAX_IDLE_POLLS || self.must_be_polled() {
            self.poll_all();
            self.idle_polls = self.idle_polls.saturating_add(1);
        }
    }

    /// Updates the readiness after an event.
    pub fn handle(&mut self, event: PairEvent) {
        match event {
            PairEvent::TxKick => {
                self.pair.tx().stats().kicks.add(1);
                self.tx_ready = true;
            }
            PairEvent::RxKick => {
                self.pair.rx().stats().kicks.add(1);
                self.starved = false;
            }
            PairEvent::UplinkReadable => self.uplink_ready = self.is_pull_uplink,
        }
    }

    /// Records that anything may have changed. The worker's earlier attach or detach of the uplink
    /// may have overtaken the session's, so it is repeated. A worker that is shared leaves that to the
    /// session, because the kernel takes milliseconds for it, in which other guests would wait.
    pub fn handle_wake(&mut self) {
        if !self.is_shared {
            self.pair.reconcile_uplink();
        }
        self.announce();
        self.poll_all();
        self.starved = false;
        self.prepare_rx();
    }

    /// Reserves buffers of a receiveq to which frames are pushed, so that their translations are
    /// known then. Frames of an uplink that is polled wait there instead.
    fn prepare_rx(&self) {
        if self.is_pull_uplink {
            return;
        }
        let prepare = |queue: &mut RxQueue, enabled| match enabled {
            true => queue.prepare().map(|call| ((), call)),
            false => Ok(((), false)),
        };
        self.pair.rx().process(prepare);
    }

    /// Sends the announcement that is due, as soon as the transmitq runs and is enabled.
    fn announce(&self) {
        self.pair.try_announcement(|mac| {
            let sent = self.pair.tx().process(|queue, enabled| {
                let uplink = self.uplink.as_deref().filter(|_| enabled);
                if let Some(uplink) = uplink {
                    queue.announce(mac, uplink);
                }
                Ok((uplink.is_some(), false))
            });
            sent == Some(true)
        });
    }

    /// Whether a vring must be polled from time to time: it has no kick descriptor, or waits for a
    /// translation that may never come.
    #[must_use]
    pub fn must_be_polled(&self) -> bool {
        self.pair.tx().must_be_polled() || self.pair.rx().must_be_polled()
    }

    /// Notes that the vrings that must be polled may have new chains.
    pub fn poll_without_kick(&mut self) {
        self.tx_ready |= self.pair.tx().must_be_polled();
        self.starved &= !self.pair.rx().must_be_polled();
        if self.pair.rx().waits_for_translation() {
            self.uplink_ready = self.is_pull_uplink;
            self.prepare_rx();
        }
    }

    /// Makes the next pass poll the transmitq.
    #[inline]
    pub fn poll_tx(&mut self) {
        self.tx_ready = true;
    }

    /// Makes the next pass poll the transmitq if no kick would come for new chains.
    #[inline]
    pub fn poll_tx_without_kicks(&mut self) {
        self.tx_ready |= self.is_tx_without_kicks;
    }

    /// Makes the next pass poll the transmitq and the uplink.
    #[inline]
    pub fn poll_all(&mut self) {
        self.tx_ready = true;
        self.uplink_ready = self.is_pull_uplink;
    }

    /// Runs a turn for TX and one for RX. Returns how many frames they found. With `sleep_next`, a
    /// turn that finds no frame asks the driver for kicks.
    pub fn run_pass(&mut self, sleep_next: bool) -> usize {
        let mut found = 0;
        // Nobody polls it after this pass.
        let sleep_next = sleep_next || self.idle_polls >= MAX_IDLE_POLLS;
        if self.tx_ready {
            found += self.process_tx(sleep_next);
        }
        if self.uplink_ready && !self.starved {
            found += self.process_rx();
        }
        match self.pair.inbox().is_open() {
            true => found += self.process_inbox(),
            false => self.inbox_ready = false,
        }
        if found > 0 {
            self.idle_polls = 0;
        }
        found
    }

    /// Pushes frames that other workers left, because only this one may wait for pages of the guest's
    /// memory. Each of them has woken this worker.
    #[cold]
    fn process_inbox(&mut self) -> usize {
        let (inbox, rx) = (self.pair.inbox(), self.pair.rx());
        let mut frames = inbox.take();
        self.inbox_ready = !frames.is_empty();
        let count = frames.len();
        let is_done = rx.process(|queue, enabled| {
            if !enabled {
                rx.stats().dropped_disabled.add(to_u64(count));
                return Ok(((), false));
            }
            let should_call = match frames.is_empty() {
                true => false,
                false => OwnFrame::with_all(&mut frames, |frames| queue.push(frames))?.should_call,
            };
            if !queue.memory().is_in_postcopy() {
                inbox.close_if_empty();
            }
            Ok(((), should_call))
        });
        if is_done.is_none() {
            rx.stats().dropped_postcopy.add_shared(to_u64(count));
        }
        count
    }

    fn process_tx(&mut self, sleep_next: bool) -> usize {
        let uplink = self.uplink.as_deref();
        let outcome = self.pair.tx().process(|queue, enabled| {
            let uplink = uplink.filter(|_| enabled);
            queue.disable_kicks();
            let (mut chains, mut call) = (0, false);
            let start = read_cycles();
            let more = loop {
                let sent = match queue.send(uplink) {
                    Ok(sent) => sent,
                    // Report what was sent before the fault; the next turn finds the fault
                    // again.
                    Err(_) if chains > 0 => break true,
                    Err(fault) => return Err(fault),
                };
                chains += sent.chains;
                call |= sent.should_call;
                if chains >= TX_CHAINS || read_cycles().wrapping_sub(start) >= TX_CYCLES {
                    break true;
                }
                // Kicks would not help a queue that waits for a translation.
                if sent.chains == 0
                    && (queue.waits_for_translation() || !(sleep_next && queue.enable_kicks()))
                {
                    break false;
                }
            };
            Ok(((chains, more), call))
        });
        // A vring that does not run brings a wake-up when it does.
        self.is_tx_without_kicks = !sleep_next && outcome.is_some();
        let (found, more) = outcome.unwrap_or_default();
        self.tx_ready = more;
        found
    }

    fn process_rx(&mut self) -> usize {
        let Some(uplink) = self.uplink.as_deref() else {
            self.uplink_ready = false;
            return 0;
        };
        let outcome = self.pair.rx().process(|queue, enabled| {
            if !enabled {
                return Ok(((0, RxEndReason::UplinkEmpty), false));
            }
            // Asked for only while the guest has no buffers.
            queue.disable_kicks();
            let received = queue.receive(uplink, RX_FRAMES, RX_BYTES)?;
            let end = match received.end {
                RxEndReason::Starved if queue.enable_kicks() => RxEndReason::Budget,
                end => end,
            };
            Ok(((received.frames, end), received.should_call))
        });
        let (found, end) = outcome.unwrap_or_else(|| {
            // The receiveq does not run, so frames should go to other queue pairs.
            self.pair.reconcile_uplink();
            (0, RxEndReason::UplinkEmpty)
        });
        match end {
            RxEndReason::UplinkEmpty | RxEndReason::UplinkFailed => self.uplink_ready = false,
            RxEndReason::Starved => {
                self.starved = true;
                self.pair.rx().stats().rx_starved.add(1);
            }
            // The worker is woken when the translation comes.
            RxEndReason::Untranslated => self.starved = true,
            RxEndReason::Budget => {}
        }
        found
    }
}
