//! The TX path: chains that the guest sends become frames and go to the uplink.

use std::sync::Arc;

use arrayvec::ArrayVec;
use virtionet_ring::memory::GuestMemory;
use virtionet_ring::{Direction, RingError, RingFault};

use crate::header::VnetHeader;
use crate::port::{MAX_BURST, TxFrame, UplinkQueue};
use crate::queue::{DeviceQueue, Queue, QueueConfig, count_fault};

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
    let header_len = queue.features.header_len();
    let mut headers: ArrayVec<Option<VnetHeader>, MAX_BURST> = ArrayVec::new();
    for n in 0..queue.burst.chains().len().min(MAX_BURST) {
        headers.push(parse(queue, n, header_len));
    }
    let mut frames: ArrayVec<TxFrame<'_>, MAX_BURST> = ArrayVec::new();
    let mut bytes = 0;
    for (chain, header) in queue.burst.chains().iter().zip(&headers) {
        if let Some(header) = *header {
            bytes += chain.len();
            frames.push(TxFrame {
                header,
                payload: queue.burst.slices(chain),
                len: chain.len(),
            });
        }
    }
    if !frames.is_empty() {
        uplink.transmit(&frames, &queue.stats);
    }
    bytes
}

/// Takes the header off chain `n` and checks it; `None` (and counted) when the chain is no frame.
#[inline(always)]
fn parse(queue: &mut Queue, n: usize, header_len: usize) -> Option<VnetHeader> {
    let chain = queue.burst.chains()[n];
    if let Some(fault) = chain.fault() {
        count_fault(fault, Direction::Readable, &queue.stats);
        return None;
    }
    let mut header = VnetHeader::default();
    queue.burst.strip(n, &mut header.0[..header_len]);
    let len = chain.len() - header_len.min(chain.len());
    match header.check(len, queue.features) {
        Ok(()) => Some(header),
        Err(fault) => {
            fault.count(&queue.stats);
            None
        }
    }
}

fn wide(n: usize) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}
