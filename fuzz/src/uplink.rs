//! An uplink that checks every header, length and address that a queue passes to it.

use std::collections::VecDeque;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex};

use virtionet_virtio_net::features::Features;
use virtionet_virtio_net::header::{MAX_FRAME, MIN_FRAME, VNET_HEADER_LEN};
use virtionet_virtio_net::stats::VringStats;
use virtionet_virtio_net::uplink::{MAX_BURST, Received, TxFrame, UplinkError, UplinkQueue};
use virtionet_virtqueue::memory::{GuestMemory, GuestSlice, SegmentList};

/// The mappings of a snapshot of guest memory in this process.
#[derive(Debug, Default)]
pub struct Mapped(Vec<Range<usize>>);

impl Mapped {
    /// The mappings of `memory`.
    pub fn new(memory: &Arc<GuestMemory>) -> Self {
        let mut segments = SegmentList::new(Arc::clone(memory));
        let ranges = memory.regions().map(|region| {
            segments.truncate(0);
            segments.push(region.guest_addr, 1).unwrap();
            let at = segments.slices(0, 1)[0].as_iovec().iov_base.addr();
            at..at + usize::try_from(region.size).unwrap()
        });
        Self(ranges.collect())
    }

    fn check(&self, slice: &GuestSlice<'_>) {
        let start = slice.as_iovec().iov_base.addr();
        let end = start + slice.len();
        let within = |r: &Range<usize>| r.start <= start && end <= r.end;
        assert!(
            self.0.iter().any(within),
            "a slice is not inside guest memory"
        );
        assert!(!slice.is_empty(), "a slice has no bytes");
    }
}

/// An uplink that checks its arguments, and that receives frames of given lengths.
#[derive(Debug)]
pub struct CheckingUplink {
    pub features: Features,
    pub mapped: Mutex<Mapped>,
    /// Lengths of the frames to receive, with header.
    pub pending: Mutex<VecDeque<usize>>,
}

impl CheckingUplink {
    pub fn new(features: Features, memory: &Arc<GuestMemory>) -> Self {
        Self {
            features,
            mapped: Mutex::new(Mapped::new(memory)),
            pending: Mutex::default(),
        }
    }
}

impl UplinkQueue for CheckingUplink {
    fn transmit(&self, frames: &[TxFrame<'_>], stats: &VringStats) {
        let mapped = self.mapped.lock().unwrap();
        assert!((1..=MAX_BURST).contains(&frames.len()));
        for frame in frames {
            assert_eq!(frame.header.check(frame.len, self.features), Ok(()));
            assert!((MIN_FRAME..=MAX_FRAME).contains(&frame.len));
            frame.payload.iter().for_each(|slice| mapped.check(slice));
            let total: usize = frame.payload.iter().map(GuestSlice::len).sum();
            assert_eq!(total, frame.len);
            for slice in frame.payload {
                assert_eq!(slice.copy_to(&mut [0]), 1);
                assert_eq!(slice.skip(slice.len() - 1).copy_to(&mut [0, 0]), 1);
            }
            stats.frames.add(1);
        }
    }

    fn receive(&self, buffers: &[GuestSlice<'_>], bounce: &mut [u8]) -> Received {
        let mapped = self.mapped.lock().unwrap();
        buffers.iter().for_each(|slice| mapped.check(slice));
        let capacity: usize = buffers.iter().map(GuestSlice::len).sum();
        // There is no buffer if the frame is to be received into the bounce buffer.
        assert!(capacity == 0 || capacity >= self.features.header_len());
        assert!(capacity + bounce.len() > VNET_HEADER_LEN + MAX_FRAME);
        let Some(len) = self.pending.lock().unwrap().pop_front() else {
            return Received::Empty;
        };
        let frame = vec![0x5a; len];
        let mut copied = 0;
        for slice in buffers {
            copied += slice.copy_from(&frame[copied..]);
        }
        let bounced = (len - copied).min(bounce.len());
        bounce[..bounced].fill(0x5a);
        match copied + bounced == len {
            true => Received::Frame(len),
            false => Received::TooLong,
        }
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn set_attached(&self, _attached: bool) -> Result<(), UplinkError> {
        Ok(())
    }
}
