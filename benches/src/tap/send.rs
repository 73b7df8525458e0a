//! Frames from the guest to the TAP.

use std::fs::File;
use std::io::{IoSlice, Write};
use std::sync::Arc;

use anyhow::{Result, ensure};
use virtionet_guest::frame::Frame;
use virtionet_guest::net::{DriverQueueConfig, TxLayout};
use virtionet_guest::tx::DriverTxQueue;
use virtionet_virtio_net::TxQueue as DeviceTx;
use virtionet_virtio_net::stats::VringStats;
use virtionet_virtio_net::uplink::UplinkQueue;

use super::testbed::{FEATURES, TapTestbed, create_device_queue, create_guest_ram};
use crate::harness::time_ns;
use crate::sampling::median;

/// Number of frames in a burst, which is the largest burst of a device.
const BURST_LEN: u16 = 64;
/// Size of a segment: a Linux guest has one for each page of a large frame.
const SEGMENT_SIZE: usize = 4096;
/// The largest number of segments of a frame, including the header.
const MAX_SEGMENTS: usize = 18;

/// One side of the comparison.
pub(super) enum Sender {
    /// A transmitq, the TX queue of a device, and the uplink queue of the TAP.
    Ours(Box<Ours>),
    /// `writev` on the file descriptor of the TAP, with segments like those of the guest.
    Bare(Bare),
}

pub(super) struct Ours {
    driver: DriverTxQueue,
    device: DeviceTx,
    uplink: Arc<dyn UplinkQueue>,
    stats: Arc<VringStats>,
}

pub(super) struct Bare {
    tap: File,
    header: Vec<u8>,
    /// One buffer for each frame of a burst, as in the driver.
    frames: Vec<Vec<u8>>,
}

impl Sender {
    pub(super) fn ours(testbed: &TapTestbed, frame: &Frame) -> Result<Self> {
        let mut config = DriverQueueConfig::new(256, FEATURES);
        if frame.header.gso_size != 0 {
            config = config.with_big_tx();
            config.tx_layout = TxLayout::Segments(u32::try_from(SEGMENT_SIZE)?);
        }
        let ram = create_guest_ram(&config)?;
        let mut driver = DriverTxQueue::new(&ram, &config)?;
        driver.prefill(frame)?;
        let stats = Arc::new(VringStats::default());
        Ok(Self::Ours(Box::new(Ours {
            device: create_device_queue(&ram, &driver.queue, &stats)?,
            driver,
            uplink: testbed.queue(),
            stats,
        })))
    }

    pub(super) fn bare(testbed: &TapTestbed, frame: &Frame) -> Result<Self> {
        Ok(Self::Bare(Bare {
            tap: testbed.queue_file()?,
            header: frame.header.to_bytes().to_vec(),
            frames: vec![frame.bytes.clone(); BURST_LEN.into()],
        }))
    }

    /// Sends at least `frames` frames. Returns the nanoseconds per frame of the median burst.
    pub(super) fn measure(&mut self, frames: usize) -> Result<f64> {
        let mut times = Vec::new();
        for _ in 0..frames.div_ceil(BURST_LEN.into()) {
            times.push(match self {
                Self::Ours(ours) => ours.send_burst()?,
                Self::Bare(bare) => bare.send_burst()?,
            });
        }
        Ok(median(&times) / f64::from(BURST_LEN))
    }
}

impl Ours {
    fn send_burst(&mut self) -> Result<f64> {
        ensure!(
            self.driver.queue_prefilled(BURST_LEN)? == BURST_LEN,
            "the transmitq is full although the driver reclaims every burst"
        );
        self.driver.flush()?;
        let before = self.stats.frames.get();
        let time = time_ns(|| {
            self.device.send(Some(&*self.uplink))?;
            Ok(())
        })?;
        let sent = self.stats.frames.get() - before;
        ensure!(
            sent == u64::from(BURST_LEN),
            "the TAP accepted {sent} of {BURST_LEN} frames"
        );
        self.driver.reclaim()?;
        Ok(time)
    }
}

impl Bare {
    fn send_burst(&mut self) -> Result<f64> {
        let Self {
            tap,
            header,
            frames,
        } = self;
        time_ns(|| {
            for frame in &*frames {
                let mut iovecs = [IoSlice::new(&[]); MAX_SEGMENTS];
                let segments = frame.chunks(SEGMENT_SIZE);
                let count = 1 + segments.len();
                iovecs[0] = IoSlice::new(header);
                for (iovec, segment) in iovecs[1..].iter_mut().zip(segments) {
                    *iovec = IoSlice::new(segment);
                }
                let len = tap.write_vectored(&iovecs[..count])?;
                ensure!(
                    len == header.len() + frame.len(),
                    "the TAP accepted {len} bytes of a frame"
                );
            }
            Ok(())
        })
    }
}
