//! One queue of a TAP: the data path.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;
use virtionet_virtio_net::header::HEADER_LEN;
use virtionet_virtio_net::port::{Received, TxFrame, UplinkQueue};
use virtionet_virtio_net::stats::RingStats;
use virtionet_virtqueue::memory::GuestSlice;

use super::sentence;
use crate::gate::Gate;
use crate::sys::{self, Full, MAX_PIECES, Outgoing};

/// Pieces of a frame, header included, that need no large list on the stack. A 64 KiB frame in
/// pages has 18 pieces, in 1,526-byte receive buffers 44.
const FEW_PIECES: usize = 48;

/// What all queues of a TAP share.
#[derive(Debug)]
pub(super) struct Shared {
    /// The interface's name.
    pub(super) name: String,
    /// Bytes of the virtio-net header, as negotiated.
    pub(super) header_len: AtomicUsize,
    /// The attached queues. Locked while one is attached or detached, so that their order here is
    /// the kernel's.
    pub(super) attached: Mutex<Attached>,
    full: Gate,
    down: Gate,
    refused: Gate,
    unread: Gate,
}

/// The attached queues of a TAP, as the kernel numbers them: an attached queue gets the next number,
/// and where one is detached, the last one takes its number (drivers/net/tun.c, tun_attach and
/// __tun_detach).
#[derive(Debug, Default)]
pub(super) struct Attached {
    /// The queues' pairs, by the kernel's number.
    pub(super) pairs: Vec<u16>,
    /// How often that changed.
    pub(super) changes: u64,
}

impl Attached {
    fn place_of(&self, pair: u16) -> Option<usize> {
        self.pairs.iter().position(|other| *other == pair)
    }

    /// The kernel attached the queue of `pair`, or detached the one of number `at`.
    fn note(&mut self, pair: u16, at: Option<usize>) {
        match at {
            Some(at) => {
                self.pairs.swap_remove(at);
            }
            None => self.pairs.push(pair),
        }
        self.changes += 1;
    }
}

impl Shared {
    pub(super) fn new(name: String, header_len: usize) -> Self {
        Self {
            name,
            header_len: AtomicUsize::new(header_len),
            attached: Mutex::default(),
            full: Gate::new(),
            down: Gate::new(),
            refused: Gate::new(),
            unread: Gate::new(),
        }
    }

    #[cold]
    fn count_drop(&self, error: &io::Error, stats: &RingStats) {
        let name = &self.name;
        match Loss::of(error) {
            Loss::Full => {
                stats.dropped_uplink_full.add(1);
                if self.full.passes() {
                    tracing::warn!(
                        "TAP {name} has no room and frames are dropped ({error}); the host is too busy to take them"
                    );
                }
            }
            Loss::Down => {
                stats.dropped_uplink_down.add(1);
                if self.down.passes() {
                    tracing::warn!(
                        "TAP {name} is down or gone and frames are dropped ({error}); bring it up with `ip link set {name} up`"
                    );
                }
            }
            Loss::Refused => {
                stats.dropped_uplink_error.add(1);
                if self.refused.passes() {
                    tracing::warn!(
                        "TAP {name} refuses frames and they are dropped ({error}); check what the guest sends"
                    );
                }
            }
        }
    }

    #[cold]
    fn log_unread(&self, error: &io::Error) {
        if self.unread.passes() {
            tracing::warn!("a frame cannot be read from TAP {} ({error})", self.name);
        }
    }
}

/// Why a frame was not taken.
#[derive(Debug, PartialEq, Eq)]
enum Loss {
    Full,
    Down,
    Refused,
}

impl Loss {
    fn of(error: &io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EAGAIN | libc::ENOBUFS) => Self::Full,
            // EIO is a TAP's word for an interface that is not up.
            Some(libc::EIO | libc::EBADFD | libc::ENETDOWN) => Self::Down,
            _ => Self::Refused,
        }
    }
}

/// One queue of a TAP.
#[derive(Debug)]
pub(super) struct TapQueue {
    file: File,
    pair: u16,
    shared: Arc<Shared>,
    /// Whether the kernel steers frames here. Of its own: who has nothing to change must not wait
    /// for other queues, whose detaching takes the kernel milliseconds.
    attached: Mutex<bool>,
}

impl TapQueue {
    /// The queue of this pair, which is detached now.
    pub(super) fn new(file: File, pair: u16, shared: Arc<Shared>) -> Self {
        Self {
            file,
            pair,
            shared,
            attached: Mutex::new(false),
        }
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Sends one frame with one system call.
    #[inline(always)]
    fn send(&self, frame: &TxFrame<'_>, header_len: usize) -> io::Result<usize> {
        let mut header = frame.header.0;
        // `num_buffers` is for received frames; a driver writes 0 (virtio 1.3 §5.1.6.2.1).
        header[HEADER_LEN - 2..].fill(0);
        let header = &header[..header_len.min(HEADER_LEN)];
        let mut list = Outgoing::<FEW_PIECES>::new();
        match list.bytes(header).and_then(|()| list.slices(frame.payload)) {
            Ok(()) => list.write(self.fd()),
            Err(Full) => self.send_pieces(header, frame.payload),
        }
    }

    /// Sends a frame of many pieces: what one system call cannot take is gathered first.
    #[cold]
    fn send_pieces(&self, header: &[u8], payload: &[GuestSlice<'_>]) -> io::Result<usize> {
        let mut rest = Vec::new();
        let mut payload = payload;
        if payload.len() > MAX_PIECES - 1 {
            let (first, last) = payload.split_at(MAX_PIECES - 2);
            payload = first;
            rest = gather(last);
        }
        let mut list = Outgoing::<MAX_PIECES>::new();
        list.bytes(header)
            .and_then(|()| list.slices(payload))
            .and_then(|()| {
                if rest.is_empty() {
                    Ok(())
                } else {
                    list.bytes(&rest)
                }
            })
            .map_err(|Full| io::ErrorKind::InvalidInput)?;
        list.write(self.fd())
    }

    /// Reads one frame with one system call.
    #[inline(always)]
    fn read(&self, buffers: &[GuestSlice<'_>], spill: &mut [u8]) -> io::Result<usize> {
        if buffers.is_empty() {
            sys::read(self.fd(), spill)
        } else if buffers.len() < FEW_PIECES {
            sys::read_into::<FEW_PIECES>(self.fd(), buffers, spill)
        } else {
            read_many(self.fd(), buffers, spill)
        }
    }
}

#[cold]
fn read_many(
    tun: BorrowedFd<'_>,
    buffers: &[GuestSlice<'_>],
    spill: &mut [u8],
) -> io::Result<usize> {
    sys::read_into::<MAX_PIECES>(tun, buffers, spill)
}

fn gather(slices: &[GuestSlice<'_>]) -> Vec<u8> {
    let mut bytes = vec![0; total(slices)];
    let mut at = 0;
    for slice in slices {
        at += slice.copy_to(&mut bytes[at..]);
    }
    bytes
}

#[inline(always)]
fn total(slices: &[GuestSlice<'_>]) -> usize {
    slices
        .iter()
        .fold(0, |sum, slice| sum.saturating_add(slice.len()))
}

impl UplinkQueue for TapQueue {
    fn transmit(&self, frames: &[TxFrame<'_>], stats: &RingStats) {
        let header_len = self.shared.header_len.load(Ordering::Relaxed);
        let (mut sent, mut bytes) = (0, 0);
        for frame in frames {
            match self.send(frame, header_len) {
                Ok(_) => {
                    sent += 1;
                    bytes += u64::try_from(frame.len).unwrap_or(0);
                }
                Err(error) => self.shared.count_drop(&error, stats),
            }
        }
        stats.frames.add(sent);
        stats.bytes.add(bytes);
    }

    fn receive(&self, buffers: &[GuestSlice<'_>], spill: &mut [u8]) -> Received {
        let buffers = &buffers[..buffers.len().min(MAX_PIECES - 1)];
        match self.read(buffers, spill) {
            // The kernel cuts what does not fit and does not say so: a full house is too long. The
            // buffers need no adding up for a frame that the spill alone would hold.
            Ok(len) if len >= spill.len() && len >= total(buffers) + spill.len() => {
                Received::TooLong
            }
            Ok(len) => Received::Frame(len),
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => Received::Empty,
            Err(error) => {
                self.shared.log_unread(&error);
                match error.raw_os_error() {
                    // This frame is lost (the kernel finds no header for it, or the guest's memory
                    // is not there); those behind it are not.
                    Some(libc::EINVAL | libc::EFAULT) => Received::Lost,
                    _ => Received::Failed,
                }
            }
        }
    }

    fn readable(&self) -> Option<BorrowedFd<'_>> {
        Some(self.fd())
    }

    fn set_attached(&self, attached: bool) -> io::Result<()> {
        let mut now = self.attached.lock();
        // The kernel refuses to be told what it knows.
        if *now != attached {
            let mut all = self.shared.attached.lock();
            sys::set_queue_attached(self.fd(), attached)
                .map_err(|e| sentence::queue_refused(&self.shared.name, attached, &e))?;
            let at = all.place_of(self.pair);
            all.note(self.pair, at);
            *now = attached;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_nothing_to_change_waits_for_no_other_queue() {
        let shared = Arc::new(Shared::new("tap0".into(), HEADER_LEN));
        let file = File::open("/dev/null").unwrap();
        let queue = TapQueue::new(file, 0, Arc::clone(&shared));
        let _busy = shared.attached.lock();
        let (tell, told) = std::sync::mpsc::channel();
        std::thread::spawn(move || tell.send(queue.set_attached(false).is_ok()));
        assert_eq!(
            told.recv_timeout(std::time::Duration::from_secs(20)),
            Ok(true)
        );
    }

    #[test]
    fn each_error_has_its_counter() {
        for (errno, loss, value) in [
            (libc::EAGAIN, Loss::Full, [1, 0, 0]),
            (libc::ENOBUFS, Loss::Full, [1, 0, 0]),
            (libc::EIO, Loss::Down, [0, 1, 0]),
            (libc::EBADFD, Loss::Down, [0, 1, 0]),
            (libc::ENETDOWN, Loss::Down, [0, 1, 0]),
            (libc::EINVAL, Loss::Refused, [0, 0, 1]),
            (libc::ENOMEM, Loss::Refused, [0, 0, 1]),
            (libc::EFAULT, Loss::Refused, [0, 0, 1]),
        ] {
            let error = io::Error::from_raw_os_error(errno);
            assert_eq!(Loss::of(&error), loss, "{error}");
            let stats = RingStats::default();
            Shared::new("tap0".into(), HEADER_LEN).count_drop(&error, &stats);
            let counted = [
                stats.dropped_uplink_full.get(),
                stats.dropped_uplink_down.get(),
                stats.dropped_uplink_error.get(),
            ];
            assert_eq!(counted, value, "{error}");
        }
    }
}
