//! Arrays in guest memory: the areas of a virtqueue and indirect tables.
//!
//! In a build with `--cfg loom` the loads and stores go to the cells of `super::loom` instead.
#![allow(unsafe_code)]

use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::Ordering;
#[cfg(not(loom))]
use std::{
    ptr::{read_volatile, write_volatile},
    sync::atomic::{AtomicU16, AtomicU64, fence},
};

#[cfg(loom)]
use super::loom::{AtomicU16, AtomicU64, fence, read_volatile, write_volatile};

use vm_memory::ByteValued;

use super::{GuestMemory, MappedRegion};

/// Implements `ByteValued` for `repr(C)` structs of integers without padding, for which any bytes
/// are a valid value.
macro_rules! impl_byte_valued {
    ($($name:ty),* $(,)?) => {$(
        // SAFETY: repr(C), integers only, no padding (the size is the sum of its fields, see the
        // assertion beside each use), so every bit pattern is a value.
        #[allow(unsafe_code)]
        unsafe impl vm_memory::ByteValued for $name {}
    )*};
}
pub(crate) use impl_byte_valued;

/// An array of values in guest memory. Each access is bounds-checked and volatile or atomic. The
/// array keeps its region mapped. A clone is the same array.
#[derive(Debug, Clone)]
pub struct GuestArray<T> {
    ptr: *mut T,
    len: u16,
    region: Arc<MappedRegion>,
}

// SAFETY: the pointer leads into a shared mapping that the region keeps alive; every access is a
// volatile or atomic access of plain data, whatever thread makes it.
unsafe impl<T: ByteValued> Send for GuestArray<T> {}

impl<T: ByteValued> GuestArray<T> {
    pub(super) fn at(region: &Arc<MappedRegion>, offset: usize, len: u16) -> Option<Self> {
        // SAFETY: the callers checked that the whole array lies in the region's mapping.
        let ptr: *mut T = unsafe { region.host().add(offset) }.cast();
        ptr.is_aligned().then(|| Self {
            ptr,
            len,
            region: Arc::clone(region),
        })
    }

    /// The number of values.
    #[must_use]
    pub fn len(&self) -> u16 {
        self.len
    }

    /// Whether the array holds no value.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The region of the array.
    pub(super) fn region(&self) -> &Arc<MappedRegion> {
        &self.region
    }

    /// The offset of the array in its region.
    pub(super) fn offset(&self) -> usize {
        self.ptr.addr().wrapping_sub(self.region.host().addr())
    }

    /// The address of value `index`, or of the first value when `index` is beyond the end. Callers
    /// mask their indices, so a clamp without a branch suffices, and it costs less than a panic
    /// path.
    #[inline(always)]
    fn slot(&self, index: u16) -> *mut T {
        let index = if index < self.len { index } else { 0 };
        // SAFETY: index < len. (No virtqueue has an array of length 0; its pointer would still lead
        // into the region.)
        unsafe { self.ptr.add(usize::from(index)) }
    }

    /// Reads value `index` once. An index beyond the end reads the first value.
    #[inline(always)]
    #[must_use]
    pub fn get(&self, index: u16) -> T {
        // SAFETY: `slot` is in bounds, aligned (checked in `at`), and T is plain data.
        unsafe { read_volatile(self.slot(index)) }
    }

    /// Writes value `index`.
    #[inline(always)]
    pub fn set(&self, index: u16, value: T) {
        before_store();
        // SAFETY: as for `get`.
        unsafe { write_volatile(self.slot(index), value) }
    }

    /// Writes `values` to the beginning of the array, as many as it holds, in any order and not
    /// atomically.
    #[inline(always)]
    pub(crate) fn set_range(&self, values: &[T]) {
        values.iter().for_each(|_| before_store());
        let count = values.len().min(usize::from(self.len));
        // SAFETY: both hold `count` values; they do not overlap, because `values` is private
        // memory. T is plain data.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), self.ptr, count) }
    }

    /// Writes `values` from index `start` on, each as [`GuestArray::set`] does, up to the end of the
    /// array. Returns how many were written. No further value is taken from the iterator.
    #[inline(always)]
    pub(crate) fn set_from(&self, start: u16, values: &mut impl Iterator<Item = T>) -> u16 {
        let mut written = 0;
        for (index, value) in (usize::from(start)..usize::from(self.len)).zip(values) {
            before_store();
            // SAFETY: index < len, and aligned as every value of the array is; T is plain data.
            unsafe { write_volatile(self.ptr.add(index), value) };
            written += 1;
        }
        written
    }

    /// Prefetches the cache line of value `index` for reading. `index` may be beyond the end.
    #[inline(always)]
    pub fn prefetch(&self, index: u16) {
        prefetch(self.ptr.wrapping_add(usize::from(index)).cast());
    }

    /// Prefetches the cache line of value `index` for writing. `index` may be beyond the end.
    #[inline(always)]
    pub fn prefetch_to_write(&self, index: u16) {
        prefetch_to_write(self.ptr.wrapping_add(usize::from(index)).cast());
    }
}

impl GuestArray<u16> {
    /// Reads the little-endian values from index `start` on into `out`, each once. Returns false,
    /// without any effect, when the array ends before `out` is full.
    #[inline(always)]
    pub fn get_range(&self, start: u16, out: &mut [u16]) -> bool {
        let end = usize::from(start) + out.len();
        if end > usize::from(self.len) {
            return false;
        }
        for (value, index) in out.iter_mut().zip(usize::from(start)..) {
            // SAFETY: index < len, and aligned as every value of the array is.
            *value = u16::from_le(unsafe { read_volatile(self.ptr.add(index)) });
        }
        true
    }

    /// Reads the little-endian value `index` with acquire ordering: what the driver wrote before it
    /// is visible afterwards.
    #[inline(always)]
    #[must_use]
    pub fn acquire(&self, index: u16) -> u16 {
        // SAFETY: in bounds and aligned; every access of this word from this process is atomic or
        // volatile.
        let word = unsafe { AtomicU16::from_ptr(self.slot(index)) };
        u16::from_le(word.load(Ordering::Acquire))
    }

    /// Writes the little-endian value `index` with release ordering: everything written before is
    /// visible to every thread that reads it.
    #[inline(always)]
    pub fn release(&self, index: u16, value: u16) {
        before_store();
        // SAFETY: as for `acquire`.
        let word = unsafe { AtomicU16::from_ptr(self.slot(index)) };
        word.store(value.to_le(), Ordering::Release);
    }
}

impl GuestArray<u64> {
    /// Reads value `index`, in the byte order of the host, with acquire ordering.
    #[inline(always)]
    pub(crate) fn acquire(&self, index: u16) -> u64 {
        // SAFETY: in bounds and aligned; every access of this word from this process is atomic or
        // volatile.
        let word = unsafe { AtomicU64::from_ptr(self.slot(index)) };
        word.load(Ordering::Acquire)
    }

    /// Writes value `index`, in the byte order of the host, with release ordering.
    #[inline(always)]
    pub(crate) fn release(&self, index: u16, value: u64) {
        before_store();
        // SAFETY: as for `acquire`.
        let word = unsafe { AtomicU64::from_ptr(self.slot(index)) };
        word.store(value, Ordering::Release);
    }
}

/// A descriptor, read as two words: its address, and its length with two 16-bit fields. Those are
/// `flags` and `next` in a split virtqueue, `id` and `flags` in a packed one.
///
/// ```text
/// bits of rest   0..32   32..48   48..64
/// split          len     flags    next
/// packed         len     id       flags
/// ```
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Descriptor {
    addr: u64,
    rest: u64,
}

impl_byte_valued!(Descriptor);
const _: () = assert!(size_of::<Descriptor>() == 16);

impl Descriptor {
    /// The guest address of the buffer.
    #[inline(always)]
    pub(crate) fn addr(self) -> u64 {
        u64::from_le(self.addr)
    }

    /// The length of the buffer in bytes.
    #[inline(always)]
    pub(crate) fn len(self) -> u32 {
        u32::try_from(u64::from_le(self.rest) & 0xffff_ffff).unwrap_or(0)
    }

    #[inline(always)]
    fn third(self) -> u16 {
        u16::try_from(u64::from_le(self.rest) >> 32 & 0xffff).unwrap_or(0)
    }

    #[inline(always)]
    fn fourth(self) -> u16 {
        u16::try_from(u64::from_le(self.rest) >> 48).unwrap_or(0)
    }

    /// `flags` of a split descriptor.
    #[inline(always)]
    pub(crate) fn flags(self) -> u16 {
        self.third()
    }

    /// Whether `flags` of a split descriptor has the bit `flag`.
    #[inline(always)]
    pub(crate) fn has(self, flag: u16) -> bool {
        self.third() & flag != 0
    }

    /// A copy of a split descriptor without the bit `flag`.
    #[inline(always)]
    pub(crate) fn without_flag(self, flag: u16) -> Self {
        let rest = u64::from_le(self.rest) & !(u64::from(flag) << 32);
        Self {
            rest: rest.to_le(),
            ..self
        }
    }

    /// `next` of a split descriptor.
    #[inline(always)]
    pub(crate) fn next(self) -> u16 {
        self.fourth()
    }

    /// A packed descriptor converted to the field order of a split one, with the given `flags`,
    /// which the caller has read before. [`Descriptor::next`] then returns its `id`.
    #[inline(always)]
    pub(crate) fn to_split_layout(self, flags: u16) -> Self {
        let rest = u64::from(self.len()) | u64::from(flags) << 32 | u64::from(self.third()) << 48;
        Self {
            rest: rest.to_le(),
            ..self
        }
    }

    /// `id` of a packed descriptor.
    #[inline(always)]
    pub(crate) fn packed_id(self) -> u16 {
        self.third()
    }

    /// `flags` of a packed descriptor.
    #[inline(always)]
    pub(crate) fn packed_flags(self) -> u16 {
        self.fourth()
    }
}

/// A borrowed array of descriptors. Its fields are in registers in a loop, which those behind a
/// reference are not: the compiler must assume that an atomic access changes them.
#[derive(Clone, Copy)]
pub(crate) struct DescriptorTable<'a> {
    ptr: *mut Descriptor,
    len: u16,
    _life: PhantomData<&'a GuestArray<Descriptor>>,
}

impl DescriptorTable<'_> {
    /// Reads descriptor `index` once, with two loads. Returns `None` when `index` is beyond the
    /// end.
    #[inline(always)]
    pub(crate) fn descriptor(self, index: u16) -> Option<Descriptor> {
        if index >= self.len {
            return None;
        }
        // SAFETY: `index` is in bounds, and the array aligned; both words are plain data.
        unsafe {
            let slot = self.ptr.add(usize::from(index));
            Some(Descriptor {
                addr: read_volatile(&raw const (*slot).addr),
                rest: read_volatile(&raw const (*slot).rest),
            })
        }
    }

    /// Reads descriptor `index` of a packed ring if it exists and `wanted` accepts its second half. That
    /// is read first, with acquire ordering, so that the address read afterwards belongs to it.
    #[inline(always)]
    pub(crate) fn descriptor_if(
        self,
        index: u16,
        wanted: impl FnOnce(Descriptor) -> bool,
    ) -> Option<Descriptor> {
        if index >= self.len {
            return None;
        }
        // SAFETY: the index is in bounds.
        let slot = unsafe { self.ptr.add(usize::from(index)) };
        // SAFETY: the second half of a descriptor in bounds, 8-aligned as descriptors are
        // 16-aligned.
        let len_id_flags = unsafe { AtomicU64::from_ptr(&raw mut (*slot).rest) };
        let rest = len_id_flags.load(Ordering::Acquire);
        wanted(Descriptor { addr: 0, rest }).then(|| Descriptor {
            // SAFETY: `slot` is in bounds and aligned; the word is plain data.
            addr: unsafe { read_volatile(&raw const (*slot).addr) },
            rest,
        })
    }

    /// Writes `len`, `id` and `flags` of descriptor `index` of a packed ring with one store and
    /// release ordering.
    #[inline(always)]
    pub(crate) fn release_used(self, index: u16, id: u16, len: u32, flags: u16) {
        if index >= self.len {
            return;
        }
        before_store();
        let word = u64::from(len) | u64::from(id) << 32 | u64::from(flags) << 48;
        // SAFETY: the second half of a descriptor in bounds, 8-aligned as descriptors are
        // 16-aligned.
        let len_id_flags =
            unsafe { AtomicU64::from_ptr(&raw mut (*self.ptr.add(usize::from(index))).rest) };
        len_id_flags.store(word.to_le(), Ordering::Release);
    }

    /// Prefetches the cache line of descriptor `index` for writing. `index` may be beyond the end.
    #[inline(always)]
    pub(crate) fn prefetch_to_write(self, index: u16) {
        prefetch_to_write(self.ptr.wrapping_add(usize::from(index)).cast());
    }
}

impl GuestArray<Descriptor> {
    /// The array for a loop.
    #[inline(always)]
    pub(crate) fn table(&self) -> DescriptorTable<'_> {
        DescriptorTable {
            ptr: self.ptr,
            len: self.len,
            _life: PhantomData,
        }
    }

    /// See [`DescriptorTable::descriptor`].
    #[inline(always)]
    pub(crate) fn descriptor(&self, index: u16) -> Option<Descriptor> {
        self.table().descriptor(index)
    }

    /// See [`DescriptorTable::descriptor_if`]. `None` if the flags are not accepted.
    #[inline(always)]
    pub(crate) fn descriptor_if(
        &self,
        index: u16,
        wanted: impl Fn(u16) -> bool,
    ) -> Option<Descriptor> {
        let wanted = |snapshot: Descriptor| wanted(snapshot.packed_flags());
        self.table().descriptor_if(index, wanted)
    }
}

/// The size of an array of `len` elements in bytes.
pub(super) fn array_bytes<T>(len: u16) -> Option<u64> {
    u64::try_from(size_of::<T>())
        .ok()?
        .checked_mul(u64::from(len))
}

/// Called before each store to an array, so that a test can end there, as a process does that is
/// killed.
#[cfg(test)]
fn before_store() {
    crate::testing::before_store();
}

#[cfg(not(test))]
#[inline(always)]
fn before_store() {}

/// Orders earlier stores before later loads. Event suppression needs this between publishing an
/// index and reading whether the driver wants a notification (virtio 1.3 §2.7.7 and §2.8.10).
#[inline(always)]
pub fn full_fence() {
    fence(Ordering::SeqCst);
}

/// Prefetches the cache line of any address for reading.
#[inline(always)]
pub(super) fn prefetch(_ptr: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch never faults, whatever the address.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(_ptr.cast());
    }
}

/// Prefetches the cache line of any address for writing. The CPU then owns the line exclusively
/// before the first store, which otherwise would wait for that.
#[inline(always)]
pub(super) fn prefetch_to_write(_ptr: *const u8) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: the instruction never faults, whatever the address, and changes nothing; a CPU that
    // does not support it ignores it.
    unsafe {
        std::arch::asm!("prefetchw [{}]", in(reg) _ptr, options(nostack, preserves_flags, readonly));
    }
}

/// A read-only array at a guest address of any alignment, borrowed from its snapshot.
#[derive(Debug, Clone, Copy)]
pub struct GuestArrayRef<'m, T> {
    ptr: *const u8,
    len: u16,
    _life: PhantomData<(&'m GuestMemory, T)>,
}

impl<T: ByteValued> GuestArrayRef<'_, T> {
    /// The array of `len` values at `ptr`.
    ///
    /// # Safety
    /// `len` values from `ptr` on must be mapped for as long as the snapshot of lifetime 'm exists.
    #[inline(always)]
    pub(super) unsafe fn new(ptr: *const u8, len: u16) -> Self {
        Self {
            ptr,
            len,
            _life: PhantomData,
        }
    }

    /// Reads value `index` once. An index beyond the end reads the first value.
    #[inline(always)]
    #[must_use]
    pub fn get(&self, index: u16) -> T {
        let index = if index < self.len { index } else { 0 };
        // SAFETY: index < len, and the caller of `new` checked that the whole array is in a mapping,
        // which the snapshot of lifetime 'm keeps. T is plain data of any bit pattern.
        unsafe {
            let ptr = self.ptr.cast::<T>().add(usize::from(index));
            if ptr.is_aligned() {
                ptr.read_volatile()
            } else {
                ptr.read_unaligned()
            }
        }
    }
}
