//! The devices of the process, which change while it runs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};
use virtionet_config::Config;
use virtionet_net_device::device_list::DeviceList;

use crate::served_device::ServedDevice;

/// The devices of the process.
///
/// A thread that changes it, or hands it over, holds the guard of [`DeviceSet::try_change`], so that a
/// successor gets no device that is half there.
#[derive(Debug)]
pub struct DeviceSet {
    state: Mutex<State>,
    changing: Mutex<()>,
    /// The same devices, for threads that know nothing of front-ends.
    list: Arc<DeviceList>,
    /// The threads that serve devices.
    running: AtomicUsize,
    last_revision: AtomicU64,
    /// Whether devices can be added.
    may_grow: bool,
    /// Whether a next daemon can take the devices over.
    is_handed_over: bool,
}

#[derive(Debug)]
struct State {
    devices: Vec<Arc<ServedDevice>>,
    /// The names of the devices of the configuration that were removed on request.
    removed: Vec<String>,
}

/// Permits one change.
pub type Changing<'a> = MutexGuard<'a, ()>;

impl DeviceSet {
    /// The devices with which the process starts, and the names of those of the configuration that the
    /// daemon before has removed.
    #[must_use]
    pub fn new(devices: Vec<Arc<ServedDevice>>, removed: Vec<String>, config: &Config) -> Self {
        let net_devices = devices.iter().map(|device| Arc::clone(&device.net_device));
        let set = Self {
            list: Arc::new(DeviceList::new(net_devices)),
            running: AtomicUsize::new(devices.len()),
            last_revision: AtomicU64::new(0),
            changing: Mutex::default(),
            may_grow: config.allow_add.is_some(),
            is_handed_over: config.handover.is_some(),
            state: Mutex::new(State { devices, removed }),
        };
        for device in set.all() {
            set.note_change(&device);
        }
        set
    }

    /// The devices at present, in the order in which they were added.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<ServedDevice>> {
        self.state.lock().devices.clone()
    }

    /// The device of this name.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<Arc<ServedDevice>> {
        let state = self.state.lock();
        let mut devices = state.devices.iter();
        devices.find(|device| device.name() == name).cloned()
    }

    /// The devices, for the placer.
    #[must_use]
    pub fn list(&self) -> Arc<DeviceList> {
        Arc::clone(&self.list)
    }

    /// The names of the devices of the configuration that were removed on request.
    #[must_use]
    pub fn removed(&self) -> Vec<String> {
        self.state.lock().removed.clone()
    }

    /// Whether it has exactly one device, and none can be added.
    #[must_use]
    pub fn is_single(&self) -> bool {
        !self.may_grow && self.state.lock().devices.len() == 1
    }

    /// Whether a next daemon can take the devices over.
    #[must_use]
    pub fn is_handed_over(&self) -> bool {
        self.is_handed_over
    }

    /// Permits a change; `None` while there is another one, or the devices are handed over.
    #[must_use]
    pub fn try_change(&self) -> Option<Changing<'_>> {
        self.changing.try_lock()
    }

    /// The same, but waits for at most `limit`.
    #[must_use]
    pub fn change_within(&self, limit: Duration) -> Option<Changing<'_>> {
        self.changing.try_lock_for(limit)
    }

    /// Adds a device, whose thread runs.
    pub fn add(&self, _permit: &Changing<'_>, device: Arc<ServedDevice>) {
        self.note_change(&device);
        self.running.fetch_add(1, Ordering::Relaxed);
        self.list.add(Arc::clone(&device.net_device));
        let mut state = self.state.lock();
        state.removed.retain(|name| name != device.name());
        state.devices.push(device);
    }

    /// Removes a device, whose thread has ended.
    pub fn remove(&self, _permit: &Changing<'_>, device: &Arc<ServedDevice>) {
        self.list.remove(&device.net_device);
        let mut state = self.state.lock();
        state.devices.retain(|other| !Arc::ptr_eq(other, device));
        if device.requested.lock().is_none() {
            state.removed.push(device.name().to_owned());
        }
    }

    /// Gives a device that has changed a new revision.
    pub fn note_change(&self, device: &ServedDevice) {
        let revision = self.last_revision.fetch_add(1, Ordering::Relaxed) + 1;
        device.set_revision(revision);
    }

    /// Notes that the thread of `device` ends. Returns whether the program has nothing to do any more.
    pub fn note_end(&self, device: &ServedDevice) -> bool {
        let was_last = self.running.fetch_sub(1, Ordering::Relaxed) == 1;
        was_last && !self.may_grow && !device.is_removed()
    }

    /// Lets all threads end.
    pub fn end(&self) {
        self.all().iter().for_each(|device| device.stop.end());
    }

    /// Stops the work of all threads. Returns false if one has not stopped within `limit`.
    #[must_use]
    pub fn suspend(&self, limit: Duration) -> bool {
        let (devices, deadline) = (self.all(), Instant::now() + limit);
        devices
            .iter()
            .for_each(|device| device.stop.request_suspend());
        devices
            .iter()
            .all(|device| device.stop.wait_until_suspended(deadline))
    }

    /// Lets all threads continue.
    pub fn resume(&self) {
        self.all().iter().for_each(|device| device.stop.resume());
    }
}
