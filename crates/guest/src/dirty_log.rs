//! The log in which a back-end notes the pages that it writes, and which a front-end reads during a
//! migration.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;

use virtionet_virtqueue::memory::RegionSpec;

use crate::error::Error;
use crate::frontend::{VHOST_F_LOG_ALL, VHOST_VRING_F_LOG_MASK, user_addresses};
use crate::memory::{GuestRam, RamError, to_u64};
use crate::test_frontend::TestFrontend;

/// The bytes of guest memory for which one bit stands.
pub const LOG_PAGE: u64 = 4096;

/// A log for all addresses of a guest's memory.
#[derive(Debug)]
pub struct DirtyLog {
    /// The log's memfd.
    file: GuestRam,
    size: u64,
}

impl DirtyLog {
    /// An empty log for `ram`.
    ///
    /// # Errors
    /// When the host refuses the memory.
    pub fn new(ram: &GuestRam) -> Result<Self, RamError> {
        Self::of_regions(&ram.regions())
    }

    /// An empty log for a memory table with these regions.
    ///
    /// # Errors
    /// When the host refuses the memory.
    pub fn of_regions(regions: &[RegionSpec]) -> Result<Self, RamError> {
        let ends = regions.iter().map(|r| r.guest_addr + r.size);
        let size = ends.max().unwrap_or(0).div_ceil(8 * LOG_PAGE);
        let file = GuestRam::new(size.next_multiple_of(LOG_PAGE))?;
        Ok(Self { file, size })
    }

    /// Its size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The file that the back-end gets.
    #[must_use]
    pub fn file(&self) -> &File {
        self.file.file()
    }

    /// The pages that were written since the last call, by their numbers.
    ///
    /// # Errors
    /// When the file cannot be read or written.
    pub fn take(&self) -> std::io::Result<BTreeSet<u64>> {
        let mut bytes = vec![0; usize::try_from(self.size).unwrap_or(0)];
        self.file().read_exact_at(&mut bytes, 0)?;
        self.file().write_all_at(&vec![0; bytes.len()], 0)?;
        let pages = |(at, byte): (u64, u8)| {
            let set = (0..8).filter(move |bit| byte >> bit & 1 == 1);
            set.map(move |bit| 8 * at + bit)
        };
        Ok((0..).zip(bytes).flat_map(pages).collect())
    }
}

/// The content of a guest's memory at one time.
#[derive(Debug)]
pub struct MemorySnapshot(BTreeMap<u64, Vec<u8>>);

impl MemorySnapshot {
    /// The present content of `ram`.
    ///
    /// # Errors
    /// Never: all pages of its regions exist.
    pub fn of(ram: &GuestRam) -> Result<Self, RamError> {
        let mut pages = BTreeMap::new();
        for region in ram.regions() {
            let end = region.guest_addr + region.size;
            for page in region.guest_addr / LOG_PAGE..end / LOG_PAGE {
                let mut bytes = vec![0; usize::try_from(LOG_PAGE).unwrap_or(0)];
                ram.read(page * LOG_PAGE, &mut bytes)?;
                pages.insert(page, bytes);
            }
        }
        Ok(Self(pages))
    }

    /// The numbers of the pages that are different in `later`.
    #[must_use]
    pub fn changed_in(&self, later: &Self) -> BTreeSet<u64> {
        let pages = self.0.iter();
        let changed = pages.filter(|(page, bytes)| later.0.get(page) != Some(bytes));
        changed.map(|(page, _)| *page).collect()
    }
}

impl TestFrontend {
    /// Makes the back-end log what it writes in `log`, with the messages that QEMU sends when a
    /// migration begins.
    ///
    /// # Errors
    /// When the connection fails or the back-end refuses.
    pub fn start_logging(&mut self, log: &DirtyLog) -> Result<(), Error> {
        use std::os::fd::AsRawFd;
        let fd = log.file().as_raw_fd();
        self.connection.set_log_base(log.size(), 0, fd)?;
        self.send_logging(true)
    }

    /// Makes the back-end log no longer, as QEMU does when a migration is cancelled.
    ///
    /// # Errors
    /// When the connection fails or the back-end refuses.
    pub fn stop_logging(&mut self) -> Result<(), Error> {
        self.send_logging(false)
    }

    /// Sends the features and then the addresses of the vrings, once for each queue pair.
    fn send_logging(&mut self, on: bool) -> Result<(), Error> {
        let (log_all, flags) = match on {
            true => (VHOST_F_LOG_ALL, VHOST_VRING_F_LOG_MASK),
            false => (0, 0),
        };
        let features = self.features() | log_all;
        let addresses: Vec<_> = self.rings().iter().map(|ring| ring.addresses).collect();
        for (ring, at) in addresses.into_iter().enumerate() {
            if ring % 2 == 0 {
                self.connection.set_features(features)?;
            }
            let user = match self.has_iommu() {
                false => user_addresses(self.ram(), at)?,
                true => at,
            };
            let index = u32::try_from(to_u64(ring)).unwrap_or(u32::MAX);
            self.connection
                .set_vring_user_addr(index, flags, user, at.device)?;
        }
        Ok(())
    }
}
