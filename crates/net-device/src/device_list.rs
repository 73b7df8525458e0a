//! The devices of the process, as the threads see them that serve all devices.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::net_device::NetDevice;

/// The devices of the process. It changes while other threads use it.
#[derive(Debug, Default)]
pub struct DeviceList(Mutex<Vec<Arc<NetDevice>>>);

impl DeviceList {
    /// A list of these devices.
    #[must_use]
    pub fn new(devices: impl IntoIterator<Item = Arc<NetDevice>>) -> Self {
        Self(Mutex::new(devices.into_iter().collect()))
    }

    /// The devices at present. The result keeps them alive.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<NetDevice>> {
        self.0.lock().clone()
    }

    /// Adds a device.
    pub fn add(&self, device: Arc<NetDevice>) {
        self.0.lock().push(device);
    }

    /// Removes a device.
    pub fn remove(&self, device: &Arc<NetDevice>) {
        self.0.lock().retain(|other| !Arc::ptr_eq(other, device));
    }
}
