//! The turns that a worker gives TX and RX of a queue pair, with an uplink whose frames never end.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::thread;
use std::time::Duration;

use common::wait_until;
use rustix::event::{EventfdFlags, eventfd};
use virtionet_guest::header::NetHeader;
use virtionet_guest::net::MODERN;
use virtionet_guest::test_frontend::{TestFrontend, TestFrontendConfig};
use virtionet_net_device::net_device::NetDevice;
use virtionet_virtio_net::header::FrameFormat;
use virtionet_virtio_net::stats::{VringStats, to_u64};
use virtionet_virtio_net::uplink::{Received, RxSink, TxFrame, Uplink, UplinkError, UplinkQueue};
use virtionet_virtqueue::memory::GuestSlice;

/// Descriptors of each virtqueue.
const SIZE: u16 = 4096;
/// A received frame with its virtio-net header, in bytes.
const RECEIVED_LEN: usize = 72;

/// What the uplink was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Event {
    /// It transmitted that many frames.
    Transmitted(usize),
    /// It delivered a frame.
    Received,
}

/// An uplink that transmits everything. From the first transmitted burst on, or from the start, it
/// has frames without end.
#[derive(Debug)]
struct EndlessUplink {
    readable: OwnedFd,
    has_frames: AtomicBool,
    events: Mutex<Vec<Event>>,
}

impl EndlessUplink {
    fn new(has_frames: bool) -> Arc<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Arc::new(Self {
            readable: eventfd(u32::from(has_frames), flags).unwrap(),
            has_frames: AtomicBool::new(has_frames),
            events: Mutex::default(),
        })
    }

    fn events(&self) -> Vec<Event> {
        self.events.lock().unwrap().clone()
    }
}

/// The queue of the only queue pair.
#[derive(Debug)]
struct Queue(Arc<EndlessUplink>);

/// The device's handle.
#[derive(Debug)]
struct Handle(Arc<EndlessUplink>);

impl Uplink for Handle {
    fn open_queue(
        &self,
        _pair: u16,
        _rx: Weak<dyn RxSink>,
    ) -> Result<Arc<dyn UplinkQueue>, UplinkError> {
        Ok(Arc::new(Queue(Arc::clone(&self.0))))
    }

    fn set_format(&self, _format: FrameFormat) -> Result<(), UplinkError> {
        Ok(())
    }

    fn set_mtu(&self, _mtu: u16) -> Result<(), UplinkError> {
        Ok(())
    }

    fn kind(&self) -> &'static str {
        "endless"
    }

    fn name(&self) -> String {
        "endless".into()
    }
}

impl UplinkQueue for Queue {
    fn transmit(&self, frames: &[TxFrame<'_>], stats: &VringStats) {
        stats.frames.add(to_u64(frames.len()));
        let mut events = self.0.events.lock().unwrap();
        events.push(Event::Transmitted(frames.len()));
        if !self.0.has_frames.swap(true, Ordering::Relaxed) {
            rustix::io::write(&self.0.readable, &1_u64.to_ne_bytes()).unwrap();
        }
    }

    fn receive(&self, _buffers: &[GuestSlice<'_>], _bounce: &mut [u8]) -> Received {
        if !self.0.has_frames.load(Ordering::Relaxed) {
            return Received::Empty;
        }
        self.0.events.lock().unwrap().push(Event::Received);
        // What is in the buffers does not matter here.
        Received::Frame(RECEIVED_LEN)
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.0.readable.as_fd())
    }

    fn set_attached(&self, _attached: bool) -> Result<(), UplinkError> {
        Ok(())
    }
}

/// Calls `work` with a front-end that is connected to a device of `uplink`, and the device.
fn with_frontend(
    uplink: &Arc<EndlessUplink>,
    features: u64,
    work: impl FnOnce(&mut TestFrontend, &NetDevice),
) {
    let config = TestFrontendConfig::new(1, SIZE, features);
    common::with_frontend(Arc::new(Handle(Arc::clone(uplink))), &config, work);
}

fn stats(device: &NetDevice) -> [Arc<VringStats>; 2] {
    let served = device.pairs().next().unwrap();
    [served.pair.rx().stats(), served.pair.tx().stats()].map(Arc::clone)
}

/// Makes as many frames available at once as the transmitq has space for.
fn flood(frontend: &mut TestFrontend) -> u64 {
    let tx = &mut frontend.pairs[0].tx;
    let mut count = 0;
    while tx.queue(&NetHeader::default(), &[0x55; 60]).unwrap() {
        count += 1;
    }
    tx.flush().unwrap();
    count
}

#[test]
fn full_transmitq_and_busy_uplink_take_turns_on_their_worker() {
    /// The frames of a TX turn: 256, and the rest of the burst in which it reaches them.
    const TX_TURN: usize = 256 + 63;
    /// The frames of an RX turn.
    const RX_TURN: usize = 64;
    let uplink = EndlessUplink::new(false);
    with_frontend(&uplink, MODERN, |frontend, device| {
        let [_, tx] = stats(device);
        let count = flood(frontend);
        assert!(count > 3 * to_u64(TX_TURN), "{count}");
        wait_until("all frames are sent", || tx.frames.get() == count);
    });
    // The lengths of the turns, the first one of TX.
    let mut turns = vec![(true, 0)];
    for event in uplink.events() {
        let (is_tx, frames) = match event {
            Event::Transmitted(frames) => (true, frames),
            Event::Received => (false, 1),
        };
        match turns.last_mut() {
            Some((last, total)) if *last == is_tx => *total += frames,
            _ => turns.push((is_tx, frames)),
        }
    }
    // The uplink becomes readable during the first turn, and the worker learns of it before the
    // next pass, whose TX turn comes first.
    let mut limit = 2 * TX_TURN;
    let last_tx = turns.iter().rposition(|(is_tx, _)| *is_tx).unwrap();
    assert!(last_tx >= 2, "RX had no turn: {turns:?}");
    for &(is_tx, frames) in &turns[..=last_tx] {
        let most = if is_tx { limit } else { RX_TURN };
        assert!(frames <= most, "{turns:?}");
        limit = TX_TURN;
    }
}

#[test]
fn starved_receiveq_of_a_busy_uplink_lets_its_worker_sleep_until_buffers_come() {
    let uplink = EndlessUplink::new(true);
    with_frontend(&uplink, MODERN, |frontend, device| {
        let [rx, tx] = stats(device);
        frontend.pairs[0].rx.refill = false;
        let mut starved = 0;
        for _ in 0..3 {
            wait_until("it starves", || rx.rx_starved.get() > starved);
            let (events, frames) = (uplink.events().len(), rx.frames.get());
            starved = rx.rx_starved.get();
            // A worker that spins would try again all the time, and count it. Messages of the
            // front-end wake it as well.
            thread::sleep(Duration::from_millis(100));
            let repeated = rx.rx_starved.get() - starved;
            assert!(repeated <= 10, "{repeated} times more");
            assert_eq!((uplink.events().len(), rx.frames.get()), (events, frames));
            // TX goes on meanwhile.
            let sent = tx.frames.get();
            let transmitq = &mut frontend.pairs[0].tx;
            transmitq.queue(&NetHeader::default(), &[0x55; 60]).unwrap();
            transmitq.flush().unwrap();
            wait_until("a frame is sent", || tx.frames.get() == sent + 1);
            let receiveq = &mut frontend.pairs[0].rx;
            starved = rx.rx_starved.get();
            receiveq.receive_frames().unwrap();
            receiveq.fill().unwrap();
            wait_until("frames are received", || rx.frames.get() > frames);
        }
    });
}

#[test]
fn driver_that_asks_for_every_call_gets_one_for_a_burst_at_most() {
    const EVENT_IDX: u64 = 1 << 29;
    let uplink = EndlessUplink::new(false);
    // Without EVENT_IDX the driver cannot say at which chain it wants a call.
    with_frontend(&uplink, MODERN & !EVENT_IDX, |frontend, device| {
        let [_, tx] = stats(device);
        let before = tx.calls.get();
        let is_used = frontend.pairs[0].tx.queue.ring.enable_calls();
        assert!(!is_used, "nothing was sent yet");
        let count = flood(frontend);
        wait_until("all frames are sent", || tx.frames.get() == count);
        wait_until("a call is made", || tx.calls.get() > before);
        let calls = tx.calls.get() - before;
        assert!(calls <= tx.bursts.get(), "{calls} calls");
        assert!(calls * 32 <= count, "{calls} calls for {count} frames");
    });
}
