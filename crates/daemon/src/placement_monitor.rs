//! A thread for all devices. While a front-end is connected, it checks whether vCPUs were pinned to
//! other CPUs, CPUs went offline or online, or the cpuset changed, and wakes the workers that must
//! move. Without a front-end it sleeps.
//!
//! The kernel has no notification of a change of a thread's affinity, so the thread polls. A check
//! costs some microseconds: see [`virtionet_placement::VcpuWatch`].

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::host_cpus::HostCpus;
use crate::net_device::NetDevice;

/// The time between two checks, so that a worker follows its vCPU in less than a second.
const POLL_INTERVAL: Duration = Duration::from_millis(250);
const STACK_SIZE: usize = 256 * 1024;

/// Starts the thread, which ends when `stop` is readable.
///
/// # Errors
/// When the kernel refuses a thread.
pub fn start(
    net_devices: Vec<Arc<NetDevice>>,
    host: Arc<HostCpus>,
    stop: Arc<OwnedFd>,
) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name("placer".into())
        .stack_size(STACK_SIZE)
        .spawn(move || {
            while wait(&net_devices, &host, stop.as_fd()) {
                host.refresh();
                net_devices
                    .iter()
                    .for_each(|net_device| net_device.refresh_placement());
            }
        })
}

/// Waits for the next check. Returns false when the thread must end.
fn wait(net_devices: &[Arc<NetDevice>], host: &HostCpus, stop: BorrowedFd<'_>) -> bool {
    let busy = net_devices
        .iter()
        .any(|net_device| net_device.has_frontend());
    let timeout = busy
        .then(|| Timespec::try_from(POLL_INTERVAL).ok())
        .flatten();
    let mut fds = [
        PollFd::from_borrowed_fd(stop, PollFlags::IN),
        PollFd::from_borrowed_fd(host.wakeup_fd(), PollFlags::IN),
    ];
    // An interrupted wait only causes one more check.
    let _ = poll(&mut fds, timeout.as_ref());
    if !fds[1].revents().is_empty() {
        host.clear_wakeup();
    }
    fds[0].revents().is_empty()
}
