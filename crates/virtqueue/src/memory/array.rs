//! Arrays in guest memory: a ring's own areas and indirect tables.
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

/// Says of `repr(C)` structs of integers that any bytes make a valid value of theirs.
macro_rules! impl_byte_valued {
    ($($name:ty),* $(,)?) => {$(
        // SAFETY: repr(C), integers only, no padding (the size is the sum of its fields, see the
        // assertion beside each use), so every bit pattern is a value.
        #[allow(unsafe_code)]
        unsafe impl vm_memory::ByteValued for $name {}
    )*};
}
pub(crate) use impl_byte_valued;

/// An array in guest memory: `len` values of `T`, bounds-checked, each access volatile. It holds
/// its region, which stays mapped as long as the array lives.
#[derive(Debug)]
pub struct GuestArray<T> {
    ptr: *mut T,
    len: u16,
    _region: Arc<MappedRegion>,
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
            _region: Arc::clone(region),
        })
    }

    /// Number of values.
    #[must_use]
    pub fn len(&self) -> u16 {
        self.len
    }

    /// Whether the array holds no value.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// An index beyond the end reads the first value: callers mask their indices, and a branchless
    /// clamp costs less than a panic path here.
    #[inline(always)]
    fn slot(&self, index: u16) -> *mut T {
        let index = if index < self.len { index } else { 0 };
        // SAFETY: index < len (arrays of length 0 are never made into rings and never indexed by
        // them; their pointer still leads into the region).
        unsafe { self.ptr.add(usize::from(index)) }
    }

    /// Reads value `index` once.
    #[inline(always)]
    #[must_use]
    pub fn get(&self, index: u16) -> T {
        // SAFETY: `slot` is in bounds, aligned (checked in `at`), and T is plain data.
        unsafe { read_volatile(self.slot(index)) }
    }

    /// Writes value `index`.
    #[inline(always)]
    pub fn set(&self, index: u16, value: T) {
        // SAFETY: as for `get`.
        unsafe { write_volatile(self.slot(index), value) }
    }

    /// Asks the CPU to fetch the line of value `index`; a hint, without effect on meaning, also
    /// where there is no such value.
    #[inline(always)]
    pub fn prefetch(&self, index: u16) {
        prefetch(self.ptr.wrapping_add(usize::from(index)).cast());
    }

    /// The same where the value is to be written.
    #[inline(always)]
    pub fn prefetch_to_write(&self, index: u16) {
        prefetch_to_write(self.ptr.wrapping_add(usize::from(index)).cast());
    }
}

impl GuestArray<u16> {
    /// Reads the values (little-endian) from number `start` on to `out`, each once; false, and
    /// nothing done, when there are not so many.
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

    /// Reads value `index` (little-endian), and what was written before it by the other side is
    /// seen after it.
    #[inline(always)]
    #[must_use]
    pub fn acquire(&self, index: u16) -> u16 {
        // SAFETY: in bounds and aligned; every access of this word from this process is atomic or
        // volatile.
        let word = unsafe { AtomicU16::from_ptr(self.slot(index)) };
        u16::from_le(word.load(Ordering::Acquire))
    }

    /// Writes value `index` (little-endian) after everything written before it.
    #[inline(always)]
    pub fn release(&self, index: u16, value: u16) {
        // SAFETY: as for `acquire`.
        let word = unsafe { AtomicU16::from_ptr(self.slot(index)) };
        word.store(value.to_le(), Ordering::Release);
    }
}

/// A descriptor, read as the two words that it is: its address, and its length with two 16-bit
/// fields, which are `flags` and `next` in a split ring, `id` and `flags` in a packed one.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Descriptor {
    addr: u64,
    rest: u64,
}

impl_byte_valued!(Descriptor);
const _: () = assert!(size_of::<Descriptor>() == 16);

impl Descriptor {
    #[inline(always)]
    pub(crate) fn addr(self) -> u64 {
        u64::from_le(self.addr)
    }

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

    /// `flags` of a split ring's descriptor.
    #[inline(always)]
    pub(crate) fn flags(self) -> u16 {
        self.third()
    }

    /// Whether `flags` of a split ring's descriptor has this bit.
    #[inline(always)]
    pub(crate) fn has(self, flag: u16) -> bool {
        self.third() & flag != 0
    }

    /// The same without this bit in `flags` of a split ring's descriptor.
    #[inline(always)]
    pub(crate) fn without_flag(self, flag: u16) -> Self {
        let rest = u64::from_le(self.rest) & !(u64::from(flag) << 32);
        Self {
            rest: rest.to_le(),
            ..self
        }
    }

    /// `next` of a split ring's descriptor.
    #[inline(always)]
    pub(crate) fn next(self) -> u16 {
        self.fourth()
    }

    /// A packed ring's descriptor in a split ring's order of fields, with `flags` as they were
    /// read before; its `id` is then what [`Descriptor::next`] gives.
    #[inline(always)]
    pub(crate) fn to_split_layout(self, flags: u16) -> Self {
        let rest = u64::from(self.len()) | u64::from(flags) << 32 | u64::from(self.third()) << 48;
        Self {
            rest: rest.to_le(),
            ..self
        }
    }

    /// `id` of a packed ring's descriptor.
    #[inline(always)]
    pub(crate) fn packed_id(self) -> u16 {
        self.third()
    }

    /// `flags` of a packed ring's descriptor.
    #[inline(always)]
    pub(crate) fn packed_flags(self) -> u16 {
        self.fourth()
    }
}

impl GuestArray<Descriptor> {
    /// Reads descriptor `index` once, in two loads; `None` when there is no such descriptor.
    #[inline(always)]
    pub(crate) fn descriptor(&self, index: u16) -> Option<Descriptor> {
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

    /// Reads descriptor `index` of a packed ring if its flags say `wanted` (see `available`): flags
    /// first, with everything the driver wrote before them seen after them.
    #[inline(always)]
    pub(crate) fn descriptor_if(
        &self,
        index: u16,
        wanted: impl Fn(u16) -> bool,
    ) -> Option<Descriptor> {
        let slot = self.slot(index);
        // SAFETY: the second half of a descriptor in bounds, 8-aligned as descriptors are
        // 16-aligned.
        let len_id_flags = unsafe { AtomicU64::from_ptr(&raw mut (*slot).rest) };
        let rest = len_id_flags.load(Ordering::Acquire);
        let snapshot = Descriptor { addr: 0, rest };
        wanted(snapshot.packed_flags()).then(|| Descriptor {
            // SAFETY: `slot` is in bounds and aligned; the word is plain data.
            addr: unsafe { read_volatile(&raw const (*slot).addr) },
            rest,
        })
    }

    /// Writes `len`, `id` and `flags` of descriptor `index` of a packed ring in one store, after
    /// everything written before it.
    #[inline(always)]
    pub(crate) fn release_used(&self, index: u16, id: u16, len: u32, flags: u16) {
        let word = u64::from(len) | u64::from(id) << 32 | u64::from(flags) << 48;
        // SAFETY: the second half of a descriptor in bounds, 8-aligned as descriptors are
        // 16-aligned.
        let len_id_flags = unsafe { AtomicU64::from_ptr(&raw mut (*self.slot(index)).rest) };
        len_id_flags.store(word.to_le(), Ordering::Release);
    }
}

/// Orders a store before a later load of the other side's memory: the one fence that event
/// suppression needs (virtio 1.3 §2.7.7 and §2.8.10).
#[inline(always)]
pub fn full_fence() {
    fence(Ordering::SeqCst);
}

/// Asks the CPU to fetch the line of an address; a hint, without effect on meaning.
#[inline(always)]
pub(super) fn prefetch(_ptr: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch never faults, whatever the address.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(_ptr.cast());
    }
}

/// The same for a line that is to be written: it comes with the right to that, which otherwise is
/// asked for, and waited for, at the first store.
#[inline(always)]
pub(super) fn prefetch_to_write(_ptr: *const u8) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: it never faults, whatever the address, and changes nothing; a CPU that does not know
    // it does nothing.
    unsafe {
        std::arch::asm!("prefetchw [{}]", in(reg) _ptr, options(nostack, preserves_flags, readonly));
    }
}

/// A read-only array at a guest address, borrowed from its snapshot; any alignment.
#[derive(Debug, Clone, Copy)]
pub struct GuestArrayRef<'m, T> {
    ptr: *const u8,
    len: u16,
    _life: PhantomData<(&'m GuestMemory, T)>,
}

impl<T: ByteValued> GuestArrayRef<'_, T> {
    /// # Safety
    /// `len` values from `ptr` on must be mapped as long as the snapshot that 'm stands for.
    #[inline(always)]
    pub(super) unsafe fn new(ptr: *const u8, len: u16) -> Self {
        Self {
            ptr,
            len,
            _life: PhantomData,
        }
    }

    /// Reads value `index` once; an index beyond the end reads the first value.
    #[inline(always)]
    #[must_use]
    pub fn get(&self, index: u16) -> T {
        let index = if index < self.len { index } else { 0 };
        // SAFETY: index < len, and `guest_array` saw the whole array in its mapping, which the
        // snapshot behind 'm keeps alive. T is plain data of any bit pattern.
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
