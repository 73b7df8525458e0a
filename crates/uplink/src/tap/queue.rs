//! The data path of one queue of a TAP.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtionet_base::RateLimiter;
use virtionet_virtio_net::header::VNET_HEADER_LEN;
use virtionet_virtio_net::stats::VringStats;
use virtionet_virtio_net::uplink::{
    MAX_RECEIVE_BUFFERS, Received, TxFrame, UplinkError, UplinkQueue,
};
use virtionet_virtqueue::memory::GuestSlice;

use super::{error, rights};
use crate::sys::{self, IOV_MAX, IovecList, IovecListFull};

/// The segments of a frame, header included, up to which a small list on the stack is enough. A
/// frame of 64 KiB has 18 segments in pages and 44 in receive buffers of 1,526 bytes.
const INLINE_IOVECS: usize = 48;

// The bounce buffer needs one segment.
const _: () = assert!(MAX_RECEIVE_BUFFERS < IOV_MAX);

/// The state that all queues of a TAP share.
#[derive(Debug)]
pub(super) struct TapShared {
    /// The interface's name.
    pub(super) name: String,
    /// The number of bytes of the virtio-net header, as negotiated.
    pub(super) header_len: AtomicUsize,
    /// The attached queues. Locked while a queue is attached or detached, so that their order here
    /// is the same as in the kernel.
    pub(super) attached: Mutex<AttachedQueues>,
    /// Whether the queues belong to this process, and not still to the one before.
    pub(super) is_owner: AtomicBool,
    full_log_limit: RateLimiter,
    down_log_limit: RateLimiter,
    refused_log_limit: RateLimiter,
    read_error_log_limit: RateLimiter,
}

/// The attached queues of a TAP, as the kernel numbers them: a queue that is attached gets the next
/// number, and when a queue is detached the last one gets its number (drivers/net/tun.c, tun_attach
/// and __tun_detach).
#[derive(Debug, Default)]
pub(super) struct AttachedQueues {
    /// The index of each queue's queue pair, by the kernel's number of the queue.
    pub(super) pairs: Vec<u16>,
    /// How often a queue was attached or detached.
    pub(super) changes: u64,
}

impl AttachedQueues {
    fn number_of(&self, pair: u16) -> Option<usize> {
        self.pairs.iter().position(|other| *other == pair)
    }

    /// Records that the kernel has no queue of `pair`, because the interface was deleted.
    fn forget(&mut self, pair: u16) {
        self.pairs.retain(|other| *other != pair);
    }

    /// Records that the kernel attached the queue of `pair`, or detached the queue of number `at`.
    fn record_change(&mut self, pair: u16, at: Option<usize>) {
        match at {
            Some(at) => {
                self.pairs.swap_remove(at);
            }
            None => self.pairs.push(pair),
        }
        self.changes += 1;
    }
}

impl TapShared {
    pub(super) fn new(name: String, header_len: usize) -> Self {
        Self {
            name,
            header_len: AtomicUsize::new(header_len),
            attached: Mutex::default(),
            is_owner: AtomicBool::new(true),
            full_log_limit: RateLimiter::new(),
            down_log_limit: RateLimiter::new(),
            refused_log_limit: RateLimiter::new(),
            read_error_log_limit: RateLimiter::new(),
        }
    }

    #[cold]
    fn count_drop(&self, error: &io::Error, stats: &VringStats) {
        let name = &self.name;
        match DropReason::from_error(error) {
            DropReason::Full => {
                stats.dropped_uplink_full.add(1);
                if let Some(suppressed) = self.full_log_limit.allow() {
                    tracing::warn!(
                        suppressed,
                        "TAP {name} is full and frames are dropped ({error}); give the host more CPU time"
                    );
                }
            }
            DropReason::Down => {
                stats.dropped_uplink_down.add(1);
                if let Some(suppressed) = self.down_log_limit.allow() {
                    tracing::warn!(
                        suppressed,
                        "TAP {name} is down and frames are dropped ({error}); bring it up with `ip link set {name} up`"
                    );
                }
            }
            // `Uplink::refresh` reports it once.
            DropReason::Gone => stats.dropped_uplink_down.add(1),
            DropReason::Refused => {
                stats.dropped_uplink_error.add(1);
                if let Some(suppressed) = self.refused_log_limit.allow() {
                    tracing::warn!(
                        suppressed,
                        "TAP {name} refuses frames and they are dropped ({error}); check what the guest sends"
                    );
                }
            }
        }
    }

    #[cold]
    fn log_read_error(&self, error: &io::Error) {
        if DropReason::from_error(error) != DropReason::Gone
            && let Some(suppressed) = self.read_error_log_limit.allow()
        {
            tracing::warn!(
                suppressed,
                "a frame cannot be read from TAP {} ({error})",
                self.name
            );
        }
    }
}

/// Why the kernel did not accept a frame.
#[derive(Debug, PartialEq, Eq)]
enum DropReason {
    Full,
    Down,
    /// The interface was deleted.
    Gone,
    Refused,
}

impl DropReason {
    fn from_error(error: &io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EAGAIN | libc::ENOBUFS) => Self::Full,
            // The kernel reports EIO where a TAP is not up.
            Some(libc::EIO | libc::ENETDOWN) => Self::Down,
            Some(libc::EBADFD) => Self::Gone,
            _ => Self::Refused,
        }
    }
}

/// One queue of a TAP.
#[derive(Debug)]
pub(super) struct TapQueue {
    file: File,
    pair: u16,
    shared: Arc<TapShared>,
    /// Whether the kernel steers frames to this queue. Each queue has a lock of its own, because a
    /// call that changes nothing must not wait while the kernel detaches another queue, which takes
    /// milliseconds.
    attached: Mutex<bool>,
}

impl TapQueue {
    /// Creates the queue of a queue pair from a detached queue of the TAP.
    pub(super) fn new(file: File, pair: u16, shared: Arc<TapShared>) -> Self {
        Self {
            file,
            pair,
            shared,
            attached: Mutex::new(false),
        }
    }

    /// The queue of a queue pair that the process before this one opened. The shared state says
    /// whether it is attached.
    pub(super) fn inherited(file: File, pair: u16, shared: Arc<TapShared>) -> Self {
        let queue = Self::new(file, pair, shared);
        queue.read_attachment();
        queue
    }

    /// Takes from the shared state whether the queue is attached.
    pub(super) fn read_attachment(&self) {
        let mut attached = self.attached.lock();
        *attached = self.shared.attached.lock().number_of(self.pair).is_some();
    }

    /// The index of its queue pair.
    pub(super) fn pair(&self) -> u16 {
        self.pair
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Whether the queue has no interface: it was deleted, or was not there yet when the queue was
    /// made.
    // syscalls: poll
    pub(super) fn is_lost(&self) -> bool {
        let mut fds = [PollFd::new(&self.file, PollFlags::empty())];
        // Of a queue without an interface the driver reports nothing but an error.
        poll(&mut fds, Some(&Timespec::default())).is_ok()
            && fds[0].revents().contains(PollFlags::ERR)
    }

    /// Makes a lost queue one of the TAP `name`, attached if it was. The file stays the same, and
    /// so does every epoll that waits for it.
    pub(super) fn reopen(&self, name: &str) -> io::Result<()> {
        let mut attached = self.attached.lock();
        let mut all = self.shared.attached.lock();
        all.forget(self.pair);
        // This attaches the queue.
        rights::attach(self.fd(), name)?;
        all.record_change(self.pair, None);
        if !*attached {
            // Should that fail, the queue is attached, and is detached when the device next asks.
            *attached = true;
            sys::set_queue_attached(self.fd(), false)?;
            *attached = false;
            let at = all.number_of(self.pair);
            all.record_change(self.pair, at);
        }
        Ok(())
    }

    /// Sends one frame with one system call.
    #[inline(always)]
    fn send(&self, frame: &TxFrame<'_>, header_len: usize) -> io::Result<usize> {
        let mut header = frame.header.0;
        // `num_buffers` has a meaning for received frames only (virtio 1.3 §5.1.6.2.1).
        header[VNET_HEADER_LEN - 2..].fill(0);
        let header = &header[..header_len.min(VNET_HEADER_LEN)];
        let mut list = IovecList::<INLINE_IOVECS>::new();
        match list
            .push_bytes(header)
            .and_then(|()| list.push_slices(frame.payload))
        {
            Ok(()) => list.write_to(self.fd()),
            Err(IovecListFull) => self.send_segments(header, frame.payload),
        }
    }

    /// Sends a frame of many segments. Those beyond the limit of the system call are copied into
    /// one.
    #[cold]
    fn send_segments(&self, header: &[u8], payload: &[GuestSlice<'_>]) -> io::Result<usize> {
        let mut rest = Vec::new();
        let mut payload = payload;
        if payload.len() > IOV_MAX - 1 {
            let (first, last) = payload.split_at(IOV_MAX - 2);
            payload = first;
            rest = gather(last);
        }
        let mut list = IovecList::<IOV_MAX>::new();
        list.push_bytes(header)
            .and_then(|()| list.push_slices(payload))
            .and_then(|()| {
                if rest.is_empty() {
                    Ok(())
                } else {
                    list.push_bytes(&rest)
                }
            })
            .map_err(|IovecListFull| io::ErrorKind::InvalidInput)?;
        list.write_to(self.fd())
    }

    /// Reads one frame with one system call.
    #[inline(always)]
    fn read(&self, buffers: &[GuestSlice<'_>], bounce: &mut [u8]) -> io::Result<usize> {
        if buffers.is_empty() {
            sys::read(self.fd(), bounce)
        } else if buffers.len() < INLINE_IOVECS {
            sys::read_into::<INLINE_IOVECS>(self.fd(), buffers, bounce)
        } else {
            read_long_list(self.fd(), buffers, bounce)
        }
    }
}

#[cold]
fn read_long_list(
    tun: BorrowedFd<'_>,
    buffers: &[GuestSlice<'_>],
    bounce: &mut [u8],
) -> io::Result<usize> {
    sys::read_into::<IOV_MAX>(tun, buffers, bounce)
}

/// The kernel reports pages of guest memory that have vanished with EFAULT, and raises no signal.
#[cold]
fn find_lost_memory(error: &io::Error, slices: &[GuestSlice<'_>]) {
    if error.raw_os_error() == Some(libc::EFAULT) {
        slices.iter().for_each(GuestSlice::probe);
    }
}

fn gather(slices: &[GuestSlice<'_>]) -> Vec<u8> {
    let mut bytes = vec![0; total_len(slices)];
    let mut at = 0;
    for slice in slices {
        at += slice.copy_to(&mut bytes[at..]);
    }
    bytes
}

#[inline(always)]
fn total_len(slices: &[GuestSlice<'_>]) -> usize {
    slices
        .iter()
        .fold(0, |sum, slice| sum.saturating_add(slice.len()))
}

impl UplinkQueue for TapQueue {
    fn transmit(&self, frames: &[TxFrame<'_>], stats: &VringStats) {
        let header_len = self.shared.header_len.load(Ordering::Relaxed);
        let (mut sent, mut bytes) = (0, 0);
        for frame in frames {
            match self.send(frame, header_len) {
                Ok(_) => {
                    sent += 1;
                    bytes += u64::try_from(frame.len).unwrap_or(0);
                }
                Err(error) => {
                    find_lost_memory(&error, frame.payload);
                    self.shared.count_drop(&error, stats);
                }
            }
        }
        stats.frames.add(sent);
        stats.bytes.add(bytes);
    }

    fn receive(&self, buffers: &[GuestSlice<'_>], bounce: &mut [u8]) -> Received {
        let buffers = &buffers[..buffers.len().min(MAX_RECEIVE_BUFFERS)];
        match self.read(buffers, bounce) {
            // The kernel truncates a frame that does not fit without reporting it, so completely
            // filled buffers mean that the frame is too long. The lengths of the buffers are added
            // up only for a frame that is at least as long as the bounce buffer.
            Ok(len) if len >= bounce.len() && len >= total_len(buffers) + bounce.len() => {
                Received::TooLong
            }
            Ok(len) => Received::Frame(len),
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => Received::Empty,
            Err(error) => {
                find_lost_memory(&error, buffers);
                self.shared.log_read_error(&error);
                match error.raw_os_error() {
                    // This frame is lost (the kernel cannot build a header for it, or the guest's
                    // memory is not mapped); the frames behind it are not.
                    Some(libc::EINVAL | libc::EFAULT) => Received::Lost,
                    _ => Received::Failed,
                }
            }
        }
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.fd())
    }

    fn set_attached(&self, attached: bool) -> Result<(), UplinkError> {
        let mut now = self.attached.lock();
        // The kernel refuses to attach an attached queue, or to detach a detached one.
        if *now != attached {
            let mut all = self.shared.attached.lock();
            match sys::set_queue_attached(self.fd(), attached) {
                Ok(()) => {
                    let at = all.number_of(self.pair);
                    all.record_change(self.pair, at);
                }
                // A queue without an interface is neither attached nor detached; it takes effect
                // when the queue is opened again.
                Err(_) if self.is_lost() => all.forget(self.pair),
                Err(source) => {
                    return Err(error::queue_refused(&self.shared.name, attached, source));
                }
            }
            *now = attached;
        }
        Ok(())
    }
}

/// The kernel detaches a queue that is closed. Detaching it before keeps the order of the others
/// known.
impl Drop for TapQueue {
    fn drop(&mut self) {
        if !self.shared.is_owner.load(Ordering::Relaxed) {
            return;
        }
        if self.set_attached(false).is_err() {
            let mut all = self.shared.attached.lock();
            if let at @ Some(_) = all.number_of(self.pair) {
                all.record_change(self.pair, at);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn call_that_changes_nothing_does_not_wait_for_another_queue() {
        let shared = Arc::new(TapShared::new("tap0".into(), VNET_HEADER_LEN));
        let file = File::open("/dev/null").unwrap();
        let queue = TapQueue::new(file, 0, Arc::clone(&shared));
        let _busy = shared.attached.lock();
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::spawn(move || sender.send(queue.set_attached(false).is_ok()));
        assert_eq!(
            receiver.recv_timeout(std::time::Duration::from_secs(20)),
            Ok(true)
        );
    }

    #[test]
    fn each_error_is_counted_under_its_reason() {
        for (errno, reason, value) in [
            (libc::EAGAIN, DropReason::Full, [1, 0, 0]),
            (libc::ENOBUFS, DropReason::Full, [1, 0, 0]),
            (libc::EIO, DropReason::Down, [0, 1, 0]),
            (libc::EBADFD, DropReason::Gone, [0, 1, 0]),
            (libc::ENETDOWN, DropReason::Down, [0, 1, 0]),
            (libc::EINVAL, DropReason::Refused, [0, 0, 1]),
            (libc::ENOMEM, DropReason::Refused, [0, 0, 1]),
            (libc::EFAULT, DropReason::Refused, [0, 0, 1]),
        ] {
            let error = io::Error::from_raw_os_error(errno);
            assert_eq!(DropReason::from_error(&error), reason, "{error}");
            let stats = VringStats::default();
            TapShared::new("tap0".into(), VNET_HEADER_LEN).count_drop(&error, &stats);
            let counted = [
                stats.dropped_uplink_full.get(),
                stats.dropped_uplink_down.get(),
                stats.dropped_uplink_error.get(),
            ];
            assert_eq!(counted, value, "{error}");
        }
    }
}
