//! Translation for chains of one buffer each, which are not yet in the list.

use super::super::slice::GuestSlice;
use super::{CachedRegion, GuestMemory, SegmentList, SegmentStart};
use crate::config::Direction;

/// The greatest length in bytes of a chain on the fast path. With a bound, a translation costs one
/// comparison.
pub(crate) const MAX_SINGLE_LEN: u32 = 64 << 10;

/// Translates buffers of at most [`MAX_SINGLE_LEN`] bytes, each to one slice. It holds the region of
/// the last translation by value, so that a buffer costs one comparison.
pub(crate) struct SingleTranslator<'p> {
    /// The cached region of the list.
    list_region: &'p mut CachedRegion,
    memory: &'p GuestMemory,
    region: CachedRegion,
    /// A buffer that begins before this offset in the region lies in it with all bytes.
    end: u64,
}

impl<'p> SingleTranslator<'p> {
    #[inline(always)]
    fn new(memory: &'p GuestMemory, list_region: &'p mut CachedRegion) -> Self {
        let region = *list_region;
        Self {
            list_region,
            memory,
            region,
            end: end_of_starts(region),
        }
    }

    /// Translates a range that is not empty. `None` when it does not lie in one region.
    #[inline(always)]
    pub(crate) fn translate(&mut self, addr: u64, len: u32) -> Option<GuestSlice<'static>> {
        let len = u64::from(len);
        let offset = addr.wrapping_sub(self.region.start);
        if offset < self.end && len <= u64::from(MAX_SINGLE_LEN) {
            return Some(GuestSlice::new(self.region.host, offset, len));
        }
        // Passed and returned by value, so that the fast path can keep it in registers.
        let region = find_region(self.memory, addr)?;
        self.region = region;
        self.end = end_of_starts(region);
        let offset = region.offset(addr, len)?;
        *self.list_region = region;
        Some(GuestSlice::new(region.host, offset, len))
    }
}

/// The offset in a region before which [`MAX_SINGLE_LEN`] bytes begin that lie in it.
#[inline(always)]
fn end_of_starts(region: CachedRegion) -> u64 {
    let last = region.size.checked_sub(u64::from(MAX_SINGLE_LEN));
    last.map_or(0, |last| last + 1)
}

#[cold]
#[inline(never)]
fn find_region(memory: &GuestMemory, addr: u64) -> Option<CachedRegion> {
    let region = memory.region_containing(addr)?;
    Some(CachedRegion {
        start: region.spec.guest_addr,
        size: region.spec.size,
        host: region.host(),
    })
}

impl SegmentList {
    /// The first `count` elements of the list, which must be empty, and a translator for what is
    /// stored in them. The addresses must not be I/O virtual ones.
    #[inline(always)]
    pub(crate) fn singles(
        &mut self,
        count: usize,
    ) -> (&mut [GuestSlice<'static>], SingleTranslator<'_>) {
        if self.list.len() < count {
            self.list.resize(count, GuestSlice::empty());
        }
        let translator = SingleTranslator::new(&self.memory, &mut self.cached_region);
        (&mut self.list[..count], translator)
    }

    /// The elements that [`SegmentList::singles`] returned.
    #[inline(always)]
    pub(crate) fn singles_found(&self, count: usize) -> &[GuestSlice<'_>] {
        self.list.get(..count).unwrap_or_default()
    }

    /// The same, each without its first `N` bytes, and a copy of these (zeros, where it has fewer).
    #[inline(always)]
    pub(crate) fn strip_singles<'a, const N: usize>(
        &'a mut self,
        count: usize,
    ) -> impl Iterator<Item = ([u8; N], &'a GuestSlice<'a>)> {
        let singles = self.list.get_mut(..count).unwrap_or_default();
        singles.iter_mut().map(|single| {
            let mut stripped = [0; N];
            single.copy_to_array(&mut stripped);
            *single = single.skip(N);
            let rest: &'a GuestSlice<'a> = single;
            (stripped, rest)
        })
    }
}

impl GuestSlice<'_> {
    /// Prefetches the start of the slice, as [`SegmentStart::prefetch`] does.
    #[inline(always)]
    pub(crate) fn prefetch(&self, direction: Direction) {
        SegmentStart(self.vec.iov_base.cast()).prefetch(direction);
    }
}
