//! The guest's memory as this process sees it.
//!
//! A [`GuestMemory`] is an immutable snapshot of mapped [`MappedRegion`]s. A change of the memory table
//! makes a new snapshot; rings are re-bound to it under their lock, so nothing that runs ever sees
//! a table change.
//!
//! Three views leave this module, and they are the only ways to touch guest memory:
//!
//! - [`GuestArray`]: a ring's own arrays (descriptors, available and used elements). It keeps its
//!   region mapped for as long as it lives.
//! - [`GuestSlice`]: a segment of a buffer, laid out as the kernel's `iovec`, so that a chain is
//!   handed to `readv`/`writev` as it stands.
//! - [`SegmentList`]: storage for the slices of a burst, bound to one snapshot; it translates an
//!   (address, length) pair as a whole and remembers the region that the last one lay in.
//!
//! The guest writes this memory while we read it. Every load here is volatile or atomic and copies
//! the value out once; what is checked and what is used is that copy. No reference (`&[u8]`) into
//! guest memory is ever made.
#![allow(unsafe_code)]

mod array;
#[cfg(loom)]
mod loom;
mod segments;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use vm_memory::{ByteValued, FileOffset, MmapRegion};

pub(crate) use array::{Descriptor, impl_byte_valued};
pub use array::{GuestArray, GuestArrayRef, full_fence};
#[cfg(loom)]
pub use loom::{DisabledOrdering, clear_model, disable_ordering};
pub(crate) use segments::SegmentWriter;
pub use segments::{BadAddress, GuestSlice, SegmentList};

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
pub struct MappedRegion {
    spec: RegionSpec,
    mapping: MmapRegion,
}

impl MappedRegion {
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
    regions: Vec<Arc<MappedRegion>>,
}

impl GuestMemory {
    /// Builds a snapshot.
    ///
    /// # Errors
    /// When regions overlap (in guest or front-end addresses) or are too many.
    pub fn new(mut regions: Vec<Arc<MappedRegion>>) -> Result<Self, MemoryError> {
        if regions.len() > MAX_REGIONS {
            return Err(MemoryError::TooMany(regions.len()));
        }
        regions.sort_by_key(|r| r.spec.user_addr);
        check_no_overlap(&regions, |spec| spec.user_addr)?;
        regions.sort_by_key(|r| r.spec.guest_addr);
        check_no_overlap(&regions, |spec| spec.guest_addr)?;
        Ok(Self { regions })
    }

    /// This snapshot with one region more (ADD_MEM_REG).
    ///
    /// # Errors
    /// As [`GuestMemory::new`].
    pub fn with_region(&self, region: MappedRegion) -> Result<Self, MemoryError> {
        let mut regions = self.regions.clone();
        regions.push(Arc::new(region));
        Self::new(regions)
    }

    /// This snapshot without the region of this guest address, front-end address and size
    /// (REM_MEM_REG).
    ///
    /// # Errors
    /// When there is no such region.
    pub fn without_region(&self, spec: RegionSpec) -> Result<Self, MemoryError> {
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

    /// Where a *front-end* address lies in this process, as a number: for asking the kernel about
    /// its page. `None` when it lies in no region.
    #[must_use]
    pub fn host_address(&self, user_addr: u64) -> Option<usize> {
        let at = |r: &Arc<MappedRegion>| {
            let offset = r.offset(r.spec.user_addr, user_addr, 1)?;
            r.host().addr().checked_add(offset)
        };
        self.regions.iter().find_map(at)
    }

    /// An array of `len` values at a *guest* address (an indirect descriptor table).
    /// `None` as for [`GuestMemory::user_array`], but any alignment is taken: the specification
    /// asks none of an indirect table that we could rely on.
    #[must_use]
    pub fn guest_array<T: ByteValued>(&self, addr: u64, len: u16) -> Option<GuestArrayRef<'_, T>> {
        let bytes = array_bytes::<T>(len)?;
        let (region, offset) = self.find(addr, bytes)?;
        // SAFETY: `find` saw that the array's bytes lie in the region's mapping.
        Some(unsafe { GuestArrayRef::new(region.host().add(offset), len) })
    }

    /// Copies out of guest memory at a guest address; false when the range is not mapped in one
    /// region. For tests and control paths, not for the data path.
    #[must_use]
    pub fn read(&self, addr: u64, out: &mut [u8]) -> bool {
        self.find(addr, to_u64(out.len()))
            .is_some_and(|(region, offset)| {
                // SAFETY: the whole range lies in the region's mapping; `out` is private memory.
                unsafe { copy_out(region.host().add(offset), out) };
                true
            })
    }

    /// Copies into guest memory at a guest address; false as for [`GuestMemory::read`].
    #[must_use]
    pub fn write(&self, addr: u64, data: &[u8]) -> bool {
        self.find(addr, to_u64(data.len()))
            .is_some_and(|(region, offset)| {
                // SAFETY: the whole range lies in the region's mapping; `data` is private memory.
                unsafe { copy_in(data, region.host().add(offset)) };
                true
            })
    }

    fn find(&self, addr: u64, len: u64) -> Option<(&Arc<MappedRegion>, usize)> {
        let region = self.region_containing(addr)?;
        let offset = region.offset(region.spec.guest_addr, addr, len)?;
        Some((region, offset))
    }

    /// The region that a guest address lies in.
    fn region_containing(&self, addr: u64) -> Option<&Arc<MappedRegion>> {
        let after = self.regions.partition_point(|r| r.spec.guest_addr <= addr);
        let region = self.regions.get(after.checked_sub(1)?)?;
        (addr - region.spec.guest_addr < region.spec.size).then_some(region)
    }
}

fn check_no_overlap(
    sorted: &[Arc<MappedRegion>],
    start: impl Fn(&RegionSpec) -> u64,
) -> Result<(), MemoryError> {
    for pair in sorted.windows(2) {
        let (low, high) = (&pair[0].spec, &pair[1].spec);
        // No overflow: MappedRegion::map saw that both sums fit.
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
fn to_u64(n: usize) -> u64 {
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
        let error = MappedRegion::map(spec, memfd(4096)).unwrap_err();
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
            let text = MappedRegion::map(spec, memfd(8192))
                .unwrap_err()
                .to_string();
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
        let mut segments = SegmentList::new(memory);
        let lens = |p: &SegmentList| -> Vec<usize> {
            p.slices(0, p.len()).iter().map(GuestSlice::len).collect()
        };
        segments.push(0x1ff0, 32).unwrap();
        assert_eq!(lens(&segments), [16, 16]);
        for (addr, len) in [
            (0x2ff0, 32),       // into the hole
            (0x3000, 1),        // in the hole
            (0, 1),             // before everything
            (0x5000, 0),        // one past the end, no bytes
            (0x3000, 0),        // no bytes in the hole
            (u64::MAX, 2),      // wraps
            (0x1000, u32::MAX), // longer than all memory
        ] {
            assert_eq!(segments.push(addr, len), Err(BadAddress), "{addr:#x} {len}");
            assert_eq!(lens(&segments), [16, 16]);
        }
        segments.push(0x4000, 0).unwrap();
        segments.push(0x4fff, 1).unwrap();
        assert_eq!(lens(&segments), [16, 16, 1]);
    }

    #[test]
    fn slices_carry_bytes_both_ways() {
        let memory = Arc::new(GuestMemory::new(vec![Arc::new(region(0, 0, 4096))]).unwrap());
        assert!(memory.write(100, b"hello world"));
        let mut segments = SegmentList::new(Arc::clone(&memory));
        segments.push(100, 11).unwrap();
        let slice = segments.slices(0, 1)[0];
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
    fn front_end_addresses_lead_to_their_pages() {
        let memory = GuestMemory::new(vec![Arc::new(region(0, 1 << 20, 8192))]).unwrap();
        let first = memory.host_address(1 << 20).unwrap();
        assert_eq!(first % 4096, 0);
        assert_eq!(memory.host_address((1 << 20) + 8191), Some(first + 8191));
        for outside in [0, (1 << 20) + 8192, u64::MAX] {
            assert_eq!(memory.host_address(outside), None);
        }
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
