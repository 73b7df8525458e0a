//! The device side of a virtqueue of either format.

use std::sync::Arc;

use crate::burst::Burst;
use crate::chain::{Chain, to_used_len};
use crate::config::{Direction, VirtqueueConfig, VirtqueueError};
use crate::crash_record::CrashRecord;
use crate::fault::VirtqueueFault;
use crate::memory::{GuestMemory, IovaRange};
use crate::packed::PackedVirtqueue;
use crate::ring_log::{PackedRingLog, UsedRingLog};
use crate::singles::{FoundSingles, SingleIds, SinglesRequest};
use crate::split::SplitVirtqueue;

/// The device side of a virtqueue, split or packed (virtio 1.3 §2.7 and §2.8). Callers do not see
/// which format it has.
///
/// Each round takes three calls: [`Virtqueue::dequeue`] moves available chains into a [`Burst`],
/// [`Virtqueue::complete`] gives a chain back with the number of bytes written to it, and
/// [`Virtqueue::publish`] makes all completed chains visible to the driver at once and says whether
/// the driver wants an interrupt. Chains that were dequeued and not completed can be given back
/// unused with [`Virtqueue::rewind`].
///
/// ```text
///            dequeue              complete               publish
/// available ---------> in burst -----------> unpublished ---------> used
///     ^                   |
///     +------ rewind -----+
/// ```
///
/// # Example
/// A driver in the same process sends eight bytes, and the device reads them.
///
/// ```
/// # use std::sync::Arc;
/// use virtionet_guest::driver::{Buf, DriverVirtqueue, DriverVirtqueueConfig};
/// use virtionet_guest::memory::GuestRam;
/// use virtionet_virtqueue::{Burst, Direction, Virtqueue, VirtqueueConfig, VirtqueueLayout};
///
/// // The driver: a split virtqueue of 256 descriptors, and one readable buffer.
/// let ram = GuestRam::new(0x10_0000)?;
/// let mut driver = DriverVirtqueue::new(&ram, DriverVirtqueueConfig::new(256, 0))?;
/// ram.write(0x8_0000, b"8 bytes!")?;
/// driver.add(&[Buf::readable(0x8_0000, 8)], false, 7)?;
/// driver.publish();
///
/// // The device: the same virtqueue, by front-end addresses.
/// let at = driver.addresses();
/// let user_addr = |addr| ram.user_addr(addr).ok_or("the address is in no region");
/// let memory = Arc::new(ram.guest_memory()?);
/// let config = VirtqueueConfig {
///     layout: VirtqueueLayout {
///         size: driver.size(),
///         desc: user_addr(at.descriptors)?,
///         avail: user_addr(at.driver)?,
///         used: user_addr(at.device)?,
///     },
///     base: driver.base(),
///     direction: Direction::Readable,
///     packed: false,
///     event_idx: false,
///     indirect: false,
///     min_len: 1,
/// };
/// let mut virtqueue = Virtqueue::new(config, &memory)?;
/// let mut burst = Burst::new(memory);
/// assert_eq!(virtqueue.dequeue(&mut burst, 64)?, 1);
/// let chain = burst.chains()[0];
/// let mut bytes = [0; 8];
/// burst.slices(&chain)[0].copy_to(&mut bytes);
/// assert_eq!(&bytes, b"8 bytes!");
///
/// virtqueue.complete(&chain, 0);
/// burst.retire(1);
/// assert!(virtqueue.publish(), "the driver wants an interrupt");
///
/// let mut used = Vec::new();
/// driver.collect(|token, written| used.push((token, written)))?;
/// assert_eq!(used, [(7, 0)]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Virtqueue {
    format: Format,
    config: VirtqueueConfig,
    /// The guest address at which writes to the used ring are logged, if the front-end asks for
    /// that.
    used_log: Option<u64>,
    /// Whether the driver may still send kicks. Disabling them again would only take a cache line
    /// from the driver.
    kicks_enabled: bool,
}

#[derive(Debug)]
enum Format {
    Split(SplitVirtqueue),
    Packed(PackedVirtqueue),
}

/// Evaluates the same expression for either format of the virtqueue.
macro_rules! dispatch {
    ($ring:expr, $inner:ident => $call:expr) => {
        match $ring.format {
            Format::Split(ref $inner) => $call,
            Format::Packed(ref $inner) => $call,
        }
    };
    (mut $ring:expr, $inner:ident => $call:expr) => {
        match $ring.format {
            Format::Split(ref mut $inner) => $call,
            Format::Packed(ref mut $inner) => $call,
        }
    };
}

impl Virtqueue {
    /// The virtqueue in `memory` that `config` describes. It continues at `config.base`, or in a
    /// split virtqueue at the used index found in memory (see [`Virtqueue::corrected_base`]).
    ///
    /// # Errors
    /// When the size, the base or an address of an area is not that of a virtqueue.
    pub fn new(config: VirtqueueConfig, memory: &GuestMemory) -> Result<Self, VirtqueueError> {
        let format = match config.packed {
            false => Format::Split(SplitVirtqueue::new(&config, memory)?),
            true => Format::Packed(PackedVirtqueue::new(&config, memory)?),
        };
        Ok(Self {
            format,
            config,
            used_log: None,
            kicks_enabled: true,
        })
    }

    /// The same virtqueue with a record of its progress, from which it continues if it is the
    /// virtqueue of this record. A split virtqueue needs none.
    #[must_use]
    pub fn with_record(self, record: CrashRecord, memory: &GuestMemory) -> Self {
        let format = match self.format {
            Format::Split(split) => Format::Split(split),
            Format::Packed(packed) => {
                Format::Packed(packed.with_record(record, self.config.layout, memory))
            }
        };
        Self { format, ..self }
    }

    /// Where the virtqueue continues, if that is not the base that it was started with: the used
    /// index of a split virtqueue, or the record of a packed one, showed that base to be outdated.
    /// To be called before anything is dequeued.
    #[must_use]
    pub fn corrected_base(&self) -> Option<u32> {
        // Not every front-end fills the upper half of a packed virtqueue's base.
        let is_same = self.base() & 0xffff == self.config.base & 0xffff;
        (!is_same).then(|| self.base())
    }

    /// The number of chains that were given back unprocessed when the virtqueue was started with its
    /// record, because the front-end had used later ones itself meanwhile.
    #[must_use]
    pub fn given_back_at_start(&self) -> u16 {
        match &self.format {
            Format::Split(_) => 0,
            Format::Packed(packed) => packed.given_back(),
        }
    }

    /// Whether the ring shows that the device cannot continue here: a packed virtqueue whose
    /// progress is lost. To be called before anything is dequeued.
    #[must_use]
    pub fn is_base_implausible(&self) -> bool {
        match &self.format {
            Format::Split(_) => false,
            Format::Packed(packed) => packed.is_position_implausible(),
        }
    }

    /// The same virtqueue, with the same progress, in another snapshot of memory.
    ///
    /// # Errors
    /// When an area does not lie in the new snapshot.
    pub fn rebind(&self, memory: &Arc<GuestMemory>) -> Result<Self, VirtqueueError> {
        let base = self.base();
        let config = VirtqueueConfig {
            base,
            ..self.config
        };
        let mut rebound = Self::new(config, memory)?;
        if let Format::Packed(packed) = &self.format
            && let Some(record) = packed.record()
        {
            rebound = rebound.with_record(record.clone(), memory);
        }
        rebound.set_used_log(self.used_log, memory);
        Ok(rebound)
    }

    /// Logs what the device writes to the virtqueue itself while `memory`, to which the virtqueue is
    /// bound, has a log: the used ring of a split virtqueue and the device event area of a packed
    /// one as if they were at guest address `used_log`, and used descriptors at the guest address of
    /// the descriptor ring. With `None` it logs none of these.
    pub fn set_used_log(&mut self, used_log: Option<u64>, memory: &GuestMemory) {
        self.used_log = used_log;
        let size = self.size();
        let used_area = used_log
            .and_then(|addr| dispatch!(self, ring => memory.used_area_log(addr, ring.used_area())));
        match &mut self.format {
            Format::Split(ring) => ring.set_log(used_area.map(|area| UsedRingLog::new(size, area))),
            Format::Packed(ring) => {
                let descriptors = memory.area_log(ring.descriptors());
                let areas = descriptors.zip(used_area);
                ring.set_log(areas.map(|(descriptors, device_event)| {
                    PackedRingLog::new(size, descriptors, device_event)
                }));
            }
        }
    }

    /// The ranges of addresses of its areas, as SET_VRING_ADDR gave them.
    #[must_use]
    pub fn areas(&self) -> Vec<IovaRange> {
        self.config.layout.areas(self.config.packed)
    }

    /// The number of descriptors.
    #[must_use]
    pub fn size(&self) -> u16 {
        dispatch!(self, ring => ring.size())
    }

    /// The position at which the virtqueue would continue if it stopped now, in the form of
    /// GET_VRING_BASE (see [`VirtqueueConfig::base`]). Chains in a burst count as dequeued, so give
    /// back unused ones first ([`Virtqueue::rewind`]).
    #[must_use]
    pub fn base(&self) -> u32 {
        dispatch!(self, ring => ring.base())
    }

    /// Moves up to `max` available chains, and at most 64, to the back of `burst`. Returns how many
    /// were moved; 0 when none is available, or when the translation of an address of the first one
    /// is missing ([`Burst::waits_for_translation`]). The work of one call is bounded, whatever the
    /// guest wrote.
    ///
    /// # Errors
    /// When the virtqueue's indices or heads are invalid. Valid chains in front of the fault are
    /// dequeued first; the next call then returns the fault.
    #[inline(always)]
    pub fn dequeue(&mut self, burst: &mut Burst, max: usize) -> Result<usize, VirtqueueFault> {
        dispatch!(mut self, ring => ring.dequeue(burst, max))
    }

    /// Gives every chain of `burst` back as if it had never been dequeued, and empties `burst`.
    pub fn rewind(&mut self, burst: &mut Burst) {
        let slots = burst
            .chains()
            .iter()
            .fold(0u16, |sum, chain| sum.wrapping_add(chain.slots));
        dispatch!(mut self, ring => ring.rewind(slots));
        burst.clear();
    }

    /// Completes a chain to which `written` bytes were written. The driver does not see it before
    /// [`Virtqueue::publish`]. Complete chains in the order in which they were dequeued: the base
    /// after a restart relies on that order.
    #[inline(always)]
    pub fn complete(&mut self, chain: &Chain, written: u32) {
        self.complete_each(std::iter::once((chain, written)));
    }

    /// Completes `chains` in their order; nothing was written to them.
    #[inline(always)]
    pub fn complete_all(&mut self, chains: &[Chain]) {
        self.complete_each(chains.iter().map(|chain| (chain, 0)));
    }

    /// Completes several chains in their order, each with the number of bytes written to it.
    #[inline(always)]
    pub fn complete_each<'c>(&mut self, completions: impl Iterator<Item = (&'c Chain, u32)>) {
        let completions = completions.map(|(chain, written)| (chain.id, chain.slots, written));
        dispatch!(mut self, ring => ring.complete_each(completions));
    }

    /// Finds the next available chains for as long as each is one buffer within one region of memory,
    /// of at least the next of `min_lens` bytes and at most `max_len` bytes, or 64 KiB. It finds no more
    /// than `min_lens` has elements, and at most 64. `direction` is that of the virtqueue.
    ///
    /// Nothing is dequeued and nothing is written to guest memory. `burst` must be empty and not be
    /// behind an IOMMU; otherwise nothing is found.
    #[inline(always)]
    pub fn find_singles(
        &self,
        burst: &mut Burst,
        direction: Direction,
        min_lens: impl ExactSizeIterator<Item = usize>,
        max_len: u32,
    ) -> FoundSingles {
        if !burst.chains().is_empty() || burst.memory().iotlb().is_some() {
            return FoundSingles::NONE;
        }
        let (ids, slices, translator) = burst.singles_storage(min_lens.len());
        let request = SinglesRequest {
            ids,
            slices,
            translator,
            min_lens,
            max_len,
        };
        dispatch!(self, ring => ring.find_singles(direction, request))
    }

    /// Dequeues and completes the found chains of these ids, each with the number of bytes written to
    /// it. They must be the next available ones, and `written` must have as many elements.
    #[inline(always)]
    pub fn complete_singles(&mut self, ids: SingleIds<'_>, written: impl Iterator<Item = u32>) {
        // At most 64.
        let count = u16::try_from(ids.0.len()).unwrap_or(0);
        let ids = ids.0.iter().copied();
        let completions = ids.zip(written).map(|(id, written)| (id, 1, written));
        dispatch!(mut self, ring => {
            ring.skip_available(count);
            ring.complete_each(completions);
        });
    }

    /// Completes the chains that `len` bytes fill one after the other, beginning with the first,
    /// each with its share of the bytes. Returns how many chains those are.
    #[inline(always)]
    pub fn complete_filled(&mut self, chains: &[Chain], len: usize) -> usize {
        let mut remaining = len;
        let mut filled = 0;
        self.complete_each(chains.iter().map_while(|chain| {
            let here = remaining.min(chain.len());
            (remaining > 0).then(|| {
                remaining -= here;
                filled += 1;
                (chain, to_used_len(here))
            })
        }));
        filled
    }

    /// Makes all completed chains visible to the driver at once. Returns whether the driver wants
    /// an interrupt for them.
    #[inline(always)]
    #[must_use = "the driver may be waiting for the interrupt"]
    pub fn publish(&mut self) -> bool {
        dispatch!(mut self, ring => ring.publish())
    }

    /// Whether there are completed chains that the driver cannot see yet.
    #[must_use]
    pub fn has_unpublished(&self) -> bool {
        dispatch!(self, ring => ring.has_unpublished())
    }

    /// Asks the driver for kicks. Returns whether chains became available in the meantime; no kick
    /// may come for those, so dequeue again before waiting.
    #[must_use = "no kick may come for chains that are already available"]
    pub fn enable_kicks(&mut self) -> bool {
        self.kicks_enabled = true;
        dispatch!(mut self, ring => ring.enable_kicks())
    }

    /// Tells the driver that kicks are not needed. The driver may still send some.
    #[inline(always)]
    pub fn disable_kicks(&mut self) {
        if std::mem::take(&mut self.kicks_enabled) {
            dispatch!(mut self, ring => ring.disable_kicks());
        }
    }

    /// Whether the driver's index or flags say that chains are available. They may turn out to be
    /// faulty.
    #[inline(always)]
    #[must_use]
    pub fn has_more(&self) -> bool {
        dispatch!(self, ring => ring.has_more())
    }
}
