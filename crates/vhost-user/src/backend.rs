//! The interface between a session and its device.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use virtionet_virtqueue::VirtqueueLayout;
use virtionet_virtqueue::memory::{GuestMemory, IovaRange};

use crate::backend_error::BackendError;
use crate::error::RefusedRequest;
use crate::protocol_features;

/// A device that a session drives. The session's thread makes all calls, one at a time, while the
/// device's own threads keep running.
///
/// Vring 2k is the receiveq of queue pair k, and vring 2k+1 is its transmitq. Indices are always
/// below `2 * max_queue_pairs`.
pub trait Backend {
    /// The virtio feature bits that the device offers. The session adds
    /// VHOST_USER_F_PROTOCOL_FEATURES.
    fn features(&self) -> u64;

    /// The protocol features that the device offers, of [`protocol_features::OFFERED`].
    fn protocol_features(&self) -> u64 {
        protocol_features::OFFERED
    }

    /// The number of queue pairs that a front-end may use: 1 to 128.
    fn max_queue_pairs(&self) -> u16;

    /// Called when a front-end has connected. `pid` is its process, if the kernel reports it.
    fn on_connect(&self, _pid: Option<u32>) {}

    /// Called instead of that when a suspended session continues, here or in another process.
    fn on_resume(&self, pid: Option<u32>) {
        self.on_connect(pid);
    }

    /// Called when all vrings of such a session run again that can.
    fn on_resumed(&self) {}

    /// Stops all vrings so that they can continue, and keeps the uplink's queues as they are, so that
    /// frames wait there. Returns the index of each vring that was started, and the base at which it
    /// continues. [`Backend::on_disconnect`] is not called after this.
    fn suspend(&self) -> Vec<(u16, u32)>;

    /// Called when the front-end has accepted these protocol features (see
    /// [`crate::protocol_features`]). QEMU repeats the request for each queue pair.
    fn set_protocol_features(&self, _protocol_features: u64) {}

    /// Called when the front-end has accepted these virtio features: a subset of
    /// [`Backend::features`]. This may happen while vrings run; the format of the vrings
    /// (VIRTIO_F_RING_PACKED) does not change then.
    fn set_features(&self, acked: u64);

    /// Replaces the guest's memory by `memory`, and rebinds every running vring to it. Returns the
    /// vrings that had to be stopped because the new memory does not contain their areas. The new
    /// snapshot may differ from the old one only in its log of what the device writes
    /// ([`GuestMemory::with_log`]); after this returns nothing is written to the old log. A vring
    /// whose areas have no translation yet ([`GuestMemory::knows_areas`]) is not stopped, but waits
    /// for it.
    #[must_use]
    fn set_memory(&self, memory: &Arc<GuestMemory>) -> Vec<UnmappedVring>;

    /// Makes every vring drop the translations that it knows of [`GuestMemory::iotlb`], because those
    /// of `range` have ended. After this returns no vring accesses memory by one of them. A vring
    /// whose own areas are in the range stays started, and continues in `memory`, its present
    /// memory, when their translations are known again.
    fn forget_translations(&self, _range: IovaRange, _memory: &Arc<GuestMemory>) {}

    /// Called when translations have come. Vrings that wait for one look again.
    fn on_translations(&self) {}

    /// Starts a stopped vring. The device polls the vring once although no kick has come, because
    /// the driver may have made chains available before.
    ///
    /// # Errors
    /// When the vring cannot start: its addresses or sizes are wrong, or the host lacks a resource.
    /// The vring then stays stopped, and the session continues without it.
    fn start_vring(&self, index: u16, start: VringStart) -> Result<(), BackendError>;

    /// Stops a vring. The device writes nothing to guest memory after this returns. Returns the
    /// base at which the vring would continue, as in [`VringStart::base`], or `None` when it was
    /// stopped already.
    fn stop_vring(&self, index: u16) -> Option<u32>;

    /// Called when the life of a vring ends, which is stopped: the front-end learns its base, or
    /// has reset it. After a stop without this call, a front-end that does not know where the vring
    /// stopped starts it again with its [`VringStart::first_base`].
    fn forget_progress(&self, _index: u16) {}

    /// Changes [`VringStart::used_log`] of a running vring.
    fn set_used_log(&self, index: u16, used_log: Option<u64>);

    /// Enables or disables a running vring.
    fn set_enabled(&self, index: u16, enabled: bool);

    /// Changes the kick descriptor of a running vring; with `None` the device polls the vring. In
    /// either case the device polls it once, because the last kick may have gone to the old
    /// descriptor.
    ///
    /// # Errors
    /// When the device cannot wait for the descriptor. The vring then keeps the old one.
    fn set_kick(&self, index: u16, kick: Option<Arc<OwnedFd>>) -> Result<(), BackendError>;

    /// Changes the call descriptor of a running vring; with `None` the driver polls. The device
    /// signals the new descriptor once, because the last call may have gone to the old one.
    fn set_call(&self, index: u16, call: Option<Arc<OwnedFd>>);

    /// Called when the front-end has set the call descriptor of a vring, which shows that it has
    /// this vring, whether the driver uses it or not. QEMU sets the call descriptors of all vrings
    /// of its netdev when it connects.
    fn on_vring_announced(&self, _index: u16) {}

    /// Changes the err descriptor of a running vring, which reports the vring's faults to the
    /// front-end.
    fn set_err(&self, index: u16, err: Option<Arc<OwnedFd>>);

    /// Sets the MTU that the guest sees (68 to 65,535 bytes).
    ///
    /// # Errors
    /// When the device cannot carry frames of that size.
    fn set_mtu(&self, mtu: u16) -> Result<(), BackendError>;

    /// Sends a frame from `mac`, by which switches learn where the guest is now. It may be sent later,
    /// and once for several calls.
    fn announce(&self, mac: [u8; 6]);

    /// Called when the connection has ended and all vrings have been stopped. `refused` is the
    /// first request of the front-end that was refused, if there was one.
    fn on_disconnect(&self, _refused: Option<&RefusedRequest>) {}
}

/// Everything that a vring needs to start. The descriptors are non-blocking eventfds.
#[derive(Debug, Clone)]
pub struct VringStart {
    /// The size and the areas, as front-end addresses.
    pub layout: VirtqueueLayout,
    /// The position at which the vring continues, in the form of SET_VRING_BASE. Split: the next
    /// available index, 0 to 65,535. Packed: bits 0-15 are the next available descriptor and its
    /// wrap counter (bit 15), and bits 16-31 are those of the next used descriptor. Not every
    /// front-end fills the upper half.
    pub base: u32,
    /// What SET_VRING_BASE said last, in the same form. It is another value than `base` where the
    /// vring has run since, and was stopped without the front-end's knowledge.
    pub first_base: u32,
    /// The guest address at which writes to the used ring are logged while the memory has a log
    /// (`log_guest_addr` of SET_VRING_ADDR); `None` when they are not.
    pub used_log: Option<u64>,
    /// The descriptor that the driver signals; with `None` the device polls the vring.
    pub kick: Option<Arc<OwnedFd>>,
    /// The descriptor that the device signals; with `None` the driver polls.
    pub call: Option<Arc<OwnedFd>>,
    /// The descriptor that the device signals when it quarantines the vring, if the front-end set
    /// one.
    pub err: Option<Arc<OwnedFd>>,
    /// Whether the vring carries frames. A disabled vring discards TX frames and receives none.
    pub enabled: bool,
    /// The negotiated virtio feature bits.
    pub features: u64,
    /// The guest's memory.
    pub memory: Arc<GuestMemory>,
}

/// A vring that the device stopped because the guest's memory no longer contains its areas.
#[derive(Debug)]
pub struct UnmappedVring {
    /// The vring's index.
    pub index: u16,
    /// The base at which it would continue, as in [`VringStart::base`].
    pub base: u32,
    /// The area that is missing.
    pub error: BackendError,
}
