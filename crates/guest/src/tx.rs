//! The driver's transmitq.
//!
//! Each frame goes into a slot of guest memory, header first. Slots come back when the device has
//! used their chains. A bench fills the slots once and then sends them over and over.

use std::time::{Duration, Instant};

use crate::driver::{Buf, DriverVirtqueue, DriverVirtqueueConfig};
use crate::error::Error;
use crate::frame::Frame;
use crate::header::{NetHeader, header_len};
use crate::memory::{Area, GuestRam, to_u64};
use crate::net::{DriverQueue, DriverQueueConfig, TxLayout};

/// A transmitq with its slots.
#[derive(Debug)]
pub struct DriverTxQueue {
    /// Ring and eventfds.
    pub queue: DriverQueue,
    slots: Area,
    stride: usize,
    capacity: usize,
    free: Vec<u16>,
    header_len: usize,
    layout: TxLayout,
    indirect: bool,
    /// Bytes of the frame and header that every slot holds since [`DriverTxQueue::prefill`].
    prefilled: usize,
    /// Storage for the chain in the making.
    chain: Vec<Buf>,
}

impl DriverTxQueue {
    /// Allocates an empty ring and its slots in `ram`.
    ///
    /// # Errors
    /// When the configuration makes no sense or `ram` has no room.
    pub fn new(ram: &GuestRam, config: &DriverQueueConfig) -> Result<Self, Error> {
        config.check()?;
        let ring = DriverVirtqueueConfig {
            start: config.start,
            ..DriverVirtqueueConfig::new(config.size, config.features)
        };
        let too_large = |_| Error::Config("a TX slot is larger than this machine's memory");
        let bytes = config.tx_stride() * u64::from(config.size);
        Ok(Self {
            queue: DriverQueue::new(DriverVirtqueue::new(ram, ring)?)?,
            slots: ram.area(ram.alloc(bytes, 4096)?, bytes)?,
            stride: usize::try_from(config.tx_stride()).map_err(too_large)?,
            capacity: usize::try_from(config.tx_slot).map_err(too_large)?,
            free: (0..config.size).rev().collect(),
            header_len: header_len(config.features),
            layout: config.tx_layout,
            indirect: config.indirect(),
            prefilled: 0,
            chain: Vec::new(),
        })
    }

    /// Puts a frame into a slot and its chain into the ring; [`DriverTxQueue::flush`] shows it to the
    /// device. Returns false when there is no room now.
    ///
    /// # Errors
    /// When the frame is longer than a slot, or the device broke the ring.
    #[inline]
    pub fn queue(&mut self, header: &NetHeader, frame: &[u8]) -> Result<bool, Error> {
        let raw = &header.to_bytes()[..self.header_len];
        self.queue_raw(raw, frame)
    }

    /// [`DriverTxQueue::queue`] with whatever bytes stand for the header: none, too few, nonsense.
    ///
    /// # Errors
    /// As [`DriverTxQueue::queue`].
    #[inline]
    pub fn queue_raw(&mut self, header: &[u8], frame: &[u8]) -> Result<bool, Error> {
        let len = header.len() + frame.len();
        if len > self.capacity {
            return Err(Error::FrameTooLong {
                len,
                slot: self.capacity,
            });
        }
        let Some(slot) = self.allocate_slot(len)? else {
            return Ok(false);
        };
        let at = usize::from(slot) * self.stride;
        self.slots.write(at, header);
        self.slots.write(at + header.len(), frame);
        self.add(slot, len)?;
        Ok(true)
    }

    /// Sends one frame at once.
    ///
    /// # Errors
    /// When there is no room for it, or as [`DriverTxQueue::queue`] and [`DriverTxQueue::flush`].
    pub fn send(&mut self, frame: &Frame) -> Result<(), Error> {
        self.send_all(std::slice::from_ref(frame), Duration::ZERO)
    }

    /// Sends `frames` in order, waiting for room where there is none.
    ///
    /// # Errors
    /// When `limit` passes, or as [`DriverTxQueue::queue`].
    pub fn send_all(&mut self, frames: &[Frame], limit: Duration) -> Result<(), Error> {
        let end = Instant::now() + limit;
        for (sent, frame) in frames.iter().enumerate() {
            while !self.queue(&frame.header, &frame.bytes)? {
                self.flush()?;
                self.wait_used(end, limit, sent, frames.len())?;
            }
        }
        self.flush()
    }

    /// Publishes what was queued and kicks if the device wants it.
    ///
    /// # Errors
    /// When the kick cannot be written.
    #[inline(always)]
    pub fn flush(&mut self) -> Result<(), Error> {
        self.queue.flush()
    }

    /// Takes back the slots that the device is done with; returns how many.
    ///
    /// # Errors
    /// When the device broke the ring.
    #[inline(always)]
    pub fn reclaim(&mut self) -> Result<u16, Error> {
        let free = &mut self.free;
        let count = self.queue.ring.collect(|slot, _| {
            free.push(u16::try_from(slot).unwrap_or_default());
        })?;
        Ok(count)
    }

    /// Waits until the device has used everything.
    ///
    /// # Errors
    /// When `limit` passes or the device broke the ring.
    pub fn drain(&mut self, limit: Duration) -> Result<(), Error> {
        let end = Instant::now() + limit;
        let all = usize::from(self.queue.ring.in_flight());
        loop {
            self.reclaim()?;
            let left = usize::from(self.queue.ring.in_flight());
            if left == 0 {
                return Ok(());
            }
            self.wait_used(end, limit, all - left, all)?;
        }
    }

    /// Starts over with an empty ring, as a driver that is loaded anew. The device must not be
    /// running.
    pub fn reset(&mut self) {
        self.queue.ring.reset();
        self.free = (0..self.queue.ring.size()).rev().collect();
    }

    /// Writes `frame` into every slot; the ring must be empty.
    ///
    /// # Errors
    /// When the frame does not fit a slot or chains are in flight.
    pub fn prefill(&mut self, frame: &Frame) -> Result<(), Error> {
        let header = &frame.header.to_bytes()[..self.header_len];
        let len = header.len() + frame.bytes.len();
        if len > self.capacity {
            return Err(Error::FrameTooLong {
                len,
                slot: self.capacity,
            });
        }
        if self.queue.ring.in_flight() != 0 {
            return Err(Error::Config(
                "TX slots are filled while chains are in flight",
            ));
        }
        for at in (0..self.slots.len()).step_by(self.stride) {
            self.slots.write(at, header);
            self.slots.write(at + header.len(), &frame.bytes);
        }
        self.prefilled = len;
        Ok(())
    }

    /// Queues up to `most` slots as [`DriverTxQueue::prefill`] left them, without touching a byte of
    /// them; returns how many there was room for.
    ///
    /// # Errors
    /// When the device broke the ring.
    #[inline]
    pub fn queue_prefilled(&mut self, most: u16) -> Result<u16, Error> {
        let mut count = 0;
        while count < most {
            let Some(slot) = self.allocate_slot(self.prefilled)? else {
                break;
            };
            self.add(slot, self.prefilled)?;
            count += 1;
        }
        Ok(count)
    }

    /// A free slot, when the ring has room for a chain of `len` bytes as well.
    #[inline(always)]
    fn allocate_slot(&mut self, len: usize) -> Result<Option<u16>, Error> {
        let needed = self.descriptors(len);
        if self.free.is_empty() || usize::from(self.queue.ring.free()) < needed {
            self.reclaim()?;
            if usize::from(self.queue.ring.free()) < needed {
                return Ok(None);
            }
        }
        Ok(self.free.pop())
    }

    /// Descriptors that a chain of `len` bytes takes from the ring.
    #[inline(always)]
    fn descriptors(&self, len: usize) -> usize {
        match self.layout {
            _ if self.indirect => 1,
            TxLayout::Single => 1,
            TxLayout::SeparateHeader => 2,
            TxLayout::Segments(n) => len.div_ceil(usize::try_from(n).unwrap_or(usize::MAX)),
        }
    }

    #[inline(always)]
    fn add(&mut self, slot: u16, len: usize) -> Result<(), Error> {
        let addr = self.slots.addr() + to_u64(usize::from(slot) * self.stride);
        // `len` is at most `room`, which came from a u32.
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        let token = u64::from(slot);
        if self.layout == TxLayout::Single {
            let chain = [Buf::readable(addr, len)];
            self.queue.ring.add(&chain, false, token)?;
            return Ok(());
        }
        self.push_segments(addr, len);
        let indirect = self.indirect && self.chain.len() > 1;
        self.queue.ring.add(&self.chain, indirect, token)?;
        Ok(())
    }

    fn push_segments(&mut self, addr: u64, len: u32) {
        let header = u32::try_from(self.header_len).unwrap_or(u32::MAX);
        self.chain.clear();
        let mut at = 0;
        while at < len {
            let most = match self.layout {
                TxLayout::Segments(n) => n,
                TxLayout::SeparateHeader if at == 0 => header,
                _ => len,
            };
            let here = most.min(len - at);
            let segment = Buf::readable(addr + u64::from(at), here);
            self.chain.push(segment);
            at += here;
        }
    }

    /// Sleeps until the device may have used something, or fails at `end`.
    fn wait_used(
        &mut self,
        end: Instant,
        waited: Duration,
        got: usize,
        wanted: usize,
    ) -> Result<(), Error> {
        if self.queue.ring.enable_calls() {
            return Ok(());
        }
        let left = end.saturating_duration_since(Instant::now());
        let called = self.queue.call.wait(left);
        if called.map_err(Error::io("cannot wait for a call"))? == 0 {
            return Err(Error::Waited {
                waited,
                what: "TX chains to be used",
                got,
                wanted,
            });
        }
        Ok(())
    }
}
