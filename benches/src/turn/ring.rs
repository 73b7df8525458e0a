//! A split virtqueue that is as expensive for the device as its guest can make it: every entry of
//! the available ring names the same chain.

use std::sync::Arc;

use anyhow::{Context, Result};
use virtionet_guest::driver::DriverVirtqueueConfig;
use virtionet_guest::memory::GuestRam;
use virtionet_guest::split::{
    SplitDescriptor, SplitDriverVirtqueue, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT,
    VRING_DESC_F_WRITE,
};
use virtionet_virtio_net::QueueConfig;
use virtionet_virtio_net::features::Features;
use virtionet_virtqueue::VirtqueueLayout;

/// Size of the virtqueue.
const QUEUE_SIZE: u16 = 1024;

/// The flags of the buffers of a transmitq.
pub(super) const TX: u16 = 0;
/// The flags of the buffers of a receiveq.
pub(super) const RX: u16 = VRING_DESC_F_WRITE;

/// The chain to which all entries refer.
#[derive(Debug, Clone, Copy)]
pub(super) enum ChainKind {
    /// So many descriptors of the descriptor table.
    Direct { segments: u16 },
    /// The same in an indirect table.
    Indirect { segments: u16 },
    /// Every descriptor of the table, without an end.
    Loop,
}

/// A virtqueue, and the driver's memory.
#[derive(Debug)]
pub(super) struct HostileRing {
    virtqueue: SplitDriverVirtqueue,
    ram: GuestRam,
}

impl HostileRing {
    /// A virtqueue whose chains have the buffer `bytes`, cut into segments of about the same
    /// length. `direction` is [`TX`] or [`RX`].
    pub(super) fn new(direction: u16, kind: ChainKind, bytes: &[u8]) -> Result<Self> {
        let ram = GuestRam::new(1 << 20)?;
        let config = DriverVirtqueueConfig {
            size: QUEUE_SIZE,
            event_idx: false,
            packed: false,
            start: 0,
        };
        let virtqueue = SplitDriverVirtqueue::new(&ram, config)?;
        let buffer = ram.alloc(u64::try_from(bytes.len())?, 4096)?;
        ram.write(buffer, bytes)?;
        let (segments, last_flags) = match kind {
            ChainKind::Direct { segments } | ChainKind::Indirect { segments } => (segments, 0),
            ChainKind::Loop => (QUEUE_SIZE, VRING_DESC_F_NEXT),
        };
        let len = bytes.len() / usize::from(segments);
        let descriptors = (0..segments).map(|n| {
            let is_last = n + 1 == segments;
            let at = len * usize::from(n);
            let here = if is_last { bytes.len() - at } else { len };
            let flags = if is_last {
                last_flags
            } else {
                VRING_DESC_F_NEXT
            };
            let next = if is_last { 0 } else { n + 1 };
            let addr = buffer + u64::try_from(at)?;
            Ok(SplitDescriptor::new(
                addr,
                u32::try_from(here)?,
                direction | flags,
                next,
            ))
        });
        let descriptors = descriptors.collect::<Result<Vec<_>>>()?;
        if let ChainKind::Indirect { .. } = kind {
            let table_len = 16 * u32::from(segments);
            let table = ram.alloc_area(table_len.into(), 16)?;
            for (n, descriptor) in descriptors.into_iter().enumerate() {
                descriptor.store(&table, 16 * n);
            }
            let table = SplitDescriptor::new(table.addr(), table_len, VRING_DESC_F_INDIRECT, 0);
            virtqueue.set_descriptor(0, table);
        } else {
            for (n, descriptor) in (0..).zip(descriptors) {
                virtqueue.set_descriptor(n, descriptor);
            }
        }
        for entry in 0..QUEUE_SIZE {
            virtqueue.set_avail_entry(entry, 0);
        }
        Ok(Self { virtqueue, ram })
    }

    /// The configuration of the device's end, for a guest that negotiated `features`.
    pub(super) fn config(&self, features: u64) -> Result<QueueConfig> {
        let addresses = self.virtqueue.addresses();
        let user_addr = |addr| {
            let user_addr = self.ram.user_addr(addr);
            user_addr.context("the virtqueue is not in guest memory")
        };
        Ok(QueueConfig {
            layout: VirtqueueLayout {
                size: QUEUE_SIZE,
                desc: user_addr(addresses.descriptors)?,
                avail: user_addr(addresses.driver)?,
                used: user_addr(addresses.device)?,
            },
            base: 0,
            features: Features(features),
            memory: Arc::new(self.ram.guest_memory()?),
            stats: Arc::default(),
            record: None,
        })
    }

    /// Makes every entry of the available ring available that the device has used.
    pub(super) fn refill(&mut self) {
        let used = self.virtqueue.used_index();
        self.virtqueue
            .set_avail_index(used.wrapping_add(QUEUE_SIZE));
    }
}
