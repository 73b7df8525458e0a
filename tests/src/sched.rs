//! Threads and their CPU affinity.

use std::fs;

use anyhow::{Context, Result};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use crate::process::output;

/// Pins thread `tid` to `cpu`. A `tid` of 0 means the calling thread.
///
/// # Errors
/// When the thread does not exist, or the CPU is not in its cpuset.
pub fn pin(tid: i32, cpu: usize) -> Result<()> {
    pin_to(tid, &[cpu])
}

/// Sets the affinity of thread `tid` to `cpus`.
///
/// # Errors
/// When the thread does not exist, or none of the CPUs is in its cpuset.
pub fn pin_to(tid: i32, cpus: &[usize]) -> Result<()> {
    let mut set = CpuSet::new();
    cpus.iter()
        .try_for_each(|cpu| set.set(*cpu))
        .and_then(|()| sched_setaffinity(Pid::from_raw(tid), &set))
        .with_context(|| format!("thread {tid} cannot be pinned to CPUs {cpus:?}"))
}

/// The priority among the threads of the scheduling class SCHED_FIFO: low, but above all threads of the
/// usual class.
const PRIORITY: &str = "1";

/// Lets thread `tid` run before all threads of the usual scheduling class, so that it never waits for
/// one of them.
///
/// # Errors
/// When this process may not do that.
pub fn set_real_time(tid: i32) -> Result<()> {
    output("chrt", ["--fifo", "--pid", PRIORITY, &tid.to_string()])
        .with_context(|| format!("thread {tid} cannot have a real-time priority"))?;
    Ok(())
}

/// Returns the CPUs that thread `tid` may run on, in ascending order.
///
/// # Errors
/// When the thread does not exist.
pub fn affinity(tid: i32) -> Result<Vec<usize>> {
    let set = sched_getaffinity(Pid::from_raw(tid))
        .with_context(|| format!("the affinity of thread {tid} cannot be read"))?;
    Ok((0..CpuSet::count())
        .filter(|cpu| set.is_set(*cpu).unwrap_or(false))
        .collect())
}

/// Returns the CPUs that the calling thread may run on, in ascending order.
///
/// # Errors
/// When the kernel does not return the affinity.
pub fn allowed_cpus() -> Result<Vec<usize>> {
    affinity(0)
}

/// Returns the CPU on which thread `tid` last ran.
///
/// # Errors
/// When the thread does not exist.
pub fn last_cpu(tid: i32) -> Result<usize> {
    let path = format!("/proc/{tid}/stat");
    let stat = fs::read_to_string(&path).with_context(|| format!("thread {tid} does not exist"))?;
    // proc(5): "processor" is field 39, and the name in field 2 may contain spaces.
    stat.rsplit_once(") ")
        .and_then(|(_, rest)| rest.split(' ').nth(36))
        .and_then(|cpu| cpu.parse().ok())
        .with_context(|| format!("{path} has no processor field"))
}

/// Returns the ids and names of the threads of process `pid`, sorted by id.
///
/// # Errors
/// When the process does not exist.
pub fn threads(pid: u32) -> Result<Vec<(i32, String)>> {
    let dir = format!("/proc/{pid}/task");
    let mut threads = Vec::new();
    for entry in fs::read_dir(&dir).with_context(|| format!("process {pid} does not exist"))? {
        let entry = entry?;
        let Some(tid) = entry.file_name().to_str().and_then(|s| s.parse().ok()) else {
            continue;
        };
        // A thread may exit between the two reads, and is then left out.
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
    fn pinned_thread_runs_on_its_cpu_and_has_that_affinity() {
        let cpu = allowed_cpus().unwrap()[0];
        let cpus = std::thread::Builder::new()
            .name("pinned".into())
            .spawn(move || {
                let tid = gettid().as_raw();
                pin(tid, cpu).unwrap();
                let threads = threads(std::process::id()).unwrap();
                assert!(threads.contains(&(tid, "pinned".into())), "{threads:?}");
                assert_eq!(last_cpu(tid).unwrap(), cpu);
                affinity(tid).unwrap()
            })
            .unwrap()
            .join()
            .unwrap();
        assert_eq!(cpus, [cpu]);
    }

    #[test]
    fn pinning_to_a_cpu_number_beyond_the_mask_is_an_error() {
        assert!(pin(0, usize::MAX).is_err());
    }
}
