//! The null uplink: it discards every frame that is transmitted, and never receives one.

use std::os::fd::BorrowedFd;
use std::sync::{Arc, Weak};

use virtionet_virtio_net::header::FrameFormat;
use virtionet_virtio_net::stats::{VringStats, to_u64};
use virtionet_virtio_net::uplink::{Received, RxSink, TxFrame, Uplink, UplinkError, UplinkQueue};
use virtionet_virtqueue::memory::GuestSlice;

/// The null uplink, and each of its queues. A discarded frame counts as carried.
#[derive(Debug, Clone, Copy, Default)]
pub struct Null;

impl Uplink for Null {
    fn open_queue(
        &self,
        _pair: u16,
        _rx: Weak<dyn RxSink>,
    ) -> Result<Arc<dyn UplinkQueue>, UplinkError> {
        Ok(Arc::new(Self))
    }

    fn set_format(&self, _format: FrameFormat) -> Result<(), UplinkError> {
        Ok(())
    }

    fn set_mtu(&self, _mtu: u16) -> Result<(), UplinkError> {
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
    fn transmit(&self, frames: &[TxFrame<'_>], stats: &VringStats) {
        let bytes = frames.iter().map(|frame| to_u64(frame.len)).sum();
        stats.frames.add(to_u64(frames.len()));
        stats.bytes.add(bytes);
    }

    fn receive(&self, _buffers: &[GuestSlice<'_>], _bounce: &mut [u8]) -> Received {
        Received::Empty
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn set_attached(&self, _attached: bool) -> Result<(), UplinkError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use virtionet_virtio_net::header::VnetHeader;
    use virtionet_virtio_net::uplink::null_rx_sink;

    use super::*;

    #[test]
    fn transmitted_frames_count_as_carried_and_none_is_received() {
        let frame = |len| TxFrame {
            header: VnetHeader::default(),
            payload: &[],
            len,
        };
        let stats = VringStats::default();
        let queue = Null.open_queue(3, null_rx_sink()).unwrap();
        queue.transmit(&[frame(60), frame(1514)], &stats);
        queue.transmit(&[], &stats);
        assert_eq!((stats.frames.get(), stats.bytes.get()), (2, 1574));
        assert_eq!(queue.receive(&[], &mut [0]), Received::Empty);
        assert!(queue.poll_fd().is_none());
    }
}
