//! The TAP, and where its frames come from.

use std::fs::File;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use virtionet_guest::memory::GuestRam;
use virtionet_guest::net::{self, MODERN};
use virtionet_uplink::tap::{Tap, TapConfig};
use virtionet_virtio_net::features::Features;
use virtionet_virtio_net::stats::VringStats;
use virtionet_virtio_net::uplink::{Uplink, UplinkQueue, null_rx_sink};
use virtionet_virtio_net::{DeviceQueue, QueueConfig};
use virtionet_virtqueue::VirtqueueLayout;

use crate::harness::ip;

/// What the guest negotiated.
pub(super) const FEATURES: u64 = MODERN;

/// A TAP with one queue, and for frames towards it a second TAP on the same bridge.
#[derive(Debug)]
pub(super) struct TapTestbed {
    tap: TapEnd,
    source: Option<TapEnd>,
}

#[derive(Debug)]
struct TapEnd {
    queue: Arc<dyn UplinkQueue>,
    // Held: a TAP that is closed is gone.
    _tap: Tap,
}

impl TapTestbed {
    /// Nobody takes the TAP's frames: the host's stack drops them at once.
    pub(super) fn alone() -> Result<Self> {
        Ok(Self {
            tap: TapEnd::new("bench0", None)?,
            source: None,
        })
    }

    /// What is written to the source comes out of the TAP, through a bridge.
    pub(super) fn with_source() -> Result<Self> {
        // A bridge of an earlier testbed may still exist.
        _ = ip("link del benchbr");
        ip("link add benchbr type bridge stp_state 0 forward_delay 0 mcast_snooping 0")?;
        ip("link set benchbr up")?;
        Ok(Self {
            tap: TapEnd::new("bench0", Some("benchbr"))?,
            source: Some(TapEnd::new("bench1", Some("benchbr"))?),
        })
    }

    /// The TAP's queue, as a device uses it.
    pub(super) fn queue(&self) -> Arc<dyn UplinkQueue> {
        Arc::clone(&self.tap.queue)
    }

    /// The same queue's descriptor, for bare system calls.
    pub(super) fn bare(&self) -> Result<File> {
        file(&self.tap)
    }

    /// The source's descriptor.
    pub(super) fn source(&self) -> Result<File> {
        let source = self.source.as_ref();
        file(source.context("this testbed has no source")?)
    }
}

impl TapEnd {
    fn new(name: &str, bridge: Option<&str>) -> Result<Self> {
        let config = TapConfig {
            name: name.to_owned(),
            bridge: bridge.map(str::to_owned),
        };
        let tap = Tap::open(&config)?;
        ensure!(tap.is_created_by_us(), "the TAP {name} was there already");
        tap.set_format(Features(FEATURES).format())?;
        let queue = tap.open_queue(0, null_rx_sink())?;
        queue.set_attached(true)?;
        Ok(Self { queue, _tap: tap })
    }
}

fn file(end: &TapEnd) -> Result<File> {
    let fd: BorrowedFd<'_> = end.queue.poll_fd().context("a TAP has a descriptor")?;
    Ok(File::from(fd.try_clone_to_owned()?))
}

/// A device's queue on the ring of a driver in this process.
pub(super) fn device<Q: DeviceQueue>(
    ram: &GuestRam,
    driver: &net::DriverQueue,
    stats: &Arc<VringStats>,
) -> Result<Q> {
    let at = driver.ring.addresses();
    let user = |addr| ram.user_addr(addr).context("a ring is not in guest memory");
    let config = QueueConfig {
        layout: VirtqueueLayout {
            size: driver.ring.size(),
            desc: user(at.descriptors)?,
            avail: user(at.driver)?,
            used: user(at.device)?,
        },
        base: driver.ring.base(),
        features: Features(FEATURES),
        memory: Arc::new(ram.guest_memory()?),
        stats: Arc::clone(stats),
    };
    Ok(Q::new(config)?)
}

/// Guest memory for one queue of this configuration.
pub(super) fn guest_ram(config: &net::DriverQueueConfig) -> Result<GuestRam> {
    Ok(GuestRam::new(
        config.memory().next_multiple_of(4096) + (1 << 16),
    )?)
}
