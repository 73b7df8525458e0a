//! Segments of the guest's buffers in the layout of `iovec`, and the translation of guest addresses
//! to them.
//!
//! Most buffers of a guest lie in one or two memory regions. [`SegmentWriter`] therefore keeps the
//! region that it found last and translates an address in it with one comparison. Other addresses,
//! and a list that must grow, take the slow path, which is not inlined.
#![allow(unsafe_code)]

mod singles;
mod translated;

pub(crate) use singles::{MAX_SINGLE_LEN, SingleTranslator};

use std::sync::Arc;

use vm_memory::ByteValued;

use super::array::{GuestArrayRef, prefetch, prefetch_to_write};
use super::iotlb::Access;
use super::slice::GuestSlice;
use super::translation::{MissingTranslation, RingTranslations};
use super::{GuestMemory, array_bytes};
use crate::config::Direction;

/// Initial capacity of a list in segments: enough for 64 chains of two segments each.
const INITIAL_CAPACITY: usize = 128;

/// The error of a buffer that is not entirely in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadAddress;

/// The segments of a burst, all in one snapshot of memory.
#[derive(Debug)]
pub struct SegmentList {
    /// The first `len` elements are segments; the rest is unused capacity.
    list: Vec<GuestSlice<'static>>,
    len: usize,
    /// The region of the last translation.
    cached_region: CachedRegion,
    /// What addresses mean, if they are I/O virtual addresses. The cached region is then the range
    /// of a translation.
    translations: Option<Box<RingTranslations>>,
    /// Keeps every slice in `list` mapped. The 'static of `list` is never visible outside this
    /// type.
    memory: Arc<GuestMemory>,
}

/// The first address of a segment that was just appended.
#[derive(Clone, Copy)]
pub(crate) struct SegmentStart(*const u8);

impl SegmentStart {
    /// Prefetches the first two cache lines, with the header and the start of the frame, for the
    /// access that `direction` means.
    #[inline(always)]
    pub(crate) fn prefetch(self, direction: Direction) {
        let next = self.0.wrapping_add(64);
        match direction {
            Direction::Readable => {
                prefetch(self.0);
                prefetch(next);
            }
            Direction::Writable => {
                prefetch_to_write(self.0);
                prefetch_to_write(next);
            }
        }
    }
}

/// Appends to a [`SegmentList`]. It holds the state of the fast path by value, so that a segment
/// costs one comparison and one store. The list has the appended segments when the writer is
/// dropped.
pub(crate) struct SegmentWriter<'p> {
    segments: &'p mut SegmentList,
    /// The number of segments, including those appended.
    len: usize,
    /// The region of the last translation.
    cached_region: CachedRegion,
}

impl<'p> SegmentWriter<'p> {
    /// The number of segments.
    #[inline(always)]
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Removes the segments from index `len` on.
    #[inline(always)]
    pub(crate) fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Appends a range that is not empty and lies in the cached region, if the list has unused
    /// capacity. Returns `None`, without any effect, in every other case.
    #[inline(always)]
    pub(crate) fn push_cached(&mut self, addr: u64, len: u32) -> Option<SegmentStart> {
        let len = u64::from(len);
        let offset = self.cached_region.offset(addr, len)?;
        let element = self.segments.list.get_mut(self.len)?;
        let slice = GuestSlice::new(self.cached_region.host, offset, len);
        *element = slice;
        self.len += 1;
        Some(SegmentStart(slice.vec.iov_base.cast()))
    }

    /// Appends any range, as [`SegmentList::push`] does.
    #[inline(always)]
    pub(crate) fn push(&mut self, addr: u64, len: u32) -> Result<(), BadAddress> {
        if len != 0 && self.push_cached(addr, len).is_some() {
            return Ok(());
        }
        let len = u64::from(len);
        // The state is passed by value, so that the fast path can keep it in registers.
        let (len, cached_region, pushed) = self.segments.push_slow(self.len, addr, len);
        self.len = len;
        self.cached_region = cached_region;
        pushed
    }

    /// The table of `len` values at guest address `addr`, or `None` when it does not lie in one
    /// region. Any alignment is allowed, because the specification guarantees none for an indirect
    /// table.
    #[inline(always)]
    pub(crate) fn table<T: ByteValued>(&self, addr: u64, len: u16) -> Option<GuestArrayRef<'p, T>> {
        let bytes = array_bytes::<T>(len)?;
        let host = match self.cached_region.offset(addr, bytes) {
            Some(offset) => {
                let offset = usize::try_from(offset).ok()?;
                self.cached_region.host.wrapping_add(offset)
            }
            None => self.segments.table_slow(addr, bytes)?,
        };
        // SAFETY: the table lies in a mapping of `SegmentList::memory`, which nobody else can replace
        // during 'p, and which the writer does not replace.
        Some(unsafe { GuestArrayRef::new(host, len) })
    }

    /// Ends a dequeue. Returns what the chains must not be used for if a translation was missing.
    #[inline(always)]
    pub(crate) fn end_dequeue(&self) -> Option<MissingTranslation> {
        self.segments.translations.as_ref()?.end_dequeue()
    }
}

impl Drop for SegmentWriter<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        self.segments.len = self.len;
        self.segments.cached_region = self.cached_region;
    }
}

/// The region of the last translation. A region of size 0 stands for none.
#[derive(Debug, Clone, Copy)]
struct CachedRegion {
    start: u64,
    size: u64,
    host: *mut u8,
}

impl CachedRegion {
    const NONE: Self = Self {
        start: 0,
        size: 0,
        host: std::ptr::null_mut(),
    };

    /// The offset of `addr` in the region, if all `len` bytes at `addr` lie in it.
    #[inline(always)]
    fn offset(&self, addr: u64, len: u64) -> Option<u64> {
        // An address below the start wraps to an offset beyond the size. `size - offset` cannot
        // underflow.
        let offset = addr.wrapping_sub(self.start);
        (offset < self.size && len <= self.size - offset).then_some(offset)
    }
}

// SAFETY: as for GuestSlice; `memory` keeps what `host` points to.
unsafe impl Send for SegmentList {}

impl SegmentList {
    /// An empty list for addresses of `memory`. An IOMMU must permit the device to read and to write
    /// the buffers.
    #[must_use]
    pub fn new(memory: Arc<GuestMemory>) -> Self {
        Self::with_access(memory, Access::ReadWrite)
    }

    /// An empty list for addresses of `memory`, of buffers for which an IOMMU must permit `access`.
    #[must_use]
    pub fn with_access(memory: Arc<GuestMemory>, access: Access) -> Self {
        let translations = memory
            .iotlb()
            .map(|iotlb| RingTranslations::new(iotlb, access));
        Self {
            list: Vec::new(),
            len: 0,
            cached_region: CachedRegion::NONE,
            translations: translations.map(Box::new),
            memory,
        }
    }

    /// Whether the last dequeue ended at an address whose translation is missing. It is worth
    /// another try when the front-end has sent one.
    #[must_use]
    pub fn waits_for_translation(&self) -> bool {
        let translations = self.translations.as_ref();
        translations.is_some_and(|translations| translations.waits())
    }

    /// Empties the list, and drops all copies of translations.
    pub fn forget_translations(&mut self) {
        self.len = 0;
        if let Some(translations) = &self.translations {
            self.cached_region = CachedRegion::NONE;
            translations.forget();
        }
    }

    /// The snapshot that addresses are translated in.
    #[must_use]
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// The number of segments.
    #[inline(always)]
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no segment.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Removes the segments from index `len` on.
    #[inline(always)]
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Removes the first `n` segments and moves the others to the front.
    pub fn discard_front(&mut self, n: usize) {
        let n = n.min(self.len);
        self.list.copy_within(n..self.len, 0);
        self.len -= n;
    }

    /// Translates the `len` bytes at guest address `addr` and appends them: as one segment, or as
    /// several if the range crosses adjacent regions. An empty range is checked and appends
    /// nothing.
    ///
    /// # Errors
    /// When a byte of the range is not mapped. Nothing is appended then.
    #[inline(always)]
    pub fn push(&mut self, addr: u64, len: u32) -> Result<(), BadAddress> {
        self.writer().push(addr, len)
    }

    /// Appends a range behind the first `at` segments in the cases that the fast path of
    /// [`SegmentWriter::push`] does not cover: a range in another region or in several, an empty
    /// range, and a list that must grow. Returns the new length and the cached region with the
    /// result.
    #[cold]
    #[inline(never)]
    fn push_slow(
        &mut self,
        at: usize,
        mut addr: u64,
        mut len: u64,
    ) -> (usize, CachedRegion, Result<(), BadAddress>) {
        self.len = at;
        if self.translations.is_some() {
            let pushed = self.push_translated(addr, len);
            return (self.len, self.cached_region, pushed);
        }
        loop {
            let Some(region) = self.memory.region_containing(addr) else {
                return (at, self.cached_region, Err(BadAddress));
            };
            self.cached_region = CachedRegion {
                start: region.spec.guest_addr,
                size: region.spec.size,
                host: region.host(),
            };
            let offset = addr - self.cached_region.start;
            let part = len.min(self.cached_region.size - offset);
            if part != 0 {
                self.append(GuestSlice::new(self.cached_region.host, offset, part));
            }
            len -= part;
            if len == 0 {
                return (self.len, self.cached_region, Ok(()));
            }
            // The sum fits, because the end of a region fits 64 bits.
            addr += part;
        }
    }

    fn append(&mut self, slice: GuestSlice<'static>) {
        if self.len == self.list.len() {
            let capacity = (2 * self.len).max(INITIAL_CAPACITY);
            self.list.resize(capacity, GuestSlice::empty());
        }
        self.list[self.len] = slice;
        self.len += 1;
    }

    /// Where the table of this many bytes at `addr`, which is not in the cached region, is mapped.
    #[cold]
    #[inline(never)]
    fn table_slow(&self, addr: u64, bytes: u64) -> Option<*mut u8> {
        match &self.translations {
            None => {
                let (region, offset) = self.memory.find(addr, bytes)?;
                Some(region.host().wrapping_add(offset))
            }
            Some(translations) => self.translated_table(translations, addr, bytes),
        }
    }

    /// A writer at the end of the list.
    #[inline(always)]
    pub(crate) fn writer(&mut self) -> SegmentWriter<'_> {
        SegmentWriter {
            len: self.len,
            cached_region: self.cached_region,
            segments: self,
        }
    }

    /// Copies the first `N` bytes of segment `at` to `out` and removes them from the segment.
    /// Returns false, without any effect, when the segment does not have more than `N` bytes.
    #[inline(always)]
    pub(crate) fn strip_from<const N: usize>(&mut self, at: usize, out: &mut [u8; N]) -> bool {
        let Some(segment) = self.list.get_mut(at).filter(|segment| segment.len() > N) else {
            return false;
        };
        segment.copy_to_array(out);
        *segment = segment.skip(N);
        true
    }

    /// Fills `out` from segment `at` and those behind it and removes the bytes from them. Returns
    /// the number of segments that are now empty.
    #[inline(never)]
    pub(crate) fn strip_across(&mut self, at: usize, mut out: &mut [u8]) -> u16 {
        let mut emptied = 0;
        for segment in self.list[..self.len].get_mut(at..).unwrap_or_default() {
            let bytes = segment.copy_to(out);
            *segment = segment.skip(bytes);
            emptied += u16::from(segment.is_empty());
            out = &mut out[bytes..];
            if out.is_empty() {
                break;
            }
        }
        emptied
    }

    /// The segments `from..to`; an empty list when the range is not within the list.
    #[inline(always)]
    #[must_use]
    pub fn slices(&self, from: usize, to: usize) -> &[GuestSlice<'_>] {
        self.list[..self.len].get(from..to).unwrap_or_default()
    }
}
