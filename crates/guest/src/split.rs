//! The driver side of a split virtqueue (virtio 1.3 §2.7), and raw access for hostile guests.
//!
//! Everything that the driver must remember is private: unused descriptors, the ends of chains and
//! tokens lie in private slots. Nothing that a device, or a raw write of a test, does to the shared
//! memory can therefore change the driver's own state.

pub use virtionet_virtqueue::constants::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
    VRING_USED_F_NO_NOTIFY,
};
use virtionet_virtqueue::memory::full_fence;

use crate::buffer::{Buf, descriptors_needed};
use crate::config::{DriverVirtqueueConfig, VirtqueueAddresses};
use crate::fault::{DeviceFault, DriverVirtqueueError};
use crate::indirect::IndirectTables;
use crate::memory::{Area, GuestRam};

/// The size of a descriptor in bytes.
const DESCRIPTOR_SIZE: usize = 16;
/// The offset of `idx` in the available and used rings in bytes.
const IDX_OFFSET: usize = 2;
/// The offset of the first entry in the available and used rings in bytes.
const RING_OFFSET: usize = 4;
/// The alignment of each part in bytes, so that no two parts share a cache line.
const CACHE_LINE: u64 = 64;

/// A split descriptor (virtio 1.3 §2.7.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SplitDescriptor {
    /// The guest physical address.
    pub addr: u64,
    /// The length in bytes.
    pub len: u32,
    /// [`VRING_DESC_F_NEXT`], [`VRING_DESC_F_WRITE`], [`VRING_DESC_F_INDIRECT`].
    pub flags: u16,
    /// The next descriptor of the chain, if `flags` has [`VRING_DESC_F_NEXT`].
    pub next: u16,
}

impl SplitDescriptor {
    /// A descriptor of these values.
    #[must_use]
    pub fn new(addr: u64, len: u32, flags: u16, next: u16) -> Self {
        Self {
            addr,
            len,
            flags,
            next,
        }
    }

    /// Writes the descriptor at byte `offset` of a table with two stores.
    #[inline(always)]
    pub fn store(self, table: &Area, offset: usize) {
        let rest = u64::from(self.len) | u64::from(self.flags) << 32 | u64::from(self.next) << 48;
        table.store(offset, self.addr.to_le());
        table.store(offset + 8, rest.to_le());
    }

    /// Reads the descriptor at byte `offset` of a table.
    #[must_use]
    pub fn load(table: &Area, offset: usize) -> Self {
        Self {
            addr: u64::from_le(table.load(offset)),
            len: u32::from_le(table.load(offset + 8)),
            flags: u16::from_le(table.load(offset + 12)),
            next: u16::from_le(table.load(offset + 14)),
        }
    }
}

/// The driver's private state of one descriptor.
#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    /// The next descriptor of the chain, or of the list of unused descriptors.
    next: u16,
    /// In the slot of a head: the last descriptor of the chain.
    last: u16,
    /// In the slot of the head of a chain in flight: its number of descriptors. Otherwise 0.
    count: u16,
    token: u64,
}

/// The driver side of a split virtqueue.
#[derive(Debug)]
pub struct SplitDriverVirtqueue {
    descriptors: Area,
    avail: Area,
    used: Area,
    size: u16,
    event_idx: bool,
    slots: Box<[Slot]>,
    /// The first unused descriptor.
    free_head: u16,
    /// The number of unused descriptors.
    free: u16,
    /// The index of the next entry of the available ring to write.
    next: u16,
    /// The available index that the device can see.
    published: u16,
    /// `published` at the last call of `is_kick_needed`.
    last_kick_check: u16,
    /// The used index up to which chains are collected.
    collected: u16,
    /// The used index at the last `refresh`.
    last_used: u16,
    /// Indirect tables, by head.
    tables: IndirectTables,
}

impl SplitDriverVirtqueue {
    /// Allocates a virtqueue without chains in `ram`.
    ///
    /// # Errors
    /// When the size is not a power of two from 2 to 32,768 or `ram` has not enough free memory.
    pub fn new(
        ram: &GuestRam,
        config: DriverVirtqueueConfig,
    ) -> Result<Self, DriverVirtqueueError> {
        let size = config.size;
        if !(2..=32_768).contains(&size) || !size.is_power_of_two() {
            return Err(DriverVirtqueueError::Size(size));
        }
        let n = u64::from(size);
        let mut ring = Self {
            descriptors: ram.alloc_area(16 * n, CACHE_LINE)?,
            avail: ram.alloc_area(6 + 2 * n, CACHE_LINE)?,
            used: ram.alloc_area(6 + 8 * n, CACHE_LINE)?,
            size,
            event_idx: config.event_idx,
            slots: vec![Slot::default(); usize::from(size)].into(),
            free_head: 0,
            free: 0,
            next: 0,
            published: 0,
            last_kick_check: 0,
            collected: 0,
            last_used: 0,
            tables: IndirectTables::new(ram, size),
        };
        ring.start_at(config.start);
        Ok(ring)
    }

    /// Discards every chain and starts again at index 0 with zeroed memory.
    pub fn reset(&mut self) {
        self.descriptors.zero();
        self.avail.zero();
        self.used.zero();
        self.start_at(0);
    }

    fn start_at(&mut self, index: u16) {
        for (slot, next) in self.slots.iter_mut().zip(1..) {
            *slot = Slot {
                next,
                ..Slot::default()
            };
        }
        (self.free_head, self.free) = (0, self.size);
        (self.next, self.published, self.last_kick_check) = (index, index, index);
        (self.collected, self.last_used) = (index, index);
        self.avail.release(IDX_OFFSET, index);
        self.used.release(IDX_OFFSET, index);
        self.set_used_event(index);
    }

    /// The number of descriptors.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Guest physical addresses of the parts.
    #[must_use]
    pub fn addresses(&self) -> VirtqueueAddresses {
        VirtqueueAddresses {
            descriptors: self.descriptors.addr(),
            driver: self.avail.addr(),
            device: self.used.addr(),
        }
    }

    /// The number of unused descriptors.
    #[inline(always)]
    #[must_use]
    pub fn free(&self) -> u16 {
        self.free
    }

    /// The number of chains that are published and not collected.
    #[inline(always)]
    #[must_use]
    pub fn in_flight(&self) -> u16 {
        self.published.wrapping_sub(self.collected)
    }

    /// See `DriverVirtqueue::add`.
    ///
    /// # Errors
    /// When the chain is empty, or there are not enough descriptors or guest memory. Nothing is
    /// added then.
    #[inline(always)]
    pub fn add(
        &mut self,
        chain: &[Buf],
        indirect: bool,
        token: u64,
    ) -> Result<u16, DriverVirtqueueError> {
        let count = descriptors_needed(chain, indirect, self.free)?;
        let head = self.free_head;
        let last = if indirect {
            self.write_indirect(head, chain)?
        } else {
            self.write_direct(head, chain)
        };
        self.free_head = self.slot(last).next;
        self.free -= count;
        let slot = self.slot(head);
        (slot.last, slot.count, slot.token) = (last, count, token);
        let at = self.entry(self.next);
        self.avail.set(at, head);
        self.next = self.next.wrapping_add(1);
        Ok(head)
    }

    /// Writes `chain` to the unused descriptors from `head` on. Returns the last one.
    #[inline(always)]
    fn write_direct(&mut self, head: u16, chain: &[Buf]) -> u16 {
        let (mut at, mut last) = (head, head);
        let mut left = chain.len();
        for buf in chain {
            left -= 1;
            last = at;
            at = self.slot(last).next;
            let flags = flags(buf, left != 0);
            let next = if left == 0 { 0 } else { at };
            self.set_descriptor(last, SplitDescriptor::new(buf.addr, buf.len, flags, next));
        }
        last
    }

    /// Writes `chain` to an indirect table that the descriptor `head` refers to. Returns `head`.
    fn write_indirect(&mut self, head: u16, chain: &[Buf]) -> Result<u16, DriverVirtqueueError> {
        let full = || DriverVirtqueueError::Full {
            needed: chain.len(),
            free: 0,
        };
        let count = u16::try_from(chain.len()).map_err(|_| full())?;
        let bytes = DESCRIPTOR_SIZE * chain.len();
        let table = self.tables.table(head, bytes)?;
        for ((index, buf), offset) in (0..).zip(chain).zip((0..).step_by(DESCRIPTOR_SIZE)) {
            let more = index + 1 < count;
            let next = if more { index + 1 } else { 0 };
            SplitDescriptor::new(buf.addr, buf.len, flags(buf, more), next).store(table, offset);
        }
        let addr = table.addr();
        let len = u32::try_from(bytes).map_err(|_| full())?;
        self.set_descriptor(
            head,
            SplitDescriptor::new(addr, len, VRING_DESC_F_INDIRECT, 0),
        );
        Ok(head)
    }

    /// Makes all added chains visible to the device at once.
    #[inline(always)]
    pub fn publish(&mut self) {
        self.published = self.next;
        self.avail.release(IDX_OFFSET, self.published);
    }

    /// Whether the device wants a kick for the chains published since the last call of this method
    /// (virtio 1.3 §2.7.7.2 and §2.7.10).
    #[inline(always)]
    #[must_use]
    pub fn is_kick_needed(&mut self) -> bool {
        let (old, new) = (self.last_kick_check, self.published);
        self.last_kick_check = new;
        if old == new {
            return false;
        }
        full_fence();
        if self.event_idx {
            let event = self.avail_event();
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.used_flags() & VRING_USED_F_NO_NOTIFY == 0
        }
    }

    /// Reads the used index once. Returns the number of chains that `pop` can return now.
    ///
    /// # Errors
    /// When the used index is ahead of the available index or moved backwards.
    #[inline(always)]
    pub fn refresh(&mut self) -> Result<u16, DeviceFault> {
        let to = self.used.acquire(IDX_OFFSET);
        let ahead = to.wrapping_sub(self.collected);
        if ahead > self.in_flight() || ahead < self.last_used.wrapping_sub(self.collected) {
            return Err(DeviceFault::UsedIndex {
                from: self.collected,
                to,
                in_flight: self.in_flight(),
            });
        }
        self.last_used = to;
        Ok(ahead)
    }

    /// Collects the next chain of those that the last `refresh` found: its token and the number of
    /// bytes written to it.
    ///
    /// # Errors
    /// When the id of the used element is not that of a chain in flight.
    #[inline(always)]
    pub fn pop(&mut self) -> Result<Option<(u64, u32)>, DeviceFault> {
        if self.collected == self.last_used {
            return Ok(None);
        }
        let (id, len) = self.used_element(self.collected);
        let head = u16::try_from(id)
            .ok()
            .filter(|&head| head < self.size && self.slot(head).count != 0)
            .ok_or(DeviceFault::UsedId(id))?;
        self.collected = self.collected.wrapping_add(1);
        let slot = *self.slot(head);
        let free_head = self.free_head;
        self.slot(head).count = 0;
        self.slot(slot.last).next = free_head;
        self.free_head = head;
        self.free += slot.count;
        Ok(Some((slot.token, len)))
    }

    /// Tells the device that calls are not needed.
    #[inline(always)]
    pub fn disable_calls(&mut self) {
        // With VIRTIO_F_EVENT_IDX the flag must stay 0, and `used_event` is not moved any more.
        if !self.event_idx {
            self.set_avail_flags(VRING_AVAIL_F_NO_INTERRUPT);
        }
    }

    /// Asks the device for a call for the next chain that it uses. Returns whether there are chains
    /// to collect already.
    #[inline(always)]
    #[must_use]
    pub fn enable_calls(&mut self) -> bool {
        if self.event_idx {
            self.set_used_event(self.collected);
        } else {
            self.set_avail_flags(0);
        }
        full_fence();
        self.used_index() != self.collected
    }

    #[inline(always)]
    fn slot(&mut self, index: u16) -> &mut Slot {
        &mut self.slots[usize::from(index)]
    }

    /// The offset in bytes of the entry of the available ring for `index`, which wraps at the size.
    #[inline(always)]
    fn entry(&self, index: u16) -> usize {
        RING_OFFSET + 2 * usize::from(index & (self.size - 1))
    }

    /// The offset in bytes of the element of the used ring for `index`, which wraps at the size.
    fn used_entry(&self, index: u16) -> usize {
        RING_OFFSET + 8 * usize::from(index & (self.size - 1))
    }
}

/// The flags of a descriptor for `buf`, with another one behind it if `more`.
#[inline(always)]
fn flags(buf: &Buf, more: bool) -> u16 {
    let write = if buf.writable { VRING_DESC_F_WRITE } else { 0 };
    let next = if more { VRING_DESC_F_NEXT } else { 0 };
    write | next
}

/// Raw access, for what a hostile guest writes and a test reads. It does not change the driver's
/// own state.
impl SplitDriverVirtqueue {
    /// Reads descriptor `index`, which must be below the size.
    #[must_use]
    pub fn descriptor(&self, index: u16) -> SplitDescriptor {
        SplitDescriptor::load(&self.descriptors, DESCRIPTOR_SIZE * usize::from(index))
    }

    /// Writes descriptor `index`, which must be below the size.
    #[inline(always)]
    pub fn set_descriptor(&self, index: u16, descriptor: SplitDescriptor) {
        descriptor.store(&self.descriptors, DESCRIPTOR_SIZE * usize::from(index));
    }

    /// Writes the entry of the available ring for `index` modulo the size.
    pub fn set_avail_entry(&self, index: u16, head: u16) {
        self.avail.set(self.entry(index), head);
    }

    /// The available index that the device can see.
    #[must_use]
    pub fn avail_index(&self) -> u16 {
        self.avail.get(IDX_OFFSET)
    }

    /// Writes the available index.
    pub fn set_avail_index(&self, index: u16) {
        self.avail.release(IDX_OFFSET, index);
    }

    /// Writes `flags` of the available ring.
    #[inline(always)]
    pub fn set_avail_flags(&self, flags: u16) {
        self.avail.release(0, flags);
    }

    /// Writes `used_event`.
    #[inline(always)]
    pub fn set_used_event(&self, index: u16) {
        self.avail
            .release(RING_OFFSET + 2 * usize::from(self.size), index);
    }

    /// The used index, read with acquire ordering.
    #[inline(always)]
    #[must_use]
    pub fn used_index(&self) -> u16 {
        self.used.acquire(IDX_OFFSET)
    }

    /// The used element for `index` modulo the size: its id and the number of bytes written.
    #[inline(always)]
    #[must_use]
    pub fn used_element(&self, index: u16) -> (u32, u32) {
        let at = self.used_entry(index);
        let id: u32 = self.used.load(at);
        let len: u32 = self.used.load(at + 4);
        (u32::from_le(id), u32::from_le(len))
    }

    /// Writes the used element for `index` modulo the size, as a hostile guest or a test's device
    /// does.
    pub fn set_used_element(&self, index: u16, id: u32, len: u32) {
        let at = self.used_entry(index);
        self.used.store(at, id.to_le());
        self.used.store(at + 4, len.to_le());
    }

    /// Writes the used index with release ordering.
    pub fn set_used_index(&self, index: u16) {
        self.used.release(IDX_OFFSET, index);
    }

    /// `flags` of the used ring.
    #[inline(always)]
    #[must_use]
    pub fn used_flags(&self) -> u16 {
        self.used.get(0)
    }

    /// `avail_event` of the used ring.
    #[inline(always)]
    #[must_use]
    pub fn avail_event(&self) -> u16 {
        self.used.get(RING_OFFSET + 8 * usize::from(self.size))
    }
}
