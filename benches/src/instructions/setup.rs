//! The memory of a guest, and a device's queue in it.

use std::sync::Arc;

use anyhow::{Context, Result};
use virtionet_guest::driver::DriverVirtqueue;
use virtionet_guest::memory::GuestRam;
use virtionet_guest::net::{self, PACKED};
use virtionet_net_device::crash_records::CrashRecords;
use virtionet_virtio_net::features::Features;
use virtionet_virtio_net::stats::VringStats;
use virtionet_virtio_net::{DeviceQueue, QueueConfig};
use virtionet_virtqueue::VirtqueueLayout;

/// Creates guest memory for a queue with this configuration.
pub(super) fn create_ram(config: &net::DriverQueueConfig) -> Result<GuestRam> {
    let bytes = config.memory().next_multiple_of(4096);
    Ok(GuestRam::new(bytes + (1 << 16))?)
}

/// Creates a device's queue on a driver's virtqueue, with a crash record if it is packed.
pub(super) fn create_device_queue<Q: DeviceQueue>(
    ram: &GuestRam,
    driver: &DriverVirtqueue,
    features: u64,
    stats: &Arc<VringStats>,
) -> Result<Q> {
    let record = match features & PACKED {
        0 => None,
        _ => Some(CrashRecords::in_memory()?.record(0, driver.size(), driver.base())?),
    };
    Ok(Q::new(QueueConfig {
        layout: virtqueue_layout(ram, driver)?,
        base: driver.base(),
        features: Features(features),
        memory: Arc::new(ram.guest_memory()?),
        stats: Arc::clone(stats),
        record,
    })?)
}

pub(super) fn virtqueue_layout(
    ram: &GuestRam,
    driver: &DriverVirtqueue,
) -> Result<VirtqueueLayout> {
    let addresses = driver.addresses();
    let user_addr = |addr| ram.user_addr(addr).context("the guest has no such address");
    Ok(VirtqueueLayout {
        size: driver.size(),
        desc: user_addr(addresses.descriptors)?,
        avail: user_addr(addresses.driver)?,
        used: user_addr(addresses.device)?,
    })
}
