//! Threads and the CPUs that they may run on.

use std::fs;

use anyhow::{Context, Result};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// Pins thread `tid` to `cpu` alone.
///
/// # Errors
/// When the thread is gone, or the CPU is not in its cpuset.
pub fn pin(tid: i32, cpu: usize) -> Result<()> {
    pin_to(tid, &[cpu])
}

/// Lets thread `tid` run on `cpus` alone.
///
/// # Errors
/// When the thread is gone, or no CPU of them is in its cpuset.
pub fn pin_to(tid: i32, cpus: &[usize]) -> Result<()> {
    let mut set = CpuSet::new();
    cpus.iter()
        .try_for_each(|cpu| set.set(*cpu))
        .and_then(|()| sched_setaffinity(Pid::from_raw(tid), &set))
        .with_context(|| format!("thread {tid} cannot be pinned to CPUs {cpus:?}"))
}

/// The CPUs that thread `tid` may run on, ascending.
///
/// # Errors
/// When the thread is gone.
pub fn affinity(tid: i32) -> Result<Vec<usize>> {
    let set = sched_getaffinity(Pid::from_raw(tid))
        .with_context(|| format!("the affinity of thread {tid} cannot be read"))?;
    Ok((0..CpuSet::count())
        .filter(|cpu| set.is_set(*cpu).unwrap_or(false))
        .collect())
}

/// The CPUs that this process may run on, ascending.
///
/// # Errors
/// When the kernel does not say.
pub fn allowed_cpus() -> Result<Vec<usize>> {
    affinity(0)
}

/// The CPU that thread `tid` was last seen on.
///
/// # Errors
/// When the thread is gone.
pub fn last_cpu(tid: i32) -> Result<usize> {
    let path = format!("/proc/{tid}/stat");
    let stat = fs::read_to_string(&path).with_context(|| format!("thread {tid} is gone"))?;
    // proc(5): "processor" is field 39, and the name in field 2 may hold spaces.
    stat.rsplit_once(") ")
        .and_then(|(_, rest)| rest.split(' ').nth(36))
        .and_then(|cpu| cpu.parse().ok())
        .with_context(|| format!("{path} has no processor field"))
}

/// The threads of process `pid`: their ids and names, by id.
///
/// # Errors
/// When the process is gone.
pub fn threads(pid: u32) -> Result<Vec<(i32, String)>> {
    let dir = format!("/proc/{pid}/task");
    let mut threads = Vec::new();
    for entry in fs::read_dir(&dir).with_context(|| format!("process {pid} is gone"))? {
        let entry = entry?;
        let Some(tid) = entry.file_name().to_str().and_then(|s| s.parse().ok()) else {
            continue;
        };
        // A thread that ended in between is no longer one of them.
        if let Ok(name) = fs::read_to_string(entry.path().join("comm")) {
            threads.push((tid, name.trim_end().to_owned()));
        }
    }
    threads.sort_unstable();
    Ok(threads)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::unistd::gettid;

    #[test]
    fn a_pinned_thread_reads_back_as_pinned() {
        let cpu = allowed_cpus().unwrap()[0];
        let seen = std::thread::Builder::new()
            .name("pinned".into())
            .spawn(move || {
                let tid = gettid().as_raw();
                pin(tid, cpu).unwrap();
                let named = threads(std::process::id()).unwrap();
                assert!(named.contains(&(tid, "pinned".into())), "{named:?}");
                assert_eq!(last_cpu(tid).unwrap(), cpu);
                affinity(tid).unwrap()
            })
            .unwrap()
            .join()
            .unwrap();
        assert_eq!(seen, [cpu]);
    }

    #[test]
    fn a_cpu_beyond_the_mask_is_an_error() {
        assert!(pin(0, usize::MAX).is_err());
    }
}
