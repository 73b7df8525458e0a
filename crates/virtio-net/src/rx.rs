//! The RX path: reads the frames that wait in the uplink into the guest's buffers.
//!
//! Buffers are *reserved* for the longest frame that may arrive, the frame is read into them, and
//! its length decides how many of them it used (virtio 1.3 §5.1.6.4). The others stay reserved for
//! the next frame and are rewound when the ring stops.

mod push;

use std::sync::Arc;

pub use push::PushOutcome;

use memmap2::MmapMut;
use virtionet_virtqueue::memory::{GuestMemory, GuestSlice};
use virtionet_virtqueue::{Burst, Direction, Virtqueue, VirtqueueError, VirtqueueFault};

use crate::header::{MAX_FRAME, VNET_HEADER_LEN};
use crate::queue::{DeviceQueue, Queue, QueueConfig, count_fault};
use crate::stats::to_u64;
use crate::uplink::{MAX_RECEIVE_BUFFERS, Received, UplinkQueue};

/// The most segments of one frame: as many as one `readv` accepts, except for a few that the uplink
/// itself needs.
const MAX_SEGMENTS: usize = 1000;
/// The length above which a frame is large: copying it then costs more than it saves.
const LARGE_FRAME_LEN: usize = 4096;
/// The fewest chains that are dequeued at once, even where fewer are missing: reading the available
/// index costs as much as several chains.
const MIN_DEQUEUE: usize = 16;
/// The number of frames after a large one among which another large one is expected.
const DIRECT_READ_FRAMES: u32 = 64;
/// The number of descriptors after which one call of [`RxQueue::receive`] or [`RxQueue::push`]
/// dequeues no more chains, so that a guest's chains cannot keep the worker busy for long. 64 frames
/// of 64 KiB need 2,816 buffers of 1,526 bytes.
const DESCRIPTOR_BUDGET: usize = 4 * 1024;
/// The offset of `num_buffers` in the header.
const NUM_BUFFERS_OFFSET: usize = 10;

/// Why a call of [`RxQueue::receive`] ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RxEndReason {
    /// The uplink has no more frames.
    UplinkEmpty,
    /// The guest has no more buffers; frames may wait in the uplink.
    Starved,
    /// The next buffers cannot be used yet, because the translation of an address is missing; frames
    /// may wait in the uplink.
    Untranslated,
    /// The budget is used up; there may be more frames.
    Budget,
    /// The uplink failed.
    UplinkFailed,
}

/// The outcome of [`RxQueue::receive`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RxOutcome {
    /// Frames that the uplink had, including those that were dropped.
    pub frames: usize,
    /// The number of bytes of the frames that the guest received, without headers.
    pub bytes: usize,
    /// The driver asks for an interrupt.
    pub should_call: bool,
    /// Why the call ended.
    pub end: RxEndReason,
}

/// The device's end of a receiveq.
///
/// # Examples
///
/// A frame is pushed to a guest, as a switch does it:
///
/// ```
/// use std::sync::Arc;
///
/// use virtionet_guest::memory::GuestRam;
/// use virtionet_guest::net::{DriverQueueConfig, MODERN};
/// use virtionet_guest::rx::DriverRxQueue;
/// use virtionet_virtio_net::features::Features;
/// use virtionet_virtio_net::header::VnetHeader;
/// use virtionet_virtio_net::uplink::TxFrame;
/// use virtionet_virtio_net::{DeviceQueue, QueueConfig, RxQueue};
/// use virtionet_virtqueue::VirtqueueLayout;
/// use virtionet_virtqueue::memory::GuestSlice;
///
/// let ram = GuestRam::new(1 << 20)?;
/// let mut driver = DriverRxQueue::new(&ram, &DriverQueueConfig::new(64, MODERN))?;
/// driver.fill()?;
///
/// let ring = driver.queue.setup()?;
/// let user_addr = |addr| ram.user_addr(addr).ok_or("outside of guest memory");
/// let mut device = RxQueue::new(QueueConfig {
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
/// let mut bytes = [7; 60];
/// let frame = TxFrame {
///     header: VnetHeader::default(),
///     payload: &[GuestSlice::from_private(&mut bytes)],
///     len: 60,
/// };
/// assert_eq!(device.push(&[frame])?.frames, 1);
/// assert_eq!(driver.receive_frames()?[0].bytes, [7; 60]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct RxQueue {
    queue: Queue,
    /// The total length of the reserved chains.
    capacity: usize,
    /// The number of bytes to reserve for a frame.
    required: usize,
    /// The bounce buffer, for small frames and for the part of a frame that does not fit into the
    /// guest's buffers. It is a mapping, so that pages that were never used take no memory.
    bounce: Option<MmapMut>,
    /// The number of further frames that are read directly into the guest's buffers.
    direct_reads_left: u32,
}

impl RxQueue {
    /// Reads frames from `uplink` into the guest's buffers until the uplink has no more frames, the
    /// guest has no more buffers, or `max_frames` or `max_bytes` is reached. The used index is
    /// published once, at the end.
    ///
    /// # Errors
    /// When the ring is faulty and must be quarantined.
    pub fn receive(
        &mut self,
        uplink: &dyn UplinkQueue,
        max_frames: usize,
        max_bytes: usize,
    ) -> Result<RxOutcome, VirtqueueFault> {
        // Two copies of the code, so that a frame pays nothing for a log that is not there.
        match self.queue.burst.memory().is_logging() {
            false => self.receive_frames::<false>(uplink, max_frames, max_bytes),
            true => self.receive_frames::<true>(uplink, max_frames, max_bytes),
        }
    }

    /// The same, with or without a log of what is written.
    fn receive_frames<const LOG: bool>(
        &mut self,
        uplink: &dyn UplinkQueue,
        max_frames: usize,
        max_bytes: usize,
    ) -> Result<RxOutcome, VirtqueueFault> {
        let mut frames = 0;
        let mut bytes = 0;
        self.queue.burst.reset_descriptors_read();
        let end = loop {
            if frames >= max_frames || bytes >= max_bytes {
                break RxEndReason::Budget;
            }
            match self.reserve() {
                Ok(Reserved::Enough) => {}
                Ok(Reserved::TooLittle) => break RxEndReason::Starved,
                Ok(Reserved::OverBudget) => break RxEndReason::Budget,
                Ok(Reserved::Untranslated) => break RxEndReason::Untranslated,
                // Publish the completed chains first; the next call finds the fault again.
                Err(_) if self.queue.virtqueue.has_unpublished() => break RxEndReason::Budget,
                Err(fault) => return Err(fault),
            }
            let received = self.receive_frame(uplink);
            if LOG && matches!(received, Received::TooLong | Received::Lost) {
                // Part of the frame may be in any of the buffers.
                self.log_written(usize::MAX);
            }
            match received {
                Received::Frame(len) => bytes += self.commit::<LOG>(len),
                Received::TooLong => self.count_too_long(),
                Received::Lost => self.queue.stats.dropped_uplink_error.add(1),
                Received::Empty => break RxEndReason::UplinkEmpty,
                Received::Failed => break RxEndReason::UplinkFailed,
            }
            // Lost frames count as well, because dropping is work.
            frames += 1;
        };
        if frames > 0 {
            self.queue.stats.bursts.add(1);
        }
        Ok(RxOutcome {
            frames,
            bytes,
            should_call: self.queue.virtqueue.publish(),
            end,
        })
    }

    /// Dequeues chains until they can hold the longest frame.
    ///
    /// A guest that is behind adds buffers later, so the frame waits in the uplink instead of being
    /// truncated. But a driver may refill only when about half of its ring is empty: once half of
    /// the ring is reserved, use what is reserved (the ring is too small for a frame of 64 KiB).
    fn reserve(&mut self) -> Result<Reserved, VirtqueueFault> {
        self.complete_leading_faults();
        while self.capacity < self.required {
            let segments = free_slices(&self.queue).len();
            if segments >= MAX_SEGMENTS / 2 {
                return Ok(Reserved::Enough);
            }
            if !self.can_dequeue() {
                return Ok(Reserved::OverBudget);
            }
            let dequeued = self.dequeue_missing(segments)?;
            self.complete_leading_faults();
            if dequeued == 0 {
                // A chain occupies at least one descriptor, and more where its buffer has more
                // segments.
                let ours = self.queue.burst.chains().len().max(segments);
                return Ok(
                    match ours > 0 && ours >= usize::from(self.queue.virtqueue.size()) / 2 {
                        true => Reserved::Enough,
                        false if self.queue.burst.waits_for_translation() => Reserved::Untranslated,
                        false => Reserved::TooLittle,
                    },
                );
            }
        }
        Ok(Reserved::Enough)
    }

    /// Whether this call may still read descriptors.
    fn can_dequeue(&self) -> bool {
        self.queue.burst.descriptors_read() < DESCRIPTOR_BUDGET
    }

    /// Dequeues about as many chains as are missing.
    fn dequeue_missing(&mut self, segments: usize) -> Result<usize, VirtqueueFault> {
        let each = self
            .queue
            .burst
            .chains()
            .last()
            .map_or(2048, |c| c.len().max(64));
        let missing = self.required - self.capacity.min(self.required);
        let want = (missing / each + 1)
            .max(MIN_DEQUEUE)
            .min((MAX_SEGMENTS - segments) / 4 + 1);
        self.dequeue_chains(want)
    }

    /// Dequeues up to `want` chains, at most 64, and in total no more than the ring has: a driver
    /// that makes chains available twice must not fill the device's memory.
    fn dequeue_chains(&mut self, want: usize) -> Result<usize, VirtqueueFault> {
        let queue = &mut self.queue;
        let before = queue.burst.chains().len();
        let want = want.min(usize::from(queue.virtqueue.size()).saturating_sub(before));
        if want == 0 {
            return Ok(0);
        }
        let dequeued = queue.virtqueue.dequeue(&mut queue.burst, want)?;
        for chain in &queue.burst.chains()[before..] {
            self.capacity += chain.len();
            if let Some(fault) = chain.fault() {
                count_fault(fault, Direction::Writable, &queue.stats);
            }
        }
        Ok(dequeued)
    }

    /// Completes the faulty chains at the front with length 0. Later ones stay in the burst until
    /// they are at the front, so that chains are completed in order.
    fn complete_leading_faults(&mut self) {
        let queue = &mut self.queue;
        while let Some(chain) = queue.burst.chains().first().copied() {
            if chain.fault().is_none() {
                return;
            }
            queue.virtqueue.complete(&chain, 0);
            queue.burst.retire(1);
        }
    }

    /// Counts a frame that did not fit: there were too few buffers, or it is longer than any that
    /// the buffers can hold.
    fn count_too_long(&self) {
        let stats = &self.queue.stats;
        match self.capacity < self.required {
            true => stats.dropped_no_buffer.add(1),
            false => stats.dropped_too_long.add(1),
        }
    }

    /// Reads one frame from the uplink into the reserved buffers.
    ///
    /// A direct read saves a large frame's copy. But the kernel's work grows with the number of
    /// segments, which is dozens for the longest frame, and for a small frame that costs more than
    /// a copy. A frame's length is known only after the read. So frames are read into the bounce
    /// buffer, which stays in the CPU's cache, and copied, and so is the first large one. The
    /// [`DIRECT_READ_FRAMES`] frames that follow a large one are read directly, unless pages of the
    /// buffers may be missing, for which the kernel would not wait.
    fn receive_frame(&mut self, uplink: &dyn UplinkQueue) -> Received {
        let free_slices = free_slices(&self.queue);
        let bounce = self.bounce.as_deref_mut().unwrap_or_default();
        let can_be_direct = !self.queue.burst.memory().is_in_postcopy();
        let is_direct = self.direct_reads_left > 0 && can_be_direct || bounce.is_empty();
        // What does not fit in these goes into the bounce buffer, and must not count as received.
        let filled = &free_slices[..free_slices.len().min(MAX_RECEIVE_BUFFERS)];
        let received = uplink.receive(if is_direct { filled } else { &[] }, bounce);
        let Received::Frame(len) = received else {
            return received;
        };
        self.direct_reads_left = match len > LARGE_FRAME_LEN {
            true => DIRECT_READ_FRAMES,
            false => self.direct_reads_left.saturating_sub(1),
        };
        let is_complete = match is_direct {
            // With mergeable buffers the free space is everything that is reserved: `capacity`.
            true if self.queue.features.has_mergeable_buffers()
                && filled.len() == free_slices.len() =>
            {
                len <= self.capacity
            }
            true => len <= total_len(filled),
            false => scatter(&bounce[..len.min(bounce.len())], free_slices) == len,
        };
        match is_complete {
            true => received,
            false => Received::TooLong,
        }
    }

    /// Logs that the first `len` bytes of the buffers for the next frame were written.
    #[cold]
    fn log_written(&self, len: usize) {
        if let Some(mut log) = self.queue.burst.memory().log_writer() {
            log.mark(free_slices(&self.queue), len);
        }
    }

    /// Completes the reserved chains that hold a frame of `len` bytes, header included; returns the
    /// frame's bytes without the header.
    fn commit<const LOG: bool>(&mut self, len: usize) -> usize {
        let queue = &mut self.queue;
        let buffers = queue.virtqueue.complete_filled(queue.burst.chains(), len);
        for chain in &queue.burst.chains()[..buffers] {
            self.capacity -= chain.len();
        }
        let header_len = queue.features.header_len();
        if header_len == VNET_HEADER_LEN {
            let count = u16::try_from(buffers).unwrap_or(u16::MAX);
            write_at(
                free_slices(&self.queue),
                NUM_BUFFERS_OFFSET,
                &count.to_le_bytes(),
            );
        }
        if LOG {
            self.log_written(len.max(header_len));
        }
        let queue = &mut self.queue;
        queue.burst.retire(buffers);
        let bytes = len - header_len.min(len);
        queue.stats.frames.add(1);
        queue.stats.bytes.add(to_u64(bytes));
        bytes
    }
}

impl DeviceQueue for RxQueue {
    fn new(config: QueueConfig) -> Result<Self, VirtqueueError> {
        let queue = Queue::new(config, Direction::Writable)?;
        // Without mergeable buffers a frame gets one chain, whatever its capacity.
        let required = match queue.features.has_mergeable_buffers() {
            true => VNET_HEADER_LEN + MAX_FRAME,
            false => 1,
        };
        Ok(Self {
            queue,
            capacity: 0,
            required,
            // One byte more than the longest frame: a filled buffer means a truncated frame.
            bounce: MmapMut::map_anon(VNET_HEADER_LEN + MAX_FRAME + 1).ok(),
            direct_reads_left: 0,
        })
    }

    fn virtqueue(&self) -> &Virtqueue {
        &self.queue.virtqueue
    }

    fn burst(&self) -> &Burst {
        &self.queue.burst
    }

    fn forget_translations(&mut self) {
        self.capacity = 0;
        self.queue.forget_translations();
    }

    fn rewind(&mut self) -> u32 {
        self.capacity = 0;
        self.queue.rewind()
    }

    fn rebind(&mut self, memory: &Arc<GuestMemory>) -> Result<(), VirtqueueError> {
        self.capacity = 0;
        self.queue.rebind(memory)
    }

    fn set_used_log(&mut self, used_log: Option<u64>) {
        self.queue.set_used_log(used_log);
    }

    /// Called when the queue is starved, so that the driver kicks when it adds buffers.
    fn enable_kicks(&mut self) -> bool {
        self.queue.virtqueue.enable_kicks()
    }

    fn disable_kicks(&mut self) {
        self.queue.virtqueue.disable_kicks();
    }
}

/// The outcome of [`RxQueue::reserve`].
enum Reserved {
    Enough,
    TooLittle,
    OverBudget,
    Untranslated,
}

/// The segments that the next frame may use.
fn free_slices(queue: &Queue) -> &[GuestSlice<'_>] {
    match queue.features.has_mergeable_buffers() {
        true => queue.burst.front_slices(queue.burst.chains().len()),
        false => queue.burst.front_slices(1),
    }
}

fn total_len(slices: &[GuestSlice<'_>]) -> usize {
    slices.iter().map(GuestSlice::len).sum()
}

/// Copies `data` to the start of a list of slices; returns the bytes copied.
fn scatter(data: &[u8], slices: &[GuestSlice<'_>]) -> usize {
    let mut done = 0;
    for slice in slices {
        if done == data.len() {
            break;
        }
        done += slice.copy_from(&data[done..]);
    }
    done
}

/// Writes `data` at byte `at` of a list of slices.
fn write_at(slices: &[GuestSlice<'_>], mut at: usize, mut data: &[u8]) {
    for slice in slices {
        if at < slice.len() {
            let n = slice.skip(at).copy_from(data);
            data = &data[n..];
            at += n;
        }
        if data.is_empty() {
            return;
        }
        at -= slice.len().min(at);
    }
}
