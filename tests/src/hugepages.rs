//! Huge pages of 2 MiB, taken from the kernel's free memory while somebody needs them.

use std::fs;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::cleanup::{self, Action, Entry};
use crate::paths::require_root;

const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";
/// Free memory may lie in pieces: the kernel is asked to put it together and asked again.
const TRIES: u32 = 5;
const PAUSE: Duration = Duration::from_millis(100);
const PAGE_KIB: u64 = 2048;

/// Pages that were added to the kernel's pool; they are given back when this is dropped.
#[derive(Debug)]
pub struct HugePages {
    added: u64,
    _entry: Entry,
}

impl HugePages {
    /// Makes sure that `count` pages are free, and adds those that are missing.
    ///
    /// # Errors
    /// When this process is not root, or the machine has too little memory.
    pub fn reserve(count: u64) -> Result<Self> {
        let missing = count.saturating_sub(free()?);
        let available = available_kib()? / PAGE_KIB;
        ensure!(
            missing <= available,
            "{missing} more huge pages of 2 MiB are needed, and there is memory for {available}: free some"
        );
        require_root()?;
        let before = read("nr_hugepages")?;
        let wanted = before.saturating_add(missing);
        let mut now = before;
        for n in 0..TRIES {
            if n > 0 {
                // Only a hint to the kernel; what matters is what the pool has afterwards.
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
            _entry: cleanup::register(Action::CallWithNumber(give_back, added)),
        };
        ensure!(
            added >= missing,
            "{missing} more huge pages of 2 MiB are needed, and the kernel found {added}: free some memory, or reserve them at boot (hugepages={count})"
        );
        Ok(pages)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        give_back(self.added);
    }
}

/// As [`release`], at the end of this process, when a failure cannot be handled any more.
fn give_back(count: u64) {
    _ = release(count);
}

/// Takes `count` pages out of the pool again. Those that are in use leave it once they are free.
///
/// # Errors
/// When the kernel refuses.
fn release(count: u64) -> Result<()> {
    match count {
        0 => Ok(()),
        _ => write(read("nr_hugepages")?.saturating_sub(count)),
    }
}

/// Free pages that nobody has reserved.
fn free() -> Result<u64> {
    Ok(read("free_hugepages")?.saturating_sub(read("resv_hugepages")?))
}

/// What the kernel could free without swapping.
fn available_kib() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    text.lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok())
        .context("/proc/meminfo has no MemAvailable")
}

fn read(name: &str) -> Result<u64> {
    let path = format!("{POOL}/{name}");
    let text = fs::read_to_string(&path)
        .with_context(|| format!("{path} cannot be read: this kernel has no 2 MiB pages"))?;
    text.trim()
        .parse()
        .with_context(|| format!("{path} holds no number: {text:?}"))
}

fn write(count: u64) -> Result<()> {
    let path = format!("{POOL}/nr_hugepages");
    fs::write(&path, count.to_string())
        .with_context(|| format!("{count} huge pages cannot be asked for at {path}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_pages_than_there_is_memory_are_refused_and_not_tried() {
        // 2^30 pages are 2 PiB.
        let words = HugePages::reserve(1 << 30).unwrap_err().to_string();
        assert!(words.contains("there is memory for"), "{words}");
        assert!(read("nr_hugepages").unwrap() < 1 << 30);
    }
}
