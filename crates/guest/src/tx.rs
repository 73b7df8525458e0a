//! The driver side of a transmitq.
//!
//! Each frame is written to a slot of guest memory, behind its header. A slot is unused again when
//! the device has used its chain. A bench fills all slots once and then sends them repeatedly.

use std::time::{Duration, Instant};

use crate::buffer::Buf;
use crate::config::DriverVirtqueueConfig;
use crate::driver::DriverVirtqueue;
use crate::error::Error;
use crate::frame::Frame;
use crate::header::{NetHeader, header_len};
use crate::memory::{Area, GuestRam, to_u64};
use crate::net::{DriverQueue, DriverQueueConfig, TxLayout};

/// A transmitq with its slots.
#[derive(Debug)]
pub struct DriverTxQueue {
    /// The virtqueue and its eventfds.
    pub queue: DriverQueue,
    slots: Area,
    /// The distance between slots in bytes.
    stride: usize,
    /// The size of a slot in bytes.
    capacity: usize,
    /// Unused slots.
    free: Vec<u16>,
    /// The size of the virtio-net header in bytes.
    header_len: usize,
    layout: TxLayout,
    indirect: bool,
    /// The size in bytes of the header and frame in every slot since [`DriverTxQueue::prefill`].
    prefilled: usize,
    /// The storage for the chain that is being added, to avoid an allocation for each.
    chain: Vec<Buf>,
}

impl DriverTxQueue {
    /// Allocates the virtqueue and its slots in `ram`.
    ///
    /// # Errors
    /// When the configuration is not possible or `ram` has not enough free memory.
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

    /// The guest memory of all slots. The device never writes to it.
    #[must_use]
    pub fn slots(&self) -> &Area {
        &self.slots
    }

    /// Writes a frame to a slot and adds its chain. [`DriverTxQueue::flush`] makes it visible to
    /// the device. Returns false when there are not enough slots or descriptors now.
    ///
    /// # Errors
    /// When the frame does not fit a slot, or the device breaks a rule.
    #[inline]
    pub fn queue(&mut self, header: &NetHeader, frame: &[u8]) -> Result<bool, Error> {
        let raw = &header.to_bytes()[..self.header_len];
        self.queue_raw(raw, frame)
    }

    /// The same as [`DriverTxQueue::queue`] with any bytes in place of the header, for tests of
    /// invalid headers.
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

    /// Sends one frame without waiting.
    ///
    /// # Errors
    /// When there is no unused slot for it, or as [`DriverTxQueue::queue`] and
    /// [`DriverTxQueue::flush`].
    pub fn send(&mut self, frame: &Frame) -> Result<(), Error> {
        self.send_all(std::slice::from_ref(frame), Duration::ZERO)
    }

    /// Sends `frames` in order, and waits for unused slots where necessary.
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

    /// Publishes the queued frames and kicks the device if it wants that.
    ///
    /// # Errors
    /// When the kick cannot be written.
    #[inline(always)]
    pub fn flush(&mut self) -> Result<(), Error> {
        self.queue.flush()
    }

    /// Collects the slots that the device has used. Returns how many.
    ///
    /// # Errors
    /// When the device breaks a rule.
    #[inline(always)]
    pub fn reclaim(&mut self) -> Result<u16, Error> {
        let free = &mut self.free;
        let count = self.queue.ring.collect(|slot, _| {
            free.push(u16::try_from(slot).unwrap_or_default());
        })?;
        Ok(count)
    }

    /// Waits until the device has used all published chains.
    ///
    /// # Errors
    /// When the device does not use all of them within `limit`, or breaks a rule.
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

    /// Starts again without chains, as a driver does that is loaded again. The device must be
    /// stopped.
    pub fn reset(&mut self) {
        self.queue.ring.reset();
        self.free = (0..self.queue.ring.size()).rev().collect();
    }

    /// Writes `frame` to every slot. No chain may be in flight.
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
                "TX slots cannot be filled while chains are in flight",
            ));
        }
        for at in (0..self.slots.len()).step_by(self.stride) {
            self.slots.write(at, header);
            self.slots.write(at + header.len(), &frame.bytes);
        }
        self.prefilled = len;
        Ok(())
    }

    /// Queues up to `most` slots with the content that [`DriverTxQueue::prefill`] wrote, without an
    /// access to them. Returns how many.
    ///
    /// # Errors
    /// When the device breaks a rule.
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

    /// An unused slot, if there are also enough descriptors for a chain of `len` bytes.
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

    /// The number of descriptors that a chain of `len` bytes needs.
    #[inline(always)]
    fn descriptors(&self, len: usize) -> usize {
        match self.layout {
            _ if self.indirect => 1,
            TxLayout::Single => 1,
            TxLayout::SeparateHeader => 2,
            TxLayout::Segments(n) => len.div_ceil(usize::try_from(n).unwrap_or(usize::MAX)),
        }
    }

    /// Adds the chain of a slot with `len` bytes.
    #[inline(always)]
    fn add(&mut self, slot: u16, len: usize) -> Result<(), Error> {
        let addr = self.slots.addr() + to_u64(usize::from(slot) * self.stride);
        // `len` is at most `capacity`, which came from a u32.
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

    /// Divides `len` bytes at `addr` into the buffers of `chain`.
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
            let size = most.min(len - at);
            let segment = Buf::readable(addr + u64::from(at), size);
            self.chain.push(segment);
            at += size;
        }
    }

    /// Waits until the device may have used a chain.
    ///
    /// # Errors
    /// When no call comes until `end`.
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
