//! The slice of a thread, by which Linux's scheduler decides how soon the thread runs once it is woken.
//!
//! The scheduler (EEVDF, since Linux 6.6) runs the thread with the earliest deadline of those that have
//! not had more than their share of the CPU. When a thread is woken, its deadline is one slice ahead. A
//! thread with a shorter slice than the one that runs interrupts it; one with the same slice waits,
//! often until the next tick of the clock (4 ms on many hosts). The share of the CPU does not depend on
//! the slice. Since Linux 6.12 a thread can ask for a slice of its own, without any right, as
//! `sched_runtime` of sched_setattr(2). Threads that it starts have the same.

use std::io;
use std::time::Duration;

use crate::sys;

/// The shortest slice that the kernel grants.
pub const SHORTEST_SLICE: Duration = Duration::from_micros(100);

/// What became of the request for a slice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SliceOutcome {
    /// The thread has it.
    Set,
    /// The thread has another scheduling policy than SCHED_OTHER, and keeps it as it is.
    OtherPolicy,
    /// The kernel is older than 6.12, or grants another slice.
    NotGranted,
}

/// Sets the slice of thread `tid` (`None`: the calling thread); a slice of zero is the kernel's default.
///
/// # Errors
/// When the kernel refuses it, because the thread has ended, or a filter of system calls does.
pub fn set_slice(tid: Option<i32>, slice: Duration) -> io::Result<SliceOutcome> {
    let tid = tid.unwrap_or(0);
    let mut scheduling = sys::scheduling(tid)?;
    if i32::try_from(scheduling.sched_policy) != Ok(libc::SCHED_OTHER) {
        return Ok(SliceOutcome::OtherPolicy);
    }
    scheduling.sched_runtime = u64::try_from(slice.as_nanos()).unwrap_or(u64::MAX);
    sys::set_scheduling(tid, &scheduling)?;
    Ok(match slice_of(tid)? == slice || slice.is_zero() {
        true => SliceOutcome::Set,
        false => SliceOutcome::NotGranted,
    })
}

/// The slice of thread `tid` (0: the calling thread); zero before Linux 6.12, and where the thread has
/// another scheduling policy than SCHED_OTHER.
///
/// # Errors
/// When there is no such thread.
pub fn slice_of(tid: i32) -> io::Result<Duration> {
    Ok(Duration::from_nanos(sys::scheduling(tid)?.sched_runtime))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    /// Of a kernel that has slices, the default; `None` of an older one.
    fn default_slice() -> Option<Duration> {
        let slice = slice_of(0).unwrap();
        (!slice.is_zero()).then_some(slice)
    }

    #[test]
    fn thread_has_the_slice_that_it_asks_for_and_passes_it_on() {
        thread::spawn(|| {
            let default = default_slice();
            let outcome = set_slice(None, SHORTEST_SLICE).unwrap();
            let Some(default) = default else {
                assert_eq!(outcome, SliceOutcome::NotGranted);
                return;
            };
            assert_ne!(default, SHORTEST_SLICE);
            assert_eq!(outcome, SliceOutcome::Set);
            assert_eq!(slice_of(0).unwrap(), SHORTEST_SLICE);
            let of_child = thread::spawn(|| slice_of(0).unwrap()).join().unwrap();
            assert_eq!(of_child, SHORTEST_SLICE);
            // It is less than the kernel grants.
            let outcome = set_slice(None, SHORTEST_SLICE / 10).unwrap();
            assert_eq!(outcome, SliceOutcome::NotGranted);
            assert_eq!(set_slice(None, Duration::ZERO).unwrap(), SliceOutcome::Set);
            assert_eq!(slice_of(0).unwrap(), default);
        })
        .join()
        .unwrap();
    }

    #[test]
    fn slice_of_a_thread_that_does_not_exist_is_an_error() {
        assert!(set_slice(Some(i32::MAX), SHORTEST_SLICE).is_err());
        assert!(slice_of(i32::MAX).is_err());
    }
}
