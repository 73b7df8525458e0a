//! Resource usage of a process, read from `/proc`.

use std::fs;

use anyhow::{Context, Result};

/// Returns the number of open file descriptors of process `pid`.
///
/// # Errors
/// When the process does not exist.
pub fn open_fds(pid: u32) -> Result<usize> {
    let dir = format!("/proc/{pid}/fd");
    Ok(fs::read_dir(&dir)
        .with_context(|| format!("{dir} cannot be read"))?
        .count())
}

/// Returns the CPU time of all threads of process `pid`, including threads that have exited, in
/// clock ticks of 10 ms (proc_pid_stat(5): utime + stime).
///
/// # Errors
/// When the process does not exist.
pub fn cpu_ticks(pid: u32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))
        .with_context(|| format!("process {pid} does not exist"))?;
    parse_ticks(&text).with_context(|| format!("/proc/{pid}/stat has no CPU time: {text:?}"))
}

/// Returns the resident memory of process `pid` that it shares with no other (RssAnon of
/// proc_pid_status(5)), in KiB.
///
/// # Errors
/// When the process does not exist.
pub fn private_memory_kib(pid: u32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))
        .with_context(|| format!("process {pid} does not exist"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let number = line.and_then(|rest| rest.split_whitespace().next());
    let number = number.with_context(|| format!("/proc/{pid}/status has no RssAnon"))?;
    Ok(number.parse()?)
}

fn parse_ticks(stat: &str) -> Option<u64> {
    // The second field is the name in parentheses, which may itself contain spaces and parentheses,
    // so the third field begins after the last one.
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
    fn ticks_are_parsed_if_the_name_contains_parentheses() {
        let stat = "7 (a ) b (c) S 1 2 3 4 5 6 7 8 9 10 40 2 0 0";
        assert_eq!(parse_ticks(stat), Some(42));
        assert_eq!(parse_ticks("7 (a) S 1"), None);
    }

    #[test]
    fn cpu_time_and_open_files_of_this_process_are_counted() {
        let pid = std::process::id();
        let before = (open_fds(pid).unwrap(), cpu_ticks(pid).unwrap());
        let _file = fs::File::open("/dev/null").unwrap();
        let started_at = Instant::now();
        while cpu_ticks(pid).unwrap() < before.1 + 3 {
            assert!(started_at.elapsed() < Duration::from_secs(30));
        }
        // Other tests in this process open and close files as well, so the exact number is unknown.
        assert!(open_fds(pid).unwrap() > 0);
        assert!(before.0 > 0);
        assert!(private_memory_kib(pid).unwrap() > 0);
    }
}
