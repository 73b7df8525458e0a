//! The driver's side of a packed virtqueue (virtio 1.3 §2.8), and raw access for hostile guests.
//!
//! What the driver must remember of a chain lies in private slots by buffer id, out of the device's
//! reach. Chains are written where the device will look for them, all but the flags of the first
//! descriptor since the last [`PackedDriverVirtqueue::publish`]: the device stops there, so it sees what
//! follows only when that one descriptor becomes available.

mod layout;

use virtionet_virtqueue::memory::full_fence;

use crate::driver::{
    Buf, DeviceFault, DriverVirtqueueConfig, DriverVirtqueueError, VirtqueueAddresses, needed,
};
use crate::indirect::Tables;
use crate::memory::{Area, GuestRam};
use crate::split::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use layout::{FLAGS_OFFSET, ID_OFFSET, LEN_OFFSET};

pub use layout::{
    PackedDescriptor, RingPosition, VIRTQ_DESC_F_AVAIL, VIRTQ_DESC_F_USED,
    VRING_PACKED_EVENT_FLAG_DESC, VRING_PACKED_EVENT_FLAG_DISABLE, VRING_PACKED_EVENT_FLAG_ENABLE,
};

/// Bytes of a descriptor.
const DESCRIPTOR: usize = 16;
/// Byte offset of `flags` in an event suppression area; `off_wrap` comes first.
const EVENT_FLAGS: usize = 2;
/// Each part starts on a cache line of its own.
const LINE: u64 = 64;

/// What the driver remembers of a buffer id.
#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    /// The next of the free ids.
    next: u16,
    /// Descriptors of its chain; 0 when it has none.
    count: u16,
    token: u64,
}

/// A driver's packed ring.
#[derive(Debug)]
pub struct PackedDriverVirtqueue {
    descriptors: Area,
    driver_event: Area,
    device_event: Area,
    size: u16,
    event_idx: bool,
    /// By buffer id.
    slots: Box<[Slot]>,
    free_id: u16,
    /// Free descriptors.
    free: u16,
    /// The next descriptor to write.
    next: RingPosition,
    /// The first descriptor that the device cannot see: where `withheld` belongs.
    published: RingPosition,
    /// The flags that make the first unpublished descriptor available.
    head_flags: u16,
    /// Descriptors and chains written and not published.
    hidden: (u16, u16),
    /// Descriptors published since it was last asked whether to kick, a lap at most.
    added_since_kick: u16,
    /// Chains published and not collected.
    in_flight: u16,
    /// The first descriptor of those not collected.
    collected: RingPosition,
    /// Where the last look for used descriptors ended, and the chains from `collected` to there.
    last_used: RingPosition,
    pending: u16,
    /// By buffer id.
    tables: Tables,
}

impl PackedDriverVirtqueue {
    /// Allocates an empty ring in `ram`.
    ///
    /// # Errors
    /// When the size is not 1 to 32,768 or `ram` has no room.
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
            descriptors: ram.alloc_area(16 * u64::from(size), LINE)?,
            driver_event: ram.alloc_area(4, LINE)?,
            device_event: ram.alloc_area(4, LINE)?,
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
            tables: Tables::new(ram, size),
        };
        ring.start_at(start);
        Ok(ring)
    }

    /// Forgets every chain and starts over at descriptor 0 with zeroed memory.
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
        // As if all before `start` had been used in this lap and all behind it in the last one.
        let last = RingPosition {
            wrap: !start.wrap,
            ..start
        };
        for index in 0..self.size {
            let lap = if index < start.index { start } else { last };
            self.set_descriptor(index, PackedDescriptor::new(0, 0, 0, lap.used()));
        }
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
            driver: self.driver_event.addr(),
            device: self.device_event.addr(),
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
                    next | write(buf),
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

    /// Writes an available descriptor at the next place, hidden from the device.
    #[inline(always)]
    fn put(&mut self, descriptor: PackedDescriptor) {
        let offset = DESCRIPTOR * usize::from(self.next.index);
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

    /// Address and length of a table with the buffers of `chain` (virtio 1.3 §2.8.7: in order, with
    /// no flag but WRITE; the ids in it mean nothing).
    fn write_table(&mut self, id: u16, chain: &[Buf]) -> Result<(u64, u32), DriverVirtqueueError> {
        let bytes = DESCRIPTOR * chain.len();
        let len = u32::try_from(bytes).map_err(|_| DriverVirtqueueError::Full {
            needed: chain.len(),
            free: 0,
        })?;
        let table = self.tables.table(id, bytes)?;
        for (buf, offset) in chain.iter().zip((0..).step_by(DESCRIPTOR)) {
            PackedDescriptor::new(buf.addr, buf.len, id, write(buf)).store(table, offset);
        }
        Ok((table.addr(), len))
    }

    /// See [`crate::driver::DriverVirtqueue::publish`].
    #[inline(always)]
    pub fn publish(&mut self) {
        let (descriptors, chains) = self.hidden;
        if descriptors == 0 {
            return;
        }
        let first = DESCRIPTOR * usize::from(self.published.index);
        self.descriptors
            .release(first + FLAGS_OFFSET, self.head_flags);
        self.published = self.next;
        self.in_flight += chains;
        // A lap is as much as the device can look back on.
        self.added_since_kick = self
            .added_since_kick
            .saturating_add(descriptors)
            .min(self.size);
        self.hidden = (0, 0);
    }

    /// See [`crate::driver::DriverVirtqueue::is_kick_needed`] (virtio 1.3 §2.8.10 and §2.8.21.3.1).
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

    /// See [`crate::driver::DriverVirtqueue::refresh`].
    ///
    /// # Errors
    /// When the device names a chain that is not in flight.
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

    /// How many descriptors the chain had that is used at `place`; `None` when none is.
    #[inline(always)]
    fn used_at(&self, position: RingPosition) -> Result<Option<u16>, DeviceFault> {
        let offset = DESCRIPTOR * usize::from(position.index);
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

    /// See [`crate::driver::DriverVirtqueue::pop`].
    ///
    /// # Errors
    /// When the device names a chain that is not in flight.
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

    /// See [`crate::driver::DriverVirtqueue::disable_calls`].
    #[inline(always)]
    pub fn disable_calls(&mut self) {
        self.driver_event
            .release(EVENT_FLAGS, VRING_PACKED_EVENT_FLAG_DISABLE);
    }

    /// See [`crate::driver::DriverVirtqueue::enable_calls`].
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

#[inline(always)]
fn write(buf: &Buf) -> u16 {
    if buf.writable { VRING_DESC_F_WRITE } else { 0 }
}

/// Whether the descriptor of `off_wrap` is among the `moved` ones before `now`.
#[inline(always)]
fn should_notify(off_wrap: u16, now: RingPosition, moved: u16, size: u16) -> bool {
    let (size, moved) = (u32::from(size), u32::from(moved));
    let index = u32::from(off_wrap & !(1 << 15));
    // Counted from a lap before `now`'s: nothing then lies below 0.
    let event = match (off_wrap >> 15 == 1) == now.wrap {
        true => size + index,
        false => index,
    };
    let now = size + u32::from(now.index);
    event < now && event + moved >= now
}

/// Raw access: what a hostile guest writes, and what a test looks at. None of it changes what the
/// driver believes of its own chains.
impl PackedDriverVirtqueue {
    /// Where the next chain will be written.
    #[must_use]
    pub fn position(&self) -> RingPosition {
        self.next
    }

    /// Descriptor `index` (below the size).
    #[inline(always)]
    #[must_use]
    pub fn descriptor(&self, index: u16) -> PackedDescriptor {
        PackedDescriptor::load(&self.descriptors, DESCRIPTOR * usize::from(index))
    }

    /// Writes descriptor `index` (below the size).
    pub fn set_descriptor(&self, index: u16, descriptor: PackedDescriptor) {
        descriptor.store(&self.descriptors, DESCRIPTOR * usize::from(index));
    }

    /// Writes the flags of descriptor `index` (below the size) after everything written before.
    pub fn set_flags(&self, index: u16, flags: u16) {
        let offset = DESCRIPTOR * usize::from(index) + FLAGS_OFFSET;
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

    /// Writes the device's event suppression area: a guest that scribbles, or a device in a test.
    pub fn set_device_event(&self, off_wrap: u16, flags: u16) {
        self.device_event.set(0, off_wrap);
        self.device_event.release(EVENT_FLAGS, flags);
    }
}
