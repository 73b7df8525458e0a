//! The guest's memory as this process sees it.
//!
//! A [`GuestMemory`] is an immutable snapshot of mapped [`Region`]s. A change of the memory table
//! makes a new snapshot; rings are re-bound to it under their lock, so nothing that runs ever sees
//! a table change.
//!
//! Three views leave this file, and they are the only ways to touch guest memory:
//!
//! - [`GuestArray`]: a ring's own arrays (descriptors, available and used elements). It keeps its
//!   region mapped for as long as it lives.
//! - [`GuestSlice`]: a piece of a buffer, laid out as the kernel's `iovec`, so that a chain is
//!   handed to `readv`/`writev` as it stands.
//! - [`Pieces`]: storage for the slices of a burst, bound to one snapshot; it translates an
//!   (address, length) pair as a whole and remembers the region that the last one lay in.
//!
//! The guest writes this memory while we read it. Every load here is volatile or atomic and copies
//! the value out once; what is checked and what is used is that copy. No reference (`&[u8]`) into
//! guest memory is ever made.
#![allow(unsafe_code)]

use std::fs::File;
use std::marker::PhantomData;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering, fence};

use vm_memory::{ByteValued, FileOffset, MmapRegion};

/// Most regions a memory table may have: what QEMU's own slots reach.
pub const MAX_REGIONS: usize = 509;

/// Where one region of guest memory lies, as the front-end tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionSpec {
    /// First guest physical address.
    pub guest_addr: u64,
    /// Size in bytes.
    pub size: u64,
    /// First address in the front-end's own address space; ring addresses are given in it.
    pub user_addr: u64,
    /// Where the region begins in its file, in bytes.
    pub file_offset: u64,
}

/// Why a memory table cannot be used (the front-end's fault).
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A region of no bytes.
    #[error("memory region at guest address {0:#x} has size 0; give it a size")]
    Empty(u64),
    /// An end address beyond 2^64.
    #[error(
        "memory region at guest address {0:#x} with size {1:#x} wraps around; check the memory table"
    )]
    Wraps(u64, u64),
    /// The file behind the region is shorter than the region says.
    #[error(
        "memory region at guest address {guest_addr:#x} needs {needed} bytes of its file, which has {actual}; the front-end must share the whole file"
    )]
    ShortFile {
        /// First guest physical address of the region.
        guest_addr: u64,
        /// Offset plus size in bytes.
        needed: u64,
        /// Size of the file in bytes.
        actual: u64,
    },
    /// Two regions share guest or front-end addresses.
    #[error(
        "memory regions at guest addresses {0:#x} and {1:#x} overlap; each address may be mapped once"
    )]
    Overlap(u64, u64),
    /// More regions than [`MAX_REGIONS`].
    #[error("{0} memory regions are more than the {MAX_REGIONS} this back-end takes")]
    TooMany(usize),
    /// The kernel refused the mapping.
    #[error(
        "cannot map {size} bytes of guest memory at offset {offset:#x} of its file: {reason}; the offset must be page aligned and the file shared"
    )]
    Map {
        /// Size in bytes.
        size: u64,
        /// Offset in the file in bytes.
        offset: u64,
        /// What the mapping said.
        reason: String,
    },
    /// The file could not be examined.
    #[error("cannot read the size of a memory region's file: {0}")]
    Stat(#[from] std::io::Error),
    /// A region to be removed is not in the table.
    #[error("no memory region at guest address {0:#x} with size {1:#x} to remove")]
    Unknown(u64, u64),
}

/// One mapped region.
#[derive(Debug)]
pub struct Region {
    spec: RegionSpec,
    mapping: MmapRegion,
}

impl Region {
    /// Maps `spec` from `file`.
    ///
    /// # Errors
    /// When the region is empty, wraps, reaches beyond its file (touching that would be SIGBUS) or
    /// cannot be mapped.
    pub fn map(spec: RegionSpec, file: File) -> Result<Self, MemoryError> {
        let wraps = || MemoryError::Wraps(spec.guest_addr, spec.size);
        if spec.size == 0 {
            return Err(MemoryError::Empty(spec.guest_addr));
        }
        spec.guest_addr.checked_add(spec.size).ok_or_else(wraps)?;
        spec.user_addr.checked_add(spec.size).ok_or_else(wraps)?;
        let needed = spec.file_offset.checked_add(spec.size).ok_or_else(wraps)?;
        let actual = file.metadata()?.len();
        if actual < needed {
            return Err(MemoryError::ShortFile {
                guest_addr: spec.guest_addr,
                needed,
                actual,
            });
        }
        seal_against_shrinking(&file);
        let refused = |reason: String| MemoryError::Map {
            size: spec.size,
            offset: spec.file_offset,
            reason,
        };
        let size = usize::try_from(spec.size).map_err(|e| refused(e.to_string()))?;
        let mapping = MmapRegion::from_file(FileOffset::new(file, spec.file_offset), size)
            .map_err(|e| refused(e.to_string()))?;
        Ok(Self { spec, mapping })
    }

    /// Where the region lies.
    #[must_use]
    pub fn spec(&self) -> RegionSpec {
        self.spec
    }

    fn host(&self) -> *mut u8 {
        self.mapping.as_ptr()
    }

    /// Offset of `len` bytes at `addr` in a range that begins at `start`, when all of them are in.
    fn offset(&self, start: u64, addr: u64, len: u64) -> Option<usize> {
        let offset = addr.checked_sub(start)?;
        let end = offset.checked_add(len)?;
        if end > self.spec.size {
            return None;
        }
        usize::try_from(offset).ok()
    }
}

/// A file that cannot shrink cannot turn a mapped page into SIGBUS. Files that take no seals
/// (hugetlbfs, plain files) stay as they are.
fn seal_against_shrinking(file: &File) {
    // SAFETY: F_ADD_SEALS reads only its integer argument; a file without seals answers an error.
    unsafe {
        libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_SHRINK);
    }
}

/// An immutable snapshot of the guest's memory: regions in order of guest address, none
/// overlapping.
#[derive(Debug, Default)]
pub struct GuestMemory {
    regions: Vec<Arc<Region>>,
}

impl GuestMemory {
    /// Builds a snapshot.
    ///
    /// # Errors
    /// When regions overlap (in guest or front-end addresses) or are too many.
    pub fn new(mut regions: Vec<Arc<Region>>) -> Result<Self, MemoryError> {
        if regions.len() > MAX_REGIONS {
            return Err(MemoryError::TooMany(regions.len()));
        }
        regions.sort_by_key(|r| r.spec.user_addr);
        refuse_overlap(&regions, |spec| spec.user_addr)?;
        regions.sort_by_key(|r| r.spec.guest_addr);
        refuse_overlap(&regions, |spec| spec.guest_addr)?;
        Ok(Self { regions })
    }

    /// This snapshot with one region more (ADD_MEM_REG).
    ///
    /// # Errors
    /// As [`GuestMemory::new`].
    pub fn with(&self, region: Region) -> Result<Self, MemoryError> {
        let mut regions = self.regions.clone();
        regions.push(Arc::new(region));
        Self::new(regions)
    }

    /// This snapshot without the region of this guest address, front-end address and size
    /// (REM_MEM_REG).
    ///
    /// # Errors
    /// When there is no such region.
    pub fn without(&self, spec: RegionSpec) -> Result<Self, MemoryError> {
        let same = |r: &RegionSpec| {
            (r.guest_addr, r.user_addr, r.size) == (spec.guest_addr, spec.user_addr, spec.size)
        };
        if !self.regions.iter().any(|r| same(&r.spec)) {
            return Err(MemoryError::Unknown(spec.guest_addr, spec.size));
        }
        Ok(Self {
            regions: self
                .regions
                .iter()
                .filter(|r| !same(&r.spec))
                .cloned()
                .collect(),
        })
    }

    /// The regions in order of guest address.
    pub fn regions(&self) -> impl Iterator<Item = RegionSpec> + '_ {
        self.regions.iter().map(|r| r.spec)
    }

    /// Whether nothing is mapped.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// An array of `len` values at a *front-end* address, as SET_VRING_ADDR gives it. `None` when
    /// the address is not aligned for `T` or the array does not lie in one region.
    #[must_use]
    pub fn user_array<T: ByteValued>(&self, user_addr: u64, len: u16) -> Option<GuestArray<T>> {
        let bytes = array_bytes::<T>(len)?;
        let (region, offset) = self.regions.iter().find_map(|r| {
            r.offset(r.spec.user_addr, user_addr, bytes)
                .map(|offset| (r, offset))
        })?;
        GuestArray::at(region, offset, len)
    }

    /// An array of `len` values at a *guest* address (an indirect descriptor table).
    /// `None` as for [`GuestMemory::user_array`], but any alignment is taken: the specification
    /// asks none of an indirect table that we could rely on.
    #[must_use]
    pub fn guest_array<T: ByteValued>(&self, addr: u64, len: u16) -> Option<GuestArrayRef<'_, T>> {
        let bytes = array_bytes::<T>(len)?;
        let (region, offset) = self.find(addr, bytes)?;
        Some(GuestArrayRef {
            // SAFETY: `find` saw that `bytes` bytes from `offset` lie in the region's mapping.
            ptr: unsafe { region.host().add(offset) },
            len,
            _life: PhantomData,
        })
    }

    /// Copies out of guest memory at a guest address; false when the range is not mapped in one
    /// region. For tests and control paths, not for the data path.
    #[must_use]
    pub fn read(&self, addr: u64, out: &mut [u8]) -> bool {
        self.find(addr, wide(out.len()))
            .is_some_and(|(region, offset)| {
                // SAFETY: the whole range lies in the region's mapping; `out` is private memory.
                unsafe { copy_out(region.host().add(offset), out) };
                true
            })
    }

    /// Copies into guest memory at a guest address; false as for [`GuestMemory::read`].
    #[must_use]
    pub fn write(&self, addr: u64, data: &[u8]) -> bool {
        self.find(addr, wide(data.len()))
            .is_some_and(|(region, offset)| {
                // SAFETY: the whole range lies in the region's mapping; `data` is private memory.
                unsafe { copy_in(data, region.host().add(offset)) };
                true
            })
    }

    fn find(&self, addr: u64, len: u64) -> Option<(&Arc<Region>, usize)> {
        let region = self.containing(addr)?;
        let offset = region.offset(region.spec.guest_addr, addr, len)?;
        Some((region, offset))
    }

    /// The region that a guest address lies in.
    fn containing(&self, addr: u64) -> Option<&Arc<Region>> {
        let after = self.regions.partition_point(|r| r.spec.guest_addr <= addr);
        let region = self.regions.get(after.checked_sub(1)?)?;
        (addr - region.spec.guest_addr < region.spec.size).then_some(region)
    }
}

fn refuse_overlap(
    sorted: &[Arc<Region>],
    start: impl Fn(&RegionSpec) -> u64,
) -> Result<(), MemoryError> {
    for pair in sorted.windows(2) {
        let (low, high) = (&pair[0].spec, &pair[1].spec);
        // No overflow: Region::map saw that both sums fit.
        if start(low) + low.size > start(high) {
            return Err(MemoryError::Overlap(low.guest_addr, high.guest_addr));
        }
    }
    Ok(())
}

fn array_bytes<T>(len: u16) -> Option<u64> {
    u64::try_from(size_of::<T>())
        .ok()?
        .checked_mul(u64::from(len))
}

/// usize fits u64 on every machine that Linux runs on.
fn wide(n: usize) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}

/// # Safety
/// `from` must point to `to.len()` mapped bytes.
unsafe fn copy_out(from: *const u8, to: &mut [u8]) {
    // SAFETY: by contract; the two cannot overlap since `to` is private memory. The guest may
    // write meanwhile: the copy then holds a mix, which the caller checks as any other input.
    unsafe { std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()) }
}

/// # Safety
/// `to` must point to `from.len()` mapped bytes.
unsafe fn copy_in(from: &[u8], to: *mut u8) {
    // SAFETY: by contract; the two cannot overlap since `from` is private memory.
    unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) }
}

/// Says of `repr(C)` structs of integers that any bytes make a valid value of theirs.
macro_rules! plain_data {
    ($($name:ty),* $(,)?) => {$(
        // SAFETY: repr(C), integers only, no padding (the size is the sum of its fields, see the
        // assertion beside each use), so every bit pattern is a value.
        #[allow(unsafe_code)]
        unsafe impl vm_memory::ByteValued for $name {}
    )*};
}
pub(crate) use plain_data;

/// An array in guest memory: `len` values of `T`, bounds-checked, each access volatile. It holds
/// its region, which stays mapped as long as the array lives.
#[derive(Debug)]
pub struct GuestArray<T> {
    ptr: *mut T,
    len: u16,
    _region: Arc<Region>,
}

// SAFETY: the pointer leads into a shared mapping that the region keeps alive; every access is a
// volatile or atomic access of plain data, whatever thread makes it.
unsafe impl<T: ByteValued> Send for GuestArray<T> {}

impl<T: ByteValued> GuestArray<T> {
    fn at(region: &Arc<Region>, offset: usize, len: u16) -> Option<Self> {
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
        unsafe { self.slot(index).read_volatile() }
    }

    /// Writes value `index`.
    #[inline(always)]
    pub fn set(&self, index: u16, value: T) {
        // SAFETY: as for `get`.
        unsafe { self.slot(index).write_volatile(value) }
    }

    /// Asks the CPU to fetch the line of value `index`; a hint, without effect on meaning.
    #[inline(always)]
    pub fn prefetch(&self, index: u16) {
        prefetch(self.slot(index).cast());
    }
}

impl GuestArray<u16> {
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

plain_data!(Descriptor);
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

    /// `next` of a split ring's descriptor.
    #[inline(always)]
    pub(crate) fn next(self) -> u16 {
        self.fourth()
    }

    /// A packed ring's descriptor in a split ring's order of fields, with `flags` as they were
    /// read before; its `id` is then what [`Descriptor::next`] gives.
    #[inline(always)]
    pub(crate) fn unpacked(self, flags: u16) -> Self {
        let rest = u64::from(self.len()) | u64::from(flags) << 32 | u64::from(self.third()) << 48;
        Self {
            rest: rest.to_le(),
            ..self
        }
    }

    /// `flags` of a packed ring's descriptor.
    #[inline(always)]
    pub(crate) fn packed_flags(self) -> u16 {
        self.fourth()
    }
}

impl GuestArray<Descriptor> {
    /// Reads descriptor `index` once, in two loads.
    #[inline(always)]
    pub(crate) fn descriptor(&self, index: u16) -> Descriptor {
        let slot = self.slot(index);
        // SAFETY: `slot` is in bounds and aligned; both words are plain data.
        unsafe {
            Descriptor {
                addr: (&raw const (*slot).addr).read_volatile(),
                rest: (&raw const (*slot).rest).read_volatile(),
            }
        }
    }

    /// Reads `flags` of descriptor `index` of a packed ring; what the driver wrote before them is
    /// seen after them.
    #[inline(always)]
    pub(crate) fn acquire_flags(&self, index: u16) -> u16 {
        // SAFETY: the last 2 of a descriptor's 16 bytes, in bounds and 2-aligned as descriptors are
        // 16-aligned.
        let word = unsafe { AtomicU16::from_ptr(self.slot(index).cast::<u16>().add(7)) };
        u16::from_le(word.load(Ordering::Acquire))
    }

    /// Writes `len`, `id` and `flags` of descriptor `index` of a packed ring in one store, after
    /// everything written before it.
    #[inline(always)]
    pub(crate) fn release_used(&self, index: u16, id: u16, len: u32, flags: u16) {
        let word = u64::from(len) | u64::from(id) << 32 | u64::from(flags) << 48;
        // SAFETY: the second half of a descriptor in bounds, 8-aligned as descriptors are
        // 16-aligned.
        let half = unsafe { AtomicU64::from_ptr(&raw mut (*self.slot(index)).rest) };
        half.store(word.to_le(), Ordering::Release);
    }
}

/// Orders a store before a later load of the other side's memory: the one fence that event
/// suppression needs (virtio 1.3 §2.7.7 and §2.8.10).
#[inline(always)]
pub fn full_fence() {
    fence(Ordering::SeqCst);
}

#[inline(always)]
fn prefetch(_ptr: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch never faults, whatever the address.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(_ptr.cast());
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

/// A piece of a guest's buffer, laid out as an `iovec`.
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
        // SAFETY: n bytes from the slice's start are mapped (see Pieces::push) while 'm lives.
        unsafe { copy_out(self.vec.iov_base.cast(), &mut out[..n]) };
        n
    }

    /// Copies to the slice's start; returns the bytes copied: the shorter of both lengths.
    #[inline(always)]
    pub fn copy_from(&self, data: &[u8]) -> usize {
        let n = self.len().min(data.len());
        // SAFETY: as for `copy_to`.
        unsafe { copy_in(&data[..n], self.vec.iov_base.cast()) };
        n
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

/// What [`Pieces::strip`] did.
pub(crate) struct Stripped {
    /// Bytes copied.
    pub(crate) bytes: usize,
    /// The piece is used up.
    pub(crate) whole: bool,
}

/// Where a buffer's address is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadAddress;

/// Storage for a burst's slices, all of one snapshot.
#[derive(Debug)]
pub struct Pieces {
    list: Vec<GuestSlice<'static>>,
    /// The region that the last translation met; guests keep to one or two.
    last: Window,
    /// Keeps every slice in `list` mapped; the 'static above never leaves this type.
    memory: Arc<GuestMemory>,
}

/// Appends to [`Pieces`] with everything that the fast path needs at hand: a burst's pieces cost a
/// comparison and a store each. What it appended counts once it is dropped.
pub(crate) struct PieceWriter<'p> {
    pieces: &'p mut Pieces,
    /// The list's length, with what has been appended.
    len: usize,
    /// The region that the last translation met.
    window: Window,
}

impl PieceWriter<'_> {
    /// Number of pieces.
    #[inline(always)]
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Forgets the pieces from number `len` on.
    #[inline(always)]
    pub(crate) fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Appends a range that is not empty and lies in the region met last, if there is room; false,
    /// and nothing done, for any other.
    #[inline(always)]
    pub(crate) fn push_near(&mut self, addr: u64, len: u32) -> bool {
        let len = u64::from(len);
        let Some(offset) = self.window.offset(addr, len) else {
            return false;
        };
        if len == 0 || self.len >= self.pieces.list.capacity() {
            return false;
        }
        let slice = GuestSlice::new(self.window.host, offset, len);
        // SAFETY: len < capacity, so the place is the list's own; the list's length, which says
        // what of it is initialised, is set when the writer is dropped.
        unsafe { self.pieces.list.as_mut_ptr().add(self.len).write(slice) };
        self.len += 1;
        true
    }

    /// See [`Pieces::push`].
    #[inline(always)]
    pub(crate) fn push(&mut self, addr: u64, len: u32) -> Result<(), BadAddress> {
        if self.push_near(addr, len) {
            return Ok(());
        }
        let len = u64::from(len);
        // By value, so that the fast path's state can stay in registers.
        let (len, window, pushed) = self.pieces.push_slow(self.len, addr, len);
        self.len = len;
        self.window = window;
        pushed
    }

    /// A table of `len` values at guest address `addr`, in one region.
    #[inline(always)]
    pub(crate) fn table<T: ByteValued>(&self, addr: u64, len: u16) -> Option<GuestArrayRef<'_, T>> {
        let bytes = array_bytes::<T>(len)?;
        match self.window.offset(addr, bytes) {
            Some(offset) => Some(GuestArrayRef {
                // SAFETY: the table lies within the mapping at `host`.
                ptr: unsafe { self.window.host.add(usize::try_from(offset).ok()?) },
                len,
                _life: PhantomData,
            }),
            None => self.pieces.memory.guest_array(addr, len),
        }
    }
}

impl Drop for PieceWriter<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        // SAFETY: the first `len` places are initialised: the list's own, and those written by
        // `push` one after the other; `len` never passes the capacity.
        unsafe { self.pieces.list.set_len(self.len) };
        self.pieces.last = self.window;
    }
}

/// A region as three plain words.
#[derive(Debug, Clone, Copy)]
struct Window {
    start: u64,
    size: u64,
    host: *mut u8,
}

impl Window {
    /// Offset of `len` bytes at `addr`, when all of them are in.
    #[inline(always)]
    fn offset(&self, addr: u64, len: u64) -> Option<u64> {
        // An address below the start wraps to a huge offset; `size - offset` cannot underflow.
        let offset = addr.wrapping_sub(self.start);
        (offset < self.size && len <= self.size - offset).then_some(offset)
    }
}

// SAFETY: as for GuestSlice; `memory` keeps what `host` points to.
unsafe impl Send for Pieces {}

impl Pieces {
    /// No pieces yet, over `memory`.
    #[must_use]
    pub fn new(memory: Arc<GuestMemory>) -> Self {
        Self {
            list: Vec::new(),
            last: Window {
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

    /// Number of pieces.
    #[inline(always)]
    #[must_use]
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether there is no piece.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Forgets the pieces from number `len` on.
    #[inline(always)]
    pub fn truncate(&mut self, len: usize) {
        self.list.truncate(len);
    }

    /// Forgets the first `n` pieces; later ones move down.
    pub fn discard_front(&mut self, n: usize) {
        self.list.drain(..n.min(self.list.len()));
    }

    /// Translates `len` bytes at guest address `addr` and appends them: one piece, or several where
    /// the range crosses regions that join. A range of no bytes is checked and adds nothing.
    ///
    /// # Errors
    /// When any byte of the range is not mapped; nothing is appended then.
    #[inline(always)]
    pub fn push(&mut self, addr: u64, len: u32) -> Result<(), BadAddress> {
        self.writer().push(addr, len)
    }

    /// Appends behind the first `at` pieces whatever the fast path of [`PieceWriter::push`] cannot:
    /// ranges in another region than the last, or in several, and lists that must grow. The list's
    /// new length and the region met last come with the result.
    #[cold]
    #[inline(never)]
    fn push_slow(
        &mut self,
        at: usize,
        mut addr: u64,
        mut len: u64,
    ) -> (usize, Window, Result<(), BadAddress>) {
        // SAFETY: the writer has initialised the first `at` places and `at` never passes the
        // capacity.
        unsafe { self.list.set_len(at) };
        loop {
            let Some(region) = self.memory.containing(addr) else {
                self.list.truncate(at);
                return (at, self.last, Err(BadAddress));
            };
            self.last = Window {
                start: region.spec.guest_addr,
                size: region.spec.size,
                host: region.host(),
            };
            let offset = addr - self.last.start;
            let here = len.min(self.last.size - offset);
            if here != 0 {
                self.list
                    .push(GuestSlice::new(self.last.host, offset, here));
            }
            len -= here;
            if len == 0 {
                return (self.list.len(), self.last, Ok(()));
            }
            // No overflow: the region's end fits 64 bits.
            addr += here;
        }
    }

    /// A writer at the end of the list.
    #[inline(always)]
    pub(crate) fn writer(&mut self) -> PieceWriter<'_> {
        PieceWriter {
            len: self.list.len(),
            window: self.last,
            pieces: self,
        }
    }

    /// Copies from the start of piece `at` and takes the bytes off it.
    #[inline(always)]
    pub(crate) fn strip(&mut self, at: usize, out: &mut [u8]) -> Stripped {
        let Some(piece) = self.list.get_mut(at) else {
            return Stripped {
                bytes: 0,
                whole: false,
            };
        };
        let bytes = piece.copy_to(out);
        *piece = piece.skip(bytes);
        Stripped {
            bytes,
            whole: piece.is_empty(),
        }
    }

    /// The pieces `from..to` (clamped to what there is).
    #[inline(always)]
    #[must_use]
    pub fn slices(&self, from: usize, to: usize) -> &[GuestSlice<'_>] {
        let to = to.min(self.list.len());
        &self.list[from.min(to)..to]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{memfd, region};

    #[test]
    fn a_region_longer_than_its_file_is_refused() {
        let spec = RegionSpec {
            guest_addr: 0,
            size: 8192,
            user_addr: 0,
            file_offset: 0,
        };
        let error = Region::map(spec, memfd(4096)).unwrap_err();
        assert!(matches!(
            error,
            MemoryError::ShortFile {
                needed: 8192,
                actual: 4096,
                ..
            }
        ));
    }

    #[test]
    fn bad_regions_are_refused() {
        let spec = |guest_addr, size, user_addr, file_offset| RegionSpec {
            guest_addr,
            size,
            user_addr,
            file_offset,
        };
        for (spec, want) in [
            (spec(0, 0, 0, 0), "size 0"),
            (spec(u64::MAX - 4095, 8192, 0, 0), "wraps"),
            (spec(0, 8192, u64::MAX - 4095, 0), "wraps"),
            (spec(0, 8192, 0, u64::MAX - 4095), "wraps"),
            (spec(0, 4096, 0, 100), "cannot map"),
        ] {
            let text = Region::map(spec, memfd(8192)).unwrap_err().to_string();
            assert!(text.contains(want), "{text}");
        }
    }

    #[test]
    fn overlaps_are_refused_in_both_address_spaces() {
        let make = |a: (u64, u64), b: (u64, u64)| {
            GuestMemory::new(vec![
                Arc::new(region(a.0, a.1, 8192)),
                Arc::new(region(b.0, b.1, 8192)),
            ])
        };
        assert!(make((0, 0), (8192, 8192)).is_ok());
        assert!(make((0, 0), (4096, 8192)).is_err());
        assert!(make((0, 0), (8192, 4096)).is_err());
    }

    #[test]
    fn pieces_cross_joined_regions_and_stop_at_holes() {
        let memory = Arc::new(
            GuestMemory::new(vec![
                Arc::new(region(0x1000, 0, 4096)),
                Arc::new(region(0x2000, 0x10000, 4096)),
                Arc::new(region(0x4000, 0x20000, 4096)),
            ])
            .unwrap(),
        );
        let mut pieces = Pieces::new(memory);
        let lens =
            |p: &Pieces| -> Vec<usize> { p.slices(0, 99).iter().map(GuestSlice::len).collect() };
        pieces.push(0x1ff0, 32).unwrap();
        assert_eq!(lens(&pieces), [16, 16]);
        for (addr, len) in [
            (0x2ff0, 32),       // into the hole
            (0x3000, 1),        // in the hole
            (0, 1),             // before everything
            (0x5000, 0),        // one past the end, no bytes
            (0x3000, 0),        // no bytes in the hole
            (u64::MAX, 2),      // wraps
            (0x1000, u32::MAX), // longer than all memory
        ] {
            assert_eq!(pieces.push(addr, len), Err(BadAddress), "{addr:#x} {len}");
            assert_eq!(lens(&pieces), [16, 16]);
        }
        pieces.push(0x4000, 0).unwrap();
        pieces.push(0x4fff, 1).unwrap();
        assert_eq!(lens(&pieces), [16, 16, 1]);
    }

    #[test]
    fn slices_carry_bytes_both_ways() {
        let memory = Arc::new(GuestMemory::new(vec![Arc::new(region(0, 0, 4096))]).unwrap());
        assert!(memory.write(100, b"hello world"));
        let mut pieces = Pieces::new(Arc::clone(&memory));
        pieces.push(100, 11).unwrap();
        let slice = pieces.slices(0, 1)[0];
        let mut out = [0; 5];
        assert_eq!(slice.skip(6).copy_to(&mut out), 5);
        assert_eq!(&out, b"world");
        assert_eq!(slice.skip(6).first(3).copy_from(b"rings"), 3);
        let mut back = [0; 11];
        assert!(memory.read(100, &mut back));
        assert_eq!(&back, b"hello rinld");
        assert!(!memory.read(4090, &mut back));
    }

    #[test]
    fn ring_arrays_need_alignment_and_one_region() {
        let memory = GuestMemory::new(vec![
            Arc::new(region(0, 0, 4096)),
            Arc::new(region(4096, 4096, 4096)),
        ])
        .unwrap();
        assert!(memory.user_array::<u16>(0, 2048).is_some());
        assert!(memory.user_array::<u16>(1, 16).is_none());
        assert!(memory.user_array::<u16>(4094, 2).is_none());
        assert!(memory.user_array::<u16>(u64::MAX - 1, 2).is_none());
    }
}
