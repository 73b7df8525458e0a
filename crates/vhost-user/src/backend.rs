//! What a session asks of the device.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use virtionet_virtqueue::VirtqueueLayout;
use virtionet_virtqueue::memory::GuestMemory;

/// A device that a session drives. All calls come from the session's thread, one at a time; the
/// device's own threads go on meanwhile.
///
/// Ring 2k is receiveq of queue pair k, ring 2k+1 its transmitq; indices are always below
/// `2 * max_queue_pairs`.
pub trait Backend {
    /// The virtio feature bits offered. The session adds VHOST_USER_F_PROTOCOL_FEATURES by itself.
    fn features(&self) -> u64;

    /// Queue pairs that a front-end may use: 1 to 128.
    fn max_queue_pairs(&self) -> u16;

    /// A front-end is connected; `pid` is its process, where the kernel tells.
    fn on_connect(&self, _pid: Option<u32>) {}

    /// The front-end took these protocol features (see [`crate::protocol_features`]). QEMU says so once a
    /// queue pair.
    fn set_protocol_features(&self, _protocol_features: u64) {}

    /// The front-end took these virtio features: a subset of [`Backend::features`]. May come while
    /// rings run; the format of the rings (VIRTIO_F_RING_PACKED) does not change then.
    fn set_features(&self, acked: u64);

    /// The guest's memory is now this: re-bind every running ring.
    fn set_memory(&self, memory: &Arc<GuestMemory>);

    /// Starts a ring that does not run. Look at it once even though no kick has come: chains may
    /// wait in it from before.
    ///
    /// # Errors
    /// When it cannot be a ring: wrong addresses or sizes. The session goes on without it.
    fn start_vring(&self, index: u16, start: VringStart) -> Result<(), BackendError>;

    /// Stops a ring. Nothing is written to guest memory once this returns. The result is where it
    /// would go on, as in [`VringStart::base`]; `None` when it did not run.
    fn stop_vring(&self, index: u16) -> Option<u32>;

    /// Enables or disables a running ring.
    fn set_enabled(&self, index: u16, enabled: bool);

    /// Changes the kick descriptor of a running ring; `None`: the ring is to be polled. Look at
    /// the ring once: the last kick may have gone to the old descriptor.
    ///
    /// # Errors
    /// When the device cannot wait for it.
    fn set_kick(&self, index: u16, kick: Option<Arc<OwnedFd>>) -> Result<(), BackendError>;

    /// Changes the call descriptor of a running ring; `None`: the driver polls. Signal it once: the
    /// last call may have gone to the old descriptor.
    fn set_call(&self, index: u16, call: Option<Arc<OwnedFd>>);

    /// The front-end has a ring of this index, whether the driver uses it or not: it said what to
    /// call. QEMU does that for all rings of its netdev when it connects.
    fn on_vring_announced(&self, _index: u16) {}

    /// Changes the descriptor that tells the front-end of a running ring's faults.
    fn set_err(&self, index: u16, err: Option<Arc<OwnedFd>>);

    /// The guest sees this MTU (68 to 65,535 bytes).
    ///
    /// # Errors
    /// When the device cannot carry frames of that size.
    fn set_mtu(&self, mtu: u16) -> Result<(), BackendError>;

    /// The connection has ended; all rings have been stopped.
    fn on_disconnect(&self) {}
}

/// All that a ring needs to start. The descriptors are eventfds in non-blocking mode.
#[derive(Debug, Clone)]
pub struct VringStart {
    /// Size and areas, as front-end addresses.
    pub layout: VirtqueueLayout,
    /// Where the ring goes on, as SET_VRING_BASE has it. Split: the next available index, 0 to
    /// 65,535. Packed: bits 0-15 are the next available slot and its wrap counter (bit 15), bits
    /// 16-31 the same of the next used slot; not every front-end fills the upper half.
    pub base: u32,
    /// What the driver signals; `None`: the ring is to be polled.
    pub kick: Option<Arc<OwnedFd>>,
    /// What we signal; `None`: the driver polls.
    pub call: Option<Arc<OwnedFd>>,
    /// What we signal when the ring is at fault, if the front-end cares.
    pub err: Option<Arc<OwnedFd>>,
    /// Whether frames pass; a disabled ring discards TX and supplies no RX.
    pub enabled: bool,
    /// The virtio feature bits in force.
    pub features: u64,
    /// The guest's memory.
    pub memory: Arc<GuestMemory>,
}

/// Why a device cannot do what a request asks: one sentence.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BackendError(String);

impl BackendError {
    /// The sentence: what happened, with the value, and what to do.
    pub fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }
}
