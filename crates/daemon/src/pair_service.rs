//! How a worker serves one queue pair: a turn for TX, a turn for RX, and what they depend on.

use std::sync::Arc;

use virtionet_virtio_net::{DeviceQueue, RxEndReason};

use crate::queue_pair::QueuePair;
use crate::worker_event::PairEvent;

/// Budget of one TX turn, after which RX has its own: about 1 ms at most, whatever is sent.
const TX_CHAINS: usize = 256;
const TX_BYTES: usize = 1 << 20;
/// Budget of one RX turn.
const RX_FRAMES: usize = 64;
const RX_BYTES: usize = 1 << 20;

/// A queue pair with what its worker knows of its readiness.
#[derive(Debug)]
pub struct PairService {
    pair: Arc<QueuePair>,
    /// The worker must ask the uplink for frames; a switch pushes them instead.
    is_pull_uplink: bool,
    /// Chains may be available for TX.
    tx_ready: bool,
    /// A frame may wait in the uplink.
    uplink_ready: bool,
    /// The guest has no RX buffers, and a kick will come when it has.
    starved: bool,
}

impl PairService {
    /// The service of `pair`, whose uplink is open.
    #[must_use]
    pub fn new(pair: Arc<QueuePair>) -> Self {
        Self {
            is_pull_uplink: pair
                .uplink()
                .is_some_and(|uplink| uplink.poll_fd().is_some()),
            pair,
            tx_ready: true,
            uplink_ready: true,
            starved: false,
        }
    }

    /// The queue pair.
    #[must_use]
    pub fn pair(&self) -> &QueuePair {
        &self.pair
    }

    /// Whether a pass has something to do.
    #[inline]
    #[must_use]
    pub fn has_work(&self) -> bool {
        self.tx_ready || (self.uplink_ready && !self.starved)
    }

    /// Notes what an event means.
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

    /// Notes that anything may have changed. The worker's earlier attach or detach of the uplink
    /// may have overtaken the session's, so it is repeated.
    pub fn handle_wake(&mut self) {
        self.pair.reconcile_uplink();
        self.poll_all();
        self.starved = false;
    }

    /// Makes the next pass ask for TX chains.
    #[inline]
    pub fn poll_tx(&mut self) {
        self.tx_ready = true;
    }

    /// Makes the next pass ask for TX chains and for frames of the uplink.
    #[inline]
    pub fn poll_all(&mut self) {
        self.tx_ready = true;
        self.uplink_ready = self.is_pull_uplink;
    }

    /// A turn for TX and one for RX; the result is how many frames they found. With `sleep_next`,
    /// the turn asks the driver for kicks where it found none.
    pub fn run_pass(&mut self, sleep_next: bool) -> usize {
        let mut found = 0;
        if self.tx_ready {
            found += self.process_tx(sleep_next);
        }
        if self.uplink_ready && !self.starved {
            found += self.process_rx();
        }
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
                            // Report what was sent before; the next turn meets the fault again.
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
            // The receiveq does not run: frames should go to other queue pairs.
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
}
