//! An uplink of your own: `Loopback` returns each frame to the queue pair that transmitted it.
//! `main` drives it through a device's queues, with the driver's ends of the rings in the same
//! process.
//!
//! Run it with `cargo run -p virtionet-uplink --example own_uplink`.
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use virtionet_guest::frame::{FrameSpec, Transport};
use virtionet_guest::memory::GuestRam;
use virtionet_guest::net::{DriverQueue, DriverQueueConfig, MODERN};
use virtionet_guest::{rx::DriverRxQueue, tx::DriverTxQueue};
use virtionet_virtio_net::features::Features;
use virtionet_virtio_net::header::FrameFormat;
use virtionet_virtio_net::stats::{VringStats, to_u64};
use virtionet_virtio_net::uplink::{Received, RxSink, TxFrame, Uplink, UplinkError, UplinkQueue};
use virtionet_virtio_net::{DeviceQueue, QueueConfig, RxQueue, TxQueue};
use virtionet_virtqueue::VirtqueueLayout;
use virtionet_virtqueue::memory::GuestSlice;

/// The uplink of one device: it opens a queue for each queue pair.
#[derive(Debug)]
struct Loopback;

impl Uplink for Loopback {
    fn open_queue(
        &self,
        _pair: u16,
        rx: Weak<dyn RxSink>,
    ) -> Result<Arc<dyn UplinkQueue>, UplinkError> {
        let is_attached = AtomicBool::new(false);
        Ok(Arc::new(LoopbackQueue { rx, is_attached }))
    }

    // The guest's own frames request only what the guest accepts, if the offloads of both
    // directions are negotiated. Otherwise an uplink converts frames with
    // `virtionet_virtio_net::offload`.
    fn set_format(&self, _format: FrameFormat) -> Result<(), UplinkError> {
        Ok(())
    }

    fn set_mtu(&self, _mtu: u16) -> Result<(), UplinkError> {
        Ok(())
    }

    fn kind(&self) -> &'static str {
        "loopback"
    }

    fn name(&self) -> String {
        "loopback".into()
    }
}

/// The queue of one queue pair.
#[derive(Debug)]
struct LoopbackQueue {
    rx: Weak<dyn RxSink>,
    is_attached: AtomicBool,
}

impl UplinkQueue for LoopbackQueue {
    fn transmit(&self, frames: &[TxFrame<'_>], stats: &VringStats) {
        match self.rx.upgrade() {
            Some(rx) if self.is_attached.load(Ordering::Relaxed) => _ = rx.push(frames),
            // Each frame that is not carried has a counter.
            _ => return stats.dropped_uplink_down.add(to_u64(frames.len())),
        }
        stats.frames.add(to_u64(frames.len()));
        stats
            .bytes
            .add(frames.iter().map(|frame| to_u64(frame.len)).sum());
    }

    // Frames are pushed, so there is nothing to read and nothing to wait for.
    fn receive(&self, _buffers: &[GuestSlice<'_>], _bounce: &mut [u8]) -> Received {
        Received::Empty
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn set_attached(&self, attached: bool) -> Result<(), UplinkError> {
        self.is_attached.store(attached, Ordering::Relaxed);
        Ok(())
    }
}

/// A receiveq that other threads push to. In the daemon, this is the vring's slot.
#[derive(Debug)]
struct Receiveq(Mutex<RxQueue>);

impl RxSink for Receiveq {
    fn push(&self, frames: &[TxFrame<'_>]) -> usize {
        let mut queue = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match queue.push(frames) {
            Ok(pushed) => pushed.descriptors_read,
            Err(fault) => {
                println!("the receiveq must be quarantined: {fault}");
                0
            }
        }
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    // The driver's ends: a receiveq full of buffers, and a transmitq.
    let config = DriverQueueConfig::new(64, MODERN);
    let ram = GuestRam::new((config.memory() + 64 * 1024).next_multiple_of(4096))?;
    let mut driver_rx = DriverRxQueue::new(&ram, &config)?;
    let mut driver_tx = DriverTxQueue::new(&ram, &config)?;
    driver_rx.fill()?;

    // The device's ends, and the uplink.
    let rx = Arc::new(Receiveq(Mutex::new(device_queue(&ram, &driver_rx.queue)?)));
    let mut tx: TxQueue = device_queue(&ram, &driver_tx.queue)?;
    let uplink = Loopback;
    uplink.set_format(Features(MODERN).format())?;
    let weak: Weak<Receiveq> = Arc::downgrade(&rx);
    let queue = uplink.open_queue(0, weak)?;
    queue.set_attached(true)?;

    // The guest transmits three frames and receives them again.
    for text in ["one", "two", "three"] {
        driver_tx.send(&FrameSpec::v4(Transport::Udp).build(text.as_bytes())?)?;
    }
    let outcome = tx.send(Some(&*queue))?;
    println!(
        "transmitted {} frames, {} bytes",
        outcome.chains, outcome.bytes
    );
    for frame in driver_rx.receive_frames()? {
        println!("received {} bytes", frame.bytes.len());
    }
    Ok(())
}

/// The device's end of a driver's ring.
fn device_queue<Q: DeviceQueue>(ram: &GuestRam, driver: &DriverQueue) -> Result<Q, Box<dyn Error>> {
    let ring = driver.setup()?;
    let user_addr = |addr| {
        ram.user_addr(addr)
            .ok_or("the ring is outside of guest memory")
    };
    Ok(Q::new(QueueConfig {
        layout: VirtqueueLayout {
            size: ring.size,
            desc: user_addr(ring.addresses.descriptors)?,
            avail: user_addr(ring.addresses.driver)?,
            used: user_addr(ring.addresses.device)?,
        },
        base: ring.base,
        features: Features(MODERN),
        memory: Arc::new(ram.guest_memory()?),
        stats: Arc::default(),
        record: None,
    })?)
}
