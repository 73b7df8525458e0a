//! From the TAP to the guest.

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

use super::testbed::{FEATURES, TapTestbed, device, guest_ram};
use crate::harness::time_ns;
use crate::sampling::median;

/// Buffers of the ring.
const SIZE: u16 = 256;
/// Buffers of the largest frame.
const MAX_SEGMENTS: usize = 48;
/// Bytes of the virtio-net header.
const HEADER: usize = 12;

/// What the bare side calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Call {
    /// `readv`, as anyone must who reads a frame into several buffers.
    Readv,
    /// `read` into one buffer: for who knows that every frame fits one.
    Read,
}

impl Call {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Readv => "bare readv",
            Self::Read => "bare read",
        }
    }
}

/// One way to receive, and what there is to receive.
pub(super) struct Receive {
    source: File,
    header: Vec<u8>,
    frame: Vec<u8>,
    /// Frames a burst.
    burst: usize,
    side: ReceiveSide,
}

enum ReceiveSide {
    /// The TAP's uplink queue, a device's RX queue, a ring.
    Ours(Box<Ours>),
    /// A system call on the TAP's descriptor.
    Bare(Bare),
}

struct Ours {
    driver: DriverRxQueue,
    device: DeviceRx,
    uplink: Arc<dyn UplinkQueue>,
}

/// Buffers like the ring's, as many and as large. Each frame is read into just as many as it needs,
/// which a device cannot know before.
struct Bare {
    tap: File,
    call: Call,
    buffers: Vec<Vec<u8>>,
    /// Buffers of a frame.
    needed: usize,
    next: usize,
}

impl Receive {
    pub(super) fn ours(testbed: &TapTestbed, frame: &Frame) -> Result<Self> {
        let config = DriverQueueConfig::new(SIZE, FEATURES);
        let ram = guest_ram(&config)?;
        let mut driver = DriverRxQueue::new(&ram, &config)?;
        driver.fill()?;
        let stats = Arc::new(VringStats::default());
        let ours = Ours {
            device: device(&ram, &driver.queue, &stats)?,
            driver,
            uplink: testbed.queue(),
        };
        Self::new(testbed, frame, ReceiveSide::Ours(Box::new(ours)))
    }

    pub(super) fn bare(testbed: &TapTestbed, frame: &Frame, call: Call) -> Result<Self> {
        let size = usize::try_from(MERGEABLE_BUFFER)?;
        let bare = Bare {
            tap: testbed.bare()?,
            call,
            buffers: vec![vec![0; size]; SIZE.into()],
            needed: (HEADER + frame.bytes.len()).div_ceil(size),
            next: 0,
        };
        Self::new(testbed, frame, ReceiveSide::Bare(bare))
    }

    fn new(testbed: &TapTestbed, frame: &Frame, side: ReceiveSide) -> Result<Self> {
        Ok(Self {
            source: testbed.source()?,
            header: frame.header.to_bytes().to_vec(),
            frame: frame.bytes.clone(),
            // The ring holds five of the largest frames.
            burst: if frame.header.gso_size == 0 { 64 } else { 4 },
            side,
        })
    }

    /// Nanoseconds a frame over some `frames`, in the median burst.
    pub(super) fn measure(&mut self, frames: usize) -> Result<f64> {
        let mut took = Vec::new();
        for _ in 0..frames.div_ceil(self.burst) {
            self.inject()?;
            took.push(match &mut self.side {
                ReceiveSide::Ours(ours) => ours.burst(self.burst, self.frame.len())?,
                ReceiveSide::Bare(bare) => bare.burst(self.burst, HEADER + self.frame.len())?,
            });
        }
        Ok(median(&took) / f64::from(u32::try_from(self.burst)?))
    }

    /// Puts a burst into the TAP's queue.
    fn inject(&mut self) -> Result<()> {
        let parts = [IoSlice::new(&self.header), IoSlice::new(&self.frame)];
        for _ in 0..self.burst {
            self.source
                .write_vectored(&parts)
                .context("the source does not take a frame")?;
        }
        Ok(())
    }
}

impl Ours {
    fn burst(&mut self, count: usize, len: usize) -> Result<f64> {
        let mut received = None;
        let took = time_ns(|| {
            received = Some(self.device.receive(&*self.uplink, count, usize::MAX)?);
            Ok(())
        })?;
        let did = received.map(|received| (received.frames, received.bytes));
        ensure!(
            did == Some((count, count * len)),
            "the device received {received:?}, where {count} frames of {len} bytes waited"
        );
        // Gives the buffers back as well.
        let got = self.driver.receive(usize::MAX, |_| ())?;
        ensure!(got == count, "the guest received {got} of {count} frames");
        Ok(took)
    }
}

impl Bare {
    fn burst(&mut self, count: usize, len: usize) -> Result<f64> {
        time_ns(|| {
            for _ in 0..count {
                let got = self.read()?;
                ensure!(got == len, "a frame of {got} bytes came, not one of {len}");
            }
            Ok(())
        })
    }

    fn read(&mut self) -> Result<usize> {
        if self.next + self.needed > self.buffers.len() {
            self.next = 0;
        }
        let buffers = &mut self.buffers[self.next..self.next + self.needed];
        self.next += self.needed;
        if self.call == Call::Read
            && let [buffer] = buffers
        {
            return Ok(self.tap.read(buffer)?);
        }
        let mut list: [IoSliceMut<'_>; MAX_SEGMENTS] =
            std::array::from_fn(|_| IoSliceMut::new(&mut []));
        for (slot, buffer) in list.iter_mut().zip(buffers) {
            *slot = IoSliceMut::new(buffer);
        }
        Ok(self.tap.read_vectored(&mut list[..self.needed])?)
    }
}
