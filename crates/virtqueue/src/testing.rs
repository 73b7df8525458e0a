//! Guest memory for the unit tests of this crate.
use std::fs::File;

use crate::memory::{MappedRegion, RegionSpec};

/// An unnamed temporary file of `size` bytes.
pub(crate) fn memfd(size: u64) -> File {
    let path = std::env::temp_dir();
    let file = {
        use std::os::unix::fs::OpenOptionsExt;
        File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_TMPFILE)
            .open(path)
            .unwrap()
    };
    file.set_len(size).unwrap();
    file
}

/// A region in a file of its own.
pub(crate) fn region(guest_addr: u64, user_addr: u64, size: u64) -> MappedRegion {
    let spec = RegionSpec {
        guest_addr,
        size,
        user_addr,
        file_offset: 0,
    };
    MappedRegion::map(spec, memfd(size)).unwrap()
}
