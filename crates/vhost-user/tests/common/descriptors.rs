//! The open descriptors of a test's process.

use std::fs::read_dir;
use std::thread;
use std::time::{Duration, Instant};

/// The number of open descriptors.
pub fn open_fds() -> usize {
    read_dir("/proc/self/fd").unwrap().count()
}

/// Waits until `count` descriptors are open: those that a front-end sent are closed by a thread of
/// their own.
pub fn assert_open_fds(count: usize) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while open_fds() != count && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(open_fds(), count);
}
