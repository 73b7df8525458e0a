//! The same with a packed ring: descriptors are written one after the other, each available.

use std::collections::VecDeque;
use std::sync::Arc;

use virtionet_guest::driver::DriverVirtqueueConfig;
use virtionet_guest::memory::GuestRam;
use virtionet_guest::net::PACKED;
use virtionet_guest::packed::{PackedDescriptor, PackedDriverVirtqueue, RingPosition};
use virtionet_guest::split::VRING_DESC_F_NEXT;
use virtionet_virtio_net::features::Features;
use virtionet_virtio_net::stats::VringStats;
use virtionet_virtio_net::{DeviceQueue, QueueConfig};
use virtionet_virtqueue::VirtqueueLayout;

use super::{DATA, END, HOLE, ISLAND, JOINED, RecordingUplink, START, TABLE, counted};

/// Guest memory and a packed ring in it, seen from the driver.
pub struct PackedRingFixture {
    pub ram: GuestRam,
    pub ring: PackedDriverVirtqueue,
    pub stats: Arc<VringStats>,
    pub uplink: RecordingUplink,
    /// The next descriptor to write.
    pub at: RingPosition,
    features: u64,
    /// The first descriptor that was not seen used.
    next_used: RingPosition,
    /// Descriptors of each chain written and not seen used, and of the one at hand.
    chains: VecDeque<u16>,
    open: u16,
    counted: Vec<u64>,
}

impl PackedRingFixture {
    /// An empty ring of `size`, at whose descriptor `start` the driver begins.
    pub fn new(start: u16, size: u16, features: u64) -> Self {
        let layout = [
            (START, JOINED - START),
            (JOINED, HOLE - JOINED),
            (ISLAND, END - ISLAND),
        ];
        let ram = GuestRam::with_layout(&layout).unwrap();
        let config = DriverVirtqueueConfig {
            start,
            ..DriverVirtqueueConfig::new(size, features | PACKED)
        };
        let ring = PackedDriverVirtqueue::new(&ram, config).unwrap();
        let stats = Arc::new(VringStats::default());
        let at = RingPosition::nth(start, size);
        Self {
            counted: stats.values(),
            ram,
            ring,
            stats,
            uplink: RecordingUplink::default(),
            at,
            features: features | PACKED,
            next_used: at,
            chains: VecDeque::new(),
            open: 0,
        }
    }

    /// The device's queue on this ring, from where the driver has seen it used.
    pub fn device<Q: DeviceQueue>(&self) -> Q {
        Q::new(self.config(base(self.next_used))).unwrap()
    }

    /// What a device's queue is made of.
    pub fn config(&self, base: u32) -> QueueConfig {
        let at = self.ring.addresses();
        let user = |addr| self.ram.user_addr(addr).unwrap();
        QueueConfig {
            layout: VirtqueueLayout {
                size: self.ring.size(),
                desc: user(at.descriptors),
                avail: user(at.driver),
                used: user(at.device),
            },
            base,
            features: Features(self.features),
            memory: Arc::new(self.ram.guest_memory().unwrap()),
            stats: Arc::clone(&self.stats),
        }
    }

    /// Makes a descriptor available at the next place.
    pub fn put(&mut self, addr: u64, len: u32, id: u16, flags: u16) {
        let at = self.at;
        let flags = flags | at.available();
        let descriptor = PackedDescriptor::new(addr, len, id, flags);
        self.ring.set_descriptor(at.index, descriptor);
        self.at = at.after(1, self.ring.size());
        self.open += 1;
        if flags & VRING_DESC_F_NEXT == 0 {
            self.chains.push_back(std::mem::take(&mut self.open));
        }
    }

    /// An empty ring, as of a driver that is loaded anew.
    pub fn reset(&mut self) {
        self.ring.reset();
        self.at = RingPosition::nth(0, self.ring.size());
        self.next_used = self.at;
        self.chains.clear();
        self.open = 0;
    }

    /// Descriptors that are neither the device's nor used and unseen.
    pub fn free_descriptors(&self) -> u16 {
        self.ring.size() - self.open - self.chains.iter().sum::<u16>()
    }

    /// A whole chain over `bytes`, which are put into memory.
    pub fn readable(&mut self, id: u16, bytes: &[u8]) {
        let addr = DATA + 0x2_0000 * u64::from(id % 64);
        self.ram.write(addr, bytes).unwrap();
        self.put(addr, u32::try_from(bytes.len()).unwrap(), id, 0);
    }

    /// Writes a table of descriptors (address, length, flags) to [`TABLE`].
    pub fn table(&self, entries: &[(u64, u32, u16)]) {
        let bytes = u64::try_from(entries.len() * 16).unwrap();
        let area = self.ram.area(TABLE, bytes).unwrap();
        for (&(addr, len, flags), offset) in entries.iter().zip((0..).step_by(16)) {
            // An id in a table means nothing; this one would be WRITE and VRING_DESC_F_INDIRECT.
            PackedDescriptor::new(addr, len, 6, flags).store(&area, offset);
        }
    }

    /// Used descriptors (id, length) that the device showed since the last call.
    pub fn used(&mut self) -> Vec<(u16, u32)> {
        let mut elements = Vec::new();
        while let Some(count) = self.chains.front().copied() {
            let found = self.ring.descriptor(self.next_used.index);
            let write = if found.len == 0 { 0 } else { 2 };
            if found.flags != self.next_used.used() | write {
                break;
            }
            elements.push((found.id, found.len));
            self.next_used = self.next_used.after(count, self.ring.size());
            self.chains.pop_front();
        }
        elements
    }

    /// The base of a device that used all that [`PackedRingFixture::used`] has told of.
    pub fn base(&self) -> u32 {
        base(self.next_used)
    }

    /// Counters that went up since the last call, as of the other fixture.
    pub fn counted(&mut self) -> Vec<(&'static str, u64)> {
        counted(&self.stats, &mut self.counted)
    }
}

fn base(place: RingPosition) -> u32 {
    u32::from(place.word()) | u32::from(place.word()) << 16
}
