//! Frames that another thread has for a receiveq: copied once, from where the sender's guest put
//! them to where this one wants them.

use virtionet_virtqueue::memory::GuestSlice;
use virtionet_virtqueue::{Chain, RingFault};

use super::{NUM_BUFFERS, RxQueue, TAKE_AT_ONCE};
use crate::header::HEADER_LEN;
use crate::port::TxFrame;
use crate::queue::Queue;
use crate::stats::wide;

/// What a call of [`RxQueue::push`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pushed {
    /// Frames given to the guest; the others were dropped and counted.
    pub frames: usize,
    /// The driver wants an interrupt.
    pub call: bool,
}

/// What has been done of a push.
#[derive(Default)]
struct Done {
    /// Chains of the burst that have been completed.
    chains: usize,
    frames: usize,
    bytes: usize,
    /// Frames of this length and more find too little room: one was dropped for want of it, and
    /// room only gets less.
    too_large: Option<usize>,
}

/// What came of one frame.
enum Placed {
    /// It was given, or dropped and counted; the next may have more luck.
    Room,
    /// The guest has no buffer at all.
    Full,
}

impl RxQueue {
    /// Gives `frames` (at most [`crate::port::MAX_BURST`]), in order, to the guest. The driver sees
    /// all of them at once, at the end. What finds no buffer is dropped and counted:
    /// `dropped_no_buffer`, `dropped_too_long`.
    ///
    /// # Errors
    /// When the ring can no longer be believed.
    pub fn push(&mut self, frames: &[TxFrame<'_>]) -> Result<Pushed, RingFault> {
        self.queue.burst.reset_work();
        let ready = self.queue.burst.chains().len();
        let mut fault = match ready < frames.len() {
            true => self.take_chains(frames.len() - ready).err(),
            false => None,
        };
        let mut done = Done::default();
        let mut rest = frames;
        loop {
            rest = &rest[self.place_each(rest, &mut done)..];
            let Some((frame, others)) = rest.split_first() else {
                break;
            };
            if done.too_large.is_some_and(|len| frame.len >= len) {
                self.queue.stats.dropped_no_buffer.add(1);
                rest = others;
                continue;
            }
            match self.place(frame, &mut done) {
                Ok(Placed::Room) => rest = others,
                Ok(Placed::Full) => {
                    // Not one buffer is left: the others need not ask.
                    self.queue.stats.dropped_no_buffer.add(wide(rest.len()));
                    break;
                }
                Err(found) => {
                    self.queue.stats.dropped_no_buffer.add(wide(rest.len()));
                    fault = Some(found);
                    break;
                }
            }
        }
        for chain in &self.queue.burst.chains()[..done.chains] {
            self.capacity -= chain.len();
        }
        self.queue.burst.retire(done.chains);
        let stats = &self.queue.stats;
        if done.frames > 0 {
            stats.bursts.add(1);
            stats.frames.add(wide(done.frames));
            stats.bytes.add(wide(done.bytes));
        }
        match fault {
            // What was given before is shown first; the next call meets the fault again.
            Some(fault) if !self.queue.ring.is_unpublished() => Err(fault),
            _ => Ok(Pushed {
                frames: done.frames,
                call: self.queue.ring.publish(),
            }),
        }
    }

    /// Copies frames to the next chains, one each, for as long as they fit; says how many.
    #[inline(always)]
    fn place_each(&mut self, frames: &[TxFrame<'_>], done: &mut Done) -> usize {
        let Queue {
            ring,
            burst,
            features,
            ..
        } = &mut self.queue;
        let header_len = features.header_len();
        let chains = burst.chains().get(done.chains..).unwrap_or_default();
        let (mut count, mut bytes) = (0, 0);
        for (frame, chain) in frames.iter().zip(chains) {
            if chain.len() < header_len + frame.len {
                break;
            }
            let header = with_buffers(frame, 1);
            copy_frame(&header, header_len, frame.payload, burst.slices(chain));
            bytes += frame.len;
            count += 1;
        }
        let each = chains.iter().zip(&frames[..count]);
        ring.complete_each(each.map(|(chain, frame)| (chain, length(header_len + frame.len))));
        done.chains += count;
        done.frames += count;
        done.bytes += bytes;
        count
    }

    /// Copies one frame to the next chains, whatever they are.
    #[inline(never)]
    fn place(&mut self, frame: &TxFrame<'_>, done: &mut Done) -> Result<Placed, RingFault> {
        let header_len = self.queue.features.header_len();
        let total = header_len + frame.len;
        // A faulty chain goes back empty when its turn comes, so that the order stays.
        while let Some(chain) = self.chain(done.chains)?
            && chain.fault().is_some()
        {
            self.queue.ring.complete(&chain, 0);
            done.chains += 1;
        }
        let mergeable = self.queue.features.mergeable();
        let (mut room, mut count) = (0, 0);
        while room < total {
            let Some(chain) = self.chain(done.chains + count)? else {
                if count == 0 {
                    return Ok(Placed::Full);
                }
                done.too_large = Some(frame.len);
                self.queue.stats.dropped_no_buffer.add(1);
                return Ok(Placed::Room);
            };
            room += chain.len();
            count += 1;
            if room < total && !mergeable {
                self.queue.stats.dropped_too_long.add(1);
                return Ok(Placed::Room);
            }
        }
        let header = with_buffers(frame, u16::try_from(count).unwrap_or(u16::MAX));
        let queue = &mut self.queue;
        let chains = &queue.burst.chains()[done.chains..done.chains + count];
        let room = queue.burst.slices_of(chains);
        copy_frame(&header, header_len, frame.payload, room);
        queue.ring.complete_filled(chains, total);
        done.chains += count;
        done.frames += 1;
        done.bytes += frame.len;
        Ok(Placed::Room)
    }

    /// Chain number `at` of the burst, taken now if it must be; `None` when there is none.
    fn chain(&mut self, at: usize) -> Result<Option<Chain>, RingFault> {
        if at >= self.queue.burst.chains().len() && self.may_take() {
            self.take_chains(TAKE_AT_ONCE)?;
        }
        Ok(self.queue.burst.chains().get(at).copied())
    }
}

/// A frame's header with the number of buffers that the frame lies in.
#[inline(always)]
fn with_buffers(frame: &TxFrame<'_>, count: u16) -> [u8; HEADER_LEN] {
    let mut header = frame.header.0;
    header[NUM_BUFFERS..].copy_from_slice(&count.to_le_bytes());
    header
}

/// Copies header and frame to a list of slices that holds them.
#[inline(always)]
fn copy_frame(
    header: &[u8; HEADER_LEN],
    header_len: usize,
    payload: &[GuestSlice<'_>],
    room: &[GuestSlice<'_>],
) {
    if let ([payload], [room]) = (payload, room)
        && header_len == HEADER_LEN
        && room.copy_from_array(header)
    {
        room.skip(HEADER_LEN).copy_from_slice(payload);
    } else {
        gather(header.get(..header_len).unwrap_or(header), payload, room);
    }
}

/// The same for any number of slices on either side.
#[inline(never)]
fn gather(header: &[u8], payload: &[GuestSlice<'_>], room: &[GuestSlice<'_>]) {
    let mut room = room.iter().copied();
    let Some(mut to) = room.next() else { return };
    let mut header = header;
    while !header.is_empty() {
        let n = to.copy_from(header);
        header = &header[n..];
        to = to.skip(n);
        if to.is_empty() {
            match room.next() {
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
                match room.next() {
                    Some(next) => to = next,
                    None => return,
                }
            }
        }
    }
}

/// A frame's length is bounded far below 2^32.
#[inline(always)]
fn length(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}
