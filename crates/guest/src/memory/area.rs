//! A range of guest memory that is translated once and accessed many times.
#![allow(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use vm_memory::ByteValued;

use super::mapping::MappedBlock;

/// A range of guest memory in one region. It keeps the region mapped. Numbers are little-endian, as
/// in virtio 1.x.
///
/// An access outside the area panics, as indexing outside a slice does, because it is a mistake of
/// the test.
#[derive(Debug)]
pub struct Area {
    ptr: *mut u8,
    len: usize,
    addr: u64,
    _block: Arc<MappedBlock>,
}

// SAFETY: the pointer leads into a shared mapping that `_block` keeps; the memory is plain data
// that others may write at any time, and no reference into it is made.
unsafe impl Send for Area {}
// SAFETY: as for Send; loads and stores are volatile, atomic or raw copies.
unsafe impl Sync for Area {}

impl Area {
    /// The `len` bytes at guest address `addr`; `None` when they do not all lie in `block`.
    pub(super) fn in_block(block: &Arc<MappedBlock>, addr: u64, len: u64) -> Option<Self> {
        let offset = addr.checked_sub(block.spec.guest_addr)?;
        if len > block.spec.size.checked_sub(offset)? {
            return None;
        }
        Some(Self {
            // SAFETY: offset + len is at most the size of the block's mapping, as just checked.
            ptr: unsafe { block.mapping.as_ptr().add(usize::try_from(offset).ok()?) },
            len: usize::try_from(len).ok()?,
            addr,
            _block: Arc::clone(block),
        })
    }

    /// The guest physical address of the first byte.
    #[inline(always)]
    #[must_use]
    pub fn addr(&self) -> u64 {
        self.addr
    }

    /// The length in bytes.
    #[inline(always)]
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the area holds no byte.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Reads the value at byte `offset` once. The offset must be aligned for `T`.
    #[inline(always)]
    #[must_use]
    pub fn load<T: ByteValued>(&self, offset: usize) -> T {
        // SAFETY: `slot` checked that it is in bounds and aligned; T is plain data of any bit
        // pattern.
        unsafe { self.slot::<T>(offset).read_volatile() }
    }

    /// Writes the value at byte `offset`, which must be aligned for `T`.
    #[inline(always)]
    pub fn store<T: ByteValued>(&self, offset: usize, value: T) {
        // SAFETY: as for `load`.
        unsafe { self.slot::<T>(offset).write_volatile(value) }
    }

    /// Reads the little-endian `u16` at byte `offset` with acquire ordering.
    #[inline(always)]
    #[must_use]
    pub fn acquire(&self, offset: usize) -> u16 {
        u16::from_le(self.atomic(offset).load(Ordering::Acquire))
    }

    /// Writes the little-endian `u16` at byte `offset` with release ordering.
    #[inline(always)]
    pub fn release(&self, offset: usize, value: u16) {
        self.atomic(offset).store(value.to_le(), Ordering::Release);
    }

    /// Reads the little-endian `u16` at byte `offset` without ordering.
    #[inline(always)]
    #[must_use]
    pub fn get(&self, offset: usize) -> u16 {
        u16::from_le(self.atomic(offset).load(Ordering::Relaxed))
    }

    /// Writes the little-endian `u16` at byte `offset` without ordering.
    #[inline(always)]
    pub fn set(&self, offset: usize, value: u16) {
        self.atomic(offset).store(value.to_le(), Ordering::Relaxed);
    }

    /// Copies the bytes from byte `offset` on to `out`.
    #[inline(always)]
    pub fn read(&self, offset: usize, out: &mut [u8]) {
        let from = self.bytes(offset, out.len());
        // SAFETY: `bytes` checked that the range is in bounds; `out` is private memory, so no
        // overlap.
        unsafe { std::ptr::copy_nonoverlapping(from, out.as_mut_ptr(), out.len()) }
    }

    /// Copies `data` to the bytes from byte `offset` on.
    #[inline(always)]
    pub fn write(&self, offset: usize, data: &[u8]) {
        let to = self.bytes(offset, data.len());
        // SAFETY: `bytes` checked that the range is in bounds; `data` is private memory, so no
        // overlap.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), to, data.len()) }
    }

    /// Sets every byte to 0.
    pub fn zero(&self) {
        // SAFETY: the area's own bytes.
        unsafe { std::ptr::write_bytes(self.ptr, 0, self.len) }
    }

    #[inline(always)]
    fn atomic(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: in bounds and aligned, mapped while `self` lives, and every access of this word
        // from this side is atomic or volatile.
        unsafe { AtomicU16::from_ptr(self.slot(offset)) }
    }

    /// The address of a value at byte `offset`, checked for bounds and alignment.
    #[inline(always)]
    fn slot<T>(&self, offset: usize) -> *mut T {
        let slot = self.bytes(offset, size_of::<T>()).cast::<T>();
        assert!(slot.is_aligned(), "unaligned access at byte {offset}");
        slot
    }

    /// The address of `len` bytes at byte `offset`, checked for bounds.
    #[inline(always)]
    fn bytes(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(
            offset <= self.len && len <= self.len - offset,
            "{len} bytes at byte {offset} leave an area of {} bytes",
            self.len
        );
        // SAFETY: offset <= self.len, so the result is within the area or one past its end.
        unsafe { self.ptr.add(offset) }
    }
}
