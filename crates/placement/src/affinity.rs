//! Carrying a decision out, and reading back what the kernel made of it.

use std::io;

use crate::cpuset::CpuSet;
use crate::procfs::ProcFs;
use crate::sys;

/// Why a thread's affinity could not be set or read.
#[derive(Debug, thiserror::Error)]
pub enum AffinityError {
    /// `sched_setaffinity` failed.
    #[error("{} cannot be placed on {}: {source}; name CPUs that are online and in this daemon's cpuset", describe_thread(*.tid), .cpus.describe())]
    Set {
        /// The thread, `None` for the calling one.
        tid: Option<i32>,
        /// The CPUs asked for.
        cpus: CpuSet,
        /// The kernel's answer.
        source: io::Error,
    },
    /// `sched_getaffinity` failed.
    #[error("the CPUs of {} cannot be read: {source}; check that the thread still runs", describe_thread(*.tid))]
    Get {
        /// The thread, `None` for the calling one.
        tid: Option<i32>,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// Places thread `tid` (`None`: the calling thread) on `cpus`.
///
/// Returns the CPUs on which the thread may run now, as the kernel says: fewer
/// than asked for where some are offline or outside the cpuset.
///
/// # Errors
///
/// [`AffinityError`] when the kernel refuses (no CPU of the set is usable, or
/// the thread is gone or not ours) or cannot tell.
pub fn set_thread_affinity(tid: Option<i32>, cpus: &CpuSet) -> Result<CpuSet, AffinityError> {
    sys::set_affinity(tid.unwrap_or(0), cpus).map_err(|source| AffinityError::Set {
        tid,
        cpus: cpus.clone(),
        source,
    })?;
    read_back(tid)
}

/// The CPUs on which the calling thread may run.
///
/// Called by the main thread before any pinning, this is the set that the
/// daemon was given (taskset, cpuset, systemd's `AllowedCPUs=`).
///
/// # Errors
///
/// [`AffinityError::Get`] when the kernel cannot tell.
pub fn allowed_cpus() -> Result<CpuSet, AffinityError> {
    read_back(None)
}

/// The CPUs on which thread `tid` may run, those of them that are online.
///
/// # Errors
///
/// [`AffinityError::Get`] when the kernel cannot tell, as for a thread that is gone.
pub fn thread_cpus(tid: i32) -> Result<CpuSet, AffinityError> {
    read_back(Some(tid))
}

/// The CPUs that this process was given, those that are offline included: the
/// affinity of its main thread, which this crate's callers never pin. A change
/// of the cpuset, or a `taskset -p` on the process, shows in it.
///
/// # Errors
///
/// [`AffinityError::Get`] when neither /proc nor the kernel can tell.
pub fn process_cpus() -> Result<CpuSet, AffinityError> {
    let main = i32::try_from(std::process::id()).unwrap_or(0);
    match ProcFs::new("/proc").any_thread(main) {
        Some(thread) if !thread.cpus.is_empty() => Ok(thread.cpus),
        _ => read_back(Some(main)),
    }
}

fn read_back(tid: Option<i32>) -> Result<CpuSet, AffinityError> {
    sys::get_affinity(tid.unwrap_or(0)).map_err(|source| AffinityError::Get { tid, source })
}

fn describe_thread(tid: Option<i32>) -> String {
    tid.map_or_else(
        || "the calling thread".into(),
        |tid| format!("thread {tid}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In a thread of its own: the test's thread may serve other tests too.
    fn in_own_thread<T: Send>(test: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| scope.spawn(test).join().unwrap())
    }

    #[test]
    fn a_thread_stands_where_it_was_put() {
        let allowed = allowed_cpus().unwrap();
        assert!(!allowed.is_empty());
        for turn in 0..2 {
            let one = allowed.nth_cyclic(turn);
            let (applied, read) = in_own_thread(|| {
                (
                    set_thread_affinity(None, &one).unwrap(),
                    allowed_cpus().unwrap(),
                )
            });
            assert_eq!(applied, one);
            assert_eq!(read, one);
        }
        assert_eq!(
            allowed_cpus().unwrap(),
            allowed,
            "the other threads are left alone"
        );
    }

    #[test]
    fn another_thread_is_placed_by_its_id() {
        let one = allowed_cpus().unwrap().nth_cyclic(0);
        let (tell, told) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            let link = std::fs::read_link("/proc/thread-self").unwrap();
            tell.send(
                link.file_name()
                    .unwrap()
                    .to_str()
                    .unwrap()
                    .parse::<i32>()
                    .unwrap(),
            )
            .unwrap();
            ended.recv().unwrap_err();
            allowed_cpus().unwrap()
        });
        assert_eq!(
            set_thread_affinity(Some(told.recv().unwrap()), &one).unwrap(),
            one
        );
        drop(end);
        assert_eq!(thread.join().unwrap(), one);
    }

    #[test]
    fn the_process_keeps_its_cpus_when_a_thread_is_pinned() {
        let all = process_cpus().unwrap();
        let main = i32::try_from(std::process::id()).unwrap();
        assert_eq!(
            all.intersection(&thread_cpus(main).unwrap()),
            thread_cpus(main).unwrap()
        );
        in_own_thread(|| {
            set_thread_affinity(None, &all.nth_cyclic(0)).unwrap();
            assert_eq!(process_cpus().unwrap(), all);
        });
    }

    #[test]
    fn cpus_that_the_host_lacks_are_told_by_the_read_back() {
        let one = allowed_cpus().unwrap().nth_cyclic(0);
        let mut asked = one.clone();
        asked.insert(60_000);
        assert_eq!(
            in_own_thread(|| set_thread_affinity(None, &asked).unwrap()),
            one
        );
    }

    #[test]
    fn refusals_name_the_thread_and_the_cpus() {
        let error =
            in_own_thread(|| set_thread_affinity(None, &"60000".parse().unwrap()).unwrap_err());
        assert_eq!(
            error.to_string(),
            "the calling thread cannot be placed on CPU 60000: Invalid argument (os error 22); \
             name CPUs that are online and in this daemon's cpuset"
        );
        let error = set_thread_affinity(Some(i32::MAX), &allowed_cpus().unwrap()).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("thread 2147483647 cannot be placed on CPU"),
            "{error}"
        );
    }
}
