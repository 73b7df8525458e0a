//! The areas of virtqueues in guest memory: where they are, and where writes to them are logged.
//!
//! SET_VRING_ADDR gives their addresses in the front-end's address space, or behind an IOMMU as I/O
//! virtual addresses.

use std::sync::Arc;

use vm_memory::ByteValued;

use super::array::GuestArray;
use super::dirty_log::AreaLog;
use super::iotlb::{Access, Iotlb, IovaRange};
use super::stitch::{AREA_PAGE, AreaPage, stitch};
use super::{FilePlace, GuestMemory, MappedRegion, array_bytes, to_u64};

/// What an IOMMU must permit in all areas of a virtqueue. Drivers map them for both directions.
const AREA_ACCESS: Access = Access::ReadWrite;

impl GuestMemory {
    /// Whether all pages of these areas of a virtqueue are known: always, unless an IOMMU
    /// translates their addresses. The front-end is asked for those that are not.
    #[must_use]
    pub fn knows_areas(&self, areas: &[IovaRange]) -> bool {
        let Some(iotlb) = &self.iotlb else {
            return true;
        };
        // All of them, because each that is missing is asked for.
        let missing = areas
            .iter()
            .filter(|area| !iotlb.request(**area, AREA_ACCESS));
        missing.count() == 0
    }

    /// The array of `len` values at an address as SET_VRING_ADDR gives it: a *front-end* address,
    /// or behind an IOMMU an I/O virtual address. Returns `None` when the address is not aligned for
    /// `T`, the array does not lie in one region, or its translation is not known.
    #[must_use]
    pub fn user_array<T: ByteValued>(&self, addr: u64, len: u16) -> Option<GuestArray<T>> {
        self.area(addr, array_bytes::<T>(len)?)?.array(0, len)
    }

    /// The `len` bytes at an address as SET_VRING_ADDR gives it. Returns `None` as
    /// [`GuestMemory::user_array`] does.
    pub(crate) fn area(&self, addr: u64, len: u64) -> Option<RingArea> {
        let (region, offset) = self.find_area(addr, len)?;
        Some(RingArea {
            region,
            offset,
            len,
        })
    }

    /// The place of an address as SET_VRING_ADDR gives it in the file of its region. Returns `None`
    /// when it lies in no region.
    pub(crate) fn file_place(&self, addr: u64) -> Option<FilePlace> {
        let (region, offset) = self.find_area(addr, 1)?;
        Some(FilePlace {
            offset: region.file.offset.checked_add(to_u64(offset))?,
            ..region.file
        })
    }

    /// The address in this process of an address as SET_VRING_ADDR gives it, as a number with which
    /// the kernel can be asked about its page. Returns `None` when it lies in no region.
    #[must_use]
    pub fn host_address(&self, addr: u64) -> Option<usize> {
        let (region, offset) = self.find_area(addr, 1)?;
        region.host().addr().checked_add(offset)
    }

    /// The log of an area of a virtqueue that begins with `array` and that the front-end wants to
    /// find at address `start`; `None` when nothing is logged. That address is a *guest* address,
    /// except behind an IOMMU: then the guest address is that of the memory where the area is.
    pub(crate) fn used_area_log<T: ByteValued>(
        &self,
        start: u64,
        array: &GuestArray<T>,
    ) -> Option<AreaLog> {
        match self.iotlb {
            None => self.log.as_ref().map(|log| log.area(start)),
            Some(_) => self.area_log(array),
        }
    }

    /// The log of an area of a virtqueue that begins with `array`; `None` when nothing is logged.
    pub(crate) fn area_log<T: ByteValued>(&self, array: &GuestArray<T>) -> Option<AreaLog> {
        self.log.as_ref()?.area_of(array.region(), array.offset())
    }

    /// The region that holds the `len` bytes at an address as SET_VRING_ADDR gives it, and their
    /// offset in it.
    fn find_area(&self, addr: u64, len: u64) -> Option<(Arc<MappedRegion>, usize)> {
        let shared = |(region, offset): (&Arc<MappedRegion>, _)| (Arc::clone(region), offset);
        let Some(iotlb) = &self.iotlb else {
            return self.find_user(addr, len).map(shared);
        };
        let range = IovaRange::new(addr, len)?;
        let user_addr = iotlb.contiguous(range, AREA_ACCESS);
        if let Some(found) = user_addr.and_then(|addr| self.find_user(addr, len)) {
            return Some(shared(found));
        }
        // Accesses to missing pages are reported in the mappings of regions only. In another one the kernel
        // would take them for zeros, and so would the guest. The vring starts when all have arrived.
        if self.is_in_postcopy {
            return None;
        }
        let region = stitch(&self.area_pages(iotlb, range)?)?;
        let offset = usize::try_from(addr % AREA_PAGE).ok()?;
        Some((Arc::new(region), offset))
    }

    /// The pages of a range, if the translations of all are known.
    fn area_pages(&self, iotlb: &Iotlb, range: IovaRange) -> Option<Vec<AreaPage<'_>>> {
        let pages = range.first() / AREA_PAGE..=range.last() / AREA_PAGE;
        let page = |number: u64| {
            let iova = number * AREA_PAGE;
            let found = iotlb.find(iova, AREA_ACCESS)?;
            let user_addr = found
                .user_addr
                .checked_add(iova.checked_sub(found.start())?)?;
            let (region, offset) = self.find_user(user_addr, AREA_PAGE)?;
            Some(AreaPage {
                region,
                offset: to_u64(offset),
            })
        };
        pages.map(page).collect()
    }
}

/// An area of a virtqueue, mapped into this process in one piece.
pub(crate) struct RingArea {
    region: Arc<MappedRegion>,
    /// In the region.
    offset: usize,
    len: u64,
}

impl RingArea {
    /// The array of `len` values at byte `at` of the area. Returns `None` when it is not aligned for
    /// `T` or does not lie in the area.
    pub(crate) fn array<T: ByteValued>(&self, at: u64, len: u16) -> Option<GuestArray<T>> {
        let end = at.checked_add(array_bytes::<T>(len)?)?;
        if end > self.len {
            return None;
        }
        let offset = self.offset.checked_add(usize::try_from(at).ok()?)?;
        GuestArray::at(&self.region, offset, len)
    }
}
