//! The driver side of a packed virtqueue (virtio 1.3 §2.8), and raw access for hostile guests.
//!
//! Everything that the driver must remember of a chain lies in private slots, by buffer id, where
//! the device cannot change it.
//!
//! ```text
//!                collected      published        next
//!                    v              v              v
//! ring  ... unused   | in flight    | hidden       | unused ...
//! ```
//!
//! [`PackedDriverVirtqueue::add`] writes descriptors at once, except for the flags of the first one
//! since the last [`PackedDriverVirtqueue::publish`]. The device stops at that descriptor, so it
//! sees those behind it only when `publish` writes the flags.

mod layout;

pub use virtionet_virtqueue::constants::{
    VIRTQ_DESC_F_AVAIL, VIRTQ_DESC_F_USED, VRING_PACKED_EVENT_FLAG_DESC,
    VRING_PACKED_EVENT_FLAG_DISABLE, VRING_PACKED_EVENT_FLAG_ENABLE,
};
use virtionet_virtqueue::constants::{
    VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_PACKED_EVENT_F_WRAP_CTR,
};
use virtionet_virtqueue::memory::full_fence;

use crate::buffer::{Buf, descriptors_needed};
use crate::config::{DriverVirtqueueConfig, VirtqueueAddresses};
use crate::fault::{DeviceFault, DriverVirtqueueError};
use crate::indirect::IndirectTables;
use crate::memory::{Area, GuestRam};
use layout::{DESCRIPTOR_SIZE, FLAGS_OFFSET, ID_OFFSET, LEN_OFFSET};

pub use layout::{PackedDescriptor, RingPosition};

/// The offset of `flags` in an event suppression area in bytes; `off_wrap` has offset 0.
const EVENT_FLAGS: usize = 2;
/// The alignment of each part in bytes, so that no two parts share a cache line.
const CACHE_LINE: u64 = 64;

/// The driver's private state of one buffer id.
#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    /// The next id in the list of unused ids.
    next: u16,
    /// The number of descriptors of the chain with this id; 0 when the id is unused.
    count: u16,
    token: u64,
}

/// The driver side of a packed virtqueue.
#[derive(Debug)]
pub struct PackedDriverVirtqueue {
    descriptors: Area,
    driver_event: Area,
    device_event: Area,
    size: u16,
    event_idx: bool,
    /// The private state, by buffer id.
    slots: Box<[Slot]>,
    /// The first unused id.
    free_id: u16,
    /// The number of unused descriptors.
    free: u16,
    /// The next descriptor to write.
    next: RingPosition,
    /// The first descriptor that the device cannot see. Its flags are in `head_flags`.
    published: RingPosition,
    /// The flags that make the first unpublished descriptor available.
    head_flags: u16,
    /// Numbers of descriptors and of chains that are added and not published.
    hidden: (u16, u16),
    /// The number of descriptors published since the last call of `is_kick_needed`, at most the
    /// size.
    added_since_kick: u16,
    /// The number of chains that are published and not collected.
    in_flight: u16,
    /// The first descriptor that is not collected.
    collected: RingPosition,
    /// The first descriptor that the last `refresh` did not find used.
    last_used: RingPosition,
    /// The number of used chains from `collected` to `last_used`.
    pending: u16,
    /// Indirect tables, by buffer id.
    tables: IndirectTables,
}

impl PackedDriverVirtqueue {
    /// Allocates a virtqueue without chains in `ram`.
    ///
    /// # Errors
    /// When the size is not 1 to 32,768 or `ram` has not enough free memory.
    pub fn new(
        ram: &GuestRam,
        config: DriverVirtqueueConfig,
    ) -> Result<Self, DriverVirtqueueError> {
        let size = config.size;
        if !(1..=32_768).contains(&size) {
            return Err(DriverVirtqueueError::Size(size));
        }
        let start = RingPosition::nth(config.start, size);
        let mut ring = Self {
            descriptors: ram.alloc_area(16 * u64::from(size), CACHE_LINE)?,
            driver_event: ram.alloc_area(4, CACHE_LINE)?,
            device_event: ram.alloc_area(4, CACHE_LINE)?,
            size,
            event_idx: config.event_idx,
            slots: vec![Slot::default(); usize::from(size)].into(),
            free_id: 0,
            free: 0,
            next: start,
            published: start,
            head_flags: 0,
            hidden: (0, 0),
            added_since_kick: 0,
            in_flight: 0,
            collected: start,
            last_used: start,
            pending: 0,
            tables: IndirectTables::new(ram, size),
        };
        ring.start_at(start);
        Ok(ring)
    }

    /// Discards every chain and starts again at descriptor 0 with zeroed memory.
    pub fn reset(&mut self) {
        self.descriptors.zero();
        self.driver_event.zero();
        self.device_event.zero();
        self.start_at(RingPosition::nth(0, self.size));
    }

    fn start_at(&mut self, start: RingPosition) {
        for (slot, next) in self.slots.iter_mut().zip(1..) {
            *slot = Slot {
                next,
                ..Slot::default()
            };
        }
        (self.free_id, self.free) = (0, self.size);
        (self.next, self.published) = (start, start);
        (self.collected, self.last_used) = (start, start);
        (self.hidden, self.added_since_kick) = ((0, 0), 0);
        (self.in_flight, self.pending) = (0, 0);
        // The descriptors before `start` look used in this lap, the others in the lap before.
        let last = RingPosition {
            wrap: !start.wrap,
            ..start
        };
        for index in 0..self.size {
            let lap = if index < start.index { start } else { last };
            self.set_descriptor(index, PackedDescriptor::new(0, 0, 0, lap.used()));
        }
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
            driver: self.driver_event.addr(),
            device: self.device_event.addr(),
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
        self.in_flight
    }

    /// The first descriptor that the device has not used.
    #[must_use]
    pub fn used_up_to(&self) -> RingPosition {
        let (mut position, mut chains) = (self.last_used, self.pending);
        while chains < self.in_flight {
            let Ok(Some(count)) = self.used_at(position) else {
                break;
            };
            position = position.after(count, self.size);
            chains += 1;
        }
        position
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
        let id = self.free_id;
        if indirect {
            let (addr, len) = self.write_table(id, chain)?;
            self.put(PackedDescriptor::new(addr, len, id, VRING_DESC_F_INDIRECT));
        } else {
            let mut left = chain.len();
            for buf in chain {
                left -= 1;
                let next = if left == 0 { 0 } else { VRING_DESC_F_NEXT };
                self.put(PackedDescriptor::new(
                    buf.addr,
                    buf.len,
                    id,
                    next | write_flag(buf),
                ));
            }
        }
        self.free -= count;
        self.hidden.1 += 1;
        let slot = self.slot(id);
        (slot.count, slot.token) = (count, token);
        let next_free = slot.next;
        self.free_id = next_free;
        Ok(id)
    }

    /// Writes an available descriptor at the next position, which the device does not see yet.
    #[inline(always)]
    fn put(&mut self, descriptor: PackedDescriptor) {
        let offset = DESCRIPTOR_SIZE * usize::from(self.next.index);
        let flags = descriptor.flags | self.next.available();
        if self.hidden.0 == 0 {
            self.descriptors.store(offset, descriptor.addr.to_le());
            self.descriptors
                .store(offset + LEN_OFFSET, descriptor.len.to_le());
            self.descriptors
                .store(offset + ID_OFFSET, descriptor.id.to_le());
            self.head_flags = flags;
        } else {
            PackedDescriptor {
                flags,
                ..descriptor
            }
            .store(&self.descriptors, offset);
        }
        self.hidden.0 += 1;
        self.next = self.next.after(1, self.size);
    }

    /// Writes an indirect table with the buffers of `chain`. The descriptors follow each other,
    /// their only flag is VIRTQ_DESC_F_WRITE, and their ids have no meaning (virtio 1.3 §2.8.7).
    /// Returns the address and length of the table.
    fn write_table(&mut self, id: u16, chain: &[Buf]) -> Result<(u64, u32), DriverVirtqueueError> {
        let bytes = DESCRIPTOR_SIZE * chain.len();
        let len = u32::try_from(bytes).map_err(|_| DriverVirtqueueError::Full {
            needed: chain.len(),
            free: 0,
        })?;
        let table = self.tables.table(id, bytes)?;
        for (buf, offset) in chain.iter().zip((0..).step_by(DESCRIPTOR_SIZE)) {
            PackedDescriptor::new(buf.addr, buf.len, id, write_flag(buf)).store(table, offset);
        }
        Ok((table.addr(), len))
    }

    /// Makes all added chains visible to the device at once.
    #[inline(always)]
    pub fn publish(&mut self) {
        let (descriptors, chains) = self.hidden;
        if descriptors == 0 {
            return;
        }
        let first = DESCRIPTOR_SIZE * usize::from(self.published.index);
        self.descriptors
            .release(first + FLAGS_OFFSET, self.head_flags);
        self.published = self.next;
        self.in_flight += chains;
        // An event position can be at most one lap in the past.
        self.added_since_kick = self
            .added_since_kick
            .saturating_add(descriptors)
            .min(self.size);
        self.hidden = (0, 0);
    }

    /// Whether the device wants a kick for the chains published since the last call of this method
    /// (virtio 1.3 §2.8.10 and §2.8.21.3.1).
    #[inline(always)]
    #[must_use]
    pub fn is_kick_needed(&mut self) -> bool {
        let moved = std::mem::take(&mut self.added_since_kick);
        if moved == 0 {
            return false;
        }
        full_fence();
        match self.device_event.acquire(EVENT_FLAGS) & 3 {
            VRING_PACKED_EVENT_FLAG_DISABLE => false,
            VRING_PACKED_EVENT_FLAG_DESC if self.event_idx => {
                should_notify(self.device_event.get(0), self.published, moved, self.size)
            }
            _ => true,
        }
    }

    /// Reads the used descriptors up to the first one that is not used. Returns the number of
    /// chains that `pop` can return now.
    ///
    /// # Errors
    /// When the device used a chain that is not in flight.
    #[inline(always)]
    pub fn refresh(&mut self) -> Result<u16, DeviceFault> {
        while self.pending < self.in_flight {
            let Some(count) = self.used_at(self.last_used)? else {
                break;
            };
            self.last_used = self.last_used.after(count, self.size);
            self.pending += 1;
        }
        Ok(self.pending)
    }

    /// The number of descriptors of the chain that is used at `position`; `None` when none is.
    #[inline(always)]
    fn used_at(&self, position: RingPosition) -> Result<Option<u16>, DeviceFault> {
        let offset = DESCRIPTOR_SIZE * usize::from(position.index);
        let flags = self.descriptors.acquire(offset + FLAGS_OFFSET);
        if flags & (VIRTQ_DESC_F_AVAIL | VIRTQ_DESC_F_USED) != position.used() {
            return Ok(None);
        }
        let id = self.descriptors.get(offset + ID_OFFSET);
        match self.slots.get(usize::from(id)) {
            Some(slot) if slot.count != 0 => Ok(Some(slot.count)),
            _ => Err(DeviceFault::UsedId(id.into())),
        }
    }

    /// Collects the next chain of those that the last `refresh` found: its token and the number of
    /// bytes written to it.
    ///
    /// # Errors
    /// When the device used a chain that is not in flight.
    #[inline(always)]
    pub fn pop(&mut self) -> Result<Option<(u64, u32)>, DeviceFault> {
        if self.pending == 0 {
            return Ok(None);
        }
        let PackedDescriptor { id, len, .. } = self.descriptor(self.collected.index);
        let slot = match self.slots.get(usize::from(id)) {
            Some(slot) if slot.count != 0 => *slot,
            _ => return Err(DeviceFault::UsedId(id.into())),
        };
        self.pending -= 1;
        self.in_flight -= 1;
        self.collected = self.collected.after(slot.count, self.size);
        self.free += slot.count;
        let free_id = self.free_id;
        (self.slot(id).count, self.slot(id).next) = (0, free_id);
        self.free_id = id;
        Ok(Some((slot.token, len)))
    }

    /// Tells the device that calls are not needed.
    #[inline(always)]
    pub fn disable_calls(&mut self) {
        self.driver_event
            .release(EVENT_FLAGS, VRING_PACKED_EVENT_FLAG_DISABLE);
    }

    /// Asks the device for a call for the next chain that it uses. Returns whether there are chains
    /// to collect already.
    #[inline(always)]
    #[must_use]
    pub fn enable_calls(&mut self) -> bool {
        let flags = if self.event_idx {
            self.driver_event.set(0, self.collected.word());
            VRING_PACKED_EVENT_FLAG_DESC
        } else {
            VRING_PACKED_EVENT_FLAG_ENABLE
        };
        self.driver_event.release(EVENT_FLAGS, flags);
        full_fence();
        self.in_flight != 0 && !matches!(self.used_at(self.collected), Ok(None))
    }

    #[inline(always)]
    fn slot(&mut self, id: u16) -> &mut Slot {
        &mut self.slots[usize::from(id)]
    }
}

/// The direction flag of a descriptor for `buf`.
#[inline(always)]
fn write_flag(buf: &Buf) -> u16 {
    if buf.writable { VRING_DESC_F_WRITE } else { 0 }
}

/// Whether the descriptor that `off_wrap` names is among the `moved` descriptors before `now`.
#[inline(always)]
fn should_notify(off_wrap: u16, now: RingPosition, moved: u16, size: u16) -> bool {
    let (size, moved) = (u32::from(size), u32::from(moved));
    let index = u32::from(off_wrap & !VRING_PACKED_EVENT_F_WRAP_CTR);
    // Positions are counted from the start of the lap before `now`, so that none is negative.
    let event = match (off_wrap & VRING_PACKED_EVENT_F_WRAP_CTR != 0) == now.wrap {
        true => size + index,
        false => index,
    };
    let now = size + u32::from(now.index);
    event < now && event + moved >= now
}

/// Raw access, for what a hostile guest writes and a test reads. It does not change the driver's
/// own state.
impl PackedDriverVirtqueue {
    /// The position of the next chain to be added.
    #[must_use]
    pub fn position(&self) -> RingPosition {
        self.next
    }

    /// Reads descriptor `index`, which must be below the size.
    #[inline(always)]
    #[must_use]
    pub fn descriptor(&self, index: u16) -> PackedDescriptor {
        PackedDescriptor::load(&self.descriptors, DESCRIPTOR_SIZE * usize::from(index))
    }

    /// Writes descriptor `index`, which must be below the size.
    pub fn set_descriptor(&self, index: u16, descriptor: PackedDescriptor) {
        descriptor.store(&self.descriptors, DESCRIPTOR_SIZE * usize::from(index));
    }

    /// Writes the flags of descriptor `index`, which must be below the size, with release ordering.
    pub fn set_flags(&self, index: u16, flags: u16) {
        let offset = DESCRIPTOR_SIZE * usize::from(index) + FLAGS_OFFSET;
        self.descriptors.release(offset, flags);
    }

    /// The driver's event suppression area: `off_wrap` and flags.
    #[must_use]
    pub fn driver_event(&self) -> (u16, u16) {
        let flags = self.driver_event.acquire(EVENT_FLAGS);
        (self.driver_event.get(0), flags)
    }

    /// Writes the driver's event suppression area.
    pub fn set_driver_event(&self, off_wrap: u16, flags: u16) {
        self.driver_event.set(0, off_wrap);
        self.driver_event.release(EVENT_FLAGS, flags);
    }

    /// The device's event suppression area: `off_wrap` and flags.
    #[must_use]
    pub fn device_event(&self) -> (u16, u16) {
        let flags = self.device_event.acquire(EVENT_FLAGS);
        (self.device_event.get(0), flags)
    }

    /// Writes the device's event suppression area, as a hostile guest or a test's device does.
    pub fn set_device_event(&self, off_wrap: u16, flags: u16) {
        self.device_event.set(0, off_wrap);
        self.device_event.release(EVENT_FLAGS, flags);
    }
}
