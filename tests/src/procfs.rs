//! What the kernel counts for a process.

use std::fs;

use anyhow::{Context, Result};

/// The number of its open file descriptors.
///
/// # Errors
/// When the process is gone.
pub fn open_fds(pid: u32) -> Result<usize> {
    let dir = format!("/proc/{pid}/fd");
    Ok(fs::read_dir(&dir)
        .with_context(|| format!("{dir} cannot be read"))?
        .count())
}

/// CPU time of all its threads, those that ended included, in clock ticks of
/// 10 ms (proc_pid_stat(5): utime + stime).
///
/// # Errors
/// When the process is gone.
pub fn cpu_ticks(pid: u32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))
        .with_context(|| format!("process {pid} is gone"))?;
    ticks(&text).with_context(|| format!("no CPU time in {text:?}"))
}

fn ticks(stat: &str) -> Option<u64> {
    // The name in the second field may hold spaces and brackets; the third follows its last one.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut from_utime = rest.split_whitespace().skip(11);
    let utime: u64 = from_utime.next()?.parse().ok()?;
    let stime: u64 = from_utime.next()?.parse().ok()?;
    utime.checked_add(stime)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    #[test]
    fn a_name_with_brackets_does_not_shift_the_fields() {
        let stat = "7 (a ) b (c) S 1 2 3 4 5 6 7 8 9 10 40 2 0 0";
        assert_eq!(ticks(stat), Some(42));
        assert_eq!(ticks("7 (a) S 1"), None);
    }

    #[test]
    fn work_and_open_files_are_counted() {
        let me = std::process::id();
        let before = (open_fds(me).unwrap(), cpu_ticks(me).unwrap());
        let _file = fs::File::open("/dev/null").unwrap();
        let started_at = Instant::now();
        while cpu_ticks(me).unwrap() < before.1 + 3 {
            assert!(started_at.elapsed() < Duration::from_secs(30));
        }
        // Other tests of this process open files too, but do not close ours.
        assert!(open_fds(me).unwrap() > 0);
        assert!(before.0 > 0);
    }
}
