//! The host's port: a TAP that is a port of the switch.
//!
//! Frames to it are written by the sender's worker, with one system call each. Frames from it have
//! no worker that waits for them, so a [`HostPortForwarder`] wants a thread of its own: it reads what waits into
//! a buffer that stays in the CPU's cache, and pushes that as one burst.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use arrayvec::ArrayVec;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtionet_virtio_net::header::{
    FrameFormat, MAX_FRAME, MIN_FRAME, VNET_HEADER_LEN, VnetHeader,
};
use virtionet_virtio_net::stats::VringStats;
use virtionet_virtio_net::uplink::{
    MAX_BURST, Received, TxFrame, Uplink, UplinkError, UplinkQueue, null_rx_sink,
};
use virtionet_virtqueue::memory::GuestSlice;

use super::Switch;
use super::delivery::IngressPort;
use crate::tap::{Tap, TapConfig};

/// A byte more than any frame needs: what fills it has been cut.
const MAX_READ_LEN: usize = VNET_HEADER_LEN + MAX_FRAME + 1;
/// Room for a burst of ordinary frames, or for a few of the largest.
const ARENA_LEN: usize = 4 * MAX_READ_LEN;
/// Bursts between two looks at the end's descriptor.
const BURSTS_PER_POLL: usize = 16;
/// How long to leave a TAP alone that failed.
const RETRY_DELAY: Duration = Duration::from_millis(100);

/// See the module.
#[derive(Debug)]
pub(super) struct HostPort {
    pub(super) config: TapConfig,
    queue: Arc<dyn UplinkQueue>,
}

impl HostPort {
    pub(super) fn open(config: &TapConfig) -> Result<Self, UplinkError> {
        let tap = Tap::open(config)?;
        let queue = tap.open_queue(0, null_rx_sink())?;
        // What a receiver does not take is done by the switch.
        tap.set_format(FrameFormat::ALL)
            .and_then(|()| queue.set_attached(true))
            .map_err(|e| UplinkError(e.to_string()))?;
        Ok(Self {
            config: config.clone(),
            queue,
        })
    }

    /// Writes one frame; false, and counted in `stats`, when the host does not take it.
    pub(super) fn send(&self, frame: &TxFrame<'_>, stats: &VringStats) -> bool {
        // Whether it counts as carried is for the caller to say: it may be one of several copies.
        let local_stats = VringStats::default();
        self.queue
            .transmit(std::slice::from_ref(frame), &local_stats);
        stats
            .dropped_uplink_full
            .add(local_stats.dropped_uplink_full.get());
        stats
            .dropped_uplink_error
            .add(local_stats.dropped_uplink_error.get());
        stats
            .dropped_uplink_down
            .add(local_stats.dropped_uplink_down.get());
        local_stats.frames.get() == 1
    }
}

/// Carries frames from a switch's TAP to its other ports. It needs a thread.
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

    /// Works until `stop` is readable. No error of the TAP ends it.
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

    /// Reads and pushes one burst; tells how its reading ended, `Frame` where more may wait.
    fn forward_burst(&self, arena: &mut [u8]) -> Received {
        let mut headers = ArrayVec::<VnetHeader, MAX_BURST>::new();
        let mut slices = ArrayVec::<GuestSlice<'_>, MAX_BURST>::new();
        let mut rest = arena;
        let mut reads = 0;
        let end = loop {
            // Frames that are lost count too: to read them is work.
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
            // The last one may end where the arena does, without the gap to the next line.
            let gap = len.next_multiple_of(64).min(rest.len());
            let (used, after) = rest.split_at_mut(gap);
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
            self.switch.forward(&self.ingress, &frames, &self.stats);
        }
        end
    }
}

/// Waits until one of `fds` is readable; a bit for each that is. There may be none, also before
/// `limit`.
fn poll_readable(fds: &[BorrowedFd<'_>], limit: Option<Duration>) -> u8 {
    let mut fds: ArrayVec<PollFd<'_>, 2> = fds
        .iter()
        .map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN))
        .collect();
    let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
    if poll(&mut fds, limit.as_ref()).is_err() {
        // Interrupted, or the kernel lacks memory: not to be tried again at once.
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
    use std::io;

    use parking_lot::Mutex;

    use super::*;

    /// Frames of these lengths, header included.
    #[derive(Debug)]
    struct Waiting(Mutex<VecDeque<usize>>);

    impl UplinkQueue for Waiting {
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

        fn set_attached(&self, _attached: bool) -> io::Result<()> {
            Ok(())
        }
    }

    fn forwarder(lens: impl IntoIterator<Item = usize>) -> HostPortForwarder {
        HostPortForwarder {
            switch: Switch::new("s"),
            ingress: IngressPort::host(0),
            queue: Arc::new(Waiting(Mutex::new(lens.into_iter().collect()))),
            stats: VringStats::default(),
        }
    }

    /// The first three leave fewer bytes than the fourth and the gap behind it take.
    #[test]
    fn frames_of_any_length_pass_the_arena() {
        let forwarder = forwarder([65_561, 65_561, 65_472, 65_561, 26, 65_565]);
        let mut arena = vec![0; ARENA_LEN];
        while forwarder.forward_burst(&mut arena) != Received::Empty {}
        // There is no other port to take them.
        assert_eq!(forwarder.stats.dropped_no_port.get(), 6);
    }

    #[test]
    fn frames_that_cannot_be_had_are_counted_and_end_a_burst_too() {
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
