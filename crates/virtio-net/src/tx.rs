//! The TX path: dequeues chains from the transmitq, checks their headers, and transmits the frames
//! to the uplink.

mod singles;

use std::sync::Arc;

use arrayvec::ArrayVec;
use virtionet_virtqueue::memory::{GuestMemory, GuestSlice};
use virtionet_virtqueue::{Burst, Chain, Direction, Virtqueue, VirtqueueError, VirtqueueFault};

use self::singles::send_singles;
use crate::announcement::announcement;
use crate::features::Features;
use crate::header::{LEGACY_VNET_HEADER_LEN, VNET_HEADER_LEN, VnetHeader};
use crate::offload::conversion_work;
use crate::queue::{DeviceQueue, Queue, QueueConfig, count_fault};
use crate::stats::{VringStats, to_u64};
use crate::uplink::{MAX_BURST, TxFrame, UplinkQueue};

/// What the frames of one burst may cost, as a number of bytes that can be copied in the same time:
/// some hundred microseconds.
pub const BURST_WORK: usize = 512 << 10;
/// The bytes of a burst up to which it is within [`BURST_WORK`] without a look at each frame. No
/// burst of 1,514-byte frames is longer. They can become some 4,700 segments.
const CHEAP_BURST_BYTES: usize = 128 << 10;

/// The outcome of [`TxQueue::send`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TxOutcome {
    /// Chains that were completed, with and without a fault.
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
///     record: None,
/// })?;
///
/// let outcome = device.send(None)?;
/// assert_eq!(outcome.chains, 1);
/// assert_eq!(driver.reclaim()?, 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct TxQueue {
    queue: Queue,
    /// The most chains to dequeue: fewer than [`MAX_BURST`] while frames are expensive, so that few
    /// must be rewound.
    burst_limit: usize,
}

impl TxQueue {
    /// Dequeues one burst and transmits its frames to `uplink`, or drops them where there is none
    /// (a ring that is started but disabled drains, as the vhost-user protocol's ring states
    /// demand). It completes the chains of these frames. `chains` is 0 when none was available.
    ///
    /// The frames of a burst of more than 128 KiB cost at most [`BURST_WORK`], or there is only one;
    /// chains beyond that stay available.
    ///
    /// # Errors
    /// When the ring is faulty and must be quarantined.
    pub fn send(&mut self, uplink: Option<&dyn UplinkQueue>) -> Result<TxOutcome, VirtqueueFault> {
        if let Some(uplink) = uplink
            && self.burst_limit == MAX_BURST
            && let Some(sent) = send_singles(&mut self.queue, uplink)
        {
            return Ok(sent);
        }
        self.send_chains(uplink)
    }

    /// The same for chains of any form.
    #[inline(never)]
    fn send_chains(
        &mut self,
        uplink: Option<&dyn UplinkQueue>,
    ) -> Result<TxOutcome, VirtqueueFault> {
        let queue = &mut self.queue;
        let dequeued = queue
            .virtqueue
            .dequeue(&mut queue.burst, self.burst_limit)?;
        if dequeued == 0 {
            return Ok(TxOutcome::default());
        }
        queue.stats.bursts.add(1);
        let outcome = match uplink {
            Some(uplink) => transmit_burst(queue, uplink, self.burst_limit < MAX_BURST),
            None => {
                queue.stats.dropped_disabled.add(to_u64(dequeued));
                queue.virtqueue.complete_all(queue.burst.chains());
                TxOutcome {
                    chains: dequeued,
                    bytes: 0,
                    should_call: queue.virtqueue.publish(),
                }
            }
        };
        if outcome.chains < dequeued || self.burst_limit < MAX_BURST {
            self.adapt_burst_limit(outcome.chains, dequeued);
        }
        self.queue.burst.clear();
        Ok(outcome)
    }

    /// Rewinds the chains that the last burst had no budget for.
    #[cold]
    fn adapt_burst_limit(&mut self, chains: usize, dequeued: usize) {
        if chains < dequeued {
            self.queue.burst.retire(chains);
            self.queue.rewind();
            self.burst_limit = chains.max(1);
        } else if dequeued == self.burst_limit {
            self.burst_limit = (2 * self.burst_limit).min(MAX_BURST);
        }
    }

    /// Transmits a frame with which the guest's switches learn where its address `mac` is now, as if
    /// the guest had sent it. It is counted as the guest's frames are.
    pub fn announce(&self, mac: [u8; 6], uplink: &dyn UplinkQueue) {
        let mut bytes = announcement(mac);
        let frame = TxFrame {
            header: VnetHeader::default(),
            len: bytes.len(),
            payload: &[GuestSlice::from_private(&mut bytes)],
        };
        uplink.transmit(&[frame], &self.queue.stats);
    }

    /// Whether chains are available.
    #[must_use]
    pub fn has_more(&self) -> bool {
        self.queue.virtqueue.has_more()
    }
}

impl DeviceQueue for TxQueue {
    fn new(config: QueueConfig) -> Result<Self, VirtqueueError> {
        Ok(Self {
            queue: Queue::new(config, Direction::Readable)?,
            burst_limit: MAX_BURST,
        })
    }

    fn virtqueue(&self) -> &Virtqueue {
        &self.queue.virtqueue
    }

    fn burst(&self) -> &Burst {
        &self.queue.burst
    }

    fn forget_translations(&mut self) {
        self.queue.forget_translations();
    }

    fn rewind(&mut self) -> u32 {
        self.queue.rewind()
    }

    fn rebind(&mut self, memory: &Arc<GuestMemory>) -> Result<(), VirtqueueError> {
        self.queue.rebind(memory)
    }

    fn set_used_log(&mut self, used_log: Option<u64>) {
        self.queue.set_used_log(used_log);
    }

    fn enable_kicks(&mut self) -> bool {
        self.queue.virtqueue.enable_kicks()
    }

    fn disable_kicks(&mut self) {
        self.queue.virtqueue.disable_kicks();
    }
}

/// Transmits the frames of the burst's valid chains, and completes and publishes the chains that it is
/// done with. With `is_expensive` it looks at the cost of each frame, even if the burst has few bytes.
fn transmit_burst(queue: &mut Queue, uplink: &dyn UplinkQueue, is_expensive: bool) -> TxOutcome {
    let mut headers = [VnetHeader::default(); MAX_BURST];
    strip_headers(queue, &mut headers);
    let Queue {
        virtqueue,
        burst,
        features,
        stats,
        ..
    } = queue;
    let mut frames: ArrayVec<TxFrame<'_>, MAX_BURST> = ArrayVec::new();
    let chains = burst.chains();
    let mut bytes = 0;
    for (chain, header) in chains.iter().zip(&headers) {
        if chain.fault().is_some() || header.check(chain.len(), *features).is_err() {
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
    if bytes > CHEAP_BURST_BYTES || is_expensive {
        frames.truncate(count_within_work(&frames));
        bytes = frames.iter().map(|frame| frame.len).sum();
    }
    let done = match frames.len() == chains.len() {
        true => chains.len(),
        false => count_invalid_chains(chains, &headers, *features, frames.len(), stats),
    };
    let mut release = || {
        virtqueue.complete_all(&chains[..done]);
        virtqueue.publish()
    };
    let should_call = match burst.memory().is_in_postcopy() {
        false => transmit_releasing(&frames, uplink, stats, release),
        true => {
            if !frames.is_empty() {
                transmit_copies(&frames, uplink, stats);
            }
            release()
        }
    };
    TxOutcome {
        chains: done,
        bytes,
        should_call,
    }
}

/// Transmits `frames`, and calls `release`, which gives their buffers back to the driver, once: when
/// the uplink says so, or afterwards. Returns its result.
#[inline(always)]
fn transmit_releasing(
    frames: &[TxFrame<'_>],
    uplink: &dyn UplinkQueue,
    stats: &VringStats,
    mut release: impl FnMut() -> bool,
) -> bool {
    let mut should_call = None;
    if !frames.is_empty() {
        uplink.transmit_releasing(frames, stats, &mut || {
            should_call.get_or_insert_with(&mut release);
        });
    }
    match should_call {
        Some(should_call) => should_call,
        None => release(),
    }
}

/// Transmits copies of frames in guest memory of which pages may be missing. Only this vring waits
/// for these pages: the uplink may hold another guest's vring, or give the frame to a system call.
#[cold]
fn transmit_copies(frames: &[TxFrame<'_>], uplink: &dyn UplinkQueue, stats: &VringStats) {
    let mut copies: Vec<Vec<u8>> = frames.iter().map(TxFrame::copy_bytes).collect();
    let payloads: Vec<[GuestSlice<'_>; 1]> = copies
        .iter_mut()
        .map(|copy| [GuestSlice::from_private(copy)])
        .collect();
    let frames: Vec<TxFrame<'_>> = frames
        .iter()
        .zip(&payloads)
        .map(|(frame, payload)| TxFrame { payload, ..*frame })
        .collect();
    uplink.transmit(&frames, stats);
}

/// The number of the first frames that cost [`BURST_WORK`] together, or of one that costs more.
fn count_within_work(frames: &[TxFrame<'_>]) -> usize {
    let mut work = 0;
    let within = frames.iter().take_while(|frame| {
        // The uplink may have to convert it.
        work += conversion_work(frame);
        work <= BURST_WORK
    });
    within.count().max(1)
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

/// Counts the faults of the chains that are no valid frames, up to the first valid one that follows
/// `sent` valid ones; returns the number of chains in front of that one.
#[cold]
fn count_invalid_chains(
    chains: &[Chain],
    headers: &[VnetHeader],
    features: Features,
    sent: usize,
    stats: &VringStats,
) -> usize {
    let mut valid = 0;
    for (n, (chain, header)) in chains.iter().zip(headers).enumerate() {
        match (chain.fault(), header.check(chain.len(), features)) {
            (Some(fault), _) => count_fault(fault, Direction::Readable, stats),
            (None, Err(fault)) => fault.count(stats),
            (None, Ok(())) if valid == sent => return n,
            (None, Ok(())) => valid += 1,
        }
    }
    chains.len()
}
