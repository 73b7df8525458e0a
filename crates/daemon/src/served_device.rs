//! A device as its thread, and a handover, see it.

use std::sync::Arc;

use parking_lot::Mutex;
use virtionet_vhost_user::SuspendedSession;

use virtionet_net_device::net_device::NetDevice;

/// The suspended session of a front-end, if there is one. The device's thread continues it.
pub type SuspendedSlot = Mutex<Option<Box<SuspendedSession>>>;

/// A device, and its session while that is suspended.
#[derive(Debug)]
pub struct ServedDevice {
    /// The device.
    pub net_device: Arc<NetDevice>,
    /// Its suspended session.
    pub suspended: SuspendedSlot,
}

/// The number of devices whose session is suspended.
#[must_use]
pub fn count_suspended(devices: &[Arc<ServedDevice>]) -> usize {
    let suspended = |device: &&Arc<ServedDevice>| device.suspended.lock().is_some();
    devices.iter().filter(suspended).count()
}
