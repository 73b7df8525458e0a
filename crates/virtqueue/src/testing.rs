//! Guest memory for the unit tests of this crate, and a process that is killed between two stores.
use std::cell::Cell;
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

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

thread_local! {
    /// The number of stores to arrays that this thread makes before it is killed; `None` for no
    /// end.
    static STORES_LEFT: Cell<Option<u32>> = const { Cell::new(None) };
    /// The number of stores that this thread has made.
    static STORES_MADE: Cell<u32> = const { Cell::new(0) };
}

/// What a killed thread unwinds with.
struct Killed;

/// Called before each store to an array.
pub(crate) fn before_store() {
    match STORES_LEFT.get() {
        // Without the message of a panic.
        Some(0) => resume_unwind(Box::new(Killed)),
        left => STORES_LEFT.set(left.map(|left| left - 1)),
    }
    STORES_MADE.set(STORES_MADE.get().wrapping_add(1));
}

/// The number of stores that this thread has made so far.
pub(crate) fn stores_made() -> u32 {
    STORES_MADE.get()
}

/// Runs `work` and kills it before its store number `stores`, counted from 0. `None` when it was
/// killed.
pub(crate) fn killed_after<T>(stores: u32, work: impl FnOnce() -> T) -> Option<T> {
    STORES_LEFT.set(Some(stores));
    let outcome = catch_unwind(AssertUnwindSafe(work));
    STORES_LEFT.set(None);
    match outcome {
        Ok(done) => Some(done),
        Err(cause) if cause.is::<Killed>() => None,
        Err(cause) => resume_unwind(cause),
    }
}
