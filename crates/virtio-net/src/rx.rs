//! The RX path: frames that wait in the uplink go to the guest's buffers.
//!
//! Buffers are *reserved* for the largest frame that may come, the frame is put into them, and its
//! length decides how many of them it used (virtio 1.3 §5.1.6.4). The rest stays reserved
//! for the next frame and is given back untouched when the ring stops.

mod push;

use std::sync::Arc;

pub use push::PushOutcome;

use memmap2::MmapMut;
use virtionet_virtqueue::memory::{GuestMemory, GuestSlice};
use virtionet_virtqueue::{Direction, VirtqueueError, VirtqueueFault};

use crate::header::{MAX_FRAME, VNET_HEADER_LEN};
use crate::queue::{DeviceQueue, Queue, QueueConfig, count_fault};
use crate::stats::to_u64;
use crate::uplink::{Received, UplinkQueue};

/// Most pieces handed to the uplink for one frame: what one `readv` takes, less a few of its own.
const MAX_SEGMENTS: usize = 1000;
/// Bytes from which on a frame is large: a copy costs more than what it saves.
const LARGE_FRAME_LEN: usize = 4096;
/// Fewest chains taken at once, more than are missing if need be: a look at the ring costs as much
/// as several chains.
const MIN_DEQUEUE: usize = 16;
/// Frames after a large one for which the next large one is expected.
const DIRECT_READ_FRAMES: u32 = 64;
/// Most descriptors read for one call of [`RxQueue::receive`], whatever the guest made of its chains.
const DESCRIPTOR_BUDGET: usize = 16 * 1024;
/// Where `num_buffers` stands in the header.
const NUM_BUFFERS_OFFSET: usize = 10;

/// How a call of [`RxQueue::receive`] ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RxEndReason {
    /// The uplink has no more frames.
    UplinkEmpty,
    /// The guest has no more buffers; frames wait in the uplink.
    Starved,
    /// The budget is used up; there may be more.
    Budget,
    /// The uplink failed.
    UplinkFailed,
}

/// What a call of [`RxQueue::receive`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RxOutcome {
    /// Frames given to the guest.
    pub frames: usize,
    /// Bytes of those, without headers.
    pub bytes: usize,
    /// The driver wants an interrupt.
    pub should_call: bool,
    /// Why it ended.
    pub end: RxEndReason,
}

/// The device's side of a receiveq.
#[derive(Debug)]
pub struct RxQueue {
    queue: Queue,
    /// Bytes that the reserved chains hold.
    capacity: usize,
    /// Bytes to reserve for a frame.
    required: usize,
    /// Where small frames are read to, and what is too long for the guest's buffers.
    /// A mapping of its own, of which only pages that were needed take memory.
    bounce: Option<MmapMut>,
    /// For so many more frames all slices are shown.
    direct_reads_left: u32,
}

impl RxQueue {
    /// Moves frames from `uplink` to the guest until one of them has no more, or `max_frames` or
    /// `max_bytes` are reached. The driver sees all of them at once, at the end.
    ///
    /// # Errors
    /// When the ring can no longer be believed.
    pub fn receive(
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
                // What was done before is shown first; the next call meets the fault again.
                Err(_) if self.queue.virtqueue.has_unpublished() => break RxEndReason::Budget,
                Err(fault) => return Err(fault),
            }
            match self.receive_frame(uplink) {
                Received::Frame(len) => bytes += self.commit(len),
                Received::TooLong => self.count_too_long(),
                Received::Lost => self.queue.stats.dropped_uplink_error.add(1),
                Received::Empty => break RxEndReason::UplinkEmpty,
                Received::Failed => break RxEndReason::UplinkFailed,
            }
            // Frames that are lost count too: dropping is work.
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

    /// Takes chains until they hold the largest frame.
    ///
    /// A guest that is behind will add buffers, so a frame waits rather than be cut. But a driver
    /// refills when about half of its ring is empty: once half of the ring is ours nothing more
    /// may come, and what there is must do (rings too small for a frame of 64 KiB).
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
                // A chain takes a descriptor at least, and more where its buffer has more pieces.
                let ours = self.queue.burst.chains().len().max(segments);
                return Ok(
                    match ours > 0 && ours >= usize::from(self.queue.virtqueue.size()) / 2 {
                        true => Reserved::Enough,
                        false => Reserved::TooLittle,
                    },
                );
            }
        }
        Ok(Reserved::Enough)
    }

    /// Whether the guest's chains have not cost too much work in this call.
    fn can_dequeue(&self) -> bool {
        self.queue.burst.descriptors_read() < DESCRIPTOR_BUDGET
    }

    /// Takes about as many chains as are missing.
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

    /// Takes up to `want` chains, 64 at most, and no more in all than the ring has: a driver that
    /// offers chains anew which it has not got back must not fill our memory.
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

    /// A faulty chain goes back empty when its turn comes, so that the order stays.
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

    /// A frame did not fit: for want of buffers that there might have been, or in any case.
    fn count_too_long(&self) {
        let stats = &self.queue.stats;
        match self.capacity < self.required {
            true => stats.dropped_no_buffer.add(1),
            false => stats.dropped_too_long.add(1),
        }
    }

    /// Reads one frame from the uplink into the reserved buffers.
    ///
    /// A large frame goes there straight. But the kernel's work grows with the number of slices that
    /// it is shown, dozens for the largest frame, and for a small one that is more than a copy. So
    /// as long as frames are small they are read into a bounce buffer of our own, which stays in the
    /// CPU's cache, and copied; a large one, and those that follow it, go straight.
    fn receive_frame(&mut self, uplink: &dyn UplinkQueue) -> Received {
        let free_slices = free_slices(&self.queue);
        let bounce = self.bounce.as_deref_mut().unwrap_or_default();
        let is_direct = self.direct_reads_left > 0 || bounce.is_empty();
        let received = uplink.receive(if is_direct { free_slices } else { &[] }, bounce);
        let Received::Frame(len) = received else {
            return received;
        };
        self.direct_reads_left = match len > LARGE_FRAME_LEN {
            true => DIRECT_READ_FRAMES,
            false => self.direct_reads_left.saturating_sub(1),
        };
        let is_complete = match is_direct {
            // Summed up already where the room is all that is reserved.
            true if self.queue.features.has_mergeable_buffers() => len <= self.capacity,
            true => len <= total_len(free_slices),
            false => scatter(&bounce[..len.min(bounce.len())], free_slices) == len,
        };
        match is_complete {
            true => received,
            false => Received::TooLong,
        }
    }

    /// Gives the guest the frame of `len` bytes (header included) that lies in the reserved
    /// buffers; returns its bytes without header.
    fn commit(&mut self, len: usize) -> usize {
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
        // Without merging a frame has one chain, whatever that holds.
        let required = match queue.features.has_mergeable_buffers() {
            true => VNET_HEADER_LEN + MAX_FRAME,
            false => 1,
        };
        Ok(Self {
            queue,
            capacity: 0,
            required,
            // A byte more than any frame, so that a frame that fills it is too long.
            bounce: MmapMut::map_anon(VNET_HEADER_LEN + MAX_FRAME + 1).ok(),
            direct_reads_left: 0,
        })
    }

    fn size(&self) -> u16 {
        self.queue.virtqueue.size()
    }

    fn rewind(&mut self) -> u32 {
        self.capacity = 0;
        self.queue.rewind()
    }

    fn rebind(&mut self, memory: &Arc<GuestMemory>) -> Result<(), VirtqueueError> {
        self.capacity = 0;
        self.queue.rebind(memory)
    }

    /// To be called when the queue is starved: the driver then kicks when it adds buffers.
    fn enable_kicks(&mut self) -> bool {
        self.queue.virtqueue.enable_kicks()
    }

    fn disable_kicks(&mut self) {
        self.queue.virtqueue.disable_kicks();
    }
}

/// How [`RxQueue::reserve`] ended.
enum Reserved {
    Enough,
    TooLittle,
    OverBudget,
}

/// Where the next frame may go.
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
