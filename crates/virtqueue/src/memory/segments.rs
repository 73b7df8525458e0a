//! Segments of the guest's buffers, as the kernel takes them, and their translation.
#![allow(unsafe_code)]

use std::marker::PhantomData;
use std::sync::Arc;

use vm_memory::ByteValued;

use super::array::{GuestArrayRef, prefetch, prefetch_to_write};
use super::{GuestMemory, array_bytes, copy_in, copy_out};
use crate::Direction;

/// A segment of a guest's buffer, laid out as an `iovec`.
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
    /// `len` bytes at `offset` of a mapping at `host`; the caller saw that they lie within it.
    #[inline(always)]
    fn new(host: *mut u8, offset: u64, len: u64) -> Self {
        // Both fit usize: they lie within one mapping.
        let offset = usize::try_from(offset).unwrap_or(0);
        Self {
            vec: libc::iovec {
                // Wrapping, because it needs no promise here: it is where it is used that the
                // bytes must be mapped, and they are.
                iov_base: host.wrapping_add(offset).cast(),
                iov_len: usize::try_from(len).unwrap_or(0),
            },
            _life: PhantomData,
        }
    }

    /// Length in bytes.
    #[inline(always)]
    #[must_use]
    pub fn len(&self) -> usize {
        self.vec.iov_len
    }

    /// Whether the slice holds no byte.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies from the slice's start; returns the bytes copied: the shorter of both lengths.
    #[inline(always)]
    pub fn copy_to(&self, out: &mut [u8]) -> usize {
        let n = self.len().min(out.len());
        // SAFETY: n bytes from the slice's start are mapped (see SegmentList::push) while 'm lives.
        unsafe { copy_out(self.vec.iov_base.cast(), &mut out[..n]) };
        n
    }

    /// Fills `out` from the slice's start, in one or two moves of the CPU where it is short; false,
    /// and nothing done, when the slice is shorter.
    #[inline(always)]
    pub fn copy_to_array<const N: usize>(&self, out: &mut [u8; N]) -> bool {
        if self.len() < N {
            return false;
        }
        // SAFETY: as for `copy_to`: N bytes are mapped.
        unsafe { copy_out(self.vec.iov_base.cast(), out) };
        true
    }

    /// Copies `data` to the slice's start, as [`GuestSlice::copy_to_array`]; false, and nothing
    /// done, when the slice is shorter.
    #[inline(always)]
    pub fn copy_from_array<const N: usize>(&self, data: &[u8; N]) -> bool {
        if self.len() < N {
            return false;
        }
        // SAFETY: as for `copy_from`: N bytes are mapped.
        unsafe { copy_in(data, self.vec.iov_base.cast()) };
        true
    }

    /// Copies to the slice's start; returns the bytes copied: the shorter of both lengths.
    #[inline(always)]
    pub fn copy_from(&self, data: &[u8]) -> usize {
        let n = self.len().min(data.len());
        // SAFETY: as for `copy_to`.
        unsafe { copy_in(&data[..n], self.vec.iov_base.cast()) };
        n
    }

    /// Copies from another slice's start to this one's; returns the bytes copied: the shorter of
    /// both lengths. The two may overlap: guests may share memory with each other.
    #[inline(always)]
    pub fn copy_from_slice(&self, from: &GuestSlice<'_>) -> usize {
        let n = self.len().min(from.len());
        // SAFETY: as for `copy_to` and `copy_from`, on either side.
        unsafe { std::ptr::copy(from.vec.iov_base.cast::<u8>(), self.vec.iov_base.cast(), n) };
        n
    }

    /// A slice of private memory, for what takes frames from wherever they lie.
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

    /// No byte.
    fn empty() -> Self {
        Self::new(std::ptr::null_mut(), 0, 0)
    }

    /// The slice without its first `n` bytes (none left when it is shorter).
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

    /// The slice's first `n` bytes (all of it when it is shorter).
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

    /// The slice as the kernel takes it. The pointer is good while `self` lives.
    #[inline(always)]
    #[must_use]
    pub fn as_iovec(&self) -> libc::iovec {
        self.vec
    }

    /// Slices as the kernel takes them, without a copy.
    #[must_use]
    pub fn as_iovecs<'a>(slices: &'a [GuestSlice<'m>]) -> &'a [libc::iovec] {
        // SAFETY: repr(transparent) over iovec; lifetime and length are those of the input.
        unsafe { std::slice::from_raw_parts(slices.as_ptr().cast(), slices.len()) }
    }
}

/// Segments for which capacity is reserved at first: a burst of chains with two each.
const INITIAL_CAPACITY: usize = 128;

/// Where a buffer's address is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadAddress;

/// Storage for a burst's slices, all of one snapshot.
#[derive(Debug)]
pub struct SegmentList {
    /// The first `len` of these count; the rest is room.
    list: Vec<GuestSlice<'static>>,
    len: usize,
    /// The region that the last translation met; guests keep to one or two.
    cached_region: CachedRegion,
    /// Keeps every slice in `list` mapped; the 'static above never leaves this type.
    memory: Arc<GuestMemory>,
}

/// Where a segment that was just appended begins.
#[derive(Clone, Copy)]
pub(crate) struct SegmentStart(*const u8);

impl SegmentStart {
    /// Asks the CPU for the first two lines: the header, and where the frame begins. Those that are
    /// to be written come with the right to that.
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

/// Appends to [`SegmentList`] with everything that the fast path needs at hand: a burst's segments cost a
/// comparison and a store each. What it appended counts once it is dropped.
pub(crate) struct SegmentWriter<'p> {
    segments: &'p mut SegmentList,
    /// The segments, with what has been appended.
    len: usize,
    /// The region that the last translation met.
    cached_region: CachedRegion,
}

impl SegmentWriter<'_> {
    /// Number of segments.
    #[inline(always)]
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Forgets the segments from number `len` on.
    #[inline(always)]
    pub(crate) fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Appends a range, not an empty one, that lies in the region met last, if there is room; `None`,
    /// and nothing done, for any other.
    #[inline(always)]
    pub(crate) fn push_cached(&mut self, addr: u64, len: u32) -> Option<SegmentStart> {
        let len = u64::from(len);
        let offset = self.cached_region.offset(addr, len)?;
        let place = self.segments.list.get_mut(self.len)?;
        let slice = GuestSlice::new(self.cached_region.host, offset, len);
        *place = slice;
        self.len += 1;
        Some(SegmentStart(slice.vec.iov_base.cast()))
    }

    /// See [`SegmentList::push`].
    #[inline(always)]
    pub(crate) fn push(&mut self, addr: u64, len: u32) -> Result<(), BadAddress> {
        if len != 0 && self.push_cached(addr, len).is_some() {
            return Ok(());
        }
        let len = u64::from(len);
        // By value, so that the fast path's state can stay in registers.
        let (len, cached_region, pushed) = self.segments.push_slow(self.len, addr, len);
        self.len = len;
        self.cached_region = cached_region;
        pushed
    }

    /// A table of `len` values at guest address `addr`, in one region.
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

/// A region as three plain words.
#[derive(Debug, Clone, Copy)]
struct CachedRegion {
    start: u64,
    size: u64,
    host: *mut u8,
}

impl CachedRegion {
    /// Offset of `len` bytes at `addr`, when all of them are in.
    #[inline(always)]
    fn offset(&self, addr: u64, len: u64) -> Option<u64> {
        // An address below the start wraps to a huge offset; `size - offset` cannot underflow.
        let offset = addr.wrapping_sub(self.start);
        (offset < self.size && len <= self.size - offset).then_some(offset)
    }
}

// SAFETY: as for GuestSlice; `memory` keeps what `host` points to.
unsafe impl Send for SegmentList {}

impl SegmentList {
    /// No segments yet, over `memory`.
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

    /// Number of segments.
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

    /// Forgets the segments from number `len` on.
    #[inline(always)]
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Forgets the first `n` segments; later ones move down.
    pub fn discard_front(&mut self, n: usize) {
        let n = n.min(self.len);
        self.list.copy_within(n..self.len, 0);
        self.len -= n;
    }

    /// Translates `len` bytes at guest address `addr` and appends them: one segment, or several where
    /// the range crosses regions that join. A range of no bytes is checked and adds nothing.
    ///
    /// # Errors
    /// When any byte of the range is not mapped; nothing is appended then.
    #[inline(always)]
    pub fn push(&mut self, addr: u64, len: u32) -> Result<(), BadAddress> {
        self.writer().push(addr, len)
    }

    /// Appends behind the first `at` segments whatever the fast path of [`SegmentWriter::push`] cannot:
    /// ranges in another region than the last, or in several, and lists that must grow. The list's
    /// new length and the region met last come with the result.
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
            let here = len.min(self.cached_region.size - offset);
            if here != 0 {
                if self.len == self.list.len() {
                    let capacity = (2 * self.len).max(INITIAL_CAPACITY);
                    self.list.resize(capacity, GuestSlice::empty());
                }
                self.list[self.len] = GuestSlice::new(self.cached_region.host, offset, here);
                self.len += 1;
            }
            len -= here;
            if len == 0 {
                return (self.len, self.cached_region, Ok(()));
            }
            // No overflow: the region's end fits 64 bits.
            addr += here;
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

    /// The first `N` bytes of segment `at`, taken off it; false, and nothing done, when it has not
    /// more than that.
    #[inline(always)]
    pub(crate) fn strip_from<const N: usize>(&mut self, at: usize, out: &mut [u8; N]) -> bool {
        let Some(segment) = self.list.get_mut(at).filter(|segment| segment.len() > N) else {
            return false;
        };
        segment.copy_to_array(out);
        *segment = segment.skip(N);
        true
    }

    /// Copies from the start of segment `at` and those after it and takes the bytes off them; how many
    /// segments have none left.
    #[inline(never)]
    pub(crate) fn strip_across(&mut self, at: usize, mut out: &mut [u8]) -> u16 {
        let mut gone = 0;
        for segment in self.list[..self.len].get_mut(at..).unwrap_or_default() {
            let bytes = segment.copy_to(out);
            *segment = segment.skip(bytes);
            gone += u16::from(segment.is_empty());
            out = &mut out[bytes..];
            if out.is_empty() {
                break;
            }
        }
        gone
    }

    /// The segments `from..to`; none when there are not so many.
    #[inline(always)]
    #[must_use]
    pub fn slices(&self, from: usize, to: usize) -> &[GuestSlice<'_>] {
        self.list[..self.len].get(from..to).unwrap_or_default()
    }
}
