//! A queue pair: two vrings and a queue of the uplink.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use virtionet_base::RateLimiter;
use virtionet_vhost_user::VringState;
use virtionet_virtio_net::stats::WorkerStats;
use virtionet_virtio_net::uplink::{RxSink, TxFrame, Uplink, UplinkError, UplinkQueue};
use virtionet_virtio_net::{RxQueue, TxQueue};
use virtionet_virtqueue::memory::GuestMemory;

use crate::frame_inbox::FrameInbox;
use crate::vring_slot::{Pushed, VringSlot};
use crate::waker::Waker;

/// A queue pair, as all threads share it. Its worker adds the readiness in a `PairService`. It
/// lasts as long as its device, because its counters do; its queue of the uplink is open only while
/// a front-end is connected.
#[derive(Debug)]
pub struct QueuePair {
    index: u16,
    /// The device's name, for the log.
    device: String,
    rx: VringSlot<RxQueue>,
    tx: VringSlot<TxQueue>,
    /// Frames that only the worker may push to the receiveq.
    inbox: FrameInbox,
    /// The worker has its own reference, so frames take no lock.
    uplink: Mutex<Option<Arc<dyn UplinkQueue>>>,
    waker: Waker,
    /// What its worker counts while it serves this queue pair.
    worker_stats: WorkerStats,
    /// Of log lines about a queue of the uplink that cannot be attached or detached, which a worker
    /// that polls tries again all the time.
    attach_errors: RateLimiter,
    /// The front-end address of the receiveq's descriptors; 0 before it first starts.
    rx_ring_address: AtomicU64,
    memory_node: Mutex<Option<u32>>,
    /// The MAC address that the worker is to announce, as a number; 0 for none.
    announcement: AtomicU64,
}

impl QueuePair {
    /// Queue pair `index` of `device`, whose worker `waker` wakes.
    #[must_use]
    pub fn new(index: u16, device: &str, waker: Waker) -> Self {
        Self {
            index,
            device: device.to_owned(),
            rx: VringSlot::new(format!("{device} pair {index} rx")),
            tx: VringSlot::new(format!("{device} pair {index} tx")),
            inbox: FrameInbox::default(),
            uplink: Mutex::default(),
            waker,
            worker_stats: WorkerStats::default(),
            attach_errors: RateLimiter::new(),
            rx_ring_address: AtomicU64::new(0),
            memory_node: Mutex::new(None),
            announcement: AtomicU64::new(0),
        }
    }

    /// The receiveq.
    #[must_use]
    pub fn rx(&self) -> &VringSlot<RxQueue> {
        &self.rx
    }

    /// The transmitq.
    #[must_use]
    pub fn tx(&self) -> &VringSlot<TxQueue> {
        &self.tx
    }

    /// What its worker counts while it serves this queue pair.
    #[must_use]
    pub fn worker_stats(&self) -> &WorkerStats {
        &self.worker_stats
    }

    /// The frames that only the worker may push to the receiveq.
    #[must_use]
    pub fn inbox(&self) -> &FrameInbox {
        &self.inbox
    }

    /// Decides for a receiveq that starts in `memory` who pushes frames to it. Frames that were meant
    /// for an earlier start are dropped.
    pub(crate) fn prepare_inbox(&self, memory: &GuestMemory) {
        if self.inbox.is_open() {
            self.inbox.close(self.rx.stats());
        }
        if memory.is_in_postcopy() {
            self.inbox.open();
        }
    }

    /// The queue pair's number, from 0.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.index
    }

    /// The queue pair's queue of the uplink, while it is open.
    #[must_use]
    pub fn uplink(&self) -> Option<Arc<dyn UplinkQueue>> {
        self.uplink.lock().clone()
    }

    /// Whether the uplink pushes frames to the receiveq, instead of having them received from it.
    pub(crate) fn receives_pushed_frames(&self) -> bool {
        self.uplink()
            .is_some_and(|uplink| uplink.poll_fd().is_none())
    }

    /// Whether the driver uses the queue pair.
    #[must_use]
    pub fn is_in_use(&self) -> bool {
        self.rx.is_enabled() && self.rx.size() > 0
    }

    /// Opens the pair's queue of `uplink`. Only the session's thread may call this, while none is
    /// open.
    ///
    /// # Errors
    /// When the uplink has no queue for it.
    pub fn open_uplink(
        self: &Arc<Self>,
        uplink: &dyn Uplink,
    ) -> Result<Arc<dyn UplinkQueue>, UplinkError> {
        let rx = Arc::downgrade(self);
        uplink.open_queue(self.index, rx)
    }

    /// Stores the queue that [`QueuePair::open_uplink`] opened.
    pub fn set_uplink(&self, queue: Arc<dyn UplinkQueue>) {
        *self.uplink.lock() = Some(queue);
    }

    /// Drops the queue of the uplink after the front-end has disconnected and the worker has ended.
    pub(crate) fn close_uplink(&self) {
        self.announcement.store(0, Ordering::Relaxed);
        self.inbox.close(self.rx.stats());
        *self.uplink.lock() = None;
    }

    /// Attaches the uplink's queue while the receiveq runs and is enabled, and detaches it
    /// otherwise, so that the uplink steers frames only to queue pairs that can receive them.
    pub(crate) fn reconcile_uplink(&self) {
        let is_live = self.rx.is_enabled() && self.rx.state() == VringState::Running;
        if let Some(uplink) = self.uplink()
            && let Err(error) = uplink.set_attached(is_live)
            && let Some(suppressed) = self.attach_errors.allow()
        {
            let verb = if is_live { "attach" } else { "detach" };
            tracing::error!(
                suppressed,
                "{self}: cannot {verb} the uplink's queue: {error}"
            );
        }
    }

    /// Quarantines both vrings: their worker panicked outside of their turns.
    pub(crate) fn quarantine_after_panic(&self) {
        self.rx.quarantine_after_panic();
        self.tx.quarantine_after_panic();
    }

    /// Makes the worker check everything once.
    pub fn wake(&self) {
        self.waker.wake();
    }

    /// Makes the worker announce `mac`, the guest's address, once. If it has not announced another
    /// one yet, it does not.
    pub(crate) fn announce(&self, mac: [u8; 6]) {
        let [a, b, c, d, e, f] = mac;
        let number = u64::from_be_bytes([0, 0, a, b, c, d, e, f]);
        self.announcement.store(number, Ordering::Relaxed);
        self.wake();
    }

    /// Calls `send` with the address that is to be announced, if there is one. It stays if `send`
    /// returns false.
    pub(crate) fn try_announcement(&self, send: impl FnOnce([u8; 6]) -> bool) {
        let number = self.announcement.swap(0, Ordering::Relaxed);
        let [_, _, a, b, c, d, e, f] = number.to_be_bytes();
        if number != 0 && !send([a, b, c, d, e, f]) {
            // A newer one wins.
            let order = Ordering::Relaxed;
            let _ = self.announcement.compare_exchange(0, number, order, order);
        }
    }

    /// The NUMA node of the receiveq while a front-end is connected, if the kernel reports it.
    #[must_use]
    pub fn memory_node(&self) -> Option<u32> {
        *self.memory_node.lock()
    }

    /// Sets the front-end address of the receiveq.
    pub(crate) fn set_rx_ring_address(&self, address: u64) {
        self.rx_ring_address.store(address, Ordering::Relaxed);
    }

    /// Forgets the location of the receiveq after the front-end has disconnected.
    pub(crate) fn clear_memory_location(&self) {
        self.set_rx_ring_address(0);
        *self.memory_node.lock() = None;
    }

    /// Asks the kernel for the NUMA node of the receiveq.
    pub(crate) fn update_memory_node(&self, memory: &GuestMemory) -> Option<u32> {
        let address = self.rx_ring_address.load(Ordering::Relaxed);
        let address = (address != 0).then(|| memory.host_address(address));
        let node = address
            .flatten()
            .and_then(virtionet_placement::node_of_address);
        *self.memory_node.lock() = node;
        node
    }
}

/// For uplinks that push frames from threads of their own.
impl RxSink for QueuePair {
    fn push(&self, frames: &[TxFrame<'_>]) -> usize {
        self.push_releasing(frames, &mut || ())
    }

    fn push_releasing(&self, frames: &[TxFrame<'_>], release: &mut dyn FnMut()) -> usize {
        match self.rx.push(frames, || self.inbox.is_open(), release) {
            Pushed::Done(descriptors_read) => return descriptors_read,
            Pushed::InPostcopy => self.inbox.put(frames, self.rx.stats()),
            // The vring does not run any more, so the worker must detach the uplink.
            Pushed::NotRunning => {}
        }
        self.wake();
        0
    }
}

impl fmt::Display for QueuePair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} pair {}", self.device, self.index)
    }
}
