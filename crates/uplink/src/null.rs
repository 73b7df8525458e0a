//! The uplink to nowhere: what is sent counts as carried and is gone, nothing ever comes.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Weak};

use virtionet_virtio_net::header::FrameFormat;
use virtionet_virtio_net::port::{Received, RxPort, TxFrame, Uplink, UplinkError, UplinkQueue};
use virtionet_virtio_net::stats::{RingStats, wide};
use virtionet_virtqueue::memory::GuestSlice;

/// The null uplink, and each of its queues.
#[derive(Debug, Clone, Copy, Default)]
pub struct Null;

impl Uplink for Null {
    fn open_queue(
        &self,
        _pair: u16,
        _rx: Weak<dyn RxPort>,
    ) -> Result<Arc<dyn UplinkQueue>, UplinkError> {
        Ok(Arc::new(Self))
    }

    fn set_format(&self, _format: FrameFormat) -> io::Result<()> {
        Ok(())
    }

    fn set_mtu(&self, _mtu: u16) -> io::Result<()> {
        Ok(())
    }

    fn kind(&self) -> &'static str {
        "null"
    }

    fn name(&self) -> String {
        "null".into()
    }
}

impl UplinkQueue for Null {
    fn transmit(&self, frames: &[TxFrame<'_>], stats: &RingStats) {
        let bytes = frames.iter().map(|frame| wide(frame.len)).sum();
        stats.frames.add(wide(frames.len()));
        stats.bytes.add(bytes);
    }

    fn receive(&self, _buffers: &[GuestSlice<'_>], _spill: &mut [u8]) -> Received {
        Received::Empty
    }

    fn readable(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn set_attached(&self, _attached: bool) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use virtionet_virtio_net::header::VnetHeader;
    use virtionet_virtio_net::port::nobody;

    use super::*;

    #[test]
    fn frames_count_as_carried_and_none_comes() {
        let frame = |len| TxFrame {
            header: VnetHeader::default(),
            payload: &[],
            len,
        };
        let stats = RingStats::default();
        let queue = Null.open_queue(3, nobody()).unwrap();
        queue.transmit(&[frame(60), frame(1514)], &stats);
        queue.transmit(&[], &stats);
        assert_eq!((stats.frames.get(), stats.bytes.get()), (2, 1574));
        assert_eq!(queue.receive(&[], &mut [0]), Received::Empty);
        assert!(queue.readable().is_none());
    }
}
