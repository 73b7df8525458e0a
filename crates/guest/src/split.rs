//! The driver's side of a split virtqueue (virtio 1.3 §2.7), and raw access for hostile guests.
//!
//! Everything that the driver must remember is private: free descriptors, chain ends and tokens
//! live in slots, so nothing that a device (or a test's raw write) does to the shared memory
//! changes what the driver believes.

use virtionet_virtqueue::memory::full_fence;

use crate::driver::{
    Buf, DeviceFault, DriverVirtqueueConfig, DriverVirtqueueError, VirtqueueAddresses, needed,
};
use crate::indirect::Tables;
use crate::memory::{Area, GuestRam};

/// Descriptor flag: the chain goes on at `next`.
pub const VRING_DESC_F_NEXT: u16 = 1;
/// Descriptor flag: the device writes.
pub const VRING_DESC_F_WRITE: u16 = 2;
/// Descriptor flag: the buffer is a table of descriptors.
pub const VRING_DESC_F_INDIRECT: u16 = 4;

/// Available ring flag: no calls, please.
pub const VRING_AVAIL_F_NO_INTERRUPT: u16 = 1;
/// Used ring flag: no kicks, please.
pub const VRING_USED_F_NO_NOTIFY: u16 = 1;

/// Bytes of a descriptor.
const DESCRIPTOR_SIZE: usize = 16;
/// Byte offset of `idx` in the available and used rings.
const IDX_OFFSET: usize = 2;
/// Byte offset of the first entry in the available and used rings.
const RING_OFFSET: usize = 4;
/// Each part starts on a cache line of its own.
const CACHE_LINE: u64 = 64;

/// A descriptor (virtio 1.3 §2.7.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SplitDescriptor {
    /// Guest physical address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
    /// [`NEXT`], [`WRITE`], [`VRING_DESC_F_INDIRECT`].
    pub flags: u16,
    /// The next descriptor of the chain.
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

    /// Writes it at byte `offset` of a table, as two words.
    #[inline(always)]
    pub fn store(self, table: &Area, offset: usize) {
        let rest = u64::from(self.len) | u64::from(self.flags) << 32 | u64::from(self.next) << 48;
        table.store(offset, self.addr.to_le());
        table.store(offset + 8, rest.to_le());
    }

    /// Reads it from byte `offset` of a table.
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

/// What the driver remembers of a descriptor.
#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    /// The next descriptor: of the chain, or of the free ones.
    next: u16,
    /// For a head: the chain's last descriptor.
    last: u16,
    /// For the head of a chain in flight: its descriptors; else 0.
    count: u16,
    token: u64,
}

/// A driver's split ring.
#[derive(Debug)]
pub struct SplitDriverVirtqueue {
    descriptors: Area,
    avail: Area,
    used: Area,
    size: u16,
    event_idx: bool,
    slots: Box<[Slot]>,
    free_head: u16,
    free: u16,
    /// Index of the next available entry to write.
    next: u16,
    /// The index that the device can see.
    published: u16,
    /// `published` when it was last asked whether to kick.
    last_kick_check: u16,
    /// Up to where used elements were collected.
    collected: u16,
    /// The used index when it was last read.
    last_used: u16,
    /// Indirect tables by head.
    tables: Tables,
}

impl SplitDriverVirtqueue {
    /// Allocates an empty ring in `ram`.
    ///
    /// # Errors
    /// When the size is no power of two from 2 to 32,768 or `ram` has no room.
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
            tables: Tables::new(ram, size),
        };
        ring.start_at(config.start);
        Ok(ring)
    }

    /// Forgets every chain and starts over at index 0 with zeroed memory.
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

    /// Number of descriptors.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Where the parts lie.
    #[must_use]
    pub fn addresses(&self) -> VirtqueueAddresses {
        VirtqueueAddresses {
            descriptors: self.descriptors.addr(),
            driver: self.avail.addr(),
            device: self.used.addr(),
        }
    }

    /// Descriptors that are free.
    #[inline(always)]
    #[must_use]
    pub fn free(&self) -> u16 {
        self.free
    }

    /// Chains that were published and not collected yet.
    #[inline(always)]
    #[must_use]
    pub fn in_flight(&self) -> u16 {
        self.published.wrapping_sub(self.collected)
    }

    /// See [`crate::driver::DriverVirtqueue::add`].
    ///
    /// # Errors
    /// When there is no room; nothing was added then.
    #[inline(always)]
    pub fn add(
        &mut self,
        chain: &[Buf],
        indirect: bool,
        token: u64,
    ) -> Result<u16, DriverVirtqueueError> {
        let count = needed(chain, indirect, self.free)?;
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

    /// Writes `chain` over the free descriptors from `head` on; returns the last one.
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

    /// See [`crate::driver::DriverVirtqueue::publish`].
    #[inline(always)]
    pub fn publish(&mut self) {
        self.published = self.next;
        self.avail.release(IDX_OFFSET, self.published);
    }

    /// See [`crate::driver::DriverVirtqueue::is_kick_needed`] (virtio 1.3 §2.7.7.2 and §2.7.10).
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

    /// See [`crate::driver::DriverVirtqueue::refresh`].
    ///
    /// # Errors
    /// When the used index is ahead of the available one or went back.
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

    /// See [`crate::driver::DriverVirtqueue::pop`].
    ///
    /// # Errors
    /// When the element names a chain that is not in flight.
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

    /// See [`crate::driver::DriverVirtqueue::disable_calls`].
    #[inline(always)]
    pub fn disable_calls(&mut self) {
        // With EVENT_IDX the flag must stay 0; used_event falls behind by itself.
        if !self.event_idx {
            self.set_avail_flags(VRING_AVAIL_F_NO_INTERRUPT);
        }
    }

    /// See [`crate::driver::DriverVirtqueue::enable_calls`].
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

    /// Byte offset of available entry `index` (which may count on past the ring's end).
    #[inline(always)]
    fn entry(&self, index: u16) -> usize {
        RING_OFFSET + 2 * usize::from(index & (self.size - 1))
    }

    fn used_entry(&self, index: u16) -> usize {
        RING_OFFSET + 8 * usize::from(index & (self.size - 1))
    }
}

#[inline(always)]
fn flags(buf: &Buf, more: bool) -> u16 {
    let write = if buf.writable { VRING_DESC_F_WRITE } else { 0 };
    let next = if more { VRING_DESC_F_NEXT } else { 0 };
    write | next
}

/// Raw access: what a hostile guest writes, and what a test looks at. None of it changes what the
/// driver believes of its own chains.
impl SplitDriverVirtqueue {
    /// Descriptor `index` (below the size).
    #[must_use]
    pub fn descriptor(&self, index: u16) -> SplitDescriptor {
        SplitDescriptor::load(&self.descriptors, DESCRIPTOR_SIZE * usize::from(index))
    }

    /// Writes descriptor `index` (below the size).
    #[inline(always)]
    pub fn set_descriptor(&self, index: u16, descriptor: SplitDescriptor) {
        descriptor.store(&self.descriptors, DESCRIPTOR_SIZE * usize::from(index));
    }

    /// Writes the available entry for `index`, modulo the size.
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

    /// Writes the available ring's flags.
    #[inline(always)]
    pub fn set_avail_flags(&self, flags: u16) {
        self.avail.release(0, flags);
    }

    /// Writes used_event.
    #[inline(always)]
    pub fn set_used_event(&self, index: u16) {
        self.avail
            .release(RING_OFFSET + 2 * usize::from(self.size), index);
    }

    /// The used index, with everything written before it.
    #[inline(always)]
    #[must_use]
    pub fn used_index(&self) -> u16 {
        self.used.acquire(IDX_OFFSET)
    }

    /// The used element for `index`, modulo the size: id and bytes written.
    #[inline(always)]
    #[must_use]
    pub fn used_element(&self, index: u16) -> (u32, u32) {
        let at = self.used_entry(index);
        let id: u32 = self.used.load(at);
        let len: u32 = self.used.load(at + 4);
        (u32::from_le(id), u32::from_le(len))
    }

    /// Writes the used element for `index`, modulo the size: a guest that scribbles, or a device
    /// in a test.
    pub fn set_used_element(&self, index: u16, id: u32, len: u32) {
        let at = self.used_entry(index);
        self.used.store(at, id.to_le());
        self.used.store(at + 4, len.to_le());
    }

    /// Writes the used index.
    pub fn set_used_index(&self, index: u16) {
        self.used.release(IDX_OFFSET, index);
    }

    /// The used ring's flags.
    #[inline(always)]
    #[must_use]
    pub fn used_flags(&self) -> u16 {
        self.used.get(0)
    }

    /// avail_event.
    #[inline(always)]
    #[must_use]
    pub fn avail_event(&self) -> u16 {
        self.used.get(RING_OFFSET + 8 * usize::from(self.size))
    }
}
