//! The same fixture with a packed ring, whose descriptors are made available one after the other.

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
    /// The first descriptor that was not seen as used.
    next_used: RingPosition,
    /// The number of descriptors of each chain that was not seen as used, and of the present one.
    chains: VecDeque<u16>,
    open: u16,
    counted: Vec<u64>,
}

impl PackedRingFixture {
    /// Creates an empty ring of `size` descriptors, of which the driver begins with `start`.
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

    /// Creates the device's queue on this ring, at the position up to which descriptors were used.
    pub fn device<Q: DeviceQueue>(&self) -> Q {
        Q::new(self.config(base(self.next_used))).unwrap()
    }

    /// The configuration of a device's queue.
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
            record: None,
        }
    }

    /// Makes the next descriptor available.
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

    /// Empties the ring, as a driver does that is loaded again.
    pub fn reset(&mut self) {
        self.ring.reset();
        self.at = RingPosition::nth(0, self.ring.size());
        self.next_used = self.at;
        self.chains.clear();
        self.open = 0;
    }

    /// The number of descriptors that belong to no chain that is added and not collected.
    pub fn free_descriptors(&self) -> u16 {
        self.ring.size() - self.open - self.chains.iter().sum::<u16>()
    }

    /// Writes `bytes` to memory, and a whole chain over them.
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
            // An id in a table has no meaning; as flags, this one would be WRITE and INDIRECT.
            PackedDescriptor::new(addr, len, 6, flags).store(&area, offset);
        }
    }

    /// The used descriptors (id, length) that the device published since the last call.
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

    /// The base of a device that used all descriptors that [`PackedRingFixture::used`] returned.
    pub fn base(&self) -> u32 {
        base(self.next_used)
    }

    /// The counters of faults and losses that increased since the last call.
    pub fn counted(&mut self) -> Vec<(&'static str, u64)> {
        counted(&self.stats, &mut self.counted)
    }
}

fn base(position: RingPosition) -> u32 {
    u32::from(position.word()) | u32::from(position.word()) << 16
}
