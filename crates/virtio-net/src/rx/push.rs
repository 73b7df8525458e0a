//! Frames that another thread pushes to a receiveq: copied once, from the sending guest's buffers
//! to the receiving guest's.

use virtionet_virtqueue::memory::GuestSlice;
use virtionet_virtqueue::{Chain, Direction, VirtqueueFault};

use super::{MIN_DEQUEUE, NUM_BUFFERS_OFFSET, RxQueue};
use crate::header::VNET_HEADER_LEN;
use crate::queue::Queue;
use crate::stats::to_u64;
use crate::uplink::TxFrame;

/// The outcome of [`RxQueue::push`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PushOutcome {
    /// Frames that the guest received; the others were dropped and counted.
    pub frames: usize,
    /// The descriptors that were read, those of invalid chains included.
    pub descriptors_read: usize,
    /// The driver asks for an interrupt.
    pub should_call: bool,
}

/// The progress of a push.
#[derive(Default)]
struct PushProgress {
    /// Chains of the burst that have been completed.
    chains: usize,
    frames: usize,
    bytes: usize,
    /// The length from which frames do not fit: one was dropped, and the free space only shrinks
    /// during a push.
    too_large: Option<usize>,
}

/// The outcome of copying one frame.
enum CopyOutcome {
    /// It was copied, or dropped and counted; a later frame may fit.
    Continue,
    /// The guest has no free buffer at all.
    NoBuffers,
}

impl RxQueue {
    /// Copies `frames` (at most [`crate::uplink::MAX_BURST`]), in order, to the guest's buffers.
    /// The used index is published once, at the end. A frame that does not fit is dropped and
    /// counted: `dropped_no_buffer`, `dropped_untranslated`, `dropped_too_long`.
    ///
    /// # Errors
    /// When the ring is faulty and must be quarantined.
    pub fn push(&mut self, frames: &[TxFrame<'_>]) -> Result<PushOutcome, VirtqueueFault> {
        self.push_releasing(frames, &mut || ())
    }

    /// Does the same, and calls `release` after the frames were copied and before they are published,
    /// so that a driver that has got a frame finds the buffers of it free at the sender's.
    ///
    /// # Errors
    /// As [`RxQueue::push`].
    pub fn push_releasing(
        &mut self,
        frames: &[TxFrame<'_>],
        release: &mut dyn FnMut(),
    ) -> Result<PushOutcome, VirtqueueFault> {
        // Two copies of the code, so that a frame pays nothing for a log that is not there.
        match self.queue.burst.memory().is_logging() {
            false => self.push_frames::<false>(frames, release),
            true => self.push_frames::<true>(frames, release),
        }
    }

    /// The same, with or without a log of what is written.
    fn push_frames<const LOG: bool>(
        &mut self,
        frames: &[TxFrame<'_>],
        release: &mut dyn FnMut(),
    ) -> Result<PushOutcome, VirtqueueFault> {
        self.queue.burst.reset_descriptors_read();
        let mut progress = PushProgress::default();
        let copied = self.copy_to_singles::<LOG>(frames, &mut progress);
        let mut rest = &frames[copied..];
        let ready = self.queue.burst.chains().len();
        let mut fault = match ready < rest.len() {
            true => self.dequeue_chains(rest.len() - ready).err(),
            false => None,
        };
        loop {
            rest = &rest[self.copy_to_single_chains::<LOG>(rest, &mut progress)..];
            let Some((frame, others)) = rest.split_first() else {
                break;
            };
            if progress.too_large.is_some_and(|len| frame.len >= len) {
                self.count_without_buffer(1);
                rest = others;
                continue;
            }
            match self.copy_to_chains::<LOG>(frame, &mut progress) {
                Ok(CopyOutcome::Continue) => rest = others,
                Ok(CopyOutcome::NoBuffers) => {
                    // No buffer is left, so the other frames do not fit either.
                    self.count_without_buffer(rest.len());
                    break;
                }
                Err(found) => {
                    self.count_without_buffer(rest.len());
                    fault = Some(found);
                    break;
                }
            }
        }
        for chain in &self.queue.burst.chains()[..progress.chains] {
            self.capacity -= chain.len();
        }
        self.queue.burst.retire(progress.chains);
        let stats = &self.queue.stats;
        if progress.frames > 0 {
            stats.bursts.add(1);
            stats.frames.add(to_u64(progress.frames));
            stats.bytes.add(to_u64(progress.bytes));
        }
        release();
        match fault {
            // Publish the completed chains first; the next call finds the fault again.
            Some(fault) if !self.queue.virtqueue.has_unpublished() => Err(fault),
            _ => Ok(PushOutcome {
                frames: progress.frames,
                descriptors_read: self.queue.burst.descriptors_read(),
                should_call: self.queue.virtqueue.publish(),
            }),
        }
    }

    /// Reserves buffers before there is a frame, so that their translations are known when one is
    /// pushed. Returns whether the driver wants an interrupt for faulty chains. It does nothing
    /// unless the guest's device is behind an IOMMU.
    ///
    /// # Errors
    /// When the ring is faulty and must be quarantined.
    pub fn prepare(&mut self) -> Result<bool, VirtqueueFault> {
        if self.queue.burst.memory().iotlb().is_none() {
            return Ok(false);
        }
        self.queue.burst.reset_descriptors_read();
        let reserved = self.reserve();
        match self.queue.virtqueue.has_unpublished() {
            true => Ok(self.queue.virtqueue.publish()),
            false => reserved.map(|_| false),
        }
    }

    /// Counts frames for which there is no buffer, or none whose translation is known.
    #[cold]
    fn count_without_buffer(&self, frames: usize) {
        let stats = &self.queue.stats;
        let counter = match self.queue.burst.waits_for_translation() {
            true => &stats.dropped_untranslated,
            false => &stats.dropped_no_buffer,
        };
        counter.add(to_u64(frames));
    }

    /// Copies frames to the next available chains for as long as each of these is one buffer that is
    /// large enough; returns their number. No chain may be reserved, because that would be the next.
    #[inline(always)]
    fn copy_to_singles<const LOG: bool>(
        &mut self,
        frames: &[TxFrame<'_>],
        progress: &mut PushProgress,
    ) -> usize {
        let Queue {
            virtqueue,
            burst,
            features,
            ..
        } = &mut self.queue;
        if features.header_len() != VNET_HEADER_LEN || burst.memory().is_in_postcopy() {
            return 0;
        }
        let lens = frames.iter().map(|frame| VNET_HEADER_LEN + frame.len);
        let found = virtqueue.find_singles(burst, Direction::Writable, lens.clone(), u32::MAX);
        let (ids, buffers) = burst.singles(found.count);
        let frames = frames.get(..buffers.len()).unwrap_or_default();
        for (frame, buffer) in frames.iter().zip(buffers) {
            copy_to_single(frame, buffer);
            progress.bytes += frame.len;
        }
        let lens = lens.take(frames.len());
        if LOG && let Some(mut log) = burst.memory().log_writer() {
            for (buffer, len) in buffers.iter().zip(lens.clone()) {
                log.mark(std::slice::from_ref(buffer), len);
            }
        }
        let count = frames.len();
        virtqueue.complete_singles(ids, lens.map(to_u32));
        burst.count_singles(count);
        progress.frames += count;
        count
    }

    /// Copies frames to the next chains, one frame each, for as long as they fit; returns their
    /// number.
    #[inline(always)]
    fn copy_to_single_chains<const LOG: bool>(
        &mut self,
        frames: &[TxFrame<'_>],
        progress: &mut PushProgress,
    ) -> usize {
        let Queue {
            virtqueue,
            burst,
            features,
            ..
        } = &mut self.queue;
        let header_len = features.header_len();
        let chains = burst.chains().get(progress.chains..).unwrap_or_default();
        let (mut count, mut bytes) = (0, 0);
        for (frame, chain) in frames.iter().zip(chains) {
            if chain.len() < header_len + frame.len {
                break;
            }
            let header = header_with_num_buffers(frame, 1);
            copy_frame(&header, header_len, frame.payload, burst.slices(chain));
            bytes += frame.len;
            count += 1;
        }
        let each = chains.iter().zip(&frames[..count]);
        if LOG && let Some(mut log) = burst.memory().log_writer() {
            for (chain, frame) in each.clone() {
                log.mark(burst.slices(chain), header_len + frame.len);
            }
        }
        virtqueue.complete_each(each.map(|(chain, frame)| (chain, to_u32(header_len + frame.len))));
        progress.chains += count;
        progress.frames += count;
        progress.bytes += bytes;
        count
    }

    /// Copies one frame to the next chains, as many as it needs.
    #[inline(never)]
    fn copy_to_chains<const LOG: bool>(
        &mut self,
        frame: &TxFrame<'_>,
        progress: &mut PushProgress,
    ) -> Result<CopyOutcome, VirtqueueFault> {
        let header_len = self.queue.features.header_len();
        let total = header_len + frame.len;
        // A faulty chain is completed with length 0 when it is at the front: chains are completed
        // in order.
        while let Some(chain) = self.chain_at(progress.chains)?
            && chain.fault().is_some()
        {
            self.queue.virtqueue.complete(&chain, 0);
            progress.chains += 1;
        }
        let mergeable = self.queue.features.has_mergeable_buffers();
        let (mut capacity, mut count) = (0, 0);
        while capacity < total {
            let Some(chain) = self.chain_at(progress.chains + count)? else {
                if count == 0 {
                    return Ok(CopyOutcome::NoBuffers);
                }
                progress.too_large = Some(frame.len);
                self.count_without_buffer(1);
                return Ok(CopyOutcome::Continue);
            };
            capacity += chain.len();
            count += 1;
            if capacity < total && !mergeable {
                self.queue.stats.dropped_too_long.add(1);
                return Ok(CopyOutcome::Continue);
            }
        }
        let header = header_with_num_buffers(frame, u16::try_from(count).unwrap_or(u16::MAX));
        let queue = &mut self.queue;
        let chains = &queue.burst.chains()[progress.chains..progress.chains + count];
        let buffers = queue.burst.slices_of(chains);
        copy_frame(&header, header_len, frame.payload, buffers);
        if LOG && let Some(mut log) = queue.burst.memory().log_writer() {
            log.mark(buffers, total);
        }
        queue.virtqueue.complete_filled(chains, total);
        progress.chains += count;
        progress.frames += 1;
        progress.bytes += frame.len;
        Ok(CopyOutcome::Continue)
    }

    /// The chain at index `at` of the burst, dequeued if necessary; `None` when there is none.
    fn chain_at(&mut self, at: usize) -> Result<Option<Chain>, VirtqueueFault> {
        if at >= self.queue.burst.chains().len() && self.can_dequeue() {
            self.dequeue_chains(MIN_DEQUEUE)?;
        }
        Ok(self.queue.burst.chains().get(at).copied())
    }
}

/// A frame's header with the number of buffers that the frame occupies.
#[inline(always)]
fn header_with_num_buffers(frame: &TxFrame<'_>, count: u16) -> [u8; VNET_HEADER_LEN] {
    let mut header = frame.header.0;
    header[NUM_BUFFERS_OFFSET..].copy_from_slice(&count.to_le_bytes());
    header
}

/// Copies a header of 12 bytes and a frame to one buffer that is large enough.
#[inline(always)]
fn copy_to_single(frame: &TxFrame<'_>, buffer: &GuestSlice<'_>) {
    let (true, [payload]) = (buffer.len() >= VNET_HEADER_LEN, frame.payload) else {
        let header = header_with_num_buffers(frame, 1);
        copy_slices(&header, frame.payload, std::slice::from_ref(buffer));
        return;
    };
    // Two parts, as wide as those that the sender's queue stored, and without a copy in memory.
    let header = &frame.header.0;
    let first = header.first_chunk::<8>().copied().unwrap_or_default();
    let last = header.last_chunk::<4>().copied().unwrap_or_default();
    let last = u32::from_le_bytes(last) & 0xffff | 1 << 16;
    buffer.copy_from_array(&first);
    let rest = buffer.skip(8);
    rest.copy_from_array(&last.to_le_bytes());
    rest.skip(4).copy_from_slice(payload);
}

/// Copies header and frame to buffers that are large enough.
#[inline(always)]
fn copy_frame(
    header: &[u8; VNET_HEADER_LEN],
    header_len: usize,
    payload: &[GuestSlice<'_>],
    buffers: &[GuestSlice<'_>],
) {
    if let ([payload], [buffers]) = (payload, buffers)
        && header_len == VNET_HEADER_LEN
        && buffers.copy_from_array(header)
    {
        buffers.skip(VNET_HEADER_LEN).copy_from_slice(payload);
    } else {
        copy_slices(header.get(..header_len).unwrap_or(header), payload, buffers);
    }
}

/// The same for any number of segments on either side.
#[inline(never)]
fn copy_slices(header: &[u8], payload: &[GuestSlice<'_>], buffers: &[GuestSlice<'_>]) {
    let mut buffers = buffers.iter().copied();
    let Some(mut to) = buffers.next() else { return };
    let mut header = header;
    while !header.is_empty() {
        let n = to.copy_from(header);
        header = &header[n..];
        to = to.skip(n);
        if to.is_empty() {
            match buffers.next() {
                Some(next) => to = next,
                None => return,
            }
        }
    }
    for from in payload {
        let mut from = *from;
        while !from.is_empty() {
            let n = to.copy_from_slice(&from);
            from = from.skip(n);
            to = to.skip(n);
            if to.is_empty() {
                match buffers.next() {
                    Some(next) => to = next,
                    None => return,
                }
            }
        }
    }
}

/// A frame's length is far below 2^32.
#[inline(always)]
fn to_u32(n: usize) -> u32 {
    u32::try_from(n & 0xffff_ffff).unwrap_or(0)
}
