//! Segments and tables at I/O virtual addresses: the slow path of a guest behind an IOMMU.

use super::super::iotlb::{Access, IOVA_PAGE};
use super::super::slice::GuestSlice;
use super::super::translation::{MappedIova, RingTranslations};
use super::{BadAddress, CachedRegion, SegmentList};

/// The most segments of a list with translated addresses. The pages of one buffer may be as many
/// segments, so the length of the buffers alone does not limit their number.
const MAX_TRANSLATED_SEGMENTS: usize = 16 * 1024;
/// The most pages of one buffer whose translations are asked for at once.
const MAX_MISSES_PER_BUFFER: usize = 32;

impl SegmentList {
    /// Appends a range of I/O virtual addresses, as one segment or several: what lies in one piece
    /// in this process is one. If translations are missing, they are asked for, and an empty segment
    /// stands for the range. The walk then goes on, so that all that the chain needs is asked for.
    pub(super) fn push_translated(
        &mut self,
        mut addr: u64,
        mut len: u64,
    ) -> Result<(), BadAddress> {
        let from = self.len;
        let mut missed = 0;
        loop {
            let part = match self.find_translation(addr) {
                Some(mapped) => {
                    let offset = addr - mapped.start;
                    let part = len.min(mapped.size - offset);
                    if missed == 0 && part != 0 {
                        self.append_translated(from, GuestSlice::new(mapped.host, offset, part))?;
                    }
                    part
                }
                None => {
                    missed += 1;
                    len.min(IOVA_PAGE - addr % IOVA_PAGE)
                }
            };
            len -= part;
            if len == 0 || missed >= MAX_MISSES_PER_BUFFER {
                break;
            }
            let Some(next) = addr.checked_add(part) else {
                self.len = from;
                return Err(BadAddress);
            };
            addr = next;
        }
        if missed != 0 {
            self.len = from;
            if let Some(translations) = &self.translations {
                translations.note_missing_segment(from);
            }
            self.append(GuestSlice::empty());
        }
        Ok(())
    }

    /// The range with `addr`, which buffers may use. It becomes the cached region if indirect tables
    /// may be read there as well.
    fn find_translation(&mut self, addr: u64) -> Option<MappedIova> {
        let translations = self.translations.as_ref()?;
        let access = translations.buffer_access();
        let mapped = translations.find(&self.memory, addr, access)?;
        if mapped.access.permits(Access::Read) {
            self.cached_region = CachedRegion {
                start: mapped.start,
                size: mapped.size,
                host: mapped.host,
            };
        }
        Some(mapped)
    }

    /// Appends a slice, or adds it to the last one if that is of the same buffer, whose segments
    /// begin at `from`, and the slice follows it.
    fn append_translated(
        &mut self,
        from: usize,
        slice: GuestSlice<'static>,
    ) -> Result<(), BadAddress> {
        if let Some(last) = self.list[from..self.len].last_mut()
            && last.skip(last.len()).vec.iov_base == slice.vec.iov_base
        {
            last.vec.iov_len += slice.len();
            return Ok(());
        }
        if self.len >= MAX_TRANSLATED_SEGMENTS {
            self.len = from;
            return Err(BadAddress);
        }
        self.append(slice);
        Ok(())
    }

    /// Where the table of this many bytes at I/O virtual address `addr` is mapped, if all of it is, in
    /// one piece.
    pub(super) fn translated_table(
        &self,
        translations: &RingTranslations,
        addr: u64,
        bytes: u64,
    ) -> Option<*mut u8> {
        let first = translations.find(&self.memory, addr, Access::Read)?;
        let host = first
            .host
            .wrapping_add(usize::try_from(addr - first.start).ok()?);
        let mut done = first.size - (addr - first.start);
        while done < bytes {
            let next = addr.checked_add(done)?;
            let mapped = translations.find(&self.memory, next, Access::Read)?;
            let offset = next - mapped.start;
            let follows = mapped.host.wrapping_add(usize::try_from(offset).ok()?);
            if follows != host.wrapping_add(usize::try_from(done).ok()?) {
                return None;
            }
            done += mapped.size - offset;
        }
        Some(host)
    }
}
