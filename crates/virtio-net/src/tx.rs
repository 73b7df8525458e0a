//! The TX path: chains that the guest sends become frames and go to the uplink.

use std::sync::Arc;

use arrayvec::ArrayVec;
use virtionet_virtqueue::memory::GuestMemory;
use virtionet_virtqueue::{Chain, Direction, RingError, RingFault};

use crate::features::Features;
use crate::header::{HEADER_LEN, LEGACY_HEADER_LEN, VnetHeader};
use crate::port::{MAX_BURST, TxFrame, UplinkQueue};
use crate::queue::{DeviceQueue, Queue, QueueConfig, count_fault};
use crate::stats::{RingStats, wide};

/// What one burst did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sent {
    /// Chains taken and given back, good and bad.
    pub chains: usize,
    /// Bytes of Ethernet frames handed to the uplink.
    pub bytes: usize,
    /// The driver wants an interrupt.
    pub call: bool,
}

/// The device's side of a transmitq.
#[derive(Debug)]
pub struct TxQueue(Queue);

impl TxQueue {
    /// Takes one burst and hands its frames to `uplink`, or discards them where there is none (a
    /// started ring that is disabled drains: virtio 1.3 §5.1.2 through vhost-user's ring states).
    /// No chain stays taken. `chains` is 0 when nothing was available.
    ///
    /// # Errors
    /// When the ring can no longer be believed.
    pub fn send(&mut self, uplink: Option<&dyn UplinkQueue>) -> Result<Sent, RingFault> {
        let queue = &mut self.0;
        let chains = queue.ring.take(&mut queue.burst, MAX_BURST)?;
        if chains == 0 {
            return Ok(Sent::default());
        }
        queue.stats.bursts.add(1);
        let bytes = match uplink {
            Some(uplink) => hand_over(queue, uplink),
            None => {
                queue.stats.dropped_disabled.add(wide(chains));
                0
            }
        };
        queue.ring.complete_all(queue.burst.chains());
        queue.burst.clear();
        Ok(Sent {
            chains,
            bytes,
            call: queue.ring.publish(),
        })
    }

    /// Whether chains are available.
    #[must_use]
    pub fn has_more(&self) -> bool {
        self.0.ring.has_more()
    }
}

impl DeviceQueue for TxQueue {
    fn new(config: QueueConfig) -> Result<Self, RingError> {
        Queue::new(config, Direction::Readable).map(Self)
    }

    fn size(&self) -> u16 {
        self.0.ring.size()
    }

    fn rewind(&mut self) -> u32 {
        self.0.rewind()
    }

    fn rebind(&mut self, memory: &Arc<GuestMemory>) -> Result<(), RingError> {
        self.0.rebind(memory)
    }

    fn enable_kicks(&mut self) -> bool {
        self.0.ring.enable_kicks()
    }

    fn disable_kicks(&mut self) {
        self.0.ring.disable_kicks();
    }
}

/// Makes frames of the burst's good chains and transmits them; returns their bytes.
fn hand_over(queue: &mut Queue, uplink: &dyn UplinkQueue) -> usize {
    let mut headers = [VnetHeader::default(); MAX_BURST];
    strip(queue, &mut headers);
    let Queue {
        burst,
        features,
        stats,
        ..
    } = queue;
    let mut frames: ArrayVec<TxFrame<'_>, MAX_BURST> = ArrayVec::new();
    let mut bytes = 0;
    for (chain, header) in burst.chains().iter().zip(&headers) {
        if chain.fault().is_some() || header.check(chain.len(), *features).is_err() {
            count_no_frame(chain, header, *features, stats);
            continue;
        }
        bytes += chain.len();
        // There is room: `headers` has no more places than `frames`.
        let _ = frames.try_push(TxFrame {
            header: *header,
            payload: burst.slices(chain),
            len: chain.len(),
        });
    }
    if !frames.is_empty() {
        uplink.transmit(&frames, stats);
    }
    bytes
}

/// Takes the headers off the chains. The ring refused chains that have none.
#[inline(always)]
fn strip(queue: &mut Queue, headers: &mut [VnetHeader; MAX_BURST]) {
    if queue.features.header_len() == HEADER_LEN {
        let whole = headers.iter_mut().map(|header| &mut header.0);
        queue.burst.strip_all(whole);
        return;
    }
    let mut short = [[0; LEGACY_HEADER_LEN]; MAX_BURST];
    queue.burst.strip_all(short.iter_mut());
    for (header, short) in headers.iter_mut().zip(&short) {
        header.0[..LEGACY_HEADER_LEN].copy_from_slice(short);
    }
}

/// Counts what is wrong with a chain that is no frame.
#[cold]
fn count_no_frame(chain: &Chain, header: &VnetHeader, features: Features, stats: &RingStats) {
    match (chain.fault(), header.check(chain.len(), features)) {
        (Some(fault), _) => count_fault(fault, Direction::Readable, stats),
        (None, Err(fault)) => fault.count(stats),
        (None, Ok(())) => {}
    }
}
