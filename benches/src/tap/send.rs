//! From the guest to the TAP.

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

use super::testbed::{FEATURES, TapTestbed, device, guest_ram};
use crate::harness::time_ns;
use crate::sampling::median;

/// Frames a burst: what a device takes at once.
const BURST: u16 = 64;
/// How a Linux guest cuts a frame of many segments: by pages.
const SEGMENT_SIZE: usize = 4096;
/// Pieces of the largest frame, and its header.
const MAX_SEGMENTS: usize = 18;

/// One way to send.
pub(super) enum Send {
    /// A ring, a device's TX queue, the TAP's uplink queue.
    Ours(Box<Ours>),
    /// `writev` on the TAP's descriptor, of pieces like the guest's.
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
    /// As many as the driver has in use.
    frames: Vec<Vec<u8>>,
}

impl Send {
    pub(super) fn ours(testbed: &TapTestbed, frame: &Frame) -> Result<Self> {
        let mut config = DriverQueueConfig::new(256, FEATURES);
        if frame.header.gso_size != 0 {
            config = config.with_big_tx();
            config.tx_layout = TxLayout::Segments(u32::try_from(SEGMENT_SIZE)?);
        }
        let ram = guest_ram(&config)?;
        let mut driver = DriverTxQueue::new(&ram, &config)?;
        driver.prefill(frame)?;
        let stats = Arc::new(VringStats::default());
        Ok(Self::Ours(Box::new(Ours {
            device: device(&ram, &driver.queue, &stats)?,
            driver,
            uplink: testbed.queue(),
            stats,
        })))
    }

    pub(super) fn bare(testbed: &TapTestbed, frame: &Frame) -> Result<Self> {
        Ok(Self::Bare(Bare {
            tap: testbed.bare()?,
            header: frame.header.to_bytes().to_vec(),
            frames: vec![frame.bytes.clone(); BURST.into()],
        }))
    }

    /// Nanoseconds a frame over some `frames`, in the median burst.
    pub(super) fn measure(&mut self, frames: usize) -> Result<f64> {
        let mut took = Vec::new();
        for _ in 0..frames.div_ceil(BURST.into()) {
            took.push(match self {
                Self::Ours(ours) => ours.burst()?,
                Self::Bare(bare) => bare.burst()?,
            });
        }
        Ok(median(&took) / f64::from(BURST))
    }
}

impl Ours {
    fn burst(&mut self) -> Result<f64> {
        ensure!(
            self.driver.queue_prefilled(BURST)? == BURST,
            "the driver's ring is full although every burst is taken back"
        );
        self.driver.flush()?;
        let before = self.stats.frames.get();
        let took = time_ns(|| {
            self.device.send(Some(&*self.uplink))?;
            Ok(())
        })?;
        let sent = self.stats.frames.get() - before;
        ensure!(
            sent == u64::from(BURST),
            "the TAP took {sent} of {BURST} frames"
        );
        self.driver.reclaim()?;
        Ok(took)
    }
}

impl Bare {
    fn burst(&mut self) -> Result<f64> {
        let Self {
            tap,
            header,
            frames,
        } = self;
        time_ns(|| {
            for frame in &*frames {
                let mut list = [IoSlice::new(&[]); MAX_SEGMENTS];
                let segments = frame.chunks(SEGMENT_SIZE);
                let count = 1 + segments.len();
                list[0] = IoSlice::new(header);
                for (slot, segment) in list[1..].iter_mut().zip(segments) {
                    *slot = IoSlice::new(segment);
                }
                let len = tap.write_vectored(&list[..count])?;
                ensure!(len == header.len() + frame.len(), "the TAP cut a frame");
            }
            Ok(())
        })
    }
}
