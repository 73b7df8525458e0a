//! A panic in a turn costs the vring that was processed, and nothing else.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::os::fd::BorrowedFd;
use std::sync::{Arc, Weak};

use common::{wait_until, with_frontend};
use virtionet_guest::header::NetHeader;
use virtionet_guest::net::MODERN;
use virtionet_guest::test_frontend::{TestFrontend, TestFrontendConfig};
use virtionet_process::panic_policy::contained_panics;
use virtionet_vhost_user::VringState;
use virtionet_virtio_net::header::FrameFormat;
use virtionet_virtio_net::stats::VringStats;
use virtionet_virtio_net::uplink::{Received, RxSink, TxFrame, Uplink, UplinkError, UplinkQueue};
use virtionet_virtqueue::memory::GuestSlice;

/// Length of the frame on which the uplink panics.
const BAD_LEN: usize = 99;

/// An uplink with a bug.
#[derive(Debug)]
struct FaultyUplink;

impl Uplink for FaultyUplink {
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
        "faulty"
    }

    fn name(&self) -> String {
        "faulty".into()
    }
}

impl UplinkQueue for FaultyUplink {
    fn transmit(&self, frames: &[TxFrame<'_>], stats: &VringStats) {
        for frame in frames {
            assert_ne!(frame.len, BAD_LEN, "this panic is part of the test");
            stats.frames.add(1);
        }
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

fn send(frontend: &mut TestFrontend, pair: usize, len: usize) {
    let tx = &mut frontend.pairs[pair].tx;
    assert!(tx.queue(&NetHeader::default(), &vec![0x55; len]).unwrap());
    tx.flush().unwrap();
}

#[test]
fn panic_in_a_turn_costs_its_vring_only() {
    let config = TestFrontendConfig::new(2, 256, MODERN);
    with_frontend(Arc::new(FaultyUplink), &config, |frontend, device| {
        let pair = |at: usize| &device.pairs().nth(at).unwrap().pair;
        let frames = |at: usize| pair(at).tx().stats().frames.get();
        send(frontend, 0, 60);
        wait_until("a good frame is carried", || frames(0) == 1);

        send(frontend, 0, BAD_LEN);
        wait_until("the vring is quarantined", || {
            pair(0).tx().state() == VringState::Quarantined
        });
        assert_eq!(pair(0).tx().stats().panics.get(), 1);
        assert_eq!(pair(0).tx().stats().quarantines.get(), 1);
        assert_eq!(contained_panics(), 1);
        assert_eq!(pair(0).rx().state(), VringState::Running);
        send(frontend, 1, 60);
        wait_until("the other queue pair carries frames", || frames(1) == 1);

        // The worker lives: the vring carries frames again once it is started again.
        frontend.reset().unwrap();
        frontend.start().unwrap();
        send(frontend, 0, 60);
        wait_until("a frame is carried again", || frames(0) == 2);
    });
}
