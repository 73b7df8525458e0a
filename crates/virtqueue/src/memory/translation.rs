//! A virtqueue's copies of the translations that it uses.
//!
//! They belong to the virtqueue, so that a buffer whose translation was used before takes no lock
//! and no cache line of another virtqueue. They must be dropped when the front-end has taken a
//! translation back: [`RingTranslations::forget`].

use std::cell::Cell;
use std::ptr;
use std::sync::Arc;

use super::GuestMemory;
use super::iotlb::{Access, IOVA_PAGE, Iotlb, Translation};

/// The number of copies, a power of two. Translations of pages whose numbers have these bits in
/// common take each other's place.
const COPIES: u64 = 256;

/// A range of IOVAs that is mapped into this process. One of size 0 stands for none.
#[derive(Debug, Clone, Copy)]
pub(super) struct MappedIova {
    pub(super) start: u64,
    pub(super) size: u64,
    /// Where the first address is mapped.
    pub(super) host: *mut u8,
    pub(super) access: Access,
}

impl MappedIova {
    const NONE: Self = Self {
        start: 0,
        size: 0,
        host: ptr::null_mut(),
        access: Access::Read,
    };

    /// Whether `addr` is in the range and may be used for `access`.
    fn permits(&self, addr: u64, access: Access) -> bool {
        addr.wrapping_sub(self.start) < self.size && self.access.permits(access)
    }
}

/// What a dequeue did not find, because translations were missing.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MissingTranslation {
    /// The index of the first segment that is not what the driver meant, or [`usize::MAX`] when only
    /// indirect tables were not found.
    pub(crate) first_segment: usize,
}

/// The copies of one virtqueue, and whether one was missing.
#[derive(Debug)]
pub(super) struct RingTranslations {
    iotlb: Arc<Iotlb>,
    /// What the buffers of the virtqueue must permit.
    buffer_access: Access,
    copies: Vec<Cell<MappedIova>>,
    /// What was missing since the last [`RingTranslations::end_dequeue`].
    missing: Cell<Option<MissingTranslation>>,
    /// Whether one was missing before it.
    waits: Cell<bool>,
}

impl RingTranslations {
    pub(super) fn new(iotlb: &Arc<Iotlb>, buffer_access: Access) -> Self {
        Self {
            iotlb: Arc::clone(iotlb),
            buffer_access,
            copies: (0..COPIES).map(|_| Cell::new(MappedIova::NONE)).collect(),
            missing: Cell::new(None),
            waits: Cell::new(false),
        }
    }

    /// What the buffers of the virtqueue must permit.
    pub(super) fn buffer_access(&self) -> Access {
        self.buffer_access
    }

    /// The range with `addr`, mapped in `memory`. If its translation is missing, that is noted, and
    /// the front-end is asked for it.
    pub(super) fn find(
        &self,
        memory: &GuestMemory,
        addr: u64,
        access: Access,
    ) -> Option<MappedIova> {
        let copy = self.copy_of(addr);
        if let Some(mapped) = copy.map(Cell::get)
            && mapped.permits(addr, access)
        {
            return Some(mapped);
        }
        let found = self.iotlb.find(addr, access);
        let mapped = found.and_then(|translation| map(memory, &translation));
        match (mapped, copy) {
            (Some(mapped), Some(copy)) => copy.set(mapped),
            (None, _) => {
                self.note_missing_segment(usize::MAX);
                self.iotlb.report_miss(addr, access);
            }
            _ => {}
        }
        mapped
    }

    fn copy_of(&self, addr: u64) -> Option<&Cell<MappedIova>> {
        let at = addr / IOVA_PAGE % COPIES;
        self.copies.get(usize::try_from(at).ok()?)
    }

    /// Notes that the segment at this index is not what the driver meant.
    pub(super) fn note_missing_segment(&self, at: usize) {
        let before = self.missing.get().map_or(usize::MAX, |it| it.first_segment);
        self.missing.set(Some(MissingTranslation {
            first_segment: before.min(at),
        }));
    }

    /// Begins a new dequeue. Returns what was missing in this one.
    pub(super) fn end_dequeue(&self) -> Option<MissingTranslation> {
        let missing = self.missing.take();
        self.waits.set(missing.is_some());
        missing
    }

    /// Whether a translation was missing in the last dequeue.
    pub(super) fn waits(&self) -> bool {
        self.waits.get()
    }

    /// Drops all copies.
    pub(super) fn forget(&self) {
        self.copies
            .iter()
            .for_each(|copy| copy.set(MappedIova::NONE));
        self.waits.set(false);
    }
}

/// Where `translation` is mapped; `None` if it is not in one region of `memory` as a whole.
fn map(memory: &GuestMemory, translation: &Translation) -> Option<MappedIova> {
    let size = translation.size();
    let (region, offset) = memory.find_user(translation.user_addr, size)?;
    Some(MappedIova {
        start: translation.start(),
        size,
        // The whole range lies in the region's mapping.
        host: region.host().wrapping_add(offset),
        access: translation.access,
    })
}
