//! An area of a virtqueue whose pages do not follow each other in guest memory.
//!
//! Behind an IOMMU a driver may allocate it page by page. The pages are mapped once more, one after
//! the other, so that the code of a virtqueue need not know:
//!
//! ```text
//! I/O virtual addresses   [ page 0 | page 1 | page 2 ]
//! guest memory            .. [page 1] .... [page 0] .. [page 2] ..
//! this process            [ page 0 | page 1 | page 2 ]
//! ```
#![allow(unsafe_code)]

use std::os::fd::AsRawFd;
use std::sync::Arc;

use vm_memory::MmapRegion;

use super::fault::TrackedRegion;
use super::{MappedRegion, RegionSpec};

/// The size of the pages that are put together, in bytes.
pub(super) const AREA_PAGE: u64 = 4096;

/// A page of guest memory.
#[derive(Debug)]
pub(super) struct AreaPage<'m> {
    pub(super) region: &'m Arc<MappedRegion>,
    /// Its offset in the region, a multiple of its size.
    pub(super) offset: u64,
}

impl AreaPage<'_> {
    /// Its guest address.
    fn guest_addr(&self) -> Option<u64> {
        self.region.spec.guest_addr.checked_add(self.offset)
    }
}

/// Maps `pages` one after the other. Returns `None` if the kernel refuses, which it does for pages
/// of huge files.
pub(super) fn stitch(pages: &[AreaPage<'_>]) -> Option<MappedRegion> {
    let page_size = usize::try_from(AREA_PAGE).ok()?;
    let size = page_size.checked_mul(pages.len())?;
    // It reserves the addresses, and unmaps all of them when it is dropped.
    let mapping = MmapRegion::new(size).ok()?;
    for (at, page) in pages.iter().enumerate() {
        let file = page.region.mapping.file_offset()?;
        let offset = file.start().checked_add(page.offset)?;
        // SAFETY: the address is that of one page within `mapping`, which nobody else knows, so no
        // reference and no other mapping is replaced. The file outlives the call.
        let mapped = unsafe {
            libc::mmap(
                mapping.as_ptr().add(at * page_size).cast(),
                page_size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_FIXED,
                file.file().as_raw_fd(),
                i64::try_from(offset).ok()?,
            )
        };
        if mapped == libc::MAP_FAILED {
            return None;
        }
    }
    let guest_pages = pages.iter().map(AreaPage::guest_addr);
    Some(MappedRegion {
        spec: RegionSpec {
            guest_addr: 0,
            size: u64::try_from(size).ok()?,
            user_addr: 0,
            file_offset: 0,
        },
        file: pages.first()?.region.file,
        stitched: Some(guest_pages.collect::<Option<_>>()?),
        tracked: TrackedRegion::new(mapping.as_ptr(), size),
        mapping,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::GuestMemory;
    use crate::testing::region;

    #[test]
    fn pages_of_several_regions_are_mapped_in_the_given_order() {
        let regions = [0, 0x10_0000].map(|at| Arc::new(region(at, at, 4 * AREA_PAGE)));
        let memory = GuestMemory::new(regions.to_vec()).unwrap();
        let places = [(1, 3), (0, 0), (1, 0)];
        let pages: Vec<_> = places
            .iter()
            .map(|(region, page)| AreaPage {
                region: &regions[*region],
                offset: page * AREA_PAGE,
            })
            .collect();
        let stitched = stitch(&pages).unwrap();
        let guest_pages = [0x10_3000, 0, 0x10_0000];
        assert_eq!(stitched.stitched.as_deref(), Some(&guest_pages[..]));
        let array = super::super::array::GuestArray::<u16>::at(&Arc::new(stitched), 0, 3 * 2048);
        let array = array.unwrap();
        for (n, page) in (0..).zip(guest_pages) {
            array.set(2048 * n + 5, 100 + n);
            let mut bytes = [0; 2];
            assert!(memory.read(page + 10, &mut bytes));
            assert_eq!(u16::from_ne_bytes(bytes), 100 + n);
            assert!(memory.write(page + 20, &[7, 0]));
            assert_eq!(array.get(2048 * n + 10), 7);
        }
    }
}
