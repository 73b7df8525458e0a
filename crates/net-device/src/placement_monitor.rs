//! A thread for all devices, which decides on which CPUs their workers run. While a front-end is
//! connected, it checks whether vCPUs were pinned to other CPUs, CPUs went offline or online, or
//! the cpuset changed, and wakes the workers that must move. Without a front-end it sleeps.
//!
//! The kernel has no notification of a change of a thread's affinity, so the thread polls. A check
//! costs some microseconds: see [`virtionet_placement::VcpuWatch`]. What other threads of this
//! process know, such as the start of a worker, they report, and the thread acts on it at once.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtionet_process::sandbox;
use virtionet_sandbox::ThreadKind;

use crate::device_list::DeviceList;
use crate::host_cpus::HostCpus;
use crate::stop::Stop;

/// The time between two checks, so that a worker follows its vCPU in less than a second.
const POLL_INTERVAL: Duration = Duration::from_millis(250);
/// The shortest time between two updates that other threads ask for, because a front-end can cause
/// them at any rate.
const MIN_UPDATE_INTERVAL: Duration = Duration::from_millis(2);
const STACK_SIZE: usize = 256 * 1024;

/// Why the thread wakes up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum WakeReason {
    /// The thread must end.
    Stop,
    /// Another thread has reported a change.
    Change,
    /// The time of the next check has come.
    Check,
}

/// Starts the thread, which ends when `stop` is readable.
///
/// # Errors
/// When the kernel refuses a thread.
pub fn start(
    net_devices: Arc<DeviceList>,
    host: Arc<HostCpus>,
    stop: Arc<Stop>,
) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name("placer".into())
        .stack_size(STACK_SIZE)
        .spawn(move || run(&net_devices, &host, stop.as_fd()))
}

fn run(net_devices: &DeviceList, host: &HostCpus, stop: BorrowedFd<'_>) {
    sandbox::confine_thread(ThreadKind::Placer);
    let mut next_check = Instant::now();
    loop {
        let is_busy = net_devices.all().iter().any(|device| device.has_frontend());
        match wait(host, stop, is_busy.then_some(next_check)) {
            WakeReason::Stop => return,
            WakeReason::Change => {
                host.refresh();
                net_devices
                    .all()
                    .iter()
                    .for_each(|device| device.update_placement());
                std::thread::sleep(MIN_UPDATE_INTERVAL);
            }
            WakeReason::Check => {
                next_check = Instant::now() + POLL_INTERVAL;
                host.refresh();
                net_devices
                    .all()
                    .iter()
                    .for_each(|device| device.refresh_placement());
            }
        }
    }
}

/// Waits for a reported change, but not longer than until `next_check`.
fn wait(host: &HostCpus, stop: BorrowedFd<'_>, next_check: Option<Instant>) -> WakeReason {
    let left = next_check.map(|at| at.saturating_duration_since(Instant::now()));
    let timeout = left.and_then(|left| Timespec::try_from(left).ok());
    let mut fds = [
        PollFd::from_borrowed_fd(stop, PollFlags::IN),
        PollFd::from_borrowed_fd(host.wakeup_fd(), PollFlags::IN),
    ];
    // An interrupted wait only causes one more check.
    let _ = poll(&mut fds, timeout.as_ref());
    if !fds[0].revents().is_empty() {
        return WakeReason::Stop;
    }
    let is_check_due = next_check.is_some_and(|at| Instant::now() >= at);
    let is_notified = !fds[1].revents().is_empty();
    if is_notified {
        host.clear_wakeup();
    }
    // A check includes what an update does.
    match is_notified && !is_check_due {
        true => WakeReason::Change,
        false => WakeReason::Check,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};

    #[test]
    fn reported_change_ends_the_wait_but_never_delays_a_check() {
        let host = HostCpus::read().unwrap();
        let stop = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let far = Instant::now() + Duration::from_secs(3600);
        host.notify();
        assert_eq!(wait(&host, stop.as_fd(), Some(far)), WakeReason::Change);
        let soon = Instant::now() + Duration::from_millis(1);
        assert_eq!(wait(&host, stop.as_fd(), Some(soon)), WakeReason::Check);
        host.notify();
        assert_eq!(wait(&host, stop.as_fd(), Some(soon)), WakeReason::Check);
        host.notify();
        assert_eq!(wait(&host, stop.as_fd(), None), WakeReason::Change);
        rustix::io::write(&stop, &1_u64.to_ne_bytes()).unwrap();
        host.notify();
        assert_eq!(wait(&host, stop.as_fd(), Some(soon)), WakeReason::Stop);
    }
}
