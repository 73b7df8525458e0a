//! A driver's transmitq and the device's end of it, in both ring formats.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{FULL, PLAIN, RecordingUplink};
use virtionet_guest::frame::{Frame, FrameSpec, Transport};
use virtionet_guest::memory::GuestRam;
use virtionet_guest::net::{self, PACKED, TxLayout};
use virtionet_guest::tx;
use virtionet_virtio_net::features::Features;
use virtionet_virtio_net::stats::VringStats;
use virtionet_virtio_net::{DeviceQueue, QueueConfig, TxQueue};
use virtionet_virtqueue::VirtqueueLayout;

fn device(ram: &GuestRam, driver: &tx::DriverTxQueue, features: u64) -> TxQueue {
    let setup = driver.queue.setup().unwrap();
    let user = |addr| ram.user_addr(addr).unwrap();
    let config = QueueConfig {
        layout: VirtqueueLayout {
            size: setup.size,
            desc: user(setup.addresses.descriptors),
            avail: user(setup.addresses.driver),
            used: user(setup.addresses.device),
        },
        base: setup.base,
        features: Features(features),
        memory: Arc::new(ram.guest_memory().unwrap()),
        stats: Arc::new(VringStats::default()),
        record: None,
    };
    TxQueue::new(config).unwrap()
}

fn frames(count: u32) -> Vec<Frame> {
    let make = |sequence: u32| {
        let mut spec = FrameSpec::v4(Transport::Tcp);
        spec.sequence = sequence;
        let len = usize::try_from(sequence % 90).unwrap();
        spec.build(&vec![7; len]).unwrap()
    };
    (0..count).map(make).collect()
}

/// Passes frames through a queue in bursts, and restarts the device from its base in between.
fn pass(size: u16, features: u64, layout: TxLayout) {
    let name = format!("{size} descriptors, {features:#x}, {layout:?}");
    let config = net::DriverQueueConfig {
        tx_layout: layout,
        ..net::DriverQueueConfig::new(size, features)
    };
    let ram = GuestRam::new((config.memory() + 0x1_0000).next_multiple_of(4096)).unwrap();
    let mut driver = tx::DriverTxQueue::new(&ram, &config).unwrap();
    let mut tx = device(&ram, &driver, features);
    let uplink = RecordingUplink::default();
    let sent = frames(500);
    let mut left = &sent[..];
    let mut arrived = Vec::new();
    while !left.is_empty() {
        let mut queued = 0;
        for frame in left.iter().take(100) {
            if !driver.queue(&frame.header, &frame.bytes).unwrap() {
                break;
            }
            queued += 1;
        }
        assert!(queued > 0, "{name}");
        driver.flush().unwrap();
        left = &left[queued..];
        let mut called = false;
        while tx.has_more() {
            called |= tx.send(Some(&uplink)).unwrap().should_call;
        }
        if called {
            driver.queue.call.signal().unwrap();
        }
        assert_eq!(tx.rewind(), driver.queue.ring.base(), "{name}");
        driver.drain(Duration::from_secs(1)).unwrap();
        arrived.append(&mut uplink.sent());
        if left.len().is_multiple_of(3) {
            tx = device(&ram, &driver, features);
        }
    }
    assert_eq!(arrived.len(), sent.len(), "{name}");
    for (arrived, sent) in arrived.iter().zip(&sent) {
        assert_eq!(arrived.bytes, sent.bytes, "{name}");
    }
}

#[test]
fn frames_pass_in_order_in_every_format_and_layout() {
    let layouts = [
        TxLayout::Single,
        TxLayout::SeparateHeader,
        TxLayout::Segments(60),
    ];
    for features in [FULL, PLAIN] {
        for layout in layouts {
            for size in [16, 256] {
                pass(size, features, layout);
            }
            for size in [5, 16, 100, 256] {
                pass(size, features | PACKED, layout);
            }
        }
    }
    // The smallest ring has one descriptor, which the driver and the device use in turn.
    for layout in layouts {
        pass(1, FULL | PACKED, layout);
    }
}
