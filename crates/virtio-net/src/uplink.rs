//! The traits that an uplink implements. An uplink carries the frames of a device.

mod error;

use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Weak};

use virtionet_virtqueue::memory::GuestSlice;

use crate::header::{FrameFormat, VnetHeader};
use crate::stats::VringStats;

pub use error::UplinkError;

/// The most frames in one call.
pub const MAX_BURST: usize = 64;

/// The most buffers that [`UplinkQueue::receive`] fills: what one `readv` takes, and one for its
/// bounce buffer. Further ones stay as they are.
pub const MAX_RECEIVE_BUFFERS: usize = 1023;

/// A frame that the guest transmits: its header, checked and in private memory, and the Ethernet
/// frame in the guest's memory.
#[derive(Debug, Clone, Copy)]
pub struct TxFrame<'a> {
    /// A private copy of the virtio-net header that has passed every check.
    pub header: VnetHeader,
    /// The Ethernet frame, without the header.
    pub payload: &'a [GuestSlice<'a>],
    /// The number of bytes in `payload`: 14 to 65,557 ([`MAX_FRAME`](crate::header::MAX_FRAME)).
    pub len: usize,
}

impl TxFrame<'_> {
    /// A copy of the Ethernet frame.
    #[must_use]
    pub fn copy_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        let mut at = 0;
        for slice in self.payload {
            at += slice.copy_to(&mut bytes[at..]);
        }
        bytes
    }
}

/// The outcome of [`UplinkQueue::receive`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Received {
    /// A frame of this many bytes, header included, is in the buffers and the bounce buffer.
    Frame(usize),
    /// No frame waits; the uplink's descriptor becomes readable when one arrives.
    Empty,
    /// A frame was longer than the buffers and the bounce buffer together and is lost; they hold
    /// part of it.
    TooLong,
    /// One frame could not be read and is lost; more frames may wait.
    Lost,
    /// The uplink failed: it was deleted, or it is down. The frames that wait in it are not lost.
    Failed,
}

/// One queue of an uplink, which a queue pair's worker transmits to and receives from.
///
/// Any thread may make any call, though one worker makes nearly all of them.
pub trait UplinkQueue: Send + Sync + fmt::Debug {
    /// Transmits `frames` (at most [`MAX_BURST`]) in order. It never blocks and never fails as a
    /// whole: a frame that cannot be transmitted is dropped and counted in `stats`
    /// (`dropped_uplink_full`, `dropped_uplink_error`, `dropped_uplink_down`), a frame that is
    /// transmitted is counted there in `frames` and `bytes`.
    fn transmit(&self, frames: &[TxFrame<'_>], stats: &VringStats);

    /// Does the same, and calls `release` as soon as nothing reads the frames' memory any more, if it
    /// is before other drivers see the frames. `release` gives the buffers back to the sending driver.
    /// It has no effect the second time, and the caller calls it afterwards in any case.
    ///
    /// An uplink must not call it before a frame is where the end of this process cannot lose it,
    /// except for frames to another guest, of which one burst may be lost.
    fn transmit_releasing(
        &self,
        frames: &[TxFrame<'_>],
        stats: &VringStats,
        _release: &mut dyn FnMut(),
    ) {
        self.transmit(frames, stats);
    }

    /// Receives one frame: a virtio-net header of the negotiated length, then the Ethernet frame,
    /// into `buffers` one after the other, and the part that does not fit there into `bounce`. The
    /// caller sets `num_buffers` in the header. It never blocks.
    fn receive(&self, buffers: &[GuestSlice<'_>], bounce: &mut [u8]) -> Received;

    /// The descriptor that becomes readable when a frame waits, for edge-triggered polling; `None`
    /// where [`receive`](Self::receive) never finds a frame.
    fn poll_fd(&self) -> Option<BorrowedFd<'_>>;

    /// Starts or stops the steering of frames to this queue. Idempotent.
    ///
    /// # Errors
    /// When the host refuses it.
    fn set_attached(&self, attached: bool) -> Result<(), UplinkError>;
}

/// A receiveq to which an uplink such as a switch pushes frames, at any time and from any thread.
pub trait RxSink: Send + Sync + fmt::Debug {
    /// Copies `frames` (at most [`MAX_BURST`]), in order, to the guest's buffers, and interrupts
    /// the guest once if its driver asks for that. The headers must request no offload that the
    /// driver did not negotiate ([`FrameFormat`]); the receiveq sets `num_buffers`.
    ///
    /// It never waits for the guest: a frame without a buffer is dropped and counted with the
    /// receiving ring (`dropped_no_buffer`, `dropped_too_long`), and so is a frame that arrives
    /// while the ring is stopped or disabled (`dropped_disabled`). The ring is locked during the
    /// call, so the caller must not hold another receiveq's lock.
    ///
    /// Returns how many descriptors of the ring were read, those of invalid chains included: a
    /// measure of the work that the receiving guest's ring caused.
    fn push(&self, frames: &[TxFrame<'_>]) -> usize;

    /// Does the same, and calls `release` (see [`UplinkQueue::transmit_releasing`]) after the frames
    /// were copied and before the guest sees them, if the receiveq is one that can do so.
    fn push_releasing(&self, frames: &[TxFrame<'_>], _release: &mut dyn FnMut()) -> usize {
        self.push(frames)
    }
}

/// A reference to no receiveq, for an uplink that no device uses.
#[must_use]
pub fn null_rx_sink() -> Weak<dyn RxSink> {
    Weak::<NullRxSink>::new()
}

#[derive(Debug)]
struct NullRxSink;

impl RxSink for NullRxSink {
    fn push(&self, _frames: &[TxFrame<'_>]) -> usize {
        0
    }
}

/// Where the frames of one device go.
pub trait Uplink: Send + Sync + fmt::Debug {
    /// Opens the queue of queue pair `pair`, detached. The device calls it when the first ring of
    /// the pair starts, and again for the next front-end after it has dropped the queue. `rx` is
    /// the receiveq of the pair, the same each time, for an uplink that pushes frames.
    ///
    /// # Errors
    /// When the host or the uplink refuses a further queue.
    fn open_queue(
        &self,
        pair: u16,
        rx: Weak<dyn RxSink>,
    ) -> Result<Arc<dyn UplinkQueue>, UplinkError>;

    /// Sets the header's length and the offloads that the driver negotiated. The device calls it
    /// before the first frame and whenever the negotiated features change.
    ///
    /// # Errors
    /// When the host refuses it.
    fn set_format(&self, format: FrameFormat) -> Result<(), UplinkError>;

    /// Makes sure that the uplink carries frames of this MTU (bytes after the Ethernet header).
    ///
    /// # Errors
    /// When it cannot.
    fn set_mtu(&self, mtu: u16) -> Result<(), UplinkError>;

    /// The kind of uplink, as the command line spells it: `tap`, `switch`, `null`.
    fn kind(&self) -> &'static str;

    /// The name: a TAP's interface, a switch's name.
    fn name(&self) -> String;

    /// Finds out whether the uplink can carry frames, and opens its queues again where the host's
    /// interface was deleted and is there again. The device calls it several times a second while a
    /// front-end is connected, so it must be cheap and must not wait for the other end.
    ///
    /// Queues stay usable all the time: until they are opened again they drop what is transmitted,
    /// and what is set meanwhile (the format, the MTU, whether a queue is attached) takes effect
    /// then. The descriptors that [`UplinkQueue::poll_fd`] returned stay the same.
    ///
    /// # Errors
    /// Why the uplink carries no frames now.
    fn refresh(&self) -> Result<UplinkChange, UplinkError> {
        Ok(UplinkChange::Unchanged)
    }

    /// A MAC address that this device and another one of the uplink use at once, if there is one.
    fn address_conflict(&self) -> Option<AddressConflict> {
        None
    }

    /// The present state of the host's interface whose queues this uplink uses; `None` where there
    /// is none.
    fn host_interface(&self) -> Option<HostInterface> {
        None
    }
}

/// A MAC address that two devices of a switch use at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddressConflict {
    /// The address.
    pub mac: [u8; 6],
    /// Who uses it: `device NAME`, `the host behind TAP NAME`.
    pub users: [String; 2],
    /// The switch's name.
    pub switch: String,
}

impl fmt::Display for AddressConflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.mac;
        let [first, second] = &self.users;
        write!(
            f,
            "MAC address {a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x} is used by {first} and by {second} on switch {}, so each gets frames of the other; give one of them another address",
            self.switch
        )
    }
}

/// What [`Uplink::refresh`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UplinkChange {
    /// Nothing.
    Unchanged,
    /// The interface was deleted and is there again, and the queues were opened again.
    Reopened,
}

/// An interface of the host, and the queue pair that each of its queues serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostInterface {
    /// The interface's name.
    pub name: String,
    /// The interface's index, which distinguishes it from an interface of the same name in another
    /// network namespace.
    pub index: u32,
    /// How often a queue was attached or detached so far. The kernel forgets a queue's settings
    /// when it detaches the queue, even if the queue is attached again.
    pub changes: u64,
    /// The queue pair of each attached queue, indexed by the host's number of the queue.
    pub queues: Vec<u16>,
}
