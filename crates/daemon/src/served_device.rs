//! A device as its thread, a handover and a change see it.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use parking_lot::Mutex;
use virtionet_config::DeviceConfig;
use virtionet_handover::{SharedFd, SourceImage};
use virtionet_net_device::net_device::NetDevice;
use virtionet_net_device::stop::Stop;
use virtionet_vhost_user::SuspendedSession;

use crate::device_failure::DeviceFailure;

/// The suspended session of a front-end, if there is one. The device's thread continues it.
pub type SuspendedSlot = Mutex<Option<Box<SuspendedSession>>>;

/// A thread that serves a device.
pub type DeviceThread = JoinHandle<Result<(), DeviceFailure>>;

/// A device, its thread, and its session while that is suspended.
#[derive(Debug)]
pub struct ServedDevice {
    /// The configuration.
    pub config: DeviceConfig,
    /// The settings of the request by which it was added; `None` for a device of the configuration.
    pub requested: Mutex<Option<BTreeMap<String, String>>>,
    /// The device.
    pub net_device: Arc<NetDevice>,
    /// Its suspended session.
    pub suspended: SuspendedSlot,
    /// What stops its thread.
    pub stop: Stop,
    /// Where its front-ends come from, for the next daemon.
    pub source: OnceLock<SourceImage<SharedFd>>,
    /// Its thread, until a removal or the end of the process joins it.
    pub thread: Mutex<Option<DeviceThread>>,
    revision: AtomicU64,
    is_removed: AtomicBool,
}

impl ServedDevice {
    /// A device without a thread. `requested` are the settings of the request by which it is added.
    ///
    /// # Errors
    /// When the kernel refuses an eventfd.
    pub fn new(
        config: DeviceConfig,
        requested: Option<BTreeMap<String, String>>,
        net_device: Arc<NetDevice>,
    ) -> io::Result<Self> {
        Ok(Self {
            config,
            requested: Mutex::new(requested),
            net_device,
            suspended: Mutex::default(),
            stop: Stop::new()?,
            source: OnceLock::new(),
            thread: Mutex::default(),
            revision: AtomicU64::new(0),
            is_removed: AtomicBool::new(false),
        })
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.config.name
    }

    /// A number that changes with each change of its configuration.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.revision.load(Ordering::Relaxed)
    }

    /// Sets the revision.
    pub fn set_revision(&self, revision: u64) {
        self.revision.store(revision, Ordering::Relaxed);
    }

    /// Lets its thread end, because the device is removed.
    pub fn end_for_removal(&self) {
        self.is_removed.store(true, Ordering::Relaxed);
        self.stop.end();
    }

    /// Whether its thread was asked to end because the device is removed.
    #[must_use]
    pub fn is_removed(&self) -> bool {
        self.is_removed.load(Ordering::Relaxed)
    }

    /// Whether its thread serves front-ends.
    #[must_use]
    pub fn has_thread(&self) -> bool {
        let thread = self.thread.lock();
        thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }
}

/// The number of devices whose session is suspended.
#[must_use]
pub fn count_suspended(devices: &[Arc<ServedDevice>]) -> usize {
    let suspended = |device: &&Arc<ServedDevice>| device.suspended.lock().is_some();
    devices.iter().filter(suspended).count()
}
