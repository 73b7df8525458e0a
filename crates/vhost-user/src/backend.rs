//! The interface between a session and its device.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use virtionet_virtqueue::VirtqueueLayout;
use virtionet_virtqueue::memory::GuestMemory;

use crate::backend_error::BackendError;
use crate::error::RefusedRequest;

/// A device that a session drives. All calls come from the session's thread, one at a time; the
/// device's own threads go on meanwhile.
///
/// Vring 2k is receiveq of queue pair k, vring 2k+1 its transmitq; indices are always below
/// `2 * max_queue_pairs`.
pub trait Backend {
    /// The virtio feature bits offered. The session adds VHOST_USER_F_PROTOCOL_FEATURES by itself.
    fn features(&self) -> u64;

    /// Queue pairs that a front-end may use: 1 to 128.
    fn max_queue_pairs(&self) -> u16;

    /// A front-end is connected; `pid` is its process, if the kernel reports it.
    fn on_connect(&self, _pid: Option<u32>) {}

    /// The front-end accepted these protocol features (see [`crate::protocol_features`]). QEMU
    /// repeats this for each queue pair.
    fn set_protocol_features(&self, _protocol_features: u64) {}

    /// The front-end accepted these virtio features: a subset of [`Backend::features`]. May come
    /// while vrings run; the format of the vrings (VIRTIO_F_RING_PACKED) does not change then.
    fn set_features(&self, acked: u64);

    /// The guest's memory is now `memory`: rebinds every vring that runs to it. The result names
    /// the vrings that had to be stopped because the new memory does not contain their areas.
    #[must_use]
    fn set_memory(&self, memory: &Arc<GuestMemory>) -> Vec<UnmappedVring>;

    /// Starts a vring that is stopped. The device looks for chains once even though no kick has
    /// come, because the driver may have made them available before.
    ///
    /// # Errors
    /// When it cannot be started: wrong addresses or sizes, or the host lacks something. The vring
    /// is then still stopped, and the session goes on without it.
    fn start_vring(&self, index: u16, start: VringStart) -> Result<(), BackendError>;

    /// Stops a vring. Nothing is written to guest memory once this returns. The result is where the
    /// vring would go on, as in [`VringStart::base`]; `None` when it was stopped already.
    fn stop_vring(&self, index: u16) -> Option<u32>;

    /// Enables or disables a running vring.
    fn set_enabled(&self, index: u16, enabled: bool);

    /// Changes the kick descriptor of a running vring; `None`: the vring is to be polled. The
    /// device polls the vring once, because the last kick may have gone to the old descriptor.
    ///
    /// # Errors
    /// When the device cannot wait for it. The vring then goes on with the old descriptor.
    fn set_kick(&self, index: u16, kick: Option<Arc<OwnedFd>>) -> Result<(), BackendError>;

    /// Changes the call descriptor of a running vring; `None`: the driver polls. The
    /// device signals it once, because the last call may have gone to the old descriptor.
    fn set_call(&self, index: u16, call: Option<Arc<OwnedFd>>);

    /// The front-end has a vring of this index, whether the driver uses it or not: it set the
    /// call descriptor. QEMU does that for all vrings of its netdev when it connects.
    fn on_vring_announced(&self, _index: u16) {}

    /// Changes the descriptor by which the front-end learns of a running vring's faults.
    fn set_err(&self, index: u16, err: Option<Arc<OwnedFd>>);

    /// The guest sees this MTU (68 to 65,535 bytes).
    ///
    /// # Errors
    /// When the device cannot carry frames of that size.
    fn set_mtu(&self, mtu: u16) -> Result<(), BackendError>;

    /// The connection has ended, and all vrings have been stopped. `refused` is the first request
    /// of the front-end that was refused, if there was one.
    fn on_disconnect(&self, _refused: Option<&RefusedRequest>) {}
}

/// All that a vring needs to start. The descriptors are eventfds in non-blocking mode.
#[derive(Debug, Clone)]
pub struct VringStart {
    /// Size and areas, as front-end addresses.
    pub layout: VirtqueueLayout,
    /// Where the vring goes on, as SET_VRING_BASE has it. Split: the next available index, 0 to
    /// 65,535. Packed: bits 0-15 are the next available slot and its wrap counter (bit 15), bits
    /// 16-31 the same of the next used slot; not every front-end fills the upper half.
    pub base: u32,
    /// What the driver signals; `None`: the vring is to be polled.
    pub kick: Option<Arc<OwnedFd>>,
    /// What the device signals; `None`: the driver polls.
    pub call: Option<Arc<OwnedFd>>,
    /// What the device signals when it quarantines the vring, if the front-end set one.
    pub err: Option<Arc<OwnedFd>>,
    /// Whether frames pass; a disabled vring discards TX and supplies no RX.
    pub enabled: bool,
    /// The virtio feature bits in force.
    pub features: u64,
    /// The guest's memory.
    pub memory: Arc<GuestMemory>,
}

/// A vring that the device stopped because the guest's memory no longer contains its areas.
#[derive(Debug)]
pub struct UnmappedVring {
    /// The vring's index.
    pub index: u16,
    /// Where it would go on, as in [`VringStart::base`].
    pub base: u32,
    /// Which area is missing.
    pub error: BackendError,
}
