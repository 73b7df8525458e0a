//! A virtqueue of either format whose driver and device both run in this process.
#![allow(dead_code, reason = "each test file uses its own part of this")]
#![allow(clippy::unwrap_used)]

pub mod event_suppression;
mod setup;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use virtionet_guest::driver::{DriverVirtqueue, DriverVirtqueueConfig};
use virtionet_guest::memory::GuestRam;
use virtionet_virtqueue::memory::GuestMemory;
use virtionet_virtqueue::{Burst, Virtqueue, VirtqueueConfig, VirtqueueLayout};

pub use setup::Setup;

/// The size of guest memory in bytes.
pub const RAM: u64 = 0x60_0000;
/// The guest address of the buffers. The buffers of each chain lie in a slot of their own.
pub const DATA: u64 = 0x20_0000;
/// The size of a slot in bytes.
pub const SLOT: u64 = 0x1000;
/// The number of slots.
pub const SLOTS: u64 = 1024;

/// The driver, and what a device is made of.
pub struct Guest {
    pub ram: GuestRam,
    pub ring: DriverVirtqueue,
    pub config: VirtqueueConfig,
}

impl Guest {
    pub fn new(setup: Setup) -> Self {
        let ram = GuestRam::new(RAM).unwrap();
        let driver = DriverVirtqueueConfig {
            size: setup.size,
            event_idx: setup.event_idx,
            packed: setup.packed,
            start: setup.start,
        };
        let ring = DriverVirtqueue::new(&ram, driver).unwrap();
        let at = ring.addresses();
        let user = |addr| ram.user_addr(addr).unwrap();
        let config = VirtqueueConfig {
            layout: VirtqueueLayout {
                size: setup.size,
                desc: user(at.descriptors),
                avail: user(at.driver),
                used: user(at.device),
            },
            base: ring.base(),
            direction: setup.direction,
            packed: setup.packed,
            event_idx: setup.event_idx,
            indirect: true,
            min_len: 0,
        };
        Self { ram, ring, config }
    }

    /// A new snapshot of the memory with mappings of its own.
    pub fn memory(&self) -> Arc<GuestMemory> {
        Arc::new(self.ram.guest_memory().unwrap())
    }

    /// A device that continues at `base`.
    pub fn device(&self, base: u32) -> (Virtqueue, Burst) {
        let memory = self.memory();
        let config = VirtqueueConfig {
            base,
            ..self.config
        };
        (Virtqueue::new(config, &memory).unwrap(), Burst::new(memory))
    }
}

/// Sets its flag when it is dropped, also by a panic. Otherwise the other thread would run forever.
pub struct SetOnDrop<'a>(pub &'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
