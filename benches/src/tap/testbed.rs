//! The TAP, and the source of the frames that it receives.

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

use crate::harness::run_ip;

/// The features that the guest negotiates.
pub(crate) const FEATURES: u64 = MODERN;

/// A TAP with one queue, and optionally a second TAP on the same bridge as the source of frames.
#[derive(Debug)]
pub(crate) struct TapTestbed {
    tap: TapEnd,
    source: Option<TapEnd>,
}

#[derive(Debug)]
struct TapEnd {
    queue: Arc<dyn UplinkQueue>,
    // The kernel removes a TAP when it is closed.
    _tap: Tap,
}

impl TapTestbed {
    /// Creates a TAP without a source. The network stack of the host drops the frames that are sent
    /// to the TAP.
    pub(crate) fn without_source() -> Result<Self> {
        Ok(Self {
            tap: TapEnd::new("bench0", None)?,
            source: None,
        })
    }

    /// Creates a TAP and a source on a bridge, which forwards frames from the source to the TAP.
    pub(crate) fn with_source() -> Result<Self> {
        // A bridge of an earlier testbed may still exist.
        _ = run_ip("link del benchbr");
        run_ip("link add benchbr type bridge stp_state 0 forward_delay 0 mcast_snooping 0")?;
        run_ip("link set benchbr up")?;
        Ok(Self {
            tap: TapEnd::new("bench0", Some("benchbr"))?,
            source: Some(TapEnd::new("bench1", Some("benchbr"))?),
        })
    }

    /// The queue of the TAP, as a device uses it.
    pub(crate) fn queue(&self) -> Arc<dyn UplinkQueue> {
        Arc::clone(&self.tap.queue)
    }

    /// Duplicates the file descriptor of the same queue, for bare system calls.
    pub(crate) fn queue_file(&self) -> Result<File> {
        duplicate_file(&self.tap)
    }

    /// Duplicates the file descriptor of the source.
    pub(crate) fn source_file(&self) -> Result<File> {
        let source = self.source.as_ref();
        duplicate_file(source.context("this testbed has no source")?)
    }
}

impl TapEnd {
    fn new(name: &str, bridge: Option<&str>) -> Result<Self> {
        let config = TapConfig {
            name: name.to_owned(),
            bridge: bridge.map(str::to_owned),
        };
        let tap = Tap::open(&config)?;
        ensure!(
            tap.is_created_by_us(),
            "the TAP {name} already exists: delete it and try again"
        );
        tap.set_format(Features(FEATURES).format())?;
        let queue = tap.open_queue(0, null_rx_sink())?;
        queue.set_attached(true)?;
        Ok(Self { queue, _tap: tap })
    }
}

fn duplicate_file(end: &TapEnd) -> Result<File> {
    let fd: BorrowedFd<'_> = end
        .queue
        .poll_fd()
        .context("the TAP has no file descriptor")?;
    Ok(File::from(fd.try_clone_to_owned()?))
}

/// Creates a device's queue on the virtqueue of a driver in this process.
pub(crate) fn create_device_queue<Q: DeviceQueue>(
    ram: &GuestRam,
    driver: &net::DriverQueue,
    stats: &Arc<VringStats>,
) -> Result<Q> {
    let addresses = driver.ring.addresses();
    let user_addr = |addr| {
        ram.user_addr(addr)
            .context("a virtqueue is not in guest memory")
    };
    let config = QueueConfig {
        layout: VirtqueueLayout {
            size: driver.ring.size(),
            desc: user_addr(addresses.descriptors)?,
            avail: user_addr(addresses.driver)?,
            used: user_addr(addresses.device)?,
        },
        base: driver.ring.base(),
        features: Features(FEATURES),
        memory: Arc::new(ram.guest_memory()?),
        stats: Arc::clone(stats),
        record: None,
    };
    Ok(Q::new(config)?)
}

/// Creates guest memory for a queue with this configuration.
pub(crate) fn create_guest_ram(config: &net::DriverQueueConfig) -> Result<GuestRam> {
    Ok(GuestRam::new(
        config.memory().next_multiple_of(4096) + (1 << 16),
    )?)
}
