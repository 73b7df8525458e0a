//! One guest of the target `device`: its memory, its virtqueue, and what the device may do to them.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use virtionet_guest::driver::DriverVirtqueueConfig;
use virtionet_guest::memory::GuestRam;
use virtionet_guest::packed::{
    PackedDescriptor, PackedDriverVirtqueue, RingPosition, VIRTQ_DESC_F_AVAIL, VIRTQ_DESC_F_USED,
};
use virtionet_guest::split::{
    SplitDescriptor, SplitDriverVirtqueue, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT,
    VRING_DESC_F_WRITE,
};
use virtionet_virtio_net::QueueConfig;
use virtionet_virtio_net::features::Features;
use virtionet_virtio_net::stats::VringStats;
use virtionet_virtqueue::VirtqueueLayout;

use super::chain::{Flaw, Segment};

/// The memory of a guest: two adjacent regions, behind which nothing is mapped.
const LAYOUT: [(u64, u64); 2] = [(0, 0x1_0000), (0x1_0000, MEMORY_SIZE - 0x1_0000)];
const MEMORY_SIZE: u64 = 0x2_8000;
/// Indirect tables, one after the other. The virtqueue lies before them.
const TABLES: Range<u64> = 0x5000..0x7000;
/// Buffers. They cross the boundary of the regions.
const DATA: Range<u64> = 0x8000..0x2_6000;
/// The largest number of descriptors of a virtqueue.
pub const MAX_SIZE: u16 = 256;

/// The properties of a guest.
#[derive(Debug, Clone, Copy)]
pub struct GuestConfig {
    pub packed: bool,
    pub event_idx: bool,
    pub size: u16,
    pub start: u16,
    pub features: Features,
}

/// The driver's side of a virtqueue. The driver of `virtionet-guest` allocates it and gives access
/// to its fields; what is available is decided here.
enum Ring {
    Split {
        driver: SplitDriverVirtqueue,
        next_descriptor: u16,
    },
    Packed {
        driver: PackedDriverVirtqueue,
        at: RingPosition,
        /// The first descriptor that is not seen used.
        used: RingPosition,
        /// Number of descriptors of the chain whose last one is not written yet.
        open: u16,
    },
}

/// A chain that is available and not seen used: its head or id, and its number of descriptors.
struct Chain {
    id: u16,
    descriptors: u16,
}

/// What was seen used since the last call.
#[derive(Debug, Default, Clone, Copy)]
pub struct Used {
    pub chains: usize,
    pub bytes: u64,
}

/// A guest with one virtqueue.
pub struct Guest {
    ram: GuestRam,
    ring: Ring,
    config: GuestConfig,
    /// The index of the next available entry (split), and that of the next used one.
    next: u16,
    next_used: u16,
    next_data: u64,
    next_table: u64,
    chains: VecDeque<Chain>,
    /// Whether it is known which chains the guest's writes so far have made available.
    is_order_known: bool,
    /// Whether it is known what the device may write.
    are_writes_known: bool,
    /// For each byte of the memory, whether a writable descriptor has named it.
    writable: Vec<bool>,
    before: Vec<u8>,
}

impl Guest {
    pub fn new(config: GuestConfig) -> Self {
        let ram = GuestRam::with_layout(&LAYOUT).unwrap();
        let driver = DriverVirtqueueConfig {
            size: config.size,
            event_idx: config.event_idx,
            packed: config.packed,
            start: config.start,
        };
        let position = RingPosition::nth(config.start, config.size);
        let ring = match config.packed {
            false => Ring::Split {
                driver: SplitDriverVirtqueue::new(&ram, driver).unwrap(),
                next_descriptor: 0,
            },
            true => Ring::Packed {
                driver: PackedDriverVirtqueue::new(&ram, driver).unwrap(),
                at: position,
                used: position,
                open: 0,
            },
        };
        let len = usize::try_from(MEMORY_SIZE).unwrap();
        Self {
            ram,
            ring,
            config,
            next: config.start,
            next_used: config.start,
            next_data: DATA.start,
            next_table: TABLES.start,
            chains: VecDeque::new(),
            is_order_known: true,
            are_writes_known: true,
            writable: vec![false; len],
            before: vec![0; len],
        }
    }

    /// What the device needs to serve the virtqueue.
    pub fn queue_config(&self, stats: &Arc<VringStats>) -> QueueConfig {
        let at = match &self.ring {
            Ring::Split { driver, .. } => driver.addresses(),
            Ring::Packed { driver, .. } => driver.addresses(),
        };
        let user = |addr| self.ram.user_addr(addr).unwrap();
        let start = RingPosition::nth(self.config.start, self.config.size).word();
        QueueConfig {
            layout: VirtqueueLayout {
                size: self.config.size,
                desc: user(at.descriptors),
                avail: user(at.driver),
                used: user(at.device),
            },
            base: match self.config.packed {
                false => self.config.start.into(),
                true => u32::from(start) | u32::from(start) << 16,
            },
            features: self.config.features,
            memory: Arc::new(self.ram.guest_memory().unwrap()),
            stats: Arc::clone(stats),
            record: None,
        }
    }

    pub fn features(&self) -> Features {
        self.config.features
    }

    pub fn memory(&self) -> Arc<virtionet_virtqueue::memory::GuestMemory> {
        Arc::new(self.ram.guest_memory().unwrap())
    }

    /// The next `len` bytes for a buffer.
    pub fn place(&mut self, len: u32) -> u64 {
        let len = u64::from(len);
        if self.next_data + len > DATA.end {
            self.next_data = DATA.start;
        }
        let addr = self.next_data;
        self.next_data = (addr + len).min(DATA.end);
        addr
    }

    /// Writes to a buffer.
    pub fn write(&self, addr: u64, bytes: &[u8]) {
        let end = MEMORY_SIZE.saturating_sub(addr);
        let len = bytes.len().min(usize::try_from(end).unwrap());
        self.ram.write(addr, &bytes[..len]).unwrap();
    }

    /// Makes a chain available.
    pub fn offer(&mut self, segments: &[Segment], indirect: bool, flaw: Flaw) {
        let mut segments = segments.to_vec();
        let last = segments.len() - 1;
        match flaw {
            Flaw::Direction => segments[last].flags ^= VRING_DESC_F_WRITE,
            Flaw::TooLong => segments[last].len += 0x4_0000,
            Flaw::Unmapped => segments[0].addr += MEMORY_SIZE,
            Flaw::Empty => segments[last].len = 0,
            Flaw::NextOutOfRange | Flaw::Loop => segments[last].flags |= VRING_DESC_F_NEXT,
            Flaw::Nested if indirect => segments[last].flags |= VRING_DESC_F_INDIRECT,
            _ => {}
        }
        for segment in &mut segments[..last] {
            segment.flags |= VRING_DESC_F_NEXT;
        }
        if indirect {
            segments = vec![self.table(&segments, flaw)];
        }
        if self.config.packed {
            let free = self.free_descriptors();
            // A driver that has no free descriptors waits.
            if usize::from(free) < segments.len() {
                return;
            }
            for segment in &segments {
                self.put(*segment, self.next);
            }
            self.next = self.next.wrapping_add(1);
        } else {
            self.link(&segments, flaw);
        }
    }

    /// Writes an indirect table; returns the descriptor that refers to it.
    fn table(&mut self, segments: &[Segment], flaw: Flaw) -> Segment {
        let len = u32::try_from(16 * segments.len()).unwrap();
        if self.next_table + u64::from(len) > TABLES.end {
            self.next_table = TABLES.start;
        }
        let addr = self.next_table;
        self.next_table += u64::from(len);
        let area = self.ram.area(addr, len.into()).unwrap();
        for ((n, segment), offset) in (1..).zip(segments).zip((0..).step_by(16)) {
            self.note(*segment);
            let next = match flaw {
                Flaw::Loop if usize::from(n) == segments.len() => 0,
                _ => n,
            };
            let Segment { addr, len, flags } = *segment;
            match self.config.packed {
                false => SplitDescriptor::new(addr, len, flags, next).store(&area, offset),
                true => PackedDescriptor::new(addr, len, next, flags).store(&area, offset),
            }
        }
        Segment {
            addr: match flaw {
                Flaw::TableUnmapped => addr + MEMORY_SIZE,
                _ => addr,
            },
            len: len + u32::from(flaw == Flaw::TableLength),
            flags: VRING_DESC_F_INDIRECT,
        }
    }

    /// Writes the chain to the next descriptors of a split virtqueue, and makes it available.
    fn link(&mut self, segments: &[Segment], flaw: Flaw) {
        segments.iter().for_each(|segment| self.note(*segment));
        let Ring::Split {
            driver,
            next_descriptor,
        } = &mut self.ring
        else {
            return;
        };
        let size = driver.size();
        let head = *next_descriptor;
        for (n, segment) in (1..).zip(segments) {
            let index = *next_descriptor;
            *next_descriptor = (index + 1) % size;
            let next = match flaw {
                Flaw::NextOutOfRange if n == segments.len() => size,
                Flaw::Loop if n == segments.len() => head,
                _ => *next_descriptor,
            };
            let Segment { addr, len, flags } = *segment;
            driver.set_descriptor(index, SplitDescriptor::new(addr, len, flags, next));
        }
        self.offer_head(head);
    }

    /// Makes a head of a split virtqueue available, whatever its descriptor contains.
    pub fn offer_head(&mut self, head: u16) {
        let Ring::Split { driver, .. } = &self.ring else {
            return;
        };
        driver.set_avail_entry(self.next, head);
        self.next = self.next.wrapping_add(1);
        driver.set_avail_index(self.next);
        self.chains.push_back(Chain {
            id: head,
            descriptors: 1,
        });
    }

    /// Sets the available index of a split virtqueue, or inverts the wrap counter of a packed one.
    pub fn disorder(&mut self, index: u16) {
        self.is_order_known = false;
        match &mut self.ring {
            Ring::Split { driver, .. } => {
                self.next = index;
                driver.set_avail_index(index);
            }
            Ring::Packed { at, .. } => {
                at.wrap = !at.wrap;
                // The device may take a used descriptor, whose length is the device's, for an
                // available one.
                self.are_writes_known = false;
            }
        }
    }

    /// Writes any descriptor anywhere in the ring: the next one of a packed virtqueue, or the one
    /// at `index` of a split one.
    pub fn set_descriptor(&mut self, index: u16, segment: Segment, next: u16) {
        match &self.ring {
            Ring::Split { driver, .. } => {
                let Segment { addr, len, flags } = segment;
                let descriptor = SplitDescriptor::new(addr, len, flags, next);
                driver.set_descriptor(index % driver.size(), descriptor);
                self.note(segment);
            }
            Ring::Packed { .. } => {
                if self.free_descriptors() == 0 {
                    self.is_order_known = false;
                    self.are_writes_known = false;
                }
                self.put(segment, next);
            }
        }
    }

    /// Makes a descriptor available at the next position of a packed virtqueue.
    fn put(&mut self, segment: Segment, id: u16) {
        self.note(segment);
        let Ring::Packed {
            driver, at, open, ..
        } = &mut self.ring
        else {
            return;
        };
        let flags = segment.flags & !(VIRTQ_DESC_F_AVAIL | VIRTQ_DESC_F_USED) | at.available();
        driver.set_descriptor(
            at.index,
            PackedDescriptor::new(segment.addr, segment.len, id, flags),
        );
        *at = at.after(1, driver.size());
        *open += 1;
        if flags & VRING_DESC_F_NEXT == 0 {
            let descriptors = std::mem::take(open);
            self.chains.push_back(Chain { id, descriptors });
        }
    }

    /// Number of descriptors that the driver of a packed virtqueue may write.
    fn free_descriptors(&mut self) -> u16 {
        let taken: u16 = self.chains.iter().map(|chain| chain.descriptors).sum();
        let Ring::Packed { driver, open, .. } = &self.ring else {
            return 0;
        };
        driver.size().saturating_sub(*open).saturating_sub(taken)
    }

    /// Sets when the driver wants an interrupt.
    pub fn set_event(&self, at: u16, flags: u8) {
        match &self.ring {
            Ring::Split { driver, .. } => driver.set_used_event(at),
            Ring::Packed { driver, .. } => driver.set_driver_event(at, flags.into()),
        }
    }

    /// Notes what a descriptor allows the device to write.
    fn note(&mut self, segment: Segment) {
        if segment.flags & VRING_DESC_F_WRITE == 0 {
            return;
        }
        let end = segment.addr.saturating_add(segment.len.into());
        // The device may then change the virtqueue or a table, and so what it may write.
        if segment.addr < DATA.start && segment.len != 0 {
            self.are_writes_known = false;
            self.is_order_known = false;
        }
        let within = |addr: u64| usize::try_from(addr.min(MEMORY_SIZE)).unwrap();
        self.writable[within(segment.addr)..within(end)].fill(true);
    }

    /// To be called before the device gets a turn.
    pub fn before_turn(&mut self) {
        if let Ring::Packed { open, .. } = &self.ring
            && *open != 0
        {
            // The device sees a chain without an end.
            self.is_order_known = false;
        }
        self.ram.read(0, &mut self.before).unwrap();
    }

    /// Checks what the device has written, and collects the chains that it has used.
    pub fn after_turn(&mut self) -> Used {
        self.check_writes();
        self.collect()
    }

    /// The parts of the virtqueue that belong to the device.
    fn device_areas(&self) -> [Range<u64>; 2] {
        match &self.ring {
            Ring::Split { driver, .. } => {
                let used = driver.addresses().device;
                [used..used + 6 + 8 * u64::from(driver.size()), 0..0]
            }
            Ring::Packed { driver, .. } => {
                let at = driver.addresses();
                let descriptors = at.descriptors..at.descriptors + 16 * u64::from(driver.size());
                [at.device..at.device + 4, descriptors]
            }
        }
    }

    fn check_writes(&self) {
        if !self.are_writes_known {
            return;
        }
        let mut now = vec![0; self.before.len()];
        self.ram.read(0, &mut now).unwrap();
        let areas = self.device_areas();
        let pages = self.before.chunks(4096).zip(now.chunks(4096));
        for (start, (before, now)) in (0..).step_by(4096).zip(pages) {
            if before == now {
                continue;
            }
            for (addr, (before, now)) in (start..).zip(before.iter().zip(now)) {
                let index = usize::try_from(addr).unwrap();
                assert!(
                    before == now
                        || self.writable[index]
                        || areas.iter().any(|area| area.contains(&addr)),
                    "the device wrote to {addr:#x}, which no descriptor names as writable"
                );
            }
        }
    }

    /// Removes the chains that the device has used, and checks their heads or ids.
    fn collect(&mut self) -> Used {
        let mut seen = Used::default();
        if !self.is_order_known {
            return seen;
        }
        match &mut self.ring {
            Ring::Split { driver, .. } => {
                while self.next_used != driver.used_index() {
                    let (id, len) = driver.used_element(self.next_used);
                    let chain = self.chains.pop_front().expect("a chain is used twice");
                    assert_eq!(id, u32::from(chain.id), "another chain is used");
                    self.next_used = self.next_used.wrapping_add(1);
                    seen.chains += 1;
                    seen.bytes += u64::from(len);
                }
            }
            Ring::Packed { driver, used, .. } => {
                while let Some(chain) = self.chains.front() {
                    let found = driver.descriptor(used.index);
                    if found.flags & (VIRTQ_DESC_F_AVAIL | VIRTQ_DESC_F_USED) != used.used() {
                        break;
                    }
                    assert_eq!(found.id, chain.id, "another chain is used");
                    // The driver skips as many descriptors as the chain has.
                    *used = used.after(chain.descriptors, driver.size());
                    seen.chains += 1;
                    // A packed virtqueue leaves the length of a chain for reading as it is.
                    if found.flags & VRING_DESC_F_WRITE != 0 {
                        seen.bytes += u64::from(found.len);
                    }
                    self.chains.pop_front();
                }
            }
        }
        seen
    }

    /// Whether the chains that the device has used are known.
    pub fn is_order_known(&self) -> bool {
        self.is_order_known
    }

    /// To be called when the device rewinds. A split virtqueue whose available entries were
    /// overwritten meanwhile yields other chains than before.
    pub fn note_rewind(&mut self) {
        if !self.config.packed && self.chains.len() > usize::from(self.config.size) {
            self.is_order_known = false;
        }
    }
}
