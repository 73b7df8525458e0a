//! The log of the pages that the device writes, for live migration.
//!
//! A front-end that migrates a guest copies its memory while the guest runs, and must copy again
//! what changes meanwhile. What the driver writes it sees itself; what the device writes it finds in
//! a file that both share: bit `n % 8` of byte `n / 8` stands for the page at guest address
//! `4096 * n`. The device sets bits, and the front-end takes and clears them.
//!
//! ```text
//! device      write page ── full fence ── bit clear? set it
//! front-end                                 take and clear bit ── copy page
//! ```
//!
//! A bit is set *after* the write, because a front-end that takes it before would copy the old page
//! and not hear of the new one. The fence is for the bit that is set already: without it the CPU
//! could read the bit before the write is visible, skip it, and lose the write to a front-end that
//! clears the bit and copies the page in between.
//!
//! A snapshot of guest memory either has a log or has none ([`GuestMemory::with_log`]), so
//! virtqueues begin and end to log when they are bound to another snapshot. Buffers are known by
//! their address in this process; their guest address is looked up only when they are logged
//! ([`LogWriter`]), so that a snapshot without a log costs nothing.
//!
//! [`GuestMemory::with_log`]: super::GuestMemory::with_log
#![allow(unsafe_code)]

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use vm_memory::{FileOffset, MmapRegion};

use super::fault::TrackedRegion;
use super::slice::GuestSlice;
use super::{GuestMemory, MappedRegion, full_fence, seal_against_shrinking, to_u64};

/// The bytes of guest memory for which one bit stands (VHOST_LOG_PAGE).
pub const LOG_PAGE: u64 = 4096;
/// The bytes of guest memory for which one byte of the log stands.
const LOGGED_PER_BYTE: u64 = 8 * LOG_PAGE;

/// Why a log cannot be used. The front-end's request or its file is at fault.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The log has no bytes.
    #[error("the dirty log has size 0; it needs one bit for each page of guest memory")]
    Empty,
    /// Its end is beyond 2^64.
    #[error("the dirty log at offset {0:#x} with size {1:#x} wraps around")]
    Wraps(u64, u64),
    /// It does not begin with a page of its file.
    #[error("the dirty log begins at offset {0:#x} of its file, which is not page aligned")]
    Misaligned(u64),
    /// Its file ends before it does.
    #[error("the dirty log needs {needed} bytes of its file, which has {actual}")]
    ShortFile {
        /// Offset plus size in bytes.
        needed: u64,
        /// The size of the file in bytes.
        actual: u64,
    },
    /// It has no bit for some pages of guest memory.
    #[error(
        "the dirty log has {actual} bytes, but guest memory needs {needed}: one bit for each page up to the highest guest address"
    )]
    TooSmall {
        /// The bytes that guest memory needs.
        needed: u64,
        /// The bytes that the log has.
        actual: u64,
    },
    /// The kernel refused the mapping.
    #[error("cannot map {size} bytes of the dirty log: {reason}")]
    Map {
        /// The size in bytes.
        size: u64,
        /// The text of the mapping's error.
        reason: String,
    },
    /// The file could not be examined.
    #[error("cannot read the size of the dirty log's file: {0}")]
    Stat(#[from] std::io::Error),
}

/// A front-end's log, mapped into this process.
#[derive(Debug)]
pub struct DirtyLog {
    /// Before the mapping, because fields are dropped in their order.
    tracked: TrackedRegion,
    mapping: MmapRegion,
}

impl DirtyLog {
    /// Maps the `size` bytes from `offset` on in `file`. If the file shrinks afterwards, the log is
    /// lost ([`super::survive_lost_memory`]).
    ///
    /// # Errors
    /// When the log is empty, not page aligned, cannot be mapped, or ends behind the end of its
    /// file.
    pub fn map(file: File, size: u64, offset: u64) -> Result<Self, LogError> {
        if size == 0 {
            return Err(LogError::Empty);
        }
        if !offset.is_multiple_of(LOG_PAGE) {
            return Err(LogError::Misaligned(offset));
        }
        let needed = offset
            .checked_add(size)
            .ok_or(LogError::Wraps(offset, size))?;
        // Before the size is read: it cannot become less after that.
        seal_against_shrinking(&file);
        let actual = file.metadata()?.len();
        if actual < needed {
            return Err(LogError::ShortFile { needed, actual });
        }
        let refused = |reason: String| LogError::Map { size, reason };
        let bytes = usize::try_from(size).map_err(|e| refused(e.to_string()))?;
        let mapping = MmapRegion::from_file(FileOffset::new(file, offset), bytes)
            .map_err(|e| refused(e.to_string()))?;
        Ok(Self {
            tracked: TrackedRegion::new(mapping.as_ptr(), bytes),
            mapping,
        })
    }

    /// Checks that the log has a bit for each page below the guest address `end`.
    pub(super) fn check_covers(&self, end: u64) -> Result<(), LogError> {
        let needed = end.div_ceil(LOGGED_PER_BYTE);
        let actual = to_u64(self.mapping.size());
        if needed > actual {
            return Err(LogError::TooSmall { needed, actual });
        }
        Ok(())
    }

    /// Whether pages of the log have vanished, so that it was replaced with private memory that the
    /// front-end does not see.
    pub(super) fn is_lost(&self) -> bool {
        self.tracked.is_lost()
    }

    /// Sets the bits of the pages with the `len` bytes at guest address `addr`. Bits that the log
    /// does not have are left out. A full fence must lie between the writes and this call.
    fn mark(&self, addr: u64, len: u64) {
        let Some(end) = addr.checked_add(len).filter(|_| len != 0) else {
            return;
        };
        let (first, last) = (addr / LOG_PAGE, (end - 1) / LOG_PAGE);
        let last_byte = (last / 8).min(to_u64(self.mapping.size()) - 1);
        for byte in first / 8..=last_byte {
            let low = if byte == first / 8 { first % 8 } else { 0 };
            let high = if byte == last / 8 { last % 8 } else { 7 };
            self.set_bits(byte, (0xff << low) & (0xff >> (7 - high)));
        }
    }

    fn set_bits(&self, byte: u64, mask: u8) {
        let at = usize::try_from(byte).unwrap_or(usize::MAX);
        if at >= self.mapping.size() {
            return;
        }
        // SAFETY: the byte lies in the mapping, and this process accesses it only atomically.
        let bits = unsafe { AtomicU8::from_ptr(self.mapping.as_ptr().add(at)) };
        // Mostly they are set, and a load does not take the cache line from other workers.
        if bits.load(Ordering::Relaxed) & mask != mask {
            bits.fetch_or(mask, Ordering::Release);
        }
    }
}

impl GuestMemory {
    /// A snapshot of the same memory that logs what the device writes, or with `None` one that does
    /// not.
    ///
    /// # Errors
    /// When the log has no bit for some pages of the memory.
    pub fn with_log(&self, log: Option<Arc<DirtyLog>>) -> Result<Self, LogError> {
        Ok(Self {
            regions: self.regions.clone(),
            log: log
                .map(|log| SnapshotLog::new(log, &self.regions))
                .transpose()?,
            iotlb: self.iotlb.clone(),
            is_in_postcopy: self.is_in_postcopy,
        })
    }

    /// Whether writes of the device must be logged.
    #[inline(always)]
    #[must_use]
    pub fn is_logging(&self) -> bool {
        self.log.is_some()
    }

    /// A writer that logs what was written to buffers before this call; `None` when nothing is
    /// logged.
    #[must_use]
    pub fn log_writer(&self) -> Option<LogWriter<'_>> {
        let log = self.log.as_ref()?;
        full_fence();
        Some(log.writer())
    }

    /// Logs all of guest memory as written, if anything is logged.
    pub fn log_all(&self) {
        if let Some(log) = &self.log {
            full_fence();
            log.mark_all();
        }
    }

    /// Whether pages of the log have vanished, so that the front-end does not see what is logged.
    #[must_use]
    pub fn is_log_lost(&self) -> bool {
        self.log.as_ref().is_some_and(SnapshotLog::is_lost)
    }
}

/// A region's address in this process, and its guest address.
#[derive(Debug, Clone, Copy, Default)]
struct HostRange {
    start: usize,
    len: usize,
    guest_addr: u64,
}

impl HostRange {
    fn new(region: &MappedRegion) -> Self {
        Self {
            start: region.host().addr(),
            len: region.mapping.size(),
            guest_addr: region.spec.guest_addr,
        }
    }

    /// The guest address of an address in this process, if it lies in the range.
    fn guest_addr(&self, host: usize) -> Option<u64> {
        let offset = host.checked_sub(self.start)?;
        (offset < self.len).then(|| self.guest_addr.saturating_add(to_u64(offset)))
    }
}

/// The log of one snapshot of guest memory.
#[derive(Debug)]
pub(super) struct SnapshotLog {
    log: Arc<DirtyLog>,
    /// In order of their address in this process.
    ranges: Vec<HostRange>,
}

impl SnapshotLog {
    /// The log for `regions`, which are in order of guest address.
    pub(super) fn new(log: Arc<DirtyLog>, regions: &[Arc<MappedRegion>]) -> Result<Self, LogError> {
        if let Some(last) = regions.last() {
            // The sum fits: MappedRegion::map checked it.
            log.check_covers(last.spec.guest_addr + last.spec.size)?;
        }
        let mut ranges: Vec<_> = regions.iter().map(|r| HostRange::new(r)).collect();
        ranges.sort_by_key(|range| range.start);
        Ok(Self { log, ranges })
    }

    pub(super) fn is_lost(&self) -> bool {
        self.log.is_lost()
    }

    pub(super) fn mark_all(&self) {
        for range in &self.ranges {
            self.log.mark(range.guest_addr, to_u64(range.len));
        }
    }

    /// The log of an area that begins at guest address `start`.
    pub(super) fn area(&self, start: u64) -> AreaLog {
        AreaLog {
            log: Arc::clone(&self.log),
            place: AreaPlace::Contiguous(start),
        }
    }

    /// The log of an area that begins at `offset` of `region`.
    pub(super) fn area_of(&self, region: &Arc<MappedRegion>, offset: usize) -> Option<AreaLog> {
        if region.stitched.is_none() {
            let start = region.spec.guest_addr.checked_add(to_u64(offset))?;
            return Some(self.area(start));
        }
        Some(AreaLog {
            log: Arc::clone(&self.log),
            place: AreaPlace::Stitched {
                region: Arc::clone(region),
                offset: to_u64(offset),
            },
        })
    }

    /// A writer, for what was written before a full fence that lies before its first use.
    pub(super) fn writer(&self) -> LogWriter<'_> {
        LogWriter {
            log: &self.log,
            ranges: &self.ranges,
            last: HostRange::default(),
        }
    }
}

/// Logs writes to buffers. It is made after the writes that it logs.
#[derive(Debug)]
pub struct LogWriter<'m> {
    log: &'m DirtyLog,
    ranges: &'m [HostRange],
    /// The range that was found last: buffers that follow each other mostly lie in one.
    last: HostRange,
}

impl LogWriter<'_> {
    /// Logs the first `len` bytes of a list of slices.
    pub fn mark(&mut self, slices: &[GuestSlice<'_>], len: usize) {
        let mut remaining = len;
        for slice in slices {
            let here = remaining.min(slice.len());
            if here == 0 {
                return;
            }
            if let Some(addr) = self.guest_addr(slice.as_iovec().iov_base.addr()) {
                self.log.mark(addr, to_u64(here));
            }
            remaining -= here;
        }
    }

    /// The guest address of an address in this process; `None` for private memory.
    fn guest_addr(&mut self, host: usize) -> Option<u64> {
        if let found @ Some(_) = self.last.guest_addr(host) {
            return found;
        }
        let after = self.ranges.partition_point(|range| range.start <= host);
        self.last = *self.ranges.get(after.checked_sub(1)?)?;
        self.last.guest_addr(host)
    }
}

/// Logs writes to one area of a virtqueue.
#[derive(Debug)]
pub(crate) struct AreaLog {
    log: Arc<DirtyLog>,
    place: AreaPlace,
}

/// Where an area of a virtqueue is in guest memory.
#[derive(Debug)]
enum AreaPlace {
    /// At this guest address.
    Contiguous(u64),
    /// At this offset of a region that was put together from single pages.
    Stitched {
        region: Arc<MappedRegion>,
        offset: u64,
    },
}

impl AreaLog {
    /// Logs the `len` bytes at `offset` of the area. A full fence must lie between the writes and
    /// this call.
    pub(crate) fn mark(&self, offset: u64, len: u64) {
        match &self.place {
            AreaPlace::Contiguous(start) => {
                if let Some(addr) = start.checked_add(offset) {
                    self.log.mark(addr, len);
                }
            }
            AreaPlace::Stitched {
                region,
                offset: start,
            } => self.mark_pages(region, start.saturating_add(offset), len),
        }
    }

    /// Logs the `len` bytes at `at` of a region that was put together from single pages.
    fn mark_pages(&self, region: &MappedRegion, mut at: u64, len: u64) {
        let pages = region.stitched.as_deref().unwrap_or_default();
        let end = at.saturating_add(len).min(region.spec.size);
        while at < end {
            let next = (at / LOG_PAGE + 1) * LOG_PAGE;
            let page = usize::try_from(at / LOG_PAGE).ok();
            if let Some(page) = page.and_then(|page| pages.get(page)) {
                self.log.mark(page + at % LOG_PAGE, next.min(end) - at);
            }
            at = next;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{GuestMemory, SegmentList, survive_lost_memory};
    use super::*;
    use crate::testing::{memfd, region};

    /// A log of `size` bytes, and its file.
    fn log(size: u64) -> (DirtyLog, File) {
        let file = memfd(size);
        let log = DirtyLog::map(file.try_clone().unwrap(), size, 0).unwrap();
        (log, file)
    }

    /// The pages whose bits are set in the log in `file`.
    fn pages(file: &File) -> Vec<u64> {
        let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
        std::os::unix::fs::FileExt::read_exact_at(file, &mut bytes, 0).unwrap();
        let bits = (0..).zip(bytes);
        bits.flat_map(|(at, byte)| {
            let set = (0..8).filter(move |bit| byte >> bit & 1 == 1);
            set.map(move |bit| 8 * at + bit)
        })
        .collect()
    }

    #[test]
    fn each_page_of_a_range_is_marked_and_no_other() {
        for (addr, len, want) in [
            (0, 0, vec![]),
            (0, 1, vec![0]),
            (4095, 1, vec![0]),
            (4095, 2, vec![0, 1]),
            (4096 * 7, 4096 * 2, vec![7, 8]),
            (4096 * 3 + 5, 4096 * 20, (3..24).collect()),
            (4096 * 31, 1 << 40, vec![31]),
            (4096 * 32, 1, vec![]),
            (u64::MAX, 1, vec![]),
            (u64::MAX, 2, vec![]),
            (u64::MAX - 4096, u64::MAX, vec![]),
        ] {
            let (log, file) = log(4);
            log.mark(addr, len);
            assert_eq!(pages(&file), want, "{addr:#x} {len:#x}");
        }
    }

    #[test]
    fn bits_of_other_pages_in_the_same_byte_stay_set() {
        let (log, file) = log(1);
        log.mark(0, 1);
        log.mark(4096 * 5, 1);
        log.mark(0, 1);
        assert_eq!(pages(&file), [0, 5]);
    }

    #[test]
    fn log_that_is_empty_misaligned_or_beyond_its_file_is_refused() {
        for (size, offset, want) in [
            (0, 0, "size 0"),
            (4096, 8, "offset 0x8"),
            (4097, 4096, "needs 8193 bytes of its file, which has 8192"),
            (1, 8192, "needs 8193"),
            (u64::MAX - 4095, 4096, "wraps"),
            (u64::MAX, 0, "needs"),
        ] {
            let error = DirtyLog::map(memfd(8192), size, offset).unwrap_err();
            assert!(error.to_string().contains(want), "{error}");
        }
        DirtyLog::map(memfd(8192), 4096, 4096).unwrap();
    }

    #[test]
    fn log_without_a_bit_for_the_last_page_is_refused() {
        let page = |at: u64| region(at * LOG_PAGE, at * LOG_PAGE, LOG_PAGE);
        let memory = |at| GuestMemory::new(vec![Arc::new(page(0)), Arc::new(page(at))]).unwrap();
        let log = Arc::new(log(2).0);
        memory(15).with_log(Some(Arc::clone(&log))).unwrap();
        let error = memory(16).with_log(Some(log)).unwrap_err();
        assert!(matches!(
            error,
            LogError::TooSmall {
                needed: 3,
                actual: 2
            }
        ));
    }

    #[test]
    fn slices_are_logged_at_their_guest_addresses_up_to_the_length_written() {
        let regions = (0..20).map(|n| Arc::new(region(0x8000 * n, 0x10_0000 * n, 0x2000)));
        let (log, file) = log(64);
        let memory = GuestMemory::new(regions.collect()).unwrap();
        let memory = Arc::new(memory.with_log(Some(Arc::new(log))).unwrap());
        assert!(memory.is_logging());
        let mut segments = SegmentList::new(Arc::clone(&memory));
        for region in [13, 2, 19] {
            segments.push(0x8000 * region, 0x2000).unwrap();
        }
        let mut private = [0; 64];
        let mut writer = memory.log_writer().unwrap();
        writer.mark(&[GuestSlice::from_private(&mut private)], 64);
        assert!(pages(&file).is_empty());
        writer.mark(segments.slices(0, 3), 0x3001);
        assert_eq!(pages(&file), [8 * 2, 8 * 2 + 1, 8 * 13, 8 * 13 + 1]);
        writer.mark(segments.slices(2, 3), 1);
        assert_eq!(pages(&file).last(), Some(&(8 * 19)));
        memory.log_all();
        assert_eq!(pages(&file).len(), 40);
    }

    #[test]
    fn snapshot_made_from_one_with_a_log_has_none() {
        let memory = GuestMemory::new(vec![Arc::new(region(0, 0, 4096))]).unwrap();
        assert!(!memory.is_logging() && memory.log_writer().is_none());
        let logged = memory.with_log(Some(Arc::new(log(1).0))).unwrap();
        assert!(logged.is_logging());
        assert!(!logged.with_log(None).unwrap().is_logging());
        assert!(
            !logged
                .with_region(region(4096, 4096, 4096))
                .unwrap()
                .is_logging()
        );
    }

    #[test]
    fn log_whose_file_shrinks_is_lost_and_guest_memory_is_not() {
        let _losing = super::super::fault::LOSING.lock();
        survive_lost_memory().unwrap();
        // A file that takes no seals.
        let (log, file) = log(8192);
        let memory = GuestMemory::new(vec![Arc::new(region(0, 0, 4096))]).unwrap();
        let memory = memory.with_log(Some(Arc::new(log))).unwrap();
        memory.log_all();
        assert!(!memory.is_log_lost());
        file.set_len(0).unwrap();
        memory.log_all();
        assert!(memory.is_log_lost() && !memory.is_lost());
    }

    #[test]
    fn file_of_a_log_that_takes_seals_cannot_shrink_any_more() {
        // SAFETY: the name is a C string, and the result is checked.
        let fd = unsafe { libc::memfd_create(c"log".as_ptr(), libc::MFD_ALLOW_SEALING) };
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        // SAFETY: the descriptor was just made and has no other owner.
        let file = unsafe { <File as std::os::fd::FromRawFd>::from_raw_fd(fd) };
        file.set_len(4096).unwrap();
        let _log = DirtyLog::map(file.try_clone().unwrap(), 4096, 0).unwrap();
        assert!(file.set_len(0).is_err());
    }
}
