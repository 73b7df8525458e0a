//! The TX path: dequeues chains from the transmitq, checks their headers, and transmits the frames
//! to the uplink.

use std::sync::Arc;

use arrayvec::ArrayVec;
use virtionet_virtqueue::memory::GuestMemory;
use virtionet_virtqueue::{Chain, Direction, VirtqueueError, VirtqueueFault};

use crate::features::Features;
use crate::header::{LEGACY_VNET_HEADER_LEN, VNET_HEADER_LEN, VnetHeader};
use crate::queue::{DeviceQueue, Queue, QueueConfig, count_fault};
use crate::stats::{VringStats, to_u64};
use crate::uplink::{MAX_BURST, TxFrame, UplinkQueue};

/// The outcome of [`TxQueue::send`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TxOutcome {
    /// Chains that were dequeued and completed, with and without a fault.
    pub chains: usize,
    /// The number of bytes of the Ethernet frames that were handed to the uplink.
    pub bytes: usize,
    /// The driver asks for an interrupt.
    pub should_call: bool,
}

/// The device's end of a transmitq.
///
/// # Examples
///
/// A driver transmits a frame, and the device drains the ring:
///
/// ```
/// use std::sync::Arc;
///
/// use virtionet_guest::header::NetHeader;
/// use virtionet_guest::memory::GuestRam;
/// use virtionet_guest::net::{DriverQueueConfig, MODERN};
/// use virtionet_guest::tx::DriverTxQueue;
/// use virtionet_virtio_net::features::Features;
/// use virtionet_virtio_net::{DeviceQueue, QueueConfig, TxQueue};
/// use virtionet_virtqueue::VirtqueueLayout;
///
/// let ram = GuestRam::new(1 << 20)?;
/// let mut driver = DriverTxQueue::new(&ram, &DriverQueueConfig::new(64, MODERN))?;
/// driver.queue(&NetHeader::default(), &[0; 60])?;
/// driver.flush()?;
///
/// let ring = driver.queue.setup()?;
/// let user_addr = |addr| ram.user_addr(addr).ok_or("outside of guest memory");
/// let mut device = TxQueue::new(QueueConfig {
///     layout: VirtqueueLayout {
///         size: ring.size,
///         desc: user_addr(ring.addresses.descriptors)?,
///         avail: user_addr(ring.addresses.driver)?,
///         used: user_addr(ring.addresses.device)?,
///     },
///     base: ring.base,
///     features: Features(MODERN),
///     memory: Arc::new(ram.guest_memory()?),
///     stats: Arc::default(),
/// })?;
///
/// let outcome = device.send(None)?;
/// assert_eq!(outcome.chains, 1);
/// assert_eq!(driver.reclaim()?, 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct TxQueue(Queue);

impl TxQueue {
    /// Dequeues one burst and transmits its frames to `uplink`, or drops them where there is none
    /// (a ring that is started but disabled drains, as the vhost-user protocol's ring states
    /// demand). It completes all chains. `chains` is 0 when none was available.
    ///
    /// # Errors
    /// When the ring is faulty and must be quarantined.
    pub fn send(&mut self, uplink: Option<&dyn UplinkQueue>) -> Result<TxOutcome, VirtqueueFault> {
        let queue = &mut self.0;
        let chains = queue.virtqueue.dequeue(&mut queue.burst, MAX_BURST)?;
        if chains == 0 {
            return Ok(TxOutcome::default());
        }
        queue.stats.bursts.add(1);
        let bytes = match uplink {
            Some(uplink) => transmit_burst(queue, uplink),
            None => {
                queue.stats.dropped_disabled.add(to_u64(chains));
                0
            }
        };
        queue.virtqueue.complete_all(queue.burst.chains());
        queue.burst.clear();
        Ok(TxOutcome {
            chains,
            bytes,
            should_call: queue.virtqueue.publish(),
        })
    }

    /// Whether chains are available.
    #[must_use]
    pub fn has_more(&self) -> bool {
        self.0.virtqueue.has_more()
    }
}

impl DeviceQueue for TxQueue {
    fn new(config: QueueConfig) -> Result<Self, VirtqueueError> {
        Queue::new(config, Direction::Readable).map(Self)
    }

    fn size(&self) -> u16 {
        self.0.virtqueue.size()
    }

    fn corrected_base(&self) -> Option<u32> {
        self.0.virtqueue.corrected_base()
    }

    fn memory(&self) -> &GuestMemory {
        self.0.burst.memory()
    }

    fn rewind(&mut self) -> u32 {
        self.0.rewind()
    }

    fn rebind(&mut self, memory: &Arc<GuestMemory>) -> Result<(), VirtqueueError> {
        self.0.rebind(memory)
    }

    fn enable_kicks(&mut self) -> bool {
        self.0.virtqueue.enable_kicks()
    }

    fn disable_kicks(&mut self) {
        self.0.virtqueue.disable_kicks();
    }
}

/// Transmits the frames of the burst's valid chains; returns their bytes.
fn transmit_burst(queue: &mut Queue, uplink: &dyn UplinkQueue) -> usize {
    let mut headers = [VnetHeader::default(); MAX_BURST];
    strip_headers(queue, &mut headers);
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
            count_invalid_chain(chain, header, *features, stats);
            continue;
        }
        bytes += chain.len();
        // It cannot be full: `headers` has as many entries as `frames`.
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

/// Strips the headers off the chains. The virtqueue has marked chains without a whole header as
/// faulty.
#[inline(always)]
fn strip_headers(queue: &mut Queue, headers: &mut [VnetHeader; MAX_BURST]) {
    if queue.features.header_len() == VNET_HEADER_LEN {
        let whole = headers.iter_mut().map(|header| &mut header.0);
        queue.burst.strip_all(whole);
        return;
    }
    let mut short = [[0; LEGACY_VNET_HEADER_LEN]; MAX_BURST];
    queue.burst.strip_all(short.iter_mut());
    for (header, short) in headers.iter_mut().zip(&short) {
        header.0[..LEGACY_VNET_HEADER_LEN].copy_from_slice(short);
    }
}

/// Counts the fault of a chain that is not a valid frame.
#[cold]
fn count_invalid_chain(chain: &Chain, header: &VnetHeader, features: Features, stats: &VringStats) {
    match (chain.fault(), header.check(chain.len(), features)) {
        (Some(fault), _) => count_fault(fault, Direction::Readable, stats),
        (None, Err(fault)) => fault.count(stats),
        (None, Ok(())) => {}
    }
}
