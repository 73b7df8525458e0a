//! The CPUs that this process may run on, and their topology. All devices share one view, which is
//! refreshed while front-ends are connected.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};
use virtionet_placement::{AffinityError, CpuSet, Topology, process_cpus, thread_cpus};

const SYS: &str = "/sys";
/// The file that changes when a CPU goes offline or online.
const ONLINE: &str = "/sys/devices/system/cpu/online";

/// The CPUs that this process may run on.
#[derive(Debug)]
pub struct HostCpus {
    view: Mutex<CpuView>,
    /// [`ONLINE`], kept open. Without such a file no CPU can go offline.
    online: Option<File>,
    /// By device: the CPUs that the workers of other devices must avoid.
    used: Mutex<BTreeMap<u32, DeviceCpus>>,
    /// The number of devices registered so far.
    devices: AtomicU32,
    /// Increases when the view or the CPUs that devices use change.
    version: AtomicU32,
    /// Readable when the placement monitor, which may be asleep, has something to do.
    wakeup: OwnedFd,
}

/// The CPUs that one device uses, as far as polling workers of other devices must avoid them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeviceCpus {
    /// Those that its guest's vCPUs are pinned to.
    pub pinned: CpuSet,
    /// Those of each of its workers that polls.
    pub polling: Vec<CpuSet>,
}

/// A view of the CPUs of this process.
#[derive(Debug, Clone)]
struct CpuView {
    allowed: CpuSet,
    topology: Arc<Topology>,
    fingerprint: Fingerprint,
}

/// Values that are cheap to read and change whenever the view changes.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Fingerprint {
    online: Option<Vec<u8>>,
    /// The CPUs of the main thread, which is never pinned, that are online.
    cpus: Option<CpuSet>,
}

impl HostCpus {
    /// Reads the CPUs and their topology. Call this before any thread of this process is pinned.
    ///
    /// # Errors
    /// When the CPUs of this process cannot be read, or the kernel has no descriptor left.
    pub fn read() -> Result<Self, HostCpusError> {
        let online = File::open(ONLINE).ok();
        Ok(Self {
            view: Mutex::new(CpuView::read(Fingerprint::read(online.as_ref()))?),
            online,
            used: Mutex::default(),
            devices: AtomicU32::new(0),
            version: AtomicU32::new(0),
            wakeup: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
                .map_err(|error| HostCpusError::EventFd(error.into()))?,
        })
    }

    /// The CPUs allowed to this process, those that are offline included.
    #[must_use]
    pub fn allowed(&self) -> CpuSet {
        self.view.lock().allowed.clone()
    }

    /// The CPUs' topology, and which are online.
    #[must_use]
    pub fn topology(&self) -> Arc<Topology> {
        Arc::clone(&self.view.lock().topology)
    }

    /// Registers one more device and returns its number.
    #[must_use]
    pub fn register_device(&self) -> u32 {
        self.devices.fetch_add(1, Ordering::Relaxed)
    }

    /// Sets the CPUs that `device` uses.
    pub fn set_used(&self, device: u32, cpus: DeviceCpus) {
        let mut used = self.used.lock();
        let is_empty = cpus == DeviceCpus::default();
        let has_changed = match is_empty {
            true => used.remove(&device).is_some(),
            false => used.insert(device, cpus.clone()) != Some(cpus),
        };
        if has_changed {
            self.version.fetch_add(1, Ordering::Release);
        }
    }

    /// The CPUs that other devices than `device` use.
    #[must_use]
    pub fn used_by_others(&self, device: u32) -> DeviceCpus {
        let mut all = DeviceCpus::default();
        let used = self.used.lock();
        for (_, cpus) in used.iter().filter(|(other, _)| **other != device) {
            all.pinned.extend(cpus.pinned.iter());
            all.polling.extend_from_slice(&cpus.polling);
        }
        all
    }

    /// A number that changes when the CPUs change, or those that devices use.
    #[must_use]
    pub fn version(&self) -> u32 {
        self.version.load(Ordering::Acquire)
    }

    /// Checks whether CPUs went offline or online, or the cpuset changed. It costs two system calls
    /// when nothing has changed.
    pub fn refresh(&self) {
        let mut view = self.view.lock();
        let fingerprint = Fingerprint::read(self.online.as_ref());
        if fingerprint == view.fingerprint {
            return;
        }
        match CpuView::read(fingerprint) {
            Ok(new) => {
                tracing::info!(
                    "this process may now run on {}, of which {} online",
                    new.allowed.describe(),
                    describe_online(&new)
                );
                *view = new;
                self.version.fetch_add(1, Ordering::Release);
            }
            // The old view stays valid, and the next refresh tries again.
            Err(error) => tracing::debug!("{error}"),
        }
    }

    /// Wakes the thread that waits on [`HostCpus::wakeup_fd`].
    pub fn notify(&self) {
        // The write fails only when 2^64 notifications are pending.
        let _ = rustix::io::write(&self.wakeup, &1u64.to_ne_bytes());
    }

    /// Readable after [`HostCpus::notify`], until [`HostCpus::clear_wakeup`].
    #[must_use]
    pub fn wakeup_fd(&self) -> BorrowedFd<'_> {
        self.wakeup.as_fd()
    }

    /// Makes [`HostCpus::wakeup_fd`] unreadable again.
    pub fn clear_wakeup(&self) {
        let mut count = [0; 8];
        // The read fails only when no notification is pending.
        let _ = rustix::io::read(&self.wakeup, &mut count);
    }
}

/// Why the CPUs of the host cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum HostCpusError {
    /// The CPUs of this process are not known.
    #[error(transparent)]
    Affinity(#[from] AffinityError),
    /// No descriptor is left.
    #[error("cannot make an eventfd: {0}; check the limits of this process")]
    EventFd(#[source] io::Error),
}

impl HostCpusError {
    /// A stable name of the error, for programs.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Affinity(_) => "cpu-affinity-unreadable",
            Self::EventFd(_) => "host-resources",
        }
    }
}

impl CpuView {
    fn read(fingerprint: Fingerprint) -> Result<Self, AffinityError> {
        Ok(Self {
            allowed: process_cpus()?,
            topology: Arc::new(Topology::read(Path::new(SYS))),
            fingerprint,
        })
    }
}

impl Fingerprint {
    fn read(online: Option<&File>) -> Self {
        let main = i32::try_from(std::process::id()).ok();
        Self {
            online: online.and_then(read_start),
            cpus: main.and_then(|main| thread_cpus(main).ok()),
        }
    }
}

/// The start of a file of sysfs, which suffices to detect whether the file changed.
fn read_start(file: &File) -> Option<Vec<u8>> {
    let mut text = [0; 256];
    let length = file.read_at(&mut text, 0).ok()?;
    text.get(..length).map(<[u8]>::to_vec)
}

fn describe_online(view: &CpuView) -> String {
    let online = view.topology.online().intersection(&view.allowed);
    match online.len() {
        1 => format!("{online} is"),
        _ => format!("{online} are"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_that_stays_the_same_keeps_its_version() {
        let host = HostCpus::read().unwrap();
        let version = host.version();
        host.refresh();
        assert_eq!(host.version(), version);
        for cpu in host.allowed().iter() {
            assert!(host.topology().node_of(cpu).is_some() || !host.topology().is_online(cpu));
        }
    }

    #[test]
    fn notification_is_pending_until_it_is_cleared() {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let host = HostCpus::read().unwrap();
        let is_notified = || {
            let mut fds = [PollFd::from_borrowed_fd(host.wakeup_fd(), PollFlags::IN)];
            poll(&mut fds, Some(&Timespec::default())).unwrap() > 0
        };
        assert!(!is_notified());
        host.notify();
        host.notify();
        assert!(is_notified());
        host.clear_wakeup();
        assert!(!is_notified());
    }
}
