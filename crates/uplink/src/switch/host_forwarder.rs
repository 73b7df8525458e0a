//! Frames from the host's port: one thread reads the frames that wait in the TAP into a buffer that
//! stays in the CPU's cache, and forwards it as one burst.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use arrayvec::ArrayVec;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtionet_virtio_net::header::{MAX_FRAME, MIN_FRAME, VNET_HEADER_LEN, VnetHeader};
use virtionet_virtio_net::stats::VringStats;
use virtionet_virtio_net::uplink::{MAX_BURST, Received, TxFrame, UplinkQueue};
use virtionet_virtqueue::memory::GuestSlice;

use super::Switch;
use super::delivery::IngressPort;
use super::host_port::HostPort;

/// One byte more than the longest frame: a completely filled buffer means that the frame was
/// truncated.
const MAX_READ_LEN: usize = VNET_HEADER_LEN + MAX_FRAME + 1;
/// Space for a burst of ordinary frames, or for a few of the longest.
const ARENA_LEN: usize = 4 * MAX_READ_LEN;
/// Frames begin at the start of a cache line.
const FRAME_ALIGNMENT: usize = 64;
/// Bursts between two checks of the descriptor that ends the thread.
const BURSTS_PER_POLL: usize = 16;
/// How long to wait before a TAP that failed is tried again.
const RETRY_DELAY: Duration = Duration::from_millis(100);

/// Carries frames from a switch's TAP to the switch's other ports, on a thread that the caller
/// provides.
#[derive(Debug)]
pub struct HostPortForwarder {
    switch: Arc<Switch>,
    ingress: IngressPort,
    queue: Arc<dyn UplinkQueue>,
    stats: VringStats,
}

impl HostPortForwarder {
    pub(super) fn new(switch: Arc<Switch>, number: u16, port: &HostPort) -> Self {
        Self {
            switch,
            ingress: IngressPort::host(number),
            queue: Arc::clone(&port.queue),
            stats: VringStats::default(),
        }
    }

    /// The switch's name.
    #[must_use]
    pub fn switch(&self) -> &str {
        &self.switch.name
    }

    /// Forwards frames until `stop` is readable. No error of the TAP ends it.
    // syscalls: poll, read
    pub fn run(&self, stop: BorrowedFd<'_>) {
        let Some(tap) = self.queue.poll_fd() else {
            return;
        };
        let mut arena = vec![0; ARENA_LEN];
        loop {
            if poll_readable(&[tap, stop], None) & 2 != 0 {
                return;
            }
            let ended = (0..BURSTS_PER_POLL)
                .map(|_| self.forward_burst(&mut arena))
                .find(|end| !matches!(end, Received::Frame(_)));
            if ended == Some(Received::Failed) && poll_readable(&[stop], Some(RETRY_DELAY)) != 0 {
                return;
            }
        }
    }

    /// Reads and forwards one burst. Returns how the last read ended: `Frame` where more frames may
    /// wait.
    fn forward_burst(&self, arena: &mut [u8]) -> Received {
        let mut headers = ArrayVec::<VnetHeader, MAX_BURST>::new();
        let mut slices = ArrayVec::<GuestSlice<'_>, MAX_BURST>::new();
        let mut rest = arena;
        let mut reads = 0;
        let end = loop {
            // Lost frames count as well, because reading them is work.
            if reads == MAX_BURST || rest.len() < MAX_READ_LEN {
                break Received::Frame(0);
            }
            reads += 1;
            let len = match self.queue.receive(&[], &mut rest[..MAX_READ_LEN]) {
                Received::Frame(len) if len >= VNET_HEADER_LEN + MIN_FRAME => len,
                Received::Frame(_) => {
                    self.stats.frame_too_short.add(1);
                    continue;
                }
                Received::TooLong => {
                    self.stats.dropped_too_long.add(1);
                    continue;
                }
                Received::Lost => {
                    self.stats.dropped_uplink_error.add(1);
                    continue;
                }
                end => break end,
            };
            // The last frame may end at the arena's end, before the cache line does.
            let padded_len = len.next_multiple_of(FRAME_ALIGNMENT).min(rest.len());
            let (used, after) = rest.split_at_mut(padded_len);
            rest = after;
            let (header, frame) = used[..len].split_at_mut(VNET_HEADER_LEN);
            let mut copy = VnetHeader::default();
            copy.0.copy_from_slice(header);
            headers.push(copy);
            slices.push(GuestSlice::from_private(frame));
        };
        let frames: ArrayVec<TxFrame<'_>, MAX_BURST> = headers
            .iter()
            .zip(&slices)
            .map(|(header, slice)| TxFrame {
                header: *header,
                payload: std::slice::from_ref(slice),
                len: slice.len(),
            })
            .collect();
        if !frames.is_empty() {
            self.switch
                .forward(&self.ingress, &frames, &self.stats, &mut || ());
        }
        end
    }
}

/// Waits until one of the (at most two) `fds` is readable; returns a bit for each that is. It may
/// return 0 before `limit` has passed.
fn poll_readable(fds: &[BorrowedFd<'_>], limit: Option<Duration>) -> u8 {
    let mut fds: ArrayVec<PollFd<'_>, 2> = fds
        .iter()
        .map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN))
        .collect();
    let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
    if poll(&mut fds, limit.as_ref()).is_err() {
        // The call was interrupted, or the kernel lacks memory: do not retry at once.
        std::thread::sleep(RETRY_DELAY);
        return 0;
    }
    let ready = fds.iter().map(|fd| !fd.revents().is_empty());
    ready.zip([1, 2]).fold(0, |all, (ready, bit)| match ready {
        true => all | bit,
        false => all,
    })
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use parking_lot::Mutex;

    use virtionet_virtio_net::uplink::UplinkError;

    use super::*;

    /// An uplink queue in which frames of these lengths wait, header included.
    #[derive(Debug)]
    struct WaitingFrames(Mutex<VecDeque<usize>>);

    impl UplinkQueue for WaitingFrames {
        fn transmit(&self, _frames: &[TxFrame<'_>], _stats: &VringStats) {}

        fn receive(&self, _buffers: &[GuestSlice<'_>], bounce: &mut [u8]) -> Received {
            match self.0.lock().pop_front() {
                Some(len) if len > bounce.len() => Received::TooLong,
                Some(len) => Received::Frame(len),
                None => Received::Empty,
            }
        }

        fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
            None
        }

        fn set_attached(&self, _attached: bool) -> Result<(), UplinkError> {
            Ok(())
        }
    }

    fn forwarder(lens: impl IntoIterator<Item = usize>) -> HostPortForwarder {
        HostPortForwarder {
            switch: Switch::new("s"),
            ingress: IngressPort::host(0),
            queue: Arc::new(WaitingFrames(Mutex::new(lens.into_iter().collect()))),
            stats: VringStats::default(),
        }
    }

    /// Four of the longest frames fill the arena, so the last ones begin a new burst.
    #[test]
    fn frames_of_any_length_pass_the_arena() {
        let forwarder = forwarder([65_561, 65_561, 65_472, 65_569, 65_569, 26]);
        let mut arena = vec![0; ARENA_LEN];
        while forwarder.forward_burst(&mut arena) != Received::Empty {}
        // The switch has no other port that they could go to.
        assert_eq!(forwarder.stats.dropped_no_port.get(), 6);
    }

    #[test]
    fn lost_frames_are_counted_and_count_towards_the_burst() {
        let forwarder = forwarder(
            [VNET_HEADER_LEN, MAX_READ_LEN + 1]
                .into_iter()
                .cycle()
                .take(100),
        );
        let mut arena = vec![0; ARENA_LEN];
        assert_eq!(forwarder.forward_burst(&mut arena), Received::Frame(0));
        let counted = |forwarder: &HostPortForwarder| {
            let stats = &forwarder.stats;
            (stats.frame_too_short.get(), stats.dropped_too_long.get())
        };
        assert_eq!(counted(&forwarder), (32, 32));
        assert_eq!(forwarder.forward_burst(&mut arena), Received::Empty);
        assert_eq!(counted(&forwarder), (50, 50));
    }
}
