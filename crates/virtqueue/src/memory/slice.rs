//! One segment of a guest's buffer.
#![allow(unsafe_code)]

use std::marker::PhantomData;

use super::{GuestMemory, copy_in, copy_out};

/// The smallest page.
const PAGE_SIZE: usize = 4096;

/// A segment of a guest's buffer with the layout of an `iovec`. The guest may write the memory at
/// any time, so bytes that must be checked are copied first.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
pub struct GuestSlice<'m> {
    pub(super) vec: libc::iovec,
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
    pub(super) fn new(host: *mut u8, offset: u64, len: u64) -> Self {
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
        unsafe { copy_between(from.vec.iov_base.cast(), self.vec.iov_base.cast(), n) };
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
    pub(super) fn empty() -> Self {
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

/// What one instruction copies.
#[cfg(target_arch = "x86_64")]
type Block = std::arch::x86_64::__m128i;
#[cfg(not(target_arch = "x86_64"))]
type Block = u128;

/// Copies a range of bytes by blocks from its start and as many up to its end, which may overlap. All
/// are read before any is written. Each has a variable: an array of them would lie in memory.
macro_rules! copy_blocks {
    ($from:ident, $to:ident, $end:expr, $($first:ident $last:ident $offset:literal),*) => {{
        let end = $end;
        $(let $first = $from.add($offset).cast::<Block>().read_unaligned();)*
        $(let $last = $from.add(end - $offset).cast::<Block>().read_unaligned();)*
        $($to.add($offset).cast::<Block>().write_unaligned($first);)*
        $($to.add(end - $offset).cast::<Block>().write_unaligned($last);)*
    }};
}

/// Copies `n` bytes; the two ranges may overlap. Short frames are copied here, because a call of the C
/// library costs more than they do.
///
/// # Safety
/// `from` and `to` must each point to `n` mapped bytes.
#[inline(always)]
unsafe fn copy_between(from: *const u8, to: *mut u8, n: usize) {
    // SAFETY: by contract. Each block begins at most `n - 16` bytes behind the start. The guest may
    // write at the same time, as in `copy_out`.
    unsafe {
        match n {
            32..=64 => copy_blocks!(from, to, n - 16, a b 0, c d 16),
            65..=128 => copy_blocks!(from, to, n - 16, a b 0, c d 16, e f 32, g h 48),
            129..=256 => copy_blocks!(
                from, to, n - 16,
                a b 0, c d 16, e f 32, g h 48, i j 64, k l 80, m o 96, p q 112
            ),
            _ => std::ptr::copy(from, to, n),
        }
    }
}
