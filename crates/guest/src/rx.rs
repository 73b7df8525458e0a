//! The driver side of a receiveq.
//!
//! The buffers follow each other in guest memory, and the token of a chain is the index of its
//! buffer. A frame lies in one buffer. With mergeable buffers it lies in as many as `num_buffers`
//! of its header says (virtio 1.3 §5.1.6.4), and the device must publish all of them together.

use std::time::{Duration, Instant};

use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;

use crate::buffer::Buf;
use crate::config::DriverVirtqueueConfig;
use crate::driver::DriverVirtqueue;
use crate::error::Error;
use crate::fault::DeviceFault;
use crate::frame::Frame;
use crate::header::{HEADER_LEN, NetHeader, header_len};
use crate::memory::{Area, GuestRam, to_u64};
use crate::net::{DriverQueue, DriverQueueConfig};

/// A receiveq with its buffers.
#[derive(Debug)]
pub struct DriverRxQueue {
    /// The virtqueue and its eventfds.
    pub queue: DriverQueue,
    /// Whether [`DriverRxQueue::receive`] gives buffers back to the device. Without it the device
    /// runs out of buffers when it has used those it has.
    pub refill: bool,
    store: BufferStore,
    /// The size in bytes of each segment of a buffer.
    segment_lens: Vec<u32>,
    indirect: bool,
    mergeable: bool,
    /// Buffers that the device does not have.
    idle: Vec<u16>,
    /// The number of buffers.
    buffers: u16,
    /// The buffers of the current frame, and the number of bytes in each.
    parts: Vec<(u16, u32)>,
    /// The storage for the chain that is being added, to avoid an allocation for each.
    chain: Vec<Buf>,
}

/// The guest memory of the buffers.
#[derive(Debug)]
struct BufferStore {
    area: Area,
    /// The distance between buffers in bytes.
    stride: usize,
    /// The size of a buffer in bytes.
    capacity: u32,
    /// The size of the virtio-net header in bytes.
    header_len: usize,
}

/// A received frame in the queue's buffers.
#[derive(Debug)]
pub struct RxFrame<'a> {
    /// The virtio-net header.
    pub header: NetHeader,
    /// The size of the frame from the Ethernet header on in bytes.
    pub len: usize,
    parts: &'a [(u16, u32)],
    store: &'a BufferStore,
}

impl RxFrame<'_> {
    /// The number of buffers that the frame lies in.
    #[must_use]
    pub fn buffers(&self) -> usize {
        self.parts.len()
    }

    /// Copies the frame without its virtio-net header to `out`. Returns the number of bytes copied:
    /// the shorter of both lengths.
    #[inline]
    pub fn copy_to(&self, out: &mut [u8]) -> usize {
        let mut skip = self.store.header_len;
        let mut done = 0;
        for &(buffer, len) in self.parts {
            let available = usize::try_from(len).unwrap_or(0) - skip;
            let n = available.min(out.len() - done);
            let at = self.store.at(buffer) + skip;
            self.store.area.read(at, &mut out[done..done + n]);
            done += n;
            skip = 0;
        }
        done
    }

    /// A copy of the frame in private memory.
    #[must_use]
    pub fn to_frame(&self) -> Frame {
        let mut bytes = vec![0; self.len];
        self.copy_to(&mut bytes);
        Frame {
            header: self.header,
            bytes,
        }
    }
}

impl BufferStore {
    /// The offset of a buffer in bytes.
    fn at(&self, buffer: u16) -> usize {
        usize::from(buffer) * self.stride
    }

    /// The virtio-net header at the start of a buffer.
    fn header(&self, buffer: u16) -> NetHeader {
        let mut raw = [0; HEADER_LEN];
        self.area.read(self.at(buffer), &mut raw[..self.header_len]);
        NetHeader::from_bytes(raw)
    }
}

impl DriverRxQueue {
    /// Allocates the virtqueue and its buffers in `ram`. The device gets no buffer before
    /// [`DriverRxQueue::fill`].
    ///
    /// # Errors
    /// When the configuration is not possible or `ram` has not enough free memory.
    pub fn new(ram: &GuestRam, config: &DriverQueueConfig) -> Result<Self, Error> {
        config.check()?;
        let ring = DriverVirtqueueConfig {
            start: config.start,
            ..DriverVirtqueueConfig::new(config.size, config.features)
        };
        let too_large = || Error::Config("an RX buffer is larger than 4 GiB");
        let bytes = config.rx_stride() * u64::from(config.rx_buffers());
        let capacity = config
            .rx_buffer
            .iter()
            .try_fold(0, |a: u32, &b| a.checked_add(b));
        Ok(Self {
            queue: DriverQueue::new(DriverVirtqueue::new(ram, ring)?)?,
            refill: true,
            store: BufferStore {
                area: ram.area(ram.alloc(bytes, 4096)?, bytes)?,
                stride: usize::try_from(config.rx_stride()).map_err(|_| too_large())?,
                capacity: capacity.ok_or_else(too_large)?,
                header_len: header_len(config.features),
            },
            segment_lens: config.rx_buffer.clone(),
            indirect: config.indirect() && config.rx_buffer.len() > 1,
            mergeable: config.has_feature(VIRTIO_NET_F_MRG_RXBUF),
            idle: (0..config.rx_buffers()).rev().collect(),
            buffers: config.rx_buffers(),
            parts: Vec::new(),
            chain: Vec::new(),
        })
    }

    /// Starts again without chains, as a driver does that is loaded again. The device must be
    /// stopped.
    pub fn reset(&mut self) {
        self.queue.ring.reset();
        self.idle = (0..self.buffers).rev().collect();
    }

    /// The guest memory of all buffers. The driver never writes to it.
    #[must_use]
    pub fn buffers(&self) -> &Area {
        &self.store.area
    }

    /// Gives the device every buffer that it does not have. Returns how many.
    ///
    /// # Errors
    /// When the kick cannot be written.
    pub fn fill(&mut self) -> Result<u16, Error> {
        self.fill_some(u16::MAX)
    }

    /// Gives the device up to `most` buffers. Returns how many.
    ///
    /// # Errors
    /// When the kick cannot be written.
    #[inline]
    pub fn fill_some(&mut self, most: u16) -> Result<u16, Error> {
        let mut count = 0;
        while count < most {
            let Some(buffer) = self.idle.pop() else {
                break;
            };
            self.add(buffer)?;
            count += 1;
        }
        self.queue.flush()?;
        Ok(count)
    }

    /// Adds the chain of a buffer.
    #[inline(always)]
    fn add(&mut self, buffer: u16) -> Result<(), Error> {
        let mut addr = self.store.area.addr() + to_u64(self.store.at(buffer));
        let token = u64::from(buffer);
        if let [len] = self.segment_lens[..] {
            let chain = [Buf::writable(addr, len)];
            self.queue.ring.add(&chain, false, token)?;
            return Ok(());
        }
        self.chain.clear();
        for &len in &self.segment_lens {
            self.chain.push(Buf::writable(addr, len));
            addr += u64::from(len);
        }
        self.queue.ring.add(&self.chain, self.indirect, token)?;
        Ok(())
    }

    /// Passes up to `most` frames to `each` and then gives their buffers back (see
    /// [`DriverRxQueue::refill`]). It does not wait. Returns the number of frames.
    ///
    /// # Errors
    /// When the device breaks a rule. The queue cannot be used any more then.
    #[inline]
    pub fn receive(
        &mut self,
        most: usize,
        mut each: impl FnMut(&RxFrame<'_>),
    ) -> Result<usize, Error> {
        self.queue.ring.refresh()?;
        let mut count = 0;
        while count < most {
            let Some((header, len)) = self.collect_frame()? else {
                break;
            };
            each(&RxFrame {
                header,
                len,
                parts: &self.parts,
                store: &self.store,
            });
            self.idle.extend(self.parts.iter().map(|part| part.0));
            count += 1;
        }
        if self.refill && count != 0 {
            self.fill()?;
        }
        Ok(count)
    }

    /// Receives all frames that are available, without waiting.
    ///
    /// # Errors
    /// As [`DriverRxQueue::receive`].
    pub fn receive_frames(&mut self) -> Result<Vec<Frame>, Error> {
        let mut frames = Vec::new();
        self.receive(usize::MAX, |frame| frames.push(frame.to_frame()))?;
        Ok(frames)
    }

    /// Waits on the call eventfd until at least `wanted` frames are received, and returns them.
    ///
    /// # Errors
    /// When fewer frames come within `limit`, or as [`DriverRxQueue::receive`].
    pub fn wait_frames(&mut self, wanted: usize, limit: Duration) -> Result<Vec<Frame>, Error> {
        let end = Instant::now() + limit;
        let mut frames = Vec::new();
        loop {
            frames.append(&mut self.receive_frames()?);
            if frames.len() >= wanted {
                return Ok(frames);
            }
            if self.queue.ring.enable_calls() {
                continue;
            }
            let left = end.saturating_duration_since(Instant::now());
            let called = self.queue.call.wait(left);
            if called.map_err(Error::io("cannot wait for a call"))? == 0 {
                return Err(Error::Waited {
                    waited: limit,
                    what: "RX frames",
                    got: frames.len(),
                    wanted,
                });
            }
        }
    }

    /// Collects the buffers of one frame into `parts`. Returns its header and its length in bytes.
    #[inline(always)]
    fn collect_frame(&mut self) -> Result<Option<(NetHeader, usize)>, Error> {
        self.parts.clear();
        if !self.collect_buffer()? {
            return Ok(None);
        }
        let (first, written) = self.parts[0];
        let mut len = usize::try_from(written).unwrap_or(0);
        if len < self.store.header_len {
            return Err(DeviceFault::NoHeader(written).into());
        }
        let header = self.store.header(first);
        if self.mergeable {
            for got in 1..header.num_buffers {
                if !self.collect_buffer()? {
                    let wanted = header.num_buffers;
                    return Err(DeviceFault::TornFrame { wanted, got }.into());
                }
                len += self
                    .parts
                    .last()
                    .map_or(0, |part| usize::try_from(part.1).unwrap_or(0));
            }
            if header.num_buffers == 0 {
                return Err(DeviceFault::NoBuffers.into());
            }
        }
        Ok(Some((header, len - self.store.header_len)))
    }

    /// Collects one buffer. Returns false when there is none.
    #[inline(always)]
    fn collect_buffer(&mut self) -> Result<bool, Error> {
        let Some((token, len)) = self.queue.ring.pop()? else {
            return Ok(false);
        };
        let capacity = self.store.capacity;
        if len > capacity {
            return Err(DeviceFault::UsedLength { len, capacity }.into());
        }
        let buffer = u16::try_from(token).unwrap_or_default();
        self.parts.push((buffer, len));
        Ok(true)
    }
}
