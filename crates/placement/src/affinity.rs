//! Pinning threads to CPUs, and reading back which CPUs the kernel allows them.

use std::io;

use crate::cpuset::CpuSet;
use crate::procfs::ProcFs;
use crate::sys;

/// Why a thread's affinity could not be set or read.
#[derive(Debug, thiserror::Error)]
pub enum AffinityError {
    /// `sched_setaffinity` failed.
    #[error("{} cannot be pinned to {}: {source}; name CPUs that are online and in this daemon's cpuset", describe_thread(*.tid), .cpus.describe())]
    Set {
        /// The thread; `None` for the calling thread.
        tid: Option<i32>,
        /// The requested CPUs.
        cpus: CpuSet,
        /// The kernel's error.
        source: io::Error,
    },
    /// `sched_getaffinity` failed.
    #[error("the CPUs of {} cannot be read: {source}; check that the thread still runs", describe_thread(*.tid))]
    Get {
        /// The thread; `None` for the calling thread.
        tid: Option<i32>,
        /// The kernel's error.
        source: io::Error,
    },
}

impl AffinityError {
    /// A stable name of the cause, for programs.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Set { .. } => "thread-affinity-not-set",
            Self::Get { .. } => "thread-affinity-unreadable",
        }
    }
}

/// Pins thread `tid` (`None`: the calling thread) to `cpus`.
///
/// Returns the CPUs that the thread may run on now, as the kernel reports them: fewer than
/// requested where some are offline or outside the cpuset.
///
/// # Errors
///
/// [`AffinityError`] when the kernel refuses, because no CPU of the set is usable or because the
/// thread has ended or belongs to another user, or when the affinity cannot be read back.
pub fn set_thread_affinity(tid: Option<i32>, cpus: &CpuSet) -> Result<CpuSet, AffinityError> {
    sys::set_affinity(tid.unwrap_or(0), cpus).map_err(|source| AffinityError::Set {
        tid,
        cpus: cpus.clone(),
        source,
    })?;
    read_back(tid)
}

/// The CPUs that the calling thread may run on.
///
/// In the main thread and before any pinning, this is the set that the daemon was started with
/// (taskset, cpuset, systemd's `AllowedCPUs=`).
///
/// # Errors
///
/// [`AffinityError::Get`] when the affinity cannot be read.
pub fn allowed_cpus() -> Result<CpuSet, AffinityError> {
    read_back(None)
}

/// The online CPUs that thread `tid` may run on.
///
/// # Errors
///
/// [`AffinityError::Get`] when the affinity cannot be read, as for a thread that has ended.
pub fn thread_cpus(tid: i32) -> Result<CpuSet, AffinityError> {
    read_back(Some(tid))
}

/// The CPUs that this process may run on, offline ones included: the affinity of its main thread,
/// which the callers of this crate never pin. It reflects a changed cpuset and a `taskset -p` on
/// the process.
///
/// # Errors
///
/// [`AffinityError::Get`] when the affinity can be read neither from /proc nor from the kernel.
pub fn process_cpus() -> Result<CpuSet, AffinityError> {
    match ProcFs::new("/proc").main_thread() {
        Some(thread) if !thread.cpus.is_empty() => Ok(thread.cpus),
        _ => read_back(Some(i32::try_from(std::process::id()).unwrap_or(0))),
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

    /// Runs `test` in a new thread, because the test's own thread may run other tests too.
    fn in_own_thread<T: Send>(test: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| scope.spawn(test).join().unwrap())
    }

    #[test]
    fn calling_thread_runs_on_the_cpus_that_it_is_pinned_to() {
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
            "the other threads keep their affinity"
        );
    }

    #[test]
    fn another_thread_is_pinned_by_its_id() {
        let one = allowed_cpus().unwrap().nth_cyclic(0);
        let (send_tid, receive_tid) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            let link = std::fs::read_link("/proc/thread-self").unwrap();
            send_tid
                .send(
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
            set_thread_affinity(Some(receive_tid.recv().unwrap()), &one).unwrap(),
            one
        );
        drop(end);
        assert_eq!(thread.join().unwrap(), one);
    }

    #[test]
    fn process_keeps_its_cpus_when_a_thread_is_pinned() {
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
    fn cpus_that_the_host_lacks_are_missing_in_the_result() {
        let one = allowed_cpus().unwrap().nth_cyclic(0);
        let mut requested = one.clone();
        requested.insert(60_000);
        assert_eq!(
            in_own_thread(|| set_thread_affinity(None, &requested).unwrap()),
            one
        );
    }

    #[test]
    fn error_names_the_thread_and_the_cpus() {
        let error =
            in_own_thread(|| set_thread_affinity(None, &"60000".parse().unwrap()).unwrap_err());
        assert_eq!(
            error.to_string(),
            "the calling thread cannot be pinned to CPU 60000: Invalid argument (os error 22); \
             name CPUs that are online and in this daemon's cpuset"
        );
        let error = set_thread_affinity(Some(i32::MAX), &allowed_cpus().unwrap()).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("thread 2147483647 cannot be pinned to CPU"),
            "{error}"
        );
    }
}
