//! The packed virtqueue (virtio 1.3 §2.8).
//!
//! ```text
//! descriptor ring, read by us and written back    driver's events      device's events (ours)
//! [addr len id flags]                             off_wrap flags       off_wrap flags
//! ```
//!
//! One ring for both directions: the driver makes descriptors available in order, the device
//! overwrites them with used ones in order. Two bits of `flags`, AVAIL and USED, say whose a
//! descriptor is; what they mean turns over each time the ring wraps, which each side follows with
//! a wrap counter.

use crate::burst::{Burst, Chain, Intake};
use crate::fault::{ChainFault, RingFault};
use crate::memory::{Descriptor, GuestArray, GuestMemory, PieceWriter, full_fence};
use crate::walk::{INDIRECT, MAX_CHAINS, MAX_STEPS, NEXT, Rules, Table, WRITE, Walk};
use crate::{RingConfig, RingError, needs_event, written};

const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;
/// The wrap counter's bit beside an index.
const WRAP: u16 = 1 << 15;

/// Places in an event suppression area, in 16-bit words.
const OFF_WRAP: u16 = 0;
const FLAGS: u16 = 1;
/// What `flags` of such an area say: always, never, or at the descriptor of `off_wrap`.
const ENABLE: u16 = 0;
const DISABLE: u16 = 1;
const AT_DESCRIPTOR: u16 = 2;

/// Descriptors fetched ahead of the one looked at: two cache lines.
const AHEAD: u16 = 8;

/// A place in the ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    index: u16,
    wrap: bool,
}

impl Place {
    /// From the form that SET_VRING_BASE and event areas have.
    fn parse(word: u16, size: u16) -> Option<Self> {
        let index = word & !WRAP;
        (index < size).then_some(Self {
            index,
            wrap: word & WRAP != 0,
        })
    }

    fn word(self) -> u16 {
        self.index | if self.wrap { WRAP } else { 0 }
    }

    /// `n` descriptors further (`n` at most the ring's size, which is at most 32,768).
    #[inline(always)]
    fn after(self, n: u16, size: u16) -> Self {
        let index = self.index + n;
        if index < size {
            Self { index, ..self }
        } else {
            Self {
                index: index - size,
                wrap: !self.wrap,
            }
        }
    }

    /// Descriptors from `earlier` to here, a lap at most.
    #[inline(always)]
    fn since(self, earlier: Self, size: u16) -> u16 {
        if self.wrap == earlier.wrap {
            self.index.saturating_sub(earlier.index)
        } else {
            size - earlier.index.saturating_sub(self.index)
        }
    }

    /// `n` descriptors back.
    fn before(self, n: u16, size: u16) -> Self {
        if n <= self.index {
            Self {
                index: self.index - n,
                ..self
            }
        } else {
            Self {
                index: self.index + (size - n),
                wrap: !self.wrap,
            }
        }
    }
}

/// A chain that is done with and not yet shown to the driver.
#[derive(Debug, Clone, Copy)]
struct Done {
    id: u16,
    slots: u16,
    written: u32,
}

/// The device's half of a packed ring.
#[derive(Debug)]
pub(crate) struct PackedRing {
    size: u16,
    event_idx: bool,
    rules: Rules,
    /// Next descriptor to take.
    avail: Place,
    /// Next descriptor to overwrite.
    used: Place,
    desc: GuestArray<Descriptor>,
    driver_event: GuestArray<u16>,
    device_event: GuestArray<u16>,
    done: Vec<Done>,
}

impl PackedRing {
    pub(crate) fn new(config: &RingConfig, memory: &GuestMemory) -> Result<Self, RingError> {
        let layout = config.layout;
        let size = layout.size;
        if size == 0 || size > crate::MAX_SIZE {
            return Err(RingError::Size(size));
        }
        // The used half of the base is not filled by every front-end; since chains are completed
        // in order and none is taken when a ring stops, it equals the available half.
        let low = u16::try_from(config.base & 0xffff).unwrap_or(0);
        let place = Place::parse(low, size).ok_or(RingError::Base(config.base))?;
        Ok(Self {
            size,
            event_idx: config.event_idx,
            rules: Rules::new(config),
            avail: place,
            used: place,
            desc: memory
                .user_array(layout.desc, size)
                .ok_or(RingError::unmapped("descriptor ring", layout.desc))?,
            driver_event: memory
                .user_array(layout.avail, 2)
                .ok_or(RingError::unmapped("driver event area", layout.avail))?,
            device_event: memory
                .user_array(layout.used, 2)
                .ok_or(RingError::unmapped("device event area", layout.used))?,
            done: Vec::new(),
        })
    }

    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    pub(crate) fn base(&self) -> u32 {
        u32::from(self.avail.word()) | u32::from(self.used.word()) << 16
    }

    /// Descriptors that the driver may have made available: those that we did not take, or gave
    /// back. The flags of the others are not to be believed, or a driver that rewrites them makes us
    /// take more than the ring has.
    #[inline(always)]
    fn room(&self) -> u16 {
        self.size - self.avail.since(self.used, self.size)
    }

    /// Takes chain after chain for as long as the next descriptor is the device's.
    #[inline]
    pub(crate) fn take(&mut self, burst: &mut Burst, max: usize) -> Result<usize, RingFault> {
        let Intake { places, mut pieces } = burst.intake(max.min(MAX_CHAINS));
        let mut room = self.room();
        let mut place = self.avail;
        // Work of chains that are not single ones; those are bounded by their number.
        let mut work = 0;
        let mut taken = 0;
        let mut fault = Ok(());
        while taken < places.len() && room > 0 && work < MAX_STEPS {
            let singles = self.take_singles(place, room, &mut places[taken..], &mut pieces);
            taken += usize::from(singles);
            room -= singles;
            place = place.after(singles, self.size);
            let Some(chain) = places.get_mut(taken).filter(|_| room > 0) else {
                break;
            };
            let Some(raw) = self.available(place) else {
                break;
            };
            let desc = raw.unpacked(raw.packed_flags());
            let followed = match self.walk_plain(place, desc, room, &mut pieces) {
                Some(plain) => Ok(plain),
                None => self.walk(place, desc, room, &mut pieces),
            };
            match followed {
                Ok((any, read)) => {
                    room -= any.slots;
                    place = place.after(any.slots, self.size);
                    work += read;
                    *chain = any;
                    taken += 1;
                }
                Err(found) => {
                    fault = Err(found);
                    break;
                }
            }
        }
        drop(pieces);
        burst.took(taken, taken + work);
        self.avail = place;
        match taken {
            0 => fault.map(|()| 0),
            // Chains before the fault are whole: they go on, and the next call meets it again.
            _ => Ok(taken),
        }
    }

    /// Takes chains of one buffer each from `place` on, until there is another or the ring's end;
    /// says how many.
    #[inline(always)]
    fn take_singles(
        &self,
        place: Place,
        room: u16,
        chains: &mut [Chain],
        pieces: &mut PieceWriter<'_>,
    ) -> u16 {
        let end = self.size.min(place.index + room);
        let mut at = place.index;
        for (chain, index) in chains.iter_mut().zip(place.index..end) {
            let Some(raw) = self.available(Place { index, ..place }) else {
                break;
            };
            // It will be written back. Past the end there is nothing, and no harm in asking.
            self.desc.prefetch_to_write(index.wrapping_add(AHEAD));
            let buffer = (raw.addr(), raw.len());
            let flags = raw.packed_flags();
            let Some(single) = self.rules.single(raw.packed_id(), buffer, flags, pieces) else {
                break;
            };
            *chain = single;
            at = index + 1;
        }
        at - place.index
    }

    /// The descriptor at `place`, if it is available.
    #[inline(always)]
    fn available(&self, place: Place) -> Option<Descriptor> {
        self.desc
            .descriptor_if(place.index, |flags| is_available(flags, place.wrap))
    }

    /// Follows the chain at `place` if nothing in it is out of the ordinary.
    #[inline(always)]
    fn walk_plain(
        &self,
        mut place: Place,
        desc: Descriptor,
        room: u16,
        pieces: &mut PieceWriter<'_>,
    ) -> Option<(Chain, usize)> {
        let mut slots = 1;
        // The chain's id stands in its last descriptor.
        let mut last = desc;
        let walked = self.rules.plain(desc, pieces, |_| {
            slots += 1;
            place = place.after(1, self.size);
            let raw = self
                .desc
                .descriptor(place.index)
                .filter(|_| slots <= room)?;
            last = raw.unpacked(raw.packed_flags());
            Some(last)
        })?;
        let read = walked.work;
        Some((Chain::new(last.next(), slots, walked), read))
    }

    /// Follows the chain at `place`, whose first descriptor has been read, for `room` descriptors at
    /// most; the chain and the descriptors read for it.
    #[inline(never)]
    fn walk(
        &self,
        mut place: Place,
        mut desc: Descriptor,
        room: u16,
        pieces: &mut PieceWriter<'_>,
    ) -> Result<(Chain, usize), RingFault> {
        let mut walk = Walk::new(self.rules, pieces);
        let mut slots = 0;
        let mut skipped = 0;
        let mut followed = Ok(());
        loop {
            slots += 1;
            // Past a fault only the chain's end is looked for: where the next one begins.
            if followed.is_ok() {
                followed = self.buffer(desc, &mut walk);
            } else {
                skipped += 1;
            }
            if !desc.has(NEXT) {
                let walked = walk.end(followed);
                let read = walked.work + skipped;
                return Ok((Chain::new(desc.next(), slots, walked), read));
            }
            if slots == room {
                walk.abandon();
                return Err(RingFault::ChainWithoutEnd { size: self.size });
            }
            place = place.after(1, self.size);
            let Some(raw) = self.desc.descriptor(place.index) else {
                // No place is outside the ring.
                walk.abandon();
                return Err(RingFault::ChainWithoutEnd { size: self.size });
            };
            desc = raw.unpacked(raw.packed_flags());
        }
    }

    #[inline(always)]
    fn buffer(&self, desc: Descriptor, walk: &mut Walk<'_, '_>) -> Result<(), ChainFault> {
        if desc.has(INDIRECT) {
            walk.table(desc, Table::Sequential)
        } else {
            walk.step(desc, usize::from(self.size))
        }
    }

    /// Gives the most recently taken `slots` descriptors back untouched.
    pub(crate) fn untake(&mut self, slots: u16) {
        self.avail = self.avail.before(slots, self.size);
    }

    /// Notes chains to be shown with the others, each with the number of bytes written to it.
    #[inline(always)]
    pub(crate) fn complete_each(&mut self, each: impl Iterator<Item = (u16, u16, u32)>) {
        self.done
            .extend(each.map(|(id, slots, written)| Done { id, slots, written }));
    }

    /// Notes the chains that `len` bytes fill, one after the other; says how many those are.
    #[inline(always)]
    pub(crate) fn complete_filled(&mut self, chains: &[Chain], len: usize) -> usize {
        let mut rest = len;
        let mut used = 0;
        for chain in chains {
            if rest == 0 {
                break;
            }
            let here = rest.min(chain.len());
            rest -= here;
            self.complete_each(std::iter::once((chain.id, chain.slots, written(here))));
            used += 1;
        }
        used
    }

    /// Overwrites descriptors with used ones, the first of them last: the driver reads them in
    /// order, so it sees all or none. True when it wants an interrupt.
    #[inline(always)]
    pub(crate) fn publish(&mut self) -> bool {
        let Some(first) = self.done.first().copied() else {
            return false;
        };
        let start = self.used;
        let mut moved = first.slots;
        let mut place = start.after(first.slots, self.size);
        for done in &self.done[1..] {
            self.write(place, *done);
            place = place.after(done.slots, self.size);
            moved = moved.wrapping_add(done.slots);
        }
        self.write(start, first);
        self.used = place;
        self.done.clear();
        full_fence();
        self.wants_call(moved)
    }

    #[inline(always)]
    fn write(&self, place: Place, done: Done) {
        let mut flags = if place.wrap { AVAIL | USED } else { 0 };
        if done.written != 0 {
            flags |= WRITE;
        }
        self.desc
            .release_used(place.index, done.id, done.written, flags);
    }

    /// Whether the driver wants an interrupt for the last `moved` descriptors.
    #[inline(always)]
    fn wants_call(&self, moved: u16) -> bool {
        match self.driver_event.acquire(FLAGS) & 3 {
            DISABLE => false,
            AT_DESCRIPTOR if self.event_idx => {
                let word = self.driver_event.acquire(OFF_WRAP);
                let mut event = word & !WRAP;
                if (word & WRAP != 0) != self.used.wrap {
                    event = event.wrapping_sub(self.size);
                }
                let new = self.used.index;
                needs_event(event, new, new.wrapping_sub(moved))
            }
            _ => true,
        }
    }

    pub(crate) fn is_unpublished(&self) -> bool {
        !self.done.is_empty()
    }

    pub(crate) fn enable_kicks(&mut self) -> bool {
        if self.event_idx {
            self.device_event.release(OFF_WRAP, self.avail.word());
            self.device_event.release(FLAGS, AT_DESCRIPTOR);
        } else {
            self.device_event.release(FLAGS, ENABLE);
        }
        full_fence();
        self.has_more()
    }

    pub(crate) fn disable_kicks(&mut self) {
        self.device_event.release(FLAGS, DISABLE);
    }

    #[inline(always)]
    pub(crate) fn has_more(&self) -> bool {
        self.available(self.avail).is_some() && self.room() > 0
    }
}

/// Whether a descriptor with these flags is the device's (virtio 1.3 §2.8.1).
#[inline(always)]
fn is_available(flags: u16, wrap: bool) -> bool {
    flags & (AVAIL | USED) == if wrap { AVAIL } else { USED }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_go_round_both_ways() {
        for size in [1, 3, 256, 32_768] {
            let mut place = Place {
                index: 0,
                wrap: true,
            };
            for n in [1, size, size / 2 + 1] {
                let there = place.after(n, size);
                assert_eq!(there.before(n, size), place, "{n} of {size}");
                assert_eq!(there.since(place, size), n, "{n} of {size}");
                assert_eq!(there.since(there, size), 0);
                place = there;
            }
        }
        assert_eq!(
            Place::parse(0x8003, 4),
            Some(Place {
                index: 3,
                wrap: true
            })
        );
        assert_eq!(Place::parse(4, 4), None);
    }
}
