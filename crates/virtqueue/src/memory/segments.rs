//! Segments of the guest's buffers in the layout of `iovec`, and the translation of guest addresses
//! to them.
//!
//! Most buffers of a guest lie in one or two memory regions. [`SegmentWriter`] therefore keeps the
//! region that it found last and translates an address in it with one comparison. Other addresses,
//! and a list that must grow, take the slow path, which is not inlined.
#![allow(unsafe_code)]

use std::marker::PhantomData;
use std::sync::Arc;

use vm_memory::ByteValued;

use super::array::{GuestArrayRef, prefetch, prefetch_to_write};
use super::{GuestMemory, array_bytes, copy_in, copy_out};
use crate::config::Direction;

/// The smallest page.
const PAGE_SIZE: usize = 4096;

/// A segment of a guest's buffer with the layout of an `iovec`. The guest may write the memory at
/// any time, so bytes that must be checked are copied first.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
pub struct GuestSlice<'m> {
    vec: libc::iovec,
    _life: PhantomData<&'m GuestMemory>,
}

// SAFETY: plain shared memory behind volatile copies, as for GuestArray.
unsafe impl Send for GuestSlice<'_> {}
// SAFETY: no method takes or hands out a reference into the memory.
unsafe impl Sync for GuestSlice<'_> {}

impl<'m> GuestSlice<'m> {
    /// The `len` bytes at `offset` of a mapping at `host`. The caller has checked that they lie in
    /// it.
    #[inline(always)]
    fn new(host: *mut u8, offset: u64, len: u64) -> Self {
        // Both numbers fit usize, because they lie within one mapping.
        let offset = usize::try_from(offset).unwrap_or(0);
        Self {
            vec: libc::iovec {
                // `wrapping_add` needs no SAFETY condition. The accesses need one: that the bytes
                // are mapped.
                iov_base: host.wrapping_add(offset).cast(),
                iov_len: usize::try_from(len).unwrap_or(0),
            },
            _life: PhantomData,
        }
    }

    /// The length in bytes.
    #[inline(always)]
    #[must_use]
    pub fn len(&self) -> usize {
        self.vec.iov_len
    }

    /// Reads one byte of each page. To be called when a system call could not access the slice
    /// (EFAULT): unlike that, this finds lost memory (see [`super::survive_lost_memory`]).
    pub fn probe(&self) {
        let mut byte = [0];
        let mut at = 0;
        while at < self.len() {
            self.skip(at).copy_to(&mut byte);
            std::hint::black_box(byte);
            at += PAGE_SIZE;
        }
        self.skip(self.len().saturating_sub(1)).copy_to(&mut byte);
        std::hint::black_box(byte);
    }

    /// Whether the slice holds no byte.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies from the start of the slice to `out`. Returns the number of bytes copied: the shorter
    /// of both lengths.
    #[inline(always)]
    pub fn copy_to(&self, out: &mut [u8]) -> usize {
        let n = self.len().min(out.len());
        // SAFETY: n bytes from the slice's start are mapped (see SegmentList::push) while 'm lives.
        unsafe { copy_out(self.vec.iov_base.cast(), &mut out[..n]) };
        n
    }

    /// Copies the first `N` bytes to `out`, with one or two instructions for a small `N`. Returns
    /// false, without any effect, when the slice is shorter.
    #[inline(always)]
    pub fn copy_to_array<const N: usize>(&self, out: &mut [u8; N]) -> bool {
        if self.len() < N {
            return false;
        }
        // SAFETY: as for `copy_to`: N bytes are mapped.
        unsafe { copy_out(self.vec.iov_base.cast(), out) };
        true
    }

    /// Copies `data` to the start of the slice, like [`GuestSlice::copy_to_array`]. Returns false,
    /// without any effect, when the slice is shorter.
    #[inline(always)]
    pub fn copy_from_array<const N: usize>(&self, data: &[u8; N]) -> bool {
        if self.len() < N {
            return false;
        }
        // SAFETY: as for `copy_from`: N bytes are mapped.
        unsafe { copy_in(data, self.vec.iov_base.cast()) };
        true
    }

    /// Copies `data` to the start of the slice. Returns the number of bytes copied: the shorter of
    /// both lengths.
    #[inline(always)]
    pub fn copy_from(&self, data: &[u8]) -> usize {
        let n = self.len().min(data.len());
        // SAFETY: as for `copy_to`.
        unsafe { copy_in(&data[..n], self.vec.iov_base.cast()) };
        n
    }

    /// Copies from the start of another slice to the start of this one. Returns the number of bytes
    /// copied: the shorter of both lengths. The two may overlap, because guests may share memory.
    #[inline(always)]
    pub fn copy_from_slice(&self, from: &GuestSlice<'_>) -> usize {
        let n = self.len().min(from.len());
        // SAFETY: as for `copy_to` and `copy_from`, on either side.
        unsafe { std::ptr::copy(from.vec.iov_base.cast::<u8>(), self.vec.iov_base.cast(), n) };
        n
    }

    /// A slice of this process's own memory, for code that takes frames from either kind of memory.
    #[must_use]
    pub fn from_private(bytes: &'m mut [u8]) -> Self {
        Self {
            vec: libc::iovec {
                iov_base: bytes.as_mut_ptr().cast(),
                iov_len: bytes.len(),
            },
            _life: PhantomData,
        }
    }

    /// A slice without bytes.
    fn empty() -> Self {
        Self::new(std::ptr::null_mut(), 0, 0)
    }

    /// The slice without its first `n` bytes; empty when it has fewer.
    #[inline(always)]
    #[must_use]
    pub fn skip(&self, n: usize) -> Self {
        let n = n.min(self.len());
        Self {
            vec: libc::iovec {
                // SAFETY: n <= len, so the result stays within or one past the slice.
                iov_base: unsafe { self.vec.iov_base.cast::<u8>().add(n) }.cast(),
                iov_len: self.vec.iov_len - n,
            },
            _life: PhantomData,
        }
    }

    /// The first `n` bytes of the slice; the whole slice when it has fewer.
    #[inline(always)]
    #[must_use]
    pub fn first(&self, n: usize) -> Self {
        Self {
            vec: libc::iovec {
                iov_base: self.vec.iov_base,
                iov_len: self.vec.iov_len.min(n),
            },
            _life: PhantomData,
        }
    }

    /// The slice as an `iovec`. Its pointer is valid for as long as the snapshot of memory exists.
    #[inline(always)]
    #[must_use]
    pub fn as_iovec(&self) -> libc::iovec {
        self.vec
    }

    /// A list of slices as a list of `iovec`s, without a copy.
    #[must_use]
    pub fn as_iovecs<'a>(slices: &'a [GuestSlice<'m>]) -> &'a [libc::iovec] {
        // SAFETY: repr(transparent) over iovec; lifetime and length are those of the input.
        unsafe { std::slice::from_raw_parts(slices.as_ptr().cast(), slices.len()) }
    }
}

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

impl SegmentWriter<'_> {
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
    /// region.
    #[inline(always)]
    pub(crate) fn table<T: ByteValued>(&self, addr: u64, len: u16) -> Option<GuestArrayRef<'_, T>> {
        let bytes = array_bytes::<T>(len)?;
        match self.cached_region.offset(addr, bytes) {
            Some(offset) => {
                let offset = usize::try_from(offset).ok()?;
                // SAFETY: the table lies within the mapping at `host`.
                Some(unsafe { GuestArrayRef::new(self.cached_region.host.add(offset), len) })
            }
            None => self.segments.memory.guest_array(addr, len),
        }
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
    /// An empty list for addresses of `memory`.
    #[must_use]
    pub fn new(memory: Arc<GuestMemory>) -> Self {
        Self {
            list: Vec::new(),
            len: 0,
            cached_region: CachedRegion {
                start: 0,
                size: 0,
                host: std::ptr::null_mut(),
            },
            memory,
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
                if self.len == self.list.len() {
                    let capacity = (2 * self.len).max(INITIAL_CAPACITY);
                    self.list.resize(capacity, GuestSlice::empty());
                }
                self.list[self.len] = GuestSlice::new(self.cached_region.host, offset, part);
                self.len += 1;
            }
            len -= part;
            if len == 0 {
                return (self.len, self.cached_region, Ok(()));
            }
            // The sum fits, because the end of a region fits 64 bits.
            addr += part;
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
