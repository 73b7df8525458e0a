//! What a queue pair asks of its uplink.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Weak};

use virtionet_virtqueue::memory::GuestSlice;

use crate::header::{FrameFormat, VnetHeader};
use crate::stats::VringStats;

/// Most frames handed over in one call.
pub const MAX_BURST: usize = 64;

/// A frame that the guest sends: its header, checked and in private memory, and the Ethernet frame
/// where the guest wrote it.
#[derive(Debug, Clone, Copy)]
pub struct TxFrame<'a> {
    /// The virtio-net header, a private copy that has passed every check.
    pub header: VnetHeader,
    /// The Ethernet frame, without the header.
    pub payload: &'a [GuestSlice<'a>],
    /// Bytes in `payload`: 14 to 65,550.
    pub len: usize,
}

/// What [`UplinkQueue::receive`] met.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Received {
    /// A frame of this many bytes, header included, lies in the buffers and the bounce buffer.
    Frame(usize),
    /// No frame waits; the uplink's descriptor becomes readable when one comes.
    Empty,
    /// A frame was longer than buffers and bounce buffer and is lost; they hold part of it.
    TooLong,
    /// One frame could not be read and is lost; others may wait behind it.
    Lost,
    /// The uplink failed (gone, down). Nothing is lost that the uplink still holds.
    Failed,
}

/// One queue of an uplink: what a queue pair's worker sends to and receives from. All calls are
/// cheap to make from several threads, though one worker makes nearly all of them.
pub trait UplinkQueue: Send + Sync + std::fmt::Debug {
    /// Sends `frames` (at most [`MAX_BURST`]) in order. Never blocks and never fails as a whole:
    /// what cannot be sent is dropped and counted in `stats` (`dropped_uplink_full`,
    /// `dropped_uplink_error`, `dropped_uplink_down`), what is sent in `frames` and `bytes`.
    fn transmit(&self, frames: &[TxFrame<'_>], stats: &VringStats);

    /// Receives one frame: a virtio-net header of the negotiated length, then the Ethernet frame,
    /// into `buffers` slice after slice, and what does not fit there into `bounce`. `num_buffers` in
    /// the header is the caller's.
    fn receive(&self, buffers: &[GuestSlice<'_>], bounce: &mut [u8]) -> Received;

    /// What becomes readable when a frame waits, for edge-triggered polling; `None` where frames
    /// never come by themselves.
    fn poll_fd(&self) -> Option<BorrowedFd<'_>>;

    /// Lets frames be steered to this queue, or no longer. Idempotent.
    ///
    /// # Errors
    /// What the host says.
    fn set_attached(&self, attached: bool) -> io::Result<()>;
}

/// A receiveq as an uplink sees it whose frames come at any time and from any thread (a switch).
pub trait RxSink: Send + Sync + std::fmt::Debug {
    /// Copies `frames` (at most [`MAX_BURST`]), in order, to the guest's buffers, and interrupts
    /// the guest once if it wants that. What a header asks of the guest must be among what it took
    /// ([`FrameFormat`]); `num_buffers` is the ring's own affair.
    ///
    /// Never waits for the guest: a frame for which there is no room is dropped and counted with
    /// the receiving ring (`dropped_no_buffer`, `dropped_too_long`), as is one that comes while
    /// the ring is stopped or disabled (`dropped_disabled`). The ring is locked meanwhile, so the
    /// caller must not hold another receiveq's lock.
    fn push(&self, frames: &[TxFrame<'_>]);
}

/// A receiveq that never was: what uplinks get that no device stands behind.
#[must_use]
pub fn null_rx_sink() -> Weak<dyn RxSink> {
    Weak::<NullRxSink>::new()
}

#[derive(Debug)]
struct NullRxSink;

impl RxSink for NullRxSink {
    fn push(&self, _frames: &[TxFrame<'_>]) {}
}

/// Where the frames of one device go.
pub trait Uplink: Send + Sync + std::fmt::Debug {
    /// Opens queue `pair`, detached. Called once a pair, when its first ring starts. `rx` is the
    /// pair's receiveq, for uplinks that push frames instead of waiting to be asked for them.
    ///
    /// # Errors
    /// One sentence for a person.
    fn open_queue(
        &self,
        pair: u16,
        rx: Weak<dyn RxSink>,
    ) -> Result<Arc<dyn UplinkQueue>, UplinkError>;

    /// Tells the uplink what the guest negotiated: header length and the offloads it takes. Called
    /// before traffic and whenever that changes.
    ///
    /// # Errors
    /// What the host says.
    fn set_format(&self, format: FrameFormat) -> io::Result<()>;

    /// Makes sure that frames of this MTU (bytes after the Ethernet header) can pass.
    ///
    /// # Errors
    /// When they cannot.
    fn set_mtu(&self, mtu: u16) -> io::Result<()>;

    /// Its kind, as the command line spells it: `tap`, `switch`, `null`.
    fn kind(&self) -> &'static str;

    /// Its name: the interface's for a TAP.
    fn name(&self) -> String;

    /// The host's interface that its queues are queues of, as it is now; `None` where there is
    /// none.
    fn host_interface(&self) -> Option<HostInterface> {
        None
    }
}

/// An interface of the host, and which queue pair each of its queues serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostInterface {
    /// Its name.
    pub name: String,
    /// Its index, which tells it from one of that name in another network namespace.
    pub index: u32,
    /// How often a queue was attached or detached so far. What the kernel kept of a queue is gone
    /// once it was, even where it is back.
    pub changes: u64,
    /// By the host's own number of an attached queue: the queue pair that it serves.
    pub queues: Vec<u16>,
}

/// Why an uplink cannot be had: one sentence that says what to do.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct UplinkError(pub String);
