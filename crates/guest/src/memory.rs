//! Guest memory as the guest has it: shared, allocated and written from this side.
//!
//! A [`GuestRam`] is one memfd, cut into one or more regions of guest physical addresses. The same
//! pages are reached in three ways: through this file's accessors, through a back-end process that
//! was given the file (SET_MEM_TABLE), and through a [`GuestMemory`] in this process
//! ([`GuestRam::guest_memory`]).
//!
//! [`Area`] is a piece with its translation done: rings and buffers keep one each, so that the data
//! path pays a bounds check and no look-up.
#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtionet_virtqueue::memory::{GuestMemory, MappedRegion, MemoryError, RegionSpec};
use vm_memory::{ByteValued, FileOffset, MmapRegion};

/// Bytes of the smallest page: region addresses and sizes are multiples of it.
const PAGE: u64 = 4096;

/// Why guest memory could not be made or reached.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// memfd_create or its sizing failed.
    #[error("cannot make a memfd of {size} bytes for guest memory: {source}; lower the size")]
    Create {
        /// Bytes asked for.
        size: u64,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// A region that is empty, not of whole pages, or beyond 2^64.
    #[error(
        "guest memory region at {0:#x} with size {1:#x} cannot be made; give it whole pages below 2^64"
    )]
    Layout(u64, u64),
    /// The kernel refused the mapping.
    #[error("cannot map {size} bytes of guest memory: {reason}; lower the size")]
    Map {
        /// Bytes asked for.
        size: u64,
        /// What the mapping said.
        reason: String,
    },
    /// Bytes outside every region.
    #[error(
        "{len} bytes at guest address {addr:#x} are not in guest memory; check the address against the regions"
    )]
    OutOfRange {
        /// First guest physical address.
        addr: u64,
        /// Bytes asked for.
        len: u64,
    },
    /// No free range of that size.
    #[error("no {0} bytes are left in guest memory; make it larger")]
    Exhausted(u64),
    /// The in-process view could not be made.
    #[error(transparent)]
    View(#[from] MemoryError),
    /// The file could not be duplicated.
    #[error("cannot duplicate the guest memory's file: {0}; raise the limit of open files")]
    Duplicate(std::io::Error),
}

/// The guest's memory. A clone is another handle on the same memory.
#[derive(Debug, Clone)]
pub struct GuestRam(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    file: File,
    blocks: Vec<Block>,
    /// Free ranges (first address, bytes), by address, none touching.
    free: Mutex<Vec<(u64, u64)>>,
}

#[derive(Debug)]
struct Block {
    spec: RegionSpec,
    mapping: MmapRegion,
}

impl GuestRam {
    /// `size` bytes (whole pages) in one region at guest address 0.
    ///
    /// # Errors
    /// As [`GuestRam::with_layout`].
    pub fn new(size: u64) -> Result<Self, RamError> {
        Self::with_layout(&[(0, size)])
    }

    /// Regions of (guest physical address, bytes), each of whole pages; what lies between them is a
    /// hole. All are parts of one file, one after the other, as QEMU cuts its memory around the
    /// PCI hole.
    ///
    /// # Errors
    /// When a region is not of whole pages or the memory cannot be had.
    pub fn with_layout(layout: &[(u64, u64)]) -> Result<Self, RamError> {
        let mut total = 0u64;
        for &(addr, size) in layout {
            let bad = || RamError::Layout(addr, size);
            addr.checked_add(size).ok_or_else(bad)?;
            if size == 0 || !addr.is_multiple_of(PAGE) || !size.is_multiple_of(PAGE) {
                return Err(bad());
            }
            total = total.checked_add(size).ok_or_else(bad)?;
        }
        let file = memfd(total)?;
        let mut blocks = Vec::with_capacity(layout.len());
        let mut file_offset = 0;
        for &(guest_addr, size) in layout {
            blocks.push(Block::map(&file, guest_addr, size, file_offset)?);
            file_offset += size;
        }
        let mut free: Vec<_> = layout
            .iter()
            .map(|&(at, size)| exclude_address_zero(at, size))
            .collect();
        free.sort_unstable();
        Ok(Self(Arc::new(Inner {
            file,
            blocks,
            free: Mutex::new(free),
        })))
    }

    /// The regions as SET_MEM_TABLE names them; `user_addr` is the mapping's address in this
    /// process. All of them lie in the file of [`GuestRam::fd`].
    #[must_use]
    pub fn regions(&self) -> Vec<RegionSpec> {
        self.0.blocks.iter().map(|b| b.spec).collect()
    }

    /// The memfd behind every region.
    #[must_use]
    pub fn fd(&self) -> RawFd {
        self.0.file.as_raw_fd()
    }

    /// The memfd as a file, to truncate it, to punch holes, to seal it.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.0.file
    }

    /// The device's view of this memory, in this process: the same pages, mapped once more.
    ///
    /// # Errors
    /// When the regions overlap or cannot be mapped.
    pub fn guest_memory(&self) -> Result<GuestMemory, RamError> {
        let mut regions = Vec::new();
        for block in &self.0.blocks {
            let file = self.0.file.try_clone().map_err(RamError::Duplicate)?;
            regions.push(Arc::new(MappedRegion::map(block.spec, file)?));
        }
        Ok(GuestMemory::new(regions)?)
    }

    /// The front-end's address of a guest address, as SET_VRING_ADDR wants it; `None` in a hole.
    #[must_use]
    pub fn user_addr(&self, addr: u64) -> Option<u64> {
        let block = self.0.containing(addr)?;
        Some(block.spec.user_addr + (addr - block.spec.guest_addr))
    }

    /// The `len` bytes at guest address `addr`, all in one region, translated once for many uses.
    ///
    /// # Errors
    /// When they are not in one region.
    pub fn area(&self, addr: u64, len: u64) -> Result<Area, RamError> {
        let outside = || RamError::OutOfRange { addr, len };
        let block = self.0.containing(addr).ok_or_else(outside)?;
        let offset = addr - block.spec.guest_addr;
        if len > block.spec.size - offset {
            return Err(outside());
        }
        let (Ok(offset), Ok(bytes)) = (usize::try_from(offset), usize::try_from(len)) else {
            return Err(outside());
        };
        Ok(Area {
            // SAFETY: offset + bytes is within the block's mapping, as just checked.
            ptr: unsafe { block.mapping.as_ptr().add(offset) },
            len: bytes,
            addr,
            _ram: Arc::clone(&self.0),
        })
    }

    /// Takes `len` free bytes aligned to `align` (a power of two); returns their guest address.
    /// The bytes are those that the last owner left. Address 0 is never given.
    ///
    /// # Errors
    /// When no free range is large enough.
    pub fn alloc(&self, len: u64, align: u64) -> Result<u64, RamError> {
        let mut free = self.0.free();
        for at in 0..free.len() {
            let (start, size) = free[at];
            let Some(addr) = start.checked_next_multiple_of(align.max(1)) else {
                continue;
            };
            let gap = addr - start;
            let Some(rest) = size.checked_sub(gap).and_then(|s| s.checked_sub(len)) else {
                continue;
            };
            let parts = [(start, gap), (addr + len, rest)];
            free.splice(at..=at, parts.into_iter().filter(|p| p.1 != 0));
            return Ok(addr);
        }
        Err(RamError::Exhausted(len))
    }

    /// [`GuestRam::alloc`], zeroed and translated.
    ///
    /// # Errors
    /// When no free range is large enough.
    pub fn alloc_area(&self, len: u64, align: u64) -> Result<Area, RamError> {
        let area = self.area(self.alloc(len, align)?, len)?;
        area.zero();
        Ok(area)
    }

    /// Gives back what [`GuestRam::alloc`] gave. The caller keeps no use of it.
    pub fn free(&self, addr: u64, len: u64) {
        let mut free = self.0.free();
        let at = free.partition_point(|&(start, _)| start < addr);
        free.insert(at, (addr, len));
        // Joined ranges never cross a region: regions that touch are still separate mappings.
        let joins = |a: (u64, u64), b: (u64, u64)| {
            a.0 + a.1 == b.0 && !self.0.blocks.iter().any(|r| r.spec.guest_addr == b.0)
        };
        if at + 1 < free.len() && joins(free[at], free[at + 1]) {
            free[at].1 += free[at + 1].1;
            free.remove(at + 1);
        }
        if at > 0 && joins(free[at - 1], free[at]) {
            free[at - 1].1 += free[at].1;
            free.remove(at);
        }
    }

    /// Bytes that [`GuestRam::alloc`] could still give, in all.
    #[must_use]
    pub fn available(&self) -> u64 {
        self.0.free().iter().map(|&(_, size)| size).sum()
    }

    /// Copies from guest address `addr`; the range may cross regions that touch.
    ///
    /// # Errors
    /// When a byte of it is not in guest memory; what came before may have been copied.
    pub fn read(&self, addr: u64, out: &mut [u8]) -> Result<(), RamError> {
        self.each_part(addr, out.len(), |area, from, to| {
            area.read(0, &mut out[from..to]);
        })
    }

    /// Copies to guest address `addr`; the range may cross regions that touch.
    ///
    /// # Errors
    /// When a byte of it is not in guest memory; what came before may have been copied.
    pub fn write(&self, addr: u64, data: &[u8]) -> Result<(), RamError> {
        self.each_part(addr, data.len(), |area, from, to| {
            area.write(0, &data[from..to]);
        })
    }

    fn each_part(
        &self,
        addr: u64,
        len: usize,
        mut act: impl FnMut(&Area, usize, usize),
    ) -> Result<(), RamError> {
        let mut done = 0;
        while done < len {
            let outside = || RamError::OutOfRange {
                addr,
                len: to_u64(len),
            };
            let here = addr.checked_add(to_u64(done)).ok_or_else(outside)?;
            let block = self.0.containing(here).ok_or_else(outside)?;
            let left = block.spec.size - (here - block.spec.guest_addr);
            let n = (len - done).min(usize::try_from(left).unwrap_or(usize::MAX));
            act(&self.area(here, to_u64(n))?, done, done + n);
            done += n;
        }
        Ok(())
    }
}

impl Inner {
    fn containing(&self, addr: u64) -> Option<&Block> {
        self.blocks.iter().find(|b| {
            addr.checked_sub(b.spec.guest_addr)
                .is_some_and(|offset| offset < b.spec.size)
        })
    }

    fn free(&self) -> MutexGuard<'_, Vec<(u64, u64)>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Block {
    fn map(file: &File, guest_addr: u64, size: u64, file_offset: u64) -> Result<Self, RamError> {
        let refused = |reason: String| RamError::Map { size, reason };
        let bytes = usize::try_from(size).map_err(|e| refused(e.to_string()))?;
        let own = file.try_clone().map_err(RamError::Duplicate)?;
        let mapping = MmapRegion::from_file(FileOffset::new(own, file_offset), bytes)
            .map_err(|e| refused(e.to_string()))?;
        Ok(Self {
            spec: RegionSpec {
                guest_addr,
                size,
                user_addr: to_u64(mapping.as_ptr().expose_provenance()),
                file_offset,
            },
            mapping,
        })
    }
}

/// A region without guest address 0, which reads as "no address" in too many places.
fn exclude_address_zero(addr: u64, size: u64) -> (u64, u64) {
    let skip = if addr == 0 { PAGE } else { 0 };
    (addr + skip, size - skip)
}

fn memfd(size: u64) -> Result<File, RamError> {
    let failed = |source| RamError::Create { size, source };
    // SAFETY: the name is a C string and the flags are memfd_create's own.
    let fd = unsafe {
        libc::memfd_create(
            c"virtionet-guest".as_ptr(),
            libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING,
        )
    };
    if fd < 0 {
        return Err(failed(std::io::Error::last_os_error()));
    }
    // SAFETY: the kernel just made this descriptor and nobody else has it.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len(size).map_err(failed)?;
    Ok(file)
}

/// usize fits u64 on every machine that Linux runs on.
pub(crate) fn to_u64(n: usize) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}

/// A piece of guest memory that keeps its mapping. Numbers are little-endian, as virtio 1.x has
/// them.
///
/// Every accessor panics when the access leaves the area, as indexing a slice does: it is the
/// test's own mistake.
#[derive(Debug)]
pub struct Area {
    ptr: *mut u8,
    len: usize,
    addr: u64,
    _ram: Arc<Inner>,
}

// SAFETY: the pointer leads into a shared mapping that `_ram` keeps; the memory is plain data that
// others write at any time anyway, and no reference into it is made.
unsafe impl Send for Area {}
// SAFETY: as for Send; loads and stores are volatile, atomic or raw copies.
unsafe impl Sync for Area {}

impl Area {
    /// Guest physical address of the first byte.
    #[inline(always)]
    #[must_use]
    pub fn addr(&self) -> u64 {
        self.addr
    }

    /// Length in bytes.
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

    /// Reads a value at byte `offset`, aligned for `T`, once.
    #[inline(always)]
    #[must_use]
    pub fn load<T: ByteValued>(&self, offset: usize) -> T {
        // SAFETY: `slot` saw that it is in bounds and aligned; T is plain data of any bit pattern.
        unsafe { self.slot::<T>(offset).read_volatile() }
    }

    /// Writes a value at byte `offset`, aligned for `T`.
    #[inline(always)]
    pub fn store<T: ByteValued>(&self, offset: usize, value: T) {
        // SAFETY: as for `load`.
        unsafe { self.slot::<T>(offset).write_volatile(value) }
    }

    /// Reads a `u16`; what the other side wrote before it is seen after it.
    #[inline(always)]
    #[must_use]
    pub fn acquire(&self, offset: usize) -> u16 {
        u16::from_le(self.atomic(offset).load(Ordering::Acquire))
    }

    /// Writes a `u16` after everything written before it.
    #[inline(always)]
    pub fn release(&self, offset: usize, value: u16) {
        self.atomic(offset).store(value.to_le(), Ordering::Release);
    }

    /// Reads a `u16`.
    #[inline(always)]
    #[must_use]
    pub fn get(&self, offset: usize) -> u16 {
        u16::from_le(self.atomic(offset).load(Ordering::Relaxed))
    }

    /// Writes a `u16`.
    #[inline(always)]
    pub fn set(&self, offset: usize, value: u16) {
        self.atomic(offset).store(value.to_le(), Ordering::Relaxed);
    }

    /// Copies bytes out, from byte `offset` on.
    #[inline(always)]
    pub fn read(&self, offset: usize, out: &mut [u8]) {
        let from = self.bytes(offset, out.len());
        // SAFETY: `bytes` saw the range in bounds; `out` is private memory, so no overlap.
        unsafe { std::ptr::copy_nonoverlapping(from, out.as_mut_ptr(), out.len()) }
    }

    /// Copies bytes in, from byte `offset` on.
    #[inline(always)]
    pub fn write(&self, offset: usize, data: &[u8]) {
        let to = self.bytes(offset, data.len());
        // SAFETY: `bytes` saw the range in bounds; `data` is private memory, so no overlap.
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

    #[inline(always)]
    fn slot<T>(&self, offset: usize) -> *mut T {
        let slot = self.bytes(offset, size_of::<T>()).cast::<T>();
        assert!(slot.is_aligned(), "unaligned access at byte {offset}");
        slot
    }

    #[inline(always)]
    fn bytes(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(
            offset <= self.len && len <= self.len - offset,
            "{len} bytes at byte {offset} leave an area of {} bytes",
            self.len
        );
        // SAFETY: offset <= len, so the result is within or one past the area.
        unsafe { self.ptr.add(offset) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_device_sees_what_the_guest_writes() {
        let ram = GuestRam::with_layout(&[(0, 0x4000), (0x10_0000, 0x2000)]).unwrap();
        let memory = ram.guest_memory().unwrap();
        for addr in [0x10, 0x3ff0, 0x10_1f00] {
            ram.write(addr, b"frame").unwrap();
            let mut seen = [0; 5];
            assert!(memory.read(addr, &mut seen));
            assert_eq!(&seen, b"frame");
        }
        let area = ram.area(0x100, 16).unwrap();
        area.store(8, 0x1122_3344_u32.to_le());
        area.release(12, 0xabcd);
        let mut seen = [0; 6];
        assert!(memory.read(0x108, &mut seen));
        assert_eq!(seen, [0x44, 0x33, 0x22, 0x11, 0xcd, 0xab]);
        assert_eq!(area.acquire(12), 0xabcd);
    }

    #[test]
    fn holes_and_ends_are_out_of_range() {
        let ram =
            GuestRam::with_layout(&[(0, 0x1000), (0x1000, 0x1000), (0x8000, 0x1000)]).unwrap();
        ram.write(0xffe, b"over").unwrap();
        let mut back = [0; 4];
        ram.read(0xffe, &mut back).unwrap();
        assert_eq!(&back, b"over");
        assert!(ram.area(0xffe, 4).is_err());
        assert!(ram.write(0x1ffe, b"over").is_err());
        assert!(ram.read(0x5000, &mut back).is_err());
        assert!(ram.area(0x8ff0, 0x11).is_err());
        assert!(ram.area(u64::MAX, 2).is_err());
        assert!(ram.user_addr(0x5000).is_none());
        assert!(GuestRam::with_layout(&[(0, 100)]).is_err());
    }

    #[test]
    #[should_panic(expected = "leave an area")]
    fn an_area_keeps_its_bounds() {
        GuestRam::new(0x2000)
            .unwrap()
            .area(0x1000, 16)
            .unwrap()
            .set(16, 1);
    }

    #[test]
    fn allocations_are_apart_and_come_back() {
        let ram = GuestRam::with_layout(&[(0, 0x4000), (0x4000, 0x1000)]).unwrap();
        let all = ram.available();
        assert_eq!(all, 0x4000);
        let a = ram.alloc(100, 64).unwrap();
        let b = ram.alloc(100, 4096).unwrap();
        let c = ram.alloc(8, 8).unwrap();
        assert!(a != 0 && a.is_multiple_of(64) && b.is_multiple_of(4096));
        assert!(a + 100 <= c && c + 8 <= b);
        // The last page is a region of its own: 0x2f00 bytes fit nowhere.
        assert!(ram.alloc(0x2f00, 1).is_err());
        for (addr, len) in [(b, 100), (a, 100), (c, 8)] {
            ram.free(addr, len);
        }
        assert_eq!(ram.available(), all);
        assert_eq!(ram.alloc(0x3000, 4096).unwrap(), 0x1000);
    }
}
