//! Frames of a switch for a guest whose memory has not arrived completely, after a migration by
//! postcopy.
//!
//! A sender's worker copies frames to the receiver's buffers itself. While pages of these may be
//! missing it must not: it would wait for them, and its own guest with it, for as long as the
//! receiver's front-end likes. So it leaves a copy of the frames here, and the receiver's worker pushes
//! them. What does not fit is dropped and counted, as where a guest has too few buffers.
//!
//! The inbox is opened before the receiveq gets such memory. The worker closes it, once all pages have
//! arrived and no frame is left, so that frames stay in order.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use virtionet_virtio_net::header::VnetHeader;
use virtionet_virtio_net::stats::{VringStats, to_u64};
use virtionet_virtio_net::uplink::{MAX_BURST, TxFrame};
use virtionet_virtqueue::memory::GuestSlice;

/// The most frames that wait.
const MAX_FRAMES: usize = 256;
/// The most bytes that they have: 16 of the longest frames.
const MAX_BYTES: usize = 1 << 20;

/// The frames that wait for the worker of a queue pair.
#[derive(Debug, Default)]
pub struct FrameInbox {
    /// Whether the state is `Open`.
    is_open: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
enum State {
    /// Senders push frames themselves.
    #[default]
    Closed,
    Open {
        frames: VecDeque<OwnFrame>,
        bytes: usize,
    },
}

/// A frame in this process's memory.
#[derive(Debug)]
pub struct OwnFrame {
    header: VnetHeader,
    bytes: Vec<u8>,
}

impl FrameInbox {
    /// Whether senders must leave frames here.
    #[inline(always)]
    pub fn is_open(&self) -> bool {
        self.is_open.load(Ordering::Relaxed)
    }

    /// From now on senders leave frames here.
    pub fn open(&self) {
        let mut state = self.state.lock();
        if matches!(*state, State::Closed) {
            *state = State::Open {
                frames: VecDeque::new(),
                bytes: 0,
            };
        }
        self.is_open.store(true, Ordering::Relaxed);
    }

    /// From now on senders push frames themselves. Those that are here are dropped and counted in
    /// `stats`.
    pub fn close(&self, stats: &VringStats) {
        let before = self.replace_by_closed(&mut self.state.lock());
        if let State::Open { frames, .. } = before {
            stats.dropped_postcopy.add_shared(to_u64(frames.len()));
        }
    }

    /// Closes the inbox if no frame is here.
    pub fn close_if_empty(&self) {
        let mut state = self.state.lock();
        if matches!(&*state, State::Open { frames, .. } if frames.is_empty()) {
            self.replace_by_closed(&mut state);
        }
    }

    fn replace_by_closed(&self, state: &mut State) -> State {
        self.is_open.store(false, Ordering::Relaxed);
        std::mem::take(state)
    }

    /// Leaves copies of `frames` here. Those that do not fit are dropped and counted in `stats`, and
    /// so are those that come after the inbox was closed.
    #[cold]
    pub fn put(&self, frames: &[TxFrame<'_>], stats: &VringStats) {
        let mut dropped = 0;
        for frame in frames {
            // Outside of the lock: it takes the longest.
            let own = OwnFrame {
                header: frame.header,
                bytes: frame.copy_bytes(),
            };
            dropped += u64::from(!self.state.lock().try_put(own));
        }
        stats.dropped_postcopy.add_shared(dropped);
    }

    /// The frames that have waited longest, at most [`MAX_BURST`].
    pub fn take(&self) -> Vec<OwnFrame> {
        match &mut *self.state.lock() {
            State::Closed => Vec::new(),
            State::Open { frames, bytes } => {
                let taken: Vec<OwnFrame> = frames.drain(..frames.len().min(MAX_BURST)).collect();
                *bytes -= taken.iter().map(|frame| frame.bytes.len()).sum::<usize>();
                taken
            }
        }
    }
}

impl State {
    fn try_put(&mut self, frame: OwnFrame) -> bool {
        match self {
            Self::Open { frames, bytes }
                if frames.len() < MAX_FRAMES && *bytes + frame.bytes.len() <= MAX_BYTES =>
            {
                *bytes += frame.bytes.len();
                frames.push_back(frame);
                true
            }
            _ => false,
        }
    }
}

impl OwnFrame {
    /// Calls `work` with `frames`, as an uplink gives frames to a receiveq.
    pub fn with_all<T>(frames: &mut [Self], work: impl FnOnce(&[TxFrame<'_>]) -> T) -> T {
        let (headers, payloads): (Vec<_>, Vec<_>) = frames
            .iter_mut()
            .map(|frame| {
                let payload = [GuestSlice::from_private(&mut frame.bytes)];
                (frame.header, payload)
            })
            .unzip();
        let frames: Vec<TxFrame<'_>> = headers
            .into_iter()
            .zip(&payloads)
            .map(|(header, payload)| TxFrame {
                header,
                payload,
                len: payload[0].len(),
            })
            .collect();
        work(&frames)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(inbox: &FrameInbox, stats: &VringStats, lens: &[usize]) {
        for len in lens {
            let mut bytes = vec![7; *len];
            let payload = [GuestSlice::from_private(&mut bytes)];
            let frame = TxFrame {
                header: VnetHeader::default(),
                payload: &payload,
                len: *len,
            };
            inbox.put(&[frame], stats);
        }
    }

    #[test]
    fn frames_come_out_in_order_and_in_bursts() {
        let (inbox, stats) = (FrameInbox::default(), VringStats::default());
        inbox.open();
        let lens: Vec<usize> = (60..160).collect();
        put(&inbox, &stats, &lens);
        let mut found = Vec::new();
        for burst in [64, 36, 0] {
            let mut frames = inbox.take();
            assert_eq!(frames.len(), burst);
            OwnFrame::with_all(&mut frames, |frames| {
                found.extend(frames.iter().map(|frame| frame.len));
                assert!(frames.iter().all(|frame| frame.copy_bytes()[59] == 7));
            });
        }
        assert_eq!(found, lens);
        assert_eq!(stats.dropped_postcopy.get(), 0);
    }

    #[test]
    fn what_does_not_fit_is_dropped_and_counted() {
        let (inbox, stats) = (FrameInbox::default(), VringStats::default());
        inbox.open();
        put(&inbox, &stats, &[60; MAX_FRAMES + 3]);
        assert_eq!(stats.dropped_postcopy.get(), 3);
        while !inbox.take().is_empty() {}
        put(&inbox, &stats, &[65_557; 17]);
        assert_eq!(stats.dropped_postcopy.get(), 3 + 2);
        inbox.close(&stats);
        assert_eq!(stats.dropped_postcopy.get(), 3 + 2 + 15);
        put(&inbox, &stats, &[60]);
        assert_eq!(stats.dropped_postcopy.get(), 3 + 2 + 15 + 1);
    }

    #[test]
    fn inbox_with_frames_stays_open() {
        let (inbox, stats) = (FrameInbox::default(), VringStats::default());
        assert!(!inbox.is_open());
        inbox.open();
        put(&inbox, &stats, &[60]);
        inbox.open();
        inbox.close_if_empty();
        assert!(inbox.is_open());
        assert_eq!(inbox.take().len(), 1);
        inbox.close_if_empty();
        assert!(!inbox.is_open());
    }
}
