//! Frames from the TAP to the guest.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use virtionet_guest::frame::Frame;
use virtionet_guest::net::{DriverQueueConfig, MERGEABLE_BUFFER};
use virtionet_guest::rx::DriverRxQueue;
use virtionet_virtio_net::RxQueue as DeviceRx;
use virtionet_virtio_net::stats::VringStats;
use virtionet_virtio_net::uplink::UplinkQueue;

use super::testbed::{FEATURES, TapTestbed, create_device_queue, create_guest_ram};
use crate::harness::time_ns;
use crate::sampling::median;

/// Size of the virtqueue, and number of buffers of the bare side.
const QUEUE_SIZE: u16 = 256;
/// The largest number of buffers that a frame needs.
const MAX_SEGMENTS: usize = 48;
/// Bytes of the virtio-net header.
const HEADER_LEN: usize = 12;

/// The system call of the bare side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ReadCall {
    /// `readv`, which can read a frame into several buffers.
    Readv,
    /// `read` into one buffer, which requires that every frame fits one buffer.
    Read,
}

impl ReadCall {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Readv => "bare readv",
            Self::Read => "bare read",
        }
    }
}

/// One side of the comparison, and the source of its frames.
pub(super) struct Receiver {
    source: File,
    header: Vec<u8>,
    frame: Vec<u8>,
    /// Number of frames in a burst.
    burst_len: usize,
    side: ReceiveSide,
}

enum ReceiveSide {
    /// The uplink queue of the TAP, the RX queue of a device, and a receiveq.
    Ours(Box<Ours>),
    /// A system call on the file descriptor of the TAP.
    Bare(Bare),
}

struct Ours {
    driver: DriverRxQueue,
    device: DeviceRx,
    uplink: Arc<dyn UplinkQueue>,
}

/// Buffers of the same number and size as those of the virtqueue. Each frame is read into exactly
/// as many buffers as it needs, which a device does not know in advance.
struct Bare {
    tap: File,
    call: ReadCall,
    buffers: Vec<Vec<u8>>,
    /// Number of buffers that a frame needs.
    buffers_per_frame: usize,
    next: usize,
}

impl Receiver {
    pub(super) fn ours(testbed: &TapTestbed, frame: &Frame) -> Result<Self> {
        let config = DriverQueueConfig::new(QUEUE_SIZE, FEATURES);
        let ram = create_guest_ram(&config)?;
        let mut driver = DriverRxQueue::new(&ram, &config)?;
        driver.fill()?;
        let stats = Arc::new(VringStats::default());
        let ours = Ours {
            device: create_device_queue(&ram, &driver.queue, &stats)?,
            driver,
            uplink: testbed.queue(),
        };
        Self::new(testbed, frame, ReceiveSide::Ours(Box::new(ours)))
    }

    pub(super) fn bare(testbed: &TapTestbed, frame: &Frame, call: ReadCall) -> Result<Self> {
        let size = usize::try_from(MERGEABLE_BUFFER)?;
        let bare = Bare {
            tap: testbed.queue_file()?,
            call,
            buffers: vec![vec![0; size]; QUEUE_SIZE.into()],
            buffers_per_frame: (HEADER_LEN + frame.bytes.len()).div_ceil(size),
            next: 0,
        };
        Self::new(testbed, frame, ReceiveSide::Bare(bare))
    }

    fn new(testbed: &TapTestbed, frame: &Frame, side: ReceiveSide) -> Result<Self> {
        Ok(Self {
            source: testbed.source_file()?,
            header: frame.header.to_bytes().to_vec(),
            frame: frame.bytes.clone(),
            // The virtqueue has buffers for five of the largest frames.
            burst_len: if frame.header.gso_size == 0 { 64 } else { 4 },
            side,
        })
    }

    /// Receives at least `frames` frames. Returns the nanoseconds per frame of the median burst.
    pub(super) fn measure(&mut self, frames: usize) -> Result<f64> {
        let mut times = Vec::new();
        for _ in 0..frames.div_ceil(self.burst_len) {
            self.inject_burst()?;
            times.push(match &mut self.side {
                ReceiveSide::Ours(ours) => ours.receive_burst(self.burst_len, self.frame.len())?,
                ReceiveSide::Bare(bare) => {
                    bare.receive_burst(self.burst_len, HEADER_LEN + self.frame.len())?
                }
            });
        }
        Ok(median(&times) / f64::from(u32::try_from(self.burst_len)?))
    }

    /// Writes a burst to the source, so that it waits in the queue of the TAP.
    fn inject_burst(&mut self) -> Result<()> {
        let parts = [IoSlice::new(&self.header), IoSlice::new(&self.frame)];
        for _ in 0..self.burst_len {
            self.source
                .write_vectored(&parts)
                .context("a frame cannot be written to the source TAP")?;
        }
        Ok(())
    }
}

impl Ours {
    fn receive_burst(&mut self, count: usize, len: usize) -> Result<f64> {
        let mut received = None;
        let time = time_ns(|| {
            received = Some(self.device.receive(&*self.uplink, count, usize::MAX)?);
            Ok(())
        })?;
        let result = received.map(|received| (received.frames, received.bytes));
        ensure!(
            result == Some((count, count * len)),
            "the device received {received:?} instead of {count} frames of {len} bytes"
        );
        // This also makes the buffers available again.
        let received = self.driver.receive(usize::MAX, |_| ())?;
        ensure!(
            received == count,
            "the guest received {received} of {count} frames"
        );
        Ok(time)
    }
}

impl Bare {
    fn receive_burst(&mut self, count: usize, len: usize) -> Result<f64> {
        time_ns(|| {
            for _ in 0..count {
                let received = self.read_frame()?;
                ensure!(
                    received == len,
                    "the TAP returned a frame of {received} bytes instead of {len}"
                );
            }
            Ok(())
        })
    }

    fn read_frame(&mut self) -> Result<usize> {
        if self.next + self.buffers_per_frame > self.buffers.len() {
            self.next = 0;
        }
        let buffers = &mut self.buffers[self.next..self.next + self.buffers_per_frame];
        self.next += self.buffers_per_frame;
        if self.call == ReadCall::Read
            && let [buffer] = buffers
        {
            return Ok(self.tap.read(buffer)?);
        }
        let mut iovecs: [IoSliceMut<'_>; MAX_SEGMENTS] =
            std::array::from_fn(|_| IoSliceMut::new(&mut []));
        for (iovec, buffer) in iovecs.iter_mut().zip(buffers) {
            *iovec = IoSliceMut::new(buffer);
        }
        Ok(self
            .tap
            .read_vectored(&mut iovecs[..self.buffers_per_frame])?)
    }
}
