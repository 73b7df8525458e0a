//! Guest memory on the guest's side: shared with the back-end, allocated and accessed.
//!
//! A [`GuestRam`] is one memfd, divided into one or more regions of guest physical addresses. Three
//! parties access the same pages: the methods of this module, a back-end process that received the
//! file with SET_MEM_TABLE, and a [`GuestMemory`] in this process ([`GuestRam::guest_memory`]).
//!
//! ```text
//! memfd            [ region 0 | region 1 ]
//! guest addresses  [ region 0 ]   hole   [ region 1 ]
//! ```
//!
//! An [`Area`] is a range whose address is translated once. Each virtqueue and buffer store keeps
//! one, so that an access on the data path costs a bounds check and no search.

mod area;
mod error;
mod mapping;
mod page_source;

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtionet_virtqueue::memory::{GuestMemory, MappedRegion, RegionSpec};

pub use area::Area;
pub use error::RamError;
pub(crate) use mapping::to_u64;
use mapping::{MappedBlock, memfd};
pub use page_source::PageSource;

/// The size of the smallest page in bytes. Region addresses and sizes are multiples of it.
const PAGE: u64 = 4096;

/// The guest's memory. A clone refers to the same memory.
#[derive(Debug, Clone)]
pub struct GuestRam(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    file: File,
    blocks: Vec<Arc<MappedBlock>>,
    /// Unallocated ranges (first address, bytes) in order of address. Adjacent ranges of one region
    /// are merged.
    free: Mutex<Vec<(u64, u64)>>,
}

impl GuestRam {
    /// Memory of `size` bytes, a multiple of 4,096, in one region at guest address 0.
    ///
    /// # Errors
    /// As [`GuestRam::with_layout`].
    pub fn new(size: u64) -> Result<Self, RamError> {
        Self::with_layout(&[(0, size)])
    }

    /// Memory in regions of (guest physical address, bytes), both multiples of 4,096. The regions
    /// follow each other in one file, and the addresses between them are holes, as QEMU divides its
    /// memory around the PCI hole.
    ///
    /// # Errors
    /// When a region is empty, is not made of whole pages or wraps, or the host refuses the memory.
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
            blocks.push(Arc::new(MappedBlock::map(
                &file,
                guest_addr,
                size,
                file_offset,
            )?));
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

    /// The regions in the form of SET_MEM_TABLE. `user_addr` is the address of the mapping in this
    /// process. All regions lie in the file of [`GuestRam::fd`].
    #[must_use]
    pub fn regions(&self) -> Vec<RegionSpec> {
        self.0.blocks.iter().map(|b| b.spec).collect()
    }

    /// The descriptor of the memfd that contains all regions.
    #[must_use]
    pub fn fd(&self) -> RawFd {
        self.0.file.as_raw_fd()
    }

    /// The memfd as a file, for tests that truncate it, punch holes or seal it.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.0.file
    }

    /// The device's view of this memory in this process: the same pages in a second mapping.
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

    /// The front-end address of a guest address, for SET_VRING_ADDR; `None` for an address in a
    /// hole.
    #[must_use]
    pub fn user_addr(&self, addr: u64) -> Option<u64> {
        let block = self.0.containing(addr)?;
        Some(block.spec.user_addr + (addr - block.spec.guest_addr))
    }

    /// The `len` bytes at guest address `addr`, which must lie in one region.
    ///
    /// # Errors
    /// When they do not lie in one region.
    pub fn area(&self, addr: u64, len: u64) -> Result<Area, RamError> {
        let block = self.0.containing(addr);
        block
            .and_then(|block| Area::in_block(block, addr, len))
            .ok_or(RamError::OutOfRange { addr, len })
    }

    /// Allocates `len` bytes aligned to `align`, a power of two, and returns their guest address,
    /// which is never 0. The bytes keep their old values.
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
            let Some(remaining) = size.checked_sub(gap).and_then(|s| s.checked_sub(len)) else {
                continue;
            };
            let parts = [(start, gap), (addr + len, remaining)];
            free.splice(at..=at, parts.into_iter().filter(|p| p.1 != 0));
            return Ok(addr);
        }
        Err(RamError::Exhausted(len))
    }

    /// Allocates like [`GuestRam::alloc`], sets every byte to 0 and returns the range as an area.
    ///
    /// # Errors
    /// When no free range is large enough.
    pub fn alloc_area(&self, len: u64, align: u64) -> Result<Area, RamError> {
        let area = self.area(self.alloc(len, align)?, len)?;
        area.zero();
        Ok(area)
    }

    /// Frees a range that [`GuestRam::alloc`] returned. The caller must not use it any more.
    pub fn free(&self, addr: u64, len: u64) {
        let mut free = self.0.free();
        let at = free.partition_point(|&(start, _)| start < addr);
        free.insert(at, (addr, len));
        // A range never crosses two regions, because adjacent regions are still separate mappings.
        let can_merge = |a: (u64, u64), b: (u64, u64)| {
            a.0 + a.1 == b.0 && !self.0.blocks.iter().any(|r| r.spec.guest_addr == b.0)
        };
        if at + 1 < free.len() && can_merge(free[at], free[at + 1]) {
            free[at].1 += free[at + 1].1;
            free.remove(at + 1);
        }
        if at > 0 && can_merge(free[at - 1], free[at]) {
            free[at - 1].1 += free[at].1;
            free.remove(at);
        }
    }

    /// The number of unallocated bytes, which may lie in several ranges.
    #[must_use]
    pub fn available(&self) -> u64 {
        self.0.free().iter().map(|&(_, size)| size).sum()
    }

    /// Copies from guest address `addr` to `out`. The range may cross adjacent regions.
    ///
    /// # Errors
    /// When a byte of the range is in a hole. The bytes before it may have been copied.
    pub fn read(&self, addr: u64, out: &mut [u8]) -> Result<(), RamError> {
        self.each_part(addr, out.len(), |area, from, to| {
            area.read(0, &mut out[from..to]);
        })
    }

    /// Copies `data` to guest address `addr`. The range may cross adjacent regions.
    ///
    /// # Errors
    /// When a byte of the range is in a hole. The bytes before it may have been copied.
    pub fn write(&self, addr: u64, data: &[u8]) -> Result<(), RamError> {
        self.each_part(addr, data.len(), |area, from, to| {
            area.write(0, &data[from..to]);
        })
    }

    /// Calls `act` for each part of a range that lies in one region, with the start and end of the
    /// part in the range.
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
    /// The region that contains a guest address.
    fn containing(&self, addr: u64) -> Option<&Arc<MappedBlock>> {
        self.blocks.iter().find(|b| {
            addr.checked_sub(b.spec.guest_addr)
                .is_some_and(|offset| offset < b.spec.size)
        })
    }

    fn free(&self) -> MutexGuard<'_, Vec<(u64, u64)>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The range of a region that may be allocated: all but guest address 0, which drivers and devices
/// often take for "no address".
fn exclude_address_zero(addr: u64, size: u64) -> (u64, u64) {
    let skip = if addr == 0 { PAGE } else { 0 };
    (addr + skip, size - skip)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_written_by_the_guest_are_visible_to_the_device() {
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
    fn access_to_a_hole_or_beyond_the_end_is_out_of_range() {
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
    fn access_outside_an_area_panics() {
        GuestRam::new(0x2000)
            .unwrap()
            .area(0x1000, 16)
            .unwrap()
            .set(16, 1);
    }

    #[test]
    fn allocations_do_not_overlap_and_can_be_freed() {
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
