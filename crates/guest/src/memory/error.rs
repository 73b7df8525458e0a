//! The errors of guest memory.

use virtionet_virtqueue::memory::MemoryError;

/// Why guest memory could not be made or reached.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// memfd_create or its sizing failed.
    #[error("cannot make a memfd of {size} bytes for guest memory: {source}; lower the size")]
    Create {
        /// The number of bytes requested.
        size: u64,
        /// The kernel's error.
        source: std::io::Error,
    },
    /// A region is empty, is not made of whole pages, or ends beyond 2^64.
    #[error(
        "guest memory region at {0:#x} with size {1:#x} cannot be made; give it whole pages below 2^64"
    )]
    Layout(u64, u64),
    /// The kernel refused the mapping.
    #[error("cannot map {size} bytes of guest memory: {reason}; lower the size")]
    Map {
        /// The number of bytes requested.
        size: u64,
        /// The text of the mapping's error.
        reason: String,
    },
    /// A range does not lie in one region.
    #[error(
        "{len} bytes at guest address {addr:#x} are not in guest memory; check the address against the regions"
    )]
    OutOfRange {
        /// The first guest physical address.
        addr: u64,
        /// The number of bytes requested.
        len: u64,
    },
    /// There is no unallocated range of that size.
    #[error("guest memory has no unallocated range of {0} bytes; make it larger")]
    Exhausted(u64),
    /// The device's view in this process could not be made.
    #[error(transparent)]
    View(#[from] MemoryError),
    /// The file could not be duplicated.
    #[error("cannot duplicate the guest memory's file: {0}; raise the limit of open files")]
    Duplicate(std::io::Error),
    /// Its pages cannot arrive one by one.
    #[error("the pages of guest memory cannot be taken away: {0}; this needs Linux 5.11")]
    PageSource(std::io::Error),
}
