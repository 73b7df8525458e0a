//! Guest memory, mapped into this process.
//!
//! A [`GuestMemory`] is an immutable snapshot of [`MappedRegion`]s. A change of the memory table
//! makes a new snapshot, and each virtqueue is bound to it while the virtqueue is locked. Code that
//! runs therefore never sees the table change.
//!
//! ```text
//! guest address, or       MappedRegion          address in this process
//! front-end address  -->  (offset in region) -->  (offset in mapping)
//! ```
//!
//! There are three ways to access guest memory, all of them from this module:
//!
//! - [`GuestArray`] is an array of a virtqueue itself: descriptors, or the entries of the available
//!   or used ring. It keeps its region mapped for as long as it exists.
//! - [`GuestSlice`] is a segment of a buffer with the layout of the kernel's `iovec`, so that a
//!   chain can be passed to `readv` and `writev` without conversion.
//! - [`SegmentList`] stores the slices of a burst and is bound to one snapshot. It translates an
//!   (address, length) pair as a whole and caches the region that it found last.
//!
//! During a live migration a snapshot has a log of the pages that the device writes ([`DirtyLog`]),
//! and after a migration by postcopy some pages have not arrived yet ([`MissingPages`]).
//! If the guest's device is behind an IOMMU, it has the translations of I/O virtual addresses
//! ([`Iotlb`]), which stand in the place of guest addresses, and of front-end addresses where those
//! say where a virtqueue lies.
//!
//! **The guest writes this memory while the device reads it.** Each load is volatile or atomic and
//! copies the value once; the copy is what is checked and then used. No reference (`&[u8]`) into
//! guest memory is ever made.
#![allow(unsafe_code)]

mod areas;
mod array;
mod dirty_log;
mod fault;
mod iotlb;
#[cfg(loom)]
mod loom;
mod segments;
mod slice;
mod stitch;
mod translation;
mod userfault;

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use vm_memory::{FileOffset, MmapRegion};

use dirty_log::SnapshotLog;
use fault::TrackedRegion;

use array::array_bytes;
pub(crate) use array::{Descriptor, impl_byte_valued};
pub use array::{GuestArray, GuestArrayRef, full_fence};
pub(crate) use dirty_log::AreaLog;
pub use dirty_log::{DirtyLog, LOG_PAGE, LogError, LogWriter};
pub use fault::{LossWatch, survive_lost_memory};
pub use iotlb::{
    Access, Iotlb, IotlbCounts, IovaRange, MAX_PENDING_MISSES, MAX_TRANSLATIONS, Miss, Translation,
    UpdateEffect,
};
#[cfg(loom)]
pub use loom::{DisabledOrdering, clear_model, disable_ordering};
pub use segments::{BadAddress, SegmentList};
pub(crate) use segments::{MAX_SINGLE_LEN, SegmentWriter, SingleTranslator};
pub use slice::GuestSlice;
pub(crate) use translation::MissingTranslation;
pub use userfault::{MissingPages, PostcopyError};

/// The largest number of regions in a memory table. QEMU has at most as many memory slots.
pub const MAX_REGIONS: usize = 509;

/// Where one region of guest memory lies, as SET_MEM_TABLE and ADD_MEM_REG describe it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionSpec {
    /// The first guest physical address.
    pub guest_addr: u64,
    /// The size in bytes.
    pub size: u64,
    /// The first address in the front-end's address space. SET_VRING_ADDR uses that address space.
    pub user_addr: u64,
    /// The offset of the region in its file in bytes.
    pub file_offset: u64,
}

/// Why a memory table cannot be used. The front-end's request or its file is at fault.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The size of a region is 0.
    #[error("memory region at guest address {0:#x} has size 0; give it a size")]
    Empty(u64),
    /// The end of a region is beyond 2^64.
    #[error(
        "memory region at guest address {0:#x} with size {1:#x} wraps around; check the memory table"
    )]
    Wraps(u64, u64),
    /// The file of a region ends before the region does.
    #[error(
        "memory region at guest address {guest_addr:#x} needs {needed} bytes of its file, which has {actual}; the front-end must share the whole file"
    )]
    ShortFile {
        /// The first guest physical address of the region.
        guest_addr: u64,
        /// Offset plus size in bytes.
        needed: u64,
        /// The size of the file in bytes.
        actual: u64,
    },
    /// Two regions have guest addresses or front-end addresses in common.
    #[error(
        "memory regions at guest addresses {0:#x} and {1:#x} overlap; each address may be mapped once"
    )]
    Overlap(u64, u64),
    /// The table has more than [`MAX_REGIONS`] regions.
    #[error("{0} memory regions are too many; this back-end supports at most {MAX_REGIONS}")]
    TooMany(usize),
    /// The kernel refused the mapping.
    #[error(
        "cannot map {size} bytes of guest memory at offset {offset:#x} of its file: {reason}; the offset must be page aligned and the file shared"
    )]
    Map {
        /// The size in bytes.
        size: u64,
        /// The offset in the file in bytes.
        offset: u64,
        /// The text of the mapping's error.
        reason: String,
    },
    /// The file could not be examined.
    #[error("cannot read the size of a memory region's file: {0}")]
    Stat(#[from] io::Error),
    /// A region that is to be removed is not in the table.
    #[error("there is no memory region at guest address {0:#x} with size {1:#x} to remove")]
    Unknown(u64, u64),
}

/// A place in a file, by the numbers that the kernel gives the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FilePlace {
    /// The number of its file system.
    pub(crate) device: u64,
    /// Its number in the file system.
    pub(crate) inode: u64,
    /// The offset in bytes.
    pub(crate) offset: u64,
}

/// One region of guest memory, mapped into this process.
#[derive(Debug)]
pub struct MappedRegion {
    spec: RegionSpec,
    /// Where it begins in its file.
    file: FilePlace,
    /// The guest addresses of its pages, if it is an area that was put together from pages of other
    /// regions.
    stitched: Option<Vec<u64>>,
    /// Before the mapping, because fields are dropped in their order.
    tracked: TrackedRegion,
    mapping: MmapRegion,
}

impl MappedRegion {
    /// Maps `spec` from `file`.
    ///
    /// # Errors
    /// When the region is empty, wraps, cannot be mapped, or ends behind the end of its file.
    pub fn map(spec: RegionSpec, file: File) -> Result<Self, MemoryError> {
        // Before the size is read: it cannot become less after that.
        seal_against_shrinking(&file);
        Self::map_unsealed(spec, file)
    }

    /// A copy of the descriptor of its file.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn copy_of_file(&self) -> io::Result<File> {
        let file = self.mapping.file_offset().map(FileOffset::file);
        file.ok_or(io::ErrorKind::NotFound)?.try_clone()
    }

    /// The same without a seal, for files that have none. If they shrink, the region is lost (see
    /// [`survive_lost_memory`]).
    fn map_unsealed(spec: RegionSpec, file: File) -> Result<Self, MemoryError> {
        let wraps = || MemoryError::Wraps(spec.guest_addr, spec.size);
        if spec.size == 0 {
            return Err(MemoryError::Empty(spec.guest_addr));
        }
        spec.guest_addr.checked_add(spec.size).ok_or_else(wraps)?;
        spec.user_addr.checked_add(spec.size).ok_or_else(wraps)?;
        let needed = spec.file_offset.checked_add(spec.size).ok_or_else(wraps)?;
        let metadata = file.metadata()?;
        let actual = metadata.len();
        let identity = FilePlace {
            device: metadata.dev(),
            inode: metadata.ino(),
            offset: spec.file_offset,
        };
        if actual < needed {
            return Err(MemoryError::ShortFile {
                guest_addr: spec.guest_addr,
                needed,
                actual,
            });
        }
        let refused = |reason: String| MemoryError::Map {
            size: spec.size,
            offset: spec.file_offset,
            reason,
        };
        let size = usize::try_from(spec.size).map_err(|e| refused(e.to_string()))?;
        let mapping = MmapRegion::from_file(FileOffset::new(file, spec.file_offset), size)
            .map_err(|e| refused(e.to_string()))?;
        let tracked = TrackedRegion::new(mapping.as_ptr(), size);
        Ok(Self {
            spec,
            file: identity,
            stitched: None,
            tracked,
            mapping,
        })
    }

    /// Where the region lies.
    #[must_use]
    pub fn spec(&self) -> RegionSpec {
        self.spec
    }

    fn host(&self) -> *mut u8 {
        self.mapping.as_ptr()
    }

    /// The offset of `addr` in the region if the region begins at `start` and holds all `len` bytes
    /// at `addr`.
    fn offset(&self, start: u64, addr: u64, len: u64) -> Option<usize> {
        let offset = addr.checked_sub(start)?;
        let end = offset.checked_add(len)?;
        if end > self.spec.size {
            return None;
        }
        usize::try_from(offset).ok()
    }
}

/// Prevents the file from shrinking, because a region whose file shrinks is lost. A file that does
/// not support seals (hugetlbfs before Linux 4.16, regular files, a memfd whose maker forbids them)
/// stays unchanged.
fn seal_against_shrinking(file: &File) {
    // SAFETY: F_ADD_SEALS reads only its integer argument; for a file without seals it fails.
    unsafe {
        libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_SHRINK);
    }
}

/// An immutable snapshot of the guest's memory: regions in order of guest address that do not
/// overlap.
#[derive(Debug, Default)]
pub struct GuestMemory {
    regions: Vec<Arc<MappedRegion>>,
    /// What the device writes is logged here during a migration.
    log: Option<SnapshotLog>,
    /// What the addresses of a guest behind an IOMMU mean.
    iotlb: Option<Arc<Iotlb>>,
    is_in_postcopy: bool,
}

impl GuestMemory {
    /// A snapshot of `regions`, given in any order.
    ///
    /// # Errors
    /// When two regions overlap in guest or front-end addresses, or there are more than
    /// [`MAX_REGIONS`].
    pub fn new(mut regions: Vec<Arc<MappedRegion>>) -> Result<Self, MemoryError> {
        if regions.len() > MAX_REGIONS {
            return Err(MemoryError::TooMany(regions.len()));
        }
        regions.sort_by_key(|r| r.spec.user_addr);
        check_no_overlap(&regions, |spec| spec.user_addr)?;
        regions.sort_by_key(|r| r.spec.guest_addr);
        check_no_overlap(&regions, |spec| spec.guest_addr)?;
        Ok(Self {
            regions,
            ..Self::default()
        })
    }

    /// A snapshot with one more region (ADD_MEM_REG).
    ///
    /// # Errors
    /// As [`GuestMemory::new`].
    pub fn with_region(&self, region: impl Into<Arc<MappedRegion>>) -> Result<Self, MemoryError> {
        let mut regions = self.regions.clone();
        regions.push(region.into());
        Self::new(regions)
    }

    /// A snapshot without the region that has the guest address, front-end address and size of
    /// `spec` (REM_MEM_REG). The offset in the file is not compared.
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
            ..Self::default()
        })
    }

    /// The same snapshot, in which addresses of the driver are I/O virtual addresses that `iotlb`
    /// translates, or with `None` guest addresses.
    #[must_use]
    pub fn with_iotlb(self, iotlb: Option<Arc<Iotlb>>) -> Self {
        Self { iotlb, ..self }
    }

    /// The translations of I/O virtual addresses, if the guest's device is behind an IOMMU.
    #[must_use]
    pub fn iotlb(&self) -> Option<&Arc<Iotlb>> {
        self.iotlb.as_ref()
    }

    /// The regions, in the order of guest addresses.
    pub fn mapped_regions(&self) -> impl Iterator<Item = &MappedRegion> {
        self.regions.iter().map(|region| &**region)
    }

    /// The regions in order of guest address.
    pub fn regions(&self) -> impl Iterator<Item = RegionSpec> + '_ {
        self.regions.iter().map(|r| r.spec)
    }

    /// Whether pages of a region have vanished, so that it was replaced with zeros.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.regions.iter().any(|region| region.tracked.is_lost())
    }

    /// Whether there is no region.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// Copies from guest memory at a guest address to `out`. Returns false, without any effect,
    /// when the range does not lie in one region. For tests and control paths, not for the data
    /// path.
    #[must_use]
    pub fn read(&self, addr: u64, out: &mut [u8]) -> bool {
        self.find(addr, to_u64(out.len()))
            .is_some_and(|(region, offset)| {
                // SAFETY: the whole range lies in the region's mapping; `out` is private memory.
                unsafe { copy_out(region.host().add(offset), out) };
                true
            })
    }

    /// Copies `data` to guest memory at a guest address. Returns false as [`GuestMemory::read`]
    /// does.
    #[must_use]
    pub fn write(&self, addr: u64, data: &[u8]) -> bool {
        self.find(addr, to_u64(data.len()))
            .is_some_and(|(region, offset)| {
                // SAFETY: the whole range lies in the region's mapping; `data` is private memory.
                unsafe { copy_in(data, region.host().add(offset)) };
                true
            })
    }

    /// Whether the `len` bytes at a front-end address lie in one region.
    #[must_use]
    pub fn has_user_range(&self, user_addr: u64, len: u64) -> bool {
        self.find_user(user_addr, len).is_some()
    }

    /// The region that holds the `len` bytes at a front-end address, and their offset in it.
    fn find_user(&self, user_addr: u64, len: u64) -> Option<(&Arc<MappedRegion>, usize)> {
        self.regions.iter().find_map(|region| {
            let offset = region.offset(region.spec.user_addr, user_addr, len)?;
            Some((region, offset))
        })
    }

    fn find(&self, addr: u64, len: u64) -> Option<(&Arc<MappedRegion>, usize)> {
        let region = self.region_containing(addr)?;
        let offset = region.offset(region.spec.guest_addr, addr, len)?;
        Some((region, offset))
    }

    /// The region that contains a guest address.
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
        // The sum fits: MappedRegion::map checked it in both address spaces.
        if start(low) + low.size > start(high) {
            return Err(MemoryError::Overlap(low.guest_addr, high.guest_addr));
        }
    }
    Ok(())
}

/// Converts a size; a usize fits u64 on every machine that Linux supports.
fn to_u64(n: usize) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}

/// Copies from guest memory.
///
/// # Safety
/// `from` must point to `to.len()` mapped bytes.
unsafe fn copy_out(from: *const u8, to: &mut [u8]) {
    // SAFETY: by contract; the two cannot overlap since `to` is private memory. The guest may write
    // at the same time. The copy then mixes old and new bytes, and the caller checks it as any
    // input.
    unsafe { std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()) }
}

/// Copies to guest memory.
///
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
    fn region_longer_than_its_file_is_refused() {
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
    fn region_with_invalid_size_address_or_offset_is_refused() {
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
    fn regions_that_overlap_in_either_address_space_are_refused() {
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
    fn memory_table_with_more_than_509_regions_is_refused() {
        let regions: Vec<_> = (0..510)
            .map(|n| Arc::new(region(n * 4096, n * 4096, 4096)))
            .collect();
        let full = GuestMemory::new(regions[..MAX_REGIONS].to_vec()).unwrap();
        assert_eq!(full.regions().count(), MAX_REGIONS);
        let error = GuestMemory::new(regions).unwrap_err();
        assert!(matches!(error, MemoryError::TooMany(510)), "{error}");
        let error = full.with_region(region(1 << 30, 1 << 30, 4096));
        assert!(matches!(error, Err(MemoryError::TooMany(510))));
    }

    #[test]
    fn file_of_a_region_that_takes_seals_cannot_shrink_any_more() {
        // SAFETY: the name is a C string, and the result is checked.
        let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), libc::MFD_ALLOW_SEALING) };
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        // SAFETY: the descriptor was just made and has no other owner.
        let file = unsafe { <File as std::os::fd::FromRawFd>::from_raw_fd(fd) };
        file.set_len(8192).unwrap();
        let spec = RegionSpec {
            guest_addr: 0,
            size: 8192,
            user_addr: 0,
            file_offset: 0,
        };
        let _region = MappedRegion::map(spec, file.try_clone().unwrap()).unwrap();
        for len in [0, 4096, 8191] {
            let error = file.set_len(len).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        }
        file.set_len(16_384).unwrap();
    }

    #[test]
    fn segments_cross_adjacent_regions_and_are_refused_in_holes() {
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
            (0x5000, 0),        // one past the end, and no bytes
            (0x3000, 0),        // in the hole, and no bytes
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
    fn slices_copy_bytes_in_both_directions() {
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
    fn front_end_address_is_translated_to_its_page() {
        let memory = GuestMemory::new(vec![Arc::new(region(0, 1 << 20, 8192))]).unwrap();
        let first = memory.host_address(1 << 20).unwrap();
        assert_eq!(first % 4096, 0);
        assert_eq!(memory.host_address((1 << 20) + 8191), Some(first + 8191));
        for outside in [0, (1 << 20) + 8192, u64::MAX] {
            assert_eq!(memory.host_address(outside), None);
        }
    }

    #[test]
    fn array_that_is_misaligned_or_crosses_regions_is_refused() {
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
