//! The file of the guest's memory and its mappings.
#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd};

use virtionet_virtqueue::memory::RegionSpec;
use vm_memory::{FileOffset, MmapRegion};

use super::error::RamError;

/// One region of guest memory, mapped into this process.
#[derive(Debug)]
pub(super) struct MappedBlock {
    pub(super) spec: RegionSpec,
    pub(super) mapping: MmapRegion,
}

impl MappedBlock {
    /// Maps `size` bytes at `file_offset` of `file`.
    pub(super) fn map(
        file: &File,
        guest_addr: u64,
        size: u64,
        file_offset: u64,
    ) -> Result<Self, RamError> {
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

/// A memfd of `size` bytes that can be sealed.
pub(super) fn memfd(size: u64) -> Result<File, RamError> {
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
    // SAFETY: the kernel just made this descriptor, and no other value owns it.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len(size).map_err(failed)?;
    Ok(file)
}

/// Converts a size; a usize fits u64 on every machine that Linux supports.
pub(crate) fn to_u64(n: usize) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}
