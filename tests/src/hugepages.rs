//! Huge pages of 2 MiB, which are added to the kernel's pool for the duration of a test.

use std::fs;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::cleanup::{self, Action, Entry};
use crate::paths::require_root;

const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";
/// The number of attempts to enlarge the pool. Free memory may be fragmented, so the kernel
/// compacts it before each further attempt.
const ATTEMPTS: u32 = 5;
const PAUSE: Duration = Duration::from_millis(100);
const PAGE_KIB: u64 = 2048;

/// Pages that were added to the kernel's pool. They are released when this value is dropped.
#[derive(Debug)]
pub struct HugePages {
    added: u64,
    _entry: Entry,
}

impl HugePages {
    /// Ensures that `count` pages are free: adds the missing pages to the pool.
    ///
    /// # Errors
    /// When this process is not root, or the machine has too little free memory.
    pub fn reserve(count: u64) -> Result<Self> {
        let missing = count.saturating_sub(free_pages()?);
        let available = available_kib()? / PAGE_KIB;
        ensure!(
            missing <= available,
            "{missing} more huge pages of 2 MiB are needed, and there is memory for {available}: free some"
        );
        require_root()?;
        let before = read("nr_hugepages")?;
        let wanted = before.saturating_add(missing);
        let mut now = before;
        for attempt in 0..ATTEMPTS {
            if attempt > 0 {
                // A failed write is ignored, because the size of the pool is checked below.
                _ = fs::write("/proc/sys/vm/compact_memory", "1");
                sleep(PAUSE);
            }
            write(wanted)?;
            now = read("nr_hugepages")?;
            if now >= wanted {
                break;
            }
        }
        let added = now.saturating_sub(before);
        let pages = Self {
            added,
            _entry: cleanup::register(Action::CallWithNumber(release_ignoring_errors, added)),
        };
        ensure!(
            added >= missing,
            "{missing} more huge pages of 2 MiB are needed, and the kernel provided {added}: free some memory, or reserve them at boot (hugepages={count})"
        );
        Ok(pages)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        release_ignoring_errors(self.added);
    }
}

/// Does the same as [`release`] where a failure cannot be handled: in `Drop` and on exit.
fn release_ignoring_errors(count: u64) {
    _ = release(count);
}

/// Removes `count` pages from the pool. Pages in use leave the pool as soon as they are free.
///
/// # Errors
/// When the size of the pool cannot be read or written.
fn release(count: u64) -> Result<()> {
    match count {
        0 => Ok(()),
        _ => write(read("nr_hugepages")?.saturating_sub(count)),
    }
}

/// Returns the number of free pages that are not reserved.
fn free_pages() -> Result<u64> {
    Ok(read("free_hugepages")?.saturating_sub(read("resv_hugepages")?))
}

/// Returns the memory, in KiB, that the kernel can provide without swapping.
fn available_kib() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    text.lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok())
        .context("/proc/meminfo has no MemAvailable")
}

fn read(name: &str) -> Result<u64> {
    let path = format!("{POOL}/{name}");
    let text = fs::read_to_string(&path).with_context(|| {
        format!("{path} cannot be read: this kernel has no huge pages of 2 MiB")
    })?;
    text.trim()
        .parse()
        .with_context(|| format!("{path} does not contain a number: {text:?}"))
}

fn write(count: u64) -> Result<()> {
    let path = format!("{POOL}/nr_hugepages");
    fs::write(&path, count.to_string())
        .with_context(|| format!("{path} cannot be set to {count} huge pages"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserving_more_pages_than_fit_into_memory_is_an_error_and_leaves_the_pool_unchanged() {
        // 2^30 pages are 2 PiB.
        let error = HugePages::reserve(1 << 30).unwrap_err().to_string();
        assert!(error.contains("there is memory for"), "{error}");
        assert!(read("nr_hugepages").unwrap() < 1 << 30);
    }
}
